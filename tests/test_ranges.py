"""How far codes reach: each estimator on distributions whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from edgepet.calibration.ranges import BINS, ESTIMATORS, LEAST, Estimator, Histogram, threshold
from edgepet.spec import NpArray

BIN = 1 / BINS  # of the largest magnitude: no estimator sees finer
NAMES = sorted(ESTIMATORS)


def reach(values: NpArray, estimator: Estimator, levels: int = 127) -> float:
    return threshold(Histogram.of(values, float(np.abs(values).max())), estimator, levels)


def squared_error(values: NpArray, limit: float, levels: int = 127) -> float:
    """Of the values themselves: a histogram is not looked at."""
    step = limit / levels
    return float(((np.clip(np.rint(values / step), -levels, levels) * step - values) ** 2).sum())


def heavy_tails(n: int = 50_000) -> NpArray:
    return np.random.default_rng(1).standard_t(3, n)


def test_min_max_is_the_largest_magnitude_and_none_reaches_further() -> None:
    values = heavy_tails()
    largest = float(np.abs(values).max())

    assert reach(values, "min-max") == largest
    assert all(reach(values, name) <= largest for name in NAMES)


def test_a_value_that_was_not_drawn_still_counts_for_min_max() -> None:
    assert threshold(Histogram.of(np.array([0.5, -1.0]), 4.0), "min-max", 127) == 4.0


def test_the_percentile_passes_over_one_value_in_a_hundred_thousand() -> None:
    values = np.random.default_rng(2).uniform(-1, 1, 100_000)
    values[777] = -10.0

    assert reach(values, "min-max") == 10.0
    assert reach(values, "percentile") == pytest.approx(1, abs=10 * BIN)  # the bin in which all others end
    assert reach(np.append(values, np.full(20, 10.0)), "percentile") == 10.0  # 21 of them are more than 1 in 10000


def test_least_squares_clips_heavy_tails_and_not_a_uniform_spread() -> None:
    tails, even = heavy_tails(), np.random.default_rng(3).uniform(-1, 1, 50_000)

    limit, largest = reach(tails, "mse"), reach(tails, "min-max")

    assert np.quantile(np.abs(tails), 0.99) < limit < largest
    assert squared_error(tails, limit) < 0.9 * squared_error(tails, largest)  # 0.79 of it: few values are clipped
    assert reach(even, "mse") >= 0.99 * reach(even, "min-max")  # candidates are hundredths


def test_least_squares_is_the_best_of_all_hundredths() -> None:
    values = heavy_tails(5_000)
    largest = float(np.abs(values).max())
    errors = [squared_error(values, largest * part / 100) for part in range(20, 101)]

    # 2 %: the histogram puts every value into the middle of its bin
    assert squared_error(values, reach(values, "mse")) <= 1.02 * min(errors)


def test_more_codes_reach_further() -> None:
    values = heavy_tails()

    assert reach(values, "mse", 255) > reach(values, "mse", 127) > reach(values, "mse", 15)


def test_entropy_stops_below_the_outliers() -> None:
    rng = np.random.default_rng(4)
    values = np.concatenate([rng.normal(0, 1, 100_000), rng.uniform(19, 20, 20)])

    limit = reach(values, "entropy")

    assert reach(values, "min-max") > 19
    assert 2.5 < limit < 8  # all but one in a hundred of the bulk is inside, no outlier is


def test_entropy_keeps_all_of_a_spread_without_outliers() -> None:
    assert reach(np.random.default_rng(5).uniform(-1, 1, 100_000), "entropy") > 0.95


@pytest.mark.parametrize("estimator", NAMES)
def test_a_tensor_that_is_zero_everywhere_has_a_threshold_above_zero(estimator: Estimator) -> None:
    limit = threshold(Histogram.of(np.zeros((3, 4)), 0.0), estimator, 127)

    assert 0 < limit <= LEAST


@pytest.mark.parametrize("estimator", NAMES)
def test_a_threshold_grows_with_its_tensor(estimator: Estimator) -> None:
    values = heavy_tails(20_000)

    assert reach(8 * values, estimator) == 8 * reach(values, estimator)  # a power of two: nothing is rounded


def test_what_lies_beyond_the_top_counts_as_the_top() -> None:
    histogram = Histogram.of(np.array([0.1, -0.9, 5.0, -7.0]), 1.0)

    assert (histogram.counts.sum(), histogram.counts[-1], histogram.top) == (4, 2, 1.0)
    assert histogram.centres[[0, -1]].tolist() == [0.5 * BIN, 1 - 0.5 * BIN]
