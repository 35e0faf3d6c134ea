"""Folders of images with boxes, as people's tools write them.

| kind | images | boxes | classes |
|---|---|---|---|
| COCO | ``images/SPLIT/X.jpg`` | ``annotations/instances_SPLIT.json`` | its categories |
| COCO of Roboflow | ``SPLIT/X.jpg`` | ``SPLIT/_annotations.coco.json`` | its categories |
| Pascal VOC | ``JPEGImages/X.jpg`` | ``Annotations/X.xml``, ``ImageSets/Main/SPLIT.txt`` | ``classes.txt``, or all |
| VOC in splits | ``images/SPLIT/X.jpg`` | ``annotations/SPLIT/X.xml`` | the same |
| VOC of Roboflow | ``SPLIT/X.jpg`` | ``SPLIT/X.xml`` | the same |
| YOLO | ``images/SPLIT/X.jpg`` | ``labels/SPLIT/X.txt`` | ``data.yaml`` or ``classes.txt`` |
| YOLO of Roboflow | ``SPLIT/images/X.jpg`` | ``SPLIT/labels/X.txt`` | the same |

No image is opened here. Splits go by the names that ``folders`` knows: train/, training/, valid/ and the like. An image
without an object is one all the same: COCO lists it, VOC's file has no object, YOLO's is empty or not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

from edgepet.errors import InputError, option
from edgepet.files import read_file
from edgepet.images.boxes import FRACTIONS, WHAT, Boxes, BoxSet
from edgepet.images.coco_boxes import read_coco_boxes
from edgepet.images.dense_folders import CLASSES, by_split, class_names, coco_files, coco_images, part_of
from edgepet.images.folders import SPLITS, PassedOver, Split, folders_in, images_below, require_readable, split_of
from edgepet.images.masks import joined
from edgepet.images.voc import VocFile, read_voc
from edgepet.images.yolo import read_yolo, yaml_names

Kind: TypeAlias = Literal["coco", "voc", "yolo"]
_YAMLS = ("data.yaml", "data.yml", "dataset.yaml")
_SUFFIX = {"voc": ".xml", "yolo": ".txt"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one split lies: the folder of its images, and that of its texts or its COCO file.

    ``stems`` are the images that a list of VOC's names, where there is one.
    """

    images: Path
    boxes: Path
    stems: tuple[str, ...] | None = None


def open_boxes(folder: Path, split: Split, *, val_fraction: float = 0.2, seed: int = 0) -> BoxSet:
    """List one split of a folder of images with boxes, of any kind that this module names, and read its boxes.

    Where there is no val split, a part of the training images is held out for it; which ones depends on their file
    names, ``val_fraction`` and ``seed`` only.

    Raises:
        InputError: the folder is of none of these kinds, or has no such split; boxes that are none, or images that are
            not there or may not be read: all of a kind in one message.
    """
    kind, places = _places(folder)
    whole: Split = "train" if split == "val" and "val" not in places else split
    if not places:
        got = ", ".join(f"{item.name}/" for item in folders_in(folder)[:5]) or "no folder"
        fix = "write images/train/X.jpg and annotations/instances_train.json, as COCO has it"
        raise InputError(str(folder), "is no folder of images with boxes", got=got, fix=fix)
    if whole not in places:
        _refuse_split(folder, whole, [each for each in SPLITS if each in places])
    images = _read(folder, kind, places, whole)
    if not len(images):
        raise InputError(str(places[whole].images), "holds no image", fix="add images, or remove the folder")
    if "val" not in places and split != "test":
        if not 0 < val_fraction < 1:
            raise InputError(option("val_fraction"), "must be between 0 and 1, without them", got=val_fraction)
        images = images.at(part_of(images.paths, split, val_fraction, seed))
    require_readable(images.paths)
    return images


def is_box_folder(folder: Path) -> bool:
    """Whether ``folder`` is of a kind that has boxes alone, by what lies in it: VOC's or YOLO's."""
    kind, places = _places(folder)
    return bool(places) and kind != "coco"


def _refuse_split(folder: Path, split: Split, there: Sequence[str]) -> NoReturn:
    got = f"only {', '.join(there)}" if there else "none"
    raise InputError(str(folder), f"has no images with boxes of {split}", got=got, fix=f"add {split}/")


def _places(folder: Path) -> tuple[Kind, Mapping[Split, _Place]]:
    """Of which kind ``folder`` is, and where its splits lie; none where it is of no kind."""
    if not folder.is_dir():
        return "coco", {}
    coco = coco_files(folder)
    if coco:
        return "coco", {split: _Place(coco_images(folder, split, file), file) for split, file in coco.items()}
    lists = {
        split: file for file in sorted((folder / "ImageSets/Main").glob("*.txt"))
        if (split := split_of(file.stem)) is not None
    }  # fmt: skip
    if lists and (folder / "Annotations").is_dir():
        pictures, texts = folder / "JPEGImages", folder / "Annotations"
        return "voc", {split: _Place(pictures, texts, _stems(file)) for split, file in lists.items()}
    images = by_split(folder / "images")
    for kind, name in (("voc", "annotations"), ("yolo", "labels")):
        texts_of = by_split(folder / name)
        found = {split: _Place(images[split], texts_of[split]) for split in images if split in texts_of}
        if any(_has(each, _SUFFIX[kind]) for each in found.values()):
            return ("voc" if kind == "voc" else "yolo"), found
    splits = by_split(folder)
    inside = {split: _Place(each / "images", each / "labels") for split, each in splits.items()}
    if any(_has(each, ".txt") for each in inside.values()):
        return "yolo", {split: each for split, each in inside.items() if each.images.is_dir()}
    beside = {split: _Place(each, each) for split, each in splits.items()}
    return ("voc", beside) if any(_has(each, ".xml") for each in beside.values()) else ("coco", {})


