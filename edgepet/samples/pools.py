"""What a sample task is: the files that it comes from, and the images in them, by split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from edgepet.samples.packages import DebianFile, PackageFile

# A key unique in its task, which names the PNG; the class; what makes the RGB picture when it is needed.
LabelledImage: TypeAlias = tuple[str, str, Callable[[], Image.Image]]
# What each split is drawn from; without ``val``, validation images are held out of ``train``.
Pools: TypeAlias = dict[str, list[LabelledImage]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """``collect`` takes what ``files`` read, and returns the pools that ``seed`` draws the splits from."""

    classes: tuple[str, ...]
    licence: str
    files: tuple[PackageFile | DebianFile, ...]
    seed: int
    collect: Callable[[Sequence[bytes]], Pools]


def empty_pools() -> Pools:
    """Three splits with validation images of their own."""
    return {"train": [], "val": [], "test": []}
