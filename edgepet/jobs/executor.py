"""What runs jobs: a function that yields each of them when it has ended. To add one is to add a file."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeAlias

from edgepet.errors import EdgepetError
from edgepet.jobs.job import Job

# Takes jobs and the folder that their results belong in; yields each job as it ends, with its error or None. Then its
# result is there, whole. Closing it ends what is still running.
Failure: TypeAlias = EdgepetError | RuntimeError
Executor: TypeAlias = Callable[[Sequence[Job], Path], Generator[tuple[Job, Failure | None], None, None]]

# An error as it comes out of another process: its class, where, what, got, fix.
Told: TypeAlias = tuple[type[EdgepetError], str, str, str | None, str | None]

AGAIN = "run the same jobs again: those that are done are kept"


def told(error: EdgepetError) -> Told:
    """``error`` as plain values."""
    got = None if error.got is None else str(error.got)
    return type(error), error.where, error.what, got, error.fix


def of_job(job: Job, error: Told) -> EdgepetError:
    """The error that was told, of ``job``."""
    kind, where, what, got, fix = error
    return kind(f"job {job.label}: {where}", what, got=got, fix=fix)
