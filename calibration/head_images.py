"""Calibration images of heads that read maps: drawn as those with classes are, and judged by what each head answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from edgepet.calibration.budget import Answers, Drop, divergence, worst
from edgepet.calibration.head_drops import box_drop, boxes_apart, label_drop, labels_apart, mask_drop
from edgepet.calibration.images import COUNT, SEED, CalibrationImages, Part, drawn
from edgepet.deltas.heads import Answer, Meaning
from edgepet.errors import InputError
from edgepet.files import sha256_file
from edgepet.images.box_folders import open_boxes
from edgepet.images.boxes import BoxSet, check_boxes
from edgepet.images.folders import Split
from edgepet.images.labels import LabelSet, open_labels
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import MaskSet, check_masks, read_masks
from edgepet.reports.tables import format_names
from edgepet.spec import FilePath, NpArray, Preprocess

SetT = TypeVar("SetT", MaskSet, BoxSet, LabelSet)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind(Generic[SetT]):
    """What of one answer is done otherwise. ``checked`` has read what is true of images, or refuses it."""

    opened: Callable[[Path, Split], SetT]
    checked: Callable[[SetT, Preprocess], SetT]
    both: Callable[[SetT, SetT], SetT]  # of train and val
    apart: Callable[[NpArray, NpArray], float]
    lost: Callable[[NpArray, NpArray, SetT, Preprocess], Drop]


def _checked_masks(images: MaskSet, preprocess: Preprocess) -> MaskSet:
    check_masks(images, preprocess)
    return images


def _masks_lost(before: NpArray, after: NpArray, truths: MaskSet, preprocess: Preprocess) -> Drop:
    return mask_drop(before, after, read_masks(truths.masks, preprocess.image_size))


def _boxes_lost(before: NpArray, after: NpArray, truths: BoxSet, preprocess: Preprocess) -> Drop:
    size, classes = preprocess.image_size, len(truths.classes)
    return box_drop(before, after, truths.boxes, classes, size, truths.extents)


_MASK: _Kind[MaskSet] = _Kind(
    opened=open_masks,
    checked=_checked_masks,
    both=lambda one, other: replace(one, paths=one.paths + other.paths, masks=one.masks + other.masks),
    apart=divergence,
    lost=_masks_lost,
)
_BOXES: _Kind[BoxSet] = _Kind(
    opened=open_boxes,
    checked=check_boxes,
    both=lambda one, other: replace(
        one, paths=one.paths + other.paths, boxes=one.boxes + other.boxes, extents=one.extents + other.extents
    ),
    apart=boxes_apart,
    lost=_boxes_lost,
)
_LABELS: _Kind[LabelSet] = _Kind(
    opened=open_labels,
    checked=lambda images, preprocess: images,
    both=lambda one, other: replace(
        one, paths=one.paths + other.paths, labels=np.concatenate([one.labels, other.labels])
    ),
    apart=labels_apart,
    lost=lambda before, after, truths, preprocess: label_drop(before, after, truths.labels),
)
_KINDS: Mapping[str, _Kind[Any]] = {"mask": _MASK, "boxes": _BOXES, "labels": _LABELS}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """What is true, for one head, of the images that are judged and of those held out."""

    kind: _Kind[Any]
    judged: Any
    held_out: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadCalibrationImages(CalibrationImages):
    """``CalibrationImages`` with what is true of them for each head, ``heads``."""

    heads: tuple[Judged, ...]

    @property
    def facts(self) -> dict[str, object]:
        """As of ``CalibrationImages``; no image is one of a class."""
        return {**super().facts, "per_class": {}}

    def apart(self, before: Answers, after: Answers) -> float:
        """As of ``CalibrationImages``, the sum over heads."""
        answered = zip(self.heads, before, after, strict=True)
        return float(sum(head.kind.apart(was, now) for head, was, now in answered))

    def lost(self, part: Part, before: Answers, after: Answers, order: NpArray) -> Drop:
        """As of ``CalibrationImages``, in points of each head's metric: of the head that loses most."""
        del order  # each has the classes of its head in their order
        return worst(
            head.kind.lost(was, now, head.judged if part == "judged" else head.held_out, self.preprocess)
            for head, was, now in zip(self.heads, before, after, strict=True)
        )


