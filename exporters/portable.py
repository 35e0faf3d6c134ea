"""A standalone model as other tools read it too, and in an older opset where one is asked for.

Who goes on from an exported file meets ONNX Runtime's own shape inference (``quant_pre_process``), which knows
constants as tensors only, and parsers that are years old: an opset is the language of one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from edgepet.errors import InputError, option, require
from edgepet.graphs.onnx_file import OPSET
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from types import ModuleType

    from onnx import GraphProto, ModelProto, NodeProto
    from onnx.defs import OpSchema

OLDEST = 13  # where steps of quantised weights along an axis begin
_CONSTANTS = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
_Rewriting: TypeAlias = "Callable[[_Older, NodeProto], None]"


def make_plain(model: ModelProto) -> None:
    """Say in ``model`` what others read: constants as tensors, no initializer that nothing reads, and no ``ReduceL2``.

    ONNX Runtime's shape inference loses the shape behind an operator whose axes are an input, if it is not one of few.
    """
    onnx = require("onnx", extra="train", purpose="ONNX")
    made = onnx.helper.make_node
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        told = node.attribute[0] if node.op_type == "Constant" else None
        if told is not None and told.name in _CONSTANTS:
            value = np.array(onnx.helper.get_attribute_value(told), _CONSTANTS[told.name])
            told.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(value)))
        if node.op_type == "ReduceL2":
            (source, *axes), out, settings = node.input, node.output[0], _settings_of(onnx, node)
            squares, total = f"{out}.squares", f"{out}.sum"
            nodes.append(made("Mul", [source, source], [squares], name=squares))
            nodes.append(made("ReduceSum", [squares, *axes], [total], name=total, **settings))
            node = made("Sqrt", [total], [out], name=node.name)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if not has_control_flow(model.graph):  # what that reads is not seen here
        drop_unread(model.graph)


def has_control_flow(graph: GraphProto) -> bool:
    """Whether a node holds graphs of its own."""
    return any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute)


def drop_unread(graph: GraphProto, *, among: Container[str] | None = None) -> None:
    """Take out initializers, all or those ``among`` these, that nothing reads: ONNX Runtime warns of each."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for place, tensor in reversed(list(enumerate(graph.initializer))):
        if tensor.name not in read and (among is None or tensor.name in among):
            del graph.initializer[place]


def _settings_of(onnx: ModuleType, node: NodeProto) -> dict[str, object]:
    """The attributes of a node by name."""
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def require_opset(opset: int) -> None:
    """Refuse an opset that models are not written in here.

    Raises:
        InputError: it is not between ``OLDEST`` and ``OPSET``.
    """
    if not OLDEST <= opset <= OPSET:
        what = f"is between {OLDEST}, where weights have a step for each output, and {OPSET}, that of traced graphs"
        raise InputError(option("opset"), what, got=opset)


def in_opset(model: ModelProto, opset: int, *, where: str) -> ModelProto:
    """``model`` in an older opset; it is not touched. What a node was made of is still in it, in other words.

    ``model`` may point to its weights.

    Raises:
        InputError: the opset has no words for a node.
        MissingError: onnx is not installed.
    """
    return _Older(model, opset, where).model()


