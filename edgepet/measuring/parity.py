"""Compare two sets of answers. A comparison beyond its limit is a failed command, never a warning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

import numpy as np

from edgepet.errors import CheckError
from edgepet.geometry import overlaps
from edgepet.spec import NpArray, StoredPrecision

Inputs: TypeAlias = Literal["data", "work", "synthetic"]
Against: TypeAlias = Literal["tuned", "merged"]

INTERVAL_Z = 1.959964  # of a normal distribution: 95 % lie within
ALGEBRA = 1e-9  # of the largest logit: float64, nothing rounded for storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Top-1 on ``n`` images as fractions of 1, with the 95 % interval that so few images allow.

    ``balanced`` is the mean over classes of the part of each that was right: what top-1 would be, were all equally
    frequent. ``fewest`` and ``most`` are images of a class.
    """

    top1: float
    n: int
    low: float
    high: float
    balanced: float
    fewest: int
    most: int


def accuracy(answers: NpArray, labels: NpArray, classes: int) -> Accuracy:
    """Judge ``answers`` (n,) by ``labels`` (n,), both indices of ``classes``; a class without an image is left out."""
    n, right = len(labels), answers == labels
    counts = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels, weights=right, minlength=classes)
    low, high = interval(int(right.sum()), n)
    return Accuracy(
        top1=float(right.mean()),
        n=n,
        low=low,
        high=high,
        balanced=float((hits[counts > 0] / counts[counts > 0]).mean()),
        fewest=int(counts.min()),
        most=int(counts.max()),
    )


