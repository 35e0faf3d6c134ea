"""Latency as a protocol: every candidate takes its turn in every round, on one machine, with one batch.

One inference after another, each started when the last has answered, is MLPerf Inference's single-stream scenario
(Reddi et al. 2020, arXiv:1911.02549). Rounds are interleaved, so that what slows the machine slows every candidate,
and a ratio of two candidates is taken round by round. What differs from process to process (memory layout, clock) is
not seen in one run: repeat the run and give ``ratio_of_runs`` its ratios (Kalibera & Jones 2013, "Rigorous
Benchmarking in Reasonable Time", ISMM, doi:10.1145/2464157.2464160).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns, sleep
from typing import TypeAlias, TypeVar

import numpy as np

from edgepet.errors import InputError
from edgepet.measuring.machine import Environment, environment
from edgepet.spec import NpArray

Network: TypeAlias = Callable[[NpArray], NpArray]
Result = TypeVar("Result")

NOISY = 0.10  # interquartile range over median: rows that far from steady hide what merging or int8 usually gain
LEAST_FOR_P99 = 100  # below, the 99th percentile is the maximum
RESAMPLES = 2000
WARMUP = 20
SETTLE_S = 0.002  # for the threads of the call before to fall asleep; a core that slept for longer wakes late


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something to time. ``open`` makes it ready, with the threads that the report will state.

    ``mode`` says how the network was made: "merged", "tuned", "plain". A network with ``close`` is closed at the end.
    """

    model: str
    runtime: str
    precision: str
    mode: str
    open: Callable[[], Network]
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """One candidate's latency per batch, in milliseconds.

    ``open_ms`` is its opening, ``first_ms`` the first inference, neither is in the percentiles. Percentiles are
    interpolated between observations; ``p99_ms`` is None below 100 rounds. ``n`` counts rounds, and ``times_ms`` holds
    them in order. ``noisy``: the interquartile range is over a tenth of the median.
    """

    model: str
    runtime: str
    precision: str
    mode: str
    threads: int
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float | None
    n: int
    open_ms: float
    first_ms: float
    noisy: bool
    times_ms: tuple[float, ...]
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """A row for each candidate, in their order, and the machine as it was before the first of them was opened."""

    rows: tuple[LatencyRow, ...]
    environment: Environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A median ratio and its 95 % bootstrap interval; no unit."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    network: Network
    open_ns: int
    first_ns: int


def measure(
    candidates: Sequence[Candidate],
    images: NpArray,
    *,
    threads: int,
    rounds: int = 200,
    warmup: int | None = None,
    settle_s: float = SETTLE_S,
    tick: Callable[[int], None] | None = None,
) -> BenchReport:
    """Time ``rounds`` rounds in which every candidate runs once, in an order rotated by one each round.

    Args:
        candidates: all are open at the same time, and all are closed when this returns or fails.
        images: one batch (n, 3, H, W) that every candidate takes.
        threads: written to the rows; a candidate's ``open`` is what sets them.
        rounds: timed rounds; below 100 the rows leave out p99.
        warmup: untimed rounds before the first timed one; None is ``WARMUP``, but no more than timed ones.
        settle_s: seconds of sleep before each timed call, for the worker threads of the one before to stop.
        tick: called after each timed round with the number done, outside of what is timed.

    Raises:
        InputError: no candidate or no round, or what a candidate raises about the images.

    Source: MLPerf Inference, single-stream scenario (Reddi et al. 2020, arXiv:1911.02549).
    """
    if not candidates:
        raise InputError("bench", "needs one model at least", got=0)
    if rounds < 1:
        raise InputError("bench", "needs one round at least", got=rounds)
    here = environment()
    times_ns = np.empty((rounds, len(candidates)), np.int64)
    with ExitStack() as closing:
        ready = [_open(candidate, images, settle_s, closing) for candidate in candidates]
        for index in range(min(WARMUP, rounds) if warmup is None else warmup):
            _round(ready, images, index, settle_s)
        for index in range(rounds):
            times_ns[index] = _round(ready, images, index, settle_s)
            if tick is not None:
                tick(index + 1)
    rows = (
        _row(candidate, opened, times / 1e6, threads=threads, batch=len(images))
        for candidate, opened, times in zip(candidates, ready, times_ns.T, strict=True)
    )
    return BenchReport(rows=tuple(rows), environment=here)


