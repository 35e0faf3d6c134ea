"""What folders of images with masks and folders of images with boxes have in common: splits, COCO's files, classes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from edgepet.errors import InputError
from edgepet.files import read_file
from edgepet.images.folders import Split, folders_in, split_of
from edgepet.images.masks import MOST_CLASSES

CLASSES = "classes.txt"


def by_split(folder: Path) -> dict[Split, Path]:
    """The folders of splits in ``folder``; none where it is no folder.

    Raises:
        InputError: two are one split.
    """
    if not folder.is_dir():
        return {}
    found = dict[Split, Path]()
    for item in folders_in(folder):
        split = split_of(item.name)
        if split is not None:
            if split in found:
                got = f"{found[split].name}/ and {item.name}/"
                raise InputError(str(folder), f"needs one folder for {split}", got=got, fix="keep one, or join them")
            found[split] = item
    return found


def coco_files(folder: Path) -> dict[Split, Path]:
    """The COCO file of each split: in ``annotations/``, or as Roboflow writes them, in the split's own folder."""
    found = dict[Split, Path]()
    for item in sorted((folder / "annotations").glob("instances_*.json")):
        split = split_of(item.stem.removeprefix("instances_").rstrip("0123456789"))
        if split is not None:
            found.setdefault(split, item)
    for item in folders_in(folder) if folder.is_dir() else ():
        split, beside = split_of(item.name), item / "_annotations.coco.json"
        if split is not None and beside.is_file():
            found.setdefault(split, beside)
    return found


def coco_images(folder: Path, split: Split, file: Path) -> Path:
    """Where the images of a COCO file lie."""
    if file.name.startswith("_"):
        return file.parent
    year = file.stem.removeprefix("instances_")
    places = [by_split(folder / "images").get(split), folder / "images" / year, folder / year, folder / "images"]
    for place in places:
        if place is not None and place.is_dir():
            return place
    fix = f"put the images into {folder / 'images' / split}"
    raise InputError(str(file), "needs its images in a folder beside it", got=f"no folder images/{split}", fix=fix)


def class_names(file: Path, *, least: int) -> tuple[str, ...]:
    """The names of classes that a text has, one a line, or in a table as ADE20K's.

    Raises:
        InputError: fewer than ``least`` or too many, an empty line, or a name that is there twice.
    """
    try:
        lines = read_file(file).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(str(file), "must be text in UTF-8", got=f"byte {error.start}") from error
    if file.name.lower().startswith(
        "objectinfo"
    ):  # Idx, Ratio, Train, Val, Name, with tabs between and a line of headings
        lines = [line.split("\t")[-1].split(",")[0] for line in lines[1:]]
    names = tuple(line.strip() for line in lines)
    while names and not names[-1]:
        names = names[:-1]
    if not least <= len(names) <= MOST_CLASSES:
        raise InputError(str(file), f"needs {least} to {MOST_CLASSES} classes, one a line", got=len(names))
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            what = "needs a name of its own for every class"
            raise InputError(f"{file}:{number}", what, got=repr(name) if name else "an empty line")
    return names


def part_of(paths: tuple[Path, ...], split: Split, val_fraction: float, seed: int) -> list[int]:
    """Which of the training images belong to train or val: by a digest of each name, as class folders are split."""
    if len(paths) < 2:
        what = "needs two images to be split into train and val"
        raise InputError(str(paths[0].parent), what, got=len(paths), fix="add images or make val/")

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/".encode() + os.fsencode(paths[index].name)).digest()

    count = min(max(round(len(paths) * val_fraction), 1), len(paths) - 1)
    held_out = set(sorted(range(len(paths)), key=rank)[:count])
    return [index for index in range(len(paths)) if (index in held_out) == (split == "val")]
