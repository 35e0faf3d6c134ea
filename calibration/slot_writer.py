"""Write a graph with slots, from the structure of a traced one, for networks with codes in front of layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgepet.calibration.layers import Graph, Layer
from edgepet.calibration.writer import GraphWriter, settings_of
from edgepet.errors import require
from edgepet.graphs.int8 import CODE, DIVISOR, Int8Layer, SlotForm
from edgepet.graphs.slots import scaled_by_norm, slot_shapes
from edgepet.graphs.tensor_files import Place, point_into

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

ZERO = 128  # ONNX Runtime's int8 products are fastest with unsigned codes of activations: the same codes, moved
MICROSOFT = "com.microsoft"


class SlotWriter:
    """Writes a graph with slots in one form, node by node, from the structure of the fp32 graph."""

    def __init__(
        self, structure: ModelProto, layers: tuple[Layer, ...], described: tuple[Int8Layer, ...],
        beside: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], form: SlotForm,
    ) -> None:  # fmt: skip
        # ``beside``: the shapes of further slots, vectors and tensors of branches.
        self._onnx = require("onnx", extra="train", purpose="int8")
        self._writer = GraphWriter(structure, purpose="int8")
        self._graph, self._places, self._form = Graph(structure), places, form
        self._ends = {layer.places[-1]: (layer, told) for layer, told in zip(layers, described, strict=True)}
        self._inside = {place for layer in layers for place in (*layer.places, layer.pad)}
        self._slots = slot_shapes(described, beside, {name: place.shape for name, place in places.items()}, form)
        self._integers = frozenset[str]()  # slots that are int32
        self._coded = set[str]()

    def model(self) -> ModelProto:
        """The graph, whose tensors lie in the files of codes."""
        for place, node in enumerate(self._graph.nodes):
            if place in self._ends:
                self._layer(*self._ends[place])
            elif place not in self._inside:
                self._other(node)
        onnx, read = self._onnx, self._writer.reads - set(self._slots)
        stored = [self._external(name) for name in sorted(read & set(self._places))]
        own = self._graph.model.graph.initializer
        kept = [tensor for tensor in own if tensor.name in read - set(self._places)]
        made = self._writer.model([*stored, *kept], keep_types=True)
        for name, shape in sorted(self._asked().items()):
            kind = onnx.TensorProto.INT32 if name in self._integers else onnx.TensorProto.FLOAT
            made.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        if not self._form.unit_codes:
            made.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        return made

    def _asked(self) -> Mapping[str, tuple[int, ...]]:
        """The slots that are inputs, and their shapes."""
        return self._slots

    def _other(self, node: NodeProto) -> None:
        """Write a node that is of no layer."""
        self._writer.add(node)

    def _external(self, name: str) -> TensorProto:
        place, onnx = self._places[name], self._onnx
        kinds = {"<f4": onnx.TensorProto.FLOAT, "|i1": onnx.TensorProto.INT8}
        tensor: TensorProto = onnx.TensorProto(name=name, dims=place.shape, data_type=kinds[place.dtype])
        point_into(tensor, place.file, place.offset, place.length)
        return tensor

    def _layer(self, layer: Layer, told: Int8Layer) -> None:
        if not self._form.unit_codes and layer.kind == "linear":
            self._integer_product(layer, told)
            return
        codes = self._dequantized(layer, told)
        if layer.pad is not None:
            pad = self._graph.nodes[layer.pad]
            self._writer.node("Pad", [codes, *pad.input[1:]], f"{layer.name}.padded")
            codes = f"{layer.name}.padded"
        weight = self._weight(layer)
        steps, bias = f"{layer.name}.steps", f"{layer.name}.shifted"
        settings = settings_of(self._graph.nodes[layer.places[0]]) if layer.kind == "conv" else {}
        if not self._form.unit_codes:
            self._writer.node("Conv", [codes, weight, bias], layer.puts_out, **settings)
            return
        self._writer.node(
            "MatMul" if layer.kind == "linear" else "Conv", [codes, weight], f"{layer.name}.product", **settings
        )
        self._writer.node("Mul", [f"{layer.name}.product", steps], f"{layer.name}.scaled")
        self._writer.node("Add", [f"{layer.name}.scaled", bias], layer.puts_out)

    def _integer_product(self, layer: Layer, told: Int8Layer) -> None:
        scale, zero = f"{layer.reads}.scale", self._writer.tensor("edgepet.int8.zero", np.uint8(ZERO))
        source = self._shifted(layer, told)
        codes = f"{layer.reads}.codes"
        if layer.reads not in self._coded:
            self._coded.add(layer.reads)
            self._writer.node("QuantizeLinear", [source, scale, zero], codes)
        steps, bias = f"{layer.name}.steps", f"{layer.name}.shifted"
        inputs = [codes, layer.weight + CODE, scale, steps, zero, "", bias]
        self._writer.node("MatMulIntegerToFloat", inputs, layer.puts_out, domain=MICROSOFT)

    def _shifted(self, layer: Layer, told: Int8Layer) -> str:
        """What the codes are made of: the tensor less its shift; a norm's output and what is padded have none."""
        if scaled_by_norm(told) or layer.padded:
            return layer.reads
        if layer.reads not in self._coded:
            source = layer.reads
            if told.divided:
                source = self._writer.node("Div", [source, layer.weight + DIVISOR], f"{layer.reads}.divided")
            self._writer.node("Sub", [source, f"{layer.reads}.shift"], f"{layer.reads}.centred")
        return f"{layer.reads}.centred"

    def _dequantized(self, layer: Layer, told: Int8Layer) -> str:
        made = f"{layer.reads}.int8"
        if layer.reads in self._coded:
            return made
        if not self._form.unit_codes:
            source, scale = self._shifted(layer, told), f"{layer.reads}.scale"
        else:
            source, scale = self._normalised(layer, told), self._writer.tensor("edgepet.int8.one", np.float32(1))
        self._coded.add(layer.reads)
        zero = self._writer.tensor("edgepet.int8.zero_s8", np.int8(0))
        self._writer.node("QuantizeLinear", [source, scale, zero], f"{layer.reads}.codes")
        self._writer.node("DequantizeLinear", [f"{layer.reads}.codes", scale, zero], made)
        return made

    def _normalised(self, layer: Layer, told: Int8Layer) -> str:
        if scaled_by_norm(told):
            return layer.reads
        self._writer.node("Mul", [layer.reads, f"{layer.reads}.scale"], f"{layer.reads}.unit")
        if layer.padded:
            return f"{layer.reads}.unit"
        self._writer.node("Add", [f"{layer.reads}.unit", f"{layer.reads}.shift"], f"{layer.reads}.centred")
        return f"{layer.reads}.centred"

    def _weight(self, layer: Layer) -> str:
        out = self._slots[f"{layer.name}.steps"][0]
        axis = 0 if layer.kind == "conv" else 1
        if not self._form.unit_codes:
            scales = f"{layer.name}.steps"
        else:
            scales = self._writer.tensor(f"edgepet.int8.ones.{out}", np.ones(out, np.float32))
        zeros = self._writer.tensor(f"edgepet.int8.zeros.{out}", np.zeros(out, np.int8))
        self._writer.node("DequantizeLinear", [layer.weight + CODE, scales, zeros], f"{layer.weight}.int8", axis=axis)
        return f"{layer.weight}.int8"
