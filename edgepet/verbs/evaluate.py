"""The verbs that run where torch does not: ``eval``, ``bench``, ``storage``, ``inspect``, of packs and artefacts."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.deltas.delta import Delta
from edgepet.deltas.updates import factors
from edgepet.device.artifact import MANIFEST, RUNNERS, Artifact, open_artifact, read_artifact
from edgepet.device.runner import Runner
from edgepet.device.runtime import SHARED_RUNTIMES, SharedInt8, open_task
from edgepet.device.store import Store
from edgepet.errors import InputError, require
from edgepet.graphs.base import BaseGraph, open_graph
from edgepet.graphs.int8 import Int8Graph, open_int8
from edgepet.images.sets import batches, load_set, open_split
from edgepet.measuring.latency import SETTLE_S, BenchReport, Candidate, measure
from edgepet.measuring.machine import environment
from edgepet.measuring.parity import accuracy
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.pack import Pack, read_pack
from edgepet.spec import FilePath, Preprocess
from edgepet.verbs import storage as account

EVAL_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Top-1 as a fraction of 1 on ``n`` images, its 95 % interval and the mean over classes: ``parity.Accuracy``."""

    top1: float
    n: int
    low: float
    high: float
    balanced_accuracy: float
    runtime: str
    precision: str
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCount:
    """Updates of one kind, and the tensors that they change."""

    kind: str
    count: int
    values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneName:
    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """A pack or an artefact, read without its backbone; what an artefact does not keep is empty.

    ``int8_codes`` is the sha256 of the int8 backbone's codes that a pack has ranges for.
    """

    kind: str
    task: str
    method: str
    settings: dict[str, object]
    backbone: BackboneName
    updates: tuple[UpdateCount, ...]
    branches: tuple[UpdateCount, ...]
    classes: tuple[str, ...]
    preprocess: dict[str, object]
    bytes_by_kind: dict[str, int]
    val_top1: float | None
    training: dict[str, object]
    licences: tuple[str, ...]
    signed_by: str | None
    verified: bool | None
    int8_codes: str | None = None


def evaluate(
    model: FilePath,
    data: FilePath,
    *,
    split: str = "test",
    runtime: str | None = None,
    precision: str = "fp32",
    backbone: AnyBackbone = None,
    threads: int | None = None,
) -> EvalReport:
    """Top-1 of a pack or an artefact on a split of ``data``.

    Args:
        runtime: None is the artefact's own, or ONNX Runtime for a pack; "torch" needs the ``train`` extra.
        precision: of a pack, "fp32" or "int8": on the int8 backbone; an artefact has its own.

    Raises:
        InputError: other classes than the model's, or a runtime that cannot run it.
    """
    if split not in ("train", "val", "test"):
        raise InputError("--split", "is train, val or test", got=repr(split))
    _at_least_one("--threads", threads)
    source = _open(model)
    images = open_split(Path(data), split, clips=source.preprocess.frames > 1)  # type: ignore[arg-type]
    if images.classes != tuple(sorted(source.labels)):
        missing = sorted(set(source.labels) ^ set(images.classes))
        raise InputError(
            str(data),
            f"needs the {len(source.labels)} classes of {Path(model).name}",
            got=f"a difference in {', '.join(missing[:5])}",
        )
    network, name, executed = source.network(runtime, precision, backbone, threads)
    pixels, truth = load_set(images, source.preprocess)
    order = np.array([source.labels.index(name) for name in images.classes])
    answers = []
    try:
        for batch in batches(pixels, source.preprocess, EVAL_BATCH):
            answers.append(network(batch).argmax(1))
    finally:
        network.close()
    judged = accuracy(np.concatenate(answers), order[truth], len(source.labels))
    return EvalReport(
        top1=judged.top1,
        n=judged.n,
        low=judged.low,
        high=judged.high,
        balanced_accuracy=judged.balanced,
        runtime=name,
        precision=executed,
        classes=source.labels,
    )


