"""What somebody wants an answer for: image files, folders of them at any depth, patterns, pictures in memory; a clip is
a folder of frames.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from edgepet.canonical import parse_json
from edgepet.errors import InputError
from edgepet.images.folders import images_below
from edgepet.images.preprocess import Pixels, load_input, load_upright, to_pixels, to_upright, upright_size
from edgepet.spec import FilePath, NpArray, Preprocess

Picture: TypeAlias = "FilePath | Image.Image | NpArray"  # a file, or a decoded one; an array is uint8 (H, W, 3), RGB


@dataclass(frozen=True, slots=True)
class Input:
    """One picture, and what it is called: the name of its file, else its number."""

    name: str
    picture: Picture

    def pixels(self, preprocess: Preprocess) -> Pixels:
        """As the network takes them, (H, W, 3), or (frames, H, W, 3) of a clip.

        Raises:
            InputError: it cannot be read, or is no picture.
        """
        if isinstance(self.picture, (str, Path)):
            return load_input(Path(self.picture), preprocess)
        return to_pixels(self._decoded(preprocess), preprocess)

    def upright(self, preprocess: Preprocess) -> Pixels:
        """All of the picture as it is seen, (height, width, 3). Raises as ``pixels``."""
        if isinstance(self.picture, (str, Path)):
            return load_upright(Path(self.picture), preprocess)
        return to_upright(self._decoded(preprocess), preprocess)

    def upright_size(self, preprocess: Preprocess) -> tuple[int, int]:
        """Height and width of what ``upright`` gives. Raises as ``pixels``."""
        if isinstance(self.picture, (str, Path)):
            return upright_size(Path(self.picture), preprocess, decode=True)
        height, width, _ = self.upright(preprocess).shape
        return height, width

    def _decoded(self, preprocess: Preprocess) -> Image.Image:
        """A picture that is no file."""
        given = self.picture
        if isinstance(given, (str, Path)) or preprocess.frames > 1:
            raise InputError(f"image {self.name}", "must be a folder of frames: the task looks at clips")
        if isinstance(given, np.ndarray):
            if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3 or 0 in given.shape:
                what, got = "must be uint8 (H, W, 3), RGB", f"{given.dtype.name} {given.shape}"
                raise InputError(f"image {self.name}", what, got=got)
            return Image.fromarray(given)
        return given


def pictures_of(given: Picture | Iterable[Picture], *, clips: bool = False) -> tuple[Input, ...]:
    """What to answer, in order: of paths those of ``inputs_of``, each once, and every picture in memory.

    Raises:
        InputError: nothing, something that is no picture, or as ``inputs_of``.
    """
    alone = isinstance(given, (str, Path, Image.Image, np.ndarray))
    several: Sequence[object] = [given] if alone else list(given)  # type: ignore[arg-type]
    once = dict[object, Input]()
    for number, each in enumerate(several):
        if isinstance(each, (str, Path)):
            for path in inputs_of([each], clips=clips):
                once.setdefault(path, Input(path.name, path))
        elif isinstance(each, (Image.Image, np.ndarray)):
            once[number] = Input(str(number), each)
        else:
            raise InputError(f"image {number}", "must be a path, a PIL image or an array", got=type(each).__name__)
    if not once:
        raise InputError("images", "needs an image", got="none")
    return tuple(once.values())


def asked_pairs(line: str) -> list[tuple[str, str]] | None:
    """Images with the task of each, where a line asks so: an object with ``image`` and ``task``, or a list of such.

    Raises:
        InputError: it is no JSON, or a list of anything else.
    """
    if line[:1] not in ("{", "["):
        return None
    given = _parsed(line)
    if isinstance(given, dict) and "task" not in given:
        return None
    pairs = given if isinstance(given, list) else [given]
    found = [(each.get("image"), each.get("task")) if isinstance(each, dict) else (None, None) for each in pairs]
    whole = [(image, task) for image, task in found if isinstance(image, str) and isinstance(task, str)]
    if not whole or len(whole) < len(pairs):
        raise InputError("line", 'needs objects with "image" and "task"', got=repr(line[:80]))
    return whole


def asked_for(line: str) -> str:
    """The image that a line asks for: JSON, a text or an object with ``image``, or else the line itself.

    Raises:
        InputError: an object without it.
    """
    if line[:1] not in ("{", '"'):
        return line
    given = _parsed(line)
    image = given.get("image") if isinstance(given, dict) else given
    if not isinstance(image, str):
        raise InputError("line", 'needs a text, or an object with "image"', got=repr(line[:80]))
    return image


def _parsed(line: str) -> object:
    try:
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        raise InputError("line", "is no JSON", got=error) from error


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
