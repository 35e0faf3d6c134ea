"""A head that reads maps as a graph: by itself, for a device, or behind the backbone's, for one standalone model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgepet.deltas.heads import Map, MapHead
from edgepet.deltas.layers import Shape
from edgepet.graphs.head_layers import Emitted, Place, bilinear, emit
from edgepet.graphs.maps import GraphMap, putting_out
from edgepet.graphs.onnx_file import OnnxFile, new_file, port

LOGITS, MASK = "logits", "mask"
PREFIX = "head."  # begins all names that a head brings into a graph
OWN = PREFIX + "Mask."  # and those of what makes a mask: no layer of a head has a capital in its name
_UINT8 = 2  # onnx.TensorProto.DataType


def head_file(head: MapHead, maps: Sequence[Map], width: int) -> OnnxFile:
    """``head`` as a model of its own, float32: maps and features by name to LOGITS (batch, C, h, w).

    Raises:
        InputError: as ``MapHead.shapes``.
    """
    shapes = head.shapes(maps, width=width)
    out = _emitted(head, shapes)
    inputs = {name: port(name, ("batch", *shapes[name])) for name in head.inputs}
    outputs = {LOGITS: port(LOGITS, ("batch", *shapes[head.steps[-1].gives]))}
    return new_file("head", out.nodes, out.tensors, inputs, outputs)


def with_head(file: OnnxFile, head: MapHead, maps: Sequence[GraphMap], width: int, size: tuple[int, int]) -> OnnxFile:
    """A backbone's ``file`` with ``head`` behind it: LOGITS (batch, C, h, w), and MASK, uint8 (batch, *size).

    Raises:
        InputError: as ``MapHead.shapes`` and ``putting_out``.
    """
    shapes = head.shapes([each.map for each in maps], width=width)
    grown, out, answer = putting_out(file, maps, head.inputs), _emitted(head, shapes), shapes[head.steps[-1].gives]
    behind = replace(
        grown, nodes=(*grown.nodes, *out.nodes), tensors={**grown.tensors, **out.tensors},
        outputs={LOGITS: port(LOGITS, ("batch", *answer))},
    )  # fmt: skip
    return with_mask(behind, answer, size)


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
    """The head's nodes: what it gives is called LOGITS, and all else begins with PREFIX."""
    out, last = Emitted(PREFIX), head.steps[-1].gives
    named = {name: name for name in head.inputs}
    for step in head.steps:
        named[step.gives] = LOGITS if step.gives == last else PREFIX + step.gives
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
