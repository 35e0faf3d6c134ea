"""Codes in every map of the backbone that tasks share: one set of numbers, whatever runtime they are for.

In a form of its own a task has unsigned codes with any zero point on ONNX Runtime, and none on OpenVINO. Here the graph
alone says what the codes of a map are, so that a zero point is a constant: nothing is below zero behind ReLU or a
sigmoid, and everything else goes both ways. OpenVINO has signed codes where ONNX Runtime has those moved by 128.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgepet.calibration.coded_maps import INTEGER, MAP_FORMS, MapForm, Maps, find_maps
from edgepet.calibration.layers import Graph, Layer
from edgepet.calibration.observe import Activations, Seen
from edgepet.calibration.ranges import Estimator, Histogram, threshold
from edgepet.deltas.codes import HIGH, LOW, Range
from edgepet.graphs.int8 import CodedMap, Codes
from edgepet.spec import NpArray

SHARED_FORMS: Mapping[str, MapForm] = {  # by runtime
    "onnxruntime": MAP_FORMS["onnx"],
    "openvino": MAP_FORMS["openvino"],
}
_NOT_BELOW = frozenset(("HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus"))
_OF_ALL = frozenset(("Add", "Concat", "Mul"))  # not below zero where nothing is that they read
_OF_FIRST = frozenset(
    (
        *("AveragePool", "Flatten", "GlobalAveragePool", "Identity", "MaxPool", "ReduceMean", "Reshape", "Squeeze"),
        *("Transpose", "Unsqueeze"),
    )
)


def coded_maps(graph: Graph, layers: Sequence[Layer]) -> tuple[CodedMap, ...]:
    """What has codes where ``layers`` compute in int8, and which, in the order in which the graph makes it."""
    maps = find_maps(graph, layers, outputs=True)
    above, by_layers = _Signs(graph, maps), _as_codes(graph, layers, maps)
    found = list[CodedMap]()
    for name in maps.axes:
        readers = [layer for layer in layers if layer.reads == name]
        alone = len(readers) == len(graph.readers.get(name, ())) and not any(r.padded or r.norm for r in readers)
        codes: Codes = "shifted" if alone and name not in by_layers else "signed"
        found.append(CodedMap(name=name, codes="unsigned" if above.never_below(name) else codes))
    return tuple(sorted(found, key=lambda each: graph.made_by.get(each.name, -1)))


def places_of(graph: Graph, coded: Sequence[CodedMap]) -> dict[str, int]:
    """The node that puts out each map, by name; what no node does has -1."""
    return {each.name: graph.made_by.get(each.name, -1) for each in coded}


def shared_ranges(
    maps: Maps, coded: Sequence[CodedMap], seen: Seen, estimator: Estimator, smooth: Mapping[str, NpArray]
) -> dict[str, Range]:  # fmt: skip
    """The range of every map, by its name, of codes as the graph says, once it is divided by ``smooth`` (in,)."""
    ranges = {}
    for each in (one for one in coded if one.name in seen):
        values = seen[each.name].divided(smooth[each.name]) if each.name in smooth else seen[each.name]
        ranges[each.name] = _range(values, estimator, each.codes, maps.bounds.get(each.name, float("inf")))
    return ranges


def _range(values: Activations, estimator: Estimator, codes: Codes, bound: float) -> Range:
    low, high = min(float(values.least.min()), 0.0), max(float(values.most.max()), 0.0)
    if codes == "signed":
        return Range(scale=threshold(Histogram.of(values.rows, max(-low, high)), estimator, HIGH) / HIGH)
    low = 0.0 if codes == "unsigned" else low
    reach = min(threshold(Histogram.of(values.rows - low, high - low), estimator, HIGH - LOW), bound)
    scale = reach / (HIGH - LOW)
    return Range(scale=scale, shift=scale * round(low / scale) - LOW * scale)


def _as_codes(graph: Graph, layers: Sequence[Layer], maps: Maps) -> frozenset[str]:
    """What a convolution puts out, or an operator on codes."""
    ends = {maps.renamed.get(layer.puts_out, layer.puts_out) for layer in layers if layer.kind == "conv"}
    return frozenset(ends | {name for name in maps.axes if graph.maker(name, *INTEGER) is not None} | {*maps.bounds})


class _Signs:
    """Which tensors of a graph are never below zero, whatever the images are."""

    def __init__(self, graph: Graph, maps: Maps) -> None:
        self._graph, self._known = graph, dict.fromkeys(maps.bounds, True)

    def never_below(self, name: str) -> bool:
        if name not in self._known:
            self._known[name] = self._look(name)
        return self._known[name]

    def _look(self, name: str) -> bool:
        place = self._graph.made_by.get(name)
        if place is None:
            return False
        node = self._graph.nodes[place]
        if node.op_type in _NOT_BELOW:
            return True
        if node.op_type == "Clip":
            low = node.input[1] if len(node.input) > 1 else ""
            return low in self._graph.initializers and float(self._graph.value(low).item()) >= 0
        if node.op_type in _OF_ALL:
            return all(map(self.never_below, node.input))
        return node.op_type in _OF_FIRST and self.never_below(node.input[0])
