"""What somebody wants an answer for: image files, folders of them at any depth, patterns; a clip is a folder."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from edgepet.errors import InputError
from edgepet.images.folders import images_below
from edgepet.spec import FilePath


def inputs_of(given: Iterable[FilePath], *, clips: bool = False) -> tuple[Path, ...]:
    """The images that ``given`` names, in that order, those of a folder or a pattern sorted; each is named once.

    Whether a file that was named is there is seen when it is read.

    Raises:
        InputError: a folder or a pattern without an image.
    """
    return tuple(dict.fromkeys(path for each in given for path in _named(str(each), clips=clips)))


def _named(text: str, *, clips: bool) -> list[Path]:
    path = Path(text)
    if path.exists() or not glob.has_magic(text):
        found = _in(path, clips=clips)
        what = "holds no folder of frames" if clips else "holds no image"
    else:
        names = sorted(glob.glob(text, recursive=True))  # noqa: PTH207  a pattern may begin at the root
        found = [each for name in names for each in _in(Path(name), clips=clips)]
        what = "matches no folder of frames" if clips else "matches no image"
    if not found:
        raise InputError(text, what, fix="name other files")
    return found


def _in(path: Path, *, clips: bool) -> list[Path]:
    """The images below a folder; a clip, or the clips in a folder; anything else is itself."""
    if not path.is_dir():
        return [path]
    images = images_below(path)
    return sorted({image.parent for image in images}) if clips else images
