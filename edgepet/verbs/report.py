"""``report``: one page of what was measured, made of result files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgepet.errors import InputError, option
from edgepet.files import require_file_place, write_file
from edgepet.measuring.parity import ALGEBRA, STORED
from edgepet.reports.page.parity import Limits
from edgepet.reports.page.parts import Failure
from edgepet.reports.page.results import read_results
from edgepet.reports.page.sections import Lack, made
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, left
from edgepet.spec import FilePath
from edgepet.verbs.verb import Options, Parser, Verb, output_option

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress

RESULTS = Path("benchmarks/results")  # of a checkout


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A result that was read; ``drawn`` is whether a section draws from it. None is what it does not say."""

    name: str
    command: str | None
    date: str | None
    cpu: str | None
    drawn: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PageReport:
    """The page, what it was made of, and what it lacks. ``failed`` are checks in the results that said no."""

    path: Path
    bytes: int
    read: tuple[Read, ...]
    lacks: tuple[Lack, ...]
    checks: int
    failed: tuple[Failure, ...]


def report(results: Sequence[FilePath] = (RESULTS,), *, output: FilePath) -> PageReport:
    """Write one self-contained HTML page of all result files in folders: no script in it, and no request.

    Args:
        results: folders of ``*.json`` that benchmarks wrote, or that ``bench`` and ``storage`` printed.

    Raises:
        InputError: no result is there, or one is not as its name says; the page cannot be written there.
        MissingError: matplotlib is not installed.
    """
    where = Path(output)
    if where.suffix != ".html":
        raise InputError(option("output"), "needs a file name ending in .html", got=repr(where.name))
    require_file_place(where)
    found = read_results([Path(folder) for folder in results])
    fp32 = STORED["fp32"].relative
    page = made(found, Limits(algebra=ALGEBRA, fp32=math.inf if fp32 is None else fp32))
    data = page.html.encode()
    write_file(where, data)
    return PageReport(
        path=where,
        bytes=len(data),
        read=tuple(
            Read(
                name=each.name,
                command=each.command,
                date=None if each.made is None else each.made.date,
                cpu=None if each.made is None else each.made.cpu,
                drawn=each.name in page.shown,
            )
            for each in found
        ),
        lacks=page.lacks,
        checks=page.checks,
        failed=page.failures,
    )


def _options(parser: Parser) -> None:
    told = f"folders of results (default: {RESULTS}, of a checkout)"
    parser.add_argument("results", nargs="*", metavar="RESULTS", help=told)
    output_option(parser, "PAGE.html", "the page")


def _run(options: Options, progress: Progress) -> PageReport:
    with progress.stage("report: draw the page"):
        return report(options.results or [RESULTS], output=options.output)


def screen(report: PageReport) -> Screen:
    """Where the page is, what it lacks, and how many checks said no."""
    unseen = [each.name for each in report.read if not each.drawn]
    yield lines(
        f"{report.path}: {format_bytes(report.bytes)}, of {len(report.read)} results",
        f"  listed and not drawn: {', '.join(unseen)}" if unseen else None,
        f"  {len(report.failed)} of {report.checks} checks in them said no: the page names them",
    )
    if report.lacks:
        rows = [(lack.section, lack.needs) for lack in report.lacks]
        yield Table("not measured", left("section", "needs"), rows)


VERB = Verb(options=_options, run=_run, screen=screen)
