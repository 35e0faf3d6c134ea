"""Sample tasks that have a class for every pixel, and how they lie on disk: as ``train --task mask`` reads them."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from edgepet.errors import refusing
from edgepet.samples.packages import DebianFile, NpmFile, PackageFile
from edgepet.spec import NpArray

NOT_COUNTED = 255  # of a mask: a pixel that is of none of the classes
TRAIN_IMAGES, VAL_IMAGES = 800, 200
CONTENTS = ("images", "masks", "classes.txt", "meta.json")  # of a built task

# A key unique in its task, which names the PNGs; the RGB picture; its mask, uint8 (height, width), as large as it.
MaskedImage: TypeAlias = tuple[str, Callable[[], Image.Image], Callable[[], NpArray]]
MaskPools: TypeAlias = dict[str, list[MaskedImage]]  # what each of train, val and test is drawn from


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTask:
    """As ``pools.Task``, with pools of masked images; value n of a mask is ``classes[n]``, or NOT_COUNTED."""

    classes: tuple[str, ...]
    licence: str
    files: tuple[PackageFile | DebianFile | NpmFile, ...]
    seed: int
    collect: Callable[[Sequence[bytes]], MaskPools]


def drawn_splits(pools: MaskPools, seed: int, cap: int | None) -> MaskPools:
    """At most TRAIN_IMAGES, VAL_IMAGES and ``cap`` images of the pools, all of them where that is None, shuffled."""
    rng = np.random.RandomState(seed)  # the old generator: its stream is frozen, a Generator's may change
    most = {"train": TRAIN_IMAGES, "val": VAL_IMAGES, "test": cap}
    return {split: [pools[split][i] for i in rng.permutation(len(pools[split]))[:n]] for split, n in most.items()}


def write_masked(splits: Mapping[str, Sequence[MaskedImage]], classes: Sequence[str], folder: Path) -> str:
    """Write ``folder/{images,masks}/SPLIT/KEY.png`` and ``folder/classes.txt``.

    Returns:
        sha256 of every image's name, size, pixels and mask.

    Raises:
        InputError: the folder cannot be written.
    """
    digest, colours = hashlib.sha256(), palette(len(classes))
    with refusing(folder, "could not be written"):
        for split, images in splits.items():
            for kind in ("images", "masks"):
                (folder / kind / split).mkdir(parents=True)
            for key, draw, draw_mask in images:
                picture, values = draw(), np.ascontiguousarray(draw_mask(), np.uint8)
                picture.save(folder / "images" / split / f"{key}.png", compress_level=1)  # as of class folders
                mask = Image.fromarray(values).convert("P")
                mask.putpalette(colours)
                mask.save(folder / "masks" / split / f"{key}.png")
                digest.update(f"{split}/{key}/{picture.size}".encode() + picture.tobytes() + values.tobytes())
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return digest.hexdigest()


def images_of(folder: Path) -> dict[str, int]:
    """How many images of each split lie in a built task with their masks."""
    counts = {}
    for split in ("train", "val", "test"):
        images, masks = ({path.name for path in (folder / kind / split).glob("*.png")} for kind in ("images", "masks"))
        counts[split] = len(images & masks)
    return counts


def palette(classes: int) -> list[int]:
    """For people who open a mask: colours round the circle, the value that is not counted white."""
    circle = [colorsys.hsv_to_rgb(number / classes, 0.8, 0.9) for number in range(classes)]
    held = [round(255 * part) for colour in circle for part in colour]
    return held + [0] * (3 * NOT_COUNTED - len(held)) + [255, 255, 255]
