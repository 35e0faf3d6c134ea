"""Which images a split holds, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgepet.errors import InputError
from edgepet.images.folders import SPLITS
from edgepet.images.preprocess import load_pixels, normalize
from edgepet.images.sets import ImageSet, Split, batches, draw, few_shots, load_set, load_sets, open_split
from edgepet.spec import Preprocess

UNEVEN = ImageSet(("ant", "bee"), (Path("1.png"), Path("2.png"), Path("3.png")), (0, 0, 1))
PREPROCESS = Preprocess(image_size=(8, 6))
HELD_OUT = ["ant1.png", "ant4.png", "bee5.png", "bee9.png"]  # of ``flat``: written down, as a split holds for ever


def fill(folder: Path, *names: str) -> None:
    """Images of noise, another one for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def flat(folder: Path, count: int = 10) -> Path:
    for name in ("ant", "bee"):
        fill(folder / name, *(f"{name}{index}.png" for index in range(count)))
    return folder


def names(images: ImageSet) -> list[str]:
    return [path.name for path in images.paths]


def refusal(folder: Path, split: Split = "train") -> str:
    with pytest.raises(InputError) as error:
        open_split(folder, split)
    return str(error.value)


def test_each_split_is_read_from_its_own_folder_in_sorted_order(tmp_path: Path) -> None:
    for split in SPLITS:
        fill(tmp_path / split / "bee", "2.png", "1.JPG")
        fill(tmp_path / split / "ant", "3.webp")

    for split in SPLITS:
        paths = tuple(tmp_path / split / name for name in ("ant/3.webp", "bee/1.JPG", "bee/2.png"))
        assert open_split(tmp_path, split) == ImageSet(("ant", "bee"), paths, (0, 1, 1))


def test_hidden_names_and_other_files_are_passed_over(tmp_path: Path) -> None:
    flat(tmp_path, 2)
    expected = open_split(tmp_path, "train"), open_split(tmp_path, "val")
    (tmp_path / "labels.csv").touch()
    (tmp_path / ".cache").mkdir()
    for name in (".hidden.png", "Thumbs.db", "notes.txt"):
        (tmp_path / "ant" / name).touch()
    (tmp_path / "ant" / "folder.png").mkdir()

    assert (open_split(tmp_path, "train"), open_split(tmp_path, "val")) == expected


def test_a_folder_of_class_folders_is_split_class_by_class(tmp_path: Path) -> None:
    train, val = open_split(flat(tmp_path), "train"), open_split(tmp_path, "val")

    assert names(val) == HELD_OUT
    assert (len(train), train.labels) == (16, (0,) * 8 + (1,) * 8)
    assert sorted(names(train) + names(val)) == sorted(path.name for path in tmp_path.rglob("*.png"))


def test_a_split_depends_on_names_fraction_and_seed_only(tmp_path: Path) -> None:
    one, two = flat(tmp_path / "one"), flat(tmp_path / "two")

    assert names(open_split(one, "val")) == names(open_split(two, "val")) != names(open_split(one, "val", seed=1))
    assert len(open_split(one, "val", val_fraction=0.5)) == 10


@pytest.mark.parametrize("val_fraction", [0.001, 0.999])
def test_each_part_keeps_an_image_of_each_class(tmp_path: Path, val_fraction: float) -> None:
    for split in SPLITS[:2]:
        assert open_split(flat(tmp_path, 2), split, val_fraction=val_fraction).labels == (0, 1)


