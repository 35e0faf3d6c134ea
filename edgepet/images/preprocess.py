"""One image becomes the network's input, in Pillow and NumPy, byte for byte as timm's evaluation transform does it.

timm leaves a photograph as the camera held it; with ``orientation="exif"`` it is turned upright first.

Source: ``timm.data.create_transform(..., is_training=False)`` and torchvision's ``Resize`` and ``CenterCrop`` on
Pillow images, timm 1.0.
"""

from __future__ import annotations

import contextlib
import math
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgepet.errors import InputError, refusing
from edgepet.images.formats import FORMATS, is_image, plugged_formats
from edgepet.spec import Preprocess

Pixels: TypeAlias = NDArray[np.uint8]  # (..., height, width, 3), RGB

# What Pillow's decoders raise on damaged bytes; they have no common base. RuntimeError is AVIF's and HEIF's.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)

# A file of 1 x 100000 pixels takes a hundred bytes, and gigabytes once its short side is 224.
_MOST_RESIZED_PIXELS = 100_000_000

# A file of a few kilobytes may decode to gigabytes. Large ones are decoded one at a time, whatever the threads.
MOST_PIXELS, LARGE_PIXELS = 100_000_000, 16_000_000
_LARGE = threading.Lock()

# Pillow's own conversion of these to RGB clips: all of a 16-bit photograph turns white.
_WIDE = dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), "16-bit") | {"I": "32-bit", "F": "floating-point"}

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# EXIF's tag, the formats of whole numbers that it may have, and what undoes each of its values, 1 being upright.
_ORIENTATION, _NUMBERS = 274, {3: "H", 4: "L"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_pixels(path: Path, preprocess: Preprocess) -> Pixels:
    """Decode, turn, resize and crop one file to (height, width, 3), uint8 RGB; the first frame is taken.

    Raises:
        InputError: the file is missing, damaged or no image, has more than 8 bits a channel or ``MOST_PIXELS``, or is
            so elongated that resizing it would fill the memory.
    """
    return _fitted(_loaded(path, preprocess), preprocess)


def load_upright(path: Path, preprocess: Preprocess) -> Pixels:
    """All of a file's picture as it is seen, (height, width, 3); raises as ``load_pixels``."""
    return np.array(_loaded(path, preprocess), dtype=np.uint8)


def _loaded(path: Path, preprocess: Preprocess) -> Image.Image:
    """A file's picture in RGB, turned, which can be resized."""
    with opened(path) as file:
        if file.mode in _WIDE:
            told = "16-bit" if file.format == "PPM" else _WIDE[file.mode]  # Pillow widens these
            raise _unreadable(path, f"{told} values, which would be cut off at 255")
        with _LARGE if file.width * file.height > LARGE_PIXELS else contextlib.nullcontext():
            image = _rgb(file, preprocess)
    height, width = resized(image.height, image.width, preprocess)
    if height * width > _MOST_RESIZED_PIXELS:
        raise InputError(
            str(path),
            f"must fit {_MOST_RESIZED_PIXELS} pixels when resized",
            got=f"{image.width} x {image.height} resized to {width} x {height}",
            fix="crop the image or remove it",
        )
    return image


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file while the block runs, which may decode it: what Pillow says of damage is an input error.

    Raises:
        InputError: the file is missing, damaged or no image, or has more than ``MOST_PIXELS``.
    """
    try:
        if stat.S_IFMT(path.stat().st_mode) != stat.S_IFREG:
            raise _unreadable(path, "a folder, a pipe or a device")
        with _opened(path) as file:
            _require_size(path, file)
            yield file
    except UnidentifiedImageError as error:
        raise _unreadable(path, "bytes of no known image format") from error
    except _DAMAGED as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error)) from error


def upright_size(path: Path, preprocess: Preprocess, *, decode: bool = False) -> tuple[int, int]:
    """Height and width of an image as it is seen: turned where ``preprocess`` says so.

    If its pixels are not to be decoded, a turn is missed that a PNG says behind them, or that Pillow makes of a TIFF.

    Raises:
        InputError: as ``opened``.
    """
    with opened(path) as file:
        if decode:
            file.load()
        height, width = file.height, file.width
        sideways = preprocess.orientation == "exif" and file.format != "TIFF" and _orientation(file) >= 5
    return (width, height) if sideways else (height, width)


def _require_size(path: Path, file: Image.Image) -> None:
    if file.width * file.height > MOST_PIXELS:
        what, got = f"must have at most {MOST_PIXELS} pixels", f"{file.width} x {file.height}"
        raise InputError(str(path), what, got=got, fix="make the image smaller or remove it")


def load_clip(folder: Path, preprocess: Preprocess) -> Pixels:
    """``preprocess.frames`` of the images in a folder, spread evenly in the order of their names: (frames, H, W, 3).

    The clip is cut into as many parts as there are frames, and the image in the middle of each is taken, as
    ST-Adapter's evaluation does; a clip that is shorter repeats images.

    Raises:
        InputError: the folder cannot be read or holds no image, or one of them is damaged.
    """
    with refusing(folder, "is not a readable folder of frames"):
        files = sorted(
            file for file in folder.iterdir() if is_image(file) and file.name[0] != "." and not file.is_dir()
        )
    if not files:
        raise InputError(str(folder), "holds no image", fix="put the frames of a clip there, named in their order")
    chosen = [files[(2 * i + 1) * len(files) // (2 * preprocess.frames)] for i in range(preprocess.frames)]
    loaded = {file: load_pixels(file, preprocess) for file in set(chosen)}
    return np.stack([loaded[file] for file in chosen])


def load_input(path: Path, preprocess: Preprocess) -> Pixels:
    """The pixels of an image file, or of a clip's folder; raises as ``load_pixels`` and ``load_clip`` do."""
    return load_pixels(path, preprocess) if preprocess.frames == 1 else load_clip(path, preprocess)


def to_pixels(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """Turn, resize and crop a decoded image of any mode to (height, width, 3); ``image`` is not modified.

    Raises:
        InputError: its values are wider than 8 bits.
    """
    return _fitted(_turned(image, preprocess), preprocess)


def to_upright(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """All of a decoded image as it is seen, (height, width, 3); else as ``to_pixels``."""
    return np.array(_turned(image, preprocess), dtype=np.uint8)


def _turned(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    if image.mode in _WIDE:
        told = f"{_WIDE[image.mode]} values, which would be cut off at 255"
        raise InputError("image", "must have 8 bits a channel", got=told, fix="scale it to 8 bits a channel")
    return _rgb(image, preprocess)


def _fitted(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """An upright RGB image, resized and cropped."""
    height, width = resized(image.height, image.width, preprocess)
    image = image.resize((width, height), _RESAMPLING[preprocess.interpolation])
    crop_height, crop_width = preprocess.image_size
    top, left = crop_start(height, crop_height), crop_start(width, crop_width)
    return np.array(image.crop((left, top, left + crop_width, top + crop_height)), dtype=np.uint8)


def normalize(pixels: Pixels, preprocess: Preprocess) -> NDArray[np.float32]:
    """(x / 255 - mean) / std: (..., H, W, 3) becomes a new contiguous (..., 3, H, W).

    Each step is rounded to float32 as torchvision's ``Normalize`` rounds it, so the values are equal, not just close.
    """
    values = np.ascontiguousarray(np.moveaxis(pixels, -1, -3), dtype=np.float32)
    values /= np.float32(255)
    values -= np.asarray(preprocess.mean, dtype=np.float32)[:, None, None]
    values /= np.asarray(preprocess.std, dtype=np.float32)[:, None, None]
    return values


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        if not plugged_formats():
            raise
        return Image.open(path, formats=plugged_formats())


def _rgb(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """A new RGB image, turned where ``preprocess`` says so."""
    image.load()  # a TIFF is turned by Pillow itself then, and a PNG may say its orientation behind its pixels
    turn = _TURNS.get(_orientation(image)) if preprocess.orientation == "exif" else None
    if isinstance(image.info.get("transparency"), bytes):
        # ``convert`` drops a palette's alpha table, as timm's loader lets it, but with a warning.
        image = image.copy()
        del image.info["transparency"]
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Tag 274 of the first directory of an image's EXIF data; 1, upright, where there is none that can be read.

    Not by Pillow, which warns of damaged data: in a thread that cannot be silenced.
    """
    data = bytes(image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return 1
    with contextlib.suppress(struct.error):  # an offset leads outside
        (start,) = struct.unpack_from(f"{order}L", data, 4)
        (entries,) = struct.unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHL", data, place)
            if tag == _ORIENTATION and kind in _NUMBERS and count == 1:
                return int(struct.unpack_from(f"{order}{_NUMBERS[kind]}", data, place + 8)[0])
    return 1


def resized(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """The (height, width) before the crop, with the rounding of timm's three branches."""
    to_height, to_width = (math.floor(edge / preprocess.crop_fraction) for edge in preprocess.image_size)
    if preprocess.crop == "squash":
        return to_height, to_width
    if to_height == to_width:  # torchvision's Resize(int) truncates the long side
        if width <= height:
            return int(to_width * height / width), to_width
        return to_height, int(to_height * width / height)
    ratio = min(height / to_height, width / to_width)  # timm's ResizeKeepRatio rounds both
    return round(height / ratio), round(width / ratio)


def crop_start(edge: int, crop: int) -> int:
    """Where a centre crop starts; negative where the image is smaller, which ``Image.crop`` fills with black."""
    return -((crop - edge) // 2) if crop > edge else round((edge - crop) / 2)


def _unreadable(path: Path, got: str) -> InputError:
    fix = "scale it to 8 bits a channel" if "cut off" in got else "replace the file or remove it"
    return InputError(str(path), "is not a readable image", got=got, fix=fix)