class _Older:
    """Writes a graph node by node, as an older opset says it."""

    def __init__(self, model: ModelProto, opset: int, where: str) -> None:
        self._onnx = require("onnx", extra="train", purpose="ONNX")
        self._made, self.opset, self._where = type(model)(), opset, where
        self._made.CopyFrom(model)
        (self._now,) = (entry.version for entry in model.opset_import if entry.domain == "")
        known = self._onnx.shape_inference.infer_shapes(model).graph
        ports = (*known.value_info, *known.input, *known.output)
        self._types = {port.name: port.type.tensor_type for port in ports}
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._tensors |= {
            node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"
        }
        self._nodes: list[NodeProto] = []

    def model(self) -> ModelProto:
        nodes = list(self._made.graph.node)
        for node in nodes:
            since, rewrite = REWRITINGS.get(node.op_type, (0, _Older.add))
            (rewrite if self.opset < since else _Older.add)(self, node)
        del self._made.graph.node[:], self._made.graph.value_info[:], self._made.opset_import[:]
        self._made.graph.node.extend(self._nodes)
        self._made.opset_import.append(self._onnx.helper.make_opsetid("", self.opset))
        known = self._onnx.helper.find_min_ir_version_for(self._made.opset_import)
        self._made.ir_version = min(self._made.ir_version, known)
        return self._made

    def add(self, node: NodeProto) -> None:
        """Write a node that the opset knows by the same name, without attributes that say nothing."""
        schema = self._schema(node, self.opset)
        if schema is None or len(node.input) > schema.max_input:
            raise self.refused(node)
        for name, value in _settings_of(self._onnx, node).items():
            if name not in schema.attributes:
                if value != self._default(node, name):
                    raise self.refused(node, name)
                self.drop(node, name)
        self._nodes.append(node)

    def _default(self, node: NodeProto, name: str) -> object:
        """The value of an attribute that says nothing."""
        if name == "dilations":  # their default depends on the kernel's axes
            return [1] * len(cast(list[int], self.attribute(node, name, [])))
        default = self._onnx.defs.get_schema(node.op_type, self._now, node.domain).attributes[name].default_value
        return self._onnx.helper.get_attribute_value(default) if default.name else None

    def refused(self, node: NodeProto, attribute: str = "") -> InputError:
        """The error of a node that the opset has no words for."""
        what = f"opset {self.opset} must have {node.op_type}" + (f" with {attribute}" if attribute else "")
        return InputError(self._where, what, got=f"none: it came later (node {node.name or node.output[0]})",
                          fix=f"a higher {option('opset')}, up to {self._now}")  # fmt: skip

    def node(self, operator: str, inputs: Sequence[str], output: str, **settings: object) -> str:
        """Write a node of one output, and give back its name."""
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], name=output, **settings))
        return output

    def tensor(self, name: str, value: NpArray) -> str:
        """Write an initializer, once, and give back its name."""
        if name not in self._tensors:
            self._made.graph.initializer.append(self._onnx.numpy_helper.from_array(value, name))
            self._tensors[name] = self._made.graph.initializer[-1]
        return name

    def shape(self, name: str, node: NodeProto) -> list[int]:
        """The sides of a tensor that ``node`` reads, 0 where they are free."""
        known = self._types.get(name)
        if known is None or not known.HasField("shape"):
            raise self.refused(node, "a shape that is not known")
        return [side.dim_value for side in known.shape.dim]

    def kind(self, name: str, node: NodeProto) -> int:
        """The number that ONNX has for the type of a tensor that ``node`` reads."""
        if name in self._tensors:
            return int(self._tensors[name].data_type)
        if name not in self._types:
            raise self.refused(node, "a type that is not known")
        return int(self._types[name].elem_type)

    def number(self, node: NodeProto, value: float) -> str:
        """A number of the type that the first tensor which ``node`` reads has."""
        dtype = self._onnx.helper.tensor_dtype_to_np_dtype(self.kind(node.input[0], node))
        return self.tensor(f"edgepet.{dtype.name}.{value:g}", np.array(value, dtype))

    def value(self, name: str) -> NpArray | None:
        """The value of a constant; None for what is computed."""
        found: NpArray | None = self._onnx.numpy_helper.to_array(self._tensors[name]) if name in self._tensors else None
        return found

    def attribute(self, node: NodeProto, name: str, default: object) -> object:
        """The attribute ``name`` of a node, or ``default``."""
        return _settings_of(self._onnx, node).get(name, default)

    def integer(self, node: NodeProto, name: str, default: int) -> int:
        """The integer ``name`` of a node, or ``default``."""
        return int(cast(int, self.attribute(node, name, default)))

    def set(self, node: NodeProto, **settings: object) -> None:
        """Give a node other attributes of these names."""
        for name, value in settings.items():
            self.drop(node, name)
            node.attribute.append(self._onnx.helper.make_attribute(name, value))

    def drop(self, node: NodeProto, name: str) -> None:
        """Take an attribute from a node, where it has it."""
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)

    def _schema(self, node: NodeProto, opset: int) -> OpSchema | None:
        try:
            schema: OpSchema = self._onnx.defs.get_schema(node.op_type, opset, node.domain)
            return schema
        except self._onnx.defs.SchemaError:
            return None


# ---------------------------------------------------------------------------------- what came later, in earlier words


def _layer_norm(older: _Older, node: NodeProto) -> None:
    source, weight, *bias = node.input
    out, axis = node.output[0], older.integer(node, "axis", -1)
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis, len(older.shape(source, node))))
    mean = older.node("ReduceMean", [source], f"{out}.mean", axes=axes, keepdims=1)
    centred = older.node("Sub", [source, mean], f"{out}.centred")
    squares = older.node("Mul", [centred, centred], f"{out}.squares")
    variance = older.node("ReduceMean", [squares], f"{out}.variance", axes=axes, keepdims=1)
    epsilon = older.number(node, float(cast(float, older.attribute(node, "epsilon", 1e-5))))
    above = older.node("Add", [variance, epsilon], f"{out}.above")
    deviation = older.node("Sqrt", [above], f"{out}.deviation")
    normal = older.node("Div", [centred, deviation], f"{out}.normal")
    scaled = older.node("Mul", [normal, weight], f"{out}.scaled" if bias else out)
    if bias:
        older.node("Add", [scaled, bias[0]], out)


