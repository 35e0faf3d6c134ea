"""The page of a folder of results: every section in its order, and what is at the top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgepet.reports.page import accuracy, latency, parity, provenance, storage, together
from edgepet.reports.page.html import page
from edgepet.reports.page.parity import Limits
from edgepet.reports.page.parts import Failure, Section
from edgepet.reports.page.results import Results
from edgepet.reports.tables import format_number

TITLE = "edgepet: what was measured"
SECTIONS: dict[str, Callable[[Results, Limits], Section]] = {  # in their order; the last tells what others have shown
    "kilobytes": lambda results, limits: accuracy.kilobytes(results),
    "milliseconds": lambda results, limits: accuracy.milliseconds(results),
    "storage": lambda results, limits: storage.section(results),
    "together": lambda results, limits: together.section(results),
    "latency": lambda results, limits: latency.section(results),
    "parity": parity.section,
    "provenance": lambda results, limits: provenance.section(results),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """A section, and a result that it needed and did not find."""

    section: str
    needs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The file's characters, and what a reader would look for first."""

    html: str
    shown: frozenset[str]
    lacks: tuple[Lack, ...]
    failures: tuple[Failure, ...]
    checks: int


def made(results: Results, limits: Limits) -> Page:
    """The page of ``results``; equal results give equal characters.

    Raises:
        InputError: a result lacks what others of its name have, or has something else in its place.
        MissingError: matplotlib is not installed.
    """
    sections = [make(results, limits) for make in SECTIONS.values()]
    lacks = tuple(Lack(section=each.title, needs=needs) for each in sections for needs in each.lacks)
    failures = tuple(failure for each in sections for failure in each.failures)
    checks = sum(each.checks for each in sections)
    return Page(
        html=page(TITLE, _told(results, lacks, failures, checks), sections),
        shown=frozenset(results.shown),
        lacks=lacks,
        failures=failures,
        checks=checks,
    )


def _told(results: Results, lacks: Sequence[Lack], failures: Sequence[Failure], checks: int) -> list[str]:
    days = sorted({result.made.date for result in results if result.made is not None})
    when = f", measured from {days[0]} to {days[-1]}" if days else ""
    said_no = f"{len(failures)} of {format_number(checks)} checks said no or were refused: they are under Parity."
    told = [f"{len(results.by_name)} results{when}. {said_no if failures else f'All of {checks} checks said yes.'}"]
    if lacks:
        told.append(f"Not measured: {'; '.join(f'{lack.needs} ({lack.section})' for lack in lacks)}.")
    return told
