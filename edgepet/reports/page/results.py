"""Result files of measurements: what was found, by which command, on which machine.

A result is one JSON object. ``command`` and ``environment`` say where its numbers come from; what ``edgepet bench`` and
``edgepet storage`` print with ``--json`` has no command, and is a result as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepet.canonical import parse_json
from edgepet.errors import InputError
from edgepet.files import read_file
from edgepet.strict import ObjectReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The machine of a result, the day, and the versions that were installed."""

    cpu: str
    cores: int
    features: tuple[str, ...]
    system: str
    python: str
    versions: Mapping[str, str]
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One file, ``name`` without its ending. ``command`` and ``made`` are None where it does not say them."""

    name: str
    facts: Mapping[str, Any]
    command: str | None
    made: Made | None

    @property
    def table(self) -> ObjectReader:
        """The facts, by getters that name the place of what is not as it should be."""
        return ObjectReader(self.facts, f"{self.name}.json", error=InputError)

    def rows(self) -> list[ObjectReader]:
        """The objects under "rows"."""
        return self.table.nested_list("rows")


class Results:
    """All results, by name. Whoever asks for one shows it: ``shown`` are the names of those."""

    def __init__(self, by_name: Mapping[str, Result]) -> None:
        self.by_name, self.shown = by_name, set[str]()

    def __iter__(self) -> Iterator[Result]:
        return iter(self.by_name.values())

    def get(self, name: str) -> Result | None:
        """The result of this name, counted as shown; None where there is none."""
        found = self.by_name.get(name)
        if found is not None:
            self.shown.add(name)
        return found

    def having(self, *keys: str) -> list[Result]:
        """Results that have all of ``keys``, counted as shown."""
        found = [result for result in self if all(key in result.facts for key in keys)]
        self.shown.update(result.name for result in found)
        return found

    def with_rows(self, *keys: str) -> list[Result]:
        """Results with rows, the first of which has all of ``keys``; counted as shown."""
        found = [result for result in self if _first_has(result.facts.get("rows"), keys)]
        self.shown.update(result.name for result in found)
        return found


def _first_has(rows: object, keys: Sequence[str]) -> bool:
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and all(key in rows[0] for key in keys)


def read_results(folders: Sequence[Path]) -> Results:
    """Every ``*.json`` of ``folders``, sorted by name.

    Raises:
        InputError: there is none, two have one name, or one is no JSON object or says its machine in another form.
    """
    paths = sorted((path for folder in folders for path in _files(folder)), key=lambda path: (path.stem, path))
    names = [path.stem for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError("results", "need names of their own", got=f"{', '.join(twice)} twice")
    return Results({path.stem: _read(path) for path in paths})


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not found:
        what = "holds no result, a file ending in .json" if folder.is_dir() else "is no folder of results"
        raise InputError(str(folder), what, fix="`make bench` writes benchmarks/results")
    return found


def _read(path: Path) -> Result:
    try:
        facts = parse_json(read_file(path))
    except ValueError as error:
        raise InputError(str(path), "needs JSON", got=str(error)) from error
    table = ObjectReader(facts, path.name, error=InputError)
    return Result(
        name=path.stem,
        facts=facts,
        command=table.text("command") if table.has("command") else None,
        made=_made(table.nested("environment")) if table.has("environment") else None,
    )


def _made(table: ObjectReader) -> Made:
    versions = table.nested("versions")
    return Made(
        cpu=table.text("cpu"),
        cores=table.integer("cores", least=1),
        features=table.texts("cpu_features"),
        system=table.text("system"),
        python=table.text("python"),
        versions={name: versions.text(name) for name in versions.names()},
        date=table.text("date"),
    )


def mean(values: Sequence[float]) -> float:
    """Their arithmetic mean; the order does not matter to the last bit."""
    return math.fsum(values) / len(values)
