"""Calibration images as provenance: given, never invented, and every file of them is written down.

They come from a folder with train/ and perhaps val/ and test/, or from one folder of class folders. Ranges are measured
on one part; the recipe is chosen on another, held out. A budget is judged on all of train and val; test is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from edgepet.calibration.budget import Answers, Drop, divergence, drop_between
from edgepet.errors import InputError
from edgepet.files import sha256_file
from edgepet.images.folders import class_places, folders_in, split_folders, split_of
from edgepet.images.formats import is_image
from edgepet.images.notes import passed_over
from edgepet.images.preprocess import Pixels, normalize
from edgepet.images.sets import ImageSet, batches, load_set, open_split
from edgepet.reports.tables import format_names
from edgepet.spec import FilePath, NpArray, Preprocess

LEAST, ENOUGH = 32, 128  # images: below the first it is refused, below the second it is said
COUNT, HELD_OUT = 256, 0.25  # images at most, and the part of them on which the recipe is chosen
SEED = 0
Part: TypeAlias = Literal["judged", "held_out"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationImages:
    """What was drawn: class by class in turn, by ``seed``.

    ``measured`` and ``held_out`` are disjoint; ``judged`` is all of train and val. ``digests`` are sha256 of the files
    of the first two, by their path in the folder. Pixels are read when they are asked for; those of clips have an
    axis of frames behind n.

    Raises:
        InputError: pixels are asked for, and files are no readable images.
    """

    folder: Path
    preprocess: Preprocess
    measured: ImageSet
    held_out: ImageSet
    judged: ImageSet
    digests: Mapping[str, str]
    seed: int

    @cached_property
    def images(self) -> NpArray:
        """Those to measure ranges on, through the artefact's own preprocessing, float32 (n, 3, H, W)."""
        return self._loaded(self.measured)

    @cached_property
    def held_out_images(self) -> NpArray:
        """Those to choose the recipe on, as ``images`` are: float32 (n, 3, H, W)."""
        return self._loaded(self.held_out)

    @cached_property
    def _judged_pixels(self) -> Pixels:
        return load_set(self.judged, self.preprocess)[0]  # uint8: as float32 they are four times as large

    def judged_batches(self, batch_size: int) -> Iterator[NpArray]:
        """All of train and val, float32 (b, 3, H, W), in the order of ``judged``."""
        return batches(self._judged_pixels, self.preprocess, batch_size)

    @property
    def warning(self) -> str | None:
        """What to say of fewer than 128 images, and of files that are passed over, else None."""
        n = len(self.digests)
        few = f"{n} calibration images are few: {ENOUGH} or more are advised" if n < ENOUGH else None
        told = [text for text in (few, passed_over(self.folder, self.judged.passed_over)) if text is not None]
        return "; ".join(told) or None

    @property
    def facts(self) -> dict[str, object]:
        """What a manifest keeps: enough to draw the same images again, and to know them by content."""
        whole = hashlib.sha256("".join(f"{name} {d}\n" for name, d in self.digests.items()).encode()).hexdigest()
        return {
            "folder": _spelled(self.folder.name),
            "seed": self.seed,
            "images": len(self.digests),
            "measured": len(self.measured),
            "held_out": len(self.held_out),
            "judged": len(self.judged),
            "per_class": {name: self._count(label) for label, name in enumerate(self.measured.classes)},
            "sha256": whole,
            "files": dict(self.digests),
        }

    def apart(self, before: Answers, after: Answers) -> float:
        """How far a model's answers to the same images are apart: what recipes are chosen by."""
        return divergence(before[0], after[0])

    def lost(self, part: Part, before: Answers, after: Answers, order: NpArray) -> Drop:
        """What answers ``after`` to all images of a part lose of those ``before``: logits (n, C), of one head.

        Args:
            order: the model's class for each class of ``images``, integers (C,).
        """
        images = self.judged if part == "judged" else self.held_out
        return drop_between(before[0], after[0], order[np.asarray(images.labels)])

    def _count(self, label: int) -> int:
        return self.measured.labels.count(label) + self.held_out.labels.count(label)

    def _loaded(self, images: ImageSet) -> NpArray:
        return normalize(load_set(images, self.preprocess)[0], self.preprocess)


