"""What a sample task is: the files that it comes from, and the images in them, by split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image

from edgepet.samples.packages import DebianFile, DebianFolder, NpmFile, PackageFile

# A key unique in its task, which names the PNG; the class; what makes the RGB picture when it is needed.
LabelledImage: TypeAlias = tuple[str, str, Callable[[], Image.Image]]
# What each split is drawn from; without ``val``, validation images are held out of ``train``.
Pools: TypeAlias = dict[str, list[LabelledImage]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """``collect`` takes what ``files`` read, and returns the pools that ``seed`` draws the splits from."""

    classes: tuple[str, ...]
    licence: str
    files: tuple[PackageFile | DebianFile | DebianFolder | NpmFile, ...]
    seed: int
    collect: Callable[[Sequence[bytes]], Pools]


def empty_pools() -> Pools:
    """Three splits with validation images of their own."""
    return {"train": [], "val": [], "test": []}


def split_groups(groups: Iterable[str], seed: int) -> dict[str, str]:
    """Group -> ``train`` (44 % of them), ``val`` (12 %) or ``test``; the first two get at least one each."""
    names = sorted(set(groups))
    trained, held = max(1, round(len(names) * 0.44)), max(1, round(len(names) * 0.12))
    order = np.random.RandomState(seed).permutation(len(names))
    split = ["train"] * trained + ["val"] * held + ["test"] * len(names)
    return {names[i]: split[k] for k, i in enumerate(order)}


def opaque(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB, with ``background`` where the picture is transparent."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")
