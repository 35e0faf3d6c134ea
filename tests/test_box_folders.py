"""Folders of images with boxes as tools write them: COCO, Pascal VOC, YOLO, and Roboflow's forms of all three."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepet.errors import InputError
from edgepet.images.box_folders import is_box_folder, open_boxes
from edgepet.images.boxes import BoxSet, check_boxes, require_objects
from edgepet.images.masks import squashed
from edgepet.spec import Preprocess
from tests.box_folders import annotation, coco_folder, picture, voc, write_coco, yolo
from tests.mask_folders import save

PREPROCESS = squashed(Preprocess(image_size=(16, 16)))
SIZE = (30, 40)  # height, width
IMAGE = {"id": 5, "file_name": "a.png", "height": 30, "width": 40}


def told(images: BoxSet) -> list[tuple[str, list[list[float]], list[int], list[bool]]]:
    """Every image by name, its corners, labels and crowds."""
    checked = check_boxes(images, PREPROCESS)
    return [
        (path.name, np.round(each.corners, 6).tolist(), each.labels.tolist(), each.crowds.tolist())
        for path, each in zip(checked.paths, checked.boxes, strict=True)
    ]


def one(folder: Path, name: str = "a.png", size: tuple[int, int] = SIZE) -> Path:
    """An image for training."""
    return save(folder / name, picture(1, size)[0])


def held_out(folder: Path) -> None:
    """A val split, so that none is made of train."""
    one(folder / "images/val")
    write_coco(folder, [IMAGE], [], split="val")


# ---------------------------------------------------------------------------------------------------------------- COCO


def test_coco_names_its_classes_in_the_order_of_ids_that_need_not_be_contiguous(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)

    train, test = open_boxes(folder, "train"), open_boxes(folder, "test")

    assert train.classes == ("round", "square")
    assert (len(train), len(test)) == (4, 2)
    expected = [
        (f"00{n}.png", [[x, y, x + w, y + h] for (x, y, w, h), _ in objects], [label for _, label in objects])
        for n, (_, objects) in enumerate(map(picture, range(4)))
    ]
    assert [each[:3] for each in told(train)] == expected
    assert sum(train.counts()) == sum(len(labels) for _, _, labels in expected)
    assert not is_box_folder(folder)  # its objects may have silhouettes


def test_crowds_and_images_without_an_object_are_kept(tmp_path: Path) -> None:
    one(tmp_path / "images/train")
    one(tmp_path / "images/train", "b.png")
    held_out(tmp_path)
    silhouette = {"size": [30, 40], "counts": [30 * 40]}
    crowd = annotation(2, 5, (0, 0, 40, 30), 3, iscrowd=1, segmentation=silhouette)
    write_coco(tmp_path, [IMAGE, {**IMAGE, "id": 6, "file_name": "b.png"}], [annotation(1, 5, (1, 2, 3, 4), 7), crowd])

    train = open_boxes(tmp_path, "train")

    assert told(train) == [("a.png", [[1, 2, 4, 6], [0, 0, 40, 30]], [1, 0], [False, True]), ("b.png", [], [], [])]
    assert train.counts().tolist() == [0, 1]
    assert require_objects(train, tmp_path) == ["round"]


def test_a_box_that_rounding_put_over_the_edge_is_cut_there(tmp_path: Path) -> None:
    one(tmp_path / "images/train")
    held_out(tmp_path)
    write_coco(tmp_path, [IMAGE], [annotation(1, 5, (-0.5, 20, 41.2, 10.9), 7)])

    assert told(open_boxes(tmp_path, "train")) == [("a.png", [[0, 20, 40, 30]], [1], [False])]


def test_roboflow_writes_coco_beside_the_images(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        one(tmp_path / split)
        document = {
            "images": [IMAGE],
            "annotations": [annotation(1, 5, (1, 2, 3, 4), 3)],
            "categories": [{"id": 3, "name": "x"}],
        }
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(document))

    assert told(open_boxes(tmp_path, "val")) == [("a.png", [[1, 2, 4, 6]], [0], [False])]


def test_a_part_of_train_is_held_out_where_there_is_no_val(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path, train=10, val=0)

    train, val = (open_boxes(folder, split, val_fraction=0.3, seed=1) for split in ("train", "val"))

    assert (len(train), len(val)) == (7, 3)
    assert not set(train.paths) & set(val.paths)


# ------------------------------------------------------------------------------------------------------ Pascal VOC, YOLO


def test_vocs_corners_count_from_one_and_what_is_difficult_is_not_counted(tmp_path: Path) -> None:
    one(tmp_path / "JPEGImages", "a.jpg")
    one(tmp_path / "JPEGImages", "b.jpg")
    for stem, text in (
        ("a", voc(SIZE, ("dog", (1, 2, 3, 4)), ("cat", (0, 0, 40, 30)))),
        ("b", voc(SIZE, ("cat", (5, 5, 5, 5)), inside="<difficult>1</difficult>")),
    ):
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / f"Annotations/{stem}.xml").write_text(text)
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("b -1\n")

    train, val = open_boxes(tmp_path, "train"), open_boxes(tmp_path, "val")

    assert train.classes == val.classes == ("cat", "dog")
    assert told(train) == [("a.jpg", [[1, 2, 4, 6], [0, 0, 40, 30]], [1, 0], [False, False])]
    assert told(val) == [("b.jpg", [[5, 5, 10, 10]], [0], [True])]
    assert is_box_folder(tmp_path)


@pytest.mark.parametrize("beside", ["{split}", "annotations/{split}"])
def test_vocs_files_may_lie_in_folders_of_splits(beside: str, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        one(tmp_path / (split if beside == "{split}" else f"images/{split}"))
        place = tmp_path / beside.format(split=split)
        place.mkdir(parents=True, exist_ok=True)
        (place / "a.xml").write_text(voc(SIZE, ("dog", (1, 2, 3, 4))))

    assert told(open_boxes(tmp_path, "val")) == [("a.png", [[1, 2, 4, 6]], [0], [False])]


@pytest.mark.parametrize(
    "form",
    [
        "names: [round, 'square'] # two",
        'names:\n  - round\n  - "square"\nnc: 2',
        "nc: 2\nnames:\n  0: round\n  1: square\n",
        None,
    ],
)
@pytest.mark.parametrize("within", ["{0}/{1}", "{1}/{0}"])
def test_yolo_tells_parts_of_the_image(form: str | None, within: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        images, labels = (tmp_path / within.format(what, split) for what in ("images", "labels"))
        one(images)
        one(images, "b.png")
        labels.mkdir(parents=True)
        (labels / "a.txt").write_text(yolo(SIZE, (1, (4, 6, 8, 3))) + "0 0.1 0.1 0.5 0.1 0.5 0.9 0.3 0.9\n")
        (labels / "c.txt").write_text("")
    (tmp_path / ("classes.txt" if form is None else "data.yaml")).write_text(form or "round\nsquare\n")

    train = open_boxes(tmp_path, "train")

    assert train.classes == ("round", "square")
    assert told(train) == [("a.png", [[4, 6, 12, 9], [4, 3, 20, 27]], [1, 0], [False, False]), ("b.png", [], [], [])]
    assert [(each.path.name, each.why) for each in train.passed_over] == [("c.txt", "boxes without their image")]
    assert is_box_folder(tmp_path)


# --------------------------------------------------------------------------------------------------- what is refused

COCO = "annotations/instances_train.json"
RLE = lambda counts: annotation(1, 5, (0, 0, 4, 4), 3, segmentation={"size": [30, 40], "counts": counts})  # noqa: E731  a row of a table
BOX = lambda *box: annotation(1, 5, box, 3)  # noqa: E731  a row of a table
MALFORMED: list[tuple[list[Any], str]] = [
    ([BOX(38, 0, 4, 4)], "{0}.annotations[0].bbox: must lie within its image, 40 x 30, got 38, 0 to 42, 4\n  fix: draw the box again, or remove it"),
    ([BOX(40.5, 0, 0.2, 4)], "{0}.annotations[0].bbox: must lie within its image, 40 x 30, got 40.5, 0 to 40.7, 4\n  fix: draw the box again, or remove it"),
    ([BOX(-5, 0, 4, 4)], "{0}.annotations[0].bbox: must lie within its image, 40 x 30, got -5, 0 to -1, 4\n  fix: draw the box again, or remove it"),
    ([BOX(3, 3, 0, 4)], "{0}.annotations[0].bbox: needs a box of some width and height, got 0 x 4\n  fix: draw the box again, or remove it"),
    ([BOX(3, 3, 5, -4)], "{0}.annotations[0].bbox: needs a box of some width and height, got 5 x -4\n  fix: draw the box again, or remove it"),
    ([BOX(float("nan"), 3, 5, 4)], "{0}.annotations[0].bbox[0]: needs a finite number, got nan"),
    ([BOX(1, 2, float("inf"), 4)], "{0}.annotations[0].bbox[2]: needs a finite number, got inf"),
    ([BOX(1, 2, 3)], "{0}.annotations[0].bbox: needs 4 numbers, got [1, 2, 3]"),
    ([annotation(1, 5, (1, 1, 2, 2), 1)], "{0}.annotations[0].category_id: must be a category's id, got 1"),
    ([annotation(1, 6, (1, 1, 2, 2), 3)], "{0}.annotations[0].image_id: must be an image's id, got 6"),
    ([{"id": 1, "image_id": 5, "category_id": 3}], "{0}.annotations[0]: needs the key 'bbox'"),
    ([RLE([7])], "{0}.annotations[0].segmentation.counts: must be lengths that sum to 1200 pixels, got 7"),
    ([RLE("~~")], "{0}.annotations[0].segmentation.counts: must be lengths that sum to 1200 pixels, got text that is none"),
    ([BOX(1, 2, 3, 4), BOX(5, 6, 7, 8)], "{0}.annotations[1].id: must be an annotation's own, got 1"),
    ([annotation(1, 5, (1, 1, 2, 2), 3, iscrowd=-1)], "{0}.annotations[0].iscrowd: needs an integer of at least 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("annotations", "message"), MALFORMED)
def test_an_annotation_that_is_none_names_its_place(annotations: list[Any], message: str, tmp_path: Path) -> None:
    one(tmp_path / "images/train")
    held_out(tmp_path)
    file = write_coco(tmp_path, [IMAGE], annotations)

    with pytest.raises(InputError) as error:
        open_boxes(tmp_path, "train")

    assert str(error.value) == message.format(file)


DOCUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"images": []}, ".images: needs one image or more, got 0"),
    ({"images": [IMAGE, IMAGE]}, ".images[1].id: must be an image's own, got 5"),
    ({"categories": []}, ".categories: needs 1 to 255 categories, got 0"),
    ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, ".categories[1]: must have an id and a name of its own, got 1 and 'b'"),
    ({"images": [{**IMAGE, "file_name": "/a.png"}]}, ": needs file names within the images' folder, got '/a.png'"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), DOCUMENTS)
def test_a_coco_file_that_is_none_names_the_place(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    one(tmp_path / "images/train")
    file = write_coco(tmp_path, [IMAGE], [])
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))

    with pytest.raises(InputError) as error:
        open_boxes(tmp_path, "train")

    assert str(error.value) == f"{file}{message}"


def test_all_annotations_that_are_none_are_told_at_once(tmp_path: Path) -> None:
    one(tmp_path / "images/train")
    write_coco(
        tmp_path, [IMAGE], [BOX(1, 1, 0, 1), annotation(2, 5, (1, 1, 2, 2), 3), annotation(3, 5, (1, 1, 2, 2), 9)]
    )

    with pytest.raises(InputError) as error:
        open_boxes(tmp_path, "train")

    assert str(error.value) == (
        f"{tmp_path / 'annotations'}: needs boxes that fit their images, got 2 of 3 that are not\n"
        "  instances_train.json.annotations[0].bbox: needs a box of some width and height, got 0 x 1\n"
        "  instances_train.json.annotations[2].category_id: must be a category's id, got 9\n"
        "  fix: replace these files or remove them"
    )


def test_an_image_that_is_not_there_is_told(tmp_path: Path) -> None:
    one(tmp_path / "images/train")
    held_out(tmp_path)
    write_coco(tmp_path, [IMAGE, {**IMAGE, "id": 6, "file_name": "b.png"}], [])

    with pytest.raises(InputError) as error:
        open_boxes(tmp_path, "train")

    assert str(error.value) == (
        f"{tmp_path / 'images/train/b.png'}: is not a readable image, got No such file or directory\n"
        "  fix: replace the file or remove it"
    )


def test_an_image_of_another_size_than_its_boxes_say_is_told(tmp_path: Path) -> None:
    one(tmp_path / "images/train", size=(30, 30))
    held_out(tmp_path)
    write_coco(tmp_path, [IMAGE], [])

    with pytest.raises(InputError) as error:
        check_boxes(open_boxes(tmp_path, "train"), PREPROCESS)

    assert str(error.value) == (
        f"{tmp_path / 'images/train/a.png'}: must be as large as its boxes say, 40 x 30, got 30 x 30\n"
        "  fix: draw the boxes on the image itself, or remove both"
    )


VOC: list[tuple[str, str]] = [
    ("<annotation", ": must be XML, got unclosed token: line 1, column 0"),
    ("<!DOCTYPE a><annotation/>", ": must be XML without declarations of its own, got a DOCTYPE or an ENTITY"),
    ("<objects/>", ": must have <annotation> around all, got <objects>"),
    ("<annotation><object><bndbox/></object></annotation>", ": object 0: needs <name> and <bndbox>, got no <name>"),
    ("<annotation><object><name>a</name></object></annotation>", ": object 0: needs <name> and <bndbox>, got no <bndbox>"),
    (voc(SIZE, ("dog", (1, 2, 3, 4))).replace("<xmax>4", "<xmax>nan"), ": object 0: bndbox: needs a number in <xmax>, got 'nan'"),
    (voc(SIZE, ("dog", (1, 2, 3, 4))).replace("<ymin>3", "<ymin>"), ": object 0: bndbox: needs a number in <ymin>, got ''"),
    (voc(SIZE, ("dog", (1, 2, 3, 4))).replace("<width>40", "<width>w"), ": size: needs a number in <width>, got 'w'"),
    ("<annotation/>", ": needs <size> with the image's width and height\n  fix: write it, or let your tool open the image"),
    (voc(SIZE, ("dog", (1, 2, 3, 4)), ("dog", (38, 0, 4, 4))), ": object 1: must lie within its image, 40 x 30, got 38, 0 to 42, 4\n  fix: draw the box again, or remove it"),
    (voc(SIZE, ("dog", (1, 2, 0, 4))), ": object 0: needs a box of some width and height, got 0 x 4\n  fix: draw the box again, or remove it"),
    (voc(SIZE, ("cow", (1, 2, 3, 4))), ": object 0: must be of a class of the folder, got 'cow'\n  fix: name the class in classes.txt, or remove the object"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), VOC)
def test_a_voc_file_that_is_none_names_the_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\n")
    for split in ("train", "val"):
        one(tmp_path / split)
        (tmp_path / split / "a.xml").write_text(text)

    with pytest.raises(InputError) as error:
        open_boxes(tmp_path, "train")

    assert str(error.value) == f"{tmp_path / 'train/a.xml'}{message}"


def test_an_image_without_vocs_file_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        one(tmp_path / "train", f"{name}.png")
    (tmp_path / "train/a.xml").write_text(voc(SIZE))

    with pytest.raises(InputError) as error:
        open_boxes(tmp_path, "train")

    assert (
        str(error.value)
        == f"{tmp_path / 'train/b.png'}: needs its boxes, got no b.xml\n  fix: add the file, or remove the image"
    )


YOLO: list[tuple[str, str]] = [
    ("2 .5 .5 .1 .1", ":1: needs the number of a class, 0 to 1, first, got '2'"),
    ("-1 .5 .5 .1 .1", ":1: needs the number of a class, 0 to 1, first, got '-1'"),
    ("1.0 .5 .5 .1 .1", ":1: needs the number of a class, 0 to 1, first, got '1.0'"),
    ("0 .5 .5 .1", ":1: needs middle x and y, width and height behind the class, or the points of an outline, got '.5 .5 .1'"),
    ("0 .5 .5 .1 nan", ":1: needs middle x and y, width and height behind the class, or the points of an outline, got '.5 .5 .1 nan'"),
    ("0 .5 .5 .1 x", ":1: needs middle x and y, width and height behind the class, or the points of an outline, got '.5 .5 .1 x'"),
    ("\n0 320 200 64 48", ":2: must lie within its image, in parts of it from 0 to 1, got 288, 176 to 352, 224\n  fix: draw the box again, or remove it"),
    ("0 .5 .5 0 .1", ":1: needs a box of some width and height, got 0 x 0.1\n  fix: draw the box again, or remove it"),
    ("0 .5 .5 .1 .1\n0  .5 .5 .1 .1", ":2: must be another object than those above, got '0  .5 .5 .1 .1'"),
]  # fmt: skip


def yolo_folder(folder: Path, text: str) -> Path:
    (folder / "classes.txt").write_text("round\nsquare\n")
    for split in ("train", "val"):
        one(folder / "images" / split)
        (folder / "labels" / split).mkdir(parents=True)
        (folder / "labels" / split / "a.txt").write_text(text)
    return folder


@pytest.mark.parametrize(("text", "message"), YOLO)
def test_a_yolo_line_that_is_none_names_the_place(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        open_boxes(yolo_folder(tmp_path, text), "train")

    assert str(error.value) == f"{tmp_path / 'labels/train/a.txt'}{message}"


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def yaml(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "data.yaml").write_text(text) and None


def is_a_pipe(folder: Path) -> None:
    (folder / "images/train/a.png").unlink()
    os.mkfifo(folder / "images/train/a.png")


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (without("classes.txt"), "{0}: must name its classes, got no data.yaml and no classes.txt\n  fix: write {0}/classes.txt with a class a line, that of number 0 first"),
    (yaml("names: [a, a]"), "{0}/data.yaml: needs a list of names of its own under `names:`, got a name twice\n  fix: write {0}/classes.txt with a class a line"),
    (yaml("nc: 2\n"), "{0}/data.yaml: needs a list of names of its own under `names:`, got none that is read here\n  fix: write {0}/classes.txt with a class a line"),
    (yaml("names: [a, b"), "{0}/data.yaml: needs a list of names of its own under `names:`, got none that is read here\n  fix: write {0}/classes.txt with a class a line"),
    (without("images/train/a.png"), "{0}/images/train: holds no image\n  fix: add images, or remove the folder"),
    (is_a_pipe, "{0}/images/train/a.png: is not a readable image, got a pipe or a device\n  fix: replace the file or remove it"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_yolo_folder_that_is_not_whole_is_refused(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = yolo_folder(tmp_path, "")
    change(folder)

    with pytest.raises(InputError) as error:
        open_boxes(folder, "train")

    assert str(error.value) == message.format(tmp_path)


def test_folders_of_something_else_and_splits_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train/cats").mkdir(parents=True)
    with pytest.raises(InputError) as other:
        open_boxes(tmp_path, "train")
    with pytest.raises(InputError) as absent:
        open_boxes(coco_folder(tmp_path / "coco", test=0), "test")

    assert str(other.value) == (
        f"{tmp_path}: is no folder of images with boxes, got train/\n"
        "  fix: write images/train/X.jpg and annotations/instances_train.json, as COCO has it"
    )
    assert (
        str(absent.value)
        == f"{tmp_path / 'coco'}: has no images with boxes of test, got only train, val\n  fix: add test/"
    )


def test_images_without_any_object_are_refused_for_training(tmp_path: Path) -> None:
    train = open_boxes(yolo_folder(tmp_path, ""), "train")

    with pytest.raises(InputError) as error:
        require_objects(train, tmp_path)

    assert str(error.value) == (
        f"{tmp_path}: needs training images with objects, got none in 1\n"
        "  fix: draw boxes around the objects of some of them"
    )