def _has(place: _Place, suffix: str) -> bool:
    return place.boxes.is_dir() and any(place.boxes.rglob(f"*{suffix}"))


def _stems(file: Path) -> tuple[str, ...]:
    """The first word of every line: VOC's lists of one class have a number behind it."""
    return tuple(line.split()[0] for line in read_file(file).decode("utf-8", "replace").splitlines() if line.strip())


def _read(folder: Path, kind: Kind, places: Mapping[Split, _Place], split: Split) -> BoxSet:
    place = places[split]
    if kind == "coco":
        return read_coco_boxes(place.boxes, place.images)
    return _read_voc(folder, places, split) if kind == "voc" else _read_yolo(folder, place)


def _pairs(place: _Place, suffix: str) -> tuple[list[tuple[Path, Path]], tuple[PassedOver, ...]]:
    """Every image of a split with its text, which need not be there, and texts without an image."""
    by_stem = {path.relative_to(place.images).with_suffix("").as_posix(): path for path in images_below(place.images)}
    wanted = sorted(by_stem) if place.stems is None else list(dict.fromkeys(place.stems))
    pairs = [
        (by_stem.get(stem, place.images / f"{stem}.jpg"), place.boxes / f"{stem}{suffix}") for stem in wanted
    ]  # fmt: skip
    used = {text for _, text in pairs}
    others = [] if place.stems is not None else sorted(set(place.boxes.rglob(f"*{suffix}")) - used)
    left = [text for text in others if text.name != CLASSES]
    return pairs, tuple(PassedOver(text, "boxes without their image") for text in left)


def _read_yolo(folder: Path, place: _Place) -> BoxSet:
    classes = _classes(folder)
    if classes is None:
        fix = f"write {folder / CLASSES} with a class a line, that of number 0 first"
        raise InputError(str(folder), "must name its classes", got=f"no {_YAMLS[0]} and no {CLASSES}", fix=fix)
    pairs, passed = _pairs(place, ".txt")
    bad = list[InputError]()
    boxes = tuple(read_yolo(text, len(classes), bad) if text.exists() else Boxes.of(()) for _, text in pairs)
    if bad:
        raise joined(bad, sum(map(len, boxes)) + len(bad), WHAT)
    return BoxSet(classes, tuple(image for image, _ in pairs), boxes, (FRACTIONS,) * len(pairs), passed)


def _classes(folder: Path) -> tuple[str, ...] | None:
    """The classes that a folder names, None where it does not."""
    yaml = next((folder / name for name in _YAMLS if (folder / name).is_file()), None)
    if yaml is not None:
        return yaml_names(yaml)
    return class_names(folder / CLASSES, least=1) if (folder / CLASSES).is_file() else None


def _read_voc(folder: Path, places: Mapping[Split, _Place], split: Split) -> BoxSet:
    pairs, passed = _pairs(places[split], ".xml")
    read, bad = list[VocFile | None](), list[InputError]()
    for image, text in pairs:
        if not text.exists():
            fix = "add the file, or remove the image"
            bad.append(InputError(str(image), "needs its boxes", got=f"no {text.name}", fix=fix))
            continue
        try:
            read.append(read_voc(text))
        except InputError as error:
            bad.append(error)
    if bad:
        raise joined(bad, len(pairs), WHAT)
    classes = _classes(folder) or _all_names(places)
    numbers = {name: number for number, name in enumerate(classes)}
    boxes, extents = list[Boxes](), list[tuple[float, float]]()
    for each in read:
        if each is not None:
            extent = each.extent
            if extent is None:
                what, fix = (
                    "needs <size> with the image's width and height",
                    "write it, or let your tool open the image",
                )
                bad.append(InputError(str(each.where), what, fix=fix))
                continue
            boxes.append(each.boxes(numbers, extent, bad))
            extents.append(extent)
    if bad:
        raise joined(bad, sum(map(len, boxes)) + len(bad), WHAT)
    return BoxSet(classes, tuple(image for image, _ in pairs), tuple(boxes), tuple(extents), passed)


def _all_names(places: Mapping[Split, _Place]) -> tuple[str, ...]:
    """The classes of all splits' objects, by name; files that are none are told by who reads their split."""
    names = set[str]()
    for place in places.values():
        for _, text in _pairs(place, ".xml")[0]:
            try:
                names |= read_voc(text).names if text.exists() else set()
            except InputError:
                continue
    return tuple(sorted(names))
