"""Write a graph with slots that has codes in every map, in the form for each runtime.

For ONNX Runtime convolutions, sums, products and sigmoids are its integer operators, whose scales and biases are slots;
for OpenVINO, whose int8 kernels want constant scales, every code stands for itself, and what a convolution puts out is
scaled, shifted and brought to the scale of its own map in one pass. Whatever else reads a map reads what its codes
stand for, under the map's own name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepet.calibration.coded_maps import INTEGER, Maps, missing_channels, pads_inside
from edgepet.calibration.layers import Layer
from edgepet.calibration.slot_writer import MICROSOFT, ZERO, SlotWriter
from edgepet.calibration.writer import copied, settings_of
from edgepet.graphs.int8 import CODE, DIVISOR, CodedMap, Int8Layer, SlotForm
from edgepet.graphs.map_slots import map_slot_shapes
from edgepet.graphs.slots import scaled_by_norm
from edgepet.graphs.tensor_files import Place

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_SIZES = ("Shape", "Size")


class MapSlotWriter(SlotWriter):
    """What both forms have in common: which tensors have codes, and under which names they are read."""

    codes = ""  # ends the name of what holds the codes of a map

    def __init__(
        self, structure: ModelProto, layers: tuple[Layer, ...], described: tuple[Int8Layer, ...],
        beside: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], form: SlotForm,
        coded: Sequence[CodedMap], maps: Maps,
    ) -> None:  # fmt: skip
        super().__init__(structure, layers, described, beside, places, form)
        shapes = {name: place.shape for name, place in places.items()}
        self._slots = map_slot_shapes(described, coded, beside, shapes, form)
        self._maps, self._inside = maps, self._inside | maps.absorbed
        self._codes = {each.name: each.codes for each in coded if each.name in maps.axes}
        self._readers = {layer.reads: (layer, told) for layer, told in self._ends.values()}
        self._named = set[str]()  # maps whose names are of what their codes stand for
        self._back = set[str]()  # others that were read back

    def _asked(self) -> Mapping[str, tuple[int, ...]]:
        reads = self._writer.reads
        return {name: shape for name, shape in self._slots.items() if name in reads}

    def _other(self, node: NodeProto) -> None:
        made, put_out = copied(node), [self._maps.renamed.get(name, name) for name in node.output]
        for position, name in enumerate(made.input):
            if name in self._codes:
                made.input[position] = self._size_of(name) if node.op_type in _SIZES else self._decoded(name)
        rounded = [name for name in put_out if name in self._codes and self._is_rounded_at_once(name, node)]
        for position, name in enumerate(put_out):
            made.output[position] = f"{name}.raw" if name in rounded else name
        self._writer.add(made)
        for name in rounded:
            self._put_out(name, f"{name}.raw")

    def _is_rounded_at_once(self, name: str, node: NodeProto) -> bool:
        return node.op_type in INTEGER or name in self._maps.bounds

    def _put_out(self, name: str, source: str) -> None:
        """Round a map that is ``source`` until then; its own name is of what the codes stand for."""
        self._round(name, source)
        self._named_back(name)

    def _named_back(self, name: str) -> None:
        self._coded.add(name)
        self._named.add(name)
        self._read_back(name, name)

    def _rounded(self, name: str) -> str:
        """The codes of a map, made here where they are not there."""
        if name not in self._coded:
            self._coded.add(name)
            self._round(name, name)
        return f"{name}.{self.codes}"

    def _decoded(self, name: str) -> str:
        """What the codes of a map stand for; of one that is divided for a layer alone, the map itself."""
        if name in self._named or self._divided(name):
            return name
        self._rounded(name)
        if name not in self._back:
            self._back.add(name)
            self._read_back(name, f"{name}.decoded")
        return f"{name}.decoded"

    def _divided(self, name: str) -> bool:
        return name in self._readers and self._readers[name][1].divided

    def _size_of(self, name: str) -> str:
        return f"{name}.{self.codes}" if name in self._named else name

    def _round(self, name: str, source: str) -> None:
        """Write the nodes that make codes of ``source``."""
        raise NotImplementedError

    def _read_back(self, name: str, output: str) -> None:
        """Write the nodes that make ``output`` of the codes."""
        raise NotImplementedError

    def _padded(self, layer: Layer, codes: str, settings: dict[str, object], zero: Sequence[str] = ()) -> str:
        """What a convolution reads: it pads itself, or a node in front of it does where that has no place there."""
        if layer.pad is None or pads_inside(self._graph, layer, settings):
            return codes
        pads = self._graph.nodes[layer.pad].input[1]
        return self._writer.node("Pad", [codes, pads, *zero], f"{layer.name}.padded")


class IntegerWriter(MapSlotWriter):
    """The form of ONNX Runtime: codes are uint8, and between integer operators nothing is ever float."""

    codes = "codes"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._integers = frozenset(name for name in self._slots if name.endswith(".bias") and name not in given[3])

    def _zero(self, name: str) -> str:
        zero = 0 if self._codes[name] == "unsigned" else ZERO
        return self._writer.tensor(f"edgepet.uint8.{zero}", np.uint8(zero))

    def _round(self, name: str, source: str) -> None:
        if self._divided(name):
            by = self._readers[name][0].weight + DIVISOR
            source = self._writer.node("Div", [source, by], f"{name}.divided")
        if self._codes[name] == "shifted":
            source = self._writer.node("Sub", [source, f"{name}.shift"], f"{name}.centred")
        self._writer.node("QuantizeLinear", [source, f"{name}.scale", self._zero(name)], f"{name}.codes")

    def _read_back(self, name: str, output: str) -> None:
        self._writer.node("DequantizeLinear", [f"{name}.codes", f"{name}.scale", self._zero(name)], output)

    def _other(self, node: NodeProto) -> None:
        output = self._maps.renamed.get(node.output[0], node.output[0])
        if node.op_type not in INTEGER or not all(name in self._codes for name in (output, *node.input)):
            super()._other(node)
            return
        read = [text for name in node.input for text in (self._rounded(name), f"{name}.scale", self._zero(name))]
        made = [f"{output}.scale", self._zero(output)]
        self._writer.node(f"QLinear{node.op_type}", [*read, *made], f"{output}.codes", domain=MICROSOFT)
        self._named_back(output)

    def _layer(self, layer: Layer, told: Int8Layer) -> None:
        codes, scale, zero = self._rounded(layer.reads), f"{layer.reads}.scale", self._zero(layer.reads)
        weight, steps = layer.weight + CODE, f"{layer.name}.steps"
        if layer.kind == "linear":
            inputs = [codes, weight, scale, steps, zero, "", f"{layer.name}.shifted"]
            self._writer.node("MatMulIntegerToFloat", inputs, layer.puts_out, domain=MICROSOFT)
            return
        if missing := missing_channels(self._graph, layer):
            codes, weight = self._in_fours(layer, codes, missing)
        settings = dict(settings_of(self._graph.nodes[layer.places[0]]))
        codes = self._padded(layer, codes, settings, [zero])
        output = self._maps.renamed.get(layer.puts_out, layer.puts_out)
        none = self._writer.tensor("edgepet.int8.zero_s8", np.int8(0))
        inputs = [codes, scale, zero, weight, steps, none, f"{output}.scale", self._zero(output), f"{layer.name}.bias"]
        self._writer.node("QLinearConv", inputs, f"{output}.codes", **settings)
        self._named_back(output)

    def _in_fours(self, layer: Layer, codes: str, missing: int) -> tuple[str, str]:
        """What a convolution reads and its weight, with channels of zeros behind: see ``coded_maps.MAP_FORMS``."""
        pads = self._writer.tensor(f"{layer.name}.fours.pads", np.array([0, 0, 0, 0, 0, missing, 0, 0]))
        none = self._writer.tensor("edgepet.int8.zero_s8", np.int8(0))
        more = self._writer.node("Pad", [codes, pads, self._zero(layer.reads)], f"{layer.name}.fours")
        return more, self._writer.node("Pad", [layer.weight + CODE, pads, none], f"{layer.weight}.fours")


class UnitWriter(MapSlotWriter):
    """The form of OpenVINO: every code stands for itself."""

    codes = "int8"

    def _round(self, name: str, source: str) -> None:
        _, told = self._readers.get(name, (None, None))
        if told is None or not scaled_by_norm(told):
            source = self._writer.node("Mul", [source, f"{name}.scale"], f"{name}.unit")
        if self._codes[name] == "shifted":
            source = self._writer.node("Add", [source, f"{name}.shift"], f"{name}.centred")
        kind = np.uint8 if self._codes[name] == "unsigned" else np.int8
        one = self._writer.tensor("edgepet.int8.one", np.float32(1))
        zero = self._writer.tensor(f"edgepet.{np.dtype(kind)}.zero", kind(0))
        self._writer.node("QuantizeLinear", [source, one, zero], f"{name}.codes")
        self._writer.node("DequantizeLinear", [f"{name}.codes", one, zero], f"{name}.int8")

    def _read_back(self, name: str, output: str) -> None:
        self._writer.node("Mul", [f"{name}.int8", f"{name}.step"], output)

    def _layer(self, layer: Layer, told: Int8Layer) -> None:
        settings = dict(settings_of(self._graph.nodes[layer.places[0]])) if layer.kind == "conv" else {}
        codes = self._padded(layer, self._rounded(layer.reads), settings)
        product = self._writer.node(
            "MatMul" if layer.kind == "linear" else "Conv", [codes, self._weight(layer)], f"{layer.name}.product",
            **settings,
        )  # fmt: skip
        scaled = self._writer.node("Mul", [product, f"{layer.name}.steps"], f"{layer.name}.scaled")
        output = self._maps.renamed.get(layer.puts_out, layer.puts_out)
        at_once = output in self._codes and layer.kind == "conv"
        raw = f"{output}.raw" if at_once else output
        self._writer.node("Add", [scaled, f"{layer.name}.shifted"], raw)
        if at_once:
            self._put_out(output, raw)


WRITERS = {"onnxruntime": IntegerWriter, "openvino": UnitWriter}  # by runtime