def interval(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion, Wilson 1927; Brown, Cai and DasGupta 2001 advise it for small n."""
    p, z2 = right / n, INTERVAL_Z**2
    centre, reach = (p + z2 / (2 * n)) / (1 + z2 / n), INTERVAL_Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    half = reach / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, slots=True)
class Limit:
    """What rounding for storage may cost: a fraction of the largest logit, or None for any finite difference, and how
    many answers must stay, near ties left out. ``images`` is the part of them, the nearest ones, of which the fraction
    is asked.
    """

    relative: float | None
    top1_agreement: float = 0.0
    images: float = 1.0


@dataclass(frozen=True, slots=True)
class Match:
    """When a box is another one's: of one class, at least ``iou`` of intersection over union or every side within
    ``sides`` pixels of the input, and scores no further apart than ``score``. ``least`` is the part of the boxes above
    ``FAINT`` that must have such another one. A box thinner than a pixel, often cut by the image's edge, shares little
    with itself moved by a fiftieth of a pixel.
    """

    iou: float
    sides: float
    score: float
    least: float


FAINT = 0.05  # the score of boxes that are guesses, of which nothing is asked
BOXES: dict[StoredPrecision, Match] = {
    "fp32": Match(iou=0.99, sides=0.01, score=1e-3, least=0.999),
    "fp16": Match(iou=0.95, sides=0.1, score=1e-2, least=0.99),
    "int8": Match(iou=0.5, sides=2.0, score=0.25, least=0.8),  # what it costs is judged by AP, on many more images
}
MASKS: dict[StoredPrecision, float] = {"fp32": 0.999, "fp16": 0.99, "int8": 0.9}  # labels of places that must stay
STORED: dict[StoredPrecision, Limit] = {
    "fp32": Limit(relative=1e-4),
    "fp16": Limit(relative=2e-2, top1_agreement=0.99),
    "int8": Limit(relative=None, top1_agreement=0.9),  # 3 of 32: what it costs is judged on many more images
}


def coarser(first: StoredPrecision, second: StoredPrecision) -> StoredPrecision:
    """The one of two precisions whose limit is wider."""
    return max(first, second, key=list(STORED).index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far two networks' logits (n, C) are apart on all images, or on those that the limit asks for; ``limit`` is on
    ``max_abs``, ``inputs`` what they were fed.

    ``near_ties`` of the images are answered otherwise, but were too near to call: the reference's own logit of that
    answer is no further than ``limit`` below its best. ``top1_agreement`` is what was counted, these among the others.
    Of masks each place of the head's map is judged as an image is: with ``places`` ``n`` counts these. With ``boxes``
    it counts those of both networks, ``top1_agreement`` is the part of them that has its like in the other, and
    ``max_abs`` the largest difference of scores of two that are alike. With ``labels`` each label of each image is
    judged by itself, whether it is said.
    """

    max_abs: float
    limit: float | None
    top1_agreement: float
    least_agreement: float
    n: int
    inputs: Inputs
    against: Against
    near_ties: int = 0
    places: bool = False
    boxes: bool = False
    labels: bool = False

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has: ``places``, ``boxes`` and ``labels`` where it is so."""
        later = {"places": self.places, "boxes": self.boxes, "labels": self.labels}
        return [field.name for field in fields(self) if later.get(field.name, True)]

    @property
    def what(self) -> str:
        """What ``n`` counts, in words."""
        if self.places:
            return "places of masks"
        return "boxes" if self.boxes else "labels" if self.labels else "images"

    @property
    def ok(self) -> bool:
        """Whether the answers are finite, within ``limit``, and few enough of them changed, near ties left out."""
        near = math.isfinite(self.max_abs) and (self.limit is None or self.max_abs <= self.limit)
        stayed = round(self.top1_agreement * self.n) + self.near_ties
        return near and stayed / self.n >= self.least_agreement


# The same int8 codes on another runtime: what accumulates where numbers between two codes are rounded apart. Far from
# what it was trained on, a network may amplify that at will: a barely tuned EfficientNet-Lite0 gives noise logits of
# 10,000, and ONNX Runtime differs from itself without optimisations by half of the largest. So half of the images.
SAME_CODES = Limit(relative=0.1, images=0.5)
SAME_BOXES = Match(iou=0.5, sides=2.0, score=0.1, least=0.9)  # of the same codes


def compare(
    expected: NpArray, got: NpArray, *, stored: StoredPrecision | Limit, inputs: Inputs, against: Against,
    thresholds: Sequence[float] = (),
) -> Parity:  # fmt: skip
    """Judge logits ``got`` by ``expected``, both (n, C), as ``stored`` allows; NaN is beyond every limit.

    Of masks both are (n, C, h, w), and as many labels must stay as ``MASKS`` says; boxes are (n, m, 6), and as
    many must have their like as ``BOXES`` says. With ``thresholds``, of σ(logit), as many labels must stay said or not
    said as answers must elsewhere.
    """
    if expected.ndim == 3:
        match = SAME_BOXES if isinstance(stored, Limit) else BOXES[stored]
        return compare_boxes(expected, got, match=match, inputs=inputs, against=against)
    limit, places = stored if isinstance(stored, Limit) else STORED[stored], expected.ndim == 4
    if places:
        least = limit.top1_agreement if isinstance(stored, Limit) else MASKS[stored]
        limit, expected, got = replace(limit, top1_agreement=least), by_place(expected), by_place(got)
    expected = expected.astype(np.float64)
    apart = np.abs(expected - got).max(axis=1)
    nearest = math.ceil(limit.images * len(apart))
    difference = float(np.sort(apart)[nearest - 1]) if np.isfinite(apart).all() else math.inf
    allowed = None if limit.relative is None else limit.relative * float(np.abs(expected).max())
    if thresholds:
        cuts = np.array([_logit(each) for each in thresholds])
        same, margins = ((expected >= cuts) == (got >= cuts)).ravel(), np.abs(expected - cuts).ravel()
    else:
        answers = got.argmax(1)
        same = expected.argmax(1) == answers
        margins = expected.max(1) - expected[np.arange(len(expected)), answers]  # of the reference's over that answer
    return Parity(
        max_abs=difference,
        limit=allowed,
        top1_agreement=float(same.mean()),
        least_agreement=limit.top1_agreement,
        n=len(same),
        inputs=inputs,
        against=against,
        near_ties=0 if allowed is None else int((~same & (margins <= allowed)).sum()),
        places=places,
        labels=bool(thresholds),
    )


def _logit(score: float) -> float:
    """What σ makes ``score`` of."""
    if score in (0.0, 1.0):
        return math.inf if score else -math.inf
    return math.log(score / (1 - score))


def compare_boxes(expected: NpArray, got: NpArray, *, match: Match, inputs: Inputs, against: Against) -> Parity:
    """Judge boxes ``got`` by ``expected``, both (n, m, 6), as ``match`` allows: equal scores come in any order.

    Of each image the boxes above ``FAINT`` must have their like among all boxes of the other network, and the other way
    round. Where the least of m boxes is above ``FAINT``, those that are nearly the least may be left out by either.
    """
    alike, total, apart = 0, 0, 0.0
    for one, other in [(e, g) for pair in zip(expected, got, strict=True) for e, g in (pair, pair[::-1])]:
        least = max(FAINT, float(min(one[:, 4].min(), other[:, 4].min())) + match.score)
        there = one[(one[:, 4] > least) & (one[:, 2:4] > one[:, :2]).all(axis=1)]
        scores = np.abs(there[:, None, 4] - other[None, :, 4])
        sides = np.abs(there[:, None, :4] - other[None, :, :4]).max(axis=2)
        near = (overlaps(there[:, :4], other[:, :4]) >= match.iou) | (sides <= match.sides)
        like = near & (there[:, None, 5] == other[None, :, 5])
        nearest = np.where(like, scores, np.inf).min(axis=1, initial=np.inf)
        same = nearest <= match.score
        alike, total = alike + int(same.sum()), total + len(there)
        apart = max(apart, float(nearest[same].max(initial=0.0)))
    finite = bool(np.isfinite(got).all())
    return Parity(
        max_abs=apart if finite else math.inf, limit=match.score, top1_agreement=alike / total if total else 1.0,
        least_agreement=match.least if total else 0.0, n=max(1, total), inputs=inputs, against=against, boxes=True,
    )  # fmt: skip


def by_place(logits: NpArray) -> NpArray:
    """(n, C, h, w) as (n h w, C)."""
    return np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])


def require_parity(parity: Parity, where: str) -> None:
    """Fail the command if a comparison failed.

    Raises:
        CheckError: the answers are further apart than the limit, or too many of them changed.
    """
    if parity.ok:
        return
    raise CheckError(
        where,
        f"must answer as the {parity.against} network does"
        + ("" if parity.limit is None else f", within {parity.limit:.1e} on {'scores' if parity.boxes else 'logits'}")
        + (f" and with {100 * parity.least_agreement:.4g}% equal answers" if parity.least_agreement else ""),
        got=f"{parity.max_abs:.1e} and {parity.top1_agreement:.1%} on {parity.n}"
        f" {parity.what} ({parity.inputs})"
        + (f", {parity.near_ties} of them too near to call" if parity.near_ties else ""),
        fix="nothing was kept; report this with the pack if the backbone is an ordinary one",
    )
