"""Run jobs in local processes: what is there already is not run again, and what is killed is lost alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TypeAlias

from edgepet.errors import EdgepetError, InputError, refusing
from edgepet.files import clear_leftovers
from edgepet.jobs.job import Job, Result, make, read_result
from edgepet.locks import held_alone
from edgepet.reports.tables import format_seconds

LOCK = ".running"
_SPAWN = multiprocessing.get_context("spawn")  # a fork would share the threads and locks of torch and the runtimes

# An error as it comes out of a worker: its class, where, what, got, fix.
_Told: TypeAlias = tuple[type[EdgepetError], str, str, str | None, str | None]


@dataclass(slots=True)
class _Worker:
    """A process that makes one job after another: the one in hand, and how many more it may take."""

    process: SpawnProcess
    line: Connection
    job: Job
    left: int


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    processes: int = 1,
    per_process: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Result, ...]:
    """Run those of ``jobs`` whose result is not in ``folder`` yet, in processes of their own.

    A result appears by one rename when its job is done: a kill loses the jobs in hand and no other, and running the
    same jobs again runs what was not finished. A result that is not as its job left it is made again.

    Args:
        folder: where results lie, ``folder/DIGEST``; made where there is none.
        processes: jobs that run at the same time.
        per_process: jobs that a process makes before a fresh one takes its place: one leaves nothing of a job to the
            next, many share what takes long to import and to load.
        tell: told one line of each job that has ended.

    Returns:
        The results, in the order of ``jobs``.

    Raises:
        EdgepetError: of the first job that failed, by its name, when all others are done. Nothing is kept of it.
        InputError: a job's process was killed, the folder cannot be written, or another run is filling it.
        RuntimeError: a bug in a job's function; its process has printed the traceback.
    """
    if min(processes, per_process) < 1:
        raise InputError("jobs", "need one process at least", got=min(processes, per_process))
    with refusing(folder, "could not be written"):
        folder.mkdir(parents=True, exist_ok=True)
    with held_alone(folder / LOCK, "is being filled by another run of jobs"):
        asked = {job.digest: job for job in jobs}
        found = {digest: result for digest, job in asked.items() if (result := read_result(job, folder)) is not None}
        missing = {digest: job for digest, job in asked.items() if digest not in found}
        _remove_leftovers(folder, missing)
        made, errors = _run(list(missing.values()), folder, processes, per_process, tell)
        if errors:
            raise errors[min(errors, key=list(missing).index)]
    results = found | made
    lost = [job.label for digest, job in asked.items() if digest not in results]
    if lost:
        raise InputError(str(folder), "lost a result while jobs were running", got=", ".join(lost))
    return tuple(results[job.digest] for job in jobs)


def _run(
    waiting: list[Job], folder: Path, processes: int, per_process: int, tell: Callable[[str], None]
) -> tuple[dict[str, Result], dict[str, EdgepetError | RuntimeError]]:
    """Run all of ``waiting``; returns the results and the errors, by the digests of their jobs."""
    made, errors = dict[str, Result](), dict[str, EdgepetError | RuntimeError]()
    total, workers, left = len(waiting), list[_Worker](), waiting[::-1]
    try:
        while left or workers:
            while left and len(workers) < processes:
                workers.append(_started(left.pop(), folder, per_process))
            ended = wait([worker.line for worker in workers])  # an answer, or the end of the process
            for worker in [worker for worker in workers if worker.line in ended]:
                job, (error, alive) = worker.job, _answer(worker)
                if not (alive and _goes_on(worker, left)):
                    workers.remove(worker)
                number = f"{total - len(left) - len(workers)}/{total} {job.label}"
                if error is not None:
                    errors[job.digest], ended_with = error, str(error)
                elif (result := read_result(job, folder)) is not None:
                    made[job.digest], ended_with = result, format_seconds(result.seconds)
                else:
                    ended_with = "lost"
                tell(f"{number}  {ended_with}")
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
    return made, errors


def _started(job: Job, folder: Path, per_process: int) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_work, args=(folder, theirs), name="jobs")
    process.start()
    theirs.close()
    worker = _Worker(process, ours, job, per_process)
    _hand(worker, job)
    return worker


def _goes_on(worker: _Worker, left: list[Job]) -> bool:
    """Give the worker the next job, where there is one and it may take it; else let it end."""
    if not left or worker.left == 0:
        _end(worker)
        return False
    _hand(worker, left.pop())
    return True


def _hand(worker: _Worker, job: Job) -> None:
    worker.job, worker.left = job, worker.left - 1
    with contextlib.suppress(BrokenPipeError):  # it has died: its answer will tell
        worker.line.send(job)


def _end(worker: _Worker) -> None:
    worker.line.close()
    worker.process.join()


def _work(folder: Path, line: Connection) -> None:
    """Make the jobs that come down the line until nobody is at its other end."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job: Job = line.recv()
        except EOFError:
            return
        try:
            make(job, folder)
        except EdgepetError as error:
            got = None if error.got is None else str(error.got)
            line.send((type(error), error.where, error.what, got, error.fix))
        else:
            line.send(None)


def _end_with_parent() -> None:
    """A job goes on for nobody when the process that asked for it is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(worker: _Worker) -> tuple[EdgepetError | RuntimeError | None, bool]:
    """What a job has ended with, told of the job, and whether its worker is still alive."""
    label = worker.job.label
    try:
        told: _Told | None = worker.line.recv()
    except (EOFError, OSError):  # a process that dies may leave the line reset
        _end(worker)
        code = worker.process.exitcode or 0
        if code >= 0:
            return RuntimeError(f"job {label} ended with exit code {code}; its traceback is above"), False
        again = "run the same jobs again: those that are done are kept"
        return InputError(f"job {label}", "was killed before it had ended", got=f"signal {-code}", fix=again), False
    if told is None:
        return None, True
    kind, where, what, got, fix = told
    return kind(f"job {label}: {where}", what, got=got, fix=fix), True


def _remove_leftovers(folder: Path, digests: Iterable[str]) -> None:
    """What killed processes left, and results that are damaged; nobody else works on these jobs."""
    for digest in digests:
        clear_leftovers(folder / digest)
        shutil.rmtree(folder / digest, ignore_errors=True)
