"""On the device: one backbone, many tasks. No torch, timm or ``onnx`` here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.deltas.branches import named_tensors
from edgepet.deltas.delta import Delta, Head
from edgepet.deltas.merge import task_tensors
from edgepet.device.runner import Runner
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph, require_codes, task_slots
from edgepet.images.preprocess import load_input, normalize
from edgepet.packs.pack import Pack
from edgepet.spec import FilePath, NpArray

if TYPE_CHECKING:
    from edgepet.device.onnxruntime import SharedOnnxRuntime
    from edgepet.device.openvino import SharedOpenVino


class TaskNetwork:
    """A base graph with one task folded in, and the task's head: images to logits. A context manager."""

    def __init__(self, features: Runner, head: Head) -> None:
        self._features, self._head = features, head
        self.runtime, self.executed = features.runtime, features.executed

    @property
    def evidence(self) -> Mapping[str, object]:
        return self._features.evidence

    def __call__(self, images: NpArray) -> NpArray:
        return self._head(self._features(images))

    def close(self) -> None:
        self._features.close()

    def __enter__(self) -> TaskNetwork:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_task(graph: BaseGraph, delta: Delta, *, runtime: str = "onnxruntime", threads: int | None = None,
              bf16: bool = False) -> TaskNetwork:  # fmt: skip
    """Fold ``delta`` into ``graph``'s tensors and open the result; tensors that did not change are read from its files.

    Raises:
        InputError: no such runtime, another backbone or image size, or an update that does not fit.
        MissingError: the runtime is not installed.
    """
    graph.require_fit(delta)
    tensors = task_tensors(graph.base, delta)
    changed = {name: tensors[name] for name in (*delta.targets, *named_tensors(delta.branches))}
    head = Head(weight=delta.head.weight.astype(np.float32), bias=delta.head.bias.astype(np.float32))
    return TaskNetwork(open_features(graph, changed, runtime=runtime, threads=threads, bf16=bf16), head)


def open_features(graph: BaseGraph, tensors: Mapping[str, NpArray], *, runtime: str, threads: int | None = None,
                  bf16: bool = False) -> Runner:  # fmt: skip
    """Open ``graph`` itself, with ``tensors`` in place of the backbone's: images to pooled features."""
    if runtime == "onnxruntime":
        from edgepet.device.onnxruntime import OnnxRuntime

        return OnnxRuntime.of_graph(graph, tensors, threads=threads)
    if runtime == "openvino":
        from edgepet.device.openvino import OpenVino

        return OpenVino.of_graph(graph, tensors, threads=threads, executed="bf16" if bf16 else "f32")
    raise InputError(
        "--runtime", f"is one of {', '.join(SHARED_RUNTIMES)} for a pack on a shared backbone", got=repr(runtime)
    )


class SharedInt8:
    """The int8 backbone, opened once on one runtime; tasks are bound to it, each in its own slots.

    A task whose codes changed (LoRA and whatever else does not only scale and shift) gets a network of its own.
    """

    def __init__(self, graph: Int8Graph, *, runtime: str = "onnxruntime", threads: int | None = None) -> None:
        """
        Raises:
            InputError: no such runtime, or codes that are not those that were made.
            MissingError: the runtime is not installed.
        """
        require_codes(graph)
        self.graph, self._runtime, self._threads = graph, runtime, threads
        self._network = self._open()

    def _open(self, codes: Mapping[str, NpArray] | None = None) -> SharedOnnxRuntime | SharedOpenVino:
        if self._runtime == "onnxruntime":
            from edgepet.device.onnxruntime import SharedOnnxRuntime

            return SharedOnnxRuntime(self.graph, threads=self._threads, codes=codes)
        if self._runtime == "openvino":
            from edgepet.device.openvino import SharedOpenVino

            return SharedOpenVino(self.graph, threads=self._threads, codes=codes)
        names = ", ".join(SHARED_RUNTIMES)
        raise InputError("--runtime", f"is one of {names} for an int8 backbone", got=repr(self._runtime))

    def bind(self, delta: Delta) -> TaskNetwork:
        """A task, ready to run; from one bound task to another there is nothing to switch.

        Raises:
            BackboneError, InputError: as ``task_slots``.
        """
        slots = task_slots(self.graph, delta)
        network = self._open(slots.codes) if slots.codes else self._network
        head = Head(weight=delta.head.weight.astype(np.float32), bias=delta.head.bias.astype(np.float32))
        return TaskNetwork(network.bind(slots), head)

    def close(self) -> None:
        self._network.close()


