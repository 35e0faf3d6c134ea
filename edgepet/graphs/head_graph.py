"""A head that reads maps as a graph: by itself, for a device, or behind the backbone's, for one standalone model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgepet.deltas.detection import FOUND as FOUND_NUMBERS
from edgepet.deltas.detection import SIDES
from edgepet.deltas.heads import Answer, Map, MapHead
from edgepet.deltas.layers import Shape
from edgepet.graphs.head_layers import Emitted, Place, bilinear, emit
from edgepet.graphs.maps import GraphMap, putting_out
from edgepet.graphs.onnx_file import OnnxFile, new_file, port

LOGITS, MASK = "logits", "mask"
FOUND, BOXES, SCORES, LABELS = "found", "boxes", "scores", "labels"
OUTPUTS: dict[Answer, tuple[str, ...]] = {  # of an exported model, in this order: what a head gives comes first
    "mask": (LOGITS, MASK),
    "boxes": (FOUND, BOXES, SCORES, LABELS),
    "labels": (LOGITS, SCORES),
}
PREFIX = "head."  # begins all names that a head brings into a graph
_UINT8, _INT32 = 2, 6  # onnx.TensorProto.DataType


def decodes(name: str) -> bool:
    """Whether a tensor of a model with FOUND is made by the layer that finds boxes, or is a part of what it gives."""
    return name in (FOUND, BOXES, SCORES) or name.startswith((f"{FOUND}.", f"{PREFIX}{FOUND}."))


OWN = PREFIX + "Mask."  # and those of what makes a mask: no layer of a head has a capital in its name


def head_file(head: MapHead, maps: Sequence[Map], width: int) -> OnnxFile:
    """``head`` as a model of its own, float32: maps and features by name to LOGITS (batch, C, h, w), or FOUND.

    Raises:
        InputError: as ``MapHead.shapes``.
    """
    shapes = head.shapes(maps, width=width)
    out = _emitted(head, shapes)
    inputs = {name: port(name, ("batch", *shapes[name])) for name in head.inputs}
    gives = OUTPUTS[head.answer][0]
    outputs = {gives: port(gives, ("batch", *shapes[head.steps[-1].gives]))}
    return new_file("head", out.nodes, out.tensors, inputs, outputs)


def with_head(file: OnnxFile, head: MapHead, maps: Sequence[GraphMap], width: int, size: tuple[int, int]) -> OnnxFile:
    """A backbone's ``file`` with ``head`` behind it: LOGITS (batch, C, h, w), and MASK, uint8 (batch, *size).

    Of boxes FOUND (batch, m, 6), and its parts BOXES (batch, m, 4), SCORES (batch, m) and LABELS, int32 (batch, m); of
    labels LOGITS (batch, C) and SCORES, their σ.

    Raises:
        InputError: as ``MapHead.shapes`` and ``putting_out``.
    """
    shapes = head.shapes([each.map for each in maps], width=width)
    grown, out, answer = putting_out(file, maps, head.inputs), _emitted(head, shapes), shapes[head.steps[-1].gives]
    gives = OUTPUTS[head.answer][0]
    behind = replace(
        grown, nodes=(*grown.nodes, *out.nodes), tensors={**grown.tensors, **out.tensors},
        outputs={gives: port(gives, ("batch", *answer))},
    )  # fmt: skip
    if head.answer == "labels":
        return _with_scores(behind, answer)
    return with_mask(behind, answer, size) if head.answer == "mask" else _with_boxes(behind, answer)


def _with_scores(file: OnnxFile, answer: Shape) -> OnnxFile:
    """``file``, whose LOGITS are of the shape ``answer``, with their σ as an output of its own."""
    out = Emitted(PREFIX)
    out.node("Sigmoid", [LOGITS], SCORES)
    outputs = {**file.outputs, SCORES: port(SCORES, ("batch", *answer))}
    return replace(file, nodes=(*file.nodes, *out.nodes), outputs=outputs)


def _with_boxes(file: OnnxFile, answer: Shape) -> OnnxFile:
    """``file``, whose FOUND are of the shape ``answer``, with its parts as outputs of their own."""
    out, count = Emitted(PREFIX), answer[0]
    edges = {place: out.integers(f"found.{place}", place) for place in (0, 2, SIDES, SIDES + 1, FOUND_NUMBERS)}
    out.node("Slice", [FOUND, edges[0], edges[SIDES], edges[2]], BOXES)
    for name, first, last in ((SCORES, SIDES, SIDES + 1), (LABELS, SIDES + 1, FOUND_NUMBERS)):
        part = out.node("Slice", [FOUND, edges[first], edges[last], edges[2]], f"{PREFIX}found.{name}")
        flat = SCORES if name == SCORES else f"{PREFIX}found.label"
        out.node("Squeeze", [part, edges[2]], flat)
    out.node("Cast", [f"{PREFIX}found.label"], LABELS, to=_INT32)
    return replace(
        file, nodes=(*file.nodes, *out.nodes), tensors={**file.tensors, **out.tensors},
        outputs={
            **file.outputs, BOXES: port(BOXES, ("batch", count, SIDES)), SCORES: port(SCORES, ("batch", count)),
            LABELS: port(LABELS, ("batch", count), "int32"),
        },
    )  # fmt: skip


def with_mask(file: OnnxFile, answer: Shape, size: tuple[int, int]) -> OnnxFile:
    """``file``, whose LOGITS are of the shape ``answer``, with MASK: every pixel's label as ``mask_of`` says it."""
    out, (_, *sides), resized = Emitted(PREFIX), answer, LOGITS
    if tuple(sides) != size:
        scales = np.array([1, 1, *map(_scale, sides, size)], np.float32)
        resized = OWN + "resized"
        bilinear(LOGITS, out.tensor("Mask.scales", scales), resized, out)
    best = out.node("ArgMax", [resized], OWN + "best", axis=1, keepdims=0)
    out.node("Cast", [best], MASK, to=_UINT8)
    return replace(
        file, nodes=(*file.nodes, *out.nodes), tensors={**file.tensors, **out.tensors},
        outputs={**file.outputs, MASK: port(MASK, ("batch", *size), "uint8")},
    )  # fmt: skip


def _emitted(head: MapHead, shapes: dict[str, Shape]) -> Emitted:
    """The head's nodes: what it gives is called LOGITS or FOUND, and all else begins with PREFIX."""
    out, last = Emitted(PREFIX), head.steps[-1].gives
    named = {name: name for name in head.inputs}
    for step in head.steps:
        named[step.gives] = OUTPUTS[head.answer][0] if step.gives == last else PREFIX + step.gives
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
