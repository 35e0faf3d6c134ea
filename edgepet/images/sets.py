"""Image folders: which files belong to a split, and their pixels in memory."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgepet.errors import InputError
from edgepet.images.folders import (
    Listing,
    PassedOver,
    Split,
    beside_splits,
    class_name,
    folders_in,
    list_classes,
    split_folders,
    unreadable,
)
from edgepet.images.preprocess import Pixels, load_input, normalize
from edgepet.spec import Preprocess


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Image files, or clips' folders, and, for each, its class as an index into ``classes``.

    Ordered by class name, then file name. ``passed_over`` is what lies among them and is not used.
    """

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    passed_over: tuple[PassedOver, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, indices: Iterable[int]) -> ImageSet:
        """Those of its images that ``indices`` name, in their order."""
        chosen = tuple(indices)
        paths = tuple(self.paths[index] for index in chosen)
        return replace(self, paths=paths, labels=tuple(self.labels[index] for index in chosen))


def open_split(
    folder: Path, split: Split, *, val_fraction: float = 0.2, seed: int = 0, clips: bool = False
) -> ImageSet:
    """List one split of a folder with train/, val/ and test/, or of one folder of class folders.

    Splits go by the names of ``folders.split_folders`` too: valid/, Validation/ and the like. Where there is no val/, a
    part of every class's training images is held out for it; which ones depends on their file names, ``val_fraction``
    and ``seed`` only. A test split may lack classes of the others, and lie there alone.

    Args:
        val_fraction: the part of each class that is held out, rounded, but at least one image and never all.
        clips: a class folder holds folders, each with the frames of a clip.

    Raises:
        InputError: no such folder or split, fewer than two classes, splits with unlike classes, a class without an
            image, or with one that has to be split, a ``val_fraction`` that is not between 0 and 1, or as
            ``folders.list_classes``.
    """
    found = split_folders(folder, clips=clips)
    beside = beside_splits(folder, found.values()) if found else ()
    if split == "test" and "test" not in found:
        fix = "ask for the split val, or sort the images into train/, val/ and test/, each with one folder a class"
        raise InputError(str(folder), "has no test/ folder", fix=fix)
    if found and "train" not in found and split != "test":
        got = f"only {', '.join(item.name for item in found.values())}"
        raise InputError(str(folder), "has no train/ folder", got=got, fix="add train/")
    for other in found if "train" in found else ():
        _check_same_classes(found["train"], found[other], may_lack=other == "test")
    if split in found and (split != "train" or "val" in found):
        sparse = split == "test"
        return _image_set(list_classes(found[split], least=1 if sparse else 2, clips=clips, sparse=sparse), beside)
    if not 0.0 < val_fraction < 1.0:
        raise InputError("val_fraction", "must be between 0 and 1, without them", got=val_fraction)
    source = found.get("train", folder)
    listing = list_classes(source, clips=clips)
    parts = {name: _part(paths, split, val_fraction, seed) for name, paths in listing.by_class.items()}
    return _image_set(replace(listing, by_class=parts), beside)


def draw(folder: Path, count: int, judged: int, *, val_fraction: float = 0.2, seed: int = 0) -> dict[Split, ImageSet]:
    """Up to ``count`` images of train, each as likely as any other, and as val up to ``judged`` others.

    These are val's, and where there are too few of them what is left of train: a small gain shows on many images.

    Raises:
        InputError: as ``open_split``.
    """
    train = open_split(folder, "train", val_fraction=val_fraction, seed=seed)
    val = open_split(folder, "val", val_fraction=val_fraction, seed=seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train)).tolist()
    left = train.at(order[count:])
    others = replace(val, paths=val.paths + left.paths, labels=val.labels + left.labels)
    places = [*rng.permutation(len(val)).tolist(), *range(len(val), len(others))][:judged]
    return {"train": train.at(sorted(order[:count])), "val": others.at(sorted(places))}


def few_shots(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """``shots`` images of each class, in the order of ``images``; with one seed, more shots include the fewer.

    Raises:
        InputError: ``shots`` is below 1, or a class has fewer images.
    """
    if shots < 1:
        raise InputError("shots", "must be at least 1", got=shots)
    labels = np.asarray(images.labels, dtype=np.int64)
    counts = np.bincount(labels, minlength=len(images.classes))
    rarest = int(counts.argmin())
    if counts[rarest] < shots:
        count, where = int(counts[rarest]), f"class {images.classes[rarest]!r}"
        fix = f"ask for at most {count} shots or add images" if count else "add images"
        raise InputError(where, f"needs {shots} images", got=count, fix=fix)
    rng = np.random.default_rng(seed)
    # Whole permutations, so that what one class draws does not depend on ``shots``.
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in range(len(images.classes))]
    return images.at(sorted(int(index) for indices in drawn for index in indices))


def load_set(
    images: ImageSet, preprocess: Preprocess, *, progress: Callable[[int], None] | None = None
) -> tuple[Pixels, NDArray[np.int64]]:
    """Decode every image once: uint8 pixels (n, H, W, 3), of clips (n, frames, H, W, 3), and labels (n,).

    They are in the order of ``images``.

    Args:
        progress: called in this thread, after each image, with the number done so far.

    Raises:
        InputError: files that are no readable images, all of them in one message.
    """
    (loaded,) = load_sets([images], preprocess, progress=progress)
    return loaded


