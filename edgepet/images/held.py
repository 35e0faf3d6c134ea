"""Arrays of a training, decoded images above all: in memory where they fit, else in mapped files that are made once.

``flowers.pixels`` is a folder beside the pack to come: an ``.npy`` file of each set, and ``pixels.json``, which says of
which files, in which state, they are the pixels. A training that is resumed finds it again. What a network's first
blocks make of them lies in ``flowers.features`` in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepet.canonical import canonical_json
from edgepet.errors import InputError, option, refusing
from edgepet.files import new_folder, read_file, require_only, require_space, write_file
from edgepet.images.preprocess import Pixels
from edgepet.images.sets import ImageSet, load_sets, pixels_shape
from edgepet.spec import NpArray, Preprocess


def pixels_folder(pack: Path) -> Path:
    """``flowers.pixels`` beside ``flowers.pet``."""
    return pack.with_suffix(".pixels")


def features_folder(pack: Path) -> Path:
    """``flowers.features`` beside ``flowers.pet``."""
    return pack.with_suffix(".features")


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape and dtype of an array that is still to be made."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What several processes do together: ``anywhere`` is whether something is so in any of them, as all must take the
    same turn. The one that ``makes`` writes files, for which the others ``wait``.
    """

    anywhere: Callable[[bool], bool] = bool
    makes: bool = True
    wait: Callable[[], None] = lambda: None


ALONE = Turn()


def hold(
    shapes: Mapping[str, Shape],
    fill: Callable[[list[NpArray]], None],
    folder: Path,
    identity: Mapping[str, object],
    *,
    budget_bytes: int,
    turn: Turn = ALONE,
    what: str,
    starts: Callable[[str], None] = lambda place: None,
) -> dict[str, NpArray]:
    """Arrays of these ``shapes``, made by ``fill``; above ``budget_bytes`` they are mapped from files in ``folder``.

    Files that are there are used again where they were made under the same ``identity``.

    Args:
        fill: writes the numbers into empty arrays, in the order of ``shapes``.
        folder: its suffix is the kind of what is kept, as in ``flowers.pixels``.
        identity: plain JSON that decides the numbers.
        what: what messages call them.
        starts: told when files are made, where, and how large they are.

    Raises:
        InputError: as ``fill``; the disk has no room, or the folder is somebody's own.
    """
    size = sum(shape.size_bytes for shape in shapes.values())
    if not turn.anywhere(size > budget_bytes):
        arrays = {name: np.empty(each.shape, each.dtype) for name, each in shapes.items()}
        fill(list(arrays.values()))
        return arrays
    key = canonical_json(
        {"format": f"edgepet-{_kind(folder)}", "sha256": hashlib.sha256(canonical_json(identity)).hexdigest()}
    )
    if turn.makes and not _is_of(folder, key):
        starts(f"{folder}, {size / 1e9:.1f} GB")
        require_space(folder, size, f"{what} that {option('memory')} does not hold")
        with new_folder(folder, only=(_manifest(folder), *map(_file, shapes))) as scratch:
            mapped = [_made(scratch / _file(name), each, folder) for name, each in shapes.items()]
            fill(list(mapped))
            with refusing(folder, "could not be written"):
                for array in mapped:
                    array.flush()
            write_file(scratch / _manifest(folder), key)
    turn.wait()
    return {name: _mapped(folder / _file(name), each) for name, each in shapes.items()}


def load_held(
    sets: Mapping[str, ImageSet],
    preprocess: Preprocess,
    folder: Path,
    *,
    budget_bytes: int,
    turn: Turn = ALONE,
    stage: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[Pixels, NDArray[np.int64]]]:
    """``load_sets`` by name; above ``budget_bytes`` the pixels are mapped from ``folder``, which is made if need be.

    Raises:
        InputError: as ``load_sets``; the disk has no room, or the folder is somebody's own.
    """

    def fill(arrays: list[NpArray]) -> None:
        load_sets(list(sets.values()), preprocess, into=arrays)

    pixels = hold(
        {name: Shape(pixels_shape(images, preprocess), "uint8") for name, images in sets.items()},
        fill,
        folder,
        {"preprocess": asdict(preprocess), "sets": {name: _state(images) for name, images in sets.items()}},
        budget_bytes=budget_bytes,
        turn=turn,
        what="decoded images",
        starts=lambda place: stage(f"decode {sum(map(len, sets.values()))} images into {place}"),
    )
    return {name: (pixels[name], np.asarray(images.labels, dtype=np.int64)) for name, images in sets.items()}


def forget(folder: Path) -> None:
    """Remove what ``hold`` made of train and val: the pack is there. A folder with anything else stays."""
    with contextlib.suppress(InputError):
        if (folder / _manifest(folder)).is_file():
            require_only(folder, (_manifest(folder), *map(_file, ("train", "val"))))
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


def _kind(folder: Path) -> str:
    return folder.suffix.removeprefix(".")


def _manifest(folder: Path) -> str:
    return f"{_kind(folder)}.json"


def _is_of(folder: Path, key: bytes) -> bool:
    try:
        return read_file(folder / _manifest(folder)) == key
    except InputError:
        return False


def _made(path: Path, each: Shape, folder: Path) -> np.memmap[Any, np.dtype[Any]]:
    """A new file of ``folder``, mapped, whose room on the disk is taken: a mapped file cannot say that it is full.

    Raises:
        InputError: it could not be.
    """
    with refusing(folder, "could not be written"):
        array = np.lib.format.open_memmap(path, "w+", np.dtype(each.dtype), each.shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _mapped(path: Path, each: Shape) -> NpArray:
    """Copy-on-write, as torch wants arrays: nothing writes to them."""
    try:
        array: NpArray = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if array.shape != each.shape or array.dtype != np.dtype(each.dtype):
        raise _damaged(path, f"{array.dtype} {array.shape}")
    return array


def _damaged(path: Path, got: str) -> InputError:
    return InputError(str(path), "is not as it was written", got=got, fix=f"delete {path.parent}")
