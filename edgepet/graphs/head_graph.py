"""Heads that read maps as a graph: by themselves, for a device, or behind the backbone's, for one standalone model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgepet.deltas.detection import FOUND as FOUND_NUMBERS
from edgepet.deltas.detection import SIDES
from edgepet.deltas.heads import Answer, Map, MapHead
from edgepet.deltas.joined import reads_of
from edgepet.deltas.layers import Shape
from edgepet.graphs.head_layers import Emitted, Place, bilinear, emit
from edgepet.graphs.maps import GraphMap, putting_out
from edgepet.graphs.onnx_file import Node, OnnxFile, new_file, port

LOGITS, MASK = "logits", "mask"
FOUND, BOXES, SCORES, LABELS = "found", "boxes", "scores", "labels"
OUTPUTS: dict[Answer, tuple[str, ...]] = {  # of an exported model, in this order: what a head gives comes first
    "mask": (LOGITS, MASK),
    "boxes": (FOUND, BOXES, SCORES, LABELS),
    "labels": (LOGITS, SCORES),
}
_KINDS = {MASK: "uint8", LABELS: "int32"}  # of outputs that are no float32
PREFIX = "head."  # begins all names that a head brings into a graph
_UINT8, _INT32 = 2, 6  # onnx.TensorProto.DataType


# The corners of boxes, and what computes them; of several heads behind the head's name.
_DECODES = re.compile(r"([a-z][a-z0-9-]*\.)?(found|boxes|scores)|(head\.)?([a-z][a-z0-9-]*\.)?found\..*")


def are_answers(names: Sequence[str]) -> bool:
    """Whether outputs of these names, in this order, are those of a head that reads maps, or of several such heads."""
    if "." not in names[0]:
        return tuple(names) in OUTPUTS.values()
    groups = dict[str, list[str]]()
    for name in names:
        head, _, part = name.partition(".")
        groups.setdefault(head, []).append(part)
    return len(groups) > 1 and all(tuple(parts) in OUTPUTS.values() for parts in groups.values())


def output_type(name: str) -> str:
    """What an output of this name is made of."""
    return _KINDS.get(name.rpartition(".")[2], "float32")


def decodes(name: str) -> bool:
    """Whether a tensor of a model with FOUND is made by the layer that finds boxes, or is a part of what it gives."""
    return _DECODES.fullmatch(name) is not None


OWN = PREFIX + "Mask."  # and those of what makes a mask: no layer of a head has a capital in its name


def scope_of(heads: Sequence[MapHead], head: MapHead) -> str:
    """What names of ``head`` begin with where it is one of several."""
    return "" if len(heads) == 1 else f"{head.name}."


def answer_names(heads: Sequence[MapHead]) -> tuple[str, ...]:
    """What the answer of each of ``heads`` is called among a model's outputs; no names of a classifier, its one."""
    return tuple(scope_of(heads, head) + OUTPUTS[head.answer][0] for head in heads)


def head_file(heads: Sequence[MapHead], maps: Sequence[Map], width: int) -> OnnxFile:
    """``heads`` as a model of their own, float32: maps and features by name to what each gives first, in their order.

    Raises:
        InputError: as ``MapHead.shapes``.
    """
    inputs, outputs = dict[str, bytes](), dict[str, bytes]()
    nodes, tensors = list[Node](), dict[str, bytes]()
    for head in heads:
        shapes, scope = head.shapes(maps, width=width), scope_of(heads, head)
        out = _emitted(head, shapes, scope)
        nodes += out.nodes
        tensors |= out.tensors
        inputs |= {name: port(name, ("batch", *shapes[name])) for name in head.inputs}
        gives = scope + OUTPUTS[head.answer][0]
        outputs[gives] = port(gives, ("batch", *shapes[head.steps[-1].gives]))
    return new_file("head", nodes, tensors, dict(sorted(inputs.items())), outputs)


def with_head(
    file: OnnxFile, heads: Sequence[MapHead], maps: Sequence[GraphMap], width: int, size: tuple[int, int]
) -> OnnxFile:
    """A backbone's ``file`` with ``heads`` behind it: of a mask LOGITS (batch, C, h, w) and MASK, uint8 (batch, *size).

    Of boxes FOUND (batch, m, 6), and its parts BOXES (batch, m, 4), SCORES (batch, m) and LABELS, int32 (batch, m); of
    labels LOGITS (batch, C) and SCORES, their σ. Of several heads each name has the head's before it: ``mask.logits``.

    Raises:
        InputError: as ``MapHead.shapes`` and ``putting_out``.
    """
    grown = replace(putting_out(file, maps, reads_of(heads)), outputs={})
    for head in heads:
        shapes, scope = head.shapes([each.map for each in maps], width=width), scope_of(heads, head)
        out, answer, gives = _emitted(head, shapes, scope), shapes[head.steps[-1].gives], OUTPUTS[head.answer][0]
        grown = replace(
            grown, nodes=(*grown.nodes, *out.nodes), tensors={**grown.tensors, **out.tensors},
            outputs={**grown.outputs, scope + gives: port(scope + gives, ("batch", *answer))},
        )  # fmt: skip
        if head.answer == "labels":
            grown = _with_scores(grown, answer, scope)
        elif head.answer == "mask":
            grown = with_mask(grown, answer, size, scope)
        else:
            grown = _with_boxes(grown, answer, scope)
    return grown


