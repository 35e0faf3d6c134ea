"""Calibration images are given, drawn class by class, written down by content, and never those that will judge."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgepet.calibration.images import CalibrationImages, calibration_images
from edgepet.canonical import canonical_json
from edgepet.errors import InputError
from edgepet.spec import Preprocess

CLASSES = ("ash", "birch", "cedar")
PREPROCESS = Preprocess(image_size=(8, 8))


def paint(path: Path, *seed: int) -> None:
    """An image of noise whose bytes are its seed's alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train/ of 16, 12 and 14 images, val/ of 4 of each class, test/ of 12 of each; no two files are the same."""
    folder = tmp_path / "data"
    for part, counts in enumerate([("train", (16, 12, 14)), ("val", (4, 4, 4)), ("test", (12, 12, 12))]):
        for label, (name, count) in enumerate(zip(CLASSES, counts[1], strict=True)):
            for number in range(count):
                paint(folder / counts[0] / name / f"{number:02}.png", part, label, number)
    return folder


def drawn(folder: Path, **options: Any) -> CalibrationImages:
    return calibration_images(folder, CLASSES, PREPROCESS, **options)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        drawn(folder, **options)
    assert refused.value.exit_code == 3
    return str(refused.value)


# ----------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("count", [32, 34, 36])
def test_every_class_is_drawn_equally_often(data: Path, count: int) -> None:
    images = drawn(data, count=count)

    for part in (images.measured, images.held_out):
        counts = Counter(part.labels)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(images.measured) + len(images.held_out) == count
    assert len(images.held_out) == round(count / 4)


def test_a_class_that_has_no_more_is_drawn_whole(data: Path) -> None:
    images = drawn(data)

    assert images.facts["per_class"] == {"ash": 16, "birch": 12, "cedar": 14}  # type-checked by equality


def test_the_seed_draws_the_same_files_and_another_seed_others(data: Path) -> None:
    first, again, other = (drawn(data, count=32, seed=seed) for seed in (1, 1, 2))

    assert (first.measured, first.held_out, first.facts) == (again.measured, again.held_out, again.facts)
    assert first.digests != other.digests
    assert first.facts["sha256"] != other.facts["sha256"]


def test_ranges_and_recipe_are_looked_for_on_different_images_of_train(data: Path) -> None:
    images = drawn(data)

    measured, held_out, judged = (set(part.paths) for part in (images.measured, images.held_out, images.judged))
    assert measured & held_out == set()
    assert measured | held_out == set((data / "train").glob("*/*"))
    assert judged == {*(data / "train").glob("*/*"), *(data / "val").glob("*/*")}
    assert len(images.judged) == len(judged) == 54


