"""Folders of images with masks as tools write them: index PNGs, ADE20K, Cityscapes, COCO and Roboflow's."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepet.errors import InputError
from edgepet.images.mask_folders import CITY_CLASSES, is_mask_folder, open_masks
from edgepet.images.masks import check_masks, squashed
from edgepet.spec import NpArray, Preprocess
from tests.mask_folders import NAMES, index_folder, save, save_mask, scene

PREPROCESS = squashed(Preprocess(image_size=(16, 16)))


def test_an_index_folder_is_listed_split_by_split(tmp_path: Path) -> None:
    folder = index_folder(tmp_path)

    train, test = open_masks(folder, "train"), open_masks(folder, "test")

    assert train.classes == NAMES
    assert [path.relative_to(folder).as_posix() for path in train.paths] == [
        f"images/train/00{n}.png" for n in range(4)
    ]
    assert [mask.where.relative_to(folder).as_posix() for mask in test.masks] == [
        "masks/test/000.png",
        "masks/test/001.png",
    ]
    np.testing.assert_array_equal(train.masks[3].read(), scene(3)[1])
    assert is_mask_folder(folder)
    assert not is_mask_folder(folder / "images")


def test_mmsegmentations_names_are_known(tmp_path: Path) -> None:
    folder = index_folder(tmp_path, images="img_dir", masks="ann_dir")

    assert len(open_masks(folder, "val")) == 2


def test_images_and_masks_may_lie_in_folders_below(tmp_path: Path) -> None:
    folder = index_folder(tmp_path, train=1)
    for place in ("north", "south"):  # of one name in two folders
        save(folder / f"images/train/{place}/a.jpg", scene(7)[0])
        save_mask(folder / f"masks/train/{place}/a.png", scene(7)[1])

    train = open_masks(folder, "train")

    assert [mask.where.relative_to(folder / "masks/train").as_posix() for mask in train.masks] == [
        "000.png",
        "north/a.png",
        "south/a.png",
    ]


def test_a_part_of_train_is_held_out_where_there_is_no_val(tmp_path: Path) -> None:
    folder = index_folder(tmp_path, train=10, val=0)

    train, val = (open_masks(folder, split, val_fraction=0.3, seed=1) for split in ("train", "val"))
    other = open_masks(folder, "val", val_fraction=0.3, seed=2)

    assert (len(train), len(val)) == (7, 3)
    assert not set(train.paths) & set(val.paths)
    assert other.paths != val.paths
    assert open_masks(folder, "val", val_fraction=0.3, seed=1) == val


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    folder = index_folder(tmp_path)
    save_mask(folder / "masks/train/900.png", scene(1)[1])

    assert [(each.path.name, each.why) for each in open_masks(folder, "train").passed_over] == [
        ("900.png", "a mask without its image")
    ]


# ---------------------------------------------------------------------------------------------------- ADE20K, Cityscapes


def test_ade20k_counts_from_one_and_names_its_classes_in_a_table(tmp_path: Path) -> None:
    for folder, n in (("training", 2), ("validation", 1)):
        for number in range(n):
            pixels, mask = scene(number)
            save(tmp_path / f"images/{folder}/ADE_{number}.jpg", pixels)
            save_mask(tmp_path / f"annotations/{folder}/ADE_{number}.png", np.where(mask == 2, 0, mask + 1))
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1576\t11664\t1172\twall", "2\t0.1072\t6046\t612\tbuilding, edifice"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))

    train, val = open_masks(tmp_path, "train"), open_masks(tmp_path, "val")

    assert train.classes == ("wall", "building")
    assert (len(train), len(val)) == (2, 1)
    np.testing.assert_array_equal(train.masks[1].read(), np.where(scene(1)[1] == 2, 255, scene(1)[1]))


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_has_a_folder_a_city_and_ids_of_its_own(kind: str, tmp_path: Path) -> None:
    ids, training = np.array([[7, 8], [26, 0], [33, 4]]), np.array([[0, 1], [13, 255], [18, 255]])
    for split, city in (("train", "aachen"), ("val", "lindau")):
        name = f"{city}_000000_000019"
        save(tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", scene(1, (3, 2))[0])
        save_mask(tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_{kind}.png", ids if kind == "labelIds" else training)
        save(tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_color.png", scene(1, (3, 2))[0])

    train = open_masks(tmp_path, "train")

    assert len(train.classes) == 19
    assert train.classes[:2] == ("road", "sidewalk")
    assert train.classes == tuple(CITY_CLASSES)
    np.testing.assert_array_equal(train.masks[0].read(), training)
    assert train.passed_over == ()


# ---------------------------------------------------------------------------------------------------------------- COCO


def runs(mask: NpArray) -> list[int]:
    """Run lengths down the columns, those outside first."""
    flat = mask.ravel(order="F").astype(bool)
    ends = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    return [0] * bool(flat[0]) + np.diff(ends).tolist()


def annotation(category: int, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 5, "category_id": category, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0, **more}


def document(*annotations: Mapping[str, Any], size: tuple[int, int] = (6, 8), **more: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "a.png", "height": size[0], "width": size[1]}],
        "annotations": list(annotations),
        "categories": [{"id": 44, "name": "cat", "supercategory": "animal"}, {"id": 9, "name": "bird"}],
        "info": {}, **more,
    }  # fmt: skip


def coco(folder: Path, written: object, *, size: tuple[int, int] = (6, 8)) -> Path:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations/instances_train.json").write_text(json.dumps(written))
    save(folder / "images/train/a.png", scene(1, size)[0])
    return folder


def square(top: int, left: int, bottom: int, right: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def drawn(folder: Path, *annotations: Mapping[str, Any]) -> NpArray:
    (mask,) = masks_of(folder, *annotations)
    return mask


def masks_of(folder: Path, *annotations: Mapping[str, Any]) -> list[NpArray]:
    coco(folder, document(*annotations))
    (folder / "annotations/instances_val.json").write_text(json.dumps(document()))
    save(folder / "images/val/a.png", scene(1, (6, 8))[0])
    return [mask.read() for mask in open_masks(folder, "train").masks]


def test_categories_follow_the_background_in_the_order_of_their_ids(tmp_path: Path) -> None:
    mask = drawn(
        tmp_path, annotation(44, segmentation=[square(1, 2, 4, 7)]), annotation(9, segmentation=[square(0, 0, 1, 1)])
    )

    expected = np.zeros((6, 8))
    expected[1:4, 2:7], expected[0, 0] = 2, 1
    np.testing.assert_array_equal(mask, expected)
    assert open_masks(tmp_path, "train").classes == ("background", "bird", "cat")


def test_of_objects_that_overlap_the_smaller_lies_on_top_and_crowds_below_all(tmp_path: Path) -> None:
    small, large = annotation(44, segmentation=[square(2, 2, 4, 4)]), annotation(9, segmentation=[square(0, 0, 5, 6)])
    silhouette = np.zeros((6, 8))
    silhouette[:, 4:] = 1
    crowd = annotation(9, iscrowd=1, segmentation={"size": [6, 8], "counts": runs(silhouette)})

    mask = drawn(tmp_path, small, large, crowd)

    expected = np.where(silhouette, 255, 0)
    expected[0:5, 0:6] = 1
    expected[2:4, 2:4] = 2
    np.testing.assert_array_equal(mask, expected)


def test_polygons_cover_the_pixels_whose_middles_they_hold(tmp_path: Path) -> None:
    triangle, hole = [0.0, 0.0, 8.0, 0.0, 0.0, 6.0], [[5.2, 4.2, 7.9, 4.2, 7.9, 5.8, 5.2, 5.8]]

    mask = drawn(
        tmp_path,
        annotation(9, segmentation=[triangle]),
        annotation(44, segmentation=hole),
        annotation(44, segmentation=[]),
    )

    rows, columns = np.mgrid[0:6, 0:8] + 0.5
    expected = (columns / 8 + rows / 6 < 1).astype(int)
    expected[4:6, 5:8] = 2  # the middles 4.5 to 5.5, and 5.5 to 7.5
    np.testing.assert_array_equal(mask, expected)


def test_run_lengths_may_be_compressed_as_cocos_tools_do_it(tmp_path: Path) -> None:
    silhouette = np.zeros((6, 8))
    silhouette[1:4, 2:7], silhouette[5, 0] = 1, 1

    mask = drawn(tmp_path, annotation(9, segmentation={"size": [6, 8], "counts": "5172L00000005"}))  # pycocotools' own

    np.testing.assert_array_equal(mask, silhouette)


def test_roboflow_writes_the_json_beside_the_images(tmp_path: Path) -> None:
    for folder in ("train", "valid"):
        save(tmp_path / folder / "a.png", scene(1, (6, 8))[0])
        (tmp_path / folder / "_annotations.coco.json").write_text(
            json.dumps(document(annotation(9, segmentation=[square(0, 0, 2, 2)])))
        )

    val = open_masks(tmp_path, "val")

    assert val.paths == (tmp_path / "valid/a.png",)
    assert val.masks[0].read()[:2, :2].tolist() == [[1, 1], [1, 1]]
    assert check_masks(val, PREPROCESS).tolist() == [44, 4, 0]


def test_years_in_the_names_of_cocos_own_files_are_no_matter(tmp_path: Path) -> None:
    for year in ("train2017", "val2017"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{year}.json").write_text(json.dumps(document()))
        save(tmp_path / year / "a.png", scene(1, (6, 8))[0])

    assert open_masks(tmp_path, "val").paths == (tmp_path / "val2017/a.png",)


def test_an_image_of_another_size_than_the_json_says_is_told(tmp_path: Path) -> None:
    masks_of(tmp_path)
    save(tmp_path / "images/train/a.png", scene(1, (8, 8))[0])

    with pytest.raises(InputError) as error:
        check_masks(open_masks(tmp_path, "train"), PREPROCESS)

    assert str(error.value) == (
        f"{tmp_path / 'images/train/a.png'}: must be as large as its image, 8 x 8, got 8 x 6\n"
        "  fix: draw it on the image itself, or remove both"
    )


WITH = lambda **more: document(annotation(9, **more))  # noqa: E731  a row of a table
MALFORMED: list[tuple[object, str]] = [
    ([], ": needs an object, got []"),
    (document(annotation(7, segmentation=[])), ".annotations[0].category_id: must be a category's id, got 7"),
    (document({**annotation(9), "image_id": 6}), ".annotations[0].image_id: must be an image's id, got 6"),
    (document({"image_id": 5}), ".annotations[0]: needs the key 'category_id'"),
    (document(categories=[]), ".categories: needs 1 to 254 categories, got 0"),
    (document(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), ".categories[1]: must have an id and a name of its own, got 1 and 'b'"),
    (document(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]), ".categories[1]: must have an id and a name of its own, got 2 and 'a'"),
    (document(images=[]), ".images: needs one image or more, got 0"),
    (document(images=document()["images"] * 2), ".images[1].id: must be an image's own, got 5"),
    (document(size=(100_000, 100_000)), ".images[0]: must have at most 100000000 pixels, got (100000, 100000)"),
    (WITH(segmentation="no"), ".annotations[0].segmentation: needs polygons or run lengths, got no"),
    (WITH(segmentation=[[1, 2, 3, 4]]), ".annotations[0].segmentation: needs polygons of three points or more, got [1, 2, 3, 4]"),
    (WITH(segmentation=[[1, 2, 3, 4, 5, True]]), ".annotations[0].segmentation: needs polygons of three points or more, got [1, 2, 3, 4, 5, True]"),
    (WITH(segmentation=[[1, 2, 3, 4, 5, 1e10]]), ".annotations[0].segmentation: needs polygons of three points or more, got [1, 2, 3, 4, 5, 10000000000.0]"),
    (WITH(segmentation={"size": [8, 6], "counts": [48]}), ".annotations[0].segmentation.size: must be the image's [6, 8], got [8, 6]"),
    (WITH(segmentation={"size": [6, 8], "counts": [40]}), ".annotations[0].segmentation.counts: must be lengths that sum to 48 pixels, got 40"),
    (WITH(segmentation={"size": [6, 8], "counts": "~~"}), ".annotations[0].segmentation.counts: must be lengths that sum to 48 pixels, got text that is none"),
    (WITH(segmentation={"size": [6, 8], "counts": "P"}), ".annotations[0].segmentation.counts: must be lengths that sum to 48 pixels, got text that is none"),
    (WITH(segmentation={"size": [6, 8], "counts": "O"}), ".annotations[0].segmentation.counts: must be lengths that sum to 48 pixels, got -1"),
    (document(images=[{"id": 5, "file_name": "../a.png", "height": 6, "width": 8}]), ": needs file names within the images' folder, got '../a.png'"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "told"), MALFORMED)
def test_a_coco_file_that_is_none_names_the_place(written: object, told: str, tmp_path: Path) -> None:
    folder = coco(tmp_path, written)

    with pytest.raises(InputError) as error:
        open_masks(folder, "train")

    assert str(error.value) == f"{folder / 'annotations/instances_train.json'}{told}"


def test_a_file_that_is_no_json_is_told(tmp_path: Path) -> None:
    folder = coco(tmp_path, {})
    (folder / "annotations/instances_train.json").write_text("{")

    with pytest.raises(InputError, match=r"instances_train\.json: must be JSON, got Expecting property name"):
        open_masks(folder, "train")


# --------------------------------------------------------------------------------------------------- what is refused


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            for each in path.iterdir():
                each.unlink()
            path.rmdir()
        else:
            path.unlink()

    return change


def with_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "classes.txt").write_text(text) and None


def two_masks(folder: Path) -> None:
    save_mask(folder / "masks/train/001.bmp", scene(1)[1])


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (without("classes.txt"), "{0}: must name its classes, got no classes.txt\n  fix: write {0}/classes.txt with a class a line, value 0 first"),
    (with_text("red\n"), "{0}/classes.txt: needs 2 to 255 classes, one a line, got 1"),
    (with_text("red\n\nblue\n"), "{0}/classes.txt:2: needs a name of its own for every class, got an empty line"),
    (with_text("red\nblue\nred\n"), "{0}/classes.txt:3: needs a name of its own for every class, got 'red'"),
    (without("masks/train/001.png"), "{0}/images/train/001.png: needs one mask, got no {0}/masks/train/001.png\n  fix: add the mask, or remove the image"),
    (two_masks, "{0}/images/train/001.png: needs one mask, got 001.bmp and 001.png\n  fix: add the mask, or remove the image"),
    (without("masks/train"), "{0}: has no images with masks of train, got only val, test\n  fix: add train/"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), REFUSED)
def test_a_folder_that_is_not_whole_is_refused(
    change: Callable[[Path], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = index_folder(Path("data"))
    change(folder)

    with pytest.raises(InputError) as error:
        open_masks(folder, "train")

    assert str(error.value) == told.format("data")


def test_images_without_masks_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = index_folder(Path("data"))
    for number in (0, 2):
        (folder / f"masks/train/00{number}.png").unlink()

    with pytest.raises(InputError) as error:
        open_masks(folder, "train")

    assert str(error.value) == (
        "data/images/train: needs masks that fit their images, got 2 of 4 that are not\n"
        "  000.png: needs one mask, got no data/masks/train/000.png\n"
        "  002.png: needs one mask, got no data/masks/train/002.png\n"
        "  fix: replace these files or remove them"
    )


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train/cats").mkdir(parents=True)

    with pytest.raises(InputError) as error:
        open_masks(tmp_path, "train")

    assert str(error.value) == (
        f"{tmp_path}: is no folder of images with masks, got train/\n"
        "  fix: write images/train/X.jpg, masks/train/X.png and classes.txt with a class a line"
    )


def test_a_test_split_is_not_made_of_others(tmp_path: Path) -> None:
    folder = index_folder(tmp_path, test=0)

    with pytest.raises(InputError, match=r"has no images with masks of test, got only train, val\n  fix: add test/$"):
        open_masks(folder, "test")


def test_a_val_fraction_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^`val_fraction`: must be between 0 and 1, without them, got 1$"):
        open_masks(index_folder(tmp_path, val=0), "train", val_fraction=1)


def test_an_image_that_is_no_file_is_refused(tmp_path: Path) -> None:
    folder = index_folder(tmp_path)
    (folder / "images/train/001.png").unlink()
    os.mkfifo(folder / "images/train/001.png")

    with pytest.raises(InputError, match=r"001\.png: is not a readable image, got a pipe or a device"):
        open_masks(folder, "train")
