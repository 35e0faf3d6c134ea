"""Any report -> terminal, JSON, Markdown; and progress, on stderr only.

Formatting is pure: ``format_*`` and ``markdown`` return text. Units are decimal (1 kB is 1000 bytes).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import PurePath
from time import monotonic
from types import TracebackType
from typing import Literal

import numpy as np
from rich import box, progress, table
from rich.console import Console
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.text import Text

NONE = "–"  # where a report has no number
DROPPED = "times_ms"  # every single observation: for statistics, not for JSON
PLAIN_WIDTH = 120
LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.1


def to_json(report: object) -> object:
    """``report`` as dicts, lists, texts, numbers, bools and None; a number that JSON lacks (inf, NaN) is None.

    Raises:
        TypeError: something in it has no plain form.
    """
    if isinstance(report, np.generic):
        return to_json(report.item())
    if isinstance(report, float):
        return report if math.isfinite(report) else None
    if report is None or isinstance(report, (str, int)):
        return report
    if isinstance(report, PurePath):
        return str(report)
    if is_dataclass(report) and not isinstance(report, type):
        names = (field.name for field in fields(report) if field.name != DROPPED)
        return {name: to_json(getattr(report, name)) for name in names}
    if isinstance(report, Mapping):
        return {str(key): to_json(value) for key, value in report.items()}
    if isinstance(report, (list, tuple)):
        return [to_json(value) for value in report]
    message = f"{type(report).__name__} has no JSON form"
    raise TypeError(message)


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; ``right`` for numbers."""

    heading: str
    right: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as texts, one for each column in every row; an empty title is not shown."""

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                message = f"{self.title}: {len(row)} cells for {len(self.columns)} columns: {row}"
                raise ValueError(message)


def print_table(console: Console, shown: Table) -> None:
    """Draw ``shown``: folded to a terminal's width, as wide as it needs to be anywhere else."""
    title = Text(_printable(shown.title), "bold") if shown.title else None
    grid = table.Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in shown.columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        grid.add_column(Text(_printable(column.heading)), justify=justify, overflow="fold", no_wrap=column.right)
    for row in shown.rows:
        grid.add_row(*(Text(_printable(cell)) for cell in row))  # Text: a cell's [brackets] are not rich's markup
    if not console.is_terminal:  # a pipe or a log has no width
        grid.width = Measurement.get(console, console.options.update(width=10**6), grid).maximum
    console.print(grid, crop=False)


def markdown(shown: Table) -> str:
    """A GitHub table under its title in bold, with a newline at the end."""
    lines = [f"**{_printable(shown.title)}**", ""] if shown.title else []
    lines.append(_markdown_row([column.heading for column in shown.columns]))
    lines.append(_markdown_row(["---:" if column.right else "---" for column in shown.columns]))
    lines.extend(_markdown_row(row) for row in shown.rows)
    return "\n".join(lines) + "\n"


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
    """0.935 is 93.5 %."""
    return NONE if fraction is None else f"{fraction:.1%}".replace("%", " %")


def format_ratio(x: float | None) -> str:
    """Three digits: 0.981×, 35.2×."""
    return NONE if x is None else f"{_three_digits(x)}×"


def format_number(x: float | None) -> str:
    """Integers grouped, 1,234,567; others with three digits."""
    if x is None:
        return NONE
    return f"{x:,}" if isinstance(x, int) else _three_digits(x)


