"""Jobs on a Ray cluster: what comes back is what local processes make, and a node that goes takes nothing with it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepet.errors import CheckError, InputError, MissingError
from edgepet.files import sha256_file
from edgepet.jobs import on_ray
from edgepet.jobs.executor import of_job
from edgepet.jobs.job import REPORT, Job, make, read_result
from edgepet.jobs.running import LOCK, run_jobs
from tests.chores import LOG, spelling
from tests.flow import Tasks, draw_shapes, edgepet

ROOT = Path(__file__).parent.parent


def content(folder: Path) -> dict[str, bytes]:
    """All bytes that jobs made, without the reports, which hold times."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (REPORT, LOCK))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---------------------------------------------------------------------------------------------------- without a cluster


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(MissingError) as refusal:
        run_jobs(spelling(1), tmp_path / "jobs", ray="auto")

    assert str(refusal.value).startswith("`ray`: needs the package 'ray'")
    assert str(refusal.value).endswith("fix: pip install 'edgepet[ray]'")
    assert not (tmp_path / "jobs").exists()


def test_a_single_pack_needs_no_cluster(tasks: Tasks, tmp_path: Path) -> None:
    for words in (("export", tasks.shapes, "-o", tmp_path), ("calibrate", tasks.shapes, "--calib", tasks.data)):
        said = edgepet(*words, "--ray", "auto")
        assert (said.code, said.err) == (3, "--ray: is for several packs, got 1 pack\n")


def test_results_of_other_jobs_are_found_in_a_specification(tmp_path: Path) -> None:
    first, second, third = spelling(3)
    for job in (first, second):
        make(job, tmp_path)
    asked = {"data": {"job": first.digest}, "init": [second.digest], "absent": third.digest, "sha256": "0" * 64}

    needs = on_ray.needs_of(Job(function="tests.chores:spell", specification=asked), tmp_path)

    assert needs == sorted([first.digest, second.digest])


def test_a_node_that_has_other_versions_makes_nothing() -> None:
    here = on_ray.versions_here()
    task = on_ray.Task(job=spelling(1)[0], needs={}, versions={**here, "torch": "1.0.0"}, path=())

    error, files = on_ray.work(task)

    assert files == {}
    assert error is not None
    assert str(of_job(task.job, error)) == (
        f"job {task.job.label}: its node: needs the versions of the machine that asks, got torch {here['torch']} and"
        " not 1.0.0\n  fix: install the driver's versions there: equal jobs must give equal bits"
    )
    assert list(here) == ["Python", "torch", "timm", "edgepet"]
    assert on_ray.unlike(here, here) is None


def test_a_task_leaves_nothing_on_its_node_and_names_stay_in_their_folder(tmp_path: Path) -> None:
    (job,) = spelling(1)
    task = on_ray.Task(job=job, needs={}, versions=on_ray.versions_here(), path=(str(ROOT),))

    error, files = on_ray.work(task)
    on_ray.write(files, tmp_path / job.digest)

    assert error is None
    result = read_result(job, tmp_path)
    assert result is not None
    assert result.report == {"square": 0}
    for name in ("../out.txt", "/out.txt", ".", "a/../../out.txt"):
        with pytest.raises(InputError, match="takes files below it alone"):
            on_ray.write({name: b""}, tmp_path / "somewhere")


