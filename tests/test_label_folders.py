"""Tables of labels as people write them, and what is said of those that are none."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgepet.errors import InputError
from edgepet.images.labels import LabelSet, is_label_folder, open_labels, require_labels
from tests.box_folders import coco_folder
from tests.label_folders import LABELS, csv_folder, json_folder, labels_of
from tests.mask_folders import index_folder, save


def told(images: LabelSet) -> dict[str, tuple[str, ...]]:
    """The labels of every image, by its name."""
    return {
        path.name: tuple(np.array(images.classes)[row == 1].tolist())
        for path, row in zip(images.paths, images.labels, strict=True)
    }


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        save(folder / name, np.zeros((4, 4, 3), np.uint8))
    return folder


def written(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"labels.csv": "image,labels\ntrain/a.png,sea;boat\nval/b.png,\n"},
        {"labels.csv": "\ufefffilename,labels\na,sea | boat\nb,\n"},
        {"labels.csv": "image,boat,sea\na.png,1,1\nb.png,0,0\n"},
        {"labels/train.csv": "image,boat,sea\na.png, 1, 1\n", "labels/val.csv": "image,boat,sea\nb.png,0,0\n"},
        {"labels/train.json": '{"a.png": ["sea", "boat"]}', "labels/val.json": '{"b": []}'},
        {"labels.json": '{"images/train/a.png": ["sea", "boat"], "images/val/b.png": []}'},
        {"labels.csv": "image,labels\na,boat;sea\nb,\n", "classes.txt": "boat\nsea\n"},
    ],
)  # fmt: skip
def test_tables_are_read_as_people_write_them(files: Mapping[str, str], tmp_path: Path) -> None:
    written(pictures(tmp_path, "images/train/a.png", "images/val/b.png"), files)

    train, val = (open_labels(tmp_path, split) for split in ("train", "val"))  # type: ignore[arg-type]

    assert is_label_folder(tmp_path)
    assert train.classes == val.classes == ("boat", "sea")
    assert (told(train), told(val)) == ({"a.png": ("boat", "sea")}, {"b.png": ()})
    assert (train.counts().tolist(), len(train.images)) == ([1, 1], 1)


def test_roboflows_tables_are_read(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        pictures(tmp_path, f"{split}/a.png")
        written(tmp_path, {f"{split}/_classes.csv": "filename, sea, boat\na.png, 1, 0\n"})

    assert told(open_labels(tmp_path, "val")) == {"a.png": ("sea",)}
    assert open_labels(tmp_path, "test").classes == ("sea", "boat")


def test_a_part_of_train_is_held_out_where_there_is_no_val(tmp_path: Path) -> None:
    json_folder(tmp_path, count=10)

    train, val = (open_labels(tmp_path, split, seed=3) for split in ("train", "val"))  # type: ignore[arg-type]

    assert (len(train), len(val)) == (8, 2)
    assert {**told(train), **told(val)} == {f"{index:03}.png": labels_of(index) for index in range(10)}
    assert train.classes == LABELS


def test_boxes_and_masks_stand_in(tmp_path: Path) -> None:
    boxes = open_labels(coco_folder(tmp_path / "boxes", train=6), "train")
    masks = open_labels(index_folder(tmp_path / "masks", train=3, val=1), "train")

    expected = {f"{n:03}.png": {"red": "round", "blue": "square"} for n in range(6)}
    assert told(boxes) == {
        name: tuple(sorted(names[colour] for colour in labels_of(int(name[:3])))) for name, names in expected.items()
    }
    assert masks.labels.shape == (3, len(masks.classes))
    assert masks.labels.any(axis=1).all()
    assert not is_label_folder(tmp_path / "boxes")


MALFORMED = [
    ({"labels.csv": ""}, "labels.csv:1: needs a heading of columns that differ, got an empty file\n  fix: begin it with image,labels, or with image and a column for each label"),
    ({"labels.csv": "image\na.png\n"}, "labels.csv:1: needs a heading of columns that differ, got image\n  fix: begin it with image,labels, or with image and a column for each label"),
    ({"labels.csv": "image,sea,sea\na.png,1,0\n"}, "labels.csv:1: needs a heading of columns that differ, got image,sea,sea\n  fix: begin it with image,labels, or with image and a column for each label"),
    ({"labels.csv": "image,sea,boat\na.png,1\n"}, "labels.csv:2: needs 3 columns, got 2"),
    ({"labels.csv": "image,sea,boat\na.png,1,yes\n"}, "labels.csv:2: needs 0 or 1 under 'boat', got 'yes'"),
    ({"labels.csv": "image,labels\na.png,sea\na.png,boat\n"}, "labels.csv:3: names an image that is there already, got 'a.png'"),
    ({"labels.csv": "image,labels\n,sea\n"}, "labels.csv:2: needs the name of an image, got ''"),
    ({"labels.csv": 'image,labels\na.png,"sea\n'}, "labels.csv: must be a CSV in UTF-8, got unexpected end of data"),
    ({"labels.csv": "image,labels\na.png,sea\n"}, "images/train/b.png: needs its labels, got no line in labels.csv\n  fix: add a line for it, or remove the image"),
    ({"labels.csv": "image,labels\na,sea\nb,sea\nc,sea\n"}, "labels.csv: names images that are not there, got 'c'\n  fix: add them, or remove their lines"),
    ({"labels.csv": "image,labels\nc,sea\n"}, "images/train: needs labels for its images, got 2 of 2 that are not\n  a.png: needs its labels, got no line in labels.csv\n  b.png: needs its labels, got no line in labels.csv\n  fix: replace these files or remove them"),
    ({"labels.csv": "image,labels\na,sea\nb,lake\n", "classes.txt": "sea\n"}, "labels.csv: b has a label that is no class of classes.txt, got 'lake'"),
    ({"labels.csv": "image,labels\na,\nb,\n"}, ": needs 1 to 255 labels with names, got 0"),
    ({"labels.json": "[1]"}, 'labels.json: needs an object, image to a list of labels, got list\n  fix: write {"X.jpg": ["LABEL", "LABEL"], ...}'),
    ({"labels.json": '{"a.png": "sea"}'}, 'labels.json: needs an object, image to a list of labels, got another value of \'a.png\'\n  fix: write {"X.jpg": ["LABEL", "LABEL"], ...}'),
    ({"labels.json": '{"a.png": ["sea"], "a.png": []}'}, "labels.json: names an image that is there already, got 'a.png'"),
    ({"labels.json": "{"}, "labels.json: must be JSON in UTF-8, got Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ({"labels/train.csv": "image,sea\na,1\nb,0\n", "labels/val.csv": "image,lake\nc,1\n"}, ": needs the same columns in all of its tables, got a difference in lake, sea"),
    ({"labels/val.csv": "image,sea\nc,1\n"}, ": needs the labels of train, got none\n  fix: write labels/train.csv"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), MALFORMED)
def test_what_is_wrong_with_a_table_is_said(files: Mapping[str, str], message: str, tmp_path: Path) -> None:
    written(pictures(tmp_path, "images/train/a.png", "images/train/b.png"), files)

    with pytest.raises(InputError) as error:
        open_labels(tmp_path, "train")

    where = str(tmp_path) if message.startswith(":") else f"{tmp_path}/"
    assert str(error.value) == where + message


def test_what_is_no_folder_of_labels_is_said(tmp_path: Path) -> None:
    pictures(tmp_path, "pictures/a.png")

    with pytest.raises(InputError) as none:
        open_labels(tmp_path, "train")
    csv_folder(tmp_path / "data", test=0)
    with pytest.raises(InputError) as test:
        open_labels(tmp_path / "data", "test")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/labels.json").write_text(json.dumps({"a": ["b"]}))
    with pytest.raises(InputError) as nowhere:
        open_labels(tmp_path / "odd", "train")

    fix = "write images/train/X.jpg and labels.csv, with a line IMAGE,LABEL;LABEL for each"
    assert str(none.value) == f"{tmp_path}: is no folder of images with labels, got pictures/\n  fix: {fix}"
    assert (
        str(test.value) == f"{tmp_path}/data: has no images with labels of test, got only train, val\n  fix: add test/"
    )
    assert (
        str(nowhere.value)
        == f"{tmp_path}/odd: needs its images in images/, got no folder\n  fix: put them into images/train"
    )


def test_images_without_any_label_teach_nothing(tmp_path: Path) -> None:
    written(pictures(tmp_path, "images/a.png", "images/b.png"), {"labels.csv": "image,sea\na,0\nb,0\n"})

    with pytest.raises(InputError) as error:
        require_labels(open_labels(tmp_path, "train"), tmp_path)

    fix = "name the labels of some of them"
    assert str(error.value) == f"{tmp_path}: needs training images with labels, got none in 1\n  fix: {fix}"
