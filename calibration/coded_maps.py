"""int8 for ConvNets: the maps between convolutions have codes, so that a runtime hardly leaves the integers.

``qdq`` writes one graph for every runtime: signed codes with a zero point of 0, in front of layers alone. TensorRT
reads no other. ONNX Runtime multiplies codes in a convolution only if it puts out codes as well, and OpenVINO stores
and adds a quarter of the bytes where a map is never float. Both take unsigned codes, of which a map behind ReLU has all
256: its zero is code 0. So padding with zeros is exact and lies in the convolution, and what only bounds a map, ReLU
or ReLU6, is the end of its range and no operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgepet.calibration.layers import Graph, Layer
from edgepet.calibration.observe import Activations, Seen
from edgepet.calibration.qdq import ONE_SIDED, Int8, Int8Recipe, QdqWriter, chosen_layers
from edgepet.calibration.ranges import Estimator, Histogram, threshold
from edgepet.calibration.writer import settings_of
from edgepet.deltas.codes import HIGH, LOW, Range
from edgepet.device.runtimes import Format
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True, slots=True, kw_only=True)
class MapForm:
    """How the codes of maps are written for a runtime.

    ``outputs``: what a convolution puts out has codes even if nothing but float operators reads it. ``zero_points``:
    codes are unsigned with any zero point; else those of what goes below zero are signed and have none. ``fours``: the
    channels that a kernel of more than one place reads are a multiple of four, the last of them zeros.
    """

    outputs: bool
    zero_points: bool
    fours: bool


MAP_FORMS: Mapping[Format, MapForm] = {  # a format that is not here reads the graph of ``qdq``
    # MLAS reads four codes at a time; three it would first copy for every place of the kernel, one by one.
    "onnx": MapForm(outputs=True, zero_points=True, fours=True),
    # A zero point costs a pass over the map, and so does rounding in front of a float operator as well as behind it.
    "openvino": MapForm(outputs=False, zero_points=False, fours=False),
}


INTEGER = ("Add", "Mul", "Sigmoid")  # what ONNX Runtime has integer kernels for: SiLU and gates are of these


def has_maps(layers: Sequence[Layer]) -> bool:
    """Whether ``layers`` are a ConvNet's: a transformer has one convolution, which reads the images."""
    return sum(layer.kind == "conv" for layer in layers) > 1