def load_sets(
    sets: Sequence[ImageSet],
    preprocess: Preprocess,
    *,
    into: Sequence[Pixels] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[Pixels, NDArray[np.int64]]]:
    """``load_set`` of several sets, whose unreadable files are told together.

    Args:
        into: where the pixels of each set go; None makes arrays for them.

    Raises:
        InputError: files of any set that are no readable images, all of them in one message.
    """
    pixels = [_empty(images, preprocess) for images in sets] if into is None else list(into)
    bad = _decode(sets, preprocess, pixels, progress)
    if bad:
        raise unreadable(bad, sum(map(len, sets)))
    labels = (np.asarray(images.labels, dtype=np.int64) for images in sets)
    return list(zip(pixels, labels, strict=True))


def load_batches(images: ImageSet, preprocess: Preprocess, batch_size: int) -> Iterator[Pixels]:
    """The pixels of ``load_set`` a few at a time, so that a set may be larger than memory.

    Raises:
        InputError: files that are no readable images, all of them in one message, when the others are decoded; from the
            first of them on no batch is given.
    """
    bad = list[InputError]()
    for start in range(0, len(images), batch_size):
        part = images.at(range(start, min(start + batch_size, len(images))))
        pixels = _empty(part, preprocess)
        bad += _decode([part], preprocess, [pixels], None)
        if not bad:
            yield pixels
    if bad:
        raise unreadable(bad, len(images))


def pixels_shape(images: ImageSet, preprocess: Preprocess) -> tuple[int, ...]:
    """(n, H, W, 3) of the decoded images, of clips (n, frames, H, W, 3)."""
    *frames, channels, height, width = preprocess.input_shape
    return (len(images), *frames, height, width, channels)


def _empty(images: ImageSet, preprocess: Preprocess) -> Pixels:
    return np.empty(pixels_shape(images, preprocess), dtype=np.uint8)


def _decode(
    sets: Sequence[ImageSet], preprocess: Preprocess, pixels: Sequence[Pixels], progress: Callable[[int], None] | None
) -> list[InputError]:
    """Decode every image of ``sets`` into its row of ``pixels``; returns what is wrong with those that cannot be."""
    places = [(number, index) for number, images in enumerate(sets) for index in range(len(images))]

    def fill(place: tuple[int, int]) -> InputError | None:
        number, index = place
        try:
            pixels[number][index] = load_input(sets[number].paths[index], preprocess)
        except InputError as error:
            return error
        return None

    bad = list[InputError]()
    # Pillow releases the interpreter lock while it decodes and resizes, hence threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a limit of our own
        for done, error in enumerate(pool.map(fill, places), start=1):
            bad += [error] if error is not None else []
            if progress is not None:
                progress(done)
    return bad


def batches(pixels: Pixels, preprocess: Preprocess, batch_size: int) -> Iterator[NDArray[np.float32]]:
    """Normalised float32 batches (b, 3, H, W) of pixels (n, H, W, 3), in order; the last one may be smaller.

    Those of clips are (b, frames, 3, H, W).

    Raises:
        InputError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise InputError("batch_size", "must be at least 1", got=batch_size)
    starts = range(0, len(pixels), batch_size)
    return (normalize(pixels[start : start + batch_size], preprocess) for start in starts)


def _check_same_classes(train: Path, other: Path, *, may_lack: bool) -> None:
    expected, actual = ({class_name(item.name) for item in folders_in(folder)} for folder in (train, other))
    unlike = {"missing": sorted(expected - actual), "extra": sorted(actual - expected)}
    if actual - expected or (expected - actual and not may_lack):
        raise InputError(
            str(other),
            "must have the same class folders as train",
            got=" and ".join(f"{word} {', '.join(map(repr, names))}" for word, names in unlike.items() if names),
            fix="add the missing class folders, with images, and remove the extra ones",
        )


def _part(paths: Sequence[Path], split: Split, val_fraction: float, seed: int) -> list[Path]:
    """The images of one class that belong to train or val."""
    if len(paths) < 2:
        fix = "add images or make val/"
        what = "needs two images to be split into train and val"
        raise InputError(str(paths[0].parent), what, got=len(paths), fix=fix)

    def rank(path: Path) -> bytes:
        # A digest, not a random generator: it is the same in every NumPy, and a new file moves few others.
        return hashlib.sha256(f"{seed}/".encode() + os.fsencode(path.name)).digest()

    count = min(max(round(len(paths) * val_fraction), 1), len(paths) - 1)
    held_out = set(sorted(paths, key=rank)[:count])
    return [path for path in paths if (path in held_out) == (split == "val")]


def _image_set(listing: Listing, beside: tuple[PassedOver, ...]) -> ImageSet:
    by_class = listing.by_class
    return ImageSet(
        classes=tuple(by_class),
        paths=tuple(path for paths in by_class.values() for path in paths),
        labels=tuple(label for label, paths in enumerate(by_class.values()) for _ in paths),
        passed_over=(*beside, *listing.passed_over),
    )
