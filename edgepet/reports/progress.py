"""Progress of one command, on stderr only: drawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import TypeAlias

from rich import progress
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.text import Text

from edgepet.reports.screen import terminal
from edgepet.reports.tables import format_percent, format_seconds, printable

LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where a fit is: ``images`` of ``total_images``, which are those of all epochs.

    ``step`` counts them over all epochs, from 1. ``loss`` is the last step's, ``lr`` its learning rate of the method's
    tensors; ``val_top1``, a fraction of 1 and of masks their mIoU, and ``val_loss`` are there when an epoch has ended.
    """

    epoch: int
    epochs: int
    images: int
    total_images: int
    loss: float
    images_per_second: float
    val_top1: float | None = None
    step: int = 0
    lr: float | None = None
    val_loss: float | None = None


Say: TypeAlias = Callable[[Step], None]


class Progress:
    """Stages and bars of one command, on stderr: drawn on a terminal, plain lines elsewhere, nothing when quiet.

    ``verbose`` also says what stands below a line that is told.

    No thread redraws: it would wake up inside the inferences that ``bench`` times.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, console: Console | None = None) -> None:
        self._verbose = verbose
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
        label, started = printable(label), monotonic()
        with self._task(f"{label} …", None):
            yield
        self._say(f"{label}  {format_seconds(monotonic() - started)}")

    def tell(self, line: str, details: Sequence[str]) -> None:
        """A line of its own, and ``details`` below it where this is verbose. Names in them come from outside."""
        for told in (line, *(details if self._verbose else ())):
            self._say(printable(told))

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """Yield a bar of ``total`` steps. Plain lines come at each quarter and after 10 s without one."""
        label = printable(label)
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
        before, self._done, self._note = self._done, min(done, self._total), printable(note)
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