# ------------------------------------------------------------------------------------------------------- on a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A node of one CPU, to which tests add others."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    pytest.importorskip("ray", reason="needs the package ray")
    from ray.cluster_utils import Cluster

    store = 80 * 1024 * 1024
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    )
    yield made
    made.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    """A second node of one CPU; a test may take it away."""
    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 1024 * 1024)
    cluster.wait_for_nodes()
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray's own
def test_a_node_that_is_removed_while_jobs_run_takes_no_result_with_it(
    cluster: Any, second: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, told = spelling(8, seconds=1.5), list[str]()
    local = run_jobs(jobs, tmp_path / "local", processes=2, per_process=8)

    def tell(line: str) -> None:
        told.append(line)
        if len(told) == 2:  # of eight; the next two are in hand
            cluster.remove_node(second, allow_graceful=False)

    far = run_jobs(jobs, tmp_path / "far", ray=cluster.address, tell=tell)

    assert second not in cluster.worker_nodes
    assert len(told) == 8
    assert content(tmp_path / "far") == content(tmp_path / "local")
    assert [(each.report, each.files) for each in far] == [(each.report, each.files) for each in local]
    assert {path.name for path in (tmp_path / "far").iterdir()} == {LOCK, *(job.digest for job in jobs)}
    told.clear()
    assert run_jobs(jobs, tmp_path / "far", ray=cluster.address, tell=told.append) == far
    assert told == []  # a digest that exists is not submitted


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_errors_bugs_and_lost_processes_are_told_by_their_jobs(cluster: Any, tmp_path: Path) -> None:
    bad = Job(function="tests.chores:refuse", specification={"colour": "blue"})
    with pytest.raises(CheckError) as refusal:
        run_jobs([bad, *spelling(1)], tmp_path, ray=cluster.address)
    assert str(refusal.value) == f"job {bad.label}: poppies: must be red, got blue\n  fix: paint them"
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, spelling(1)[0].digest}

    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        run_jobs([Job(function="tests.chores:stumble", specification={})], tmp_path, ray=cluster.address)

    killed = Job(function="tests.chores:vanish", specification={})
    with pytest.raises(
        InputError, match=rf"^job {killed.label}: was killed before it had ended, got WorkerCrashedError"
    ):
        run_jobs([killed], tmp_path, ray=cluster.address)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_node_of_other_versions_and_a_job_too_large_are_refused(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Job(function="tests.chores:spell", specification={"number": 1, "threads": 64})
    with pytest.raises(InputError) as refusal:
        run_jobs([large], tmp_path, ray=cluster.address)
    assert str(refusal.value).startswith("`ray`: has no node of 64 CPUs, which a job takes, got 1 at most\n  fix: ")

    here = on_ray.environment()
    other = type(here)(**{name: getattr(here, name) for name in here.__slots__} | {"python": "3.99.0"})
    monkeypatch.setattr(on_ray, "environment", lambda: other)
    with pytest.raises(InputError) as refusal:
        run_jobs(spelling(1), tmp_path, ray=cluster.address)
    assert f": needs the versions of the machine that asks, got Python {here.python} and not 3.99.0" in str(
        refusal.value
    )
    assert str(refusal.value).startswith("node ")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_no_cluster_is_told(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the package ray")
    with pytest.raises(InputError) as refusal:
        run_jobs(spelling(1), tmp_path, ray="127.0.0.1:1")
    assert str(refusal.value).startswith("`ray`: finds no Ray cluster, got 127.0.0.1:1: ")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_packs_are_exported_and_calibrated_to_the_bytes_of_local_processes(
    cluster: Any, second: Any, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_shapes(tmp_path / "many", {"train": 12, "val": 4})
    packs = (tasks.shapes, tasks.tints)
    for name, how in (("local", ("--jobs", 2)), ("far", ("--jobs", 2, "--ray", cluster.address))):
        said = edgepet("export", *packs, *how, "-o", name, "--json")
        assert said.code == 0, said.err
        assert [row["verified"] for row in said.json["artifacts"]] == [True, True]
        said = edgepet("calibrate", *packs, "--calib", tmp_path / "many", *how, "-o", f"{name}-int8")
        assert said.code == 0, said.err

    for folder in ("{}", "{}-int8"):
        local, far = (tmp_path / folder.format(name) for name in ("local", "far"))
        names = sorted(path.relative_to(local) for path in local.rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(far) for path in far.rglob("*") if path.is_file())
        assert [sha256_file(far / name) for name in names] == [sha256_file(local / name) for name in names]
        assert names


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_result_that_a_job_needs_is_sent_along(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOG, raising=False)
    (first,) = spelling(1)
    run_jobs([first], tmp_path / "jobs", ray=cluster.address)
    copy = Job(function="tests.chores:copy", specification={"from": first.digest, "name": "second.txt"})

    (far,) = run_jobs([copy], tmp_path / "jobs", ray=cluster.address)

    assert (far.folder / "second.txt").read_text() == "0\n"
    shutil.rmtree(far.folder)
    (local,) = run_jobs([copy], tmp_path / "jobs")
    assert (local.files, local.report) == (far.files, far.report)
