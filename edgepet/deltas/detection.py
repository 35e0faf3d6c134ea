"""Boxes out of maps: the last layer of a detector, which has a box for every place, and which of them are kept.

A box that was found is six numbers: x1, y1, x2, y2 in pixels of the network's input, a score 0..1, a class's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.layer import Layer, Shape, listed, no_map, places, sigmoid, wrong_axes
from edgepet.geometry import overlaps
from edgepet.spec import NpArray

MOST_FOUND, LARGEST_STRIDE = 1000, 64
SIDES, BESIDE = 4, 5  # of a box; channels of the second map of a level: its sides, then how central a place is
FOUND = 6  # numbers of one box that was found
OVERLAP = 0.5  # intersection over union above which the box of the smaller score is left out


@dataclass(frozen=True, slots=True, eq=False)
class Detect(Layer):
    """The ``top`` best boxes of all places: reads two maps a level, the finest level first.

    The first map has a channel a class, σ of which is its score; the second the distances from the place to the left,
    upper, right and lower side of a box, and how central the place is. A place of level l lies ``stride`` · 2^… pixels
    from the next, in the middle of them; its distances are max(0, scales_l · x) times as many pixels. Its class is the
    one of the largest score, its score √(σ(class) σ(central)). ``scales`` (levels,). Tian et al. 2019, "FCOS",
    arXiv:1904.01355, equations 1 and 3, with the square root of the authors' code.

    Boxes come in the order of their scores; of two that are equal the one of the finer level, then the upper, then the
    left one is first. Where there are fewer places than ``top`` there are as many boxes. Nothing is suppressed.
    """

    kind: ClassVar[str] = "detect"
    inputs: ClassVar[int | None] = None
    scales: NpArray
    stride: int
    top: int = 100

    def wrong(self) -> str | None:
        """As of every layer."""
        if not 1 <= self.stride <= LARGEST_STRIDE:
            return f"needs a stride from 1 to {LARGEST_STRIDE}, got {self.stride}"
        if not 1 <= self.top <= MOST_FOUND:
            return f"needs a top from 1 to {MOST_FOUND}, got {self.top}"
        return wrong_axes(scales=(self.scales, 1))

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        if len(shapes) != 2 * len(self.scales):
            return f"reads two maps for each of {len(self.scales)} levels, got {len(shapes)}"
        for shape in shapes:
            if no_map(shape) is not None:
                return no_map(shape)
        first = shapes[0]
        for classes, beside in zip(shapes[::2], shapes[1::2], strict=True):
            if classes[0] != first[0] or beside != (BESIDE, *classes[1:]):
                return f"reads maps of {first[0]} classes and of {BESIDE} channels in turn, got {listed(shapes)}"
            ratios = [was / now for was, now in zip(first[1:], classes[1:], strict=True)]
            if ratios[0] != ratios[1] or ratios[0] % 1:
                return f"reads levels a whole number of times coarser than the first, got {listed(shapes[::2])}"
        return None

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer: (boxes, 6)."""
        return (min(self.top, sum(height * width for _, height, width in shapes[::2])), FOUND)

    def strides(self, *shapes: Shape) -> tuple[int, ...]:
        """The pixels between two places of each level, for inputs of these shapes."""
        return tuple(self.stride * shapes[0][1] // height for _, height, _ in shapes[::2])

    def grid(self, *shapes: Shape) -> tuple[NpArray, NpArray]:
        """Where the places of all levels lie, x, y, x, y (4, places), and pixels to a distance of each (places,)."""
        points, reaches = list[NpArray](), list[NpArray]()
        for (_, height, width), stride, scale in zip(
            shapes[::2], self.strides(*shapes), self.scales.astype(np.float64), strict=True
        ):
            y, x = (np.mgrid[:height, :width].reshape(2, -1) + 0.5) * stride
            points.append(np.stack([x, y, x, y]))
            reaches.append(np.full(height * width, scale * stride))
        return np.concatenate(points, axis=1), np.concatenate(reaches)

    def __call__(self, *given: NpArray) -> NpArray:
        """Pairs of (n, classes, h, w) and (n, 5, h, w) become (n, boxes, 6)."""
        return self.best(*_levels(given), *self.grid(*(x.shape[1:] for x in given)))

    def said(self, *given: NpArray) -> tuple[NpArray, NpArray, NpArray]:
        """What the maps that ``__call__`` takes say of all places, before any is chosen: logits of the classes
        (n, classes, places), distances to the sides in strides (n, 4, places), the logit of how central (n, 1, places).
        """
        classes, beside = _levels(given)
        scales = np.repeat(self.scales.astype(classes.dtype), [x.shape[2] * x.shape[3] for x in given[::2]])
        return classes, np.maximum(beside[:, :SIDES] * scales, 0), beside[:, SIDES:]

    def best(self, classes: NpArray, beside: NpArray, points: NpArray, reaches: NpArray) -> NpArray:
        """The boxes (n, boxes, 6) of all places: of (n, classes, places) and (n, 5, places) on what ``grid`` gives."""
        points, reaches = points.astype(classes.dtype), reaches.astype(classes.dtype)
        reached = np.maximum(beside[:, :SIDES] * reaches, 0)
        corners = points + np.concatenate([-reached[:, :2], reached[:, 2:]], axis=1)
        scores = np.sqrt(sigmoid(classes.max(axis=1)) * sigmoid(beside[:, SIDES]))
        labels = classes.argmax(axis=1).astype(classes.dtype)
        rows = np.concatenate([corners, scores[:, None], labels[:, None]], axis=1).swapaxes(1, 2)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.top]
        return np.take_along_axis(rows, best[:, :, None], axis=1)


def _levels(given: Sequence[NpArray]) -> tuple[NpArray, NpArray]:
    """Pairs of maps as two of all levels' places: (n, classes, places) and (n, 5, places)."""
    classes, beside = (np.concatenate([places(x) for x in given[side::2]], axis=2) for side in (0, 1))
    return classes, beside


def suppressed(found: NpArray, *, limit: float = OVERLAP) -> NpArray:
    """Those of the boxes ``found`` (m, 6) of one image, by falling scores, that no better one of their class overlaps.

    Greedy, class by class: a box goes where its intersection over union with one that is kept is above ``limit``.
    """
    left = found[np.argsort(-found[:, 4], kind="stable")]
    kept = list[NpArray]()
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[(left[:, 5] != best[5]) | (overlaps(best[None, :4], left[:, :4])[0] <= limit)]
    return np.stack(kept) if kept else found[:0]


def boxes_in(found: NpArray, size: tuple[int, int], picture: tuple[int, int]) -> NpArray:
    """Boxes ``found`` (m, 6) on an input of ``size`` (height, width) as those of the ``picture`` that was squashed.

    They are cut at its edges; those of which nothing is left are left out.
    """
    rows, columns = picture[0] / size[0], picture[1] / size[1]
    corners = found[:, :4].astype(np.float64) * [columns, rows, columns, rows]
    corners = np.clip(corners, 0, [picture[1], picture[0], picture[1], picture[0]])
    there = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    return np.concatenate([corners, found[:, 4:]], axis=1)[there]
