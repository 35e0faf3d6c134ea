"""The masks of images: a class for every pixel, read when they are asked for, and checked all at once.

A mask that is read is uint8 (height, width) as large as its image: the number of a class, or 255 where a pixel is not
counted. None is kept: a thousand of them would fill the memory, and decoding one takes a millisecond or two.
"""

from __future__ import annotations

import colorsys
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgepet.errors import InputError, refusing
from edgepet.images.folders import MOST_NAMED, PassedOver
from edgepet.images.preprocess import opened, upright_size
from edgepet.images.sets import ImageSet
from edgepet.spec import Preprocess

Mask: TypeAlias = NDArray[np.uint8]  # (height, width)

NOT_COUNTED = 255
MOST_CLASSES = 255  # a byte a pixel, and one value that is not counted
_INDEXED = ("P", "L", "1")  # Pillow's modes of one whole number a pixel
_LOSSY = ("JPEG", "WEBP")  # WEBP may be either: numbers in it cannot be trusted
_FEW_VALUES = 5  # in a message
_COVER = 0.5  # what of a picture a mask's colours hide


class Masked(Protocol):
    """Where a mask comes from; ``where`` is the file that messages name."""

    @property
    def where(self) -> Path:
        """The file of the mask, or what it is drawn from."""

    def read(self) -> Mask:
        """The mask.

        Raises:
            InputError: it cannot be read, or holds what is no class.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Numbering:
    """What the values of index images stand for: ``classes[value]`` is a class, 255 not counted, or −1 no value at all.

    ``told`` are the values that are some, in words.
    """

    classes: NDArray[np.int16]  # (256,)
    told: str

    @classmethod
    def from_zero(cls, count: int) -> Numbering:
        """Class numbers from 0, and 255 where a pixel is not counted."""
        table = np.full(256, -1, np.int16)
        table[:count] = np.arange(count)
        table[NOT_COUNTED] = NOT_COUNTED
        return cls(table, f"class numbers from 0 to {count - 1}, and 255 where nothing counts")

    @classmethod
    def from_one(cls, count: int) -> Numbering:
        """Class numbers from 1, and 0 where a pixel is not counted, as ADE20K has them."""
        table = np.full(256, -1, np.int16)
        table[0] = NOT_COUNTED
        table[1 : count + 1] = np.arange(count)
        return cls(table, f"class numbers from 1 to {count}, and 0 where nothing counts")


@dataclass(frozen=True, slots=True)
class MaskFile:
    """An index image: a palette or grey image of 8 bits whose values are numbers; a palette's colours do not count."""

    where: Path
    numbering: Numbering = field(compare=False)

    def read(self) -> Mask:
        """The mask, as of ``Masked``."""
        with opened(self.where) as image:
            if image.mode not in _INDEXED or image.format in _LOSSY:
                told = image.mode if image.mode not in _INDEXED else f"{image.format}, which does not keep numbers"
                fix = "save it as PNG with one number a pixel, that of its class"
                raise InputError(str(self.where), "must be an index image of 8 bits", got=told, fix=fix)
            values = np.asarray(image, dtype=np.uint8)
        classes = self.numbering.classes[values]
        if classes.min() < 0:
            unknown = np.unique(values[classes < 0])
            more = f" and {len(unknown) - _FEW_VALUES} more" if len(unknown) > _FEW_VALUES else ""
            got = ", ".join(map(str, unknown[:_FEW_VALUES])) + more
            fix = "name every class, or give these pixels the value of those that are not counted"
            raise InputError(str(self.where), f"must hold {self.numbering.told}", got=got, fix=fix)
        return classes.astype(np.uint8)


