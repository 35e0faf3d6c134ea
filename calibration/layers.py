"""The linear layers and convolutions of an ONNX graph that int8 is for, and what stands around each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

from edgepet.errors import require
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

Value = TypeVar("Value")
_FLOAT = 1  # onnx.TensorProto


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer, by the names that its tensors have in the graph.

    ``name`` is what people call it, ``blocks.0.attn.qkv``. ``weight`` is (out, in) or (out, in / groups, kh, kw);
    ``reads`` is the tensor in front of it and of a padding with zeros, which is the node at ``pad``; ``puts_out`` is
    behind its bias, and behind a batch norm whose weight, bias, mean and variance are ``batch_norm``. ``padded``: it
    sees zeros around what it reads. ``norm`` are weight and bias of the layer norm that puts out what only this layer
    reads. ``places`` are its nodes in the graph.
    """

    name: str
    kind: Literal["linear", "conv"]
    reads: str
    weight: str
    bias: str | None
    puts_out: str
    norm: tuple[str, str] | None = None
    batch_norm: tuple[str, str, str, str] | None = None
    epsilon: float = 0.0
    padded: bool = False
    places: tuple[int, ...] = ()
    pad: int | None = None

    @property
    def channel_axis(self) -> int:
        """Where what it reads and puts out has its channels."""
        return -1 if self.kind == "linear" else 1