def bench(
    models: Sequence[FilePath],
    *,
    runtimes: Sequence[str] | None = None,
    threads: int | None = None,
    batch: int = 1,
    rounds: int = 200,
    warmup: int = 20,
    settle_s: float = SETTLE_S,
    plain: bool = False,
    backbone: AnyBackbone = None,
    tick: Callable[[int], None] | None = None,
) -> BenchReport:
    """Latency of packs and artefacts, all candidates in turn in every round.

    A pack runs on each of ``runtimes`` that is installed: OpenVINO in f32 and bf16, torch tuned and merged. ``plain``
    adds the backbone's own weights under the task's head: what a merged task is to be compared with.
    """
    _at_least_one("--threads", threads)
    _at_least_one("--batch", batch)
    threads = threads or environment().cores
    candidates: list[Candidate] = []
    sizes = set[tuple[int, ...]]()
    for path in models:
        source = _open(path)
        sizes.add(source.preprocess.input_shape)
        candidates += source.candidates(_chosen(runtimes), threads, plain, backbone)
    if len(sizes) > 1:
        raise InputError(
            "bench", "needs models of one image size", got=", ".join("x".join(map(str, size)) for size in sorted(sizes))
        )
    if not candidates:
        raise InputError(
            "bench", "found nothing to run", fix="name a pack or an artefact, and a runtime that is installed"
        )
    images = np.random.default_rng(0).standard_normal((batch, *sizes.pop()), dtype=np.float32)
    return measure(candidates, images, threads=threads, rounds=rounds, warmup=warmup, settle_s=settle_s, tick=tick)


def storage(
    packs: Sequence[FilePath] = (), *, store: FilePath | None = None, devices: int = 1, precision: str = "fp32"
) -> account.StorageReport:
    """Bytes of a device's folder from which every task was run: ``store``, or a temporary one made for ``packs``.

    Raises:
        InputError: neither or both, one task twice, or a pack whose graph was never made.
    """
    if devices < 1:
        raise InputError("--devices", "must be at least 1", got=devices)
    if (store is None) == (not packs):
        raise InputError("storage", "needs packs, or --store with a device's folder")
    if store is not None:
        return account.storage(Store(Path(store)), devices=devices, precision=precision)
    with tempfile.TemporaryDirectory(prefix="edgepet-") as folder:
        scratch = Store(Path(folder))
        for path in packs:
            delta = read_pack(path).delta
            if delta.task in scratch.tasks():
                raise InputError("storage", "needs packs of different tasks", got=f"{delta.task!r} twice")
            if precision == "int8":
                scratch.add_int8(_int8_graph(Path(path), delta))
            else:
                scratch.add_graph(_graph(Path(path), delta))
            scratch.install(Path(path))
        return account.storage(scratch, devices=devices, precision=precision)


def inspect(path: FilePath) -> InspectReport:
    """What a pack or an artefact says of itself."""
    source = _open(path)
    return source.describe()


