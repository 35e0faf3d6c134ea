"""The ONNX nodes of each layer of a head: its third definition, tied to the one in NumPy by a contract test.

Operators are those that ONNX Runtime, OpenVINO and TensorRT all take; a resize tells the scales of all four axes, since
TensorRT reads no other form. Nothing here needs the ``onnx`` package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import numpy as np

from edgepet.deltas.asking import places_of
from edgepet.deltas.detection import FOUND
from edgepet.deltas.heads import Step
from edgepet.deltas.layers import (
    Activation,
    Ask,
    Attend,
    Attention,
    Compare,
    Conv,
    Deconv,
    Depthwise,
    Detect,
    Layer,
    Norm,
    Point,
    Pool,
    Regions,
    Resize,
    Shape,
    Shift,
    Unit,
)
from edgepet.graphs.onnx_file import Attribute, Node, tensor_of
from edgepet.spec import NpArray


@dataclass(slots=True)
class Emitted:
    """Nodes in the order in which they run, and the messages of the tensors that they read, by name.

    All names of tensors begin with ``prefix``, so that no graph that they are put behind has them.
    """

    prefix: str
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, bytes] = field(default_factory=dict)
    _held: dict[tuple[int, tuple[int, ...]], tuple[str, NpArray]] = field(default_factory=dict)

    def tensor(self, name: str, value: NpArray, shape: Sequence[int] | None = None) -> str:
        """The name of a float32 tensor that holds ``value``, in ``shape``; what is held already is not held again."""
        sides = tuple(value.shape if shape is None else shape)
        key = id(value), sides
        if key not in self._held:
            self._held[key] = f"{self.prefix}{name}", value
            self.tensors[f"{self.prefix}{name}"] = tensor_of(
                f"{self.prefix}{name}", value.astype(np.float32).reshape(sides)
            )
        return self._held[key][0]

    def integers(self, name: str, *values: int) -> str:
        """The name of a tensor of integers."""
        self.tensors[f"{self.prefix}{name}"] = tensor_of(f"{self.prefix}{name}", np.array(values, np.int64))
        return f"{self.prefix}{name}"

    def node(self, operator: str, reads: Sequence[str], gives: str, **attributes: Attribute) -> str:
        """Put a node behind the others; returns what it gives."""
        self.nodes.append(Node(operator, tuple(reads), (gives,)).with_attributes(**attributes))
        return gives


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A layer in a graph: names that it reads and gives, shapes of one image of both, what its tensors are called."""

    reads: tuple[str, ...]
    gives: str
    shapes: tuple[Shape, ...]
    shape: Shape
    name: str

    def inner(self, part: str) -> str:
        """A name for what flows inside of it; no tensor's, whose names go on with a dot."""
        return f"{self.gives}/{part}"


def emit(step: Step, place: Place, out: Emitted) -> None:
    """Put the nodes of a step's layer behind those of ``out``."""
    EMITTERS[step.layer.kind](step.layer, place, out)


def _biased(name: str, bias: NpArray | None, out: Emitted) -> list[str]:
    return [] if bias is None else [out.tensor(f"{name}.bias", bias)]


def _point(layer: Layer, place: Place, out: Emitted) -> None:
    given = cast(Point, layer)
    if len(place.shapes[0]) == 1:
        reads = [place.reads[0], out.tensor(f"{place.name}.weight", given.weight)]
        out.node("Gemm", [*reads, *_biased(place.name, given.bias, out)], place.gives, transB=1)
        return
    kernel = out.tensor(f"{place.name}.weight", given.weight, (*given.weight.shape, 1, 1))
    out.node("Conv", [place.reads[0], kernel, *_biased(place.name, given.bias, out)], place.gives)