class Graph:
    """Look-ups over an ``onnx.ModelProto`` that does not change meanwhile. A place is a node's index in the graph.

    Raises:
        MissingError: onnx is not installed.
    """

    def __init__(self, model: ModelProto) -> None:
        self._onnx = require("onnx", extra="train", purpose="int8")
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.made_by = {name: place for place, node in enumerate(self.nodes) for name in node.output}
        self.readers: dict[str, list[int]] = {}
        for place, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(place)

    def value(self, name: str) -> NpArray:
        """The initializer ``name`` as an array."""
        array: NpArray = self._onnx.numpy_helper.to_array(self.initializers[name])
        return array

    def only_reader(self, name: str, *operators: str) -> int | None:
        """The place of the one node that reads ``name``, if it is of these operators; a graph output has none."""
        places = self.readers.get(name, [])
        outputs = {value.name for value in self.model.graph.output}
        alone = len(places) == 1 and name not in outputs
        return places[0] if alone and self.nodes[places[0]].op_type in operators else None

    def maker(self, name: str, *operators: str) -> int | None:
        """The place of the node that puts out ``name``, if it is of these operators."""
        place = self.made_by.get(name)
        return place if place is not None and self.nodes[place].op_type in operators else None

    def attribute(self, place: int, name: str, default: Value) -> Value:
        """The attribute ``name`` of the node at ``place``, or ``default``."""
        found = [a for a in self.nodes[place].attribute if a.name == name]
        value: Value = self._onnx.helper.get_attribute_value(found[0]) if found else default
        return value

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every initializer, by name."""
        return {name: tuple(tensor.dims) for name, tensor in self.initializers.items()}


def find_layers(graph: Graph, weights: Collection[str]) -> tuple[Layer, ...]:
    """Layers whose weight is one of ``weights``, in the graph's order; other forms than these stay float.

    A linear layer is ``Transpose(weight)``, ``MatMul``, perhaps ``Add``, or a ``Gemm`` of the same meaning. A
    convolution is a ``Conv`` of two axes, with a ``Pad`` of zeros in front and a batch norm behind that are its alone.
    Weights are float32, and none is of two layers: its codes would be made for what one of them reads.
    """
    layers = tuple(_found(graph, weights))
    times = Counter(layer.weight for layer in layers)
    return tuple(layer for layer in layers if times[layer.weight] == 1)


def _found(graph: Graph, weights: Collection[str]) -> Iterator[Layer]:
    for place, node in enumerate(graph.nodes):
        layer = None
        if node.op_type == "MatMul":
            layer = _product(graph, place)
        elif node.op_type == "Gemm":
            layer = _gemm(graph, place)
        elif node.op_type == "Conv":
            layer = _convolution(graph, place)
        if layer is not None and layer.weight in weights and graph.initializers[layer.weight].data_type == _FLOAT:
            yield layer


def _product(graph: Graph, place: int) -> Layer | None:
    node = graph.nodes[place]
    turned = graph.maker(node.input[1], "Transpose")
    weight = graph.nodes[turned].input[0] if turned is not None else ""
    if turned is None or len(graph.shapes.get(weight, ())) != 2 or len(graph.readers[node.input[1]]) != 1:
        return None
    bias, puts_out = None, node.output[0]
    places: tuple[int, ...] = (turned, place)
    added = graph.only_reader(puts_out, "Add")
    if added is not None:
        others = [name for name in graph.nodes[added].input if name != puts_out]
        if others and graph.shapes.get(others[0]) == (graph.shapes[weight][0],):
            bias, puts_out, places = others[0], graph.nodes[added].output[0], (*places, added)
    return _layer(graph, "linear", node.input[0], weight, bias, puts_out, places)


def _gemm(graph: Graph, place: int) -> Layer | None:
    node = graph.nodes[place]
    settings = [
        graph.attribute(place, name, default) for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
    ]
    weight = node.input[1]
    if settings != [1.0, 1.0, 0] or not graph.attribute(place, "transB", 0) or len(graph.shapes.get(weight, ())) != 2:
        return None
    bias = node.input[2] if len(node.input) == 3 and node.input[2] else None
    if bias is not None and graph.shapes.get(bias) != (graph.shapes[weight][0],):
        return None
    return _layer(graph, "linear", node.input[0], weight, bias, node.output[0], (place,))


def _convolution(graph: Graph, place: int) -> Layer | None:
    node = graph.nodes[place]
    reads, weight = node.input[0], node.input[1]
    bias = node.input[2] if len(node.input) == 3 and node.input[2] else None
    plain = graph.attribute(place, "auto_pad", b"NOTSET") == b"NOTSET"
    if not plain or len(graph.shapes.get(weight, ())) != 4 or (bias is not None and bias not in graph.initializers):
        return None
    pad = graph.maker(reads, "Pad")
    if pad is not None and graph.only_reader(reads, "Conv") is not None and _pads_with_zeros(graph, pad):
        reads = graph.nodes[pad].input[0]
    else:
        pad = None
    padded = pad is not None or any(graph.attribute(place, "pads", ()))
    layer = _layer(graph, "conv", reads, weight, bias, node.output[0], (place,), pad, padded)
    behind = graph.only_reader(node.output[0], "BatchNormalization")
    if behind is None:
        return layer
    scale, shift, mean, variance = graph.nodes[behind].input[1:]
    return replace(
        layer,
        puts_out=graph.nodes[behind].output[0],
        places=(place, behind),
        batch_norm=(scale, shift, mean, variance),
        epsilon=float(graph.attribute(behind, "epsilon", 1e-5)),
    )


def _pads_with_zeros(graph: Graph, place: int) -> bool:
    node = graph.nodes[place]
    value = node.input[2] if len(node.input) > 2 else ""
    constant = graph.attribute(place, "mode", b"constant") == b"constant" and node.input[1] in graph.initializers
    return constant and (not value or (value in graph.initializers and not graph.value(value).any()))


def _layer(
    graph: Graph, kind: Literal["linear", "conv"], reads: str, weight: str, bias: str | None, puts_out: str,
    places: tuple[int, ...], pad: int | None = None, padded: bool = False,
) -> Layer:  # fmt: skip
    made = graph.maker(reads, "LayerNormalization") if len(graph.readers[reads]) == 1 else None
    vectors = list(graph.nodes[made].input[1:]) if made is not None else []
    norm = (
        (vectors[0], vectors[1])
        if len(vectors) == 2 and all(graph.only_reader(v, "LayerNormalization") is not None for v in vectors)
        else None
    )
    return Layer(
        name=weight.removesuffix(".weight"), kind=kind, reads=reads, weight=weight, bias=bias, puts_out=puts_out,
        norm=norm, padded=padded, places=places, pad=pad,
    )  # fmt: skip