# --------------------------------------------------------------------------------------------------- which have codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """The tensors of a graph that have codes, by name, with the axis of their channels.

    Nodes at ``absorbed`` are ends of ranges: ReLU lets through at most ``bounds``, by the name of what it puts out. The
    node in front puts that out instead of its own, as ``renamed`` says.
    """

    axes: Mapping[str, int]
    bounds: Mapping[str, float]
    absorbed: frozenset[int]
    renamed: Mapping[str, str]


def find_maps(graph: Graph, layers: Sequence[Layer], *, outputs: bool) -> Maps:
    """What has codes where ``layers`` compute in int8: what they read, and sums of such.

    Args:
        outputs: what their convolutions put out as well, and products and sigmoids of such.
    """
    axes = {layer.reads: layer.channel_axis for layer in layers}
    ends = {layer.puts_out for layer in layers if layer.kind == "conv"}
    bounds, absorbed, renamed = dict[str, float](), set[int](), dict[str, str]()
    for place, node in enumerate(graph.nodes):
        ended = _ended(graph, place, ends)
        if ended is not None and (node.output[0] in axes or node.input[0] in axes):
            axes.pop(node.input[0], None)
            axes[node.output[0]], bounds[node.output[0]], renamed[node.input[0]] = 1, ended, node.output[0]
            absorbed.add(place)
        elif node.op_type in (INTEGER if outputs else ("Add",)) and all(name in axes for name in node.input):
            axes.setdefault(node.output[0], 1)
        if outputs:
            axes |= {name: 1 for name in node.output if name in ends and name not in axes}
    return Maps(axes=axes, bounds=bounds, absorbed=frozenset(absorbed), renamed=renamed)


def _ended(graph: Graph, place: int, ends: set[str]) -> float | None:
    """What the node at ``place`` lets through at most, if it is all that reads a convolution's output or a sum, and
    takes away what is below zero.
    """
    node = graph.nodes[place]
    if node.op_type not in ("Relu", "Clip") or graph.only_reader(node.input[0], node.op_type) is None:
        return None
    if node.input[0] not in ends and graph.maker(node.input[0], "Add") is None:
        return None
    if node.op_type == "Relu":
        return np.inf
    if not all(not name or name in graph.initializers for name in node.input[1:]):
        return None
    low, high = (graph.value(name).item() if name else None for name in [*node.input[1:], "", ""][:2])
    return (np.inf if high is None else float(high)) if low == 0 else None


# --------------------------------------------------------------------------------------------------------- their codes


def map_ranges(
    graph: Graph, layers: Sequence[Layer], maps: Maps, seen: Seen, estimator: Estimator, form: MapForm
) -> dict[str, Range]:
    """The range of every map, by its name; with zero points, zero has a code of its own in each.

    Without them what hardly goes below zero is shifted, as in ``qdq``, where that is exact.
    """
    ranges = {}
    for name in maps.axes:
        readers = [layer for layer in layers if layer.reads == name]
        alone = len(readers) == len(graph.readers.get(name, ())) and not any(r.padded or r.norm for r in readers)
        bound = maps.bounds.get(name, np.inf)
        ranges[name] = _range(seen[name], estimator, form, bound=bound, may_shift=form.zero_points or alone)
    return ranges


def _range(values: Activations, estimator: Estimator, form: MapForm, *, bound: float, may_shift: bool) -> Range:
    low, high = min(float(values.least.min()), 0.0), max(float(values.most.max()), 0.0)
    if -low >= ONE_SIDED * high or (low < 0 and not may_shift):
        return Range(scale=threshold(Histogram.of(values.rows, max(-low, high)), estimator, HIGH) / HIGH)
    reach = min(threshold(Histogram.of(values.rows - low, high - low), estimator, HIGH - LOW), bound)
    scale = reach / (HIGH - LOW)
    if form.zero_points:
        low = scale * round(low / scale)
    return Range(scale=scale, shift=low - LOW * scale)


def zero_code(of: Range) -> int:
    """The unsigned code that stands for zero, or for what is next to it."""
    return round(-LOW - of.shift / of.scale)


def pads_inside(graph: Graph, layer: Layer, settings: dict[str, object]) -> bool:
    """Let a convolution pad what the node in front of it does, into ``settings``; False where they have no place."""
    pad = graph.nodes[layer.pad or 0]
    pads = graph.value(pad.input[1])
    if len(pad.input) > 3 or pads.shape != (8,) or pads[[0, 1, 4, 5]].any() or pads.min() < 0:
        return False
    own = np.asarray(settings.get("pads", [0, 0, 0, 0]))
    settings["pads"] = (own + pads[[2, 3, 6, 7]]).tolist()
    return True


def missing_channels(graph: Graph, layer: Layer) -> int:
    """Channels that a convolution lacks to read them in fours."""
    _, inside, *kernel = graph.shapes[layer.weight]
    grouped = graph.attribute(layer.places[0], "group", 1) > 1
    return 0 if grouped or kernel == [1, 1] else -inside % 4


# ------------------------------------------------------------------------------------------------------------ the pass


def quantize_maps(
    graph: Graph, layers: Sequence[Layer], seen: Seen, recipe: Int8Recipe, form: MapForm, *,
    smooth: Mapping[str, NpArray] | None = None, ranges: Mapping[str, Range] | None = None,
    corrections: Mapping[str, NpArray] = MappingProxyType({}),
) -> Int8:  # fmt: skip
    """The model of ``graph`` with codes in its maps; it is not touched. As ``qdq.quantize``.

    Args:
        seen: what ``observe`` saw of ``find_maps`` on the calibration images.
        corrections: what is added to biases (out,), by the layer, in place of what ``recipe`` would add.
    """
    chosen, divisors = chosen_layers(graph, layers, seen, recipe, smooth)
    maps = find_maps(graph, chosen, outputs=form.outputs)
    if ranges is None:
        smoothed = {**seen, **{name: seen[name].divided(by) for name, by in divisors.items()}}
        ranges = map_ranges(graph, chosen, maps, smoothed, recipe.estimator, form)
    ranges = {name: ranges[name] for name in maps.axes}
    writer = MapWriter(graph, chosen, seen, recipe, divisors, ranges, maps, form, corrections)
    return Int8(writer.model(), ranges, chosen)


class MapWriter(QdqWriter):
    """Writes the graph node by node: whatever reads a map reads what its codes stand for."""

    def __init__(
        self, graph: Graph, layers: Sequence[Layer], seen: Seen, recipe: Int8Recipe, smooth: Mapping[str, NpArray],
        ranges: Mapping[str, Range], maps: Maps, form: MapForm,
        corrections: Mapping[str, NpArray] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        super().__init__(graph, layers, seen, recipe, smooth, ranges, corrections)
        self._maps, self._form = maps, form
        self._inside |= maps.absorbed

    def _copy(self, node: NodeProto) -> NodeProto:
        made = super()._copy(node)
        for position, name in enumerate(made.input):
            if name in self._ranges and name not in self._divided:
                made.input[position] = self._encoded(name)
        for position, name in enumerate(made.output):
            made.output[position] = self._maps.renamed.get(name, name)
        return made

    def _convolution(self, layer: Layer) -> None:
        codes = self._in_fours(layer) if self._missing(layer) else self._encoded(layer.reads)
        settings = dict(settings_of(self._graph.nodes[layer.places[0]]))
        if layer.pad is not None:
            codes = self._padded(layer, codes, settings)
        weight, rounded = self._weight(layer)
        puts_out = self._maps.renamed.get(layer.puts_out, layer.puts_out)
        self._writer.node("Conv", [codes, weight, *self._bias(layer, rounded)], puts_out, **settings)

    def _missing(self, layer: Layer) -> int:
        """Channels that the layer lacks to read them in fours."""
        return missing_channels(self._graph, layer) if self._form.fours else 0

    def _in_fours(self, layer: Layer) -> str:
        """What the layer reads, with channels of zeros behind: of codes, which are the fewest bytes to copy."""
        name, zero = f"{layer.name}.fours", np.uint8(zero_code(self._ranges[layer.reads]))
        self._encoded(layer.reads)
        scale, point = self._step(layer.reads, zero)
        pads = self._writer.tensor(f"{name}.pads", np.array([0, 0, 0, 0, 0, self._missing(layer), 0, 0]))
        self._writer.node("Pad", [f"{layer.reads}.codes", pads, point], f"{name}.codes")
        return self._writer.node("DequantizeLinear", [f"{name}.codes", scale, point], f"{name}.int8")

    def _laid(self, layer: Layer, codes: NpArray) -> NpArray:
        more = self._missing(layer) if layer.kind == "conv" else 0
        return np.pad(codes, [(0, 0), (0, more), (0, 0), (0, 0)]) if more else super()._laid(layer, codes)

    def _padded(self, layer: Layer, codes: str, settings: dict[str, object]) -> str:
        """Let the convolution pad: into ``settings``, or as a node of its own what has no place there."""
        if pads_inside(self._graph, layer, settings):
            return codes
        pad = self._graph.nodes[layer.pad or 0]
        return self._writer.node("Pad", [codes, *pad.input[1:]], f"{layer.name}.padded")

    def _encoded(self, name: str) -> str:
        of = self._ranges[name]
        zero = zero_code(of)
        if zero and not self._form.zero_points:
            return super()._encoded(name)
        return self._rounded(name, name, np.uint8(zero))

    def _shift(self, layer: Layer) -> float:
        of = self._ranges[layer.reads]
        return of.shift if zero_code(of) and not self._form.zero_points else 0.0
