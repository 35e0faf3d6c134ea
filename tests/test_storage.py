"""The bytes that ``storage`` reports are the bytes on the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgepet import read_pack, storage, write_pack
from edgepet.device.caches import derived
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.verbs.storage import RuntimeBytes, TaskBytes, account
from tests.flow import Artifacts, Tasks, bytes_below, has_openvino


@pytest.fixture
def full_store(store: Store, tasks: Tasks) -> Store:
    store.install(tasks.shapes)
    store.install(tasks.tints)
    return store


def test_a_store_takes_the_bytes_that_its_files_take(full_store: Store, tasks: Tasks) -> None:
    kept = full_store.cache_bytes  # which of its backbones' bytes were once compared whole
    (full_store.root / "cache").mkdir(exist_ok=True)
    (full_store.root / "cache" / "derived.bin").write_bytes(bytes(1234))

    report = account(full_store)

    assert report.shared_total_bytes == bytes_below(full_store.root)
    assert report.backbone_bytes == (next(full_store.root.glob("backbones/*/backbone.safetensors"))).stat().st_size
    assert report.graph_bytes == sum(path.stat().st_size for path in full_store.root.glob("backbones/*/graph-32*"))
    assert report.cache_bytes == kept + 1234
    assert [(task.task, task.method, task.pack_bytes) for task in report.tasks] == [
        ("shapes", "ssf", tasks.shapes.stat().st_size),
        ("tints", "lora", tasks.tints.stat().st_size),
    ]


def test_packs_are_counted_as_the_store_that_they_would_make(full_store: Store, tasks: Tasks) -> None:
    assert storage([tasks.shapes, tasks.tints]) == account(full_store)


@pytest.mark.parametrize("task", ["shapes", "tints"])
def test_a_full_copy_is_as_large_as_the_model_that_is_exported(
    full_store: Store, artifacts: Artifacts, task: str
) -> None:
    exported = (artifacts.of(task, "onnx") / "model.onnx").stat().st_size
    (row,) = (row for row in account(full_store).tasks if row.task == task)

    # 1 %: the graph is the same, its pointers into files became the bytes themselves, and a few labels came along
    assert row.full_copy_bytes == pytest.approx(exported, rel=0.01)


def test_the_ratio_is_full_copies_over_one_folder(full_store: Store) -> None:
    report = account(full_store)

    assert report.full_total_bytes == sum(task.full_copy_bytes for task in report.tasks)
    assert report.ratio == report.full_total_bytes / report.shared_total_bytes
    assert report.ratio > 1  # two copies of one backbone against one


def test_every_runtime_says_what_it_keeps_and_what_was_run(full_store: Store) -> None:
    report = account(full_store)
    ran = {"tasks_run": 2, "note": "every task was run from this folder"}
    absent = {"tasks_run": 0, "note": "not run: needs the package 'openvino'"}
    shared = {
        "shares_backbone": True, "total_bytes": report.shared_total_bytes, "ratio": report.ratio,
        "apparent_bytes": report.apparent_bytes,
    }  # fmt: skip

    assert report.per_runtime == (
        RuntimeBytes(runtime="onnxruntime", **shared, **ran),
        RuntimeBytes(runtime="openvino", **shared, **(ran if has_openvino else absent)),
        RuntimeBytes(
            runtime="tensorrt",
            shares_backbone=False,
            total_bytes=report.full_total_bytes,
            ratio=1.0,
            tasks_run=0,
            note="an engine holds its own weights: one full artefact per task (weights counted, engine overhead not)",
        ),
    )


def test_a_runtime_that_is_not_here_was_not_run(full_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)

    row = account(full_store).per_runtime[1]

    assert (row.runtime, row.tasks_run, row.note) == ("openvino", 0, "not run: needs the package 'openvino'")


def du(folder: Path, *words: str) -> int:
    """What the system's own ``du`` says."""
    program = shutil.which("du")
    if program is None:
        pytest.skip("this machine has no du")
    done = subprocess.run(
        [program, "-s", "--block-size=1", *words, str(folder)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[0])


def test_a_store_takes_what_du_says(full_store: Store) -> None:
    report = account(full_store)

    assert report.apparent_bytes == du(full_store.root, "--apparent-size")
    assert report.disk_bytes == du(full_store.root)
    assert {row.apparent_bytes for row in report.per_runtime} == {report.apparent_bytes, None}


def test_each_runtime_takes_what_du_says_of_a_store_that_it_has_for_itself(full_store: Store, tmp_path: Path) -> None:
    """What one runtime derived, the other does without."""
    for runtime, size in (("onnxruntime", 5000), ("openvino", 70_001)):
        made = {"of": runtime}
        assert derived(full_store.root, runtime, "a network", made, lambda size=size: bytes(size)) == (
            bytes(size),
            False,
        )

    rows = {row.runtime: row for row in account(full_store).per_runtime}

    for runtime, other in (("onnxruntime", "openvino"), ("openvino", "onnxruntime")):
        own = tmp_path / runtime
        shutil.copytree(full_store.root, own)
        for path in (own / "cache" / "derived").glob(f"{other}-*"):
            path.unlink()
        assert rows[runtime].apparent_bytes == du(own, "--apparent-size")
        assert rows[runtime].total_bytes == bytes_below(own)


def test_bytes_that_the_disk_has_once_with_the_cache_are_told(full_store: Store, tasks: Tasks, tmp_path: Path) -> None:
    linked = sum(
        path.stat().st_size for path in full_store.root.rglob("*") if path.is_file() and path.stat().st_nlink > 1
    )
    assert account(full_store).linked_bytes == linked

    elsewhere = tmp_path / "copied"
    shutil.copytree(full_store.root, elsewhere)
    assert account(Store(elsewhere)).linked_bytes == 0
    within = elsewhere / "cache" / "again"
    os.link(next(elsewhere.glob("packs/*.pet")), within)
    report = account(Store(elsewhere))
    assert (report.linked_bytes, report.apparent_bytes) == (0, du(elsewhere, "--apparent-size"))


def test_devices_multiply_both_sides(full_store: Store) -> None:
    one, fleet = account(full_store), account(full_store, devices=40)

    assert (one.devices, one.fleet_shared_bytes, one.fleet_full_bytes) == (
        1, one.shared_total_bytes, one.full_total_bytes,
    )  # fmt: skip
    assert fleet == replace(
        one,
        devices=40,
        fleet_shared_bytes=40 * one.shared_total_bytes,
        fleet_full_bytes=40 * one.full_total_bytes,
    )


def test_a_task_more_costs_its_pack_and_nothing_else(full_store: Store, tasks: Tasks, tmp_path: Path) -> None:
    before = account(full_store)
    third = tmp_path / "third.pet"
    size = write_pack(third, replace(read_pack(tasks.tints).delta, task="third"))

    full_store.install(third)
    after = account(full_store)

    own = after.other_bytes - before.other_bytes  # what the store says of it
    assert after.shared_total_bytes == before.shared_total_bytes + size + own
    assert 0 < own < 500
    assert after.tasks == (
        before.tasks[0],
        TaskBytes(task="third", method="lora", pack_bytes=size, full_copy_bytes=before.tasks[1].full_copy_bytes),
        before.tasks[1],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "storage: needs packs, or `store` with a device's folder"),
        ({"packs": ["a"], "store": "b"}, "storage: needs packs, or `store` with a device's folder"),
        ({"packs": ["a"], "devices": 0}, "`devices`: must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        storage(**arguments)
    assert str(refused.value) == message


def test_one_task_twice_is_refused(tasks: Tasks, graph: object) -> None:
    with pytest.raises(InputError) as refused:
        storage([tasks.shapes, tasks.shapes])
    assert str(refused.value) == "storage: needs packs of different tasks, got 'shapes' twice"


def test_an_empty_store_is_refused(store: Store) -> None:
    with pytest.raises(InputError) as refused:
        account(store)
    assert str(refused.value) == f"{store.root}: has no task installed\n  fix: install a pack first"
