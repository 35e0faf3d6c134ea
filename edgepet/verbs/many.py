"""Several packs in one command: each is a job, several run at the same time, and a kill loses those in hand alone."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgepet.errors import EdgepetError, InputError, option
from edgepet.files import folder_sha256, sha256_file
from edgepet.jobs.job import Job, Result
from edgepet.jobs.running import LOCK, run_jobs
from edgepet.locks import held_alone
from edgepet.measuring.machine import environment
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.subject import Subject
from edgepet.spec import FilePath
from edgepet.tuning.work_folder import work_folder
from edgepet.verbs.verb import Parser

_RESULT = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f]{8}\.part")
JOBS = ".jobs"  # below what is written, until all of it is there
MOST_JOBS = 64  # of one machine: each holds a backbone


def jobs_option(parser: Parser, default: int | None) -> None:
    """--jobs and --ray."""
    told = (
        "packs at the same time, each in a process with its share of the cores; a command that was killed goes on"
        f" where it was (default: {default or 'one after another in this process'})"
    )
    parser.add_argument("--jobs", type=int, default=default, metavar="N", help=told)
    told = (
        "packs on the nodes of a Ray cluster, which see the same files, auto for this machine's; --jobs N is then how"
        " many would share this machine (default: on this machine)"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help=told)


def tasks_of(packs: Sequence[FilePath], verb: str) -> dict[Path, str]:
    """The task of every pack.

    Raises:
        InputError: two are of one task, or a pack cannot be read.
    """
    read = [(Path(path), read_pack(path, answers=EVERY).delta.task) for path in packs]
    if len({task for _, task in read}) != len(read):
        raise InputError(verb, "needs packs of different tasks", got=", ".join(task for _, task in read))
    return dict(read)


def require_several(ray: str | None, packs: Sequence[FilePath]) -> None:
    """Refuse a cluster for a single pack, which takes its job in this process.

    Raises:
        InputError: it is one.
    """
    if ray is not None and len(packs) < 2:
        raise InputError(option("ray"), "is for several packs", got=f"{len(packs)} pack")


def of_task(folder: FilePath | None, task: str | None) -> Path | None:
    """Where the images of one of several tasks are: ``folder/TASK``, or ``folder`` itself where there is none.

    ``task`` None is the only one: ``folder`` is its own.
    """
    if folder is None:
        return None
    own = Path(folder) / (task or ".")
    return own if own.is_dir() else Path(folder)


def make_graphs(
    tasks: Mapping[Path, str],
    backbone: AnyBackbone,
    stage: Callable[[str], None],
    use: Callable[[Subject], object] = lambda subject: subject.graph,
) -> None:
    """Trace the graphs that packs share and the cache lacks, or let ``use`` do it: once, and not in every job.

    Raises:
        InputError: the backbone is no name.
        EdgepetError: as ``Subject.check_backbone`` and ``Subject.graph``.
    """
    if backbone is not None and not isinstance(backbone, str):
        what = "need a backbone by its name: each runs in a process of its own"
        raise InputError(option("jobs"), what, got=type(backbone).__name__)
    for pack in tasks:
        subject = Subject(pack, backbone, None, answers=EVERY)
        subject.check_backbone()
        stage(f"graph of {subject.delta.backbone}")
        use(subject)


def run_packs(
    function: str,
    tasks: Mapping[Path, str],
    place: Path,
    *,
    backbone: AnyBackbone,
    images: Mapping[str, FilePath | None],
    settings: Mapping[str, object],
    processes: int,
    ray: str | None = None,
    tell: Callable[[str], None],
) -> tuple[Result, ...]:
    """Run ``function`` of every pack as a job; results lie below ``place`` until ``finish`` is called.

    Args:
        function: "module:name"; its specification has what ``settings`` has, and ``pack``, ``backbone``, ``threads``,
            and the folders of ``images``, each of the task's own.
        tasks: packs, and what each answers.
        images: folders of images, or None, by the names that the specification has for them.
        ray: the address of a cluster whose nodes run them; each takes as many threads as it would get here.

    Raises:
        EdgepetError: of the first pack that failed, when all others are done.
    """
    tell(f"{len(tasks)} packs, {f'{processes} at the same time' if ray is None else f'on the Ray cluster at {ray}'}")
    here, digest = environment(), lru_cache(maxsize=None)(folder_sha256)
    threads = max(1, here.cores // min(processes, len(tasks)))

    def job(path: Path, task: str) -> Job:
        work = work_folder(path)
        folders = {name: of_task(folder, task) for name, folder in images.items()}
        specification = {
            "pack": {"path": str(path.absolute()), "sha256": sha256_file(path)},
            "work": digest(work) if work.is_dir() else None,
            "backbone": backbone,
            "images": {
                name: folder and {"path": str(folder.absolute()), "sha256": digest(folder)}
                for name, folder in folders.items()
            },
            "settings": settings,
            "threads": threads,
            "versions": here.versions,
        }
        return Job(function=function, specification=specification, name=path.name)

    jobs = [job(path, task) for path, task in tasks.items()]
    try:
        return run_jobs(
            jobs, place, processes=processes, per_process=len(jobs), ray=ray, tell=lambda line: tell(_first(line))
        )
    except EdgepetError as error:
        done = sum((place / job.digest).is_dir() for job in jobs)  # results are whole, or not there
        kept = f"{done} of {len(jobs)} packs are done and kept in {place}: the same command goes on from there"
        fix = kept if error.fix is None else f"{error.fix}; {kept}"
        raise type(error)(error.where, error.what, got=error.got, fix=fix) from error


def _first(line: str) -> str:
    return line.splitlines()[0]


def folder_of(specification: Mapping[str, Any], name: str) -> Path | None:
    """A folder of images that a job was given, or None.

    Raises:
        InputError: other images are there: they have changed since, or this is another machine.
    """
    given = specification["images"][name]
    if given is None:
        return None
    folder = Path(given["path"])
    _require_same(folder, given["sha256"], _images_sha256(folder) if folder.is_dir() else "nothing")
    return folder


_images_sha256 = lru_cache(maxsize=None)(folder_sha256)  # a process makes many jobs, on the same images


def _require_same(path: Path, wanted: str, found: str) -> None:
    if found != wanted:
        fix = "run the command again; nodes of a cluster need the same files under the same paths"
        raise InputError(str(path), f"is not what the job is of, sha256:{wanted[:12]}", got=found[:12], fix=fix)


def begin(specification: Mapping[str, Any]) -> Path:
    """What every job of a pack begins with: torch takes its share of the cores. Returns the pack.

    Raises:
        InputError: another file is there: it has changed since, or this is another machine.
    """
    import torch

    torch.set_num_threads(specification["threads"])
    pack = Path(specification["pack"]["path"])
    _require_same(pack, specification["pack"]["sha256"], sha256_file(pack) if pack.is_file() else "nothing")
    work, wanted = work_folder(pack), specification["work"]
    if wanted is not None:
        _require_same(work, wanted, folder_sha256(work) if work.is_dir() else "nothing")
    return pack


def finish(results: Sequence[Result]) -> None:
    """Results are where they belong: nothing of their jobs is kept."""
    for result in results:
        shutil.rmtree(result.folder, ignore_errors=True)
    for place in {result.folder.parent for result in results}:
        if place.name != JOBS:
            continue
        with contextlib.suppress(InputError), held_alone(place / LOCK, "is being filled by another run of jobs"):
            for item in place.iterdir():  # results of jobs that nobody asks for any more
                if _RESULT.fullmatch(item.name):
                    shutil.rmtree(item, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody's own files are in it
                (place / LOCK).unlink(missing_ok=True)
                place.rmdir()
