"""Calibration images with masks: drawn as those with classes are, and judged by mIoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepet.calibration.budget import Drop, mask_drop
from edgepet.calibration.images import COUNT, SEED, CalibrationImages, Part, drawn
from edgepet.errors import InputError
from edgepet.files import sha256_file
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import MaskSet, check_masks, read_masks
from edgepet.reports.tables import format_names
from edgepet.spec import FilePath, NpArray, Preprocess


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskCalibrationImages(CalibrationImages):
    """``CalibrationImages`` with the masks of those that are judged, ``judged_masks``, and of those held out."""

    judged_masks: MaskSet
    held_out_masks: MaskSet

    @property
    def facts(self) -> dict[str, object]:
        """As of ``CalibrationImages``; no image is one of a class."""
        return {**super().facts, "per_class": {}}

    def lost(self, part: Part, before: NpArray, after: NpArray, order: NpArray) -> Drop:
        """What logits (n, C, h, w) lose, in points of mIoU at the input's size."""
        del order  # value n of a mask is class n
        masks = self.judged_masks if part == "judged" else self.held_out_masks
        return mask_drop(before, after, read_masks(masks.masks, self.preprocess.image_size))


def mask_calibration_images(
    folder: FilePath, classes: Sequence[str], preprocess: Preprocess, *, evaluation: FilePath | None = None,
    count: int = COUNT, seed: int = SEED,
) -> MaskCalibrationImages:  # fmt: skip
    """Draw calibration images from a folder of images with masks. Arguments as of ``calibration_images``.

    Raises:
        InputError: no such folder, other classes, masks that are none, fewer than 32 different images, or one that a
            test split has too.
    """
    folder = Path(folder)
    train, val = (open_masks(folder, part) for part in ("train", "val"))
    if train.classes != tuple(classes):
        what = f"needs the {len(classes)} classes of the task in their order, {format_names(list(classes)[:5])}"
        raise InputError(str(folder), what, got=format_names(train.classes[:5]))
    judged = replace(train, paths=train.paths + val.paths, masks=train.masks + val.masks)
    check_masks(judged, preprocess)
    indices, held, digests = drawn(train.images, folder, count, seed)
    _require_apart(folder, evaluation, judged)
    held_out = train.at(sorted(indices[:held]))
    return MaskCalibrationImages(
        folder=folder,
        preprocess=preprocess,
        measured=train.images.at(sorted(indices[held:])),
        held_out=held_out.images,
        judged=judged.images,
        digests=digests,
        seed=seed,
        judged_masks=judged,
        held_out_masks=held_out,
    )


def _require_apart(folder: Path, evaluation: FilePath | None, judged: MaskSet) -> None:
    """Refuse an image that a test split has too, by its content."""
    mine = {sha256_file(path): path for path in judged.paths}
    for place in dict.fromkeys((folder, *([] if evaluation is None else [Path(evaluation)]))):
        try:
            tests = open_masks(place, "test").paths
        except InputError:  # it has none
            continue
        common = [path for path in tests if sha256_file(path) in mine]
        if common:
            example = f"{mine[sha256_file(common[0])].name} is {common[0].name}"
            what, got = f"must not overlap the test split of {place}", f"{len(common)} of its images: {example}"
            raise InputError(str(folder), what, got=got, fix="calibrate on train, so that test can still judge")
