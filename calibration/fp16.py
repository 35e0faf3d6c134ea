"""fp16 as a pass on the ONNX model: what overflows or needs its digits stays fp32, and the report says what and why.

Input and output of the model stay float32. Batch norms are folded into the convolutions before them, in fp32, so that
the rounding happens once. A node stays fp32 for one of four reasons: its operator sums or exponentiates
(``SUMMING``: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740, section 3.3), it reads or puts out
numbers beyond ``LARGEST`` on the calibration images, most of a weight would become zero, or it makes boxes of what a
detector's maps hold: at 500 pixels fp16 has quarters of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgepet.calibration.observe import watched
from edgepet.calibration.rewriting import folded
from edgepet.calibration.writer import GraphWriter, copied, require_valid
from edgepet.device.onnxruntime import open_model
from edgepet.errors import CheckError, InputError, require
from edgepet.graphs.head_graph import FOUND, decodes
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LARGEST = 65504 / 2  # half of what fp16 holds: other images may go further than those that were looked at
SMALLEST = 2.0**-24  # fp16's least number above zero
SUMMING = frozenset(
    (
        *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"),
        *("LpNormalization", "RMSNormalization", "Exp", "Log", "LogSoftmax", "Pow", "Softmax", "ReduceL1", "ReduceL2"),
        *("ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    )
)
# Inputs that ONNX defines as float32 whatever the others are: operator -> positions.
_ALWAYS_FLOAT = {"Resize": (1, 2), "Upsample": (1,)}
_FLOAT, _HALF = 1, 10  # onnx.TensorProto


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A node that stays fp32: the layer or node, its operator, and why."""

    name: str
    op: str
    reason: str

    @property
    def forced(self) -> bool:
        """Whether the network's numbers keep it, not its operator."""
        return self.op not in SUMMING


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """The fp16 model (``onnx.ModelProto``), and what of it stays fp32, in the model's order."""

    model: ModelProto
    kept: tuple[Kept, ...]


def to_half(model: ModelProto, images: NpArray, *, where: str) -> Half:
    """A copy of ``model`` in fp16, and what stayed fp32; ``model`` is not touched.

    Args:
        model: an ``onnx.ModelProto`` in fp32 with its weights inside.
        images: float32 (n, 3, H, W), preprocessed: what ranges are measured on.

    Raises:
        InputError: the model has control flow, or does not stay finite on ``images`` even in fp32.
        CheckError: less than half of the float bytes that it stores would be fp16.
        MissingError: onnx is not installed.
    """
    require("onnx", extra="train", purpose="fp16")
    source = folded(model)
    if any(attribute.type == attribute.GRAPH for node in source.graph.node for attribute in node.attribute):
        raise InputError(where, "has control flow, which edgepet does not convert to fp16", fix="export it in fp32")
    ranges = _ranges(source, images, where)
    reasons = _reasons(source, ranges, len(images))
    half = _Rewriter(source, ranges, reasons).model()
    require_valid(half)
    stored = stored_types(half)
    floats = {kind: stored.get(kind, {"bytes": 0})["bytes"] for kind in ("float32", "float16")}
    named = _layer_names(source)
    kept = tuple(Kept(name=named[i], op=source.graph.node[i].op_type, reason=r) for i, r in reasons.items())
    if floats["float16"] < floats["float32"]:
        got = f"{floats['float16']} of {sum(floats.values())} bytes; {_heaviest(source, list(reasons), kept)}"
        raise CheckError(where, "must store most of its weights in fp16", got=got, fix="export it in fp32")
    return Half(half, kept)


def _heaviest(model: ModelProto, places: Sequence[int], kept: Sequence[Kept]) -> str:
    """Of the nodes that stay fp32 the first with the largest tensor that no image changes, and why it does."""
    sizes = Counter({tensor.name: int(np.prod(tensor.dims, dtype=np.int64)) for tensor in model.graph.initializer})
    for node in model.graph.node:
        if all(name in sizes for name in node.input if name):
            sizes.update(dict.fromkeys(node.output, max((sizes[name] for name in node.input), default=0)))
    worst = kept[max(range(len(kept)), key=lambda i: max(sizes[name] for name in model.graph.node[places[i]].input))]
    return f"most in fp32 has {worst.name} ({worst.op}), {worst.reason}"


def stored_types(model: ModelProto) -> dict[str, dict[str, int]]:
    """What an ``onnx.ModelProto`` stores: numpy dtype -> how many tensors and bytes.

    Raises:
        MissingError: onnx is not installed.
    """
    onnx = require("onnx", extra="train", purpose="ONNX")
    tensors, size = Counter[str](), Counter[str]()
    for tensor in model.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensors[dtype.name] += 1
        size[dtype.name] += int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize
    return {name: {"tensors": tensors[name], "bytes": size[name]} for name in sorted(tensors)}


def _ranges(model: ModelProto, images: NpArray, where: str) -> dict[str, float]:
    """Largest magnitude of every float tensor that a node puts out, on all images; a tensor without one is no float."""
    names = [name for node in model.graph.node for name in node.output if name]
    session = open_model(model, names)
    ranges: dict[str, float] = {}
    padded = {node.output[0] for node in model.graph.node if node.op_type == "Pad"}  # with -inf before a maximum
    for name, value, _ in watched(session, names, images):
        if value.dtype == np.float32:
            seen = value[np.isfinite(value)] if name in padded else value
            largest = float(np.abs(seen).max(initial=0.0))
            if not np.isfinite(largest):
                raise InputError(where, f"must stay finite in fp32 on the calibration images: {name}", got=largest)
            ranges[name] = max(ranges.get(name, 0.0), largest)
    return ranges