SHARED_RUNTIMES = ("onnxruntime", "openvino")  # these run every task from one folder with one backbone


def open_installed(
    store: Store, pack: Pack, *, runtime: str, threads: int | None = None, precision: str = "fp32"
) -> TaskNetwork:
    """A pack on the backbone of ``store`` in "fp32" or "int8".

    Raises:
        InputError: another precision, or as ``open_task`` and ``SharedInt8``.
    """
    if precision == "int8":
        return SharedInt8(store.int8_of(pack), runtime=runtime, threads=threads).bind(pack.delta)
    if precision != "fp32":
        raise InputError("--precision", "is fp32 or int8 for a pack", got=repr(precision))
    return open_task(store.graph_of(pack), pack.delta, runtime=runtime, threads=threads)


@dataclass(frozen=True, slots=True)
class Answer:
    """One image's best label and its softmax score, 0..1."""

    image: str
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class DeviceRun:
    """Answers, with the milliseconds of opening the task, and of one image from file to answer."""

    results: tuple[Answer, ...]
    open_ms: float
    latency_ms: float


@dataclass(frozen=True, slots=True)
class Device:
    """A store's folder and what runs from it."""

    store: FilePath

    def install(self, pack: FilePath | bytes) -> Pack:
        """Install a pack; see ``Store.install``."""
        return Store(Path(self.store)).install(pack if isinstance(pack, bytes) else Path(pack))

    def tasks(self) -> tuple[str, ...]:
        """Names of the installed tasks."""
        return Store(Path(self.store)).tasks()

    def run(
        self, task: str, images: Iterable[FilePath], *, runtime: str = "onnxruntime", threads: int | None = None,
        precision: str = "fp32",
    ) -> DeviceRun:  # fmt: skip
        """Classify image files, or folders of frames, with an installed task in "fp32" or "int8"."""
        store = Store(Path(self.store))
        began = time.perf_counter()
        pack = store.pack(task)
        with open_installed(store, pack, runtime=runtime, threads=threads, precision=precision) as network:
            opened = time.perf_counter()
            answers = tuple(self._answer(Path(path), pack.delta, network) for path in images)
            spent = time.perf_counter() - opened
        return DeviceRun(answers, 1e3 * (opened - began), 1e3 * spent / max(1, len(answers)))

    def open_int8(self, *, runtime: str = "onnxruntime", threads: int | None = None) -> dict[str, TaskNetwork]:
        """All installed tasks that have ranges for it, on one int8 backbone: images to logits, by the task's name.

        Raises:
            InputError: no installed task has ranges, or the int8 backbone is not here.
        """
        store = Store(Path(self.store))
        packs = [pack for pack in map(store.pack, store.tasks()) if pack.delta.int8 is not None]
        if not packs:
            fix = "install packs that `edgepet calibrate TASK.pet --calib DIR -o OUT.pet` wrote"
            raise InputError(str(self.store), "has no task with ranges for the int8 backbone", fix=fix)
        opened: dict[Path, SharedInt8] = {}
        networks = {}
        for pack in packs:
            graph = store.int8_of(pack)
            key = graph.model_path(runtime)
            if key not in opened:
                opened[key] = SharedInt8(graph, runtime=runtime, threads=threads)
            networks[pack.delta.task] = opened[key].bind(pack.delta)
        return networks

    @staticmethod
    def _answer(path: Path, delta: Delta, network: TaskNetwork) -> Answer:
        logits = network(normalize(load_input(path, delta.preprocess)[None], delta.preprocess))[0].astype(np.float64)
        scores = np.exp(logits - logits.max())
        best = int(logits.argmax())
        return Answer(path.name, delta.labels[best], float(scores[best] / scores.sum()))
