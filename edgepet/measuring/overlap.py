"""How well masks fit: intersection over union of each class, counted over all pixels of all images.

Everything comes of one confusion matrix, never of a mean over images. Everingham et al. 2010, "The PASCAL Visual Object
Classes Challenge", section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgepet.spec import NpArray

Counts: TypeAlias = NDArray[np.int64]

NOT_COUNTED = 255  # in the truth: whatever is answered there is neither right nor wrong
_DRAWS = 1000  # of the bootstrap
_TAILS = (2.5, 97.5)  # percentiles: 95 % lie between


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """``miou`` is the mean of the classes' intersections over unions, fractions of 1, on ``n`` images.

    ``ious`` are of the classes, in their order; None of one that is neither in the truth nor answered, which the mean
    leaves out. ``low`` and ``high`` are the 95 % interval of ``miou``: images drawn anew, with replacement. ``pixels``
    is the part of the counted pixels that are right.
    """

    miou: float
    n: int
    low: float
    high: float
    pixels: float
    ious: tuple[float | None, ...]


def confusion(answers: NpArray, truth: NpArray, classes: int) -> Counts:
    """How many counted pixels of each class of ``truth`` (row) are answered as each class (column), (classes, classes).

    Args:
        answers: class numbers, any shape.
        truth: the same shape; what is 255 is not counted.
    """
    counted = truth != NOT_COUNTED
    both = truth[counted].astype(np.int64) * classes + answers[counted]
    return np.bincount(both, minlength=classes * classes).reshape(classes, classes)


def ious_of(matrix: Counts) -> NDArray[np.float64]:
    """Intersection over union of each class; NaN where there is no union."""
    return _ious(_sums(matrix))


def mean_iou(matrix: Counts) -> float:
    """The mean over the classes that are in the truth or answered; 0 where no pixel is counted."""
    ious = ious_of(matrix)
    return float(np.nanmean(ious)) if np.isfinite(ious).any() else 0.0


def overlap(matrices: Sequence[Counts], *, seed: int = 0) -> Overlap:
    """Judge images by the confusion matrix of each, in any order; ``seed`` draws the interval's images."""
    total = np.sum(matrices, axis=0)
    ious, sums = ious_of(total), np.stack([_sums(matrix) for matrix in matrices])  # (n, 2, classes)
    rng, means = np.random.default_rng(seed), list[float]()
    for _ in range(_DRAWS):
        drawn = np.bincount(rng.integers(0, len(sums), len(sums)), minlength=len(sums))
        again = _ious(np.tensordot(drawn, sums, axes=1))
        if np.isfinite(again).any():
            means.append(float(np.nanmean(again)))
    low, high = np.percentile(means or [0.0], _TAILS)
    return Overlap(
        miou=mean_iou(total),
        n=len(matrices),
        low=float(low),
        high=float(high),
        pixels=float(np.trace(total) / max(1, total.sum())),
        ious=tuple(float(each) if np.isfinite(each) else None for each in ious),
    )


def overlap_lost(before: Sequence[Counts], after: Sequence[Counts], *, seed: int = 0) -> tuple[float, float, float]:
    """What mIoU loses from one row of confusion matrices of the same images to another, and its 95 % interval.

    A fraction of 1, below 0 for a gain. The interval's images are drawn for both at once: the difference is paired.
    """
    pairs = np.stack([[_sums(one), _sums(other)] for one, other in zip(before, after, strict=True)])
    rng, lost = np.random.default_rng(seed), list[float]()
    for _ in range(_DRAWS):
        drawn = np.bincount(rng.integers(0, len(pairs), len(pairs)), minlength=len(pairs))
        both = [_ious(sums) for sums in np.tensordot(drawn, pairs, axes=1)]
        if all(np.isfinite(each).any() for each in both):
            lost.append(float(np.nanmean(both[0]) - np.nanmean(both[1])))
    low, high = np.percentile(lost or [0.0], _TAILS)
    total = mean_iou(np.sum(before, axis=0)) - mean_iou(np.sum(after, axis=0))
    return total, float(low), float(high)


def _sums(matrix: Counts) -> Counts:
    """Pixels of each class's intersection and union, (2, classes)."""
    hits = np.diagonal(matrix)
    return np.stack([hits, matrix.sum(axis=0) + matrix.sum(axis=1) - hits])


def _ious(sums: Counts) -> NDArray[np.float64]:
    hits, unions = sums
    ious: NDArray[np.float64] = np.divide(hits, unions, out=np.full(len(hits), np.nan), where=unions > 0)
    return ious
