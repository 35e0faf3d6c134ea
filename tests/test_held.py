"""Decoded images: in memory where they fit, in mapped files where they do not, and the same pack from both."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import edgepet
from edgepet.errors import InputError
from edgepet.images.held import Turn, forget, load_held, pixels_folder
from edgepet.images.sets import ImageSet, load_batches, load_set, open_split
from edgepet.measuring import machine
from edgepet.measuring.machine import free_memory_bytes
from edgepet.reports.progress import Step
from edgepet.spec import Preprocess
from edgepet.verbs.verb import size_bytes
from tests.flow import CLASSES, Tasks, draw_shapes
from tests.flow import edgepet as command

PREPROCESS = Preprocess(image_size=(8, 8))
SIZE = (24 + 12) * 8 * 8 * 3


@pytest.fixture
def sets(tmp_path: Path) -> Mapping[str, ImageSet]:
    """24 images to train on and 12 to judge, at 8 pixels."""
    draw_shapes(tmp_path / "data")
    return {name: open_split(tmp_path / "data", name) for name in ("train", "val")}


def of_state(path: Path) -> tuple[int, int]:
    """Another inode is another file."""
    return path.stat().st_ino, path.stat().st_mtime_ns


# ------------------------------------------------------------------------------------------------------------ pixels


def test_what_fits_is_in_memory_and_no_folder_is_made(sets: Mapping[str, ImageSet], tmp_path: Path) -> None:
    loaded = load_held(sets, PREPROCESS, tmp_path / "t.pixels", budget_bytes=SIZE)

    assert not (tmp_path / "t.pixels").exists()
    assert not isinstance(loaded["train"][0], np.memmap)


def test_what_does_not_fit_is_mapped_with_the_same_pixels_and_decoded_once(
    sets: Mapping[str, ImageSet], tmp_path: Path
) -> None:
    folder, told = tmp_path / "t.pixels", list[str]()
    expected = {name: load_set(images, PREPROCESS) for name, images in sets.items()}

    first = load_held(sets, PREPROCESS, folder, budget_bytes=SIZE - 1, stage=told.append)
    made = of_state(folder / "train.npy")
    again = load_held(sets, PREPROCESS, folder, budget_bytes=0, stage=told.append)

    assert told == [f"decode 36 images into {folder}, 0.0 GB"]
    assert of_state(folder / "train.npy") == made
    assert {path.name for path in folder.iterdir()} == {"pixels.json", "train.npy", "val.npy"}
    for loaded in (first, again):
        for name, (pixels, labels) in loaded.items():
            assert isinstance(pixels, np.memmap)
            assert np.array_equal(pixels, expected[name][0])
            assert np.array_equal(labels, expected[name][1])


@pytest.mark.parametrize(
    "change", ["another image", "another size of the input", "an image less", "a damaged manifest"]
)
def test_other_images_are_decoded_anew(change: str, sets: Mapping[str, ImageSet], tmp_path: Path) -> None:
    folder, preprocess, now = tmp_path / "t.pixels", PREPROCESS, dict(sets)
    load_held(sets, PREPROCESS, folder, budget_bytes=0)
    match change:
        case "another image":
            Image.new("RGB", (9, 9), "white").save(sets["train"].paths[0])
        case "another size of the input":
            preprocess = Preprocess(image_size=(9, 9))
        case "an image less":
            now["train"] = ImageSet(CLASSES, sets["train"].paths[1:], sets["train"].labels[1:])
        case _:
            (folder / "pixels.json").write_bytes((folder / "pixels.json").read_bytes()[:-9])

    loaded = load_held(now, preprocess, folder, budget_bytes=0)

    assert np.array_equal(loaded["train"][0], load_set(now["train"], preprocess)[0])


def test_files_that_are_not_as_they_were_written_are_refused(sets: Mapping[str, ImageSet], tmp_path: Path) -> None:
    folder = tmp_path / "t.pixels"
    load_held(sets, PREPROCESS, folder, budget_bytes=0)
    np.save(folder / "val.npy", np.zeros((2, 3)))

    with pytest.raises(InputError) as refusal:
        load_held(sets, PREPROCESS, folder, budget_bytes=0)

    told = f"is not as it was written, got float64 (2, 3)\n  fix: delete {folder}"
    assert str(refusal.value) == f"{folder / 'val.npy'}: {told}"


def test_a_folder_with_other_files_and_a_disk_without_room_are_refused(
    sets: Mapping[str, ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t.pixels"
    folder.mkdir()
    (folder / "song.wav").touch()
    with pytest.raises(InputError, match=r"t\.pixels: holds files that would be lost, got song\.wav"):
        load_held(sets, PREPROCESS, folder, budget_bytes=0)
    forget(folder)
    assert (folder / "song.wav").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))

    with pytest.raises(InputError) as refusal:
        load_held(sets, PREPROCESS, tmp_path / "other.pixels", budget_bytes=0)

    needed = "needs 1 MB free for decoded images that `memory` does not hold, got 0 MB"
    assert str(refusal.value) == f"{tmp_path}: {needed}\n  fix: make room, or name another place"


def test_decoded_images_that_lie_with_others_files_stay(sets: Mapping[str, ImageSet], tmp_path: Path) -> None:
    folder = tmp_path / "t.pixels"
    load_held(sets, PREPROCESS, folder, budget_bytes=0)
    (folder / "song.wav").touch()

    forget(folder)

    assert {path.name for path in folder.iterdir()} == {"pixels.json", "train.npy", "val.npy", "song.wav"}


def test_where_they_do_not_fit_one_process_all_map_them(sets: Mapping[str, ImageSet], tmp_path: Path) -> None:
    asked = list[bool]()

    def anywhere(here: bool) -> bool:
        asked.append(here)
        return True

    loaded = load_held(sets, PREPROCESS, tmp_path / "t.pixels", budget_bytes=SIZE, turn=Turn(anywhere=anywhere))

    assert asked == [False]
    assert isinstance(loaded["val"][0], np.memmap)


def test_a_process_that_does_not_write_waits_for_the_one_that_does(
    sets: Mapping[str, ImageSet], tmp_path: Path
) -> None:
    folder = tmp_path / "t.pixels"

    def wait() -> None:
        load_held(sets, PREPROCESS, folder, budget_bytes=0)

    loaded = load_held(sets, PREPROCESS, folder, budget_bytes=0, turn=Turn(makes=False, wait=wait))

    assert isinstance(loaded["val"][0], np.memmap)


def test_batches_are_the_images_of_the_set_and_all_that_are_unreadable_are_told(
    sets: Mapping[str, ImageSet],
) -> None:
    images = sets["train"]
    parts = list(load_batches(images, PREPROCESS, 7))
    assert [len(part) for part in parts] == [7, 7, 7, 3]
    assert np.array_equal(np.concatenate(parts), load_set(images, PREPROCESS)[0])
    for index in (8, 20):
        images.paths[index].write_bytes(b"no image")

    given = []
    with pytest.raises(InputError, match=r"^.*: needs readable images, got 2 of 24 images that are not"):
        given.extend(load_batches(images, PREPROCESS, 7))
    assert len(given) == 1


# ---------------------------------------------------------------------------------------------------------- training


def arguments(tasks: Tasks, pack: Path) -> list[object]:
    return [
        "train", tasks.data, "--backbone", tasks.spec, "--method", "lora", "--img-size", 32, "--epochs", 1,
        "--batch-size", 8, "--train-precision", "fp32", "-o", pack, "--quiet",
    ]  # fmt: skip


def test_the_pack_is_the_same_bit_for_bit_and_the_decoded_images_go_when_it_is_there(
    tasks: Tasks, tmp_path: Path
) -> None:
    said = command(*arguments(tasks, tmp_path / "tints.pet"), "--memory", "10kB")

    assert said.code == 0, said.err
    assert (tmp_path / "tints.pet").read_bytes() == tasks.tints.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"tints.pet", "tints.work"}


def test_a_training_that_was_stopped_finds_its_decoded_images_again(tasks: Tasks, tmp_path: Path) -> None:
    pack, told = tmp_path / "tints.pet", list[str]()
    fields = {"image_size": 32, "epochs": 1, "batch_size": 8, "precision": "fp32", "checkpoint_s": 0.0}

    def stop(step: Step) -> None:
        if step.images >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edgepet.train(tasks.data, tasks.spec, "lora", pack, memory=0, say=stop, **fields)
    made = of_state(pixels_folder(pack) / "train.npy")
    assert made

    edgepet.train(tasks.data, tasks.spec, "lora", pack, memory=0, resume=True, stage=told.append, **fields)

    assert not [line for line in told if line.startswith("decode")]
    assert pack.read_bytes() == tasks.tints.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"tints.pet", "tints.work"}


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("12", 12), ("0", 0), ("3kB", 3000), ("500MB", 5 * 10**8), ("2 GB", 2 * 10**9), ("1.5g", 15 * 10**8),
     ("2GiB", 2 * 2**30), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "2XB", "1e9", "nan", "2GBs"])
def test_what_is_no_size_is_refused(text: str, tasks: Tasks, tmp_path: Path) -> None:
    said = command(*arguments(tasks, tmp_path / "t.pet"), f"--memory={text}")

    assert said.code == 2
    assert said.err.splitlines()[-1].endswith(f"--memory: needs a size such as 500MB or 2GB, got {text!r}")


def test_free_memory_is_that_of_the_machine_or_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert free_memory_bytes() == 4 * 10**9
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:       8000 kB\n")
    assert free_memory_bytes() == 8000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\nfile 5000000\n")
    assert free_memory_bytes() == 8000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    assert free_memory_bytes() == 2_000_000
    (tmp_path / "memory.max").write_text("900000\n")
    assert free_memory_bytes() == 0
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.stat").write_text("cache 7\nrss 9\ntotal_rss 1500000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_memory_bytes() == 8000 * 1024
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("4000000\n")
    assert free_memory_bytes() == 2_500_000


def anonymous_bytes(pid: int) -> int:
    """What a process holds besides files: RssAnon of proc(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


@pytest.mark.slow
def test_twenty_thousand_images_of_224_pixels_train_within_3_gb(tasks: Tasks, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for split, count in (("train", 9000), ("val", 1000)):
        for name, colour in (("dark", 40), ("light", 180)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(colour, colour + 60, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.jpg")
    words = [
        "train", tmp_path / "data", "--backbone", tasks.spec, "--method", "bitfit", "--img-size", 224, "--epochs", 1,
        "--train-precision", "fp32", "--memory", "1GB", "-o", tmp_path / "t.pet",
    ]  # fmt: skip

    process = subprocess.Popen([sys.executable, "-m", "edgepet", *map(str, words)], stderr=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        try:
            most = max(most, anonymous_bytes(process.pid))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            break
        time.sleep(0.05)
    told = process.communicate()[1]

    assert process.returncode == 0, told
    assert "decode 20000 images into" in told
    assert 20_000 * 224 * 224 * 3 > 3e9  # what they would take in memory
    assert most < 3e9