def test_val_is_taken_off_train_where_there_is_no_val_folder(tmp_path: Path) -> None:
    flat(tmp_path / "train")
    flat(tmp_path / "test", 1)

    assert names(open_split(tmp_path, "val")) == HELD_OUT
    assert len(open_split(tmp_path, "train")) == 16
    assert names(open_split(tmp_path, "test")) == ["ant0.png", "bee0.png"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        fill(tmp_path / name, "1.png", "2.png")

    assert open_split(tmp_path, "train").classes == ("bus", "train")


def test_a_test_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(flat(tmp_path), "test") == (
        f"{tmp_path}: has no test/ folder\n"
        "  fix: ask for the split val, or sort the images into train/, val/ and test/, each with one folder a class"
    )


def test_splits_with_unlike_classes_are_refused_by_name(tmp_path: Path) -> None:
    flat(tmp_path / "train", 1)
    fill(tmp_path / "val" / "ant", "1.png")
    fill(tmp_path / "val" / "cat", "1.png")

    assert refusal(tmp_path, "train") == (
        f"{tmp_path / 'val'}: must have the same class folders as train, got missing 'bee' and extra 'cat'\n"
        "  fix: add the missing class folders, with images, and remove the extra ones"
    )


def test_classes_with_too_few_images_and_too_few_classes_are_refused(tmp_path: Path) -> None:
    bad = flat(tmp_path) / "cat"
    bad.mkdir()
    assert refusal(tmp_path) == f"{bad}: holds no image\n  fix: remove the folder or add images"

    fill(bad, "1.png")
    need = "needs two images to be split into train and val"
    assert refusal(tmp_path) == f"{bad}: {need}, got 1\n  fix: add images or make val/"

    assert refusal(bad) == f"{bad}: needs at least two class folders, got 0\n  fix: make one folder a class"


def test_a_missing_folder_a_file_and_splits_without_train_are_refused(tmp_path: Path) -> None:
    flat(tmp_path / "val", 1)
    assert refusal(tmp_path, "val") == f"{tmp_path}: has no train/ folder, got only val\n  fix: add train/"

    file = tmp_path / "val" / "ant" / "ant0.png"
    for path, got in ((tmp_path / "gone", "No such file or directory"), (file, "Not a directory")):
        assert refusal(path) == (
            f"{path}: is not a readable folder, got {got}\n"
            "  fix: pass a folder with train/ and val/, or a folder of class folders"
        )


@pytest.mark.parametrize(("judged", "of_train"), [(3, 0), (4, 0), (9, 5), (50, 11)])
def test_what_is_judged_on_is_val_and_then_what_is_left_of_train(tmp_path: Path, judged: int, of_train: int) -> None:
    folder = flat(tmp_path / "flowers")  # 10 images in each of two classes, of which 2 each are val
    train, val = (set(open_split(folder, split).paths) for split in ("train", "val"))

    drawn = draw(folder, 5, judged)

    tuned, others = set(drawn["train"].paths), set(drawn["val"].paths)
    assert (len(train), len(val), len(tuned), len(others)) == (16, 4, 5, min(judged, 15))
    assert tuned < train
    assert not tuned & others
    assert len(others & train) == of_train
    assert drawn["val"].labels == tuple(int(path.parent.name == "bee") for path in drawn["val"].paths)
    assert draw(folder, 5, judged) == drawn
    assert draw(folder, 5, judged, seed=1) != drawn


def test_few_shots_takes_as_many_of_each_class_and_more_include_the_fewer(tmp_path: Path) -> None:
    images = open_split(flat(tmp_path), "train")

    two, four = few_shots(images, 2, seed=3), few_shots(images, 4, seed=3)

    assert (two.classes, two.labels, four.labels) == (images.classes, (0, 0, 1, 1), (0,) * 4 + (1,) * 4)
    assert set(two.paths) < set(four.paths) < set(images.paths)
    assert few_shots(images, 2, seed=3) == two != few_shots(images, 2, seed=4)


REFUSED: dict[str, Callable[[Path], object]] = {
    "class 'bee': needs 2 images, got 1\n  fix: ask for at most 1 shots or add images": lambda _: few_shots(
        UNEVEN, 2, 0
    ),
    "shots: must be at least 1, got 0": lambda _: few_shots(UNEVEN, 0, 0),
    "batch_size: must be at least 1, got 0": lambda _: batches(np.zeros((1, 8, 6, 3), np.uint8), PREPROCESS, 0),
    "val_fraction: must be between 0 and 1, without them, got 1": lambda f: open_split(flat(f), "val", val_fraction=1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_number_that_cannot_be_met_is_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(InputError) as error:
        REFUSED[message](tmp_path)

    assert str(error.value) == message


def test_a_set_is_decoded_in_order_and_tells_its_progress(tmp_path: Path) -> None:
    images, seen = open_split(flat(tmp_path), "train"), list[int]()

    pixels, labels = load_set(images, PREPROCESS, progress=seen.append)

    np.testing.assert_array_equal(pixels, np.stack([load_pixels(path, PREPROCESS) for path in images.paths]))
    np.testing.assert_array_equal(labels, np.array([0] * 8 + [1] * 8))
    assert (pixels.dtype.name, labels.dtype.name, seen) == ("uint8", "int64", list(range(1, 17)))


def test_a_damaged_image_of_a_set_is_named(tmp_path: Path) -> None:
    images = open_split(flat(tmp_path), "train")
    images.paths[5].write_bytes(b"")

    with pytest.raises(InputError, match=re.escape(f"{images.paths[5]}: is not a readable image, got bytes of no ")):
        load_set(images, PREPROCESS)


def test_all_damaged_images_of_all_sets_are_named_at_once(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(14):
                pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number:02d}.png")
    sets = [open_split(tmp_path, split) for split in ("train", "val")]
    whole = (tmp_path / "train" / "a" / "00.png").read_bytes()
    (tmp_path / "train" / "a" / "00.png").write_bytes(whole[:-200])
    (tmp_path / "train" / "b" / "03.png").write_bytes(b"")
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "val" / "a" / "05.png")
    with pytest.raises(InputError) as few:
        load_sets(sets, Preprocess(image_size=(8, 8)))
    for number in range(14):
        for name in ("a", "b"):
            (tmp_path / "val" / name / f"{number:02d}.png").write_text("no image")
    with pytest.raises(InputError) as many:
        load_sets(sets, Preprocess(image_size=(8, 8)))

    truncated = next(line for line in str(few.value).splitlines() if "00.png" in line)
    assert "truncated" in truncated
    assert str(few.value) == (
        f"{tmp_path}: needs readable images, got 3 of 56 images that are not\n"
        f"{truncated}\n"
        "  train/b/03.png: bytes of no known image format\n"
        "  val/a/05.png: 16-bit values, which would be cut off at 255\n"
        "  fix: replace these files or remove them"
    )
    lines = str(many.value).splitlines()
    assert lines[0].endswith("got 30 of 56 images that are not")
    assert lines[-2:] == ["  and 10 more", "  fix: replace these files or remove them"]
    assert len(lines) == 23


def test_batches_are_normalised_and_the_last_may_be_smaller() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    parts = list(batches(pixels, PREPROCESS, 2))

    assert [part.shape for part in parts] == [(2, 3, 8, 6), (2, 3, 8, 6), (1, 3, 8, 6)]
    np.testing.assert_array_equal(np.concatenate(parts), normalize(pixels, PREPROCESS))
