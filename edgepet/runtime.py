"""On the device: one backbone, many tasks. No torch, timm or ``onnx`` here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepet.branches import named_tensors
from edgepet.delta import Delta, Head
from edgepet.errors import InputError
from edgepet.graph import BaseGraph
from edgepet.imaging import load_input, normalize
from edgepet.merging import task_tensors
from edgepet.pack import Pack
from edgepet.runners.runner import Runner
from edgepet.spec import FilePath, NpArray
from edgepet.store import Store


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
        from edgepet.runners.onnxruntime import OnnxRuntime

        return OnnxRuntime.of_graph(graph, tensors, threads=threads)
    if runtime == "openvino":
        from edgepet.runners.openvino import OpenVino

        return OpenVino.of_graph(graph, tensors, threads=threads, executed="bf16" if bf16 else "f32")
    raise InputError(
        "--runtime", f"is one of {', '.join(SHARED_RUNTIMES)} for a pack on a shared backbone", got=repr(runtime)
    )


SHARED_RUNTIMES = ("onnxruntime", "openvino")  # these run every task from one folder with one backbone


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
        self, task: str, images: Iterable[FilePath], *, runtime: str = "onnxruntime", threads: int | None = None
    ) -> DeviceRun:
        """Classify image files, or folders of frames, with an installed task."""
        store = Store(Path(self.store))
        began = time.perf_counter()
        pack = store.pack(task)
        with open_task(store.graph_of(pack), pack.delta, runtime=runtime, threads=threads) as network:
            opened = time.perf_counter()
            answers = tuple(self._answer(Path(path), pack.delta, network) for path in images)
            spent = time.perf_counter() - opened
        return DeviceRun(answers, 1e3 * (opened - began), 1e3 * spent / max(1, len(answers)))

    @staticmethod
    def _answer(path: Path, delta: Delta, network: TaskNetwork) -> Answer:
        logits = network(normalize(load_input(path, delta.preprocess)[None], delta.preprocess))[0].astype(np.float64)
        scores = np.exp(logits - logits.max())
        best = int(logits.argmax())
        return Answer(path.name, delta.labels[best], float(scores[best] / scores.sum()))
