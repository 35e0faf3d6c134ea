"""A job: a pure function, by its name, and a specification of plain JSON. Their digest names the result.

A result is the folder DIGEST: the files that the function wrote, and ``report.json``, which says what was asked, what
the function reported, the digest of every file, and with which versions and in how many seconds it was made.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from edgepet.canonical import canonical_json, parse_json
from edgepet.errors import InputError
from edgepet.files import new_folder, read_file, sha256_file, write_file
from edgepet.measuring.machine import environment
from edgepet.strict import ObjectReader

REPORT, MEASURED = "report.json", "measured"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

Function: TypeAlias = Callable[[Mapping[str, Any], Path], Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``function`` ("package.module:function") of ``specification``: everything that decides the result.

    The function takes the specification and an empty folder for the files that it makes, and returns its report, plain
    JSON. Equal specifications must give equal reports and equal bytes; what differs, times above all, goes under
    ``measured``. Data are named by their digests; what another job made is named by that job's digest, and lies beside
    the folder. ``name`` is for messages and decides nothing; without one it is the function's.

    Raises:
        InputError: the name is not one of a function, or the specification is not plain JSON.
    """

    function: str
    specification: Mapping[str, object]
    name: str | None = None

    def __post_init__(self) -> None:
        if _FUNCTION.fullmatch(self.function) is None:
            raise InputError("job", "names its function as package.module:function", got=repr(self.function))
        try:
            canonical_json(self.specification)
        except (TypeError, ValueError) as error:
            raise InputError(f"job {self.function}", "needs a specification of plain JSON", got=str(error)) from error

    @property
    def digest(self) -> str:
        """Hex sha256 of the canonical JSON of function and specification."""
        asked = {"function": self.function, "specification": self.specification}
        return hashlib.sha256(canonical_json(asked)).hexdigest()

    @property
    def label(self) -> str:
        """How messages name the job."""
        return self.name or f"{self.function} {self.digest[:12]}"

    def load(self) -> Function:
        """The function itself; an ImportError or AttributeError where there is none of that name."""
        module, _, name = self.function.partition(":")
        return cast(Function, getattr(importlib.import_module(module), name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a job made, in ``folder``.

    ``report`` is the function's and ``files`` are the sha256 of what it wrote, by path below the folder: both are the
    same whenever and wherever the job runs. ``seconds``, ``versions`` and ``measured`` tell of this one run.
    """

    job: Job
    folder: Path
    report: Mapping[str, Any]
    files: Mapping[str, str]
    seconds: float
    versions: Mapping[str, str]
    measured: Mapping[str, Any]


def make(job: Job, folder: Path) -> None:
    """Run ``job`` here and now; its result appears in ``folder`` whole, by one rename, or not at all.

    Raises:
        EdgepetError: what the function raised; or the folder could not be written.
    """
    began, here = time.perf_counter(), environment()
    with new_folder(folder / job.digest) as scratch:
        report = dict(job.load()(job.specification, scratch))
        measured = report.pop(MEASURED, {})
        told = {
            "function": job.function,
            "specification": job.specification,
            "report": report,
            "files": _digests(scratch),
            "made": {
                "seconds": round(time.perf_counter() - began, 3),
                "versions": {"python": here.python, **here.versions},
                MEASURED: measured,
            },
        }
        write_file(scratch / REPORT, canonical_json(told))


def read_result(job: Job, folder: Path) -> Result | None:
    """The result of ``job`` in ``folder``; None where it is not there, or not as the job left it."""
    place = folder / job.digest
    try:
        table = ObjectReader(parse_json(read_file(place / REPORT)), str(place / REPORT), error=InputError)
        asked = {key: table.raw(key) for key in ("function", "specification")}
        report, files, made = table.raw("report"), table.nested("files"), table.nested("made")
        listed = {name: files.text(name) for name in files.names()}
        seconds, versions = made.number("seconds"), made.nested("versions")
        told, measured = (
            {name: versions.text(name) for name in versions.names()},
            made.raw(MEASURED) if made.has(MEASURED) else {},
        )
    except (InputError, ValueError):
        return None
    wanted = {"function": job.function, "specification": job.specification}
    if canonical_json(asked) != canonical_json(wanted) or _digests(place) != listed:
        return None
    return Result(job=job, folder=place, report=report, files=listed, seconds=seconds, versions=told,
                  measured=measured)  # fmt: skip


def _digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file below ``folder`` but the report, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / REPORT)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
