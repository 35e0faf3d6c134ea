"""Jobs in local processes: each makes one after another, and one that is killed is lost alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from edgepet.errors import EdgepetError, InputError
from edgepet.jobs.executor import AGAIN, Executor, Failure, Told, of_job, told
from edgepet.jobs.job import Job, make

_SPAWN = multiprocessing.get_context("spawn")  # a fork would share the threads and locks of torch and the runtimes


@dataclass(slots=True)
class _Worker:
    """A process that makes one job after another: the one in hand, and how many more it may take."""

    process: SpawnProcess
    line: Connection
    job: Job
    left: int


def in_processes(processes: int, per_process: int) -> Executor:
    """``processes`` at the same time; each makes ``per_process`` jobs before a fresh one takes its place.

    Raises:
        InputError: one of both is below 1.
    """
    if min(processes, per_process) < 1:
        raise InputError("jobs", "need one process at least", got=min(processes, per_process))

    def run(jobs: Sequence[Job], folder: Path) -> Generator[tuple[Job, Failure | None], None, None]:
        return _run(jobs, folder, processes, per_process)

    return run


def _run(
    jobs: Sequence[Job], folder: Path, processes: int, per_process: int
) -> Generator[tuple[Job, Failure | None], None, None]:
    workers, left = list[_Worker](), list(jobs[::-1])
    try:
        while left or workers:
            while left and len(workers) < processes:
                workers.append(_started(left.pop(), folder, per_process))
            ended = wait([worker.line for worker in workers])  # an answer, or the end of the process
            for worker in [worker for worker in workers if worker.line in ended]:
                job, (error, alive) = worker.job, _answer(worker)
                if not (alive and _goes_on(worker, left)):
                    workers.remove(worker)
                yield job, error
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


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
            line.send(told(error))
        else:
            line.send(None)


def _end_with_parent() -> None:
    """A job goes on for nobody when the process that asked for it is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(worker: _Worker) -> tuple[Failure | None, bool]:
    """What a job has ended with, told of the job, and whether its worker is still alive."""
    label = worker.job.label
    try:
        answer: Told | None = worker.line.recv()
    except (EOFError, OSError):  # a process that dies may leave the line reset
        _end(worker)
        code = worker.process.exitcode or 0
        if code >= 0:
            return RuntimeError(f"job {label} ended with exit code {code}; its traceback is above"), False
        return InputError(f"job {label}", "was killed before it had ended", got=f"signal {-code}", fix=AGAIN), False
    return None if answer is None else of_job(worker.job, answer), True
