"""Charts, drawn by matplotlib: the same bytes each time, and text that stays text."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from edgepet.errors import require
from edgepet.reports.page.parts import Chart, Figure, Lines, Point, Range, Ranges, Scatter
from edgepet.reports.page.svg import COLOURS, inline
from edgepet.reports.tables import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MARKERS = ("o", "^", "s", "D", "v", "P")  # beside colours: who sees none tells groups by these
WIDTH, HEIGHT, ROW = 360, 290, 33  # points; a page shows them 320 to 500 pixels wide
LETTER = 0.56  # of a font's size: the mean width of a letter, to find out which labels would meet
FONT, SMALL = 12, 11
BELOW, ABOVE, LEGEND = 44, 26, 16  # points for the axis, for one line of the legend, and for each further one
_PLAIN = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": FONT,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": FONT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.8,
}


def drawn(figure: Figure, key: str) -> str:
    """The chart as an ``<svg>`` element; ``key`` is what names in it begin with.

    Raises:
        MissingError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="report", purpose="a chart")
    from matplotlib.figure import Figure as Canvas

    hover = dict[str, str]()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that its fonts lack: text stays text
        matplotlib.rcdefaults()  # whatever its user has set
        matplotlib.rcParams.update({**_PLAIN, "svg.hashsalt": key})
        canvas = Canvas(figsize=(WIDTH / 72, _height(figure.chart) / 72), dpi=72, facecolor="none")
        axes = canvas.add_axes(_place(figure.chart), facecolor="none")
        _DRAW[type(figure.chart)](axes, figure.chart, hover)
        file = io.BytesIO()
        canvas.savefig(file, format="svg", metadata={"Date": None})
    return inline(file.getvalue(), key, figure.title, figure.told, hover)


def _height(chart: Chart) -> float:
    return BELOW + ABOVE + ROW * len(chart.rows) if isinstance(chart, Ranges) else HEIGHT


def _place(chart: Chart) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the axes, as parts of the canvas."""
    height = _height(chart)
    left = 8 if isinstance(chart, Ranges) else 50
    above = ABOVE + LEGEND * ((len(chart.lines) - 1) // 2) if isinstance(chart, Lines) else ABOVE
    return left / WIDTH, BELOW / height, (WIDTH - left - 10) / WIDTH, (height - BELOW - above) / height


def _groups(names: Sequence[str], used: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name that is used, of its place among all; strangers are last."""
    present = list(dict.fromkeys(used))
    found = [*names, *(name for name in present if name not in names)]
    style = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(found)}
    return {name: style[name] for name in found if name in present}


def _legend(axes: Any, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, handletextpad=0.3,
                columnspacing=0.9, borderaxespad=0.1)  # fmt: skip


def _grid(axes: Any, axis: str = "both") -> None:
    axes.grid(visible=True, axis=axis, color="#000000", alpha=0.15, linewidth=0.6, clip_on=False)
    axes.set_axisbelow(True)


def _marked(axes: Any, hover: dict[str, str], told: str, x: float, y: float, **style: Any) -> None:
    gid = f"hover{len(hover)}"
    hover[gid] = told
    axes.plot([x], [y], gid=gid, clip_on=False, **style)


# ------------------------------------------------------------------------------------------------------------ scatter


def _scatter(axes: Any, chart: Scatter, hover: dict[str, str]) -> None:
    groups = _groups(chart.groups, (point.group for point in chart.points))
    front = sorted((point for point in chart.points if point.front), key=lambda point: point.x)
    axes.set_xscale("log")
    axes.plot([p.x for p in front], [p.y for p in front], color="#000000", alpha=0.5, linewidth=1,
              linestyle=(0, (4, 2)), label="front")  # fmt: skip
    for name, (colour, marker) in groups.items():
        axes.plot([], [], color=colour, marker=marker, linestyle="none", label=printable(name), markersize=6)
    for point in chart.points:
        colour, marker = groups[point.group]
        edge = {"markeredgecolor": "#000000", "markeredgewidth": 1.2} if point.front else {"markeredgewidth": 0}
        _marked(axes, hover, point.told, point.x, point.y, color=colour, marker=marker,
                markersize=8 if point.front else 6, **edge)  # fmt: skip
    _limits(axes, chart.points)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    _numbered(axes.xaxis, axes.get_xlim())
    _grid(axes)
    _labelled(axes, front, chart.points)
    _legend(axes, 1 + len(groups))


def _limits(axes: Any, points: Sequence[Point]) -> None:
    """Room for markers and labels."""
    xs, ys = [point.x for point in points], [point.y for point in points]
    widen = max((max(xs) / min(xs)) ** 0.12, 1.15)
    space = max(0.12 * (max(ys) - min(ys)), 0.5)
    axes.set_xlim(min(xs) / widen, max(xs) * widen)
    axes.set_ylim(min(ys) - space, max(ys) + space)


