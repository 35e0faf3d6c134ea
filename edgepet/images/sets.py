"""Image folders: which files belong to a split, and their pixels in memory."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgepet.errors import InputError, option
from edgepet.images.preprocess import SUFFIXES, Pixels, load_input, normalize
from edgepet.spec import Preprocess

Split: TypeAlias = Literal["train", "val", "test"]
MOST_NAMED = 20  # unreadable files in one message
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_ByClass: TypeAlias = Mapping[str, Sequence[Path]]  # class name -> its images; both in sorted order


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Image files, or clips' folders, and, for each, its class as an index into ``classes``.

    Ordered by class name, then file name.
    """

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


def open_split(
    folder: Path, split: Split, *, val_fraction: float = 0.2, seed: int = 0, clips: bool = False
) -> ImageSet:
    """List one split of a folder with train/, val/ and test/, or of one folder of class folders.

    Where there is no val/, a part of every class's training images is held out for it; which ones depends on their
    file names, ``val_fraction`` and ``seed`` only. Hidden names and files other than images are passed over.

    Args:
        val_fraction: the part of each class that is held out, rounded, but at least one image and never all.
        clips: a class folder holds folders, each with the frames of a clip.

    Raises:
        InputError: no such folder or split, fewer than two classes, splits with unlike classes, a class without an
            image, or with one that has to be split, or a ``val_fraction`` that is not between 0 and 1.
    """
    found = _split_folders(folder)
    if split in found and (split != "train" or "val" in found):
        return _image_set(_by_class(found[split], clips))
    if split == "test":
        fix = "ask for the split val, or sort the images into train/, val/ and test/, each with one folder a class"
        raise InputError(str(folder), "has no test/ folder", fix=fix)
    if not 0.0 < val_fraction < 1.0:
        raise InputError("val_fraction", "must be between 0 and 1, without them", got=val_fraction)
    source = found.get("train", folder)
    by_class = _by_class(source, clips).items()
    return _image_set({name: _part(source / name, paths, split, val_fraction, seed) for name, paths in by_class})


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
    chosen = sorted(int(index) for indices in drawn for index in indices)
    paths = tuple(images.paths[index] for index in chosen)
    return ImageSet(images.classes, paths, tuple(images.labels[index] for index in chosen))


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
        raise _unreadable(bad, sum(map(len, sets)))
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
        stop = start + batch_size
        part = ImageSet(images.classes, images.paths[start:stop], images.labels[start:stop])
        pixels = _empty(part, preprocess)
        bad += _decode([part], preprocess, [pixels], None)
        if not bad:
            yield pixels
    if bad:
        raise _unreadable(bad, len(images))


def _empty(images: ImageSet, preprocess: Preprocess) -> Pixels:
    *frames, _, height, width = preprocess.input_shape
    return np.empty((len(images), *frames, height, width, 3), dtype=np.uint8)


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


def _unreadable(bad: Sequence[InputError], among: int) -> InputError:
    """One error as it is; several as a list under the folder that holds them all."""
    if len(bad) == 1:
        return bad[0]
    folder = os.path.commonpath([Path(error.where).parent for error in bad])
    lines = [f"  {os.path.relpath(error.where, folder)}: {error.got}" for error in bad[:MOST_NAMED]]
    lines += [f"  and {len(bad) - MOST_NAMED} more"] if len(bad) > MOST_NAMED else []
    told = "\n".join([f"{len(bad)} of {among} images that are not", *lines])
    return InputError(folder, "needs readable images", got=told, fix="replace these files or remove them")


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


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders train/, val/ and test/ that are there; empty for one folder of class folders."""
    names = [item.name for item in _folders(folder)]
    found: dict[str, Path] = {split: folder / split for split in SPLITS if split in names}
    # A class may be called "train": then its folder holds images, and it has neighbours that are no splits.
    if len(found) < len(names) and not ("train" in found and _folders(found["train"])):
        return {}
    if found and "train" not in found:
        raise InputError(str(folder), "has no train/ folder", got=f"only {', '.join(found)}", fix="add train/")
    for split in found:
        _check_same_classes(found["train"], found[split])
    return found


def _check_same_classes(train: Path, other: Path) -> None:
    expected, actual = ({item.name for item in _folders(folder)} for folder in (train, other))
    unlike = {"missing": sorted(expected - actual), "extra": sorted(actual - expected)}
    if expected != actual:
        raise InputError(
            str(other),
            "must have the same class folders as train",
            got=" and ".join(f"{word} {', '.join(map(repr, names))}" for word, names in unlike.items() if names),
            fix="add the missing class folders, with images, and remove the extra ones",
        )


def _by_class(folder: Path, clips: bool) -> _ByClass:
    class_folders = _folders(folder)
    if len(class_folders) < 2:
        fix = "make one folder a class"
        raise InputError(str(folder), "needs at least two class folders", got=len(class_folders), fix=fix)
    return {item.name: _clips(item) if clips else _images(item) for item in class_folders}


def _clips(folder: Path) -> list[Path]:
    clips = _folders(folder)
    if not clips:
        fix = f"put every clip's frames into a folder of its own, or leave out {option('frames')}"
        raise InputError(str(folder), "holds no folder of frames", fix=fix)
    return clips


def _images(folder: Path) -> list[Path]:
    images = [item for item in _visible(folder) if item.suffix.lower() in SUFFIXES and not item.is_dir()]
    if not images:
        raise InputError(str(folder), "holds no image", fix="remove the folder or add images")
    return images


def _folders(folder: Path) -> list[Path]:
    return [item for item in _visible(folder) if item.is_dir()]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted((item for item in folder.iterdir() if not item.name.startswith(".")), key=lambda item: item.name)
    except OSError as error:
        fix = "pass a folder with train/ and val/, or a folder of class folders"
        raise InputError(str(folder), "is not a readable folder", got=error.strerror or str(error), fix=fix) from error


def _part(folder: Path, paths: Sequence[Path], split: Split, val_fraction: float, seed: int) -> list[Path]:
    """The images of one class that belong to train or val."""
    if len(paths) < 2:
        fix = "add images or make val/"
        raise InputError(str(folder), "needs two images to be split into train and val", got=len(paths), fix=fix)

    def rank(path: Path) -> bytes:
        # A digest, not a random generator: it is the same in every NumPy, and a new file moves few others.
        return hashlib.sha256(f"{seed}/".encode() + os.fsencode(path.name)).digest()

    count = min(max(round(len(paths) * val_fraction), 1), len(paths) - 1)
    held_out = set(sorted(paths, key=rank)[:count])
    return [path for path in paths if (path in held_out) == (split == "val")]


def _image_set(by_class: _ByClass) -> ImageSet:
    return ImageSet(
        classes=tuple(by_class),
        paths=tuple(path for paths in by_class.values() for path in paths),
        labels=tuple(label for label, paths in enumerate(by_class.values()) for _ in paths),
    )
