"""``device bench``: what tasks of a store cost on this machine: to open, to run, to change, and in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgepet.device.runtimes import DEFAULT
from edgepet.device.serving import Device
from edgepet.device.together import Shared
from edgepet.errors import InputError
from edgepet.measuring.latency import Candidate, LatencyRow, Network, measure, switching_ms
from edgepet.measuring.machine import Environment, environment, resident_bytes
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import format_bytes
from edgepet.spec import FilePath, NpArray
from edgepet.verbs.bench import latency_table
from edgepet.verbs.verb import MOST_THREADS, at_least_one

TOGETHER = "all together"  # a row's model: every task on one image


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBenchReport:
    """Latency rows of each task, and with several of all of them on one image, model ``TOGETHER``.

    ``switch_ms`` is what a call costs more where the call before was another task's, None with one task.
    ``together_over_sum`` is that row's median over the sum of the tasks' own. ``memory_bytes`` is what the process
    gained for the first task and ``further_bytes`` for each one more, None where the system does not say.
    """

    rows: tuple[LatencyRow, ...]
    switch_ms: float | None
    together_over_sum: float | None
    shared: tuple[Shared, ...]
    memory_bytes: int | None
    further_bytes: int | None
    environment: Environment


def bench(
    store: FilePath,
    tasks: Sequence[str] = (),
    *,
    runtime: str = DEFAULT,
    precision: str = "fp32",
    mode: str = "auto",
    threads: int | None = None,
    device: str | None = None,
    rounds: int = 100,
    tick: Callable[[int], None] | None = None,
) -> DeviceBenchReport:
    """Time tasks of a store, all if none is named, in turns on seeded noise, and count the memory that they take.

    Args:
        threads: None is all cores.
        tick: told the number of rounds that are done.

    Raises:
        InputError: no task, or tasks that look at images of several sizes; else as ``Device.open``.
    """
    at_least_one("rounds", rounds)
    at_least_one("threads", threads, MOST_THREADS)
    on = Device(store)
    names, count = tuple(tasks) or on.tasks(), threads or environment().cores
    if not names:
        raise InputError(str(store), "has no task to time", fix="edgepet device install")
    settings: dict[str, Any] = {
        "runtime": runtime,
        "precision": precision,
        "mode": mode,
        "threads": count,
        "device": device,
    }
    images, gained, switch_ms = _counted(store, names, settings, 4 * rounds)
    candidates = [_candidate(name, partial(on.open, name, **settings), settings) for name in names]
    shared = tuple[Shared, ...]()
    if len(names) > 1:
        with on.open_all(names, **settings) as together:
            shared = together.shared
        candidates.append(_candidate(TOGETHER, lambda: _All(on, names, settings), settings))
    report = measure(candidates, images, threads=count, rounds=rounds, tick=tick)
    alone = sum(row.p50_ms for row in report.rows if row.model != TOGETHER)
    return DeviceBenchReport(
        rows=report.rows,
        switch_ms=switch_ms,
        together_over_sum=report.rows[-1].p50_ms / alone if len(names) > 1 else None,
        shared=shared,
        memory_bytes=gained[0],
        further_bytes=gained[1],
        environment=report.environment,
    )


def _counted(
    store: FilePath, names: Sequence[str], settings: dict[str, Any], turns: int
) -> tuple[NpArray, tuple[int | None, int | None], float | None]:
    """One image of noise that all tasks take; bytes that the process gains for the first task and for each one more,
    None where the system does not say or there is none; and what a call costs more behind another task's.
    """
    with Device(store) as counted:
        before = resident_bytes()
        opened = [counted.open(names[0], **settings)]
        images = np.random.default_rng(0).standard_normal((1, *opened[0].preprocess.input_shape), dtype=np.float32)
        opened[0](images)
        first = resident_bytes()
        for name in names[1:]:
            opened.append(counted.open(name, **settings))
            if opened[-1].preprocess.input_shape != images.shape[1:]:
                raise InputError(f"task {name!r}", "looks at images of another size", fix="time it by itself")
            opened[-1](images)
        last, more = resident_bytes(), len(names) - 1
        gained = (
            None if before is None or first is None else first - before,
            None if first is None or last is None or not more else (last - first) // more,
        )
        return images, gained, switching_ms(opened, images, turns) if more else None


class _All:
    """Every task on one image, as a network: the logits one behind the other."""

    def __init__(self, device: Device, names: Sequence[str], settings: dict[str, Any]) -> None:
        self._opened = device.open_all(names, **settings)

    def __call__(self, images: NpArray) -> NpArray:
        return np.concatenate(list(self._opened.logits(images).values()), axis=1)

    def close(self) -> None:
        self._opened.close()


def _candidate(name: str, opener: Callable[[], Network], settings: dict[str, Any]) -> Candidate:
    return Candidate(
        model=name, runtime=settings["runtime"], precision=settings["precision"], mode=settings["mode"], open=opener,
        device=settings["device"] or "cpu",
    )  # fmt: skip


def screen(report: DeviceBenchReport) -> Screen:
    """A row for each task, and what they share and take."""
    first = report.rows[0]
    title = f"latency of an image, {first.threads} threads, {first.n} interleaved rounds"
    yield latency_table(title, "task", report.rows)
    over, switch = report.together_over_sum, report.switch_ms
    yield lines(
        None if over is None else f"  all tasks on one image take {over:.2f} of the sum of each by itself",
        *(f"  up to {each.after} computed once for {', '.join(each.tasks)}" for each in report.shared),
        None if switch is None else f"  from task to task: {switch:+.2f} ms",
        None if report.memory_bytes is None else f"  memory: {format_bytes(report.memory_bytes)} with the first task"
        + ("" if report.further_bytes is None else f", {format_bytes(max(0, report.further_bytes))} for each one more"),
    )  # fmt: skip