def ratio(report: BenchReport, of: LatencyRow, to: LatencyRow) -> Ratio:
    """How many times as long ``of`` takes as ``to``: the median over rounds of the ratio within a round.

    The interval is a percentile bootstrap over rounds and holds for this run of this process; see ``ratio_of_runs``.

    Raises:
        InputError: a row is of another report; only rows of one report share their rounds.
    """
    if of not in report.rows or to not in report.rows:
        strangers = [f"{row.model} ({row.mode})" for row in (of, to) if row not in report.rows]
        raise InputError("ratio", "compares two rows of one report", got=", ".join(strangers))
    return _bootstrap(np.array(of.times_ms) / np.array(to.times_ms))


def ratio_of_runs(runs: Sequence[float]) -> Ratio:
    """The median of several runs' ratios, each of a process of its own, with an interval over runs.

    Raises:
        InputError: fewer than two runs; one says nothing about the next.

    Source: repetition at the level that varies (Kalibera & Jones 2013, doi:10.1145/2464157.2464160).
    """
    if len(runs) < 2:
        raise InputError("ratio of runs", "needs two runs at least", got=len(runs))
    return _bootstrap(np.array(runs, np.float64))


def switching_ms(networks: Sequence[Network], images: NpArray, turns: int) -> float:
    """Milliseconds that a call costs more behind another network's call than behind its own: medians of ``turns``."""
    for network in networks:
        network(images)
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(turns):
        network = networks[turn // 2 % len(networks)]  # each twice: the first call of a pair has changed it
        began = perf_counter_ns()
        network(images)
        times[turn % 2 == 0].append((perf_counter_ns() - began) / 1e6)
    return float(np.median(times[True]) - np.median(times[False]))


def _open(candidate: Candidate, images: NpArray, settle_s: float, closing: ExitStack) -> _Ready:
    network, open_ns = _timed(candidate.open, settle_s)
    close = getattr(network, "close", None)
    if close is not None:
        closing.callback(close)
    _, first_ns = _timed(partial(network, images), settle_s)
    return _Ready(network=network, open_ns=open_ns, first_ns=first_ns)


def _round(ready: Sequence[_Ready], images: NpArray, index: int, settle_s: float) -> list[int]:
    """Nanoseconds of each candidate, in their own order, not in that of the calls."""
    times_ns = [0] * len(ready)
    for turn in range(len(ready)):
        place = (index + turn) % len(ready)
        _, times_ns[place] = _timed(partial(ready[place].network, images), settle_s)
    return times_ns


def _timed(call: Callable[[], Result], settle_s: float) -> tuple[Result, int]:
    sleep(settle_s)
    started = perf_counter_ns()
    result = call()
    return result, perf_counter_ns() - started


def _row(candidate: Candidate, ready: _Ready, times_ms: NpArray, *, threads: int, batch: int) -> LatencyRow:
    p25, p50, p75, p90, p99 = (float(value) for value in np.percentile(times_ms, (25, 50, 75, 90, 99)))
    return LatencyRow(
        model=candidate.model,
        runtime=candidate.runtime,
        precision=candidate.precision,
        mode=candidate.mode,
        threads=threads,
        batch=batch,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99 if len(times_ms) >= LEAST_FOR_P99 else None,
        n=len(times_ms),
        open_ms=ready.open_ns / 1e6,
        first_ms=ready.first_ns / 1e6,
        noisy=p75 - p25 > NOISY * p50,
        times_ms=tuple(times_ms.tolist()),
        device=candidate.device,
    )


def _bootstrap(values: NpArray) -> Ratio:
    """Efron & Tibshirani's percentile interval of the median; the seed makes a report repeatable."""
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(values, len(values))) for _ in range(RESAMPLES)]
    low, high = np.percentile(medians, (2.5, 97.5))
    return Ratio(median=float(np.median(values)), low=float(low), high=float(high))