def calibration_images(
    folder: FilePath,
    classes: Sequence[str],
    preprocess: Preprocess,
    *,
    evaluation: FilePath | None = None,
    count: int = COUNT,
    seed: int = SEED,
) -> CalibrationImages:
    """Draw calibration images from ``folder``.

    Args:
        classes: of the task; the folder must have these.
        evaluation: a folder whose test/ must not be touched, besides that of ``folder`` and of the folder above it.
        count: images at most, measured and held out together; files with the same bytes are drawn once.

    Raises:
        InputError: no such folder, no images, other classes, fewer than 32 different images, or one that the evaluation
            split has too.
    """
    folder = Path(folder)
    clips = preprocess.frames > 1
    train, val = (open_split(folder, part, clips=clips) for part in ("train", "val"))
    judged, known = _joined([train, val]), class_places(classes)
    if judged.classes != tuple(sorted(known)):
        unlike = format_names(sorted(known.keys() ^ set(judged.classes))[:5])
        raise InputError(str(folder), f"needs the {len(classes)} classes of the task", got=f"a difference in {unlike}")
    source = train if "train" in split_folders(folder, clips=clips) else judged
    indices, held, digests = drawn(source, folder, count, seed)
    _require_apart(folder, evaluation, judged, clips)
    return CalibrationImages(
        folder=folder,
        preprocess=preprocess,
        measured=source.at(sorted(indices[held:])),
        held_out=source.at(sorted(indices[:held])),
        judged=judged,
        digests=digests,
        seed=seed,
    )


def drawn(source: ImageSet, folder: Path, count: int, seed: int) -> tuple[list[int], int, dict[str, str]]:
    """At most ``count`` images, class by class in turn: their indices, how many of them are held out, the first ones,
    and the sha256 of each by its path in ``folder``.

    Raises:
        InputError: fewer than 32 differ.
    """
    chosen = list(_distinct(source, _in_turn(source, seed), count))
    if len(chosen) < LEAST:
        what = f"needs at least {LEAST} different images to calibrate on"
        raise InputError(str(folder), what, got=f"{len(chosen)} in {len(source)} files", fix="give it more images")
    digests = {_name(source.paths[i], folder): digest for i, digest in chosen}
    held = min(max(len(source.classes), round(HELD_OUT * len(chosen))), len(chosen) // 2)
    return [i for i, _ in chosen], held, dict(sorted(digests.items()))


def _in_turn(images: ImageSet, seed: int) -> Iterator[int]:
    """Indices, one image of each class after the other, each class in random order."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(images.labels)
    queues = [list(rng.permutation(np.flatnonzero(labels == label))) for label in range(len(images.classes))]
    while any(queues):
        for queue in queues:
            if queue:
                yield int(queue.pop())


def _distinct(images: ImageSet, order: Iterator[int], count: int) -> Iterator[tuple[int, str]]:
    """Up to ``count`` images whose files differ, with their digests."""
    seen = set[str]()
    for index in order:
        digest = _digest(images.paths[index])
        if digest not in seen:
            seen.add(digest)
            yield index, digest
        if len(seen) == count:
            return


def _require_apart(folder: Path, evaluation: FilePath | None, judged: ImageSet, clips: bool) -> None:
    """Refuse a file that a test split has too, by its content; all of train and val judge a budget, drawn or not."""
    places = [*_tests_in(folder), *_tests_in(folder.absolute().parent)]
    if evaluation is not None:
        given = Path(evaluation)
        places += [*_tests_in(given), *([given] if split_of(given.name) == "test" and given.is_dir() else [])]
    mine = {_digest(path): _name(path, folder) for path in reversed(judged.paths)} if places else {}
    for place in places:
        held = place.absolute()
        theirs = (path for path in sorted(held.glob("*/*")) if (path.is_dir() if clips else _is_picture(path)))
        common = [path for path in theirs if mine.get(_digest(path))]
        if common:
            example = f"{mine[_digest(common[0])]} is {common[0].relative_to(held)}"
            raise InputError(
                str(folder),
                f"must not overlap the evaluation split {place}",
                got=f"{len(common)} of its images: {example}",
                fix="calibrate on train/, so that test/ can still judge",
            )


def _tests_in(folder: Path) -> list[Path]:
    """The folders in ``folder`` that are called as a test split is; none where it cannot be read."""
    try:
        return [item for item in folders_in(folder) if split_of(item.name) == "test"]
    except InputError:
        return []


def _is_picture(path: Path) -> bool:
    return not path.name.startswith(".") and is_image(path) and path.is_file()


def _digest(path: Path) -> str:
    if not path.is_dir():
        return sha256_file(path)
    whole = hashlib.sha256()
    for frame in sorted(filter(_is_picture, path.iterdir())):
        whole.update(sha256_file(frame).encode())
    return whole.hexdigest()


def _name(path: Path, folder: Path) -> str:
    return _spelled(path.relative_to(folder).as_posix())


def _spelled(name: str) -> str:
    """``name`` as a manifest can hold it: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _joined(sets: Sequence[ImageSet]) -> ImageSet:
    return ImageSet(
        sets[0].classes,
        tuple(path for images in sets for path in images.paths),
        tuple(label for images in sets for label in images.labels),
        tuple(each for images in sets for each in images.passed_over),
    )
