"""How well labels fit where an image may have several: mean average precision, and micro-F1 at a threshold a label.

Average precision of a label is Σ (R_n − R_{n−1}) P_n over all distinct scores as thresholds, from the largest, without
interpolation, as scikit-learn's ``average_precision_score`` has it; the mean is over the labels that an image has.
Micro-F1 is 2 TP / (2 TP + FP + FN), summed over all images and labels: Manning, Raghavan and Schütze 2008,
"Introduction to Information Retrieval", sections 8.4 and 13.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepet.spec import NpArray

DIGITS = 4  # of a threshold, behind the point
USUAL = 0.5  # the threshold of a label that no image has
_DRAWS = 200  # of the bootstrap
_TAILS = (2.5, 97.5)  # percentiles: 95 % lie between


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFit:
    """``ap`` is the mean of the labels' average precisions, ``f1`` micro-F1 at ``thresholds``, on ``n`` images.

    ``aps`` are of the labels, in their order; None of one that no image has, which the mean leaves out. ``low`` and
    ``high`` are the 95 % interval of ``ap``: images drawn anew, with replacement. All are 0 where no image has a label.
    """

    ap: float
    f1: float
    n: int
    low: float
    high: float
    aps: tuple[float | None, ...]
    thresholds: tuple[float, ...]


def label_fit(
    scores: NpArray, truth: NpArray, thresholds: tuple[float, ...] = (), *, interval: bool = True, seed: int = 0
) -> LabelFit:
    """Judge ``scores`` (n, C), 0..1, by ``truth`` (n, C), 1 where an image has the label and else 0.

    Args:
        thresholds: of the labels; none are those that ``best_thresholds`` chooses on these images.
        interval: False leaves ``low`` and ``high`` at ``ap``.
        seed: draws the interval's images.
    """
    there = truth.astype(bool)
    chosen = thresholds or best_thresholds(scores, there)
    aps = _average_precisions(scores, there)
    ap, drawn = _mean(aps), list[float]()
    rng = np.random.default_rng(seed)
    for _ in range(_DRAWS if interval else 0):
        index = rng.integers(0, len(scores), len(scores))
        again = _average_precisions(scores[index], there[index])
        drawn += [_mean(again)] if np.isfinite(again).any() else []
    low, high = np.percentile(drawn or [ap], _TAILS)
    return LabelFit(
        ap=ap,
        f1=micro_f1(scores >= np.array(chosen), there),
        n=len(scores),
        low=float(low),
        high=float(high),
        aps=tuple(float(each) if np.isfinite(each) else None for each in aps),
        thresholds=chosen,
    )


def mean_ap_lost(before: NpArray, after: NpArray, truth: NpArray, *, seed: int = 0) -> tuple[float, float, float]:
    """What mean AP loses from some scores (n, C) to others of the same images, and its 95 % interval.

    A fraction of 1, below 0 for a gain. The interval's images are drawn for both at once.
    """
    there, lost = truth.astype(bool), list[float]()
    rng = np.random.default_rng(seed)
    for _ in range(_DRAWS):
        index = rng.integers(0, len(there), len(there))
        if there[index].any():
            one, other = (_mean(_average_precisions(each[index], there[index])) for each in (before, after))
            lost.append(one - other)
    low, high = np.percentile(lost or [0.0], _TAILS)
    whole = [_mean(_average_precisions(each, there)) for each in (before, after)]
    return whole[0] - whole[1], float(low), float(high)


def micro_f1(said: NpArray, truth: NpArray) -> float:
    """2 TP / (2 TP + FP + FN) of what is ``said`` (n, C) and what is there; 1 where nothing is, and nothing is said."""
    said, there = said.astype(bool), truth.astype(bool)
    total = int(said.sum()) + int(there.sum())
    return 2 * int((said & there).sum()) / total if total else 1.0


def best_thresholds(scores: NpArray, truth: NpArray) -> tuple[float, ...]:
    """Of each label the threshold of ``scores`` (n, C) at which its own F1 on these images is largest.

    Those that are tried lie between two scores that differ, rounded to DIGITS, and USUAL; of several that are equally
    good it is the one nearest to USUAL, which is that of a label that no image has as well.
    """
    return tuple(_best(scores[:, label], truth[:, label].astype(bool)) for label in range(scores.shape[1]))


def _best(scores: NpArray, there: NpArray) -> float:
    if not there.any():
        return USUAL
    known = np.unique(scores.astype(np.float64))
    between = (known + np.concatenate([[0.0], known[:-1]])) / 2
    tried = np.unique(np.append(np.round(between, DIGITS), USUAL))
    hits, said = (
        len(each) - np.searchsorted(np.sort(each), tried, side="left") for each in (scores[there], scores)
    )  # how many are at the threshold or above it
    f1 = 2 * hits / (said + int(there.sum()))
    best = tried[f1 == f1.max()]
    return float(best[np.abs(best - USUAL).argmin()])


def _average_precisions(scores: NpArray, there: NpArray) -> NDArray[np.float64]:
    """Of each label, NaN of one that no image has."""
    found = np.full(scores.shape[1], np.nan)
    for label in np.flatnonzero(there.any(axis=0)):
        order = np.argsort(-scores[:, label], kind="stable")
        ranked, hits = scores[order, label], np.cumsum(there[order, label])
        last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of those that are equal
        gained = np.diff(hits[last], prepend=0)
        found[label] = float((gained * hits[last] / (last + 1)).sum() / hits[-1])
    return found


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
