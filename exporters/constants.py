"""What of a standalone model depends on no image is computed once, when it is made, and stored as a tensor.

Two things: the keys and values that deep prompts become, and kernels that a network computes from its parameters at
every call, because it standardises (Qiao et al. 2019, arXiv:1903.10520) or normalises them (Salimans and Kingma 2016,
arXiv:1602.07868). Such a kernel is a weight like any other, which fp16 and int8 store, and has its parameter's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from edgepet.device.onnxruntime import open_model
from edgepet.errors import require
from edgepet.exporters.portable import drop_unread, has_control_flow
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))  # their second input is the weight


def compute_constants(model: ModelProto, prompts: Collection[str] = ()) -> None:
    """Put tensors in place of the nodes of ``model`` that compute them; ``prompts`` are names of its initializers.

    A model with control flow stays as it is: what its branches read is not seen here.
    """
    if has_control_flow(model.graph):
        return
    constant = _constant_nodes(model.graph)
    maker = {name: node for node in constant for name in node.output}
    names = _prompted(model.graph, constant, prompts)
    kernels = _kernels(model.graph, maker)
    if not names and not kernels:
        return
    values = _evaluate(model, maker, [*names, *kernels])
    names |= _parameters(model.graph, maker, {name: values[name] for name in kernels})
    _replace(model.graph, maker, {names[name]: value for name, value in values.items()}, names)


def _constant_nodes(graph: GraphProto) -> list[NodeProto]:
    """Nodes that read initializers alone, or what such nodes put out, in the graph's order."""
    known, found = {tensor.name for tensor in graph.initializer}, []
    for node in graph.node:
        if all(name in known for name in node.input if name):
            found.append(node)
            known |= set(node.output)
    return found


def _prompted(graph: GraphProto, constant: Sequence[NodeProto], prompts: Collection[str]) -> dict[str, str]:
    """What prompts become before it meets an image, by its name, and what its tensor is called."""
    source = {name: name for name in prompts}
    behind = []
    for node in constant if prompts else ():
        if found := [source[name] for name in node.input if name in source]:
            source |= dict.fromkeys(node.output, found[0])
            behind.append(node)
    read = {name for node in graph.node if node.output[0] not in source for name in node.input}
    wanted = [name for node in behind for name in node.output if name in read]
    return {name: f"{source[name]}.{i}" for i, name in enumerate(wanted)}


def _kernels(graph: GraphProto, maker: Mapping[str, NodeProto]) -> list[str]:
    """Weights of layers that are computed; one that is only turned is none, so a linear layer reads its parameter."""
    found = dict[str, None]()
    for node in graph.node:
        if node.op_type in _LAYERS and node.output[0] not in maker:
            name = node.input[1]
            while name in maker and maker[name].op_type == "Transpose":
                name = maker[name].input[0]
            if name in maker and maker[name].op_type != "Constant":
                found[name] = None
    return list(found)


def _parameters(graph: GraphProto, maker: Mapping[str, NodeProto], kernels: Mapping[str, NpArray]) -> dict[str, str]:
    """Kernels, and the parameter whose name each takes: one of its shape that nothing else is computed from; else
    its own.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    behind = {name: _behind(name, maker) for name in kernels}
    named = {}
    for name, value in kernels.items():
        elsewhere = {read for node in graph.node if not behind[name].intersection(node.output) for read in node.input}
        inside = {made: node for made, node in maker.items() if made != name}
        others = {each for read in elsewhere for each in _behind(read, inside)}
        fitting = (each for each in sorted(behind[name] - others) if shapes.get(each) == value.shape)
        named[name] = next(fitting, name)
    return named


def _behind(name: str, maker: Mapping[str, NodeProto]) -> set[str]:
    """``name``, and all names that it is computed from."""
    found, open_names = set[str](), [name]
    while open_names:
        each = open_names.pop()
        if each not in found:
            found.add(each)
            open_names += maker[each].input if each in maker else ()
    return found


def _evaluate(model: ModelProto, maker: Mapping[str, NodeProto], wanted: Sequence[str]) -> dict[str, NpArray]:
    """The values named ``wanted``, which the nodes of ``maker`` compute from initializers alone."""
    onnx = require("onnx", extra="train", purpose="ONNX")
    reads = {each for name in wanted for each in _behind(name, maker)}
    nodes = [node for node in model.graph.node if reads.intersection(node.output)]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted]
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in reads]
    part = onnx.helper.make_graph(nodes, "constants", [], outputs, tensors)
    alone = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    return dict(zip(wanted, open_model(alone).run(list(wanted), {}), strict=True))


def _replace(
    graph: GraphProto, maker: Mapping[str, NodeProto], tensors: Mapping[str, NpArray], names: Mapping[str, str]
) -> None:
    """Let nodes read new ``tensors`` by their ``names`` instead of the old, and drop what nothing reads any more."""
    onnx = require("onnx", extra="train", purpose="ONNX")
    behind = {each for name in names for each in _behind(name, maker)}
    readers = Counter(name for node in graph.node for name in node.input if name not in names)
    kept = []
    for node in reversed(graph.node):
        if behind.intersection(node.output) and not any(readers[name] for name in node.output):
            readers.subtract(name for name in node.input if name not in names)
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    drop_unread(graph, among=behind)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    graph.initializer.extend(map(onnx.numpy_helper.from_array, tensors.values(), tensors))
