"""Open any pack or exported model: its network on a runtime, and what of it can be timed. Torch only when asked for."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import Answer, Meaning
from edgepet.device.answers import meanings_of
from edgepet.device.artifact import MANIFEST, Artifact, open_artifact, read_artifact
from edgepet.device.fitting import fit_lightly, own_slots
from edgepet.device.runner import ModelRunner, Runner
from edgepet.device.runtime import SharedInt8, TaskNetwork, open_task
from edgepet.device.runtimes import DEFAULT, FORMATS, RUNTIMES, SHARED_RUNTIMES, Runtime, shared_runtime
from edgepet.device.together import Together
from edgepet.errors import InputError, option, require
from edgepet.graphs.base import BaseGraph, open_graph
from edgepet.graphs.int8 import Int8Graph, open_int8
from edgepet.graphs.parts import part_of
from edgepet.measuring.latency import Candidate, Network
from edgepet.measuring.machine import TORCH
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.pack import EVERY, Pack, read_pack
from edgepet.proving.in_torch import TorchNetwork
from edgepet.proving.subject import Subject, one_head
from edgepet.spec import FilePath, NpArray, Precision, Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A network, images to logits (n, C), the runtime that it runs on and the precision that it computes in."""

    network: TaskNetwork | TorchNetwork | ModelRunner
    runtime: str
    precision: Precision
    places: tuple[int, ...] = ()  # of an exported model with several heads, where each one's answer is

    def each(self, images: NpArray) -> tuple[NpArray, ...]:
        """What each head gives, in their order."""
        if isinstance(self.network, TaskNetwork | TorchNetwork):
            return self.network.each(images)
        given = self.network.outputs(images)
        return tuple(given[place] for place in self.places) if self.places else (given[0],)


class Meant:
    """What answers, by the first of its heads."""

    meanings: tuple[Meaning, ...]

    @property
    def meaning(self) -> Meaning:
        """What its first head answers."""
        return self.meanings[0]

    @property
    def answer(self) -> Literal["class"] | Answer:
        """What kind of answer that is."""
        return self.meaning.answer

    @property
    def labels(self) -> tuple[str, ...]:
        """That head's labels."""
        return self.meaning.labels


