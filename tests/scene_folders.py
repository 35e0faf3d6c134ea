"""Folders of tiny images with boxes, masks and labels at once."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tests.box_folders import CATEGORIES, coco_folder, picture
from tests.mask_folders import save

MASKED = ("ground", *CATEGORIES)
SPLITS = {"train": 12, "val": 6, "test": 4}


def scene_folder(folder: Path, *, size: tuple[int, int] = (64, 64), train: int = SPLITS["train"]) -> Path:
    """images/, COCO's annotations/, index masks in masks/ with classes.txt, and labels/SPLIT.csv."""
    splits = SPLITS | {"train": train}
    coco_folder(folder, **splits, size=size)
    (folder / "labels").mkdir()
    for number, (split, count) in enumerate(splits.items()):
        with (folder / f"labels/{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", *MASKED])
            for index in range(count):
                _, objects = picture(1000 * number + index, size)
                mask = np.zeros(size, np.uint8)
                for (x, y, width, height), label in objects:
                    mask[y : y + height, x : x + width] = label + 1
                save(folder / f"masks/{split}/{index:03}.png", mask)
                there = {0, *(label + 1 for _, label in objects)}
                rows.writerow([f"{index:03}.png", *(int(value in there) for value in range(3))])
    (folder / "classes.txt").write_text("\n".join(MASKED) + "\n")
    return folder
