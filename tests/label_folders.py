"""Folders of tiny images with several labels each."""

from __future__ import annotations

import json
from pathlib import Path

from tests.box_folders import picture
from tests.mask_folders import save

LABELS = ("blue", "red")


def labels_of(seed: int) -> tuple[str, ...]:
    """Of which colours ``picture`` draws squares, sorted."""
    return tuple(sorted({("red", "blue")[label] for _, label in picture(seed)[1]}))


def csv_folder(folder: Path, *, train: int = 8, val: int = 4, test: int = 4, size: tuple[int, int] = (64, 64)) -> Path:
    """images/SPLIT/X.png and one labels.csv with names."""
    lines = ["image,labels"]
    for number, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
        for index in range(count):
            seed = 1000 * number + index
            save(folder / "images" / split / f"{index:03}.png", picture(seed, size)[0])
            lines.append(f"{split}/{index:03}.png,{';'.join(labels_of(seed))}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def json_folder(folder: Path, *, count: int = 4) -> Path:
    """images/X.png and one labels.json."""
    for index in range(count):
        save(folder / "images" / f"{index:03}.png", picture(index)[0])
    told = {f"{index:03}": list(labels_of(index)) for index in range(count)}
    (folder / "labels.json").write_text(json.dumps(told))
    return folder
