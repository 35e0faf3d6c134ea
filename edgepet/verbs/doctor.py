"""``doctor``: what is installed, what each missing runtime needs, and CPU features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepet.device.runtimes import ENGINES
from edgepet.measuring.machine import Environment, RuntimeStatus, environment, runtimes
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, left
from edgepet.verbs.verb import Options, Parser, Verb

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """The state of every runtime, Python's version, and the machine."""

    runtimes: tuple[RuntimeStatus, ...]
    python: str
    cpu: Environment


def doctor() -> DoctorReport:
    """Look at this machine; runtimes that are installed are imported, torch apart."""
    here = environment()
    return DoctorReport(runtimes=runtimes(ENGINES), python=here.python, cpu=here)


def _options(parser: Parser) -> None:
    del parser


def _run(options: Options, progress: Progress) -> DoctorReport:
    del options, progress
    return doctor()


def _screen(report: DoctorReport) -> Screen:
    cpu = report.cpu
    yield lines(
        f"{cpu.cpu}, {cpu.cores} cores, {cpu.system}",
        f"features: {', '.join(cpu.cpu_features) or 'none known'}",
        f"Python {report.python}",
    )
    rows = [(r.name, r.version or "–", "yes" if r.available else "no", r.fix or "") for r in report.runtimes]
    yield Table("runtimes", left("name", "version", "available", "fix"), rows)


VERB = Verb(options=_options, run=_run, screen=_screen)
