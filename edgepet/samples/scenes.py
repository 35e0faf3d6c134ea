"""Sample tasks that have objects on pictures, with masks or without, and how they lie on disk: as COCO has them.

images/SPLIT/KEY.png, annotations/instances_SPLIT.json, and where there are masks masks/SPLIT/KEY.png and classes.txt
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from edgepet.errors import refusing
from edgepet.samples.masked import palette
from edgepet.samples.packages import DebianFile, DebianFolder, NpmFile, PackageFile
from edgepet.spec import NpArray

CONTENTS = ("images", "annotations", "masks", "classes.txt", "meta.json")  # of a built task


@dataclass(frozen=True, slots=True, eq=False)
class SceneObject:
    """An object of a category: ``box`` is x, y, width and height; ``shape`` its silhouette, bool (height, width)."""

    category: str
    box: tuple[float, float, float, float]
    shape: NpArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """An RGB picture and the objects on it; ``mask`` is the class of every pixel, uint8 (height, width)."""

    picture: Image.Image
    objects: tuple[SceneObject, ...]
    mask: NpArray | None = None


NamedScene: TypeAlias = tuple[str, Callable[[], Scene]]  # a key unique in its split, which names the PNG
Scenes: TypeAlias = dict[str, list[NamedScene]]  # train, val and test, in their order


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneTask:
    """``classes`` are those of objects; of masks they are behind ``background``, which tasks without masks lack.

    ``collect`` takes what ``files`` read and the most test images, and draws the splits itself.
    """

    classes: tuple[str, ...]
    licence: str
    files: tuple[PackageFile | DebianFile | DebianFolder | NpmFile, ...]
    collect: Callable[[Sequence[bytes], int | None], Scenes]
    background: str | None = None


def write_scenes(splits: Mapping[str, Sequence[NamedScene]], task: SceneTask, folder: Path) -> str:
    """Write a task.

    Returns:
        sha256 of every picture's name, size and pixels, its mask, and each object's category and box.

    Raises:
        InputError: the folder cannot be written.
    """
    digest, masked = hashlib.sha256(), () if task.background is None else (task.background, *task.classes)
    with refusing(folder, "could not be written"):
        (folder / "annotations").mkdir()
        for split, scenes in splits.items():
            (folder / "images" / split).mkdir(parents=True)
            if masked:
                (folder / "masks" / split).mkdir(parents=True)
            images, annotations = list[dict[str, object]](), list[dict[str, object]]()
            for key, draw in scenes:
                scene = draw()
                picture = scene.picture
                picture.save(folder / "images" / split / f"{key}.png", compress_level=1)
                digest.update(f"{split}/{key}/{picture.size}".encode() + picture.tobytes())
                if scene.mask is not None:
                    values = np.ascontiguousarray(scene.mask, np.uint8)
                    mask = Image.fromarray(values).convert("P")
                    mask.putpalette(palette(len(masked)))
                    mask.save(folder / "masks" / split / f"{key}.png")
                    digest.update(values.tobytes())
                width, height = picture.size
                images.append({"id": len(images) + 1, "file_name": f"{key}.png", "width": width, "height": height})
                for each in scene.objects:
                    box = [round(float(value), 2) for value in each.box]
                    annotations.append(
                        _annotation(len(annotations) + 1, len(images), task.classes.index(each.category) + 1, box, each)
                    )
                    digest.update(f"{each.category}{box}0".encode())  # 0: none of them is a crowd
            document = {
                "images": images, "annotations": annotations,
                "categories": [{"id": number, "name": name} for number, name in enumerate(task.classes, start=1)],
            }  # fmt: skip
            text = json.dumps(document, sort_keys=True, separators=(",", ":"))
            (folder / "annotations" / f"instances_{split}.json").write_text(text)
        if masked:
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in masked))
    return digest.hexdigest()


def scenes_of(folder: Path) -> dict[str, int]:
    """How many images of each split lie in a built task; none where a file that belongs to them is not there."""
    counts, masked = {}, (folder / "masks").is_dir()
    for split in ("train", "val", "test"):
        names = {path.name for path in (folder / "images" / split).glob("*.png")}
        if masked:
            names &= {path.name for path in (folder / "masks" / split).glob("*.png")}
        there = (folder / "annotations" / f"instances_{split}.json").is_file()
        counts[split] = len(names) if there and (not masked or (folder / "classes.txt").is_file()) else 0
    return counts


def _annotation(number: int, image: int, category: int, box: list[float], each: SceneObject) -> dict[str, object]:
    area = box[2] * box[3] if each.shape is None else float(each.shape.sum())
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, "area": round(area, 2),
        "segmentation": [] if each.shape is None else _run_lengths(each.shape),
    }  # fmt: skip


def _run_lengths(shape: NpArray) -> dict[str, object]:
    """COCO's plain run lengths: down the columns, the run of zeros first."""
    flat = shape.ravel(order="F").astype(bool)
    edges = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    return {"counts": [0] * bool(flat[0]) + np.diff(edges).tolist(), "size": list(shape.shape)}