def test_facts_are_enough_to_know_the_files_again(data: Path) -> None:
    images = drawn(data, count=40, seed=3)

    facts = images.facts
    files = facts["files"]
    assert isinstance(files, dict)
    assert {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in files} == files
    assert sorted(files) == list(files)
    lines = "".join(f"{name} {digest}\n" for name, digest in files.items())
    assert {name: value for name, value in facts.items() if name != "files"} == {
        "folder": "data",
        "seed": 3,
        "images": 40,
        "measured": 30,
        "held_out": 10,
        "judged": 54,
        "per_class": {"ash": 14, "birch": 12, "cedar": 14},
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def test_images_go_through_the_preprocessing_of_the_task(data: Path) -> None:
    images = drawn(data)

    pixels = np.concatenate(list(images.judged_batches(5)))
    assert images.images.shape == (len(images.measured), 3, 8, 8)
    assert (images.images.dtype.name, pixels.dtype.name, pixels.shape) == ("float32", "float32", (54, 3, 8, 8))
    first = np.asarray(Image.open(images.measured.paths[0]).resize((8, 9)), np.float32)
    assert np.corrcoef(first.mean(axis=(0, 1)), images.images[0].mean(axis=(1, 2)))[0, 1] > 0  # that file's colours


def test_one_folder_of_class_folders_is_judged_whole(data: Path) -> None:
    images = drawn(data / "train")

    assert len(images.digests) == len(images.judged) == 42
    assert set(images.digests) == {f"{path.parent.name}/{path.name}" for path in (data / "train").glob("*/*")}


def test_an_image_that_is_there_twice_is_measured_once(data: Path) -> None:
    for number in range(6):
        shutil.copy(data / "train" / "ash" / "00.png", data / "train" / "birch" / f"copy{number}.png")

    images = drawn(data)

    assert len(images.digests) == len(set(images.digests.values())) == 42


def test_more_classes_than_a_quarter_of_the_images_leaves_some_to_measure_on(tmp_path: Path) -> None:
    classes = tuple(f"class{i:02}" for i in range(40))
    for label, name in enumerate(classes):
        for number in range(2):
            paint(tmp_path / name / f"{number}.png", label, number)

    images = calibration_images(tmp_path, classes, PREPROCESS, count=40)

    assert len(images.measured) >= len(images.held_out) > 0
    assert len(images.measured) + len(images.held_out) == 40


def test_few_images_are_said_to_be_few(data: Path) -> None:
    assert drawn(data).warning == "42 calibration images are few: 128 or more are advised"
    for number in range(128):
        paint(data / "train" / "ash" / f"more{number}.png", 9, number)

    assert drawn(data, count=127).warning == "127 calibration images are few: 128 or more are advised"
    assert drawn(data, count=128).warning is None


def test_what_is_passed_over_is_said_beside_it(data: Path) -> None:
    (data / "train" / "ash" / "notes.txt").touch()
    (data / "val").rename(data / "valid")

    images = drawn(data)

    assert images.warning == "42 calibration images are few: 128 or more are advised; passed over 1: 1 .txt"
    assert len(images.judged) == 54


def test_files_of_the_test_split_that_are_no_images_or_lead_nowhere_are_no_overlap(data: Path) -> None:
    (data / "test" / "ash" / "gone.png").symlink_to("nowhere")
    os.mkfifo(data / "test" / "ash" / "pipe.png")
    for part in ("train", "test"):
        (data / part / "ash" / "licence.txt").write_text("the same in both")

    assert len(drawn(data).digests) == 42


def test_the_test_split_is_known_by_its_other_names(data: Path) -> None:
    shutil.copy(data / "test" / "cedar" / "07.png", data / "train" / "ash" / "innocent.png")
    (data / "test").rename(data / "Testing")

    assert refusal(data) == overlap(data, data / "Testing", 1, "train/ash/innocent.png is cedar/07.png")


def test_a_file_whose_name_is_no_utf8_is_written_down(data: Path) -> None:
    (data / "train" / "ash" / "00.png").rename(data / "train" / "ash" / os.fsdecode(b"caf\xe9.png"))

    images = drawn(data)

    assert "train/ash/caf\\xe9.png" in images.digests
    canonical_json(images.facts)


def test_a_clip_is_one_image_of_many_files(tmp_path: Path) -> None:
    for label, name in enumerate(CLASSES):
        for number in range(12):
            for frame in range(3):
                paint(tmp_path / "clips" / name / f"c{number:02}" / f"{frame}.png", label, number, frame)
    clips = Preprocess(image_size=(8, 8), frames=2)

    images = calibration_images(tmp_path / "clips", CLASSES, clips)

    assert images.images.shape == (len(images.measured), 2, 3, 8, 8)
    assert len(set(images.digests.values())) == 36
    shutil.copytree(tmp_path / "clips" / "ash" / "c03", tmp_path / "test" / "ash" / "other")
    with pytest.raises(InputError) as refused:
        calibration_images(tmp_path / "clips", CLASSES, clips)
    assert str(refused.value) == (
        f"{tmp_path}/clips: must not overlap the evaluation split {tmp_path}/test, "
        "got 1 of its images: ash/c03 is ash/other\n"
        "  fix: calibrate on train/, so that test/ can still judge"
    )


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_folder_that_is_empty_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    assert refusal(tmp_path / "empty") == (
        f"{tmp_path}/empty: needs at least two class folders, got 0\n  fix: make one folder a class"
    )
    assert refusal(tmp_path / "none") == (
        f"{tmp_path}/none: is not a readable folder, got No such file or directory\n"
        "  fix: pass a folder with train/ and val/, or a folder of class folders"
    )


def test_a_class_folder_that_is_empty_is_refused(data: Path) -> None:
    for path in (data / "train" / "birch").iterdir():
        path.unlink()

    assert refusal(data) == f"{data}/train/birch: holds no image\n  fix: remove the folder or add images"


def test_other_classes_than_the_tasks_are_refused(data: Path) -> None:
    for part in ("train", "val", "test"):
        (data / part / "birch").rename(data / part / "beech")

    assert refusal(data) == f"{data}: needs the 3 classes of the task, got a difference in beech, birch"


def test_fewer_than_32_images_are_refused(data: Path) -> None:
    for path in list((data / "train").glob("*/*"))[:11]:
        path.unlink()

    assert refusal(data) == (
        f"{data}: needs at least 32 different images to calibrate on, got 31 in 31 files\n  fix: give it more images"
    )


def test_one_grey_image_forty_times_is_one_image(tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (128, 128, 128)).save(path)

    assert refusal(tmp_path) == (
        f"{tmp_path}: needs at least 32 different images to calibrate on, got 1 in 40 files\n  fix: give it more images"
    )


def overlap(folder: Path, place: Path, count: int, example: str) -> str:
    return (
        f"{folder}: must not overlap the evaluation split {place}, got {count} of its images: {example}\n"
        "  fix: calibrate on train/, so that test/ can still judge"
    )


def test_an_image_of_test_is_known_by_its_content_under_another_name(data: Path) -> None:
    shutil.copy(data / "test" / "cedar" / "07.png", data / "train" / "ash" / "innocent.png")

    assert refusal(data) == overlap(data, data / "test", 1, "train/ash/innocent.png is cedar/07.png")


def test_the_test_folder_beside_a_train_folder_is_seen(data: Path) -> None:
    shutil.copy(data / "test" / "cedar" / "07.png", data / "train" / "ash" / "innocent.png")

    got = refusal(data / "train")

    assert got == overlap(data / "train", data / "test", 1, "ash/innocent.png is cedar/07.png")


def test_the_test_folder_beside_a_train_folder_is_seen_from_inside(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(data / "test" / "cedar" / "07.png", data / "train" / "ash" / "innocent.png")
    monkeypatch.chdir(data / "train")

    assert refusal(Path()) == overlap(Path(), data / "test", 1, "ash/innocent.png is cedar/07.png")


def test_the_test_folder_itself_is_refused(data: Path) -> None:
    assert refusal(data / "test") == overlap(data / "test", data / "test", 36, "ash/00.png is ash/00.png")


@pytest.mark.parametrize("given", ["", "test"])
def test_the_evaluation_folder_that_is_given_is_seen_wherever_it_lies(data: Path, tmp_path: Path, given: str) -> None:
    calib, evaluation = tmp_path / "calib" / "mine", tmp_path / "elsewhere"
    shutil.copytree(data / "train", calib)
    shutil.copytree(data / "test", evaluation / "test")
    assert len(drawn(calib, evaluation=evaluation / given).digests) == 42
    shutil.copy(evaluation / "test" / "birch" / "01.png", calib / "birch" / "x.png")

    got = refusal(calib, evaluation=evaluation / given)

    assert got == overlap(calib, evaluation / "test", 1, "birch/x.png is birch/01.png")


def test_an_image_of_test_among_those_that_judge_the_budget_is_refused(data: Path) -> None:
    shutil.copy(data / "test" / "ash" / "03.png", data / "val" / "ash" / "leak.png")

    assert refusal(data) == overlap(data, data / "test", 1, "val/ash/leak.png is ash/03.png")


def test_an_image_of_test_that_was_not_drawn_is_refused(data: Path) -> None:
    shutil.copy(data / "test" / "ash" / "03.png", data / "train" / "ash" / "leak.png")

    for seed in range(5):  # 32 of 43 are drawn
        message = refusal(data, count=32, seed=seed)
        assert message == overlap(data, data / "test", 1, "train/ash/leak.png is ash/03.png")
