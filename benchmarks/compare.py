"""Hold new results against committed ones: what has become worse, beyond noise, on the kind of machine that made them.

    python benchmarks/compare.py                      # benchmarks/results against those of the last commit
    python benchmarks/compare.py --baseline FOLDER    # against those of a folder

Compared are ratios that were found within one run and have an interval, and top-1 on so many images: of milliseconds
two runs would compare two states of a machine. A measure is worse where both intervals are apart and the difference is
more than ``SLACK``, which is what intervals of one day do not know of another. Exit code 4 where one is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import HERE, RESULTS, asked, parser_of

from edgepet.errors import CheckError, InputError
from edgepet.measuring.parity import interval
from edgepet.reports.tables import Column, Table, format_names, markdown

SLACK = {"ratio": 0.05, "top-1": 0.005}  # a part of the ratio; of 1
HIGHER = ("training",)  # results whose ratios are the better the larger
KIND = ("machine", "cpu", "cores", "cpu_features")  # of an environment: what times hold for
# What tells rows of a list apart.
NAMED = ("backbone", "model", "family", "task", "method", "runtime", "image_size", "training", "network")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A number with its 95 % interval; ``what`` is "ratio" or "top-1"."""

    what: str
    value: float
    low: float
    high: float
    higher_is_better: bool

    def is_worse_than(self, other: Measure) -> bool:
        """Whether both intervals are apart on the wrong side, by more than the slack."""
        if self.higher_is_better:
            return self.high < other.low and self.value < other.value - self._slack(other)
        return self.low > other.high and self.value > other.value + self._slack(other)

    def _slack(self, other: Measure) -> float:
        return SLACK[self.what] * (other.value if self.what == "ratio" else 1)

    def told(self) -> str:
        """The number and its interval."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One result: (name, before, now) of what is worse and of what is better, and how many measures there are.

    ``reason`` is why it was not compared; ``gone`` are measures that the new result lacks.
    """

    name: str
    measures: int = 0
    worse: tuple[tuple[str, Measure, Measure], ...] = ()
    better: tuple[tuple[str, Measure, Measure], ...] = ()
    gone: tuple[str, ...] = ()
    reason: str | None = None


def parser() -> argparse.ArgumentParser:
    """The arguments of this comparison."""
    made = parser_of(__doc__)
    made.add_argument("--baseline", type=Path, help="results to compare with (those of the last commit)")
    return made


def main() -> None:
    """Compare every result that both have, print what changed, and exit with 4 where something is worse."""
    options = parser().parse_args()
    run = asked(options)
    before = committed() if options.baseline is None else of_folder(options.baseline)
    now = before if run.quick else of_folder(run.results)
    found = [compare(name, before[name], now[name]) for name in sorted(before.keys() & now.keys())]
    print(table(found))
    if any(each.worse for each in found):
        sys.exit(CheckError.exit_code)


def of_folder(folder: Path) -> dict[str, Any]:
    """Every result in ``folder``, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def committed() -> dict[str, Any]:
    """The results of the last commit, by name, whatever has been written over them.

    Raises:
        InputError: this is no checkout.
    """
    folder = f"{RESULTS.relative_to(HERE.parent).as_posix()}/"
    try:
        paths = _git("ls-tree", "--name-only", "HEAD", folder).splitlines()
        return {Path(path).stem: json.loads(_git("show", f"HEAD:{path}")) for path in paths if path.endswith(".json")}
    except (OSError, subprocess.CalledProcessError) as error:
        fix = "name a folder of results with `baseline`"
        raise InputError(str(HERE), "is not in a checkout that has a commit", got=str(error), fix=fix) from error


def _git(*words: str) -> str:
    return subprocess.check_output(["git", "-C", str(HERE.parent), *words], text=True, stderr=subprocess.PIPE)


# -------------------------------------------------------------------------------------------------------- comparing


def compare(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Compared:
    """What one result has become; not compared where it was not made anew, or on another kind of machine."""
    if before == now:
        return Compared(name=name, reason="not made anew")
    other = [key for key in KIND if before["environment"].get(key) != now["environment"].get(key)]
    if other:
        told = "; ".join(f"{key} {now['environment'].get(key)} for {before['environment'].get(key)}" for key in other)
        return Compared(name=name, reason=f"another kind of machine: {told}")
    old, new = dict(measures(name, before)), dict(measures(name, now))
    both = [key for key in old if key in new]
    return Compared(
        name=name,
        measures=len(both),
        worse=tuple((key, old[key], new[key]) for key in both if new[key].is_worse_than(old[key])),
        better=tuple((key, old[key], new[key]) for key in both if old[key].is_worse_than(new[key])),
        gone=tuple(key for key in old if key not in new),
    )


def measures(name: str, result: Any) -> Iterator[tuple[str, Measure]]:
    """Every ratio with an interval below ``result``, and every top-1, by what leads to it."""
    yield from _below(result, "", name in HIGHER)


def _below(found: Any, where: str, higher: bool) -> Iterator[tuple[str, Measure]]:
    if isinstance(found, list):
        for each in found:
            if isinstance(each, dict):
                yield from _below(each, " ".join(filter(None, (where, _named(each)))), higher)
    elif isinstance(found, dict):
        if {"median", "low", "high"} <= found.keys():
            yield where, Measure(what="ratio", value=found["median"], low=found["low"], high=found["high"],
                                 higher_is_better=higher)  # fmt: skip
        if {"test_top1", "test_n"} <= found.keys():
            low, high = interval(round(found["test_top1"] * found["test_n"]), found["test_n"])
            yield f"{where} top-1", Measure(what="top-1", value=found["test_top1"], low=low, high=high,
                                            higher_is_better=True)  # fmt: skip
        for key, value in found.items():
            yield from _below(value, " ".join(filter(None, (where, key))), higher)


def _named(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[key]) for key in NAMED if key in row and not isinstance(row[key], dict))


def table(found: list[Compared]) -> str:
    """What is worse and what is better, measure by measure; then a line for each result."""
    rows = [
        (each.name, verdict, key, old.told(), new.told())
        for verdict in ("worse", "better")
        for each in found
        for key, old, new in getattr(each, verdict)
    ]
    columns = tuple(map(Column, ("result", "", "measure", "before", "now")))
    changed = markdown(Table("Beyond noise", columns, rows)) if rows else "Nothing has changed beyond noise.\n"
    lines = [f"- {each.name}: {_summed(each)}" for each in found]
    return "\n".join([changed, *lines])


def _summed(each: Compared) -> str:
    if each.reason is not None:
        return f"not compared, {each.reason}"
    gone = f"; gone: {format_names(each.gone)}" if each.gone else ""
    return f"{each.measures} measures, {len(each.worse)} worse, {len(each.better)} better{gone}"


if __name__ == "__main__":
    main()