class _PackSource:
    """A pack, on the graph that the cache holds for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.pack: Pack = read_pack(path)
        self.labels, self.preprocess = self.pack.delta.labels, self.pack.delta.preprocess

    def network(
        self, runtime: str | None, precision: str, backbone: AnyBackbone, threads: int | None
    ) -> tuple[Any, str, str]:
        name, delta = runtime or "onnxruntime", self.pack.delta
        if precision not in ("fp32", "int8"):
            raise InputError("--precision", "is fp32 or int8 for a pack", got=repr(precision))
        if precision == "int8":
            shared = SharedInt8(_int8_graph(self._path, delta, backbone), runtime=name, threads=threads)
            bound = shared.bind(delta)
            return bound, name, bound.executed
        if name == "torch":
            from edgepet.proving.subject import TorchNetwork

            return TorchNetwork(_subject(self._path, backbone), self._mode, threads=threads), "torch", "fp32"
        graph = _graph(self._path, self.pack.delta, backbone)
        network = open_task(graph, self.pack.delta, runtime=name, threads=threads)
        return network, name, _precision(network.executed)

    def candidates(self, runtimes: Sequence[str], threads: int, plain: bool, backbone: AnyBackbone) -> list[Candidate]:
        found = []
        for name in runtimes:
            if name == "torch":
                found += self._torch(threads, plain, backbone)
            elif name in SHARED_RUNTIMES:
                for bf16 in (False, True) if name == "openvino" else (False,):
                    found += self._shared(name, threads, plain, bf16, backbone)
        return found

    @property
    def _mode(self) -> str:
        return "branches" if self.pack.delta.branches else "merged"

    def _shared(self, name: str, threads: int, plain: bool, bf16: bool, backbone: AnyBackbone) -> list[Candidate]:
        def opener(delta: Delta) -> Callable[[], Any]:
            graph = _graph(self._path, delta, backbone)
            return lambda: open_task(graph, delta, runtime=name, threads=threads, bf16=bf16)

        precision = "bf16" if bf16 else "fp32"
        modes = {self._mode: self.pack.delta}
        if plain:  # the backbone with the task's head and nothing else of it: the head is no cost of a method
            modes["plain"] = replace(self.pack.delta, updates=(), branches=())
        found = [
            Candidate(model=self._path.name, runtime=name, precision=precision, mode=mode, open=opener(delta))
            for mode, delta in modes.items()
        ]
        return found if bf16 or self.pack.delta.int8 is None else [*found, self._on_codes(name, threads, backbone)]

    def _on_codes(self, name: str, threads: int, backbone: AnyBackbone) -> Candidate:
        """The task on the int8 backbone that other tasks may share."""

        def opener() -> Any:
            delta = self.pack.delta
            graph = _int8_graph(self._path, delta, backbone)
            return SharedInt8(graph, runtime=name, threads=threads).bind(delta)

        return Candidate(model=self._path.name, runtime=name, precision="int8", mode="shared", open=opener)

    def _torch(self, threads: int, plain: bool, backbone: AnyBackbone) -> list[Candidate]:
        from edgepet.proving.subject import TorchNetwork

        subject = _subject(self._path, backbone)
        modes = (["tuned"] if subject.work is not None else []) + [self._mode] + (["plain"] if plain else [])

        def opener(mode: str) -> Callable[[], Any]:
            return lambda: TorchNetwork(_subject(self._path, backbone), mode, threads=threads)

        return [
            Candidate(model=self._path.name, runtime="torch", precision="fp32", mode=m, open=opener(m)) for m in modes
        ]

    def describe(self) -> InspectReport:
        delta = self.pack.delta
        seen: set[int] = set()
        values: Counter[str] = Counter()
        for targeted in delta.updates:
            for array in factors(targeted.update).values():
                if id(array) not in seen:
                    seen.add(id(array))
                    values[targeted.update.kind] += int(array.size)
        counts = Counter(targeted.update.kind for targeted in delta.updates)
        return InspectReport(
            kind="pack",
            task=delta.task,
            method=delta.method,
            settings=dict(delta.settings),
            backbone=BackboneName(name=delta.backbone, fingerprint=delta.fingerprint),
            updates=tuple(UpdateCount(kind=k, count=n, values=values[k]) for k, n in sorted(counts.items())),
            branches=_counts(delta.branches),
            classes=delta.labels,
            preprocess=delta.preprocess.as_json(),
            bytes_by_kind={
                **self.pack.bytes_by_kind,
                "header": self.pack.size_bytes - sum(self.pack.bytes_by_kind.values()),
            },
            val_top1=delta.val.top1 if delta.val.n else None,
            training=dict(delta.training),
            licences=delta.licences,
            signed_by=None,
            verified=None,
            int8_codes=delta.int8.codes if delta.int8 else None,
        )


class _ArtifactSource:
    """An exported model folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.artifact: Artifact = read_artifact(path)
        self.labels: tuple[str, ...] = self.artifact.labels
        self.preprocess: Preprocess = self.artifact.preprocess

    def network(
        self, runtime: str | None, precision: str, backbone: AnyBackbone, threads: int | None
    ) -> tuple[Any, str, str]:
        del precision, backbone
        own = RUNNERS[self.artifact.format].runtime
        if runtime not in (None, own):
            raise InputError(
                str(self._path), f"is a {self.artifact.format} artefact and runs on {own}", got=f"--runtime {runtime}"
            )
        runner = open_artifact(self._path, self.artifact, threads=threads)
        return runner, own, executed_precision(self.artifact, runner)

    def candidates(self, runtimes: Sequence[str], threads: int, plain: bool, backbone: AnyBackbone) -> list[Candidate]:
        del plain, backbone
        own = RUNNERS[self.artifact.format].runtime

        int8 = self.artifact.precision == "int8"

        def opener(bf16: bool) -> Callable[[], Runner]:
            return lambda: open_artifact(self._path, self.artifact, threads=threads, bf16=bf16)

        return [
            Candidate(
                model=self._path.name,
                runtime=own,
                precision="bf16" if bf16 else "int8" if int8 else "fp32",
                mode="branches" if self.artifact.branches else "merged",
                open=opener(bf16),
            )
            for bf16 in ((False, True) if own == "openvino" and not int8 else (False,))
            if own in runtimes
        ]

    def describe(self) -> InspectReport:
        artifact = self.artifact
        return InspectReport(
            kind="artifact",
            task=artifact.task,
            method=artifact.method,
            settings={},
            backbone=BackboneName(name=artifact.backbone, fingerprint=artifact.fingerprint),
            updates=(),
            branches=(),
            classes=artifact.labels,
            preprocess=artifact.preprocess.as_json(),
            bytes_by_kind={name: size for name, (_, size) in artifact.files.items()},
            val_top1=None,
            training={},
            licences=(),
            signed_by=None,
            verified=artifact.verified,
        )


