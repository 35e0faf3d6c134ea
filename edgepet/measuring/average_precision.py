"""How well boxes fit: COCO's average precision, computed by faster-coco-eval.

AP is the mean over ten limits of intersection over union, 0.50 to 0.95, and over the classes that have an object;
crowds count neither as found nor as missed. Lin et al. 2014, arXiv:1405.0312, and cocodataset.org/#detection-eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgepet.errors import require
from edgepet.spec import NpArray

MOST_FOUND = 100  # boxes of one image that are judged: those of the largest scores
_DRAWS = 200  # of the bootstrap
_TAILS = (2.5, 97.5)  # percentiles: 95 % lie between
_ALL = (0.0, 1e10)  # areas of objects that count

_Coco: TypeAlias = Any  # what the library is made of, which has no types


class Objects(Protocol):
    """The true boxes of one image: ``corners`` (n, 4), ``labels`` (n,), and ``crowds`` (n,), which do not count."""

    @property
    def corners(self) -> NDArray[np.float64]:
        """x1, y1, x2, y2 of each."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """The number of each one's class."""

    @property
    def crowds(self) -> NDArray[np.bool_]:
        """Which of them are no single object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxFit:
    """AP as ``ap`` and at one limit of 0.5 as ``ap50``, fractions of 1, on ``n`` images with ``objects`` in all.

    ``aps`` are of the classes, in their order; None of one that has no object, which the mean leaves out. ``low`` and
    ``high`` are the 95 % interval of ``ap``: images drawn anew, with replacement. ``recall`` is the part of the objects
    that the boxes find, a mean over the same limits. All are 0 where there is no object.
    """

    ap: float
    ap50: float
    n: int
    low: float
    high: float
    recall: float
    objects: int
    aps: tuple[float | None, ...]


def require_evaluator() -> ModuleType:
    """The library that computes AP.

    Raises:
        MissingError: it is not installed.
    """
    return require("faster_coco_eval", extra="boxes", purpose="average precision")


def box_fit(
    found: Sequence[NpArray], truth: Sequence[Objects], classes: int, *, interval: bool = True, seed: int = 0
) -> BoxFit:
    """Judge the boxes of images by their true ones.

    Args:
        found: of each image (m, 6): x1, y1, x2, y2, score, the number of a class.
        truth: of each image, in the same order and in the same pixels.
        interval: False leaves ``low`` and ``high`` at ``ap``.
        seed: draws the interval's images.

    Raises:
        MissingError: faster-coco-eval is not installed.
    """
    objects = sum(int((~each.crowds).sum()) for each in truth)
    if not objects:
        return BoxFit(ap=0, ap50=0, n=len(truth), low=0, high=0, recall=0, objects=0, aps=(None,) * classes)
    judged = _judged(require_evaluator(), found, truth, classes)
    judged.accumulate()
    precision, recall = judged.eval["precision"][:, :, :, 0, 0], judged.eval["recall"][:, :, 0, 0]
    ap = _mean(precision)
    low, high = np.percentile(list(_drawn(judged, classes, len(truth), seed)) or [ap], _TAILS) if interval else (ap, ap)
    return BoxFit(
        ap=ap,
        ap50=_mean(precision[0]),
        n=len(truth),
        low=float(low),
        high=float(high),
        recall=_mean(recall),
        objects=objects,
        aps=tuple(_mean(each) if (each > -1).any() else None for each in np.moveaxis(precision, 2, 0)),
    )


def ap_lost(
    before: Sequence[NpArray], after: Sequence[NpArray], truth: Sequence[Objects], classes: int, *, seed: int = 0
) -> tuple[float, float, float]:
    """What AP loses from some boxes to others of the same images, and its 95 % interval; arguments as of ``box_fit``.

    A fraction of 1, below 0 for a gain; 0 where there is no object. The interval's images are drawn for both at once.

    Raises:
        MissingError: faster-coco-eval is not installed.
    """
    if not any((~each.crowds).any() for each in truth):
        return 0.0, 0.0, 0.0
    rows = list[NpArray]()
    for found in (before, after):
        judged = _judged(require_evaluator(), found, truth, classes)
        judged.accumulate()
        ap = _mean(judged.eval["precision"][:, :, :, 0, 0])
        rows.append(np.array([ap, *_drawn(judged, classes, len(truth), seed)]))
    lost, drawn = float(rows[0][0] - rows[1][0]), rows[0][1:] - rows[1][1:]
    low, high = np.percentile(drawn if len(drawn) else [lost], _TAILS)
    return lost, float(low), float(high)


def _mean(values: NpArray) -> float:
    """The mean without what the library marks by −1: classes that have no object."""
    there = values[values > -1]
    return float(there.mean()) if there.size else 0.0


def _judged(library: ModuleType, found: Sequence[NpArray], truth: Sequence[Objects], classes: int) -> _Coco:
    """The library's evaluation, with every box held against the true ones of its image."""
    images = [{"id": number + 1} for number in range(len(truth))]
    categories = [{"id": number, "name": str(number)} for number in range(classes)]
    told = library.COCO({"images": images, "annotations": list(_annotations(truth)), "categories": categories})
    given = library.COCO({"images": images, "annotations": list(_results(found)), "categories": categories})
    judged = library.COCOeval_faster(told, given, "bbox", separate_eval=True)
    judged.params.areaRng, judged.params.areaRngLbl, judged.params.maxDets = [_ALL], ["all"], [MOST_FOUND]
    judged.evaluate()
    return judged


def _annotations(truth: Sequence[Objects]) -> Iterator[dict[str, object]]:
    number = 0
    for image, objects in enumerate(truth, start=1):
        rows = zip(objects.corners.tolist(), objects.labels.tolist(), objects.crowds.tolist(), strict=True)
        for corners, label, crowd in rows:
            number += 1  # the library takes 0 for none
            yield {**_box(number, image, corners, label), "iscrowd": int(crowd)}


def _results(found: Sequence[NpArray]) -> Iterator[dict[str, object]]:
    number = 0
    for image, rows in enumerate(found, start=1):
        for *corners, score, label in rows.tolist():
            number += 1
            yield {**_box(number, image, corners, int(label)), "iscrowd": 0, "score": score}


def _box(number: int, image: int, corners: Sequence[float], label: int) -> dict[str, object]:
    x1, y1, x2, y2 = corners
    box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
    return {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": area}


def _drawn(judged: _Coco, classes: int, images: int, seed: int) -> Iterator[float]:
    """AP of images drawn anew: each has been compared with its objects already, class by class."""
    held, rng = list(judged._evalImgs_cpp), np.random.default_rng(seed)
    for _ in range(_DRAWS):
        drawn = rng.integers(0, images, images).tolist()
        judged._evalImgs_cpp = [held[label * images + image] for label in range(classes) for image in drawn]
        judged.accumulate()
        precision = judged.eval["precision"][:, :, :, 0, 0]
        if (precision > -1).any():
            yield _mean(precision)
