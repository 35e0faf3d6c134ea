"""Latency by a clock that the candidates themselves move: every percentile and every turn is exact."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from edgepet.errors import InputError
from edgepet.measuring.latency import BenchReport, Candidate, LatencyRow, Ratio, measure, ratio, ratio_of_runs
from edgepet.measuring.machine import Environment
from edgepet.spec import NpArray

IMAGES = np.zeros((2, 3, 4, 4), np.float32)
HERE = Environment(
    machine="x86_64",
    cpu="a CPU",
    cores=2,
    cpu_features=(),
    system="Linux 6.1",
    python="3.11.7",
    versions={},
    load_1m=0.0,
    governor=None,
    date="2026-11-23",
)


class Clock:
    """Time that passes only where a test says so, and everything that was done in it."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.log: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)
        self.log.append("sleep")


class Fake:
    """A network of scripted milliseconds, the last one for ever."""

    def __init__(self, clock: Clock, name: str, times_ms: Iterator[float]) -> None:
        self._clock, self._name, self._times_ms = clock, name, times_ms

    def __call__(self, images: NpArray) -> NpArray:
        self._clock.log.append(self._name)
        self._clock.now_ns += round(next(self._times_ms) * 1e6)
        return images

    def close(self) -> None:
        self._clock.log.append(f"close {self._name}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, room = Clock(), sys.modules[measure.__module__]
    monkeypatch.setattr(room, "perf_counter_ns", lambda: clock.now_ns)
    monkeypatch.setattr(room, "sleep", clock.sleep)
    monkeypatch.setattr(room, "environment", lambda: HERE)
    return clock


def candidate(clock: Clock, name: str, *times_ms: float, open_ms: float = 0.0) -> Candidate:
    def script() -> Iterator[float]:
        yield from times_ms
        while True:
            yield times_ms[-1]

    def start() -> Fake:
        clock.log.append(f"open {name}")
        clock.now_ns += round(open_ms * 1e6)
        return Fake(clock, name, script())

    return Candidate(model=name, runtime="onnxruntime", precision="fp32", mode="merged", open=start)


def turns(clock: Clock) -> str:
    return " ".join(entry for entry in clock.log if entry != "sleep")


def test_a_row_holds_the_percentiles_of_its_rounds_and_not_what_came_before_them(clock: Clock) -> None:
    times_ms = [float(step) for step in range(1, 102)]  # percentile p of 1..101 is 1 + p
    tested = candidate(clock, "a", 900.0, 500.0, 500.0, *times_ms, open_ms=70.0)

    report = measure([tested], IMAGES, threads=4, rounds=101, warmup=2)

    row = LatencyRow(
        model="a",
        runtime="onnxruntime",
        precision="fp32",
        mode="merged",
        threads=4,
        batch=2,
        p50_ms=51.0,
        p90_ms=91.0,
        p99_ms=100.0,
        n=101,
        open_ms=70.0,
        first_ms=900.0,
        noisy=True,
        times_ms=tuple(times_ms),
    )
    assert report == BenchReport(rows=(row,), environment=HERE)


@pytest.mark.parametrize(("rounds", "p99_ms"), [(1, None), (99, None), (100, 3.0)])
def test_the_99th_percentile_needs_a_hundred_rounds(clock: Clock, rounds: int, p99_ms: float | None) -> None:
    (row,) = measure([candidate(clock, "a", 3.0)], IMAGES, threads=1, rounds=rounds).rows

    assert (row.n, row.p50_ms, row.p90_ms, row.p99_ms) == (rounds, 3.0, 3.0, p99_ms)


def test_the_order_is_rotated_by_one_each_round(clock: Clock) -> None:
    candidates = [candidate(clock, name, 1.0) for name in "abc"]

    measure(candidates, IMAGES, threads=1, rounds=4, warmup=2)

    opened = "open a a open b b open c c"
    warm, timed = "abc bca", "abc bca cab abc"
    closed = "close c close b close a"
    assert turns(clock) == " ".join([opened, *warm.replace(" ", ""), *timed.replace(" ", ""), closed])


def test_each_candidate_keeps_its_own_times_whatever_its_turn(clock: Clock) -> None:
    candidates = [candidate(clock, "a", 0.0, 1.0, 2.0, 3.0), candidate(clock, "b", 0.0, 10.0, 20.0, 30.0)]

    report = measure(candidates, IMAGES, threads=1, rounds=3, warmup=0)

    assert [row.times_ms for row in report.rows] == [(1.0, 2.0, 3.0), (10.0, 20.0, 30.0)]


def test_every_timed_call_follows_a_sleep_that_is_not_timed(clock: Clock) -> None:
    candidates = [candidate(clock, name, 1.0) for name in "ab"]

    report = measure(candidates, IMAGES, threads=1, rounds=2, warmup=0, settle_s=5.0)

    timed = [entry for entry in clock.log if not entry.startswith("close")]
    assert timed[::2] == ["sleep"] * 8
    assert timed[1::2] == ["open a", "a", "open b", "b", "a", "b", "b", "a"]
    assert [row.times_ms for row in report.rows] == [(1.0, 1.0)] * 2


def test_ticks_count_timed_rounds_and_are_not_timed(clock: Clock) -> None:
    ticks: list[int] = []

    def tick(done: int) -> None:
        ticks.append(done)
        clock.now_ns += 10**12

    report = measure([candidate(clock, "a", 1.0)], IMAGES, threads=1, rounds=3, warmup=5, tick=tick)

    assert (ticks, report.rows[0].times_ms) == ([1, 2, 3], (1.0, 1.0, 1.0))


def test_a_function_without_close_is_a_network_too(clock: Clock) -> None:
    plain = replace(candidate(clock, "a", 1.0), open=lambda: lambda images: images)

    assert measure([plain], IMAGES, threads=1, rounds=2).rows[0].times_ms == (0.0, 0.0)


class RefusalError(InputError):
    """What a candidate raises."""


def refuse(images: NpArray) -> NpArray:
    raise RefusalError("b", "takes other images")


def refuse_to_open() -> Callable[[NpArray], NpArray]:
    raise RefusalError("b", "cannot be opened")


def test_open_networks_are_closed_when_another_fails_to_open(clock: Clock) -> None:
    broken = replace(candidate(clock, "b", 1.0), open=refuse_to_open)

    with pytest.raises(RefusalError, match="b: cannot be opened"):
        measure([candidate(clock, "a", 1.0), broken], IMAGES, threads=1)

    assert turns(clock) == "open a a close a"


def test_a_network_that_fails_on_its_first_images_is_closed_with_the_others(clock: Clock) -> None:
    class Broken(Fake):
        def __call__(self, images: NpArray) -> NpArray:
            return refuse(images)

    broken = replace(candidate(clock, "b", 1.0), open=lambda: Broken(clock, "b", iter(())))

    with pytest.raises(RefusalError, match="b: takes other images"):
        measure([candidate(clock, "a", 1.0), broken, candidate(clock, "c", 1.0)], IMAGES, threads=1)

    assert turns(clock) == "open a a close b close a"


@pytest.mark.parametrize(
    ("times_ms", "noisy"),
    [
        ([10.0] * 100, False),
        ([10.0] * 90 + [50.0] * 10, False),  # a tail is p99's to tell
        ([10.0, 11.0] * 50, False),  # quartiles 10 and 11, median 10.5: 9.5 %
        ([10.0, 11.2] * 50, True),  # 11.3 %
        ([10.0, 20.0] * 50, True),
    ],
    ids=["steady", "tail", "close modes", "modes", "far modes"],
)
def test_a_row_whose_quartiles_are_a_tenth_of_the_median_apart_is_noisy(
    clock: Clock, times_ms: list[float], noisy: bool
) -> None:
    (row,) = measure([candidate(clock, "a", 1.0, *times_ms)], IMAGES, threads=1, rounds=100, warmup=0).rows

    assert (row.times_ms, row.noisy) == (tuple(times_ms), noisy)


@pytest.mark.parametrize(
    ("names", "rounds", "message"),
    [("", 10, "bench: needs one model at least, got 0"), ("a", 0, "bench: needs one round at least, got 0")],
)
def test_nothing_to_time_is_refused_before_anything_is_opened(
    clock: Clock, names: str, rounds: int, message: str
) -> None:
    with pytest.raises(InputError) as refused:
        measure([candidate(clock, name, 1.0) for name in names], IMAGES, threads=1, rounds=rounds)

    assert (str(refused.value), clock.log) == (message, [])


def test_a_ratio_is_taken_within_rounds_so_that_a_slow_machine_cancels_out(clock: Clock) -> None:
    weather = np.random.default_rng(5).uniform(1.0, 9.0, 60).round(3).tolist()
    fast, slow = [candidate(clock, name, 1.0, *(scale * ms for ms in weather)) for name, scale in (("a", 1), ("b", 2))]

    report = measure([fast, slow], IMAGES, threads=1, rounds=60, warmup=0)

    assert all(row.noisy for row in report.rows)
    assert ratio(report, report.rows[0], report.rows[1]) == Ratio(median=0.5, low=0.5, high=0.5)


def test_an_interval_covers_the_spread_of_the_median_and_is_the_same_again(clock: Clock) -> None:
    times_ms = np.random.default_rng(6).normal(20.0, 1.0, 200).tolist()
    report = measure(
        [candidate(clock, "a", 1.0, *times_ms), candidate(clock, "b", 10.0)], IMAGES, threads=1, rounds=200, warmup=0
    )

    found = ratio(report, *report.rows)

    assert found == ratio(report, *report.rows)
    assert found.low < found.median < found.high
    # A normal median's standard error is 1.2533 * 0.1 / sqrt(200): 0.0089; the interval is about 4 of them.
    assert 0.02 < found.high - found.low < 0.06
    assert found.median == np.median(np.array(report.rows[0].times_ms) / 10.0)


def test_rows_of_two_reports_have_no_ratio(clock: Clock) -> None:
    report, other = (measure([candidate(clock, name, 1.0)], IMAGES, threads=1, rounds=2) for name in "ab")

    with pytest.raises(InputError, match=r"^ratio: compares two rows of one report, got b \(merged\)$"):
        ratio(report, report.rows[0], other.rows[0])


def test_runs_are_resampled_as_wholes() -> None:
    assert ratio_of_runs([0.5, 0.5, 0.5]) == Ratio(median=0.5, low=0.5, high=0.5)
    assert ratio_of_runs([0.9, 1.0, 1.1]) == Ratio(median=1.0, low=0.9, high=1.1)


def test_one_run_has_no_interval() -> None:
    with pytest.raises(InputError, match=r"^ratio of runs: needs two runs at least, got 1$"):
        ratio_of_runs([0.9])