def head_drop(answer: Answer, before: NpArray, after: NpArray, truths: Any, preprocess: Preprocess) -> Drop:
    """Points of its metric that a head loses from what it gave ``before`` to ``after``, of the same images.

    Args:
        truths: what is true of them, a checked ``MaskSet``, ``BoxSet`` or ``LabelSet`` with the head's classes.

    Raises:
        MissingError: the package that computes AP of boxes is not installed.
    """
    drop: Drop = _KINDS[answer].lost(before, after, truths, preprocess)
    return drop


def head_calibration_images(
    folder: FilePath, heads: Sequence[Meaning], preprocess: Preprocess, *, evaluation: FilePath | None = None,
    count: int = COUNT, seed: int = SEED,
) -> HeadCalibrationImages:  # fmt: skip
    """Draw calibration images from a folder that has what each of ``heads`` answers. Else as ``calibration_images``.

    Raises:
        InputError: no such folder, other classes, masks or boxes that are none, heads that have other images, fewer
            than 32 different images, or one that a test split has too.
    """
    folder, kinds = Path(folder), [_KINDS[head.answer] for head in heads]
    judged, trained = list[Any](), list[int]()
    for head, kind in zip(heads, kinds, strict=True):
        train, val = (kind.opened(folder, part) for part in ("train", "val"))
        if train.classes != head.labels:
            what = (
                f"needs the {len(head.labels)} classes of {head.name} in their order, {format_names(head.labels[:5])}"
            )
            raise InputError(str(folder), what, got=format_names(train.classes[:5]))
        whole = kind.checked(kind.both(train, val), preprocess)
        judged.append(in_order(whole, judged[0], folder, head.name) if judged else whole)
        trained.append(len(train))
    first = judged[0].at(range(trained[0]))  # the training images come first
    indices, held, digests = drawn(first.images, folder, count, seed)
    _require_apart(folder, evaluation, judged[0].paths, [kind.opened for kind in dict.fromkeys(kinds)])
    held_out = sorted(indices[:held])
    return HeadCalibrationImages(
        folder=folder,
        preprocess=preprocess,
        measured=first.images.at(sorted(indices[held:])),
        held_out=first.images.at(held_out),
        judged=judged[0].images,
        digests=digests,
        seed=seed,
        heads=tuple(
            Judged(kind=kind, judged=truths, held_out=truths.at(held_out))
            for kind, truths in zip(kinds, judged, strict=True)
        ),
    )


def in_order(truths: Any, first: Any, folder: Path, head: str) -> Any:
    """``truths`` of a ``head`` in the order of the images that the ``first`` head has.

    Raises:
        InputError: they are of other images.
    """
    places = {path: place for place, path in enumerate(truths.paths)}
    unlike = sorted(places.keys() ^ set(first.paths))
    if unlike:
        what, got = f"needs the same images for every head of the task, {head} too", unlike[0].relative_to(folder)
        raise InputError(str(folder), what, got=f"{got} for one alone", fix="give every image what all heads answer")
    return truths.at(places[path] for path in first.paths)


def _require_apart(
    folder: Path, evaluation: FilePath | None, mine: Sequence[Path], opened: Sequence[Callable[[Path, Split], Any]]
) -> None:
    """Refuse an image that a test split has too, by its content."""
    digests = {sha256_file(path): path for path in mine}
    for place in dict.fromkeys((folder, *([] if evaluation is None else [Path(evaluation)]))):
        tests = dict.fromkeys(path for each in opened for path in _tests_of(each, place))
        common = [path for path in tests if sha256_file(path) in digests]
        if common:
            example = f"{digests[sha256_file(common[0])].name} is {common[0].name}"
            what, got = f"must not overlap the test split of {place}", f"{len(common)} of its images: {example}"
            raise InputError(str(folder), what, got=got, fix="calibrate on train, so that test can still judge")


def _tests_of(opened: Callable[[Path, Split], Any], place: Path) -> tuple[Path, ...]:
    try:
        tests: tuple[Path, ...] = opened(place, "test").paths
    except InputError:  # it has none
        return ()
    return tests
