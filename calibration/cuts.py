"""Places of a graph where one tensor alone carries everything: there a trunk that tasks share may end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from edgepet.calibration.layers import Graph, Layer
from edgepet.graphs.base import INPUT
from edgepet.graphs.int8 import Cut

LEAST = 0.1  # of what layers read lies before a cut: less is not worth that a task is bound to the backbone's ranges


def find_cuts(
    graph: Graph, layers: Sequence[Layer], tensors: Collection[str], coded: Mapping[str, int] | None = None,
    within: Collection[int] = (),
) -> tuple[Cut, ...]:  # fmt: skip
    """The cuts of ``graph``, in its order; of neighbours between which no tensor of the backbone is read, the last.

    A cut is never within a layer, nor between a layer norm and the linear layer whose range and codes it divides by.
    Sizes of images carry nothing: they are known behind a cut as before it.

    Args:
        layers: those with codes, as ``find_layers`` has them.
        tensors: names of the backbone's tensors.
        coded: the place where each range begins to hold, by the tensor that it is of; None where layers read them.
        within: places of further nodes that no graph with codes has a cut behind.
    """
    flow = _Flow(graph)
    inside = {place for layer in layers for place in (*layer.places[:-1], layer.pad)} | {*within}
    normed = {layer.reads for layer in layers if layer.norm is not None}
    alone = [(place, name) for place, name in flow.alone() if place not in inside and name not in normed]
    places = [place for place, _ in alone]

    def first(readers: dict[str, int]) -> list[list[str]]:
        """By the cut that they lie before: names, by the place of what reads them first."""
        found: list[list[str]] = [[] for _ in range(len(alone) + 1)]
        for name, place in readers.items():
            found[bisect_left(places, place)].append(name)
        return found

    ends = dict(coded or {})
    for layer in layers if coded is None else ():
        ends.setdefault(layer.reads, layer.places[-1])
    reads, changing = first(ends), first(flow.first_reads(tensors))
    cuts, count, since = list[Cut](), 0, list[str]()
    for index, (_, name) in enumerate(alone):
        count, since = count + len(reads[index]), since + changing[index]
        if not since and cuts:
            cuts[-1] = replace(cuts[-1], at=name, reads=count)
        elif count >= LEAST * len(ends):
            cuts.append(Cut(at=name, reads=count, tensors=tuple(sorted(since))))
            since = []
    return tuple(cuts)


class _Flow:
    """What of a graph depends on the images; everything else is the backbone's own, whatever place it has."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._depends = graph, {INPUT}
        for node in graph.nodes:
            if node.op_type not in ("Shape", "Size") and self._depends.intersection(node.input):
                self._depends.update(node.output)

    def alone(self) -> Iterator[tuple[int, str]]:
        """Each tensor that alone carries everything, and the place of the node that puts it out."""
        graph, outputs = self._graph, {value.name for value in self._graph.model.graph.output}
        last = {name: self._last(name, outputs) for name in self._depends}
        live = {INPUT}
        for place, node in enumerate(graph.nodes):
            made = self._depends.intersection(node.output)
            live = {name for name in live | made if last[name] > place}
            if len(live) == 1 and live <= made:
                yield place, next(iter(live))

    def _last(self, name: str, outputs: Collection[str]) -> int:
        nodes, readers = self._graph.nodes, self._graph.readers.get(name, [])
        if name in outputs:
            return len(nodes)
        return max((place for place in readers if self._depends.intersection(nodes[place].output)), default=-1)

    def first_reads(self, tensors: Collection[str]) -> dict[str, int]:
        """Of the ``tensors`` that are read, the first node that reads them, or what is made of them, for the images."""
        made_of = {name: {name} for name in self._graph.initializers if name in tensors}
        found = dict[str, int]()
        for place, node in enumerate(self._graph.nodes):
            read = {tensor for name in node.input for tensor in made_of.get(name, ())}
            if self._depends.intersection(node.output):
                for name in sorted(read - found.keys()):
                    found[name] = place
            elif read:
                made_of.update(dict.fromkeys(node.output, read))
        return found
