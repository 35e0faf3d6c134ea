"""int8 as a pass on the merged ONNX graph: one file with Q/DQ pairs that ONNX Runtime, OpenVINO and TensorRT build.

Weights have per-channel symmetric codes, activations per-tensor ones without a zero point, which TensorRT does not
read. A tensor that hardly goes below zero (behind GELU, ReLU) would waste half of the codes: a constant is taken off
first, and the bias of the layer that reads it gives it back, which is exact unless the layer pads with zeros. Linear
layers and convolutions only; the head, norms, softmax, GELU and additions compute in float (ADR-0015).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgepet.calibration.layers import Graph, Layer
from edgepet.calibration.observe import Activations, Seen
from edgepet.calibration.ranges import Estimator, Histogram, threshold
from edgepet.calibration.writer import GraphWriter, copied, require_valid, settings_of
from edgepet.deltas.codes import HIGH, LOW, Range, bias_steps, coded, per_channel, smoothing
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

ONE_SIDED = 0.25  # a tensor that goes less than this part as far down as up is shifted


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Recipe:
    """How a network becomes int8.

    ``smooth`` is SmoothQuant's strength between 0 and 1 behind layer norms (Xiao et al. 2022, arXiv:2211.10438,
    equation 4), None for none. ``estimator`` says how far the codes of activations reach. ``bias_correction`` gives
    biases back what rounding moves outputs by on the mean (Nagel et al. 2019, arXiv:1906.04721, section 4.2). ``bits``
    are those of weights. ``keep`` names layers that stay float.
    """

    smooth: float | None = None
    estimator: Estimator = "min-max"
    bias_correction: bool = False
    bits: int = 8
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Int8:
    """The Q/DQ model (``onnx.ModelProto``), the ranges of its tensors by name, and which layers compute in int8."""

    model: ModelProto
    ranges: Mapping[str, Range]
    layers: tuple[Layer, ...]


# -------------------------------------------------------------------------------------------------------- activations


def observed_smoothing(graph: Graph, layers: Sequence[Layer], seen: Seen, strength: float) -> dict[str, NpArray]:
    """SmoothQuant's divisors (in,) of the channels behind each layer norm, by the name of what it puts out."""
    return {
        layer.reads: smoothing(seen[layer.reads].largest, graph.value(layer.weight), strength)
        for layer in layers
        if layer.norm is not None and layer.kind == "linear"
    }


def choose_ranges(
    layers: Sequence[Layer], seen: Seen, estimator: Estimator, smooth: Mapping[str, NpArray]
) -> dict[str, Range]:
    """The range of every tensor that a layer reads, by its name, once it is divided by ``smooth`` (in,).

    What a layer norm puts out, or a layer pads with zeros, has no shift.
    """
    ranges = {}
    for name in dict.fromkeys(layer.reads for layer in layers):
        values = seen[name].divided(smooth[name]) if name in smooth else seen[name]
        readers = [layer for layer in layers if layer.reads == name]
        may_shift = not any(layer.padded or layer.norm for layer in readers)  # a norm's output goes both ways
        ranges[name] = _range(values, estimator, may_shift=may_shift)
    return ranges


def _range(values: Activations, estimator: Estimator, *, may_shift: bool) -> Range:
    low, high = min(float(values.least.min()), 0.0), max(float(values.most.max()), 0.0)
    if may_shift and -low < ONE_SIDED * high:
        reach = threshold(Histogram.of(values.rows - low, high - low), estimator, HIGH - LOW)
        scale = reach / (HIGH - LOW)
        return Range(scale=scale, shift=low - LOW * scale)
    return Range(scale=threshold(Histogram.of(values.rows, max(-low, high)), estimator, HIGH) / HIGH)


# ----------------------------------------------------------------------------------------------------------- the pass


def quantize(
    graph: Graph,
    layers: Sequence[Layer],
    seen: Seen,
    recipe: Int8Recipe,
    *,
    smooth: Mapping[str, NpArray] | None = None,
    ranges: Mapping[str, Range] | None = None,
    held: Mapping[str, Range] = MappingProxyType({}),
) -> Int8:
    """The model of ``graph`` in int8; it is not touched.

    Args:
        graph: of a folded model: batch norms behind convolutions are part of them.
        seen: what ``observe`` saw of ``layers`` on the calibration images.
        smooth, ranges: divisors (in,) and ranges by tensor, in place of those that ``recipe`` would choose. A divisor
            is in the layer norm in front where nothing else reads what that puts out, else a node of its own.
        held: those of some tensors, in place of what either would be.
    """
    chosen, divisors = chosen_layers(graph, layers, seen, recipe, smooth)
    ranges = choose_ranges(chosen, seen, recipe.estimator, divisors) if ranges is None else ranges
    ranges = {name: held.get(name, of) for name, of in ranges.items()}
    return Int8(QdqWriter(graph, chosen, seen, recipe, divisors, ranges).model(), ranges, chosen)


