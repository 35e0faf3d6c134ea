"""Average precision of labels is scikit-learn's, micro-F1 is counted, and thresholds are the best that there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepet.measuring.several_labels import USUAL, best_thresholds, label_fit, micro_f1
from edgepet.spec import NpArray


def drawn(seed: int, images: int = 40, labels: int = 5) -> tuple[NpArray, NpArray]:
    """Scores of which many are equal, and what is there."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((images, labels)) < rng.random(labels) * 0.7).astype(np.uint8)
    scores = np.round(np.clip(0.3 * truth + rng.random((images, labels)) * 0.7, 0, 1), 1 + seed % 3)
    return scores, truth


def by_hand(scores: NpArray, truth: NpArray) -> float:
    """Σ (R_n − R_{n−1}) P_n, threshold by threshold."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        said = scores >= threshold
        hits = float(truth[said].sum())
        recall = hits / truth.sum()
        total += (recall - before) * hits / said.sum()
        before = recall
    return total


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_the_sum_over_thresholds(seed: int) -> None:
    scores, truth = drawn(seed)
    there = [label for label in range(5) if truth[:, label].any()]

    fit = label_fit(scores, truth, interval=False)

    expected = [by_hand(scores[:, label], truth[:, label]) for label in there]
    np.testing.assert_allclose([fit.aps[label] for label in there], expected, atol=1e-12)
    assert fit.ap == pytest.approx(np.mean(expected))
    assert [label for label, ap in enumerate(fit.aps) if ap is None] == sorted(set(range(5)) - set(there))


def test_average_precision_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="the package scikit-learn is not installed")
    for seed in range(100):
        scores, truth = drawn(seed)
        truth[0] = 1  # scikit-learn has a number for labels that no image has
        fit = label_fit(scores, truth, (0.5,) * 5, interval=False)

        assert fit.ap == pytest.approx(metrics.average_precision_score(truth, scores, average="macro"), abs=1e-12)
        assert fit.f1 == pytest.approx(metrics.f1_score(truth, scores >= 0.5, average="micro"), abs=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_no_threshold_is_better_than_the_one_that_is_chosen(seed: int, images: int) -> None:
    scores, truth = drawn(seed, images, 2)

    chosen = best_thresholds(scores, truth)

    for label, threshold in enumerate(chosen):
        here, there = scores[:, label], truth[:, label]
        if not there.any():
            assert threshold == USUAL
            continue
        got = micro_f1(here >= threshold, there)
        assert got == max(micro_f1(here >= each, there) for each in [0.0, *here.tolist(), 1.1])
        assert 0 <= threshold <= 1


def test_micro_f1_counts_over_all_labels() -> None:
    said, truth = np.array([[1, 1, 0], [0, 0, 1]]), np.array([[1, 0, 0], [0, 1, 1]])

    assert micro_f1(said, truth) == 2 * 2 / (2 * 2 + 1 + 1)
    assert micro_f1(np.zeros((2, 2)), np.zeros((2, 2))) == 1
    assert micro_f1(np.ones((2, 2)), np.zeros((2, 2))) == 0


def test_the_interval_is_drawn_and_holds_the_mean() -> None:
    scores, truth = drawn(2)

    fit = label_fit(scores, truth)

    assert fit.low < fit.ap < fit.high
    assert label_fit(scores, truth) == fit
    assert label_fit(scores, truth, seed=1).low != fit.low
    assert label_fit(scores, np.zeros_like(truth)).ap == 0
