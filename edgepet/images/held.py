"""Decoded images of a training: in memory where they fit, else in memory-mapped files that are made once.

``flowers.pixels`` is a folder beside the pack to come: an ``.npy`` file of each set, and ``pixels.json``, which says of
which files, in which state, they are the pixels. A training that is resumed finds it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepet.canonical import canonical_json
from edgepet.errors import InputError, option
from edgepet.files import new_folder, read_file, refusing, require_only, require_space, write_file
from edgepet.images.preprocess import Pixels
from edgepet.images.sets import ImageSet, load_sets, pixels_shape
from edgepet.spec import Preprocess

MANIFEST = "pixels.json"


def pixels_folder(pack: Path) -> Path:
    """``flowers.pixels`` beside ``flowers.pet``."""
    return pack.with_suffix(".pixels")


def load_held(
    sets: Mapping[str, ImageSet],
    preprocess: Preprocess,
    folder: Path,
    *,
    budget_bytes: int,
    anywhere: Callable[[bool], bool] = bool,
    makes: bool = True,
    wait: Callable[[], None] = lambda: None,
    stage: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[Pixels, NDArray[np.int64]]]:
    """``load_sets`` by name; above ``budget_bytes`` the pixels are mapped from ``folder``, which is made if need be.

    Args:
        anywhere: whether something is so in any of several processes: all must take the same turn.
        makes: whether this process makes the folder; the others ``wait`` for it.
        stage: told when images are decoded into files.

    Raises:
        InputError: as ``load_sets``; the disk has no room, or the folder is somebody's own.
    """
    shapes = {name: pixels_shape(images, preprocess) for name, images in sets.items()}
    size = sum(math.prod(shape) for shape in shapes.values())
    if not anywhere(size > budget_bytes):
        return dict(zip(sets, load_sets(list(sets.values()), preprocess), strict=True))
    told = canonical_json({"preprocess": asdict(preprocess), "sets": {n: _state(each) for n, each in sets.items()}})
    key = canonical_json({"format": "edgepet-pixels", "sha256": hashlib.sha256(told).hexdigest()})
    if makes and not _is_of(folder, key):
        stage(f"decode {sum(map(len, sets.values()))} images into {folder}, {size / 1e9:.1f} GB")
        require_space(folder, size, f"decoded images that {option('memory')} does not hold")
        with new_folder(folder, only=(MANIFEST, *map(_file, sets))) as scratch:
            mapped = [_made(scratch / _file(name), shapes[name], folder) for name in sets]
            load_sets(list(sets.values()), preprocess, into=mapped)
            with refusing(folder, "could not be written"):
                for pixels in mapped:
                    pixels.flush()
            write_file(scratch / MANIFEST, key)
    wait()
    return {
        name: (_mapped(folder / _file(name), shapes[name]), np.asarray(images.labels, dtype=np.int64))
        for name, images in sets.items()
    }


def forget(folder: Path) -> None:
    """Remove what ``load_held`` made of train and val: the pack is there. A folder with anything else stays."""
    with contextlib.suppress(InputError):
        if (folder / MANIFEST).is_file():
            require_only(folder, (MANIFEST, *map(_file, ("train", "val"))))
            shutil.rmtree(folder, ignore_errors=True)


def _file(name: str) -> str:
    return f"{name}.npy"


def _state(images: ImageSet) -> list[list[object]]:
    """Each file's path, size and time of change; of a clip those of its frames."""
    told: list[list[object]] = []
    for path in images.paths:
        with refusing(path, "could not be read"):
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                status = file.stat()
                told.append([str(file.absolute()), status.st_size, status.st_mtime_ns])
    return told


def _is_of(folder: Path, key: bytes) -> bool:
    try:
        return read_file(folder / MANIFEST) == key
    except InputError:
        return False


def _made(path: Path, shape: tuple[int, ...], folder: Path) -> np.memmap[Any, np.dtype[np.uint8]]:
    """A new file of ``folder``, mapped, whose room on the disk is taken: a mapped file cannot say that it is full.

    Raises:
        InputError: it could not be.
    """
    with refusing(folder, "could not be written"):
        pixels = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return pixels


def _mapped(path: Path, shape: tuple[int, ...]) -> Pixels:
    """Copy-on-write, as torch wants arrays: nothing writes to them."""
    try:
        pixels: Pixels = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise _damaged(path, f"{pixels.dtype} {pixels.shape}")
    return pixels


def _damaged(path: Path, got: str) -> InputError:
    return InputError(str(path), "is not as it was written", got=got, fix=f"delete {path.parent}")
