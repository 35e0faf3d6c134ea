"""A model that takes pictures as they are decoded, uint8 (batch, H, W, 3), RGB: preprocessing is inside of it.

With ``resize`` they are of any size, and resizing is Pillow's, in products with matrices that the graph makes of the
size: all taps, in weights of 22 bits, each direction rounded to 8 bits, horizontally first. Every runtime multiplies
alike, whereas each has a resizing of its own. Weights are split in two, whose products float32 sums without rounding;
what is left is that they are computed in float32, and one in many is a unit of 2^-22 off: where a sum lies between two
levels, a pixel may have the other one. Pillow 13 goes vertically first where a picture is more than twice as tall as
wide, or squashed hard: there two levels. Turning a photograph upright is left to who decodes it.

Source: Pillow's ``src/libImaging/Resample.c``; for the sizes ``edgepet.images.preprocess``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepet.errors import InputError, option, require
from edgepet.graphs.base import INPUT
from edgepet.spec import NpArray, Preprocess

if TYPE_CHECKING:
    from onnx import ModelProto

_MADE = "edgepet.pixels."


def taking_pixels(model: ModelProto, preprocess: Preprocess, *, resize: bool = False, where: str) -> ModelProto:
    """A copy of ``model`` that takes uint8 ``images`` (batch, H, W, 3), of clips (batch, frames, H, W, 3).

    Args:
        resize: pictures of any size, all of a batch of one.

    Raises:
        InputError: clips are to be resized.
        MissingError: onnx is not installed.
    """
    onnx = require("onnx", extra="train", purpose="ONNX")
    clips = preprocess.frames > 1
    if clips and resize:
        raise InputError(
            where, f"looks at clips, which {option('resize')} is not for", fix=f"leave out {option('resize')}"
        )
    made = type(model)()
    made.CopyFrom(model)
    writer, graph = _Writer(onnx), made.graph
    for node in graph.node:
        node.input[:] = [f"{_MADE}normal" if name == INPUT else name for name in node.input]
    flowing = writer.node("Cast", INPUT, to=onnx.TensorProto.FLOAT)
    flowing = writer.node("Transpose", flowing, perm=[0, 1, 4, 2, 3] if clips else [0, 3, 1, 2])
    if resize:
        flowing = _fitted(writer, flowing, preprocess)
    flowing = writer.node("Div", flowing, writer.constant(np.float32(255)))
    for operator, values in (("Sub", preprocess.mean), ("Div", preprocess.std)):
        flowing = writer.node(operator, flowing, writer.constant(np.array(values, np.float32)[:, None, None]))
    writer.nodes[-1].output[0] = f"{_MADE}normal"
    nodes = [*writer.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(writer.constants)
    (old,) = (each for each in graph.input if each.name == INPUT)
    batch = old.type.tensor_type.shape.dim[0].dim_param or "batch"
    sides = ("height", "width") if resize else preprocess.image_size
    shape = [batch, *([preprocess.frames] if clips else []), *sides, 3]
    old.CopyFrom(onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, shape))
    made.metadata_props.add(key="edgepet.input", value="uint8, resized inside" if resize else "uint8")
    return made


def _fitted(writer: _Writer, images: str, preprocess: Preprocess) -> str:
    """``images``, float32 (n, 3, h, w), resized and cropped, whole numbers."""
    sizes = writer.node("Shape", INPUT)
    height, width = (writer.node("Gather", sizes, writer.constant(np.int64(axis))) for axis in (1, 2))
    edges = [math.floor(edge / preprocess.crop_fraction) for edge in preprocess.image_size]
    if preprocess.crop == "squash":
        to_height, to_width = (writer.constant(np.int64(edge)) for edge in edges)
    elif edges[0] == edges[1]:
        short = writer.node("Min", height, width)
        to_height, to_width = (
            writer.node("Div", writer.node("Mul", side, writer.constant(np.int64(edges[0]))), short)
            for side in (height, width)
        )
    else:
        wanted = [writer.real(side) for side in (height, width)]
        ratios = [
            writer.node("Div", side, writer.constant(np.float32(edge)))
            for side, edge in zip(wanted, edges, strict=True)
        ]
        ratio = writer.node("Min", *ratios)
        to_height, to_width = (writer.whole(writer.node("Round", writer.node("Div", side, ratio))) for side in wanted)
    across = _weights(writer, width, to_width, preprocess.image_size[1], preprocess.interpolation)
    turned = (writer.node("Transpose", part, perm=[1, 0]) for part in across)
    images = _summed(writer, *(writer.node("MatMul", images, part) for part in turned))
    down = _weights(writer, height, to_height, preprocess.image_size[0], preprocess.interpolation)
    return _summed(writer, *(writer.node("MatMul", part, images) for part in down))


def _summed(writer: _Writer, coarse: str, fine: str) -> str:
    """The nearest of 0 to 255 to ``coarse`` + ``fine``, halves up, as Pillow stores a pass; nothing is rounded before.

    ``coarse`` are multiples of 2^-11, ``fine`` small ones of 2^-22.
    """
    raised = writer.node("Add", coarse, writer.constant(np.float32(0.5)))
    whole = writer.node("Floor", raised)
    rest = writer.node("Floor", writer.node("Add", writer.node("Sub", raised, whole), fine))
    nearest = writer.node("Add", whole, rest)
    return writer.node("Clip", nearest, writer.constant(np.float32(0)), writer.constant(np.float32(255)))


def _weights(writer: _Writer, size: str, to: str, crop: int, interpolation: str) -> tuple[str, str]:
    """Two matrices (crop, size) whose sum makes the middle of ``to`` pixels of ``size`` ones.

    Distances are quotients of integers: that of tap j from pixel i of all is ((2j + 1) to - (2i + 1) size) / (2 to), in
    units of the wider of both pixels' sides.
    """
    free = writer.real(writer.node("Sub", to, writer.constant(np.int64(crop))))
    start = writer.whole(writer.node("Round", writer.node("Mul", free, writer.constant(np.float32(0.5)))))
    zero, one, two = (writer.constant(np.int64(number)) for number in (0, 1, 2))
    places = writer.node("Add", writer.constant(2 * np.arange(crop) + 1), writer.node("Mul", start, two))
    taps = writer.node("Add", writer.node("Mul", writer.node("Range", zero, size, one), two), one)
    apart = writer.node(
        "Sub",
        writer.node("Unsqueeze", writer.node("Mul", taps, to), writer.constant(np.array([0]))),
        writer.node("Unsqueeze", writer.node("Mul", places, size), writer.constant(np.array([1]))),
    )
    wide = writer.real(writer.node("Mul", writer.node("Max", size, to), two))
    found = _filter(writer, writer.node("Abs", writer.node("Div", writer.real(apart), wide)), interpolation)
    total = writer.node("ReduceSum", found, writer.constant(np.array([1])), keepdims=1)
    weights = _nearest(writer, writer.node("Div", found, total), 2.0**22)
    coarse = _nearest(writer, weights, 2.0**11)
    return coarse, writer.node("Sub", weights, coarse)


def _nearest(writer: _Writer, values: str, units: float) -> str:
    """``values`` as the nearest multiples of 1 / ``units``."""
    raised = writer.node("Mul", values, writer.constant(np.float32(units)))
    whole = writer.node("Floor", writer.node("Add", raised, writer.constant(np.float32(0.5))))
    return writer.node("Mul", whole, writer.constant(np.float32(1 / units)))


def _filter(writer: _Writer, x: str, interpolation: str) -> str:
    """Pillow's filter at ``x`` >= 0: a triangle, or the cubic with a = -0.5."""

    def number(value: float) -> str:
        return writer.constant(np.float32(value))

    if interpolation == "bilinear":
        return writer.node("Max", writer.node("Sub", number(1), x), number(0))
    square = writer.node("Mul", x, x)
    inner = writer.node("Sub", writer.node("Mul", x, number(1.5)), number(2.5))  # (a + 2) x - (a + 3)
    inner = writer.node("Add", writer.node("Mul", inner, square), number(1))
    outer = writer.node("Add", writer.node("Mul", writer.node("Sub", x, number(5)), x), number(8))
    outer = writer.node("Mul", writer.node("Sub", writer.node("Mul", outer, x), number(4)), number(-0.5))
    outer = writer.node("Where", writer.node("Less", x, number(2)), outer, number(0))
    return writer.node("Where", writer.node("Less", x, number(1)), inner, outer)


class _Writer:
    """Nodes and constants, with names of their own."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self.nodes, self.constants = list[Any](), list[Any]()

    def node(self, operator: str, *reads: str, **settings: object) -> str:
        """A node; the name of what it puts out."""
        name = f"{_MADE}{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(operator, list(reads), [name], name=name, **settings))
        return name

    def constant(self, value: NpArray | np.generic) -> str:
        """A tensor; its name."""
        name = f"{_MADE}constant.{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def real(self, whole: str) -> str:
        """Integers as float32."""
        return self.node("Cast", whole, to=self._onnx.TensorProto.FLOAT)

    def whole(self, real: str) -> str:
        """Whole numbers as int64."""
        return self.node("Cast", real, to=self._onnx.TensorProto.INT64)
