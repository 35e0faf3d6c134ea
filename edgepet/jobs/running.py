"""Run jobs in local processes: what is there already is not run again, and what is killed is lost alone."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TypeAlias

from edgepet.errors import EdgepetError, InputError
from edgepet.files import clear_leftovers, refusing
from edgepet.jobs.job import Job, Result, make, read_result
from edgepet.reports.tables import format_seconds

LOCK = ".running"
_SPAWN = multiprocessing.get_context("spawn")  # a fork would share the threads and locks of torch and the runtimes

# An error as it comes out of a job's process: its class, where, what, got, fix.
_Told: TypeAlias = tuple[type[EdgepetError], str, str, str | None, str | None]


@dataclass(frozen=True, slots=True)
class _Running:
    job: Job
    process: SpawnProcess
    answers: Connection


def run_jobs(
    jobs: Sequence[Job], folder: Path, *, processes: int = 1, tell: Callable[[str], None] = lambda line: None
) -> tuple[Result, ...]:
    """Run those of ``jobs`` whose result is not in ``folder`` yet, each in a process of its own.

    A result appears by one rename when its job is done: a kill loses the jobs in hand and no other, and running the
    same jobs again runs what was not finished. A result that is not as its job left it is made again.

    Args:
        folder: where results lie, ``folder/DIGEST``; made where there is none.
        processes: jobs that run at the same time.
        tell: told one line of each job that has ended.

    Returns:
        The results, in the order of ``jobs``.

    Raises:
        EdgepetError: of the first job that failed, by its name, when all others are done. Nothing is kept of it.
        InputError: a job's process was killed, the folder cannot be written, or another run is filling it.
        RuntimeError: a bug in a job's function; its process has printed the traceback.
    """
    if processes < 1:
        raise InputError("jobs", "need one process at least", got=processes)
    with _alone(folder):
        missing = {job.digest: job for job in jobs if read_result(job, folder) is None}
        _remove_leftovers(folder, missing)
        errors = _run(list(missing.values()), folder, processes, tell)
        if errors:
            raise errors[min(errors, key=list(missing).index)]
        made = tuple(read_result(job, folder) for job in jobs)
    lost = [job.label for job, result in zip(jobs, made, strict=True) if result is None]
    if lost:
        raise InputError(str(folder), "lost a result while jobs were running", got=", ".join(lost))
    return tuple(result for result in made if result is not None)


def _run(
    waiting: list[Job], folder: Path, processes: int, tell: Callable[[str], None]
) -> dict[str, EdgepetError | RuntimeError]:
    """Run all of ``waiting``; returns the errors by the digests of their jobs."""
    errors: dict[str, EdgepetError | RuntimeError] = {}
    total, running, left = len(waiting), list[_Running](), waiting[::-1]
    try:
        while left or running:
            while left and len(running) < processes:
                running.append(_started(left.pop(), folder))
            ended = wait([each.answers for each in running])  # an error to tell of, or the end of the process
            for each in [each for each in running if each.answers in ended]:
                running.remove(each)
                number = f"{total - len(left) - len(running)}/{total} {each.job.label}"
                error = _error_of(each)
                result = None if error else read_result(each.job, folder)
                if error:
                    errors[each.job.digest] = error
                tell(f"{number}  {error or ('lost' if result is None else format_seconds(result.seconds))}")
    finally:
        for each in running:
            each.process.kill()
            each.process.join()
    return errors


def _started(job: Job, folder: Path) -> _Running:
    receives, sends = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_in_its_process, args=(job, folder, sends), name=job.label)
    process.start()
    sends.close()
    return _Running(job, process, receives)


def _in_its_process(job: Job, folder: Path, sends: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        make(job, folder)
    except EdgepetError as error:
        got = None if error.got is None else str(error.got)
        sends.send((type(error), error.where, error.what, got, error.fix))


def _end_with_parent() -> None:
    """A job goes on for nobody when the process that asked for it is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _error_of(ended: _Running) -> EdgepetError | RuntimeError | None:
    """What a job's process ended with, told of the job."""
    told = _told(ended.answers)
    ended.process.join()
    code = ended.process.exitcode
    if told is not None:
        kind, where, what, got, fix = told
        return kind(f"job {ended.job.label}: {where}", what, got=got, fix=fix)
    if code == 0:
        return None
    if code is not None and code < 0:
        fix = "run the same jobs again: those that are done are kept"
        return InputError(f"job {ended.job.label}", "was killed before it had ended", got=f"signal {-code}", fix=fix)
    return RuntimeError(f"job {ended.job.label} ended with exit code {code}; its traceback is above")


def _told(answers: Connection) -> _Told | None:
    with answers:
        try:
            told: _Told = answers.recv()
        except EOFError:  # it ended without an error to tell of
            return None
    return told


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``; the lock goes with the process, however that ends."""
    with refusing(folder, "could not be written"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            fix = "wait until it has ended, or give another folder"
            raise InputError(str(folder), "is being filled by another run of jobs", fix=fix) from error
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path, digests: Iterable[str]) -> None:
    """What killed processes left, and results that are damaged; nobody else works on these jobs."""
    for digest in digests:
        clear_leftovers(folder / digest)
        shutil.rmtree(folder / digest, ignore_errors=True)
