"""Folders of tiny images with boxes, as people's tools write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepet.spec import NpArray
from tests.mask_folders import save

CATEGORIES = ("round", "square")
COLOURS = ((220, 60, 40), (40, 90, 220))
Box = tuple[int, int, int, int]  # x, y, width, height


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> tuple[NpArray, list[tuple[Box, int]]]:
    """Coloured squares on grey noise, (height, width, 3), and where they are: red ones of class 0, blue ones of 1."""
    rng = np.random.default_rng(seed)
    height, width = size
    pixels, objects = rng.integers(100, 150, (*size, 3)), list[tuple[Box, int]]()
    for place in rng.permutation(4)[: 1 + seed % 2]:
        side = int(rng.integers(height // 4, height // 2))
        x = int(place % 2) * width // 2 + int(rng.integers(0, width // 2 - side + 1))
        y = int(place // 2) * height // 2 + int(rng.integers(0, height // 2 - side + 1))
        label = int(rng.integers(0, 2))
        pixels[y : y + side, x : x + side] = COLOURS[label] + rng.integers(-20, 20, (side, side, 3))
        objects.append(((x, y, side, side), label))
    return pixels.clip(0, 255).astype(np.uint8), objects


def coco_folder(folder: Path, *, train: int = 4, val: int = 2, test: int = 2, size: tuple[int, int] = (64, 64)) -> Path:
    """images/SPLIT/X.png and annotations/instances_SPLIT.json, whose category ids are 7 and 3."""
    for number, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
        images, annotations = list[Mapping[str, Any]](), list[Mapping[str, Any]]()
        for index in range(count):
            pixels, objects = picture(1000 * number + index, size)
            save(folder / "images" / split / f"{index:03}.png", pixels)
            images.append({"id": index + 10, "file_name": f"{index:03}.png", "height": size[0], "width": size[1]})
            for box, label in objects:
                annotations.append(annotation(len(annotations) + 1, index + 10, box, (3, 7)[label]))
        if count:
            write_coco(folder, images, annotations, split=split)
    return folder


def annotation(number: int, image: int, box: Sequence[float], category: int, **more: Any) -> dict[str, Any]:
    """One object of a COCO file."""
    area = box[2] * box[3] if len(box) == 4 else 0
    return {
        "id": number, "image_id": image, "bbox": list(box), "category_id": category, "area": area,
        "iscrowd": 0, "segmentation": [], **more,
    }  # fmt: skip


def write_coco(
    folder: Path, images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], *,
    split: str = "train", **more: Any,
) -> Path:  # fmt: skip
    """annotations/instances_SPLIT.json."""
    categories = [{"id": 7, "name": "square"}, {"id": 3, "name": "round"}]
    document = {"images": images, "annotations": annotations, "categories": categories, **more}
    file = folder / f"annotations/instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))
    return file


def voc(size: tuple[int, int], *objects: tuple[str, Box], inside: str = "") -> str:
    """One file of Pascal VOC's: corners count from 1, and both are inside."""
    told = "".join(
        f"<object><name>{name}</name>{inside}<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
        f"<ymax>{y + h}</ymax></bndbox></object>"
        for name, (x, y, w, h) in objects
    )
    return f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>{told}</annotation>"


def yolo(size: tuple[int, int], *objects: tuple[int, Box]) -> str:
    """One file of YOLO's: middles and sizes in parts of the image."""
    height, width = size
    return "".join(
        f"{label} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
        for label, (x, y, w, h) in objects
    )
