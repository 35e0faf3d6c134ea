"""What a device does with its store: install packs that answer their own probe here, run them, and go back to the pack
before where one begins to fail. No torch, timm or ``onnx`` here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepet.device.checking import Problem, check
from edgepet.device.generations import TaskState
from edgepet.device.opened import OpenTask, OpenTasks
from edgepet.device.pool import Event, Pool
from edgepet.device.runtime import SharedInt8, TaskNetwork
from edgepet.device.runtimes import DEFAULT, SHARED_RUNTIMES, shared_runtime
from edgepet.device.served import AnyAnswer, Served, answering, open_pack, place_of, said
from edgepet.device.store import Store
from edgepet.device.together import Shared
from edgepet.errors import EdgepetError, InputError, MissingError
from edgepet.packs.pack import Pack
from edgepet.spec import FilePath, StoredPrecision


@dataclass(frozen=True, slots=True)
class DeviceRun:
    """Answers, with the milliseconds of opening everything, and of an image from file to all answers, on the mean.

    ``sequence`` is of the pack that answered, the last task's; ``fell_back`` says why it is not the one that was
    active, or is None. ``switch_ms`` is what making the tasks ready took, without finding out what they are.
    ``shared`` is what was computed once for several tasks, ``events`` what was merged and evicted.
    """

    results: tuple[AnyAnswer, ...]
    open_ms: float
    latency_ms: float
    sequence: int = 0
    fell_back: str | None = None
    switch_ms: float = 0.0
    shared: tuple[Shared, ...] = ()
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """A pack that was installed; ``refused`` is where it is not served, "openvino int8" say, and why."""

    task: str
    sequence: int
    bytes: int
    seconds: float
    sha256: str
    signed_by: str | None
    refused: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLine:
    """A task of a store. ``state`` is as of ``TaskState``, ``previous`` the sequence number of the pack before."""

    task: str
    sequence: int
    bytes: int
    state: str
    reason: str
    sha256: str
    signed_by: str | None
    previous: int | None
    refused: Mapping[str, str]


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


@dataclass(frozen=True, slots=True)
class Device:
    """A store's folder and what runs from it. A context manager: tasks that were opened are closed with it."""

    store: FilePath
    _pools: dict[object, Pool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def install(self, pack: FilePath | bytes, *, older: bool = False, runtime: str | None = None) -> Installation:
        """Install a pack, a file or its bytes, once it has answered its own probe on each runtime that will serve it.

        Where the int8 backbone is here and the pack has ranges for it, it is asked in int8 as well; where only that is
        here, in int8 alone. Where it answers otherwise than it says it is not served: there the pack before is, if
        there is one.

        Args:
            older: take a pack with a smaller sequence number than was ever installed, of the same signer.
            runtime: the one that will serve it; None is every one that is installed.

        Raises:
            CheckError: it answers otherwise than it says wherever it was asked; else as of ``Store.install``.
            MissingError: ``runtime`` is not installed.
            PackError, InputError: as of ``Store.install``.
        """
        store, began = Store(Path(self.store)), time.perf_counter()
        names = SHARED_RUNTIMES if runtime is None else (shared_runtime(runtime, purpose="a pack").name,)

        def ask(given: Pack, precisions: Sequence[StoredPrecision]) -> Mapping[str, str]:
            answers, errors = dict[str, str](), list[EdgepetError]()
            for name, precision in ((name, precision) for name in names for precision in precisions):
                try:
                    open_pack(store, given, runtime=name, precision=precision, asked=True).close()
                    answers[place_of(name, precision)] = ""
                except MissingError:
                    if runtime is not None:
                        raise
                except EdgepetError as error:
                    answers[place_of(name, precision)] = said(error)
                    errors.append(error)
            if errors and all(answers.values()):
                raise errors[0]
            return answers

        given, installed = store.install(pack if isinstance(pack, bytes) else Path(pack), older=older, ask=ask)
        return Installation(
            task=given.delta.task,
            sequence=installed.sequence,
            bytes=installed.size_bytes,
            seconds=time.perf_counter() - began,
            sha256=installed.sha256,
            signed_by=installed.signed_by,
            refused=installed.refused,
        )

    def tasks(self) -> tuple[str, ...]:
        """Names of the installed tasks, sorted."""
        return Store(Path(self.store)).tasks()

    def list(self) -> tuple[TaskLine, ...]:
        """Every installed task: its pack, whether it is served, and why not.

        Raises:
            InputError: the store cannot be read.
        """
        return tuple(_line(task, state) for task, state in sorted(Store(Path(self.store)).now().tasks.items()))

    def rollback(self, task: str) -> TaskLine:
        """Make the pack before ``task``'s active one again. Raises as ``Store.rollback`` does."""
        store = Store(Path(self.store))
        store.rollback(task)
        return _line(task, store.now().tasks[task])

    def remove(self, task: str) -> None:
        """Take a task out. Raises as ``Store.remove`` does."""
        Store(Path(self.store)).remove(task)

    def check(self) -> tuple[Problem, ...]:
        """Read everything, and say what is damaged and what would mend it."""
        return check(Store(Path(self.store)))

    def open(
        self, task: str, *, runtime: str = DEFAULT, threads: int | None = None, precision: str = "fp32",
        mode: str = "auto", memory_bytes: int | None = None, device: str | None = None,
    ) -> OpenTask:  # fmt: skip
        """Open an installed task in "fp32" or "int8", to be asked again and again; close it, or use ``with``.

        Where its pack cannot be opened, does not answer its own probe or gives an answer that is not finite, and the
        pack before it can, that one answers, and the store remembers it.

        Args:
            mode: "slots", its delta beside the backbone; "merged", folded into weights of its own; or "auto", as
                ``Pool`` decides.
            memory_bytes: for networks of merged tasks.
            device: "cpu", "gpu", "npu" or "cuda"; None is the runtime's usual one.

        Raises:
            CheckError: no pack of it is served on this runtime.
            InputError: no such task, runtime, precision, mode or device, no backbone for it, or a file that is damaged.
            MissingError: the runtime is not installed.
        """
        pool = self._pool(runtime, precision, mode, threads, memory_bytes, device)
        return OpenTask(Store(Path(self.store)), task, pool)

    def open_all(
        self, tasks: Sequence[str] = (), *, runtime: str = DEFAULT, threads: int | None = None,
        precision: str = "fp32", mode: str = "auto", memory_bytes: int | None = None, device: str | None = None,
    ) -> OpenTasks:  # fmt: skip
        """Open several tasks, or all, that look at the same pictures: what none of them changes is computed once.

        Else as ``open``.
        """
        store, pool = Store(Path(self.store)), self._pool(runtime, precision, mode, threads, memory_bytes, device)
        return OpenTasks(store, tuple(tasks) or store.tasks(), pool)

    def close(self) -> None:
        """Close every task that was opened here."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pool(
        self, runtime: str, precision: str, mode: str, threads: int | None, memory_bytes: int | None,
        device: str | None,
    ) -> Pool:  # fmt: skip
        """The networks that tasks opened with the same settings share."""
        key = runtime, precision, mode, threads, memory_bytes, device
        if key not in self._pools or not self._pools[key].holders:
            self._pools[key] = Pool(
                Store(Path(self.store)), runtime=runtime, precision=precision, mode=mode, threads=threads,
                memory_bytes=memory_bytes, device=device,
            )  # fmt: skip
        return self._pools[key]

    def run(
        self, task: str | Sequence[str], images: Iterable[FilePath], *, runtime: str = DEFAULT,
        threads: int | None = None, precision: str = "fp32", mode: str = "auto", memory_bytes: int | None = None,
        top: int = 1, device: str | None = None,
    ) -> DeviceRun:  # fmt: skip
        """Classify images, folders of them, or patterns, with an installed task, or with several of them at once.

        For clips they are folders of frames. Everything else as ``open`` and ``open_all``.

        Raises:
            InputError: an image cannot be read; else as ``open``.
            CheckError, MissingError: as ``open``.
        """
        began, given, shared = time.perf_counter(), list(images), tuple[Shared, ...]()
        settings: dict[str, Any] = {
            "runtime": runtime, "threads": threads, "precision": precision, "mode": mode, "memory_bytes": memory_bytes,
            "device": device,
        }  # fmt: skip
        if isinstance(task, str):
            with self.open(task, **settings) as alone:
                opened = time.perf_counter()
                answers, told = alone.predict(given, top=top), (alone.sequence, alone.fell_back)
                count, switch_ms, events = len(answers), alone.switch_ms, alone.events
        else:
            with self.open_all(task, **settings) as several:
                opened = time.perf_counter()
                every = several.predict(given, top=top)
                answers = tuple(answer for each in every for answer in each.values())
                told = several.sequence, next(iter(several.fell_back.values()), None)
                count, switch_ms, events = len(every), several.switch_ms, several.events
                shared = several.shared
        spent = time.perf_counter() - opened
        return DeviceRun(
            results=answers,
            open_ms=1e3 * (opened - began),
            latency_ms=1e3 * spent / max(1, count),
            sequence=told[0],
            fell_back=told[1],
            switch_ms=switch_ms,
            shared=shared,
            events=events,
        )

    def open_int8(self, *, runtime: str = DEFAULT, threads: int | None = None) -> Int8Tasks:
        """All installed tasks that have ranges for it, on one int8 backbone; close them together.

        Raises:
            InputError: no installed task has ranges, they are for other codes, or the int8 backbone is not here.
            CheckError: no pack of a task is served in int8 on this runtime.
            MissingError: the runtime is not installed.
        """
        store, opened = Store(Path(self.store)), dict[tuple[Path, str], SharedInt8]()  # by backbone and image size

        def opener(pack: Pack, asked: bool) -> TaskNetwork:
            graph = store.int8_of(pack)
            key = graph.folder, graph.stem
            if key not in opened:
                opened[key] = SharedInt8(
                    graph, runtime=runtime, threads=threads, store=store.deriving(graph.weights_bytes)
                )
            return answering(store, pack, opened[key].bind(pack.delta), runtime, "int8", asked=asked)

        networks = dict[str, TaskNetwork]()
        try:
            for task in store.tasks():
                if _may_have_ranges(store, task):
                    networks[task] = Served(store, task, runtime, "int8", opener).network
            if not networks:
                fix = "install packs that `edgepet calibrate TASK.pet --calib DIR -o OUT.pet` wrote"
                raise InputError(str(self.store), "has no task with ranges for the int8 backbone", fix=fix)
        except BaseException:
            Int8Tasks(networks, list(opened.values())).close()
            raise
        return Int8Tasks(networks, list(opened.values()))


def _may_have_ranges(store: Store, task: str) -> bool:
    """Whether the active pack of ``task`` has ranges; of one that is damaged ``Served`` finds out."""
    try:
        return store.pack(task).delta.int8 is not None
    except InputError:
        return True


def _line(task: str, state: TaskState) -> TaskLine:
    refused: dict[str, Any] = dict(state.active.refused)
    return TaskLine(
        task=task,
        sequence=state.active.sequence,
        bytes=state.active.size_bytes,
        state=state.state,
        reason=state.reason,
        sha256=state.active.sha256,
        signed_by=state.active.signed_by,
        previous=None if state.previous is None else state.previous.sequence,
        refused=refused,
    )