def terminal(*, stderr: bool) -> Console:
    """A console on stdout or stderr; plain, never wrapped lines in CI or where it is not a terminal.

    rich itself leaves colours out when ``NO_COLOR`` is set.
    """
    stream = sys.stderr if stderr else sys.stdout
    if os.environ.get("CI", "").lower() in ("", "0", "false") and stream.isatty():
        return Console(stderr=stderr, highlight=False)
    return Console(stderr=stderr, highlight=False, force_terminal=False, width=PLAIN_WIDTH, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where a fit is, in images; ``val_top1`` is there when an epoch has ended."""

    epoch: int
    epochs: int
    images: int
    total_images: int
    loss: float
    images_per_second: float
    val_top1: float | None = None


def program() -> str:
    """What to paste in front of a verb: ``edgepet`` where a shell finds it, else the path that it was started by."""
    if shutil.which("edgepet"):
        return "edgepet"
    return "python -m edgepet" if PurePath(sys.argv[0]).parts[-2:] == ("edgepet", "__main__.py") else sys.argv[0]


class Progress:
    """Stages and bars of one command, on stderr: drawn on a terminal, plain lines elsewhere, nothing when quiet.

    No thread redraws: it would wake up inside the inferences that ``bench`` times.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = (
            Console(stderr=True, quiet=True, force_terminal=False) if quiet else console or terminal(stderr=True)
        )
        self._drawn = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            _Filled(),
            progress.TaskProgressColumn("{task.percentage:>3.0f} %", markup=False),
            progress.TextColumn("{task.fields[note]}", markup=False),
            progress.TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # or what a verb prints to stdout would come out on stderr
            get_time=monotonic,
        )

    def __enter__(self) -> Progress:
        if self.is_drawn:
            self._drawn.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_drawn:
            self._drawn.stop()

    @property
    def is_drawn(self) -> bool:
        """Whether bars are redrawn in place; plain lines otherwise."""
        return self._console.is_interactive

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """One line when the block is done, with its seconds; none when it fails: the error speaks for itself."""
        label, started = _printable(label), monotonic()
        with self._task(f"{label} …", None):
            yield
        self._say(f"{label}  {format_seconds(monotonic() - started)}")

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """Yield a bar of ``total`` steps. Plain lines come at each quarter and after 10 s without one."""
        label = _printable(label)
        with self._task(label, max(total, 1)) as task:
            bar = Bar(self, task, label, max(total, 1))
            yield bar
        bar.end()

    @contextmanager
    def training(self, label: str) -> Iterator[Callable[[Step], None]]:
        """Yield what a fit tells its steps to: a bar of images with loss and speed."""
        with ExitStack() as stack:
            bars: list[Bar] = []
            val = ""

            def say(step: Step) -> None:
                nonlocal val
                if not bars:
                    bars.append(stack.enter_context(self.bar(label, step.total_images)))
                if step.val_top1 is not None:
                    val = f"  val {format_percent(step.val_top1)}"
                where, speed = f"epoch {step.epoch}/{step.epochs}", f"{step.images_per_second:.0f} images/s"
                note = f"{where}  loss {step.loss:.2f}{val}  {speed}"
                bars[0].update(step.images, note)

            yield say

    @contextmanager
    def stages(self) -> Iterator[Callable[[str], None]]:
        """Yield a function that ends the stage before and begins the one it names."""
        with ExitStack() as stack:

            def begin(label: str) -> None:
                stack.close()
                stack.enter_context(self.stage(label))

            yield begin

    @contextmanager
    def _task(self, label: str, total: int | None) -> Iterator[progress.TaskID]:
        task = self._drawn.add_task(label, total=total, note="")
        try:
            yield task
        finally:
            self._drawn.remove_task(task)
            self._drawn.refresh()

    def _draw(self, task: progress.TaskID, done: int, note: str) -> None:
        self._drawn.update(task, completed=done, note=note, refresh=True)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Bar:
    """How far something is; made by ``Progress.bar``."""

    def __init__(self, owner: Progress, task: progress.TaskID, label: str, total: int) -> None:
        self._owner, self._task, self._label, self._total = owner, task, label, total
        self._started = self._shown_at = monotonic()
        self._done, self._shown, self._note = 0, -1, ""

    def update(self, done: int, note: str = "") -> None:
        """``done`` steps of the total are behind us; ``note`` is a few words such as ``loss 0.41``."""
        before, self._done, self._note = self._done, min(done, self._total), _printable(note)
        since = monotonic() - self._shown_at
        if self._owner.is_drawn:
            if since >= DRAW_EVERY_S:
                self._shown_at += since
                self._owner._draw(self._task, self._done, self._note)
        elif 4 * self._done // self._total > 4 * before // self._total or since >= LINE_EVERY_S:
            self._say()

    def end(self) -> None:
        """Leave one line of how far it came."""
        if self._shown != self._done:
            self._say()

    def _say(self) -> None:
        now = monotonic()
        self._shown, self._shown_at, elapsed = self._done, now, now - self._started
        time = format_seconds(elapsed)
        if 0 < self._done < self._total:
            time += f", {format_seconds(elapsed * (self._total - self._done) / self._done)} left"
        parts = (self._label, f"{100 * self._done // self._total} %", self._note, time)
        self._owner._say("  ".join(part for part in parts if part))


class _Filled(progress.ProgressColumn):
    """The bar of a task whose end is known; rich's own would fill a stage's line with a frozen pulse."""

    def render(self, task: progress.Task) -> ProgressBar | Text:
        if task.total is None:
            return Text()
        return ProgressBar(total=task.total, completed=task.completed, width=24)


def _three_digits(x: float) -> str:
    for decimals in (3, 2, 1):
        text = f"{x:.{decimals}f}"
        if abs(float(text)) < 10 ** (3 - decimals):
            return text
    return f"{x:.0f}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_printable(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _printable(text: str) -> str:
    """``text`` on one line and without control characters: names in packs come from outside."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