def chosen_layers(
    graph: Graph, layers: Sequence[Layer], seen: Seen, recipe: Int8Recipe, smooth: Mapping[str, NpArray] | None = None
) -> tuple[tuple[Layer, ...], dict[str, NpArray]]:
    """The layers that ``recipe`` does not keep in float, and the divisors (in,) of what they read, by its name."""
    chosen = tuple(layer for layer in layers if layer.name not in recipe.keep)
    if smooth is None:
        smooth = {} if recipe.smooth is None else observed_smoothing(graph, layers, seen, recipe.smooth)
    read = {layer.reads for layer in chosen}
    return chosen, {name: value for name, value in smooth.items() if name in read}


class QdqWriter:
    """Writes the Q/DQ graph, node by node: one for every runtime, codes in front of layers and nowhere else."""

    def __init__(
        self, graph: Graph, layers: Sequence[Layer], seen: Seen, recipe: Int8Recipe, smooth: Mapping[str, NpArray],
        ranges: Mapping[str, Range], corrections: Mapping[str, NpArray] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self._corrections = corrections
        self._graph, self._recipe, self._writer = graph, recipe, GraphWriter(graph.model, purpose="int8")
        self._seen, self._smooth, self._ranges = seen, smooth, ranges
        self._ends = {layer.places[-1]: layer for layer in layers}
        self._inside = {place for layer in layers for place in (*layer.places, layer.pad)}
        self._divided = {layer.reads for layer in layers if layer.norm is None} & smooth.keys()
        self._coded = set[str]()

    def model(self) -> ModelProto:
        """The graph, checked by onnx."""
        for place, node in enumerate(self._graph.nodes):
            if place in self._ends:
                self._layer(self._ends[place])
            elif place not in self._inside:
                self._writer.add(self._copy(node))
        read = self._writer.reads
        made = self._writer.model(t for t in self._graph.model.graph.initializer if t.name in read)
        require_valid(made)
        return made

    def _copy(self, node: NodeProto) -> NodeProto:
        made = copied(node)
        if node.output[0] in self._smooth and node.output[0] not in self._divided:
            for position, name in enumerate(node.input[1:], 1):
                made.input[position] = self._writer.tensor(
                    f"{name}.smoothed", self._graph.value(name) / self._smooth[node.output[0]]
                )
        return made

    def _layer(self, layer: Layer) -> None:
        (self._convolution if layer.kind == "conv" else self._product)(layer)

    def _convolution(self, layer: Layer) -> None:
        codes = self._encoded(layer.reads)
        if layer.pad is not None:
            pad = self._graph.nodes[layer.pad]
            self._writer.node("Pad", [codes, *pad.input[1:]], f"{layer.name}.padded")
            codes = f"{layer.name}.padded"
        weight, rounded = self._weight(layer)
        bias = self._bias(layer, rounded)
        settings = settings_of(self._graph.nodes[layer.places[0]])
        self._writer.node("Conv", [codes, weight, *bias], layer.puts_out, **settings)

    def _product(self, layer: Layer) -> None:
        codes = self._encoded(layer.reads)
        weight, rounded = self._weight(layer)
        bias = self._bias(layer, rounded)
        product = f"{layer.name}.product" if bias else layer.puts_out
        self._writer.node("MatMul", [codes, weight], product)
        if bias:
            self._writer.node("Add", [product, *bias], layer.puts_out)

    def _encoded(self, name: str) -> str:
        """Q and DQ behind a tensor, shifted first where its range is; what they put out is the shifted tensor."""
        source, shift = name, self._ranges[name].shift
        if name in self._divided and name not in self._coded:  # others read what the layer norm puts out as well
            by = self._writer.tensor(f"{name}.divisor", self._smooth[name])
            source = self._writer.node("Div", [source, by], f"{name}.divided")
        if shift and name not in self._coded:
            by = self._writer.tensor(f"{name}.shift", np.float32(shift))
            source = self._writer.node("Sub", [source, by], f"{name}.shifted")
        return self._rounded(name, source, np.int8(0))

    def _rounded(self, name: str, source: str, zero: np.generic) -> str:
        """Q and DQ of ``source`` in the range of ``name``, once; ``zero`` is the zero point, and says the type."""
        if name not in self._coded:
            self._coded.add(name)
            self._writer.node("QuantizeLinear", [source, *self._step(name, zero)], f"{name}.codes")
            self._writer.node("DequantizeLinear", [f"{name}.codes", *self._step(name, zero)], f"{name}.int8")
        return f"{name}.int8"

    def _step(self, name: str, zero: np.generic) -> list[str]:
        """The names of the scale and the zero point of a tensor's codes."""
        spelled = "edgepet.int8.zero" if zero.dtype == np.int8 else f"edgepet.uint8.{zero}"
        scale = np.float32(self._ranges[name].scale)
        return [self._writer.tensor(f"{name}.scale", scale), self._writer.tensor(spelled, zero)]

    def _weight(self, layer: Layer) -> tuple[str, NpArray]:
        """The name of the dequantised weight, and its values (out, ...) in float64."""
        weight, of = self._graph.value(layer.weight), self._ranges[layer.reads]
        dense = self._dense(layer).astype(np.float64)
        least = bias_steps(dense, self._own_bias(layer, dense), of.scale)
        made = coded(weight, self._smooth.get(layer.reads), self._recipe.bits, least=least)
        rounded = made.codes * per_channel(made.scales.astype(np.float64), made.codes)
        axis = 1 if layer.kind == "linear" else 0
        inputs = [
            self._writer.tensor(f"{layer.weight}.codes", self._laid(layer, made.codes)),
            self._writer.tensor(f"{layer.weight}.scale", made.scales),
            self._writer.tensor(f"{layer.weight}.zeros", np.zeros(len(made.scales), np.int8)),
        ]
        self._writer.node("DequantizeLinear", inputs, f"{layer.weight}.int8", axis=axis)
        return f"{layer.weight}.int8", rounded

    def _laid(self, layer: Layer, codes: NpArray) -> NpArray:
        """The codes (out, ...) of a weight as the graph holds them."""
        return np.ascontiguousarray(codes.T) if layer.kind == "linear" else codes

    def _dense(self, layer: Layer) -> NpArray:
        weight = self._graph.value(layer.weight)
        return weight * self._smooth[layer.reads] if layer.reads in self._smooth else weight

    def _bias(self, layer: Layer, rounded: NpArray) -> list[str]:
        """The bias with the shift of what the layer reads, if there is any."""
        bias = self._own_bias(layer, rounded)
        if layer.name in self._corrections:
            bias = bias + self._corrections[layer.name]
        elif self._recipe.bias_correction:
            bias = bias + self._correction(layer, rounded)
        return [self._writer.tensor(f"{layer.name}.bias.int8", bias.astype(np.float32))] if bias.any() else []

    def _own_bias(self, layer: Layer, weight: NpArray) -> NpArray:
        bias = np.zeros(len(weight)) if layer.bias is None else self._graph.value(layer.bias).astype(np.float64)
        shifted: NpArray = bias + self._shift(layer) * weight.reshape(len(weight), -1).sum(axis=1)
        return shifted

    def _shift(self, layer: Layer) -> float:
        """The constant that was taken off what the layer reads."""
        return self._ranges[layer.reads].shift

    def _correction(self, layer: Layer, rounded: NpArray) -> NpArray:
        rows = self._seen[layer.reads].rows
        rows = rows / self._smooth[layer.reads] if layer.reads in self._smooth else rows
        return moved_by(self._dense(layer).astype(np.float64), rounded, rows, self._ranges[layer.reads])


def moved_by(exact: NpArray, rounded: NpArray, rows: NpArray, of: Range) -> NpArray:
    """What rounding takes off each output of a layer on the mean (Nagel et al. 2019, arXiv:1906.04721, section 4.2).

    Args:
        exact, rounded: its weight (out, ...), float64.
        rows: what it reads (m, in), before that is rounded to codes ``of`` this range.
    """
    coded, means = of.rounded(rows).mean(axis=0, dtype=np.float64), rows.mean(axis=0, dtype=np.float64)
    lost: NpArray = on_channels(exact, means) - on_channels(rounded, coded)
    return lost


def on_channels(weight: NpArray, means: NpArray) -> NpArray:
    """What a layer makes of an input that is everywhere the mean of its channel: (out,).

    ``weight`` is (out, in / groups, ...), ``means`` (in,). Borders that a convolution pads with zeros are left out.
    """
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
    groups = len(means) // taps.shape[1]
    made: NpArray = (taps.reshape(groups, -1, taps.shape[1]) * means.reshape(groups, 1, -1)).sum(axis=2).reshape(-1)
    return made
