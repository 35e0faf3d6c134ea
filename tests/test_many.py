"""``export`` and ``calibrate`` of several packs: each on its own images, at the same time, taken up again."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import edgepet
from edgepet.errors import InputError
from edgepet.files import cache_folder
from edgepet.graphs.base import BaseGraph
from edgepet.jobs.job import Job, Result
from edgepet.jobs.running import LOCK
from edgepet.methods import SSF, LoRA
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import read_pack, write_pack
from edgepet.reports.screen import show
from edgepet.verbs.calibrate import VERB, CalibrateAllReport
from edgepet.verbs.many import JOBS, finish, of_task
from tests.flow import edgepet as command
from tests.flow import refused, task_on

SECONDS = {"seconds", "verify_seconds", "bind_ms"}


@dataclass(frozen=True)
class Fleet:
    """flowers.pet and birds.pet of five classes each, which they do not share, and ``images`` of both."""

    packs: tuple[Path, Path]
    images: Path
    spec: str


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, graph: BaseGraph) -> Fleet:
    folder, rng = tmp_path_factory.mktemp("fleet"), np.random.default_rng(8)
    for name, method, labels in (("flowers", SSF(), "abcde"), ("birds", LoRA(), "vwxyz")):
        delta = task_on(backbone, method, name=name, seed=3, by=0.02)
        write_pack(folder / f"{name}.pet", replace(delta, labels=tuple(labels)))
        for label in labels:
            (folder / "images" / name / "train" / label).mkdir(parents=True)
            (folder / "images" / name / "val" / label).mkdir(parents=True)
            for number in range(9):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                split = "val" if number == 8 else "train"
                Image.fromarray(pixels).save(folder / "images" / name / split / label / f"{number}.png")
    assert read_pack(folder / "flowers.pet").delta.fingerprint == graph.fingerprint
    return Fleet((folder / "flowers.pet", folder / "birds.pet"), folder / "images", backbone.spec)


def timeless(told: Any) -> Any:
    """JSON without what is measured."""
    if isinstance(told, dict):
        return {key: timeless(value) for key, value in told.items() if key not in SECONDS}
    return [timeless(value) for value in told] if isinstance(told, list) else told


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- export


@pytest.mark.slow
def test_packs_at_the_same_time_become_what_they_become_in_turn(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--precision", "int8", "--calib", fleet.images, "--data", fleet.images, "--json")
    monkeypatch.chdir(tmp_path)  # so that the folders in the report are equal

    def export(*more: object) -> tuple[Any, dict[str, bytes]]:
        said = command("export", *fleet.packs, *asked, "-o", "out", *more)
        assert said.code == 0, said.err
        return said.json, content(tmp_path / "out")

    in_turn, files = export()
    at_once, again = export("--jobs", 2)

    assert timeless(at_once) == timeless(in_turn)
    assert all(row[key] > 0 for row in at_once["artifacts"] for key in ("seconds", "verify_seconds"))
    assert again == files
    assert {name.partition("/")[0] for name in files} == {"flowers-onnx-int8", "birds-onnx-int8"}
    for row in at_once["artifacts"]:  # each on the images of its own task
        assert row["calibration"]["folder"] == row["task"]
        assert row["parity"]["inputs"] == "data"


@pytest.mark.slow
def test_what_is_done_when_another_pack_fails_is_not_made_again(fleet: Fleet, tmp_path: Path) -> None:
    out, work = tmp_path / "out", fleet.packs[1].with_suffix(".work")
    asked = ("export", *fleet.packs, "--data", fleet.images, "--jobs", 2, "-o", out)
    work.mkdir()
    (work / "work.json").write_text("{")
    try:
        said = command(*asked)
    finally:
        (work / "work.json").unlink()
        work.rmdir()
    assert said.code == 3
    assert said.err.splitlines()[-2].startswith(f"job birds.pet: {work / 'work.json'}: ")
    told = f"1 of 2 packs are done and kept in {out / JOBS}: the same command goes on from there"
    assert said.err.splitlines()[-1] == f"  fix: train again, or delete the folder; {told}"
    kept = [path for path in (out / JOBS).iterdir() if path.is_dir()]
    assert len(kept) == 1
    assert {path.name for path in out.iterdir()} == {JOBS}  # all or none

    said = command(*asked)

    assert said.code == 0, said.err
    assert "\n1/1 birds.pet  " in said.err
    assert {path.name for path in out.iterdir()} == {"flowers-onnx-fp32", "birds-onnx-fp32"}


def test_what_others_keep_where_jobs_were_stays(tmp_path: Path) -> None:
    place = tmp_path / JOBS
    digests = ["1" * 64, "2" * 64]  # of this run and of an earlier one, which was killed
    for name in [*digests, f".{'3' * 64}.0123abcd.part", "photos"]:
        (place / name).mkdir(parents=True)
    (place / LOCK).touch()
    job = Job(function="a:b", specification={})
    result = Result(job=job, folder=place / digests[0], report={}, files={}, seconds=0, versions={}, measured={})

    finish([result])
    assert [item.name for item in place.iterdir()] == ["photos"]

    (place / "photos").rmdir()
    finish([result])
    assert not place.exists()


def test_an_artefact_takes_the_place_of_an_older_one_and_of_nothing_else(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "birds-onnx-fp32").mkdir()
    (tmp_path / "birds-onnx-fp32" / "song.wav").touch()

    message = refused(3, "export", *fleet.packs, "--jobs", 2, "-o", tmp_path)

    assert message.startswith(f"{tmp_path / 'birds-onnx-fp32'}: holds files that would be lost, got song.wav")
    assert {path.name for path in tmp_path.iterdir()} == {"birds-onnx-fp32"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--jobs", 0), "--jobs: must be at least 1, got 0\n"),
        (("--jobs", 65), "--jobs: must be at most 64, got 65\n"),
        (
            ("--jobs", 2, "--precision", "auto", "--calib", "images"),
            "--precision auto: is not for several at the same time: it measures how fast they are\n"
            "  fix: leave out --jobs\n",
        ),
    ],
)
def test_jobs_that_cannot_be_are_refused(asked: tuple[object, ...], message: str, fleet: Fleet, tmp_path: Path) -> None:
    assert refused(3, "export", *fleet.packs, *asked, "-o", tmp_path) == message
    assert not list(tmp_path.iterdir())


def test_a_network_cannot_be_handed_to_another_process(fleet: Fleet, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        edgepet.export(fleet.packs, tmp_path, backbone=backbone, jobs=2)

    what = "need a backbone by its name: each runs in a process of its own"
    assert str(refusal.value) == f"`jobs`: {what}, got Backbone"


def test_a_task_without_a_folder_of_its_name_has_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()

    assert of_task(tmp_path, "birds") == tmp_path / "birds"
    assert of_task(tmp_path, "flowers") == tmp_path
    assert of_task(tmp_path, None) == tmp_path
    assert of_task(None, "birds") is None


# ---------------------------------------------------------------------------------------------------------- calibrate


@pytest.fixture(scope="module")
def calibrated(fleet: Fleet) -> Any:
    """The JSON of ``calibrate`` of both."""
    said = command("calibrate", *fleet.packs, "--calib", fleet.images, "--jobs", 2, "--json")
    assert said.code == 0, said.err
    return said.json


@pytest.mark.slow
def test_several_packs_are_calibrated_as_each_alone(fleet: Fleet, calibrated: Any) -> None:
    alone = command("calibrate", fleet.packs[1], "--calib", fleet.images / "birds", "--json").json

    flowers, birds = calibrated["tasks"]

    assert (flowers["task"], flowers["source"]) == ("flowers", str(fleet.packs[0]))
    assert birds == {"task": "birds", "source": str(fleet.packs[1]), **alone}
    assert [path.name for path in (cache_folder() / "jobs").iterdir()] == [".running"]


@pytest.mark.slow
def test_several_packs_are_written_for_the_backbone_that_tasks_share(fleet: Fleet, tmp_path: Path) -> None:
    out, asked = tmp_path / "out", ("--calib", fleet.images, "--jobs", 2)
    said = command("calibrate", *fleet.packs, *asked, "-o", out, "--json")
    assert said.code == 0, said.err
    pack, images = fleet.packs[0], fleet.images / "flowers"
    alone = command("calibrate", pack, "--calib", images, "-o", tmp_path / "flowers.pet", "--json").json

    flowers = said.json["tasks"][0]

    assert {path.name for path in out.iterdir()} == {"flowers.pet", "birds.pet"}
    assert (out / "flowers.pet").read_bytes() == (tmp_path / "flowers.pet").read_bytes()
    expected = {**alone, "task": "flowers", "source": str(pack), "pack": str(out / "flowers.pet")}
    assert timeless(flowers) == timeless(expected)
    assert all(run["bind_ms"] > 0 for run in flowers["runs"])
    assert flowers.keys() == expected.keys()
    assert (read_pack(out / "birds.pet").delta.int8 or pytest.fail("no ranges")).codes == flowers["codes_sha256"]


@pytest.mark.slow
def test_several_packs_are_told_in_one_table(calibrated: Any) -> None:
    page = Console(file=io.StringIO(), width=200)

    show(page, VERB.screen(CalibrateAllReport(tasks=tuple(calibrated["tasks"]))))

    told = page.file.getvalue()
    assert told.splitlines()[0].strip() == "what int8 costs"
    assert [line.split()[:5] for line in told.splitlines() if "ranges" in line] == [
        [name, "a", "model", "of", "its"] for name in ("flowers", "birds")
    ]
    assert "  flowers: 40 calibration images are few: 128 or more are advised\n" in told


def test_packs_are_not_written_over_those_that_are_read(fleet: Fleet) -> None:
    folder, before = fleet.packs[0].parent, fleet.packs[0].read_bytes()

    message = refused(3, "calibrate", *fleet.packs, "--calib", fleet.images, "-o", folder)

    assert message == f"{fleet.packs[0]}: is {fleet.packs[0]}, which is read\n  fix: name another output\n"
    assert fleet.packs[0].read_bytes() == before


def test_two_packs_of_one_name_or_one_task_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    os.link(fleet.packs[0], tmp_path / "again.pet")
    (tmp_path / "other").mkdir()
    os.link(fleet.packs[1], tmp_path / "other" / "flowers.pet")
    asked = ("--calib", fleet.images, "-o", tmp_path / "out")

    same_task = refused(3, "calibrate", fleet.packs[0], tmp_path / "again.pet", *asked)
    same_name = refused(3, "calibrate", fleet.packs[0], tmp_path / "other" / "flowers.pet", *asked)

    assert same_task == "calibrate: needs packs of different tasks, got flowers, flowers\n"
    both = f"{fleet.packs[0]}, {tmp_path / 'other' / 'flowers.pet'}"
    assert same_name == f"calibrate: needs packs of different names, got {both}\n"
