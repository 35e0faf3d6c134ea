"""Folders of tiny images with masks, as people's tools write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from edgepet.images.masks import write_mask
from edgepet.spec import NpArray

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
NAMES = ("red", "green", "blue")


def scene(seed: int, size: tuple[int, int] = (32, 32)) -> tuple[NpArray, NpArray]:
    """An image (height, width, 3) of coloured blocks under noise, and the colour of each pixel, 0 to 2."""
    rng = np.random.default_rng(seed)
    height, width = size
    cells = rng.integers(0, 3, (2, 2))
    mask = np.kron(cells, np.ones((-(-height // 2), -(-width // 2)), int))[:height, :width].astype(np.uint8)
    return (np.array(COLOURS)[mask] + rng.integers(-30, 30, (*size, 3))).clip(0, 255).astype(np.uint8), mask


def save(path: Path, pixels: NpArray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def save_mask(path: Path, mask: NpArray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(path, mask.astype(np.uint8), COLOURS)
    return path


def index_folder(
    folder: Path, *, train: int = 4, val: int = 2, test: int = 2, size: tuple[int, int] = (32, 32),
    images: str = "images", masks: str = "masks",
) -> Path:  # fmt: skip
    """images/SPLIT/X.png, masks/SPLIT/X.png and classes.txt."""
    for number, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
        for index in range(count):
            pixels, mask = scene(1000 * number + index, size)
            save(folder / images / split / f"{index:03}.png", pixels)
            save_mask(folder / masks / split / f"{index:03}.png", mask)
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return folder
