"""A stretch of a graph that a runtime opens by itself: from the images or a cut, to a cut or the features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepet.graphs.base import FEATURES, INPUT, BaseGraph
from edgepet.graphs.cuts import Cut, cuts
from edgepet.graphs.dense_slots import with_slots
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.maps import GraphMap, putting_out
from edgepet.graphs.onnx_file import Node, OnnxFile, port, read_onnx
from edgepet.spec import NpArray, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """What goes through a cut, as running what lies before it shows: (n, *shape) for n images.

    ``sizes`` are integers beside it that are n, by name with their shapes, () or (1,). It is codes where ``dtype`` is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sizes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """A graph, or a stretch of one: it reads ``reads``, (n, *shape) of ``dtype``, besides its slots, and puts out
    ``puts_out``.

    Tensors that lie outside of ``file`` are in files of ``folder``; ``tensors`` has them by name, as read-only views.
    """

    file: OnnxFile
    folder: Path
    tensors: Mapping[str, NpArray]
    reads: str
    shape: tuple[int, ...]
    puts_out: str
    precision: Precision
    dtype: str = "float32"

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of its inputs beside what it reads."""
        return tuple(name for name in self.file.inputs if name != self.reads)

    @property
    def outside(self) -> tuple[str, ...]:
        """Names of its tensors that lie outside of the file."""
        return tuple(name for name in self.file.tensors if name in self.tensors)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Where it can be cut behind a layer: what comes before the first weight is not worth a stretch."""
        weights = frozenset(self.outside)
        return tuple(cut for cut in cuts(self.file, self.reads) if not cut.before.isdisjoint(weights))

    @property
    def pruned(self) -> Part:
        """The same without nodes that nothing reads: maps that heads might."""
        begins = {self.reads: self.file.inputs[self.reads]}
        return replace(self, file=self.file.between(begins, self.file.outputs))

    def with_slots(self, shapes: Mapping[str, tuple[int, ...]]) -> Part:
        """The same with a task's slots of these shapes, see ``dense_slots``."""
        return replace(self, file=with_slots(self.file, shapes)) if shapes else self

    def putting_out(self, maps: Iterable[GraphMap], wanted: Sequence[str]) -> Part:
        """What computes these maps of it, and FEATURES where they are among them, and puts them out in this order.

        Raises:
            InputError: as ``maps.putting_out``.
        """
        return replace(self, file=putting_out(self.file, maps, wanted), puts_out=wanted[0])

    def until(self, cut: Cut) -> Part:
        """What lies before ``cut``; it puts out the sizes that go through it as well."""
        ends = {cut.name: port(cut.name, None, cut.dtype), **{name: port(name, None, "int64") for name in cut.sizes}}
        return replace(
            self, file=self.file.between({self.reads: self.file.inputs[self.reads]}, ends), puts_out=cut.name
        )

    def behind(self, boundary: Boundary) -> Part:
        """What lies behind a cut. It counts the images where its own beginning has them, not in the whole graph's."""
        name, counts = f"{boundary.name}.images", list[Node]()
        if boundary.sizes:
            counts.append(Node("Shape", (boundary.name,), (name,)).with_attributes(start=0, end=1))
        for size, shape in boundary.sizes.items():
            counts.append(Node("Identity" if shape else "Squeeze", (name,), (size,)))
        begin = port(boundary.name, ("batch", *boundary.shape), boundary.dtype)
        stops = {boundary.name: begin, **dict.fromkeys(boundary.sizes, b"")}
        file = self.file.between(stops, self.file.outputs)
        inputs = {name: data for name, data in file.inputs.items() if name not in boundary.sizes}
        return replace(
            self,
            file=replace(file, nodes=(*counts, *file.nodes), inputs=inputs),
            reads=boundary.name,
            shape=boundary.shape,
            dtype=boundary.dtype,
        )


def part_of(graph: BaseGraph | Int8Graph, runtime: str = "onnxruntime") -> Part:
    """All of a graph, an int8 one in the form for ``runtime``.

    Raises:
        InputError: its file cannot be told apart.
    """
    int8 = isinstance(graph, Int8Graph)
    return Part(
        file=read_onnx(graph.model_path(runtime) if isinstance(graph, Int8Graph) else graph.model_path),
        folder=graph.folder,
        tensors=graph.tensors if isinstance(graph, Int8Graph) else graph.base.tensors,
        reads=INPUT,
        shape=graph.preprocess.input_shape,
        puts_out=FEATURES,
        precision="int8" if int8 else "fp32",
    )
