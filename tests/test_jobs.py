"""Jobs: what is there is not run again, and what was killed is run again, to the same bytes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepet.errors import CheckError, InputError
from edgepet.jobs.job import REPORT, Job, make, read_result
from edgepet.jobs.running import LOCK, run_jobs
from tests.chores import LOG, spelling

ROOT = Path(__file__).parent.parent


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the jobs of a test did."""
    path = tmp_path / "log.txt"
    path.touch()
    monkeypatch.setenv(LOG, str(path))
    return path


def began(log: Path) -> list[int]:
    """The numbers of the jobs that were begun, in their order."""
    return [int(line.split()[0]) for line in log.read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    """All bytes that jobs made, without the reports, which hold times."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (REPORT, LOCK))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ------------------------------------------------------------------------------------------------------ one job


def test_a_digest_is_that_of_function_and_specification_whatever_the_order_of_keys() -> None:
    job = Job(function="garden:sow", specification={"seed": 1, "bed": "poppies"})

    assert job.digest == Job(function="garden:sow", specification={"bed": "poppies", "seed": 1}).digest
    assert job.digest == "4cb8291c5bf46612e35bcf2cae4d2e3cfc921d02882bd12acb69385ffec1dbd6"
    assert job.digest != Job(function="garden:mow", specification={"seed": 1, "bed": "poppies"}).digest
    assert job.digest != Job(function="garden:sow", specification={"seed": 2, "bed": "poppies"}).digest


@pytest.mark.parametrize(
    ("function", "specification", "message"),
    [
        ("garden.sow", {}, "job: names its function as package.module:function, got 'garden.sow'"),
        ("garden:sow()", {}, "job: names its function as package.module:function, got 'garden:sow()'"),
        ("../garden:sow", {}, "job: names its function as package.module:function, got '../garden:sow'"),
        (
            "garden:sow",
            {"beds": {1}},
            "job garden:sow: needs a specification of plain JSON, got Object of type set is not JSON serializable",
        ),
        (
            "garden:sow",
            {"depth": float("nan")},
            "job garden:sow: needs a specification of plain JSON, got Out of range float values are not JSON compliant",
        ),
    ],
)
def test_what_is_no_job_is_refused(function: str, specification: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        Job(function=function, specification=specification)
    assert str(refusal.value).partition(": nan")[0] == message


def test_a_job_leaves_its_files_and_a_report_that_says_what_was_asked(tmp_path: Path) -> None:
    (job,) = spelling(1)

    (result,) = run_jobs([job], tmp_path)

    assert result == read_result(job, tmp_path)
    assert (result.folder, result.report) == (tmp_path / job.digest, {"square": 0})
    assert result.files.keys() == {"below/first.bin", "second.txt"}
    assert result.files["second.txt"] == "9a271f2a916b0b6ee6cecb2426f0b3206ef074578be55d9bc94f6f3fe3ab86aa"
    assert 0 <= result.seconds < 60
    assert {"edgepet", "numpy", "python"} <= result.versions.keys()
    assert {path.name for path in tmp_path.iterdir()} == {job.digest, LOCK}


# ----------------------------------------------------------------------------------------------------- many jobs


def test_a_digest_that_exists_is_not_run_again(tmp_path: Path, log: Path) -> None:
    first, told = run_jobs(spelling(2), tmp_path / "jobs"), list[str]()

    again = run_jobs([*spelling(3), *spelling(3)], tmp_path / "jobs", processes=3, tell=told.append)

    assert began(log) == [0, 1, 2]
    assert again[:2] == first
    assert [result.report["square"] for result in again] == [0, 1, 4, 0, 1, 4]
    assert [line.partition("  ")[0] for line in told] == [f"1/1 {spelling(3)[2].label}"]


@pytest.mark.parametrize("damage", ["a flipped byte", "a missing file", "a further file", "no report", "half a report"])
def test_a_damaged_result_is_made_again(damage: str, tmp_path: Path, log: Path) -> None:
    job, folder = spelling(1)[0], tmp_path / "jobs" / spelling(1)[0].digest
    make(job, tmp_path / "jobs")
    expected, before = content(tmp_path / "jobs"), read_result(job, tmp_path / "jobs")
    assert before is not None
    match damage:
        case "a flipped byte":
            (folder / "second.txt").write_text("7\n")
        case "a missing file":
            (folder / "below" / "first.bin").unlink()
        case "a further file":
            (folder / "third.txt").touch()
        case "no report":
            (folder / REPORT).unlink()
        case _:
            (folder / REPORT).write_bytes((folder / REPORT).read_bytes()[:100])

    (again,) = run_jobs([job], tmp_path / "jobs")

    assert began(log) == [0, 0]
    assert content(tmp_path / "jobs") == expected
    assert (again.report, again.files) == (before.report, before.files)


def test_the_report_of_another_specification_is_not_believed(tmp_path: Path, log: Path) -> None:
    mine, other = spelling(2)
    make(other, tmp_path / "jobs")
    (tmp_path / "jobs" / other.digest).rename(tmp_path / "jobs" / mine.digest)

    assert read_result(mine, tmp_path / "jobs") is None
    assert run_jobs([mine], tmp_path / "jobs")[0].report == {"square": 0}


def test_an_error_is_told_by_the_job_and_raised_when_the_others_are_done(tmp_path: Path, log: Path) -> None:
    bad, told = Job(function="tests.chores:refuse", specification={"colour": "blue"}), list[str]()

    with pytest.raises(CheckError) as refusal:
        run_jobs([bad, *spelling(2)], tmp_path / "jobs", tell=told.append)

    message = f"job {bad.label}: poppies: must be red, got blue\n  fix: paint them"
    assert str(refusal.value) == message
    assert told[0] == f"1/3 {bad.label}  {message}"
    assert began(log) == [0, 1]
    held = {path.name for path in (tmp_path / "jobs").iterdir()}
    assert held == {LOCK, *(job.digest for job in spelling(2))}  # nothing of it, so that it is tried again


def test_a_process_makes_as_many_jobs_as_it_is_allowed_to(tmp_path: Path, log: Path) -> None:
    def processes(folder: str, **settings: int) -> list[str]:
        log.write_text("")
        run_jobs(spelling(5), tmp_path / folder, **settings)
        return [line.split()[1] for line in log.read_text().splitlines()]

    assert len(set(processes("fresh"))) == 5
    assert len(set(processes("all", per_process=5))) == 1
    pairs = processes("pairs", per_process=2)
    assert [pairs.index(each) for each in pairs] == [0, 0, 2, 2, 4]
    assert len(set(processes("two", processes=2, per_process=5))) == 2


def test_a_process_that_is_killed_or_refuses_does_not_take_the_next_jobs_with_it(tmp_path: Path, log: Path) -> None:
    first, *others = spelling(4)
    bad = [Job(function=f"tests.chores:{name}", specification={"colour": "blue"}) for name in ("vanish", "refuse")]
    told = list[str]()

    with pytest.raises(InputError, match=f"^job {bad[0].label}: was killed before it had ended, got signal 9"):
        run_jobs([first, *bad, *others], tmp_path, per_process=9, tell=told.append)

    assert began(log) == [0, 1, 2, 3]
    assert [line.partition("/")[0] for line in told] == ["1", "2", "3", "4", "5", "6"]


def test_what_was_measured_is_told_beside_the_report(tmp_path: Path) -> None:
    (result,) = run_jobs([Job(function="tests.chores:measure", specification={}, name="poppies")], tmp_path)

    assert (result.report, result.measured) == ({"petals": 4}, {"ms": 0.5})


def test_a_name_is_for_messages_and_decides_nothing(tmp_path: Path) -> None:
    named = Job(function="tests.chores:refuse", specification={"colour": "blue"}, name="poppies.pet")
    assert named.digest == Job(function="tests.chores:refuse", specification={"colour": "blue"}).digest

    with pytest.raises(CheckError, match=r"^job poppies\.pet: poppies: must be red, got blue"):
        run_jobs([named], tmp_path)


def test_a_bug_keeps_its_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(function="tests.chores:stumble", specification={})

    with pytest.raises(RuntimeError, match=rf"^job {job.label} ended with exit code 1; its traceback is above$"):
        run_jobs([job], tmp_path)

    assert "KeyError: 'nothing'" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {LOCK}


def test_a_job_that_is_killed_is_told_and_the_others_are_done(tmp_path: Path, log: Path) -> None:
    job = Job(function="tests.chores:vanish", specification={})

    with pytest.raises(InputError) as refusal:
        run_jobs([job, *spelling(1)], tmp_path / "jobs")

    told = "was killed before it had ended, got signal 9\n  fix: run the same jobs again: those that are done are kept"
    assert str(refusal.value) == f"job {job.label}: {told}"
    assert began(log) == [0]


def test_no_process_and_a_folder_that_another_run_fills_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^jobs: need one process at least, got 0$"):
        run_jobs([], tmp_path, processes=0)
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError) as refusal:
            run_jobs(spelling(1), tmp_path)
    told = "is being filled by another run of jobs\n  fix: wait until it has ended, or give another folder"
    assert str(refusal.value) == f"{tmp_path}: {told}"


# ------------------------------------------------------------------------------------------------------- killed


def running(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Ten jobs in two processes, asked for by a third."""
    command = [sys.executable, "-m", "tests.chores", str(folder), "10"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {LOG: str(log)}, stderr=subprocess.DEVNULL)


def finished(folder: Path) -> set[int]:
    return {n for n, job in enumerate(spelling(10, seconds=0.1)) if read_result(job, folder) is not None}


@pytest.mark.slow
def test_jobs_killed_at_ten_random_moments_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    rng = random.Random(20261126)
    assert running(tmp_path / "whole", tmp_path / "whole.txt").wait(timeout=60) == 0
    survived = []
    for turn in range(10):
        before, log = finished(tmp_path / "killed"), tmp_path / f"{turn}.txt"
        survived.append(len(before))
        log.touch()
        process = running(tmp_path / "killed", log)
        while not log.read_text() and process.poll() is None:  # no job yet, nothing to kill
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
        at_work = [int(line.split()[1]) for line in log.read_text().splitlines()]
        victim = process.pid if rng.random() < 0.5 or not at_work else at_work[-1]
        with contextlib.suppress(ProcessLookupError):  # that job had just ended
            os.kill(victim, signal.SIGKILL)
        process.kill()
        process.wait(timeout=60)
        assert before.isdisjoint(began(log))

    before, log = finished(tmp_path / "killed"), tmp_path / "last.txt"
    log.touch()
    assert running(tmp_path / "killed", log).wait(timeout=60) == 0

    assert survived == sorted(survived)
    assert survived[-1] > 0
    assert set(began(log)) == set(range(10)) - before
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    for job in spelling(10, seconds=0.1):
        ours, theirs = (read_result(job, tmp_path / name) for name in ("killed", "whole"))
        assert ours is not None
        assert theirs is not None
        assert (ours.report, ours.files) == (theirs.report, theirs.files)
