"""Jobs on a Ray cluster: tasks that return the bytes of their results, so that nodes need no common disk for them.

What a job's specification names by path, packs and images, every node has to see there; jobs check it by its digest.
Results of other jobs of the same folder, which a specification names by their digests, are sent along. Ray core alone
is used, and tells nobody that it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, TypeAlias

import edgepet
from edgepet.errors import EdgepetError, InputError, first_line, option, require
from edgepet.files import new_folder, read_file, write_file
from edgepet.jobs.executor import AGAIN, Executor, Failure, Told, of_job, told
from edgepet.jobs.job import REPORT, Job, make
from edgepet.measuring.machine import environment

COMPARED = ("torch", "timm", "edgepet")  # packages that decide a result's bits, beside Python
ANSWER_S = 10
RETRIES = 2  # of a job whose node or process has died
_DIGEST = re.compile(r"[0-9a-f]{64}")

_Files: TypeAlias = dict[str, bytes]  # contents by path, "/" between folders


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a node gets: the job, results that it needs by their digests, and what the driver has.

    ``needs`` are references of Ray's to the files of each; ``path`` are folders that the driver imports from.
    """

    job: Job
    needs: Mapping[str, Any]
    versions: Mapping[str, str]
    path: tuple[str, ...]


def on_ray(address: str) -> Executor:
    """Jobs as tasks of the cluster at ``address``, "auto" for the one that this machine is of.

    A job takes as many CPUs as its specification has ``threads``, and begins again elsewhere when its node has died.
    Every node has the driver's Python, torch, timm and edgepet, to its sources: equal bits come from equal code.

    Raises:
        MissingError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", extra="ray", purpose=option("ray"))

    def run(jobs: Sequence[Job], folder: Path) -> Generator[tuple[Job, Failure | None], None, None]:
        with _connected(ray, address):
            versions = versions_here()
            _require_equal_nodes(ray, versions)
            _require_room(ray, jobs)
            yield from _run(ray, jobs, folder, versions)

    return run


@contextlib.contextmanager
def _connected(ray: ModuleType, address: str) -> Iterator[None]:
    """Be the driver of the cluster while the block runs; one that its caller began stays."""
    if ray.is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        _require_answer(address)
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        fix = f"`ray start` makes machines one; {option('ray', 'auto')} is the one that this machine is of"
        raise InputError(
            option("ray"), "finds no Ray cluster", got=f"{address}: {first_line(error)}", fix=fix
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own would end the process with another code than an interrupt
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """An OSError where nobody listens: Ray would try for minutes."""
    host, colon, port = address.rpartition("/")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()


def versions_here() -> dict[str, str]:
    """The versions that nodes must have as well, and of edgepet the digest of its sources."""
    here = environment()
    found = {name: here.versions.get(name, "not installed") for name in COMPARED}
    return {"Python": here.python, **found, "edgepet": f"{found['edgepet']} ({_sources()[:12]})"}


def _sources() -> str:
    """Hex sha256 of every source of the package, those of the folders at the top of the repository too."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(edgepet.__path__[0], followlinks=True):
        folders.sort()
        for path in (Path(folder) / name for name in sorted(names) if name.endswith(".py")):
            digest.update(path.relative_to(edgepet.__path__[0]).as_posix().encode() + b"\0" + read_file(path) + b"\0")
    return digest.hexdigest()