class PackSource(Meant):
    """A pack, on the graph that the cache holds for it, or on the network in torch.

    Raises:
        PackError, InputError: as ``read_pack``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pack: Pack = read_pack(path, answers=EVERY)
        self.preprocess = self.pack.delta.preprocess
        self._place: int | None = None
        self.meanings = meanings_of(self.pack.delta)

    def of_head(self, place: int) -> PackSource:
        """The same with one of its heads alone."""
        made = copy.copy(self)
        made._place, made.pack = place, replace(self.pack, delta=one_head(self.pack.delta, place))
        made.meanings = (self.meanings[place],)
        return made

    def open(
        self, runtime: str | None, precision: str, backbone: AnyBackbone, threads: int | None,
        device: str | None = None,
    ) -> Opened:  # fmt: skip
        """Open it on a runtime, by default ONNX Runtime, in "fp32", or "int8": on the int8 backbone.

        Args:
            backbone: what the graph is made of where none is there, or torch runs; None is the pack's own.
            threads: None is all cores.
            device: one of ``DEVICES``; None is the runtime's usual one.

        Raises:
            BackboneError: ``backbone`` is not the pack's.
            InputError: no such runtime, precision or device, or the pack has no graph here.
            MissingError: the runtime is not installed.
        """
        name, delta = runtime or DEFAULT, self.pack.delta
        if precision not in ("fp32", "int8"):
            raise InputError(option("precision"), "is fp32 or int8 for a pack", got=repr(precision))
        if name == TORCH.name and precision == "fp32":
            require_cpu(device)
            return Opened(network=self._torch(backbone, self._mode, threads)(), runtime=name, precision="fp32")
        row = shared_runtime(name, purpose="a pack on a shared backbone", device=device)
        if precision == "int8":
            shared = SharedInt8(int8_graph_of(self.path, delta, backbone), runtime=row, threads=threads)
            network = shared.bind(delta)
        else:
            network = open_task(graph_of(self.path, delta, backbone), delta, runtime=row, threads=threads)
        return Opened(network=network, runtime=name, precision=network.executed)

    def candidates(
        self, runtimes: Sequence[str], threads: int, plain: bool, backbone: AnyBackbone, device: str | None = None
    ) -> list[Candidate]:
        """What of it can be timed on each runtime, in each precision; ``plain`` adds the backbone itself.

        Raises:
            BackboneError, InputError: as ``graph_of`` and ``Runtime.on``.
            MissingError: torch is asked for and not installed.
        """
        found = []
        for name in runtimes:
            row = RUNTIMES.get(name)
            if name == TORCH.name:
                require_cpu(device)
                found += self._in_torch(threads, plain, backbone)
            elif row is not None and row.shares_backbone:
                found += self._on(row.on(device), threads, plain, backbone)
        return found

    @property
    def _mode(self) -> str:
        return "branches" if self.pack.delta.branches else "merged"

    def _on(self, row: Runtime, threads: int, plain: bool, backbone: AnyBackbone) -> list[Candidate]:
        def opener(delta: Delta, precision: Precision) -> Callable[[], Network]:
            graph = graph_of(self.path, delta, backbone)
            return lambda: open_task(graph, delta, runtime=row, threads=threads, precision=precision)

        modes = {self._mode: self.pack.delta}
        if plain:  # the backbone with the task's head and nothing else of it: the head is no cost of a method
            modes["plain"] = replace(self.pack.delta, updates=(), branches=())
        found = []
        for precision in row.computes if self.answer == "class" else row.computes[:1]:  # heads are computed in fp32
            found += [self._candidate(row, precision, m, opener(d, precision)) for m, d in modes.items()]
            if precision == row.computes[0] and self.pack.delta.int8 is not None:
                found.append(self._candidate(row, "int8", "shared", self._on_codes(row, threads, backbone)))
        return found

    def _on_codes(self, row: Runtime, threads: int, backbone: AnyBackbone) -> Callable[[], Network]:
        """The task on the int8 backbone that other tasks may share."""

        def opener() -> Network:
            graph = int8_graph_of(self.path, self.pack.delta, backbone)
            return SharedInt8(graph, runtime=row, threads=threads).bind(self.pack.delta)

        return opener

    def _in_torch(self, threads: int, plain: bool, backbone: AnyBackbone) -> list[Candidate]:
        tuned = self.answer == "class" and subject_in_torch(self.path, backbone).work is not None
        modes = [*(["tuned"] if tuned else []), self._mode, *(["plain"] if plain else [])]
        return [self._candidate(None, "fp32", mode, self._torch(backbone, mode, threads)) for mode in modes]

    def _torch(self, backbone: AnyBackbone, mode: str, threads: int | None) -> Callable[[], TorchNetwork]:
        def opener() -> TorchNetwork:
            subject = subject_in_torch(self.path, backbone)
            subject = subject if self._place is None else subject.of_head(self._place)
            return TorchNetwork(subject, mode, threads=threads)

        return opener

    def _candidate(
        self, row: Runtime | None, precision: Precision, mode: str, opener: Callable[[], Network]
    ) -> Candidate:
        """On a runtime, or None for torch."""
        name, device = (TORCH.name, "cpu") if row is None else (row.name, row.device)
        return Candidate(model=self.path.name, runtime=name, precision=precision, mode=mode, open=opener, device=device)


class ArtifactSource(Meant):
    """An exported model's folder, on the runtime of its format.

    Raises:
        InputError: as ``read_artifact``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.artifact: Artifact = read_artifact(path)
        self._place: int | None = None
        self.meanings = tuple(each.meaning for each in self.artifact.heads)
        self.preprocess: Preprocess = self.artifact.preprocess
        self._row = FORMATS[self.artifact.format]

    def of_head(self, place: int) -> ArtifactSource:
        """The same with one of its heads alone."""
        made = copy.copy(self)
        made._place, made.meanings = place, (self.meanings[place],)
        return made

    def open(
        self, runtime: str | None, precision: str, backbone: AnyBackbone, threads: int | None,
        device: str | None = None,
    ) -> Opened:  # fmt: skip
        """Open it; ``runtime`` may only be its own, precision and backbone are in it.

        Raises:
            InputError: another runtime, one without such a device, or one that cannot read it.
            MissingError: the runtime, or a GPU, is not here.
        """
        del precision, backbone
        if runtime not in (None, self._row.name):
            what = f"is a {self.artifact.format} artefact and runs on {self._row.name}"
            raise InputError(str(self.path), what, got=option("runtime", runtime))
        runner = open_artifact(self.path, self.artifact, threads=threads, device=device)
        if self._place is not None:
            runner = self.artifact.of_head_run(runner, self._place)
        return Opened(network=runner, runtime=self._row.name, precision=_computed(self.artifact, runner),
                      places=() if self._place is not None else self.artifact.answer_places)  # fmt: skip

    def candidates(
        self, runtimes: Sequence[str], threads: int, plain: bool, backbone: AnyBackbone, device: str | None = None
    ) -> list[Candidate]:
        """The model in each precision that its runtime computes it in, where the runtime is asked for."""
        del plain, backbone
        if self._row.name not in runtimes:
            return []
        row = self._row.on(device)
        int8 = self.artifact.precision == "int8"

        def opener(precision: Precision) -> Callable[[], Runner]:
            return lambda: open_artifact(self.path, self.artifact, threads=threads, precision=precision, device=device)

        return [
            Candidate(
                model=self.path.name,
                runtime=row.name,
                precision="int8" if int8 else precision,
                mode="branches" if self.artifact.branches else "merged",
                open=opener(precision),
                device=row.device,
            )
            for precision in (row.computes[:1] if int8 else row.computes)
        ]


