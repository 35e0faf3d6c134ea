"""What a page is made of: sections of sentences, tables, and charts with the table that they were drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from edgepet.reports.tables import Table

FAILED, REFUSED, MISSING = "failed", "refused", "not measured"  # cells that begin so are marked
RUNTIMES = ("onnxruntime", "openvino", "torch", "tensorrt-rtx")  # groups that several charts have


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A marker at ``x``, ``y``; ``told`` is what hovering says, ``front`` whether no other point is better."""

    x: float
    y: float
    label: str
    told: str
    group: str
    front: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Points with the front of those that no other beats in both; ``x`` is logarithmic.

    A group's colour and marker is that of its place in ``groups``, whether points of all are there or not.
    """

    x: str
    y: str
    points: tuple[Point, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """``ys`` over the chart's ``xs``; ``told`` is what hovering over a marker says, one for each."""

    name: str
    ys: tuple[float, ...]
    told: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Lines over common ``xs``, both axes logarithmic. Right of ``measured`` they are dashed: counted, not measured."""

    x: str
    y: str
    xs: tuple[float, ...]
    lines: tuple[Line, ...]
    measured: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """One row: ``value`` with its interval, and the single observations where there are any."""

    label: str
    group: str
    value: float
    low: float
    high: float
    dots: tuple[float, ...] = ()
    told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Intervals below one another, ``groups`` as a scatter's; ``reference`` is a vertical line to compare them with."""

    x: str
    rows: tuple[Range, ...]
    groups: tuple[str, ...]
    reference: float | None = None


Chart: TypeAlias = Scatter | Lines | Ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart, the sentence that it shows, and its numbers."""

    title: str
    told: str
    chart: Chart
    table: Table


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph. ``mark`` is FAILED or MISSING where it tells of one."""

    text: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Items:
    """A list of sentences, each marked by what it begins with."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Folded:
    """A long table that is opened by whom it concerns."""

    table: Table


Part: TypeAlias = Text | Items | Table | Folded | Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A check that said no, or what refused, in one result; ``why`` begins with which of both."""

    result: str
    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is below it. ``lacks`` are the results that it would need, ``failures`` what it found."""

    key: str
    title: str
    parts: tuple[Part, ...]
    lacks: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()
    checks: int = 0


def missing(what: str, how: str) -> Text:
    """What a section says where a result is not there: ``what`` was not measured, and ``how`` it would be."""
    return Text(f"{what}: {MISSING}. {how}", MISSING)


def fronts(pairs: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """Of each (cost, gain) whether no other costs at most as much, gains at least as much, and is not equal."""
    return tuple(not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in pairs) for cost, gain in pairs)
