"""What int8 costs a head that reads maps: how far its answers are apart, and what its metric loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgepet.calibration.budget import Drop, divergence
from edgepet.deltas.detection import boxes_in, suppressed
from edgepet.deltas.heads import METRICS, Answer, mask_of
from edgepet.deltas.layer import sigmoid
from edgepet.geometry import overlaps
from edgepet.measuring.average_precision import Objects, ap_lost
from edgepet.measuring.overlap import confusion, overlap_lost
from edgepet.measuring.parity import FAINT
from edgepet.measuring.several_labels import mean_ap_lost
from edgepet.spec import NpArray

_LEAST = 1e-12  # of a probability, below which its logarithm says nothing


def mask_drop(before: NpArray, after: NpArray, truths: NpArray) -> Drop:
    """Points of mIoU: logits (n, C, h, w) of the same images, whose masks are ``truths`` (n, height, width).

    Pixels that are 255 there are not counted; ``kl`` is of the places of the logits.
    """
    classes, size = before.shape[1], (truths.shape[1], truths.shape[2])
    matrices = [
        [confusion(mask_of(logits[None], size)[0], truth, classes) for logits, truth in zip(given, truths, strict=True)]
        for given in (before, after)
    ]
    return _drop(overlap_lost(*matrices), divergence(before, after), len(truths), "mask")


def box_drop(
    before: NpArray, after: NpArray, truths: Sequence[Objects], classes: int, size: tuple[int, int],
    pictures: Sequence[tuple[float, float]],
) -> Drop:  # fmt: skip
    """Points of AP: boxes (n, m, 6) on inputs of ``size`` of the same images, whose true ones are ``truths``.

    Args:
        pictures: (height, width) of the images, in whose pixels the true boxes are.

    Raises:
        MissingError: the package that computes AP is not installed.
    """
    was, now = (
        [
            boxes_in(suppressed(each), size, (int(height), int(width)))
            for each, (height, width) in zip(given, pictures, strict=True)
        ]
        for given in (before, after)
    )
    return _drop(ap_lost(was, now, truths, classes), boxes_apart(before, after), len(truths), "boxes")


def label_drop(before: NpArray, after: NpArray, truths: NpArray) -> Drop:
    """Points of mean AP: logits (n, C) of the same images, which have the labels that are 1 in ``truths`` (n, C)."""
    lost = mean_ap_lost(before.astype(np.float64), after.astype(np.float64), truths)
    return _drop(lost, labels_apart(before, after), len(truths), "labels")


def boxes_apart(before: NpArray, after: NpArray) -> float:
    """How far boxes (n, m, 6) of the same images are apart, 0..1: the part of their scores that has no like.

    Of each box that is kept and no guess it is 1 less the largest product, over the boxes of its class in the other
    network, of their intersection over union and of the smaller score through its own, where that is below 1. The mean
    is weighted by scores, and of both directions.
    """
    lost, total = 0.0, 0.0
    for one, other in zip(before.astype(np.float64), after.astype(np.float64), strict=True):
        kept = [suppressed(each[each[:, 4] > FAINT]) for each in (one, other)]
        shares, scores = overlaps(kept[0][:, :4], kept[1][:, :4]), [each[:, 4] for each in kept]
        shares = np.where(kept[0][:, None, 5] == kept[1][None, :, 5], shares, 0.0)
        for each, mine, theirs in ((shares, *scores), (shares.T, *scores[::-1])):
            like = (each * np.minimum(theirs[None] / mine[:, None], 1)).max(axis=1, initial=0.0)
            lost, total = lost + float((mine * (1 - like)).sum()), total + float(mine.sum())
    return lost / total if total else 0.0


def labels_apart(before: NpArray, after: NpArray) -> float:
    """Mean Kullback-Leibler divergence of σ of ``after`` from σ of ``before``, both (n, C), in nats, label by label."""
    p, q = (sigmoid(each.astype(np.float64)).clip(_LEAST, 1 - _LEAST) for each in (before, after))
    return float(max(0.0, (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()))


def _drop(lost: tuple[float, float, float], apart: float, n: int, answer: Answer) -> Drop:
    points, low, high = (100 * each for each in lost)
    return Drop(points=points, low=low, high=high, kl=apart, n=n, metric=METRICS[answer])