def unlike(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """What another machine has in other versions, with both; None where nothing is."""
    other = [
        f"{name} {there.get(name)} and not {version}" for name, version in here.items() if there.get(name) != version
    ]
    return ", ".join(other) or None


def _refused(where: str, other: str) -> InputError:
    fix = "install the driver's versions there: equal jobs must give equal bits"
    return InputError(where, "needs the versions of the machine that asks", got=other, fix=fix)


def _require_equal_nodes(ray: ModuleType, versions: Mapping[str, str]) -> None:
    """The first task of every node: has it what this machine has? One that dies meanwhile is none."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asking = ray.remote(num_cpus=0, max_retries=0)(versions_here)
    asked = [
        (
            node["NodeManagerAddress"],
            asking.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    for address, answer in asked:
        try:
            other = unlike(ray.get(answer), versions)
        except ray.exceptions.RayTaskError as error:
            what = "cannot ask edgepet for its versions"
            raise InputError(f"node {address}", what, got=str(error).strip().splitlines()[-1]) from error
        except ray.exceptions.RayError:
            continue
        if other is not None:
            raise _refused(f"node {address}", other)


def _cpus(job: Job) -> int:
    threads = job.specification.get("threads", 1)
    return threads if isinstance(threads, int) else 1


def _require_room(ray: ModuleType, jobs: Sequence[Job]) -> None:
    """Ray would wait for ever for a node that is large enough."""
    most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    needed = max(map(_cpus, jobs))
    if needed > most:
        fix = f"with {option('jobs', 'N')} a job takes this machine's cores divided by N"
        raise InputError(
            option("ray"), f"has no node of {needed} CPUs, which a job takes", got=f"{most} at most", fix=fix
        )


def _run(
    ray: ModuleType, jobs: Sequence[Job], folder: Path, versions: Mapping[str, str]
) -> Generator[tuple[Job, Failure | None], None, None]:
    working, sent, running = ray.remote(max_retries=RETRIES)(work), dict[str, Any](), dict[Any, Job]()
    path = tuple(part for part in sys.path if part)
    for job in jobs:
        for digest in needs_of(job, folder):
            sent[digest] = sent.get(digest) or ray.put(_read(folder / digest))
        needs = {digest: sent[digest] for digest in needs_of(job, folder)}
        task = Task(job=job, needs=needs, versions=versions, path=path)
        running[working.options(num_cpus=_cpus(job), name=job.label).remote(task)] = job
    try:
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(ended)
            yield job, _kept(ray, ended, job, folder)
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _kept(ray: ModuleType, ended: Any, job: Job, folder: Path) -> Failure | None:
    """Put what a job has made where it belongs, whole; or say why there is nothing."""
    try:
        error, files = ray.get(ended)
    except ray.exceptions.RayTaskError as bug:
        return RuntimeError(f"job {job.label} ended with an error on its node:\n{bug}")
    except ray.exceptions.RayError as lost:
        return InputError(f"job {job.label}", "was killed before it had ended", got=type(lost).__name__, fix=AGAIN)
    if error is not None:
        return of_job(job, error)
    try:
        with new_folder(folder / job.digest) as scratch:
            write(files, scratch)
    except EdgepetError as refusal:
        return refusal
    return None


def needs_of(job: Job, folder: Path) -> list[str]:
    """Digests in a specification that results in ``folder`` have: what other jobs made for this one."""

    def digests(value: object) -> Iterator[str]:
        if isinstance(value, str) and _DIGEST.fullmatch(value):
            yield value
        elif isinstance(value, Mapping):
            for each in value.values():
                yield from digests(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                yield from digests(each)

    return sorted({digest for digest in digests(job.specification) if (folder / digest / REPORT).is_file()})


# ------------------------------------------------------------------------------------------------------- on the nodes


def work(task: Task) -> tuple[Told | None, _Files]:
    """Make a job in a folder of this node that is gone afterwards: its error, or the files of its result."""
    sys.path += [part for part in task.path if part not in sys.path]  # as a spawned process has them
    other = unlike(versions_here(), task.versions)
    if other is not None:  # a node that came when others had been asked
        return told(_refused("its node", other)), {}
    with tempfile.TemporaryDirectory(prefix="edgepet-job-") as name:
        folder = Path(name)
        try:
            for digest, files in task.needs.items():
                write(_fetched(files), folder / digest)
            make(task.job, folder)
        except EdgepetError as error:
            return told(error), {}
        return None, _read(folder / task.job.digest)


def _fetched(files: Any) -> _Files:
    import ray

    fetched: _Files = ray.get(files)
    return fetched


def _read(folder: Path) -> _Files:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): read_file(path) for path in paths}


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Every file below ``folder``.

    Raises:
        InputError: a name leads out of it, or it cannot be written.
    """
    for name, data in files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not place.parts:
            raise InputError(str(folder), "takes files below it alone", got=repr(name))
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / place, data)