@dataclass(frozen=True, slots=True)
class MaskSet:
    """Image files and, for each, where its mask comes from; ``classes`` are the names of what masks hold, from 0.

    Ordered by the images' names. ``passed_over`` is what lies among them and is not used.
    """

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    masks: tuple[Masked, ...]
    passed_over: tuple[PassedOver, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def images(self) -> ImageSet:
        """The images alone; none has a class of its own."""
        return ImageSet(self.classes, self.paths, (0,) * len(self.paths), self.passed_over)

    def at(self, indices: Iterable[int]) -> MaskSet:
        """Those of its images that ``indices`` name, in their order."""
        chosen = tuple(indices)
        paths = tuple(self.paths[index] for index in chosen)
        return replace(self, paths=paths, masks=tuple(self.masks[index] for index in chosen))


def read_masks(masks: Sequence[Masked], size: tuple[int, int]) -> Mask:
    """Masks (n, height, width) at one size, in their order; each pixel is that of the nearest one.

    Raises:
        InputError: one cannot be read any more.
    """
    out = np.empty((len(masks), *size), np.uint8)
    for row, mask in zip(out, masks, strict=True):
        row[:] = resized(mask.read(), size)
    return out


def resized(mask: Mask, size: tuple[int, int]) -> Mask:
    """``mask`` at (height, width), a new array: the value at the nearest middle, never one between two."""
    image = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.array(image, dtype=np.uint8)


def squashed(preprocess: Preprocess) -> Preprocess:
    """``preprocess`` with all of an image in the input: a crop would lose pixels that want an answer."""
    return replace(preprocess, crop="squash", crop_fraction=1.0)


def check_masks(
    images: MaskSet, preprocess: Preprocess, *, progress: Callable[[int], None] | None = None
) -> NDArray[np.int64]:
    """Read every mask once, compare it with its image, and count the pixels of each class, (classes,).

    Args:
        progress: called after each mask, with the number done so far.

    Raises:
        InputError: a mask that cannot be read, is no index image, holds what is no class or is not as large as its
            image; all of them in one message.
    """
    counts, bad = np.zeros(len(images.classes), np.int64), list[InputError]()

    def look(index: int) -> NDArray[np.int64] | InputError:
        try:
            mask = images.masks[index].read()
            _require_size(images.paths[index], images.masks[index], mask, preprocess)
        except InputError as error:
            return error
        return np.bincount(mask.reshape(-1), minlength=NOT_COUNTED + 1)[: len(images.classes)]

    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a limit of our own
        for done, found in enumerate(pool.map(look, range(len(images))), start=1):
            if isinstance(found, InputError):
                bad.append(found)
            else:
                counts += found
            if progress is not None:
                progress(done)
    if bad:
        raise joined(bad, len(images))
    return counts


def _require_size(path: Path, source: Masked, mask: Mask, preprocess: Preprocess) -> None:
    height, width = upright_size(path, preprocess)
    if mask.shape != (height, width):
        height, width = upright_size(path, preprocess, decode=True)
    if mask.shape != (height, width):
        what, got = f"must be as large as its image, {width} x {height}", f"{mask.shape[1]} x {mask.shape[0]}"
        raise InputError(str(source.where), what, got=got, fix="draw it on the image itself, or remove both")


def require_classes(counts: NDArray[np.int64], classes: Sequence[str], where: Path) -> list[str]:
    """The classes of which no training pixel is counted, where at least two others have some.

    Raises:
        InputError: fewer than two classes have a pixel: masks of 0 and 255 for two classes look so.
    """
    absent = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if len(classes) - len(absent) < 2:
        got = f"pixels of {', '.join(repr(name) for name in classes if name not in absent) or 'none'}"
        fix = "give classes the numbers from 0, in the order of their names; 255 is not counted"
        raise InputError(str(where), "needs training masks with two classes", got=got, fix=fix)
    return absent


def joined(bad: Sequence[InputError], among: int, what: str = "needs masks that fit their images") -> InputError:
    """One error as it is; several as a list under the folder that holds them all, which needs ``what``."""
    if len(bad) == 1:
        return bad[0]
    folder = os.path.commonpath([Path(error.where).parent for error in bad])
    lines = [f"  {os.path.relpath(error.where, folder)}: {error.what}, got {error.got}" for error in bad[:MOST_NAMED]]
    lines += [f"  and {len(bad) - MOST_NAMED} more"] if len(bad) > MOST_NAMED else []
    told = "\n".join([f"{len(bad)} of {among} that are not", *lines])
    return InputError(folder, what, got=told, fix="replace these files or remove them")


def write_mask(path: Path, mask: Mask, colours: Sequence[tuple[int, int, int]]) -> None:
    """An index PNG of ``mask``: value n is class n, shown in ``colours[n]``, and 255 in none of them, magenta.

    Raises:
        InputError: the file cannot be written.
    """
    with refusing(path, "could not be written"):
        path.write_bytes(mask_png(mask, colours))


def mask_png(mask: Mask, colours: Sequence[tuple[int, int, int]]) -> bytes:
    """As ``write_mask``, the bytes of the file."""
    image = Image.fromarray(mask).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    table = [value for colour in colours[:NOT_COUNTED] for value in colour]
    image.putpalette(table + [0] * (3 * NOT_COUNTED - len(table)) + [255, 0, 255])
    made = io.BytesIO()
    image.save(made, format="PNG")
    return made.getvalue()


def overlay_png(picture: NDArray[np.uint8], mask: Mask, colours: Sequence[tuple[int, int, int]]) -> bytes:
    """A PNG of ``picture`` (height, width, 3) under the colours of ``mask``, which is as large."""
    table = np.array([*colours, *[(255, 0, 255)] * (NOT_COUNTED + 1 - len(colours))], np.float32)
    mixed = (1 - _COVER) * picture + _COVER * table[mask]
    made = io.BytesIO()
    Image.fromarray(mixed.round().astype(np.uint8)).save(made, format="PNG")
    return made.getvalue()


def class_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """A colour for each of ``count`` classes, told apart as well as so many can be: hues a golden angle apart."""
    hues = [(0.61803398875 * number) % 1 for number in range(count)]
    return tuple(
        (round(255 * red), round(255 * green), round(255 * blue))
        for number, hue in enumerate(hues)
        for red, green, blue in [colorsys.hsv_to_rgb(hue, 0.85 - 0.25 * (number % 3 == 2), 0.95 - 0.3 * (number % 2))]
    )
