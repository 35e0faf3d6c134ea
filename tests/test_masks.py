"""Index images as masks: what values stand for, what is refused and how it is told, and that sizes stay aligned."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgepet.errors import InputError
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import (
    MaskFile,
    Numbering,
    check_masks,
    read_masks,
    require_classes,
    resized,
    squashed,
    write_mask,
)
from edgepet.spec import Preprocess
from tests.mask_folders import COLOURS, NAMES, index_folder, save, save_mask, scene

PREPROCESS = squashed(Preprocess(image_size=(16, 16), crop_fraction=0.9, orientation="exif"))


def test_a_palette_is_read_by_its_numbers_and_not_by_its_colours(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    write_mask(tmp_path / "a.png", mask, COLOURS)

    np.testing.assert_array_equal(MaskFile(tmp_path / "a.png", Numbering.from_zero(3)).read(), mask)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        assert image.convert("RGB").getpixel((1, 0)) == COLOURS[1]
        assert image.convert("RGB").getpixel((0, 1)) == (255, 0, 255)


def test_grey_and_one_bit_images_are_index_images_too(tmp_path: Path) -> None:
    grey = np.array([[0, 1], [2, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")

    np.testing.assert_array_equal(MaskFile(tmp_path / "grey.png", Numbering.from_zero(3)).read(), grey)
    np.testing.assert_array_equal(MaskFile(tmp_path / "bits.png", Numbering.from_zero(3)).read(), [[1, 0]])


def test_ade20k_counts_from_one_and_does_not_count_zero(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)).save(tmp_path / "a.png")

    np.testing.assert_array_equal(MaskFile(tmp_path / "a.png", Numbering.from_one(3)).read(), [[255, 0], [1, 2]])


def test_resizing_takes_the_nearest_and_never_a_number_between_two() -> None:
    mask = np.array([[0, 2], [2, 0]], np.uint8)

    np.testing.assert_array_equal(resized(mask, (4, 4)), np.kron(mask, np.ones((2, 2))))
    np.testing.assert_array_equal(resized(np.kron(mask, np.ones((3, 3), np.uint8)), (2, 2)), mask)
    assert resized(mask, (3, 5)).shape == (3, 5)


def test_masks_of_a_batch_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    images = open_masks(index_folder(tmp_path), "train")

    got = read_masks(images.at([2, 0]).masks, (16, 16))

    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, [resized(scene(2)[1], (16, 16)), resized(scene(0)[1], (16, 16))])


def test_what_is_dense_sees_all_of_an_image() -> None:
    assert (PREPROCESS.crop, PREPROCESS.crop_fraction) == ("squash", 1.0)


def test_pixels_are_counted_class_by_class(tmp_path: Path) -> None:
    images, done = open_masks(index_folder(tmp_path, train=5), "train"), list[int]()

    counts = check_masks(images, PREPROCESS, progress=done.append)

    assert done == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(counts, sum(np.bincount(scene(n)[1].ravel(), minlength=3) for n in range(5)))


def test_a_mask_fits_its_image_as_it_is_seen(tmp_path: Path) -> None:
    """A photograph that EXIF turns is masked upright, as tools show it."""
    folder = index_folder(tmp_path, train=2, size=(32, 20))
    pixels, _ = scene(0, (32, 20))
    exif = Image.Exif()
    exif[274] = 6  # to be turned to the right
    (folder / "images/train/000.png").unlink()
    Image.fromarray(np.rot90(pixels).copy()).save(folder / "images/train/000.jpg", exif=exif)

    check_masks(open_masks(folder, "train"), PREPROCESS)

    with pytest.raises(InputError, match=r"000\.png: must be as large as its image, 32 x 20, got 20 x 32"):
        check_masks(open_masks(folder, "train"), squashed(Preprocess(image_size=(16, 16), orientation="none")))


def spoiled(folder: Path, name: str) -> Path:
    """One mask of ``folder`` made wrong in one way."""
    path = folder / "masks/train/001.png"
    path.unlink()
    match name:
        case "value":
            save_mask(path, np.full((32, 32), 3))
        case "values":
            save_mask(path, np.arange(1024).reshape(32, 32) % 256)
        case "size":
            save_mask(path, np.zeros((32, 16)))
        case "colours":
            save(path, scene(1)[0])
        case "wide":
            Image.fromarray(np.zeros((32, 32), np.uint16)).save(path)
        case "damaged":
            path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return path


FIX = "name every class, or give these pixels the value of those that are not counted"
MALFORMED = {
    "value": f"must hold class numbers from 0 to 2, and 255 where nothing counts, got 3\n  fix: {FIX}",
    "values": f"must hold class numbers from 0 to 2, and 255 where nothing counts, got 3, 4, 5, 6, 7 and 247 more\n  fix: {FIX}",
    "size": "must be as large as its image, 32 x 32, got 16 x 32\n  fix: draw it on the image itself, or remove both",
    "colours": "must be an index image of 8 bits, got RGB\n  fix: save it as PNG with one number a pixel, that of its class",
    "wide": "must be an index image of 8 bits, got I;16\n  fix: save it as PNG with one number a pixel, that of its class",
    "damaged": "is not a readable image, got bytes of no known image format\n  fix: replace the file or remove it",
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_mask_that_is_none_is_told(name: str, tmp_path: Path) -> None:
    folder = index_folder(tmp_path)
    path = spoiled(folder, name)

    with pytest.raises(InputError) as error:
        check_masks(open_masks(folder, "train"), PREPROCESS)

    assert str(error.value) == f"{path}: {MALFORMED[name]}"


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    folder = index_folder(tmp_path, train=30)
    for number in range(24):
        save_mask(folder / f"masks/train/{number:03}.png", np.full((32, 32), 9))
    save_mask(folder / "masks/train/000.png", np.zeros((8, 8)))

    with pytest.raises(InputError) as error:
        check_masks(open_masks(folder, "train"), PREPROCESS)

    lines = str(error.value).split("\n")
    assert lines[0] == f"{folder / 'masks/train'}: needs masks that fit their images, got 24 of 30 that are not"
    assert lines[1] == "  000.png: must be as large as its image, 32 x 32, got 8 x 8"
    assert lines[2] == "  001.png: must hold class numbers from 0 to 2, and 255 where nothing counts, got 9"
    assert lines[-2:] == ["  and 4 more", "  fix: replace these files or remove them"]
    assert len(lines) == 23


def test_jpeg_does_not_keep_numbers(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.jpg")

    with pytest.raises(InputError) as error:
        MaskFile(tmp_path / "a.jpg", Numbering.from_zero(2)).read()

    assert str(error.value) == (
        f"{tmp_path / 'a.jpg'}: must be an index image of 8 bits, got JPEG, which does not keep numbers\n"
        "  fix: save it as PNG with one number a pixel, that of its class"
    )


def test_a_mask_of_zeros_and_255_has_one_class_only(tmp_path: Path) -> None:
    assert require_classes(np.array([5, 1, 0]), NAMES, tmp_path) == ["blue"]

    with pytest.raises(InputError) as error:
        require_classes(np.array([5, 0, 0]), NAMES, tmp_path)

    assert str(error.value) == (
        f"{tmp_path}: needs training masks with two classes, got pixels of 'red'\n"
        "  fix: give classes the numbers from 0, in the order of their names; 255 is not counted"
    )


def test_no_mask_is_kept(tmp_path: Path) -> None:
    images: Any = open_masks(index_folder(tmp_path), "train")

    first, again = images.masks[0].read(), images.masks[0].read()

    assert first is not again
    np.testing.assert_array_equal(first, again)
