"""Run jobs: what is there already is not run again, and what is killed is lost alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from edgepet.errors import InputError, refusing
from edgepet.files import clear_leftovers
from edgepet.jobs.executor import Executor, Failure
from edgepet.jobs.job import Job, Result, read_result
from edgepet.jobs.processes import in_processes
from edgepet.locks import held_alone
from edgepet.reports.tables import format_seconds

LOCK = ".running"


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    processes: int = 1,
    per_process: int = 1,
    ray: str | None = None,
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
        ray: the address of a Ray cluster that runs them in place of local processes.
        tell: told one line of each job that has ended.

    Returns:
        The results, in the order of ``jobs``.

    Raises:
        EdgepetError: of the first job that failed, by its name, when all others are done. Nothing is kept of it.
        InputError: a job's process was killed, the folder cannot be written, or another run is filling it; or as
            ``on_ray``.
        RuntimeError: a bug in a job's function; its process has printed the traceback.
    """
    executor = in_processes(processes, per_process) if ray is None else _on_ray(ray)
    with refusing(folder, "could not be written"):
        folder.mkdir(parents=True, exist_ok=True)
    with held_alone(folder / LOCK, "is being filled by another run of jobs"):
        asked = {job.digest: job for job in jobs}
        found = {digest: result for digest, job in asked.items() if (result := read_result(job, folder)) is not None}
        missing = {digest: job for digest, job in asked.items() if digest not in found}
        _remove_leftovers(folder, missing)
        made, errors = _run(list(missing.values()), folder, executor, tell)
        if errors:
            raise errors[min(errors, key=list(missing).index)]
    results = found | made
    lost = [job.label for digest, job in asked.items() if digest not in results]
    if lost:
        raise InputError(str(folder), "lost a result while jobs were running", got=", ".join(lost))
    return tuple(results[job.digest] for job in jobs)


def _on_ray(address: str) -> Executor:
    from edgepet.jobs.on_ray import on_ray

    return on_ray(address)


def _run(
    jobs: Sequence[Job], folder: Path, executor: Executor, tell: Callable[[str], None]
) -> tuple[dict[str, Result], dict[str, Failure]]:
    """Run all of ``jobs``; returns the results and the errors, by the digests of their jobs."""
    made, errors = dict[str, Result](), dict[str, Failure]()
    if not jobs:
        return made, errors
    with closing(executor(jobs, folder)) as ended:
        for number, (job, error) in enumerate(ended, 1):
            if error is not None:
                errors[job.digest], ended_with = error, str(error)
            elif (result := read_result(job, folder)) is not None:
                made[job.digest], ended_with = result, format_seconds(result.seconds)
            else:
                ended_with = "lost"
            tell(f"{number}/{len(jobs)} {job.label}  {ended_with}")
    return made, errors


def _remove_leftovers(folder: Path, digests: Iterable[str]) -> None:
    """What killed processes left, and results that are damaged; nobody else works on these jobs."""
    for digest in digests:
        clear_leftovers(folder / digest)
        shutil.rmtree(folder / digest, ignore_errors=True)
