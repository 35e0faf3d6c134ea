"""One image becomes the network's input, in Pillow and NumPy, byte for byte as timm's evaluation transform does it.

Source: ``timm.data.create_transform(..., is_training=False)`` and torchvision's ``Resize`` and ``CenterCrop`` on
Pillow images, timm 1.0.
"""

from __future__ import annotations

import contextlib
import math
import stat
import struct
import threading
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgepet.errors import InputError
from edgepet.files import refusing
from edgepet.spec import Preprocess

Pixels: TypeAlias = NDArray[np.uint8]  # (..., height, width, 3), RGB

# A closed list: left alone, Pillow hands a PostScript file called photo.png to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# What Pillow's decoders raise on damaged bytes; they have no common base.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

# A file of 1 x 100000 pixels takes a hundred bytes, and gigabytes once its short side is 224.
_MOST_RESIZED_PIXELS = 100_000_000

# A file of a few kilobytes may decode to gigabytes. Large ones are decoded one at a time, whatever the threads.
MOST_PIXELS, LARGE_PIXELS = 100_000_000, 16_000_000
_LARGE = threading.Lock()

# Pillow's own conversion of these to RGB clips: all of a 16-bit photograph turns white.
_WIDE = dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), "16-bit") | {"I": "32-bit", "F": "floating-point"}

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def load_pixels(path: Path, preprocess: Preprocess) -> Pixels:
    """Decode, resize and crop one file to (height, width, 3), uint8 RGB.

    The first frame is taken, and EXIF orientation is left as timm leaves it: not applied.

    Raises:
        InputError: the file is missing, damaged or no image, has more than 8 bits a channel or ``MOST_PIXELS``, or is
            so elongated that resizing it would fill the memory.
    """
    try:
        if stat.S_IFMT(path.stat().st_mode) != stat.S_IFREG:
            raise _unreadable(path, "a folder, a pipe or a device")
        with Image.open(path, formats=_FORMATS) as file:
            _require_size(path, file)
            if file.mode in _WIDE:
                told = "16-bit" if file.format == "PPM" else _WIDE[file.mode]  # Pillow widens these
                raise _unreadable(path, f"{told} values, which would be cut off at 255")
            with _LARGE if file.width * file.height > LARGE_PIXELS else contextlib.nullcontext():
                image = _rgb(file)
    except UnidentifiedImageError as error:
        raise _unreadable(path, "bytes of no known image format") from error
    except _DAMAGED as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error)) from error
    height, width = _resized(image.height, image.width, preprocess)
    if height * width > _MOST_RESIZED_PIXELS:
        raise InputError(
            str(path),
            f"must fit {_MOST_RESIZED_PIXELS} pixels when resized",
            got=f"{image.width} x {image.height} resized to {width} x {height}",
            fix="crop the image or remove it",
        )
    return to_pixels(image, preprocess)


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
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if not files:
        raise InputError(str(folder), "holds no image", fix="put the frames of a clip there, named in their order")
    chosen = [files[(2 * i + 1) * len(files) // (2 * preprocess.frames)] for i in range(preprocess.frames)]
    loaded = {file: load_pixels(file, preprocess) for file in set(chosen)}
    return np.stack([loaded[file] for file in chosen])


def load_input(path: Path, preprocess: Preprocess) -> Pixels:
    """The pixels of an image file, or of a clip's folder; raises as ``load_pixels`` and ``load_clip`` do."""
    return load_pixels(path, preprocess) if preprocess.frames == 1 else load_clip(path, preprocess)


def to_pixels(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """Resize and crop a decoded image of any mode to (height, width, 3); ``image`` is not modified.

    Raises:
        InputError: its values are wider than 8 bits.
    """
    if image.mode in _WIDE:
        told = f"{_WIDE[image.mode]} values, which would be cut off at 255"
        raise InputError("image", "must have 8 bits a channel", got=told, fix="scale it to 8 bits a channel")
    image = _rgb(image)
    height, width = _resized(image.height, image.width, preprocess)
    image = image.resize((width, height), _RESAMPLING[preprocess.interpolation])
    crop_height, crop_width = preprocess.image_size
    top, left = _crop_start(height, crop_height), _crop_start(width, crop_width)
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


def _rgb(image: Image.Image) -> Image.Image:
    if isinstance(image.info.get("transparency"), bytes):
        # ``convert`` drops a palette's alpha table, as timm's loader lets it, but with a warning.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _resized(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
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


def _crop_start(edge: int, crop: int) -> int:
    """Where a centre crop starts; negative where the image is smaller, which ``Image.crop`` fills with black."""
    return -((crop - edge) // 2) if crop > edge else round((edge - crop) / 2)


def _unreadable(path: Path, got: str) -> InputError:
    fix = "scale it to 8 bits a channel" if "cut off" in got else "replace the file or remove it"
    return InputError(str(path), "is not a readable image", got=got, fix=fix)
