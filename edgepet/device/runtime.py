"""On the device: one backbone, many tasks. No torch, timm or ``onnx`` here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepet.deltas.branches import named_tensors
from edgepet.deltas.delta import Delta, Head
from edgepet.deltas.merge import task_tensors
from edgepet.device.runner import Runner, SharedRunner
from edgepet.device.runtimes import DEFAULT, shared_runtime
from edgepet.device.store import Store
from edgepet.errors import CheckError, InputError, option
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph, require_codes
from edgepet.graphs.slots import task_slots
from edgepet.images.preprocess import load_input, normalize
from edgepet.packs.pack import Pack
from edgepet.spec import FilePath, NpArray, Precision, StoredPrecision


class TaskNetwork:
    """A base graph with one task folded in, and the task's head; a context manager.

    It takes images as ``Runner`` does, and puts out logits, float32 (n, C); an InputError where they are not finite.
    """

    def __init__(self, features: Runner, head: Head, *, alone_on: SharedRunner | None = None) -> None:
        # ``alone_on``: a backbone that no other task runs on is closed with the task.
        self._features, self._head, self._alone_on = features, head, alone_on
        self.runtime, self.executed = features.runtime, features.executed

    @property
    def evidence(self) -> Mapping[str, object]:
        """How the runtime knows in what it computes."""
        return self._features.evidence

    def __call__(self, images: NpArray) -> NpArray:
        logits = self._head(self._features(images))
        if not np.isfinite(logits).all():  # the first label would be said with a score of NaN
            raise InputError(f"{self.runtime}, {self.executed}", "must give finite answers", got="NaN or infinity")
        return logits

    def close(self) -> None:
        """Give the network back; one that tasks share stays open."""
        self._features.close()
        if self._alone_on is not None:
            self._alone_on.close()

    def __enter__(self) -> TaskNetwork:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_task(graph: BaseGraph, delta: Delta, *, runtime: str = DEFAULT, threads: int | None = None,
              precision: Precision = "fp32") -> TaskNetwork:  # fmt: skip
    """Fold ``delta`` into ``graph``'s tensors and open the result; tensors that did not change are read from its files.

    Neither ``graph`` nor its files are modified.

    Args:
        threads: None is all cores.
        precision: one that the runtime ``computes`` in.

    Raises:
        BackboneError: ``delta`` was trained on another backbone.
        InputError: no such runtime or precision, another image size or other branches, or an update that does not fit.
        MissingError: the runtime is not installed.
    """
    graph.require_fit(delta)
    tensors = task_tensors(graph.base, delta)
    changed = {name: tensors[name] for name in (*delta.targets, *named_tensors(delta.branches))}
    features = open_features(graph, changed, runtime=runtime, threads=threads, precision=precision)
    return TaskNetwork(features, delta.head.in_float32)


def open_features(graph: BaseGraph, tensors: Mapping[str, NpArray], *, runtime: str, threads: int | None = None,
                  precision: Precision = "fp32") -> Runner:  # fmt: skip
    """Open ``graph`` itself, with ``tensors`` in place of the backbone's: images to pooled features (n, d).

    Raises:
        InputError: no such runtime, one that does not compute in ``precision``, or that cannot open this graph.
        MissingError: the runtime is not installed.
    """
    row = shared_runtime(runtime, purpose="a pack on a shared backbone")
    if precision not in row.computes or row.open_graph is None:
        raise InputError(option("precision"), f"is one of {', '.join(row.computes)} on {runtime}", got=repr(precision))
    return row.open_graph(graph, tensors, threads, precision)


class SharedInt8:
    """The int8 backbone, opened once on one runtime; tasks are bound to it, each in its own slots.

    A task whose codes changed (LoRA and whatever else does not only scale and shift) gets a network of its own.
    """

    def __init__(self, graph: Int8Graph, *, runtime: str = DEFAULT, threads: int | None = None) -> None:
        """Hash the file of codes, and open the backbone; ``threads`` None is all cores.

        Raises:
            InputError: no such runtime, or codes that are not those that were made.
            MissingError: the runtime is not installed.
        """
        require_codes(graph)
        self._row = shared_runtime(runtime, purpose="an int8 backbone")
        self.graph, self._threads = graph, threads
        self._network = self._open({})

    def _open(self, codes: Mapping[str, NpArray]) -> SharedRunner:
        if self._row.open_int8 is None:
            raise InputError(option("runtime"), f"has no int8 backbone on {self._row.name}")
        return self._row.open_int8(self.graph, self._threads, codes)

    def bind(self, delta: Delta) -> TaskNetwork:
        """A task, ready to run; from one bound task to another there is nothing to switch.

        Raises:
            BackboneError, InputError: as ``task_slots``.
        """
        slots = task_slots(self.graph, delta)
        own = self._open(slots.codes) if slots.codes else None
        return TaskNetwork((own or self._network).bind(slots), delta.head.in_float32, alone_on=own)

    def close(self) -> None:
        """Give the backbone back, once no bound task runs any more."""
        self._network.close()


class Int8Tasks(Mapping[str, TaskNetwork]):
    """Tasks that are ready to run on one int8 backbone, images to logits, by their names. A context manager."""

    def __init__(self, networks: Mapping[str, TaskNetwork], shared: Sequence[SharedInt8]) -> None:
        self._networks, self._shared = dict(networks), tuple(shared)

    def __getitem__(self, task: str) -> TaskNetwork:
        return self._networks[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)

    def close(self) -> None:
        """Give every task back, and the backbone that they share: none of them can be called any more."""
        for network in self._networks.values():
            network.close()
        for shared in self._shared:
            shared.close()

    def __enter__(self) -> Int8Tasks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_installed(
    store: Store, pack: Pack, *, runtime: str, threads: int | None = None, precision: str = "fp32"
) -> TaskNetwork:
    """A pack on the backbone of ``store`` in "fp32" or "int8".

    Raises:
        InputError: another precision, or a backbone that is not in ``store``; else as ``open_task`` and ``SharedInt8``.
        MissingError: the runtime is not installed.
    """
    if precision == "int8":
        return SharedInt8(store.int8_of(pack), runtime=runtime, threads=threads).bind(pack.delta)
    if precision != "fp32":
        raise InputError(option("precision"), "is fp32 or int8 for a pack", got=repr(precision))
    return open_task(store.graph_of(pack), pack.delta, runtime=runtime, threads=threads)


def require_probe(network: TaskNetwork, delta: Delta, precision: StoredPrecision = "fp32") -> None:
    """Ask a task for the answers that its pack carries, on this machine; one that carries none is not asked.

    Raises:
        CheckError: an answer is further off than the pack allows, or not finite.
    """
    probe = delta.probes.get(precision)
    if probe is None:
        return
    apart = float(np.abs(network(probe.images(delta.preprocess)) - probe.logits).max())
    if not apart <= probe.tolerance:
        raise CheckError(
            f"task {delta.task!r} on {network.runtime}, {precision}",
            f"must answer its own probe within {probe.tolerance:.2g} on logits",
            got=f"{apart:.2g}",
            fix="do not serve it from here: the pack, the backbone or the runtime is not what it was made with",
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """One image's best label and its softmax score, 0..1; ``image`` is the name of its file, or a clip's folder."""

    image: str
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class DeviceRun:
    """Answers, with the milliseconds of opening the task, and of an image from file to answer, on the mean."""

    results: tuple[Answer, ...]
    open_ms: float
    latency_ms: float


@dataclass(frozen=True, slots=True)
class Device:
    """A store's folder and what runs from it."""

    store: FilePath

    def install(self, pack: FilePath | bytes, *, older: bool = False, runtime: str = DEFAULT) -> Pack:
        """Install a pack, a file or its bytes, and return it, once it has answered its own probe on ``runtime``.

        Where the int8 backbone is here and the pack has ranges for it, it is asked in int8 as well; where only that is
        here, in int8 alone. ``older`` and further errors as of ``Store.install``.

        Raises:
            CheckError: it answers otherwise than the pack says.
            MissingError: the runtime is not installed.
        """
        store = Store(Path(self.store))

        def ask(given: Pack) -> None:
            for precision in store.precisions(given):
                with open_installed(store, given, runtime=runtime, precision=precision) as network:
                    require_probe(network, given.delta, precision)

        return store.install(pack if isinstance(pack, bytes) else Path(pack), older=older, ask=ask)

    def tasks(self) -> tuple[str, ...]:
        """Names of the installed tasks, sorted."""
        return Store(Path(self.store)).tasks()

    def run(
        self, task: str, images: Iterable[FilePath], *, runtime: str = DEFAULT, threads: int | None = None,
        precision: str = "fp32",
    ) -> DeviceRun:  # fmt: skip
        """Classify image files, or folders of frames, with an installed task in "fp32" or "int8".

        Raises:
            PackError: the installed file is damaged.
            InputError: no such task, runtime or precision, no backbone for it, or an image that cannot be read.
            MissingError: the runtime is not installed.
        """
        store = Store(Path(self.store))
        began = time.perf_counter()
        pack = store.pack(task)
        with open_installed(store, pack, runtime=runtime, threads=threads, precision=precision) as network:
            opened = time.perf_counter()
            answers = tuple(self._answer(Path(path), pack.delta, network) for path in images)
            spent = time.perf_counter() - opened
        return DeviceRun(answers, 1e3 * (opened - began), 1e3 * spent / max(1, len(answers)))

    def open_int8(self, *, runtime: str = DEFAULT, threads: int | None = None) -> Int8Tasks:
        """All installed tasks that have ranges for it, on one int8 backbone; close them together.

        Raises:
            InputError: no installed task has ranges, they are for other codes, or the int8 backbone is not here.
            MissingError: the runtime is not installed.
        """
        store = Store(Path(self.store))
        packs = [pack for pack in map(store.pack, store.tasks()) if pack.delta.int8 is not None]
        if not packs:
            fix = "install packs that `edgepet calibrate TASK.pet --calib DIR -o OUT.pet` wrote"
            raise InputError(str(self.store), "has no task with ranges for the int8 backbone", fix=fix)
        opened: dict[tuple[Path, str], SharedInt8] = {}  # by backbone and image size
        networks = dict[str, TaskNetwork]()
        try:
            for pack in packs:
                graph = store.int8_of(pack)
                key = graph.folder, graph.stem
                if key not in opened:
                    opened[key] = SharedInt8(graph, runtime=runtime, threads=threads)
                networks[pack.delta.task] = opened[key].bind(pack.delta)
        except BaseException:
            Int8Tasks(networks, list(opened.values())).close()
            raise
        return Int8Tasks(networks, list(opened.values()))

    @staticmethod
    def _answer(path: Path, delta: Delta, network: TaskNetwork) -> Answer:
        logits = network(normalize(load_input(path, delta.preprocess)[None], delta.preprocess))[0].astype(np.float64)
        scores = np.exp(logits - logits.max())
        best = int(logits.argmax())
        return Answer(path.name, delta.labels[best], float(scores[best] / scores.sum()))