def require_cpu(device: str | None) -> None:
    """Refuse another device for torch, which compares here and nothing else.

    Raises:
        InputError: it is not the CPU.
    """
    if device not in (None, "cpu"):
        what = f"is none that {option('runtime', TORCH.name)} runs on here"
        raise InputError(option("device"), what, got=repr(device), fix="use one of: cpu")


def open_source(path: FilePath) -> PackSource | ArtifactSource:
    """A pack, or an exported model's folder.

    Raises:
        PackError, InputError: it is neither, or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        return PackSource(path)
    if not (path / MANIFEST).is_file():
        fix = f"name a .pet file or a folder with {MANIFEST}"
        raise InputError(str(path), "is neither a pack nor an exported model", fix=fix)
    return ArtifactSource(path)


def open_together(
    sources: Mapping[str, PackSource | ArtifactSource], runtime: str | None, precision: str, backbone: AnyBackbone,
    threads: int | None, device: str | None = None,
) -> list[Together]:  # fmt: skip
    """Packs of one backbone and image size, two or more, opened so that what none of them changes is computed once.

    They are in slots where these can hold them. Others, and what torch runs, are to be opened one by one. Raises as
    ``PackSource.open``.
    """
    name = runtime or DEFAULT
    if name not in SHARED_RUNTIMES or precision not in ("fp32", "int8"):
        return []
    row = RUNTIMES[name].on(device)
    groups = dict[object, tuple[BaseGraph | Int8Graph, dict[str, PackSource]]]()
    for task, source in sources.items():
        if isinstance(source, PackSource) and source.answer == "class":  # what puts out maps is no trunk of features
            of = int8_graph_of if precision == "int8" else graph_of
            graph = of(source.path, source.pack.delta, backbone)
            groups.setdefault((graph.folder, graph.stem, source.preprocess), (graph, {}))[1][task] = source
    made = list[Together]()
    for graph, members in groups.values():
        if len(members) > 1:
            fitted = {task: fit_lightly(graph, source.pack.delta, name) for task, source in members.items()}
            own = own_slots(graph, name) if isinstance(graph, Int8Graph) else {}
            made.append(Together(part_of(graph, name), own, fitted, runtime=row, threads=threads))
    return made


def graph_of(path: Path, delta: Delta, backbone: AnyBackbone = None) -> BaseGraph:
    """The graph that ``delta`` runs on, from the cache; where torch and the backbone are here it is made now.

    Args:
        path: of the pack that the delta, or what it was made of, comes from.

    Raises:
        BackboneError: ``backbone`` is not the pack's.
        InputError: it is not in the cache, and there is no torch or no such backbone to make it of.
        CheckError: ONNX Runtime answers otherwise than torch.
    """
    if importlib.util.find_spec(TORCH.module) is None:
        return open_graph(delta.fingerprint, delta.preprocess, delta.structure)
    return Subject(path, backbone, None, answers=EVERY).graph_of(delta)


def int8_graph_of(path: Path, delta: Delta, backbone: AnyBackbone = None) -> Int8Graph:
    """The int8 backbone that ``delta`` runs on, from the cache; where torch and the backbone are here it is made.

    Raises:
        BackboneError, InputError, CheckError: as ``graph_of`` and ``int8_graph``.
    """
    try:
        return open_int8(delta.fingerprint, delta.preprocess, delta.structure)
    except InputError:
        if importlib.util.find_spec(TORCH.module) is None:
            raise
    from edgepet.proving.precision import int8_of

    return int8_of(Subject(path, backbone, None, answers=EVERY), delta)


def subject_in_torch(path: Path, backbone: AnyBackbone) -> Subject:
    """A pack that torch is going to run.

    Raises:
        PackError, InputError: as ``read_pack``.
        MissingError: torch is not installed.
    """
    require(TORCH.module, extra=str(TORCH.extra), purpose=option("runtime", TORCH.name))
    return Subject(path, backbone, None, answers=EVERY)


def _computed(artifact: Artifact, runner: Runner) -> Precision:
    """What ran: an int8 model is int8 only where the runtime has multiplied codes."""
    if artifact.precision != "int8":
        return runner.executed
    layers = runner.evidence.get("layers", {})
    return "int8" if isinstance(layers, dict) and layers.get("int8") else "fp32"
