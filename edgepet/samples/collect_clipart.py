"""What a drawing is of: the folder of Open Clip Art that it is filed under."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from edgepet.samples.cutouts import files_in
from edgepet.samples.packages import DebianFolder
from edgepet.samples.pools import Pools, Task, empty_pools, opaque, split_groups
from edgepet.spec import NpArray

_SUBJECTS = {
    "animal": ("animals",),
    "building": ("buildings",),
    "flag": ("signs_and_symbols/flags",),
    "food": ("food",),
    "hardware": ("computer/hardware", "computer/connectors", "electronics"),
    "map": ("geography",),
    "music": ("recreation/music",),
    "person": ("people",),
    "plant": ("plants",),
    "tool_weapon": ("tools",),
    "vehicle": ("transportation",),
}
_SIDE, _SMALL = 160, 16  # pixels of a picture, and of what two drawings are compared by
_LEAST_SIDE, _MOST_RATIO, _LEAST_SPREAD, _ALIKE = 40, 6, 3, 0.97
_WHITE = (255, 255, 255)
# The package has a few that Pillow cannot read, and nine of 105 to 623 million pixels.
_UNREAD = (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError)


def _clipart(contents: Sequence[bytes]) -> Pools:
    """Variants of one drawing, of one name up to digits or nearly the same when small, are in one split."""
    known = {place: data for place, data in files_in(contents[0]) if place.suffix == ".png"}
    drawn, subjects, small = list[PurePosixPath](), list[str](), list[NpArray]()
    for place in sorted(known):
        looked_at = _looked_at(known[place])
        if looked_at is not None:
            drawn.append(place)
            subjects.append(_subject(place))
            small.append(looked_at)
    groups = _groups(drawn, subjects, np.array(small))
    split_of = dict[str, str]()
    for subject in _SUBJECTS:
        split_of |= split_groups([groups[i] for i, of in enumerate(subjects) if of == subject], seed=9)
    pools = empty_pools()
    for i, (place, subject) in enumerate(zip(drawn, subjects, strict=True)):
        name = re.sub(r"\W+", "_", place.as_posix()[: -len(place.suffix)])
        pools[split_of[groups[i]]].append((name, subject, partial(_squared, known[place])))
    return pools


def _subject(place: PurePosixPath) -> str:
    return next(
        subject for subject, folders in _SUBJECTS.items() if any(place.is_relative_to(each) for each in folders)
    )


def _looked_at(data: bytes) -> NpArray | None:
    """A drawing as one vector, by which two are compared; None of what is no drawing to be seen at this size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = opaque(Image.open(io.BytesIO(data)), _WHITE)
    except _UNREAD:
        return None
    if min(picture.size) < _LEAST_SIDE or max(picture.size) > _MOST_RATIO * min(picture.size):
        return None
    grey = np.asarray(_square(picture, _SMALL).convert("L"), float).ravel()
    if grey.std() < _LEAST_SPREAD:
        return None
    grey -= grey.mean()
    looked: NpArray = grey / np.linalg.norm(grey)
    return looked


def _groups(drawn: Sequence[PurePosixPath], subjects: Sequence[str], small: NpArray) -> list[str]:
    """Of each drawing the name of its group: those that are variants of one another, however far apart."""
    parents, first = list(range(len(drawn))), dict[str, int]()

    def group(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    for i, (place, subject) in enumerate(zip(drawn, subjects, strict=True)):
        same = first.setdefault(re.sub(r"[\d_\-\.]+", "", place.stem.lower()) + subject, i)
        if same != i:
            parents[group(i)] = group(same)
    for i, j in zip(*np.where(np.triu(small @ small.T, 1) > _ALIKE), strict=True):
        parents[group(int(j))] = group(int(i))
    return [f"{group(i):06d}" for i in range(len(drawn))]


def _squared(data: bytes) -> Image.Image:
    return _square(opaque(Image.open(io.BytesIO(data)), _WHITE), _SIDE)


def _square(picture: Image.Image, side: int) -> Image.Image:
    """``picture`` in the middle of a white square that it fits."""
    seen = picture.copy()
    seen.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(seen.size) < side:
        scale = side / max(seen.size)
        size = max(1, round(seen.width * scale)), max(1, round(seen.height * scale))
        seen = seen.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (side, side), _WHITE)
    canvas.paste(seen, ((side - seen.width) // 2, (side - seen.height) // 2))
    return canvas


CLIPART = Task(
    classes=tuple(_SUBJECTS),
    licence="public domain (CC0)",
    files=(
        DebianFolder(
            "openclipart-png", "1:0.18+dfsg-19", "/usr/share/openclipart/png",
            tuple(itertools.chain.from_iterable(_SUBJECTS.values())), "*.png", "6b3d43e3a9452396",
        ),
    ),
    seed=18,
    collect=_clipart,
)  # fmt: skip