def _numbered(axis: Any, limits: tuple[float, float]) -> None:
    """Ticks at parts of each power of ten, or at powers alone where those would meet; plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    times = limits[1] / limits[0]
    subs = (1.0,) if times > 200 else (1.0, 2.0, 5.0) if times > 12 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


def _labelled(axes: Any, front: Sequence[Point], points: Sequence[Point]) -> None:
    """The names of the front, each where it covers nothing; one that finds no place is told by hovering and below."""
    box = axes.get_window_extent()
    near = {point: _around(axes.transData.transform((point.x, point.y)), 8) for point in points}
    placed = list[tuple[float, float, float, float]]()
    for point in front:
        taken = [*placed, *(place for other, place in near.items() if other != point)]
        x, y = axes.transData.transform((point.x, point.y))
        width, height = LETTER * SMALL * len(point.label), SMALL
        for right, up in ((-1, 1), (1, -1), (1, 1), (-1, -1), (0, 1), (0, -1)):
            left = x + 6 if right > 0 else x - 6 - width if right < 0 else x - width / 2
            bottom = y + 4 if up > 0 else y - 4 - height
            place = (left, bottom, left + width, bottom + height)
            inside = left > box.x0 and place[2] < box.x1 and bottom > box.y0 and place[3] < box.y1
            if inside and not any(_meet(place, other) for other in taken):
                placed.append(place)
                data = axes.transData.inverted().transform((left, bottom + 2))
                axes.text(*data, printable(point.label), fontsize=SMALL)
                break


def _around(centre: Sequence[float], reach: float) -> tuple[float, float, float, float]:
    return centre[0] - reach, centre[1] - reach, centre[0] + reach, centre[1] + reach


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# -------------------------------------------------------------------------------------------------- lines and ranges


def _lines(axes: Any, chart: Lines, hover: dict[str, str]) -> None:
    groups = _groups((), (line.name for line in chart.lines))
    split = sum(x <= chart.measured for x in chart.xs)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for line in chart.lines:
        colour, marker = groups[line.name]
        axes.plot(chart.xs[:split], line.ys[:split], color=colour, linewidth=1.8)
        axes.plot(chart.xs[max(split - 1, 0):], line.ys[max(split - 1, 0):], color=colour, linewidth=1.4,
                  linestyle=(0, (4, 2)))  # fmt: skip
        axes.plot([], [], color=colour, marker=marker, label=printable(line.name), markersize=6)
        for x, y, told in zip(chart.xs, line.ys, line.told, strict=True):
            _marked(axes, hover, told, x, y, color=colour, marker=marker, markersize=5)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(chart.xs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _numbered(axes.yaxis, axes.get_ylim())
    _grid(axes)
    _legend(axes, 2)


def _ranges(axes: Any, chart: Ranges, hover: dict[str, str]) -> None:
    groups = _groups(chart.groups, (row.group for row in chart.rows))
    for number, row in enumerate(chart.rows):
        _row(axes, row, -number, groups[row.group], hover)
    if chart.reference is not None:
        axes.axvline(chart.reference, color="#000000", alpha=0.5, linewidth=1, linestyle=(0, (4, 2)))
    ends = [end for row in chart.rows for end in (row.low, row.high, *row.dots)]
    ends += [] if chart.reference is None else [chart.reference]
    space = 0.05 * (max(ends) - min(ends)) or 0.05 * max(ends)
    axes.set_xlim(max(0.0, min(ends) - space), max(ends) + space)
    axes.set_ylim(-len(chart.rows) + 0.45, 0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(chart.x)
    _grid(axes, "x")
    if len(groups) > 1:
        for name, (colour, marker) in groups.items():
            axes.plot([], [], color=colour, marker=marker, label=printable(name), markersize=6)
        _legend(axes, len(groups))


def _row(axes: Any, row: Range, y: int, style: tuple[str, str], hover: dict[str, str]) -> None:
    colour, marker = style
    axes.plot([row.low, row.high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
    if row.dots:
        axes.plot(row.dots, [y] * len(row.dots), color=colour, marker=".", linestyle="none", markersize=5, alpha=0.6)
    _marked(axes, hover, row.told, row.value, y, color=colour, marker=marker, markersize=7)
    axes.text(0, y + 0.28, printable(row.label), fontsize=SMALL, transform=axes.get_yaxis_transform())


_DRAW: dict[type, Any] = {Scatter: _scatter, Lines: _lines, Ranges: _ranges}
