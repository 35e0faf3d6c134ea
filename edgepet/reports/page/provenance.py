"""Where numbers come from: the command, the day, the machine and the versions of every result."""

from __future__ import annotations

from edgepet.reports.page.parts import MISSING, Folded, Part, Section, Text
from edgepet.reports.page.results import Made, Result, Results
from edgepet.reports.tables import Table, left, right


def section(results: Results) -> Section:
    """Called last: it says which results no other section has shown."""
    rows = [_row(result, result.name in results.shown) for result in results]
    machines: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        if result.made is not None:
            machines.setdefault(_machine(result.made), []).append(result.name)
    told = Text(
        f"{len(rows)} results of {len(machines)} kinds of machine. Milliseconds of two machines are not to be compared."
    )
    columns = (*left("result", "command", "day", "CPU"), *right("cores"), *left("versions", "drawn above"))
    kinds = [(*machine, ", ".join(names)) for machine, names in machines.items()]
    parts: list[Part] = [
        told,
        Table("Every result", columns, rows),
        Folded(Table("Every kind of machine", (*left("CPU", "cores", "features", "system", "results"),), kinds)),
    ]
    return Section(key="provenance", title="Provenance", parts=tuple(parts))


def _row(result: Result, shown: bool) -> tuple[str, ...]:
    made = result.made
    if made is None:
        return result.name, result.command or MISSING, MISSING, MISSING, "–", MISSING, _yes(shown)
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    told = f"Python {made.python}, {versions}"
    return result.name, result.command or "not said", made.date, made.cpu, str(made.cores), told, _yes(shown)


def _yes(shown: bool) -> str:
    return "yes" if shown else "no"


def _machine(made: Made) -> tuple[str, ...]:
    return made.cpu, str(made.cores), ", ".join(made.features), made.system
