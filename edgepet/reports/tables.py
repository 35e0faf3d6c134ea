"""Tables of texts, as Markdown too, and how numbers become texts. Units are decimal: 1 kB is 1000 bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NONE = "–"  # where a report has no number


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; ``right`` for numbers."""

    heading: str
    right: bool = False


def left(*headings: str) -> tuple[Column, ...]:
    """Columns of texts."""
    return tuple(Column(heading) for heading in headings)


def right(*headings: str) -> tuple[Column, ...]:
    """Columns of numbers."""
    return tuple(Column(heading, right=True) for heading in headings)


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as texts, one for each column in every row; an empty title is not shown.

    Raises:
        ValueError: a row has more or fewer cells.
    """

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                message = f"{self.title}: {len(row)} cells for {len(self.columns)} columns: {row}"
                raise ValueError(message)


def markdown(shown: Table) -> str:
    """A GitHub table under its title in bold, with a newline at the end."""
    lines = [f"**{printable(shown.title)}**", ""] if shown.title else []
    lines.append(_markdown_row([column.heading for column in shown.columns]))
    lines.append(_markdown_row(["---:" if column.right else "---" for column in shown.columns]))
    lines.extend(_markdown_row(row) for row in shown.rows)
    return "\n".join(lines) + "\n"


def format_names(names: Iterable[str]) -> str:
    """One after the other, with commas between; a name that has one itself is quoted."""
    return ", ".join(repr(name) if "," in name else name for name in names)


def format_bytes(n: int) -> str:
    """Decimal: 812 B, 215.9 kB, 86.4 MB, 1.2 GB."""
    if abs(n) < 1000:
        return f"{n} B"
    for unit, size in (("kB", 1e3), ("MB", 1e6)):
        text = f"{n / size:.1f}"
        if abs(float(text)) < 1000:
            return f"{text} {unit}"
    return f"{n / 1e9:.1f} GB"


def format_ms(x: float | None) -> str:
    """Three digits: 0.042 ms, 8.31 ms, 214 ms; a dash for a percentile that was left out."""
    return NONE if x is None else f"{_three_digits(x)} ms"


def format_seconds(x: float) -> str:
    """8.1 s; from two minutes on, 12 min 5 s."""
    return f"{x:.1f} s" if x < 120 else f"{round(x) // 60} min {round(x) % 60} s"


def format_percent(fraction: float | None) -> str:
    """0.935 is 93.5 %; None is a dash."""
    return NONE if fraction is None else f"{fraction:.1%}".replace("%", " %")


def format_ratio(x: float | None) -> str:
    """Three digits: 0.981×, 35.2×; None is a dash."""
    return NONE if x is None else f"{_three_digits(x)}×"


def format_number(x: float | None) -> str:
    """Integers grouped, 1,234,567; others with three digits; None is a dash."""
    if x is None:
        return NONE
    return f"{x:,}" if isinstance(x, int) else _three_digits(x)


def _three_digits(x: float) -> str:
    for decimals in (3, 2, 1):
        text = f"{x:.{decimals}f}"
        if abs(float(text)) < 10 ** (3 - decimals):
            return text
    return f"{x:.0f}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(printable(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def printable(text: str) -> str:
    """``text`` on one line and without control characters: names in packs come from outside."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