def _with_scores(file: OnnxFile, answer: Shape, scope: str) -> OnnxFile:
    """``file``, whose LOGITS are of the shape ``answer``, with their σ as an output of its own."""
    out, scores = Emitted(PREFIX + scope), scope + SCORES
    out.node("Sigmoid", [scope + LOGITS], scores)
    outputs = {**file.outputs, scores: port(scores, ("batch", *answer))}
    return replace(file, nodes=(*file.nodes, *out.nodes), outputs=outputs)


def _with_boxes(file: OnnxFile, answer: Shape, scope: str) -> OnnxFile:
    """``file``, whose FOUND are of the shape ``answer``, with its parts as outputs of their own."""
    prefix = PREFIX + scope
    out, count, found = Emitted(prefix), answer[0], scope + FOUND
    boxes, scores, labels = (scope + name for name in (BOXES, SCORES, LABELS))
    edges = {place: out.integers(f"found.{place}", place) for place in (0, 2, SIDES, SIDES + 1, FOUND_NUMBERS)}
    out.node("Slice", [found, edges[0], edges[SIDES], edges[2]], boxes)
    for name, first, last in ((SCORES, SIDES, SIDES + 1), (LABELS, SIDES + 1, FOUND_NUMBERS)):
        part = out.node("Slice", [found, edges[first], edges[last], edges[2]], f"{prefix}found.{name}")
        flat = scores if name == SCORES else f"{prefix}found.label"
        out.node("Squeeze", [part, edges[2]], flat)
    out.node("Cast", [f"{prefix}found.label"], labels, to=_INT32)
    return replace(
        file, nodes=(*file.nodes, *out.nodes), tensors={**file.tensors, **out.tensors},
        outputs={
            **file.outputs, boxes: port(boxes, ("batch", count, SIDES)), scores: port(scores, ("batch", count)),
            labels: port(labels, ("batch", count), "int32"),
        },
    )  # fmt: skip


def with_mask(file: OnnxFile, answer: Shape, size: tuple[int, int], scope: str = "") -> OnnxFile:
    """``file``, whose LOGITS are of the shape ``answer``, with MASK: every pixel's label as ``mask_of`` says it."""
    out, (_, *sides), resized = Emitted(PREFIX + scope), answer, scope + LOGITS
    own, mask = f"{PREFIX}{scope}Mask.", scope + MASK
    if tuple(sides) != size:
        scales = np.array([1, 1, *map(_scale, sides, size)], np.float32)
        resized = own + "resized"
        bilinear(scope + LOGITS, out.tensor("Mask.scales", scales), resized, out)
    best = out.node("ArgMax", [resized], own + "best", axis=1, keepdims=0)
    out.node("Cast", [best], mask, to=_UINT8)
    return replace(
        file, nodes=(*file.nodes, *out.nodes), tensors={**file.tensors, **out.tensors},
        outputs={**file.outputs, mask: port(mask, ("batch", *size), "uint8")},
    )  # fmt: skip


def _emitted(head: MapHead, shapes: dict[str, Shape], scope: str = "") -> Emitted:
    """The head's nodes: what it gives is called LOGITS or FOUND behind ``scope``, and all else begins with PREFIX."""
    out, last = Emitted(PREFIX + scope), head.steps[-1].gives
    named = {name: name for name in head.inputs}
    for step in head.steps:
        named[step.gives] = scope + OUTPUTS[head.answer][0] if step.gives == last else PREFIX + scope + step.gives
        place = Place(
            reads=tuple(named[name] for name in step.reads), gives=named[step.gives], name=step.gives,
            shapes=tuple(shapes[name] for name in step.reads), shape=shapes[step.gives],
        )  # fmt: skip
        emit(step, place, out)
    return out


def _scale(was: int, now: int) -> np.float32:
    """What a runtime multiplies ``was`` with, and rounds down, to come to ``now``."""
    scale = np.float32(now / was)
    return scale if int(scale * np.float32(was)) == now else np.nextafter(scale, np.float32(np.inf))
