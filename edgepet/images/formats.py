"""Which image files are read: chosen by suffix in a folder, known by content when one is opened."""

from __future__ import annotations

import contextlib
import importlib
from functools import lru_cache
from pathlib import PurePath

from PIL import Image

# A closed list: left alone, Pillow hands a PostScript file called photo.png to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".pjpeg", ".png", ".pnm", ".ppm",
     ".tif", ".tiff", ".webp"}
)  # fmt: skip

# Read where Pillow has a plug-in: suffix -> its format, and what brings it.
_PLUGGED = {
    ".avif": ("AVIF", "Pillow 11.3"),
    ".heic": ("HEIF", "pillow-heif"),
    ".heif": ("HEIF", "pillow-heif"),
    ".hif": ("HEIF", "pillow-heif"),
}


def plugged_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that plug-ins read here; to find them takes a tenth of a second, once."""
    return tuple(sorted({_PLUGGED[suffix][0] for suffix in plugged()}))


def is_image(path: PurePath) -> bool:
    """Whether a file is read as an image, by its suffix in any case."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (suffix in _PLUGGED and suffix in plugged())


def lacks(path: PurePath) -> str | None:
    """The package that reads files of this suffix, where it is an image's and none here does; else None."""
    suffix = path.suffix.lower()
    return _PLUGGED[suffix][1] if suffix in _PLUGGED and suffix not in plugged() else None


@lru_cache(maxsize=1)
def plugged() -> frozenset[str]:
    """The suffixes that a plug-in of Pillow reads here."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, (kind, _) in _PLUGGED.items() if known.get(suffix) == kind)
