"""A screen: what of a report a person sees, as blocks that print now and could become HTML."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, TypeAlias

from rich import box, table
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

from edgepet.reports.streams import forget
from edgepet.reports.tables import Table, printable

PLAIN_WIDTH = 120  # columns, where there is no terminal
FOLDED = 8  # columns that a column of texts keeps on the narrowest terminal


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of text, as they are; an empty one is an empty line."""

    texts: tuple[str, ...]


Block: TypeAlias = Lines | Table
Screen: TypeAlias = Iterable[Block]


def lines(*texts: str | None) -> Lines:
    """A block of ``texts``; None is left out."""
    return Lines(tuple(text for text in texts if text is not None))


def show(console: Console, screen: Screen) -> None:
    """Print every block, one below the other. Names in packs come from outside: control characters are replaced."""
    for block in screen:
        if isinstance(block, Table):
            print_table(console, block)
            continue
        for text in block.texts:
            console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_table(console: Console, shown: Table) -> None:
    """Draw ``shown``: folded to a terminal's width, as wide as it needs to be anywhere else."""
    title = Text(printable(shown.title), "bold") if shown.title else None
    grid = table.Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in shown.columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        grid.add_column(Text(printable(column.heading)), justify=justify, overflow="fold", no_wrap=column.right)
    for row in shown.rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))  # Text: a cell's [brackets] are not rich's markup
    if not console.is_terminal:  # a pipe or a log has no width
        grid.width = Measurement.get(console, console.options.update(width=10**6), grid).maximum
    elif console.width < (least := _least_width(shown)):
        grid.width = least  # rich would leave out what has no room; the terminal wraps it
    console.print(grid, crop=False)


def _least_width(shown: Table) -> int:
    """Columns of a terminal into which ``shown`` goes whole: numbers are never folded, texts down to a few letters."""
    widths = [max(map(cell_len, cells)) for cells in zip([c.heading for c in shown.columns], *shown.rows, strict=True)]
    folded = (
        width if column.right else min(width, FOLDED) for width, column in zip(widths, shown.columns, strict=True)
    )
    return sum(folded) + 3 * len(widths) + 1


class _Terminal(Console):
    """A console whose reader may leave: rich would end the process with 1. Progress on a full disk is lost as well."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """As rich does; of stderr, what cannot be written is said to nobody."""
        try:
            super().print(*objects, **settings)
        except OSError:
            if not self.stderr:
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Progress is said to nobody, and the work goes on; of a report the caller hears."""
        if not self.stderr:
            raise
        self.quiet = True
        forget(sys.stderr)


def terminal(*, stderr: bool) -> Console:
    """A console on stdout or stderr; plain, never wrapped lines in CI or where it is not a terminal.

    rich itself leaves colours out when ``NO_COLOR`` is set.
    """
    stream = sys.stderr if stderr else sys.stdout
    if os.environ.get("CI", "").lower() in ("", "0", "false") and stream.isatty():
        columns = os.environ.get("COLUMNS", "")
        none = columns.isdigit() and int(columns) == 0  # rich prints nothing into no column
        return _Terminal(stderr=stderr, highlight=False, width=PLAIN_WIDTH if none else None)
    return _Terminal(stderr=stderr, highlight=False, force_terminal=False, width=PLAIN_WIDTH, soft_wrap=True)


def program() -> str:
    """What to paste in front of a verb: ``edgepet`` where a shell finds it, else the path that it was started by."""
    if shutil.which("edgepet"):
        return "edgepet"
    return "python -m edgepet" if PurePath(sys.argv[0]).parts[-2:] == ("edgepet", "__main__.py") else sys.argv[0]
