"""Tiny functions for jobs, and a run of them as a process of its own: ``python -m tests.chores FOLDER COUNT``.

A job that begins adds a line to the file that ``CHORES_LOG`` names: its number and its process.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepet.errors import CheckError
from edgepet.jobs.job import MEASURED, Job
from edgepet.jobs.running import run_jobs

LOG = "CHORES_LOG"


def spell(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """Bytes and a report that follow from the number."""
    number: int = specification["number"]
    if LOG in os.environ:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{number} {os.getpid()}\n")
    (folder / "below").mkdir()
    (folder / "below" / "first.bin").write_bytes(hashlib.sha256(str(number).encode()).digest() * 100)
    time.sleep(specification.get("seconds", 0.0))
    (folder / "second.txt").write_text(f"{number}\n")
    return {"square": number * number}


def refuse(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """What a job ends with whose check says no."""
    (folder / "half.txt").write_text("not to be kept")
    raise CheckError("poppies", "must be red", got=specification["colour"], fix="paint them")


def copy(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """A file of another job's result."""
    name: str = specification["name"]
    (folder / name).write_bytes((folder.parent / specification["from"] / name).read_bytes())
    return {}


def measure(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """A result, and what will be another number the next time."""
    return {"petals": 4, MEASURED: {"ms": 0.5}}


def vanish(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """What the kernel does to a process that eats all memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def stumble(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """A bug."""
    return {"missing": specification["nothing"]}


def spelling(count: int, seconds: float = 0.0) -> list[Job]:
    """As many jobs that do the same with another number each."""
    return [
        Job(function="tests.chores:spell", specification={"number": number, "seconds": seconds})
        for number in range(count)
    ]


if __name__ == "__main__":
    run_jobs(spelling(int(sys.argv[2]), seconds=0.1), Path(sys.argv[1]), processes=2)