def _reasons(model: ModelProto, ranges: Mapping[str, float], images: int) -> dict[int, str]:
    """Why a node stays fp32, by its place in the graph."""
    weights, reasons = _weights(model), dict[int, str]()
    finds = any(value.name.rpartition(".")[2] == FOUND for value in model.graph.output)
    for place, node in enumerate(model.graph.node):
        if not any(name in ranges for name in node.output):
            continue
        reason = next(_overflows(node, ranges, weights, images), None)
        if reason is None and node.op_type in SUMMING:
            reason = "its sums need fp32"
        if reason is None and finds and any(map(decodes, node.output)):
            reason = "corners of boxes need fp32"
        if reason is not None:
            reasons[place] = reason
    return reasons


def _overflows(
    node: NodeProto, ranges: Mapping[str, float], weights: Mapping[str, NpArray], images: int
) -> Iterator[str]:
    for name in (*node.output, *node.input):
        if ranges.get(name, 0.0) > LARGEST:
            yield f"overflow: {ranges[name]:.3g} on {images} images, beyond {LARGEST:.0f}"
    for name in node.input:
        magnitude = np.abs(weights.get(name, np.zeros(1, np.float32)))
        magnitude = magnitude[np.isfinite(magnitude)]  # fp16 holds infinity too
        if magnitude.max(initial=0.0) > LARGEST:
            yield f"overflow: a weight of {magnitude.max():.3g}, beyond {LARGEST:.0f}"
        lost = np.count_nonzero((magnitude > 0) & (magnitude < SMALLEST))
        if 2 * lost > np.count_nonzero(magnitude) > 0:
            yield f"underflow: {lost} of {magnitude.size} weights would become zero"


def _weights(model: ModelProto) -> dict[str, NpArray]:
    onnx = require("onnx", extra="train", purpose="fp16")
    tensors = (tensor for tensor in model.graph.initializer if tensor.data_type == _FLOAT)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}


def _layer_names(model: ModelProto) -> list[str]:
    """What people call each node: the layer whose weight or bias it reads, perhaps transposed, else its own name."""
    weights = {tensor.name for tensor in model.graph.initializer if "." in tensor.name}
    behind = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    names = []
    for node in model.graph.node:
        read = (name if name in weights else behind.get(name, "") for name in node.input)
        layer = next((name.rsplit(".", 1)[0] for name in read if name in weights), None)
        names.append(layer or node.name or node.output[0])
    return names


class _Rewriter:
    """Builds the fp16 graph: every value has an fp32 and an fp16 form, each made once and only where it is read."""

    def __init__(self, model: ModelProto, ranges: Mapping[str, float], reasons: Mapping[int, str]) -> None:
        self._source, self._floats = model, set(ranges) | {value.name for value in model.graph.input}
        self._weights = _weights(model)
        self._kept = self._with_constants(reasons)
        self._forms: dict[tuple[str, int], str] = {(name, _FLOAT): name for name in self._floats}
        self._writer = GraphWriter(model, purpose="fp16")

    def model(self) -> ModelProto:
        outputs = {value.name for value in self._source.graph.output}
        for place, node in enumerate(self._source.graph.node):
            self._add(node, _FLOAT if place in self._kept else _HALF)
        for name in sorted(outputs & self._floats):
            self._give_back(name)
        others = (tensor for tensor in self._source.graph.initializer if tensor.name not in self._weights)
        return self._writer.model(others)

    def _with_constants(self, reasons: Mapping[int, str]) -> set[int]:
        """Kept nodes, and with them those that only prepare a weight for one: it shall not pass through fp16."""
        kept, nodes = set(reasons), self._source.graph.node
        known = {tensor.name for tensor in self._source.graph.initializer}
        prepares = []
        for place, node in enumerate(nodes):
            if node.input and all(name in known for name in node.input if name):
                known.update(node.output)
                prepares.append(place)
        wanted = {name for place in kept for name in nodes[place].input}
        for place in reversed(prepares):
            if wanted.intersection(nodes[place].output):
                kept.add(place)
                wanted.update(nodes[place].input)
        return kept

    def _add(self, node: NodeProto, kind: int) -> None:
        made = copied(node)
        reads = any(name in self._floats or name in self._weights for name in node.input)
        if not reads or node.op_type == "Cast":  # a source of floats: its own type stands, whoever reads it casts
            kind = _FLOAT
        for position, name in enumerate(node.input):
            if name in self._floats or name in self._weights:
                fixed = position in _ALWAYS_FLOAT.get(node.op_type, ())
                made.input[position] = self._form(name, _FLOAT if fixed else kind)
        for position, name in enumerate(node.output):
            if name in self._floats and kind == _HALF:
                self._forms.pop((name, _FLOAT))
                made.output[position] = self._forms[name, _HALF] = f"{name}.fp16"
        self._writer.add(made)

    def _form(self, name: str, kind: int) -> str:
        """The name of ``name`` in fp32 or fp16; a cast or a weight of that type is added where it is the first."""
        known = self._forms.get((name, kind))
        if known is not None:
            return known
        suffixed = f"{name}.fp16" if kind == _HALF else f"{name}.fp32"
        if name in self._weights:
            made = name if (name, _FLOAT + _HALF - kind) not in self._forms else suffixed
            self._writer.tensor(made, self._weights[name].astype(np.float16 if kind == _HALF else np.float32))
        else:
            made = self._cast(self._forms[name, _FLOAT + _HALF - kind], suffixed, kind)
        self._forms[name, kind] = made
        return made

    def _give_back(self, name: str) -> None:
        """A graph output keeps its name and type."""
        if self._forms.get((name, _FLOAT)) != name:
            self._cast(self._forms[name, _HALF], name, _FLOAT)

    def _cast(self, name: str, made: str, kind: int) -> str:
        return self._writer.node("Cast", [name], made, name=f"{made}.cast", to=kind)
