"""Folders of images with masks, as people's tools write them: which file is whose mask, and what its values stand for.

| kind | images | masks |
|---|---|---|
| index | ``images/SPLIT/X.jpg`` | ``masks/SPLIT/X.png``, ``classes.txt``; value n is line n, 255 is not counted |
| MMSegmentation | ``img_dir/SPLIT/X.jpg`` | ``ann_dir/SPLIT/X.png``, else the same |
| ADE20K | ``images/training/X.jpg`` | ``annotations/training/X.png``, ``objectInfo150.txt``; 0 is not counted |
| Cityscapes | ``leftImg8bit/SPLIT/CITY/X_leftImg8bit.png`` | ``gtFine/SPLIT/CITY/X_gtFine_labelIds.png`` |
| COCO | ``images/SPLIT/X.jpg`` | ``annotations/instances_SPLIT.json`` |
| COCO of Roboflow | ``SPLIT/X.jpg`` | ``SPLIT/_annotations.coco.json`` |

No image is opened here. Splits go by the names that ``folders`` knows: train/, training/, valid/ and the like.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from edgepet.errors import InputError, option
from edgepet.images.coco import read_coco
from edgepet.images.dense_folders import CLASSES, by_split, class_names, coco_files, coco_images, part_of
from edgepet.images.folders import SPLITS, PassedOver, Split, folders_in, images_below, require_readable
from edgepet.images.masks import NOT_COUNTED, Masked, MaskFile, MaskSet, Numbering, joined

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")  # formats that keep numbers

_ADE_NAMES = ("objectInfo150.txt", "objectinfo150.txt", CLASSES)
_CITY_IMAGE, _CITY_MASKS = "_leftImg8bit", ("_gtFine_labelIds", "_gtFine_labelTrainIds")
# Cityscapes: the id in labelIds files of each class that counts, in the order of its training ids.
CITY_CLASSES: Mapping[str, int] = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
_CITY_LAST = 33


@dataclass(frozen=True, slots=True)
class _Pair:
    """Folders of images and of masks, by split, and how a mask's file is called, without suffix, for an image's."""

    images: Mapping[Split, Path]
    masks: Mapping[Split, Path]
    stems: Callable[[str], tuple[str, ...]]


def open_masks(folder: Path, split: Split, *, val_fraction: float = 0.2, seed: int = 0) -> MaskSet:
    """List one split of a folder of images with masks, of any kind that this module names.

    Where there is no val split, a part of the training images is held out for it; which ones depends on their file
    names, ``val_fraction`` and ``seed`` only.

    Raises:
        InputError: the folder is of none of these kinds, has no such split, or names fewer than two classes or too
            many; images without one mask, or that are no files or may not be read: all of them in one message.
    """
    whole = "train" if split == "val" and not _has(folder, "val") else split
    images = _listed(folder, whole)
    if not _has(folder, "val") and split != "test":
        if not 0 < val_fraction < 1:
            raise InputError(option("val_fraction"), "must be between 0 and 1, without them", got=val_fraction)
        images = images.at(part_of(images.paths, split, val_fraction, seed))
    require_readable(images.paths)
    return images


def is_mask_folder(folder: Path) -> bool:
    """Whether ``folder`` is of a kind that this module names, by what lies in it."""
    return coco_files(folder) != {} or _pair(folder) is not None


def _listed(folder: Path, split: Split) -> MaskSet:
    pair, coco = _pair(folder), coco_files(folder)
    if pair is None and not coco:
        got = ", ".join(f"{item.name}/" for item in folders_in(folder)[:5]) or "no folder"
        fix = f"write images/train/X.jpg, masks/train/X.png and {CLASSES} with a class a line"
        raise InputError(str(folder), "is no folder of images with masks", got=got, fix=fix)
    if pair is None:
        if split not in coco:
            _refuse_split(folder, split, [each for each in SPLITS if each in coco])
        return read_coco(coco[split], coco_images(folder, split, coco[split]))
    if split not in pair.images or split not in pair.masks:
        _refuse_split(folder, split, [each for each in SPLITS if each in pair.images and each in pair.masks])
    classes, numbering = _numbering(folder)
    return _matched(pair, split, classes, numbering)


def _refuse_split(folder: Path, split: Split, there: Sequence[str]) -> NoReturn:
    got = f"only {', '.join(there)}" if there else "none"
    raise InputError(str(folder), f"has no images with masks of {split}", got=got, fix=f"add {split}/")


def _has(folder: Path, split: Split) -> bool:
    pair = _pair(folder)
    return split in coco_files(folder) if pair is None else split in pair.images and split in pair.masks


def _pair(folder: Path) -> _Pair | None:
    """The images' and the masks' folders, where the masks are images."""
    for images, masks in (("images", "masks"), ("img_dir", "ann_dir"), ("images", "annotations")):
        found = [by_split(folder / name) for name in (images, masks)]
        if all(found):
            return _Pair(found[0], found[1], lambda stem: (stem,))
    city = [by_split(folder / name) for name in ("leftImg8bit", "gtFine")]
    if all(city):
        return _Pair(city[0], city[1], lambda stem: tuple(stem.removesuffix(_CITY_IMAGE) + end for end in _CITY_MASKS))
    return None


def _numbering(folder: Path) -> tuple[tuple[str, ...], Numbering]:
    """The classes of a folder whose masks are images, and what values stand for them."""
    if (folder / "gtFine").is_dir():
        table = np.full(256, -1, np.int16)
        table[: _CITY_LAST + 1] = NOT_COUNTED
        table[NOT_COUNTED] = NOT_COUNTED
        for number, value in enumerate(CITY_CLASSES.values()):
            table[value] = number
        return tuple(CITY_CLASSES), Numbering(table, f"Cityscapes' label ids from 0 to {_CITY_LAST}")
    is_ade = (folder / "annotations").is_dir() and not (folder / "masks").is_dir() and not (folder / "ann_dir").is_dir()
    file = next((folder / name for name in (_ADE_NAMES if is_ade else (CLASSES,)) if (folder / name).is_file()), None)
    if file is None:
        fix = f"write {folder / CLASSES} with a class a line, value {1 if is_ade else 0} first"
        raise InputError(str(folder), "must name its classes", got=f"no {CLASSES}", fix=fix)
    classes = class_names(file, least=2)
    return classes, Numbering.from_one(len(classes)) if is_ade else Numbering.from_zero(len(classes))


def _matched(pair: _Pair, split: Split, classes: tuple[str, ...], numbering: Numbering) -> MaskSet:
    """Every image with its mask; those without one are refused, masks without an image passed over."""
    folder = pair.masks[split]
    by_stem: dict[str, list[Path]] = {}
    for path in images_below(folder):
        by_stem.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    paths, masks, bad, used = list[Path](), list[Masked](), list[InputError](), set[Path]()
    images = images_below(pair.images[split])
    for path in images:
        within = path.relative_to(pair.images[split]).with_suffix("")
        stems = [within.with_name(stem).as_posix() for stem in pair.stems(within.name)]
        found = next((by_stem[stem] for stem in stems if stem in by_stem), [])
        if len(found) != 1:
            got = " and ".join(item.name for item in found) or f"no {os.path.relpath(folder / stems[0])}.png"
            bad.append(InputError(str(path), "needs one mask", got=got, fix="add the mask, or remove the image"))
            continue
        paths.append(path)
        masks.append(MaskFile(found[0], _training_ids() if found[0].stem.endswith(_CITY_MASKS[1]) else numbering))
        used.add(found[0])
    if bad:
        raise joined(bad, len(images))
    if not paths:
        raise InputError(str(pair.images[split]), "holds no image", fix="add images, or remove the folder")
    others = [item for stems in by_stem.values() for item in stems if item not in used]
    passed = tuple(PassedOver(item, "a mask without its image") for item in others if not _is_city_extra(item))
    return MaskSet(classes, tuple(paths), tuple(masks), passed)


def _is_city_extra(path: Path) -> bool:
    """Cityscapes has each mask in colours and of instances too."""
    return path.stem.endswith(("_gtFine_color", "_gtFine_instanceIds", *_CITY_MASKS))


def _training_ids() -> Numbering:
    return Numbering.from_zero(len(CITY_CLASSES))
