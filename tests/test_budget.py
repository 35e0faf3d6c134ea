"""What int8 costs, counted by hand, and the fewest layers that have to return to float for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from edgepet.calibration.budget import Drop, LayerDrop, divergence, drop_between, require_resolution, within_budget
from edgepet.errors import CheckError, InputError
from edgepet.spec import NpArray


def logits_for(answers: Sequence[int], classes: int = 3) -> NpArray:
    """Logits whose largest is at ``answers``."""
    return np.eye(classes, dtype=np.float32)[list(answers)]


# ------------------------------------------------------------------------------------------------------ what is lost


def test_points_are_images_lost_less_images_won() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    before = logits_for([0, 1, 2, 0, 1, 2, 0, 0, 0, 1])  # the first seven are right
    after = logits_for([1, 2, 0, 0, 1, 2, 0, 1, 0, 2])  # three of them are lost, one is won, one errs otherwise

    drop = drop_between(before, after, labels)

    assert (drop.points, drop.n) == (20.0, 10)
    assert drop.low < 20 < drop.high
    gain = drop_between(after, before, labels)
    assert (gain.points, gain.low, gain.high) == (-20.0, -drop.high, -drop.low)


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 0, 40), (3, 1, 10), (1, 5, 100), (400, 380, 10_000)])
def test_the_interval_is_walds_with_half_an_image_more_in_each_cell(lost: int, won: int, n: int) -> None:
    labels = np.zeros(n, int)
    before, after = np.zeros(n, int), np.zeros(n, int)
    after[:lost] = 1
    before[lost : lost + won] = 1

    drop = drop_between(logits_for(before), logits_for(after), labels)

    # The slow way: the variance of differences (-1, 0 or 1) over all images and two more, of which each way has half.
    values = [1.0] * lost + [-1.0] * won + [0.0] * (n - lost - won) + [0.0]
    halves = [1.0, -1.0]
    total = n + 2
    mean = (sum(values) + 0.5 * sum(halves)) / total
    spread = (sum((v - mean) ** 2 for v in values) + 0.5 * sum((h - mean) ** 2 for h in halves)) / total
    reach = 1.959964 * math.sqrt(spread / total)
    assert drop.points == pytest.approx(100 * (lost - won) / n, abs=1e-12)
    assert (drop.low, drop.high) == pytest.approx((100 * (mean - reach), 100 * (mean + reach)), rel=1e-9)  # float64
    assert drop.low <= drop.points <= drop.high


def test_equal_answers_lose_nothing_and_few_images_say_so_with_a_wide_interval() -> None:
    rng = np.random.default_rng(1)

    def of(n: int) -> Drop:
        logits = rng.standard_normal((n, 3))
        return drop_between(logits, logits, rng.integers(0, 3, n))

    few, many = of(40), of(4000)

    for drop in (few, many):
        assert (drop.points, drop.kl) == (0.0, 0.0)
        assert drop.low == -drop.high < 0
    assert many.high < few.high / 50  # the reach of one image is 100 times less


def test_the_interval_holds_the_truth_in_19_of_20_samples() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(1000):
        kinds = rng.choice(3, 200, p=[0.06, 0.02, 0.92])  # lost, won, the same: 4 points are lost in truth
        before, after = np.where(kinds == 1, 1, 0), np.where(kinds == 0, 1, 0)
        drop = drop_between(logits_for(before), logits_for(after), np.zeros(200, int))
        held += drop.low <= 4 <= drop.high
    assert 930 <= held <= 980  # 950 and three standard deviations of 7


def test_divergence_is_zero_for_equal_answers_and_for_logits_moved_as_one() -> None:
    logits = np.random.default_rng(3).standard_normal((20, 5)).astype(np.float32)

    assert divergence(logits, logits) == 0
    assert divergence(logits.astype(np.float64), logits.astype(np.float64) + 7) < 1e-15  # float64 rounding


def test_divergence_is_the_mean_of_p_log_p_over_q() -> None:
    rng = np.random.default_rng(4)
    before, after = rng.standard_normal((20, 5)), rng.standard_normal((20, 5))

    slow = 0.0
    for x, y in zip(before, after, strict=True):
        p, q = [np.exp(v) / np.exp(v).sum() for v in (x, y)]
        slow += sum(p[i] * math.log(p[i] / q[i]) for i in range(5)) / 20

    assert slow > 0.1
    assert divergence(before, after) == pytest.approx(slow, rel=1e-12)  # float64
    assert divergence(after, before) != pytest.approx(slow, rel=1e-3)  # of the second from the first, not both ways


def test_logits_too_large_for_exp_have_a_divergence() -> None:
    assert divergence(np.array([[2000.0, 0.0]]), np.array([[0.0, 2000.0]])) == 2000


# --------------------------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize(
    ("budget", "n", "message"),
    [
        (0.0, 50, "`max_drop`: is in points of top-1, above 0 and below 100, got 0.0"),
        (-1.0, 50, "`max_drop`: is in points of top-1, above 0 and below 100, got -1.0"),
        (100.0, 50, "`max_drop`: is in points of top-1, above 0 and below 100, got 100.0"),
        (math.nan, 50, "`max_drop`: is in points of top-1, above 0 and below 100, got nan"),
        (
            1.9, 50,
            "`max_drop`: must be at least 2 points: 50 images show no less, got 1.9\n"
            "  fix: give more images, or a wider budget",
        ),
        (
            0.5, 36,
            "`max_drop`: must be at least 2.8 points: 36 images show no less, got 0.5\n"
            "  fix: give more images, or a wider budget",
        ),
    ],
)  # fmt: skip
def test_a_budget_that_the_images_cannot_show_is_refused(budget: float, n: int, message: str) -> None:
    with pytest.raises(InputError) as refused:
        require_resolution(budget, n)

    assert str(refused.value) == message
    assert refused.value.exit_code == 3


def test_a_budget_of_one_image_is_taken() -> None:
    require_resolution(2.0, 50)
    require_resolution(99.9, 2)


def points(value: float) -> Drop:
    return Drop(points=value, low=value - 1, high=value + 1, kl=value / 10, n=100)


class Network:
    """Layers whose costs add up. ``asked`` are the numbers of layers that were judged in float, in order."""

    def __init__(self, *costs: float) -> None:
        self.layers = [LayerDrop(name=f"l{i}", drop=cost, kl=cost / 10) for i, cost in enumerate(costs)]
        self.asked: list[int] = []
        self.ranked_count = 0

    def judge(self, kept: tuple[str, ...]) -> Drop:
        assert kept == tuple(layer.name for layer in self.layers[: len(kept)])  # always the worst
        self.asked.append(len(kept))
        return points(sum(layer.drop for layer in self.layers[len(kept) :]))

    def ranked(self) -> Sequence[LayerDrop]:
        self.ranked_count += 1
        return self.layers

    def within(self, budget: float) -> tuple[tuple[str, ...], Drop, tuple[LayerDrop, ...]]:
        first = points(sum(layer.drop for layer in self.layers))
        return within_budget(self.judge, self.ranked, budget, first, where="task 'x'")


def test_where_the_budget_holds_at_once_no_layer_is_looked_at() -> None:
    network = Network(0.5, 0.25)

    assert network.within(0.75) == ((), points(0.75), ())
    assert (network.asked, network.ranked_count) == ([], 0)


def test_one_layer_returns_where_it_alone_does() -> None:
    network = Network(8, 1, 1, 1)

    assert network.within(3) == (("l0",), points(3.0), tuple(network.layers))
    assert (network.asked, network.ranked_count) == ([1], 1)


@pytest.mark.parametrize("needed", range(1, 9))
def test_the_fewest_layers_are_found(needed: int) -> None:
    network = Network(*[1.0] * 16)

    kept, drop, layers = network.within(16 - needed)

    assert kept == tuple(f"l{i}" for i in range(needed))
    assert drop == points(16 - needed)
    assert layers == tuple(network.layers)
    assert len(network.asked) == len(set(network.asked)) <= 6  # twice as many each time, then halves between


@pytest.mark.parametrize("needed", range(1, 9))
def test_every_number_of_layers_up_to_half_is_in_reach_where_half_is_no_power_of_two(needed: int) -> None:
    for count in (2 * needed, 2 * needed + 1):  # so that half of them is just enough
        network = Network(*[1.0] * count)

        assert network.within(count - needed)[0] == tuple(f"l{i}" for i in range(needed))


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(CheckError) as refused:
        call()
    assert refused.value.exit_code == 4
    return str(refused.value)


def test_where_half_of_the_layers_do_not_suffice_the_worst_are_named() -> None:
    network = Network(9, 5, 4, 3)

    assert message_of(lambda: network.within(6.5)) == (
        "task 'x': must lose at most 6.5 points in int8, with half of its layers in float, "
        "got 7.00 (6.00 to 8.00) on 100 images; alone in int8, the worst first:\n"
        "  l0: +9.00 points, divergence 0.9\n"
        "  l1: +5.00 points, divergence 0.5\n"
        "  l2: +4.00 points, divergence 0.4\n"
        "  l3: +3.00 points, divergence 0.3\n"
        "  fix: a wider `max_drop`, more calibration images, or fp16"
    )


def test_of_many_layers_a_dozen_are_named() -> None:
    lines = message_of(lambda: Network(*[1.0] * 20).within(0.5)).splitlines()

    assert lines[1:13] == [f"  l{i}: +1.00 points, divergence 0.1" for i in range(12)]
    assert lines[13:] == [
        "  and 8 more: edgepet calibrate lists all", "  fix: a wider `max_drop`, more calibration images, or fp16",
    ]  # fmt: skip


def test_a_network_of_one_layer_has_no_half_to_return() -> None:
    assert "got 5.00 (4.00 to 6.00) on 100 images" in message_of(lambda: Network(5).within(1))
