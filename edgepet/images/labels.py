"""Several labels an image: which of them each image has, from tables, or from boxes or masks that stand in for them.

| kind | images | labels |
|---|---|---|
| a table a split | ``images/SPLIT/X.jpg`` | ``labels/SPLIT.csv`` or ``labels/SPLIT.json`` |
| one table | ``images/SPLIT/X.jpg`` | ``labels.csv`` or ``labels.json`` |
| Roboflow | ``SPLIT/X.jpg`` | ``SPLIT/_classes.csv`` |
| boxes, or masks | as ``box_folders`` and ``mask_folders`` say | the classes that are on the image |

A CSV begins with the image's name, under ``image``, ``filename`` or what else. Behind it there is one column ``labels``
with names, and ``;`` or ``|`` between two, or a column for each label with 0 and 1. JSON is an object, image to a list
of names. Without ``images/SPLIT/`` all of ``images/`` is train. No image is opened here.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgepet.errors import InputError, option
from edgepet.files import read_file
from edgepet.images.box_folders import open_boxes
from edgepet.images.dense_folders import CLASSES, by_split, class_names, coco_files, part_of
from edgepet.images.folders import SPLITS, PassedOver, Split, folders_in, images_below, require_readable
from edgepet.images.mask_folders import is_mask_folder, open_masks
from edgepet.images.masks import NOT_COUNTED, joined
from edgepet.images.sets import ImageSet

Truth: TypeAlias = NDArray[np.uint8]  # (labels,), 1 where the image has the label
MOST_LABELS = 255
WHAT = "needs labels for its images"  # begins messages of several that have none
NAMES = "labels"  # the column whose cells are names
_BETWEEN = re.compile("[;|]")
_ROBOFLOW = "_classes.csv"


@dataclass(frozen=True, slots=True, eq=False)
class LabelSet:
    """Image files and which of ``classes`` each has, uint8 (n, classes) of 0 and 1.

    Ordered by the images' names. ``passed_over`` is what lies among them and is not used.
    """

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.uint8]
    passed_over: tuple[PassedOver, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def images(self) -> ImageSet:
        """The images alone; none has a class of its own."""
        return ImageSet(self.classes, self.paths, (0,) * len(self.paths), self.passed_over)

    def at(self, indices: Iterable[int]) -> LabelSet:
        """Those of its images that ``indices`` name, in their order."""
        chosen = list(indices)
        return replace(self, paths=tuple(self.paths[index] for index in chosen), labels=self.labels[chosen])

    def counts(self) -> NDArray[np.int64]:
        """How many images have each label, (classes,)."""
        counts: NDArray[np.int64] = self.labels.sum(axis=0, dtype=np.int64)
        return counts


@dataclass(frozen=True, slots=True)
class _Table:
    """What a file says: ``rows`` are names of images and of the labels of each; ``classes`` are those that it names."""

    where: Path
    rows: Mapping[str, tuple[str, ...]]
    classes: tuple[str, ...] | None


def open_labels(folder: Path, split: Split, *, val_fraction: float = 0.2, seed: int = 0) -> LabelSet:
    """List one split of a folder of images with labels, of any kind that this module names.

    Where there is no val split, a part of the training images is held out for it; which ones depends on their file
    names, ``val_fraction`` and ``seed`` only.

    Raises:
        InputError: the folder is of none of these kinds, or has no such split; a table that cannot be read, images
            without labels and labels without an image: all of a kind in one message.
    """
    if not is_label_folder(folder):
        return _standing_in(folder, split, val_fraction, seed)
    tables, images = _tables(folder), _images(folder)
    whole: Split = "train" if split == "val" and "val" not in images else split
    if whole not in images:
        there = ", ".join(each for each in SPLITS if each in images)
        raise InputError(str(folder), f"has no images with labels of {whole}", got=f"only {there}", fix=f"add {whole}/")
    classes = _classes(folder, tables.values())
    table = tables[whole] if whole in tables else tables.get(None)
    if table is None:
        what, fix = f"needs the labels of {whole}", f"write labels/{whole}.csv"
        raise InputError(str(folder), what, got="none", fix=fix)
    found = _matched(folder, images, whole, table, classes)
    if "val" not in images and split != "test":
        if not 0 < val_fraction < 1:
            raise InputError(option("val_fraction"), "must be between 0 and 1, without them", got=val_fraction)
        found = found.at(part_of(found.paths, split, val_fraction, seed))
    require_readable(found.paths)
    return found


def is_label_folder(folder: Path) -> bool:
    """Whether tables of labels lie in ``folder``."""
    return folder.is_dir() and bool(_files(folder))


def require_labels(images: LabelSet, where: Path) -> None:
    """Refuse images in which there is nothing to learn.

    Raises:
        InputError: no image has a label.
    """
    if not images.labels.any():
        fix = "name the labels of some of them"
        raise InputError(str(where), "needs training images with labels", got=f"none in {len(images)}", fix=fix)


def _standing_in(folder: Path, split: Split, val_fraction: float, seed: int) -> LabelSet:
    """The classes of objects, crowds among them, or else those of pixels."""
    if not coco_files(folder) and is_mask_folder(folder):
        masks = open_masks(folder, split, val_fraction=val_fraction, seed=seed)
        labels = np.zeros((len(masks), len(masks.classes)), np.uint8)
        for row, mask in zip(labels, masks.masks, strict=True):
            present = np.unique(mask.read())
            row[present[present != NOT_COUNTED]] = 1
        return LabelSet(masks.classes, masks.paths, labels, masks.passed_over)
    try:
        boxes = open_boxes(folder, split, val_fraction=val_fraction, seed=seed)
    except InputError as error:
        if error.what != "is no folder of images with boxes":
            raise
        fix = "write images/train/X.jpg and labels.csv, with a line IMAGE,LABEL;LABEL for each"
        raise InputError(str(folder), "is no folder of images with labels", got=error.got, fix=fix) from error
    labels = np.zeros((len(boxes), len(boxes.classes)), np.uint8)
    for row, each in zip(labels, boxes.boxes, strict=True):
        row[each.labels] = 1
    return LabelSet(boxes.classes, boxes.paths, labels, boxes.passed_over)


def _files(folder: Path) -> dict[Split | None, Path]:
    """The tables of a folder, by their split; None is the one of all."""
    found = dict[Split | None, Path]()
    for suffix in (".csv", ".json"):
        if (folder / f"labels{suffix}").is_file():
            found[None] = folder / f"labels{suffix}"
            return found
    for split in SPLITS:
        for suffix in (".csv", ".json"):
            if (folder / "labels" / f"{split}{suffix}").is_file():
                found.setdefault(split, folder / "labels" / f"{split}{suffix}")
    if not found:
        beside = {split: place / _ROBOFLOW for split, place in by_split(folder).items()}
        found |= {split: file for split, file in beside.items() if file.is_file()}
    return found


def _images(folder: Path) -> dict[Split, Path]:
    """Where the images of each split lie."""
    if any(file.name == _ROBOFLOW for file in _files(folder).values()):
        return by_split(folder)
    found = by_split(folder / "images")
    if not found and not (folder / "images").is_dir():
        got = ", ".join(f"{item.name}/" for item in folders_in(folder)[:5]) or "no folder"
        raise InputError(str(folder), "needs its images in images/", got=got, fix="put them into images/train")
    return found or {"train": folder / "images"}


def _tables(folder: Path) -> dict[Split | None, _Table]:
    return {split: _read_json(f) if f.suffix == ".json" else _read_csv(f) for split, f in _files(folder).items()}


def _read_csv(file: Path) -> _Table:
    try:
        text = read_file(file).decode("utf-8-sig")
        lines = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(text), strict=True)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(file), "must be a CSV in UTF-8", got=str(error)) from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if any(line)]
    if not numbered or len(numbered[0][1]) < 2 or len(set(numbered[0][1])) < len(numbered[0][1]):
        got = ",".join(numbered[0][1])[:80] if numbered else "an empty file"
        fix = f"begin it with image,{NAMES}, or with image and a column for each label"
        raise InputError(f"{file}:1", "needs a heading of columns that differ", got=got or "nothing", fix=fix)
    header, rows = numbered[0][1], dict[str, tuple[str, ...]]()
    named = header[1:] == [NAMES]
    for number, line in numbered[1:]:
        where = f"{file}:{number}"
        if len(line) != len(header):
            raise InputError(where, f"needs {len(header)} columns", got=len(line))
        _require_new(line[0], rows, where)
        rows[line[0]] = _names_in(line[1]) if named else _marked(header[1:], line[1:], where)
    return _Table(file, rows, None if named else tuple(header[1:]))


def _names_in(cell: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in _BETWEEN.split(cell) if name.strip())


def _marked(labels: list[str], cells: list[str], where: str) -> tuple[str, ...]:
    for label, cell in zip(labels, cells, strict=True):
        if cell not in ("0", "1"):
            raise InputError(where, f"needs 0 or 1 under {label!r}", got=repr(cell[:40]))
    return tuple(label for label, cell in zip(labels, cells, strict=True) if cell == "1")


def _read_json(file: Path) -> _Table:
    try:
        told = json.loads(read_file(file), object_pairs_hook=lambda pairs: _without_twins(pairs, str(file)))
    except ValueError as error:
        raise InputError(str(file), "must be JSON in UTF-8", got=str(error)) from error
    if not isinstance(told, dict) or not all(map(_are_texts, told.values())):
        wrong = next((name for name in told if not _are_texts(told[name])), "") if isinstance(told, dict) else ""
        fix = 'write {"X.jpg": ["LABEL", "LABEL"], ...}'
        got = f"another value of {wrong!r}" if wrong else type(told).__name__
        raise InputError(str(file), "needs an object, image to a list of labels", got=got, fix=fix)
    return _Table(file, {name: tuple(labels) for name, labels in told.items()}, None)


def _without_twins(pairs: list[tuple[str, object]], where: str) -> dict[str, object]:
    made = dict[str, object]()
    for name, value in pairs:
        _require_new(name, made, where)
        made[name] = value
    return made


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each.strip() for each in value)


def _require_new(name: str, rows: Mapping[str, object], where: str) -> None:
    if not name or name in rows:
        what = "needs the name of an image" if not name else "names an image that is there already"
        raise InputError(where, what, got=repr(name))


def _classes(folder: Path, tables: Iterable[_Table]) -> tuple[str, ...]:
    """The labels of a folder: a text's, a heading's, or all that any table names, by name."""
    given = list(tables)
    named = dict.fromkeys(table.classes for table in given if table.classes is not None)
    if len(named) > 1:
        first, other = list(named)[:2]
        got = ", ".join(sorted(set(first) ^ set(other))[:5]) or "another order"
        raise InputError(str(folder), "needs the same columns in all of its tables", got=f"a difference in {got}")
    if (folder / CLASSES).is_file():
        classes = class_names(folder / CLASSES, least=1)
    elif named:
        classes = next(iter(named))
    else:
        classes = tuple(sorted({label for table in given for labels in table.rows.values() for label in labels}))
    for table in given:
        for image, labels in table.rows.items():
            unknown = [label for label in labels if label not in classes]
            if unknown:
                what = f"{image} has a label that is no class of {CLASSES}"
                raise InputError(str(table.where), what, got=repr(unknown[0]))
    if not 1 <= len(classes) <= MOST_LABELS or not all(classes):
        got = str(len(classes)) if all(classes) else "an empty name"
        raise InputError(str(folder), f"needs 1 to {MOST_LABELS} labels with names", got=got)
    return classes


def _matched(
    folder: Path, images: Mapping[Split, Path], split: Split, table: _Table, classes: tuple[str, ...]
) -> LabelSet:
    """Every image of a split with its labels, by its name below the split's folder, or ``images/``, or by its stem."""
    paths, bad, labels, used = images_below(images[split]), list[InputError](), list[Truth](), set[str]()
    if not paths:
        raise InputError(str(images[split]), "holds no image", fix="add images, or remove the folder")
    numbers = {name: number for number, name in enumerate(classes)}
    for path in paths:
        name = next((name for name in _called(path, folder, images[split]) if name in table.rows), None)
        if name is None:
            fix = "add a line for it, or remove the image"
            bad.append(InputError(str(path), "needs its labels", got=f"no line in {table.where.name}", fix=fix))
            continue
        used.add(name)
        row = np.zeros(len(classes), np.uint8)
        row[[numbers[label] for label in table.rows[name]]] = 1
        labels.append(row)
    if bad:
        raise joined(bad, len(paths), WHAT)
    _require_all_used(folder, images, table, used)
    return LabelSet(classes, tuple(paths), np.stack(labels))


def _called(path: Path, folder: Path, place: Path) -> list[str]:
    """What a table may call an image."""
    within = path.relative_to(place).as_posix()
    whole = [within, path.relative_to(folder).as_posix()]
    if path.is_relative_to(folder / "images"):
        whole.append(path.relative_to(folder / "images").as_posix())
    return [*whole, *(name[: -len(path.suffix)] for name in whole if path.suffix)]


def _require_all_used(folder: Path, images: Mapping[Split, Path], table: _Table, used: set[str]) -> None:
    left = [name for name in table.rows if name not in used]
    if left:
        known = {name for place in images.values() for path in images_below(place) for name in
                 _called(path, folder, place)}  # fmt: skip
        left = [name for name in left if name not in known]
    if left:
        _refuse_left(table, left)


def _refuse_left(table: _Table, left: list[str]) -> NoReturn:
    more = f" and {len(left) - 5} more" if len(left) > 5 else ""
    what, fix = "names images that are not there", "add them, or remove their lines"
    raise InputError(str(table.where), what, got=", ".join(map(repr, left[:5])) + more, fix=fix)