def _open(path: FilePath) -> _PackSource | _ArtifactSource:
    path = Path(path)
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise InputError(
                str(path),
                "is neither a pack nor an exported model",
                fix=f"name a .pet file or a folder with {MANIFEST}",
            )
        return _ArtifactSource(path)
    return _PackSource(path)


def _graph(path: Path, delta: Delta, backbone: AnyBackbone = None) -> BaseGraph:
    """The graph that ``delta`` runs on, from the cache; where torch and the backbone are here it is made now."""
    if importlib.util.find_spec("torch") is None:
        return open_graph(delta.fingerprint, delta.preprocess, delta.structure)
    from edgepet.proving.subject import Subject

    return Subject(path, backbone, None).graph_of(delta)


def _int8_graph(path: Path, delta: Delta, backbone: AnyBackbone = None) -> Int8Graph:
    """The int8 backbone that ``delta`` runs on, from the cache; where torch and the backbone are here it is made."""
    try:
        return open_int8(delta.fingerprint, delta.preprocess)
    except InputError:
        if importlib.util.find_spec("torch") is None:
            raise
    from edgepet.calibration.slot_graphs import int8_graph

    return int8_graph(_graph(path, delta, backbone))


def _counts(branches: Sequence[Branch]) -> tuple[UpdateCount, ...]:
    counts, values = Counter(branch.kind for branch in branches), Counter[str]()
    for branch in branches:
        values[branch.kind] += sum(int(array.size) for array in branch.tensors.values())
    return tuple(UpdateCount(kind=kind, count=n, values=values[kind]) for kind, n in sorted(counts.items()))


def _subject(path: Path, backbone: AnyBackbone) -> Any:
    from edgepet.proving.subject import Subject

    require("torch", extra="train", purpose="--runtime torch")
    return Subject(path, backbone, None)


def _chosen(runtimes: Sequence[str] | None) -> tuple[str, ...]:
    """The runtimes asked for, else those that are installed."""
    known = (*SHARED_RUNTIMES, "torch", "tensorrt")
    if runtimes is not None:
        for name in runtimes:
            if name not in known:
                raise InputError("--runtime", f"is one of {', '.join(known)}", got=repr(name))
        return tuple(runtimes)
    return tuple(name for name in known if name == "tensorrt" or _installed(name))


def _at_least_one(option: str, count: int | None) -> None:
    if count is not None and count < 1:
        raise InputError(option, "must be at least 1", got=count)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a blocked module leaves None where its spec should be
        return False


def executed_precision(artifact: Artifact, runner: Runner) -> str:
    """What ran: an int8 model is int8 only where the runtime has multiplied codes."""
    if artifact.precision != "int8":
        return _precision(runner.executed)
    layers = runner.evidence.get("layers", {})
    return "int8" if isinstance(layers, dict) and layers.get("int8") else "fp32"


def _precision(executed: str) -> str:
    return {"f32": "fp32"}.get(executed, executed)