def _depthwise(layer: Layer, place: Place, out: Emitted) -> None:
    given = cast(Depthwise, layer)
    channels, side, _ = given.weight.shape
    kernel = out.tensor(f"{place.name}.weight", given.weight, (channels, 1, side, side))
    reads = [place.reads[0], kernel, *_biased(place.name, given.bias, out)]
    out.node("Conv", reads, place.gives, group=channels, pads=(side // 2,) * 4)


def _conv(layer: Layer, place: Place, out: Emitted) -> None:
    given = cast(Conv, layer)
    reads = [place.reads[0], out.tensor(f"{place.name}.weight", given.weight), *_biased(place.name, given.bias, out)]
    pads, strides = (given.weight.shape[2] // 2,) * 4, (given.stride,) * 2
    out.node("Conv", reads, place.gives, pads=pads, strides=strides)


def _deconv(layer: Layer, place: Place, out: Emitted) -> None:
    given = cast(Deconv, layer)
    reads = [place.reads[0], out.tensor(f"{place.name}.weight", given.weight), *_biased(place.name, given.bias, out)]
    out.node("ConvTranspose", reads, place.gives, strides=(2, 2))


def _resize(layer: Layer, place: Place, out: Emitted) -> None:
    given = cast(Resize, layer)
    scales = out.tensor(f"{place.name}.scales", np.array([1, 1, given.factor, given.factor], np.float32))
    if given.mode == "nearest":
        out.node(
            "Resize", [place.reads[0], "", scales], place.gives, mode="nearest", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )  # fmt: skip
    else:
        bilinear(place.reads[0], scales, place.gives, out)


def bilinear(read: str, scales: str, gives: str, out: Emitted) -> None:
    """A resize between the middles of places, by a tensor of the scales of all four axes."""
    out.node("Resize", [read, "", scales], gives, mode="linear", coordinate_transformation_mode="half_pixel")


def _pool(layer: Layer, place: Place, out: Emitted) -> None:
    sides = (cast(Pool, layer).size,) * 2
    out.node("MaxPool", place.reads, place.gives, kernel_shape=sides, strides=sides)


def _add(layer: Layer, place: Place, out: Emitted) -> None:
    total, *others = place.reads
    for number, other in enumerate(others, start=1):
        gives = place.gives if number == len(others) else place.inner(f"sum{number}")
        total = out.node("Add", [total, other], gives)


def _multiply(layer: Layer, place: Place, out: Emitted) -> None:
    out.node("Mul", place.reads, place.gives)


def _concat(layer: Layer, place: Place, out: Emitted) -> None:
    out.node("Concat", place.reads, place.gives, axis=1)


def _activation(layer: Layer, place: Place, out: Emitted) -> None:
    operators = {"relu": "Relu", "gelu": "Gelu", "sigmoid": "Sigmoid"}
    out.node(operators[cast(Activation, layer).name], place.reads, place.gives)


def _norm(layer: Layer, place: Place, out: Emitted) -> None:
    given, axis = cast(Norm, layer), out.integers(f"{place.name}.axis", 1)
    mean = out.node("ReduceMean", [place.reads[0], axis], place.inner("mean"), keepdims=1)
    centred = out.node("Sub", [place.reads[0], mean], place.inner("centred"))
    squares = out.node("Mul", [centred, centred], place.inner("squares"))
    variance = out.node("ReduceMean", [squares, axis], place.inner("variance"), keepdims=1)
    eps = out.tensor(f"{place.name}.eps", np.array(given.eps, np.float32), ())
    deviation = out.node("Sqrt", [out.node("Add", [variance, eps], place.inner("above"))], place.inner("deviation"))
    if given.weight is None or given.bias is None:
        out.node("Div", [centred, deviation], place.gives)
        return
    sides = (len(given.weight), *[1] * (len(place.shape) - 1))
    normed = out.node("Div", [centred, deviation], place.inner("normed"))
    weight = out.tensor(f"{place.name}.weight", given.weight, sides)
    scaled = out.node("Mul", [normed, weight], place.inner("scaled"))
    out.node("Add", [scaled, out.tensor(f"{place.name}.bias", given.bias, sides)], place.gives)


def _unit(layer: Layer, place: Place, out: Emitted) -> None:
    axis = out.integers(f"{place.name}.axis", 1)
    eps = out.tensor(f"{place.name}.eps", np.array(cast(Unit, layer).eps, np.float32), ())
    squares = out.node("Mul", [place.reads[0], place.reads[0]], place.inner("squares"))
    length = out.node("Sqrt", [out.node("ReduceSum", [squares, axis], place.inner("sum"))], place.inner("length"))
    out.node("Div", [place.reads[0], out.node("Max", [length, eps], place.inner("divisor"))], place.gives)


def _attend(layer: Layer, place: Place, out: Emitted) -> None:
    given = cast(Attend, layer)
    heads, rows, width = given.keys.shape
    _, height, wide = place.shapes[0]
    kernel = out.tensor(f"{place.name}.keys", given.keys, (heads * rows, width, 1, 1))
    shift = given.key_bias
    shifts = [] if shift is None else [out.tensor(f"{place.name}.key_bias", shift, (heads * rows,))]
    asked = out.node("Conv", [place.reads[0], kernel, *shifts], place.inner("asked"))
    apart = out.integers(f"{place.name}.apart", 0, heads, rows, height * wide)
    cut = out.node("Reshape", [asked, apart], place.inner("rows"))
    shares = out.node("Softmax", [cut], place.inner("shares"), axis=2)
    joined = out.integers(f"{place.name}.joined", 0, heads * rows, height, wide)
    grid = out.node("Reshape", [shares, joined], place.inner("grid"))
    values = given.values.reshape(heads * rows, -1).T
    told = out.tensor(f"{place.name}.values", values, (*values.shape, 1, 1))
    out.node("Conv", [grid, told, *_biased(place.name, given.bias, out)], place.gives)


def _regions(layer: Layer, place: Place, out: Emitted) -> None:
    given, (width, height, wide) = cast(Regions, layer), place.shapes[0]
    flat = out.node(
        "Reshape", [place.reads[0], out.integers(f"{place.name}.joined", 0, width, height * wide)], place.inner("flat")
    )
    queries, square = (
        out.tensor(f"{place.name}.queries", given.queries),
        out.tensor(f"{place.name}.weight", given.weight.T),
    )
    asked = out.node("MatMul", [queries, flat], place.inner("asked"))
    shares = out.node("Softmax", [asked], place.inner("shares"), axis=2)
    turned = out.node("Transpose", [flat], place.inner("turned"), perm=(0, 2, 1))
    found = out.node("MatMul", [shares, turned], place.inner("found"))
    compared = out.node("MatMul", [found, square], place.inner("compared"))
    told = out.node("MatMul", [compared, flat], place.inner("told"))
    sides = out.integers(f"{place.name}.sides", 0, len(given.queries), height, wide)
    out.node("Reshape", [told, sides], place.gives)


def _mean(layer: Layer, place: Place, out: Emitted) -> None:
    out.node("ReduceMean", [place.reads[0], out.integers(f"{place.name}.axes", 2, 3)], place.gives, keepdims=0)


def _detect(layer: Layer, place: Place, out: Emitted) -> None:
    given, shapes = cast(Detect, layer), place.shapes
    apart = [
        out.node(
            "Reshape", [name, out.integers(f"{place.name}.flat{number}", 0, shape[0], shape[1] * shape[2])],
            place.inner(f"flat{number}"),
        )
        for number, (name, shape) in enumerate(zip(place.reads, shapes, strict=True))
    ]  # fmt: skip
    classes, beside = (out.node("Concat", apart[side::2], place.inner(f"all{side}"), axis=2) for side in (0, 1))
    points, reaches = given.grid(*shapes)
    second, sides, end = (out.integers(f"{place.name}.{key}", n) for key, n in (("axis", 1), ("sides", 4), ("end", 5)))
    distances = out.node("Slice", [beside, out.integers(f"{place.name}.zero", 0), sides, second], place.inner("sides"))
    central = out.node("Slice", [beside, sides, end, second], place.inner("central"))
    scaled = out.node("Mul", [distances, out.tensor(f"{place.name}.reaches", reaches)], place.inner("scaled"))
    signs = out.tensor(f"{place.name}.signs", np.array([-1, -1, 1, 1]), (4, 1))
    moved = out.node("Mul", [out.node("Relu", [scaled], place.inner("reached")), signs], place.inner("moved"))
    corners = out.node("Add", [moved, out.tensor(f"{place.name}.points", points)], place.inner("corners"))
    largest = out.node("ReduceMax", [classes, second], place.inner("largest"), keepdims=1)
    label = out.node("ArgMax", [classes], place.inner("label"), axis=1, keepdims=1)
    both = [out.node("Sigmoid", [x], place.inner(f"likely{n}")) for n, x in enumerate((largest, central))]
    scores = out.node("Sqrt", [out.node("Mul", both, place.inner("product"))], place.inner("scores"))
    rows = [corners, scores, out.node("Cast", [label], place.inner("label_value"), to=_FLOAT)]
    held = out.node("Concat", rows, place.inner("found"), axis=1)
    best = place.inner("best")
    count = out.integers(f"{place.name}.top", place.shape[0])
    out.nodes.append(Node("TopK", (scores, count), (place.inner("best_scores"), best)).with_attributes(axis=2))
    spread = out.node("Expand", [best, out.integers(f"{place.name}.spread", 1, FOUND, 1)], place.inner("spread"))
    taken = out.node("GatherElements", [held, spread], place.inner("taken"), axis=2)
    out.node("Transpose", [taken], place.gives, perm=(0, 2, 1))


def _shift(layer: Layer, place: Place, out: Emitted) -> None:
    value = out.tensor(f"{place.name}.value", cast(Shift, layer).value)
    out.node("Add", [place.reads[0], value], place.gives)


def _ask(layer: Layer, place: Place, out: Emitted) -> None:
    queries = cast(Ask, layer).queries
    heads, rows, width = queries.shape
    keys, values = _joined_pairs(0, place, out)
    asking = out.tensor(f"{place.name}.queries", queries, (heads * rows, width))
    asked = out.node("MatMul", [asking, keys], place.inner("asked"))
    apart = out.integers(f"{place.name}.apart", 0, heads, rows, _places(place.shapes[::2]))
    _answer(out.node("Reshape", [asked, apart], place.inner("rows")), values, heads, place, out)


def _attention(layer: Layer, place: Place, out: Emitted) -> None:
    heads, asking = cast(Attention, layer).heads, place.shapes[0]
    keys, values = _joined_pairs(1, place, out)
    each = asking[0] // heads
    sides = [out.integers(f"{place.name}.{n}", 0, heads, each, _places(x)) for n, x in (
        ("asking", [asking]), ("keys", place.shapes[1::2]))]  # fmt: skip
    queries = out.node("Reshape", [place.reads[0], sides[0]], place.inner("queries"))
    turned = out.node("Transpose", [queries], place.inner("turned"), perm=(0, 1, 3, 2))
    asked = out.node("MatMul", [turned, out.node("Reshape", [keys, sides[1]], place.inner("heads"))],
                     place.inner("asked"))  # fmt: skip
    _answer(asked, values, heads, place, out)


def _joined_pairs(first: int, place: Place, out: Emitted) -> list[str]:
    """Keys and values (n, C, places) of all pairs that a layer reads from its ``first`` input on."""
    joined = list[str]()
    for side, name in enumerate(("keys", "values")):
        flat = [
            out.node(
                "Reshape", [place.reads[n], out.integers(f"{place.name}.flat{n}", 0, shape[0], _places([shape]))],
                place.inner(f"flat{n}"),
            )
            for n, shape in list(enumerate(place.shapes))[first + side :: 2]
        ]  # fmt: skip
        joined.append(flat[0] if len(flat) == 1 else out.node("Concat", flat, place.inner(f"all_{name}"), axis=2))
    return joined


def _answer(asked: str, values: str, heads: int, place: Place, out: Emitted) -> None:
    """What rows ask (n, heads, rows, places) of values (n, C, places), as the layer's own shape."""
    first = len(place.shapes) % 2  # what asks is not asked
    channels, count = place.shape[0], _places(place.shapes[first::2])
    split = out.integers(f"{place.name}.split", 0, heads, channels // heads, count)
    apart = out.node("Reshape", [values, split], place.inner("split"))
    turned = out.node("Transpose", [apart], place.inner("values"), perm=(0, 1, 3, 2))
    shares = out.node("Softmax", [asked], place.inner("shares"), axis=3)
    told = out.node("MatMul", [shares, turned], place.inner("told"))
    back = out.node("Transpose", [told], place.inner("back"), perm=(0, 1, 3, 2))
    out.node("Reshape", [back, out.integers(f"{place.name}.sides", 0, *place.shape)], place.gives)


def _places(shapes: Sequence[Shape]) -> int:
    """Places of all these together."""
    return sum(places_of(shape) for shape in shapes)


def _compare(layer: Layer, place: Place, out: Emitted) -> None:
    (width, height, wide), count = place.shapes[0], place.shape[0]
    flat = [
        out.node("Reshape", [name, out.integers(f"{place.name}.flat{n}", 0, width, places)], place.inner(f"flat{n}"))
        for n, (name, places) in enumerate(zip(place.reads, (height * wide, count), strict=True))
    ]
    turned = out.node("Transpose", [flat[1]], place.inner("turned"), perm=(0, 2, 1))
    scale = out.tensor(f"{place.name}.scale", np.array(cast(Compare, layer).scale), ())
    scaled = out.node("Mul", [turned, scale], place.inner("scaled"))
    told = out.node("MatMul", [scaled, flat[0]], place.inner("told"))
    out.node("Reshape", [told, out.integers(f"{place.name}.sides", 0, *place.shape)], place.gives)


_FLOAT = 1  # onnx.TensorProto.DataType
_Emitter: TypeAlias = Callable[[Layer, Place, Emitted], None]
EMITTERS: dict[str, _Emitter] = {
    "point": _point,
    "depthwise": _depthwise,
    "conv": _conv,
    "deconv": _deconv,
    "resize": _resize,
    "pool": _pool,
    "add": _add,
    "multiply": _multiply,
    "concat": _concat,
    "activation": _activation,
    "norm": _norm,
    "unit": _unit,
    "attend": _attend,
    "regions": _regions,
    "mean": _mean,
    "detect": _detect,
    "shift": _shift,
    "ask": _ask,
    "attention": _attention,
    "compare": _compare,
}
