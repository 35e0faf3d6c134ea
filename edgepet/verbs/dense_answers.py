"""What ``train`` and ``eval`` do otherwise for each answer of a head that reads maps: data, judge, and what is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from edgepet.deltas.heads import METRICS, Answer, MapHead, Meaning
from edgepet.images.box_folders import open_boxes
from edgepet.images.boxes import BoxSet, check_boxes
from edgepet.images.folders import Split
from edgepet.images.labels import LabelSet, open_labels
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import MaskSet, check_masks
from edgepet.measuring.average_precision import BoxFit, require_evaluator
from edgepet.measuring.overlap import Overlap
from edgepet.measuring.several_labels import LabelFit
from edgepet.proving.boxes import judge_boxes, require_box_classes
from edgepet.proving.labels import judge_labels, require_label_classes
from edgepet.proving.masks import judge_masks, require_mask_classes
from edgepet.reports.tables import format_percent
from edgepet.spec import NpArray, Preprocess

SetT = TypeVar("SetT")
FitT = TypeVar("FitT")
Network = Callable[[NpArray], NpArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseScore:
    """``value`` of ``metric``, a fraction of 1, on ``n`` images, and its 95 % interval.

    Of masks, each judged as large as its image, ``pixels`` is the part of the counted pixels that are right. Of boxes
    ``map50`` is AP at the one limit of 0.5, ``recall`` the part of the ``objects`` that is found, a mean over limits.
    Of labels ``f1`` is micro-F1 at the head's thresholds.
    What says nothing of an answer is None, and JSON has it not.
    """

    metric: str
    value: float
    n: int
    low: float | None
    high: float | None
    pixels: float | None = None
    map50: float | None = None
    recall: float | None = None
    objects: int | None = None
    f1: float | None = None

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]


def mean_of(scores: Sequence[DenseScore]) -> DenseScore:
    """A score as it is, or the mean of those of several heads, which has no interval."""
    if len(scores) == 1:
        return scores[0]
    value = sum(each.value for each in scores) / len(scores)
    return DenseScore(metric="mean", value=value, n=scores[0].n, low=None, high=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """A class and its ``value``, None where there is none; ``count`` is what it has in the training images.

    JSON calls both by what they are, ``value_is`` and ``count_is``.
    """

    name: str
    value: float | None
    count: int | None
    value_is: str
    count_is: str

    @property
    def as_json(self) -> Mapping[str, object]:
        """As JSON has it."""
        count = {} if self.count is None else {self.count_is: self.count}
        return {"name": self.name, self.value_is: self.value, **count}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseAnswer(Generic[SetT, FitT]):
    """One answer. ``title`` is its metric, ``absent`` is told of a class without a value, ``value_is`` and ``count_is``
    are JSON's names of what a class has; ``shows`` is what the next command after a training draws.
    """

    answer: Answer
    title: str
    value_is: str
    count_is: str
    absent: str
    shows: str
    require: Callable[[], object]  # what judges it is here
    images: Callable[[Path, Split, Meaning, Preprocess, str], SetT]  # of the model that is called so
    judge: Callable[[Network, SetT, Preprocess, Meaning], FitT]
    score: Callable[[FitT], DenseScore]
    values: Callable[[FitT], Sequence[float | None]]
    told: Callable[[DenseScore], tuple[str, str]]  # behind its metric, and behind its interval
    settled: Callable[[MapHead, FitT], MapHead]  # a head with what is chosen on val

    def classes(self, fit: FitT, labels: Sequence[str], counts: Sequence[int] | None = None) -> tuple[ClassScore, ...]:
        """What each class has come to; ``counts`` are of the training images."""
        told = [None] * len(labels) if counts is None else counts
        return tuple(
            ClassScore(name=name, value=value, count=count, value_is=self.value_is, count_is=self.count_is)
            for name, value, count in zip(labels, self.values(fit), told, strict=True)
        )

    def lines(self, classes: Sequence[ClassScore]) -> list[str]:
        """A line for each class."""
        return [
            f"    {each.name}: {self.absent if each.value is None else format_percent(each.value)}" for each in classes
        ]


def _masks(data: Path, split: Split, meaning: Meaning, preprocess: Preprocess, model: str) -> MaskSet:
    images = open_masks(data, split)
    require_mask_classes(images, meaning.labels, data, model)
    check_masks(images, preprocess)
    return images


def _boxes(data: Path, split: Split, meaning: Meaning, preprocess: Preprocess, model: str) -> BoxSet:
    return check_boxes(require_box_classes(open_boxes(data, split), meaning.labels, data, model), preprocess)


def _labels(data: Path, split: Split, meaning: Meaning, preprocess: Preprocess, model: str) -> LabelSet:
    del preprocess
    return require_label_classes(open_labels(data, split), meaning.labels, data, model)


def _mask_score(fit: Overlap) -> DenseScore:
    return DenseScore(
        metric=METRICS["mask"], value=fit.miou, n=fit.n, low=fit.low, high=fit.high, pixels=fit.pixels
    )  # fmt: skip


def _box_score(fit: BoxFit) -> DenseScore:
    return DenseScore(
        metric=METRICS["boxes"], value=fit.ap, n=fit.n, low=fit.low, high=fit.high, map50=fit.ap50, recall=fit.recall,
        objects=fit.objects,
    )  # fmt: skip


def _label_score(fit: LabelFit) -> DenseScore:
    return DenseScore(metric=METRICS["labels"], value=fit.ap, n=fit.n, low=fit.low, high=fit.high, f1=fit.f1)


def _masks_told(score: DenseScore) -> tuple[str, str]:
    return f" on {score.n} images", f"; {format_percent(score.pixels or 0)} of all pixels"


def _boxes_told(score: DenseScore) -> tuple[str, str]:
    map50, recall = format_percent(score.map50 or 0), format_percent(score.recall or 0)
    return f", AP50 {map50} on {score.n} images with {score.objects} objects", f"; recall {recall}"


def _labels_told(score: DenseScore) -> tuple[str, str]:
    return f", micro-F1 {format_percent(score.f1 or 0)} on {score.n} images", ""


_MASK: DenseAnswer[MaskSet, Overlap] = DenseAnswer(
    answer="mask", title="mIoU", value_is="iou", count_is="pixels", absent="neither there nor answered",
    shows="--draw DIR", require=lambda: None, images=_masks,
    judge=lambda network, images, preprocess, meaning: judge_masks(network, images, preprocess, len(meaning.labels)),
    score=_mask_score, values=lambda fit: fit.ious, told=_masks_told, settled=lambda head, fit: head,
)  # fmt: skip
_BOXES: DenseAnswer[BoxSet, BoxFit] = DenseAnswer(
    answer="boxes", title="AP", value_is="ap", count_is="objects", absent="no object to be found",
    shows="--draw DIR", require=require_evaluator, images=_boxes,
    judge=lambda network, images, preprocess, meaning: judge_boxes(network, images, preprocess, len(meaning.labels)),
    score=_box_score, values=lambda fit: fit.aps, told=_boxes_told, settled=lambda head, fit: head,
)  # fmt: skip
_LABELS: DenseAnswer[LabelSet, LabelFit] = DenseAnswer(
    answer="labels", title="mean AP", value_is="ap", count_is="images", absent="no image has it",
    shows="", require=lambda: None, images=_labels,
    judge=lambda network, images, preprocess, meaning: judge_labels(network, images, preprocess, meaning.thresholds),
    score=_label_score, values=lambda fit: fit.aps, told=_labels_told,
    settled=lambda head, fit: replace(head, thresholds=fit.thresholds),
)  # fmt: skip
ANSWERED: dict[Answer, DenseAnswer[Any, Any]] = {"mask": _MASK, "boxes": _BOXES, "labels": _LABELS}