def _gelu(older: _Older, node: NodeProto) -> None:
    (source,), out = node.input, node.output[0]
    if older.attribute(node, "approximate", b"none") == b"none":
        inner = older.node("Mul", [source, older.number(node, 0.5**0.5)], f"{out}.inner")
        bent = older.node("Erf", [inner], f"{out}.erf")
    else:
        square = older.node("Mul", [source, source], f"{out}.square")
        third = older.node("Mul", [square, older.number(node, 0.044715)], f"{out}.third")
        factor = older.node("Add", [third, older.number(node, 1.0)], f"{out}.factor")
        cubic = older.node("Mul", [source, factor], f"{out}.cubic")
        inner = older.node("Mul", [cubic, older.number(node, (2 / np.pi) ** 0.5)], f"{out}.inner")
        bent = older.node("Tanh", [inner], f"{out}.tanh")
    gate = older.node("Add", [bent, older.number(node, 1.0)], f"{out}.gate")
    half = older.node("Mul", [source, older.number(node, 0.5)], f"{out}.half")
    older.node("Mul", [half, gate], out)


def _cast_like(older: _Older, node: NodeProto) -> None:
    source, like = node.input
    older.node("Cast", [source], node.output[0], to=older.kind(like, node))


def _hard_swish(older: _Older, node: NodeProto) -> None:
    (source,), out = node.input, node.output[0]
    gate = older.node("HardSigmoid", [source], f"{out}.gate", alpha=1 / 6, beta=0.5)
    older.node("Mul", [source, gate], out)


def _mish(older: _Older, node: NodeProto) -> None:
    (source,), out = node.input, node.output[0]
    soft = older.node("Softplus", [source], f"{out}.soft")
    gate = older.node("Tanh", [soft], f"{out}.gate")
    older.node("Mul", [source, gate], out)


def _reduction(older: _Older, node: NodeProto) -> None:
    """Axes were an attribute."""
    if len(node.input) == 2 and node.input[1]:
        axes = older.value(node.input[1])
        if axes is None or not axes.size:
            raise older.refused(node, "axes that are computed")
        older.set(node, axes=axes.tolist())
    del node.input[1:]
    older.add(node)


def _shape(older: _Older, node: NodeProto) -> None:
    """The whole shape was all there was."""
    start, end = older.integer(node, "start", 0), older.integer(node, "end", 2**31 - 1)
    if (start, end) == (0, 2**31 - 1):
        return older.add(node)
    out = node.output[0]
    whole = older.node("Shape", [node.input[0]], f"{out}.whole")
    ends = [older.tensor(f"edgepet.int64.{end}", np.array([end])) for end in (start, end)]
    older.node("Slice", [whole, *ends], out)
    return None


def _split(older: _Older, node: NodeProto) -> None:
    """The number of pieces was that of the outputs, and all were equal."""
    if len(node.input) == 1:
        size = older.shape(node.input[0], node)[older.integer(node, "axis", 0)]
        if not size or size % len(node.output):
            raise older.refused(node, "pieces of several sizes")
    older.drop(node, "num_outputs")
    older.add(node)


def _reshape(older: _Older, node: NodeProto) -> None:
    """A zero always meant the size that was there."""
    sides = older.value(node.input[1])
    if older.integer(node, "allowzero", 0) and sides is not None and not sides.all():
        raise older.refused(node, "allowzero")
    older.drop(node, "allowzero")
    older.add(node)


def _grid_sample(older: _Older, node: NodeProto) -> None:
    mode = older.attribute(node, "mode", b"linear")
    older.set(node, mode={b"linear": "bilinear", b"cubic": "bicubic"}.get(cast(bytes, mode), mode))
    older.add(node)


# Operator -> the first opset that has it as it is now, and how an earlier one says it.
REWRITINGS: dict[str, tuple[int, _Rewriting]] = {
    "CastLike": (15, _cast_like),
    "Gelu": (20, _gelu),
    "GridSample": (20, _grid_sample),
    "HardSwish": (14, _hard_swish),
    "LayerNormalization": (17, _layer_norm),
    "Mish": (18, _mish),
    **{f"Reduce{name}": (18, _reduction) for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod")},
    "ReduceSumSquare": (18, _reduction),
    "Reshape": (14, _reshape),
    "Shape": (15, _shape),
    "Split": (18, _split),
}
