"""Whole texts of tables, numbers and progress, with fixed numbers and a clock that the tests move."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from rich.console import Console

from edgepet.reports import progress
from edgepet.reports.as_json import to_json
from edgepet.reports.progress import Progress, Step
from edgepet.reports.screen import print_table, program, terminal
from edgepet.reports.tables import (
    Column,
    Table,
    format_bytes,
    format_ms,
    format_names,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    markdown,
)

SIZES = Table(
    "What a task takes",
    (Column("task"), Column("method"), Column("size", right=True)),
    [("flowers", "lora", format_bytes(215_900)), ("pets|birds", "ssf[all]", format_bytes(812))],
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def log() -> Console:
    return Console(file=io.StringIO(), width=120, soft_wrap=True)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_table_is_drawn_with_numbers_to_the_right() -> None:
    console = log()

    print_table(console, SIZES)

    assert lines_of(written(console)) == [
        "What a task takes",
        "",
        "  task         method         size",
        " ──────────────────────────────────",
        "  flowers      lora       215.9 kB",
        "  pets|birds   ssf[all]      812 B",
        "",
    ]


def test_a_table_in_a_log_is_as_wide_as_its_cells() -> None:
    console, path = log(), "/data/" + 200 * "x"

    print_table(console, Table("", (Column("path"), Column("n", right=True)), [(path, "1")]))

    assert f"  {path}   1" in lines_of(written(console))


def test_a_table_on_a_narrow_terminal_folds_its_texts_and_loses_none() -> None:
    console = Console(file=io.StringIO(), width=30, force_terminal=True, color_system=None)

    print_table(console, Table("", (Column("path"), Column("size", right=True)), [("0123456789" * 3, "215.9 kB")]))

    assert lines_of(re.sub(r"\x1b\[\d*m", "", written(console))) == [
        "",
        "  path                  size",
        " ────────────────────────────",
        "  012345678901234   215.9 kB",
        "  567890123456789",
        "",
    ]


@pytest.mark.parametrize("columns", ["20", "1", "0"])
def test_the_narrowest_terminal_gets_every_cell_of_a_table(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    stream = Tty()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")

    print_table(terminal(stderr=False), SIZES)

    plain = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    cells = re.sub(r"\s+", "", plain)
    if columns == "0":  # no width is no width of a terminal: nothing is folded
        assert "pets|birds" in plain
    else:
        rows = lines_of(plain)
        assert rows[4:7] == ["  flowers    lora       215.9 kB", "  pets|bir   ssf[all]      812 B", "  ds"]
    assert "flowerslora215.9kB" in cells


def test_markdown_is_a_github_table_under_its_title() -> None:
    assert markdown(SIZES) == (
        "**What a task takes**\n"
        "\n"
        "| task | method | size |\n"
        "| --- | --- | ---: |\n"
        "| flowers | lora | 215.9 kB |\n"
        "| pets\\|birds | ssf[all] | 812 B |\n"
    )


def test_control_characters_in_names_from_outside_reach_no_terminal() -> None:
    console, table = log(), Table("", (Column("class"),), [("\x1b[2Jrose\nred",)])

    print_table(console, table)

    assert lines_of(written(console))[2:4] == [" ──────────────", "  �[2Jrose red"]
    assert markdown(table) == "| class |\n| --- |\n| �[2Jrose red |\n"


def test_a_row_with_a_cell_too_few_is_a_bug() -> None:
    with pytest.raises(ValueError, match=r"^sizes: 1 cells for 2 columns: \('flowers',\)$"):
        Table("sizes", (Column("task"), Column("size")), [("flowers",)])


@dataclass(frozen=True)
class Inner:
    times_ms: tuple[float, ...]
    p50_ms: float


@dataclass(frozen=True)
class Outer:
    path: Path
    inner: tuple[Inner, ...]
    versions: dict[str, str]
    top1: np.float32
    n: np.int64
    ok: np.bool_
    p99_ms: float | None
    limit: float


def test_json_keeps_fields_and_drops_single_observations() -> None:
    value = Outer(
        path=Path("a/b.pet"),
        inner=(Inner(times_ms=(1.0, 2.0), p50_ms=1.5),),
        versions={"numpy": "2.4"},
        top1=np.float32(0.5),
        n=np.int64(7),
        ok=np.bool_(True),
        p99_ms=None,
        limit=float("inf"),
    )

    plain = to_json(value)

    assert json.dumps(plain, allow_nan=False) == (
        '{"path": "a/b.pet", "inner": [{"p50_ms": 1.5}], "versions": {"numpy": "2.4"}, '
        '"top1": 0.5, "n": 7, "ok": true, "p99_ms": null, "limit": null}'
    )


@dataclass(frozen=True)
class Row:
    inner: Inner

    shown: ClassVar[tuple[str, ...]] = ("p50_ms", "name")

    @property
    def p50_ms(self) -> float:
        return self.inner.p50_ms

    @property
    def name(self) -> str:
        return "row"


def test_json_has_the_names_that_a_class_shows_in_place_of_its_fields() -> None:
    assert to_json([Row(inner=Inner(times_ms=(1.0,), p50_ms=1.5))]) == [{"p50_ms": 1.5, "name": "row"}]


def test_what_has_no_json_form_is_a_bug() -> None:
    with pytest.raises(TypeError, match=r"^bytes has no JSON form$"):
        to_json({"a": [b"x"]})


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (215_900, "215.9 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),  # never 1000.0 kB
        (86_400_000, "86.4 MB"),
        (1_200_000_000, "1.2 GB"),
        (-215_900, "-215.9 kB"),
    ],
)
def test_bytes_are_decimal(n: int, text: str) -> None:
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (None, "–"),
        (0.0421, "0.042 ms"),
        (0.9996, "1.00 ms"),
        (8.314, "8.31 ms"),
        (9.999, "10.0 ms"),
        (12.34, "12.3 ms"),
        (214.4, "214 ms"),
        (12345.6, "12346 ms"),
    ],
)
def test_milliseconds_have_three_digits(x: float | None, text: str) -> None:
    assert format_ms(x) == text


def test_other_numbers_carry_their_units() -> None:
    assert [format_percent(x) for x in (0.935, 1.0, None)] == ["93.5 %", "100.0 %", "–"]
    assert format_names(("oak", "elm, red", "ash")) == "oak, 'elm, red', ash"
    assert [format_ratio(x) for x in (0.981, 35.21, None)] == ["0.981×", "35.2×", "–"]
    assert [format_number(x) for x in (1_234_567, 31.24, None)] == ["1,234,567", "31.2", "–"]
    assert [format_seconds(x) for x in (8.14, 119.9, 120.0, 725.4)] == ["8.1 s", "119.9 s", "2 min 0 s", "12 min 5 s"]


@pytest.mark.parametrize("ci", ["true", "1"])
def test_in_ci_a_terminal_is_treated_as_a_log(monkeypatch: pytest.MonkeyPatch, ci: str) -> None:
    monkeypatch.setattr("sys.stdout", Tty())
    monkeypatch.setenv("CI", ci)

    console = terminal(stderr=False)

    assert (console.is_terminal, console.width, console.soft_wrap) == (False, 120, True)


def test_what_is_no_terminal_gets_plain_lines_that_are_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    terminal(stderr=True).print("x" * 300, style="red")

    assert capsys.readouterr() == ("", "x" * 300 + "\n")


@pytest.mark.parametrize(("variables", "colours"), [({}, "256"), ({"NO_COLOR": "1"}, None), ({"CI": "false"}, "256")])
def test_a_terminal_has_colours_unless_no_color_is_set(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], colours: str | None
) -> None:
    monkeypatch.setattr("sys.stderr", Tty())
    for name, value in {"COLORTERM": "", **variables}.items():
        monkeypatch.setenv(name, value)

    console = terminal(stderr=True)

    assert (console.is_terminal, None if console.no_color else console.color_system) == (True, colours)


def test_a_stage_leaves_one_line_on_stderr(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        with progress.stage("trace"):
            clock.now += 8.14
        with progress.stage("export [onnx]"):
            clock.now += 200.0

    assert capsys.readouterr() == ("", "trace  8.1 s\nexport [onnx]  3 min 20 s\n")


def test_a_stage_that_fails_leaves_none(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress, pytest.raises(KeyError), progress.stage("trace"):
        raise KeyError

    assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_log_says_a_line_at_each_quarter(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress, progress.bar("train", 1000) as bar:
        for done in range(1, 1001):
            clock.now += 0.01
            bar.update(done, f"loss {1 / done:.3f}")

    assert capsys.readouterr() == (
        "",
        "train  25 %  loss 0.004  2.5 s, 7.5 s left\n"
        "train  50 %  loss 0.002  5.0 s, 5.0 s left\n"
        "train  75 %  loss 0.001  7.5 s, 2.5 s left\n"
        "train  100 %  loss 0.001  10.0 s\n",
    )


def test_a_slow_bar_in_a_log_says_a_line_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress, progress.bar("train", 100) as bar:
        for done in range(1, 10):
            clock.now += 4.0
            bar.update(done)

    assert capsys.readouterr() == (
        "",
        "train  3 %  12.0 s, 6 min 28 s left\n"
        "train  6 %  24.0 s, 6 min 16 s left\n"
        "train  9 %  36.0 s, 6 min 4 s left\n",  # where it ended
    )


def test_a_bar_that_stops_early_says_how_far_it_came(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress, progress.bar("train", 10) as bar:
        clock.now += 2.0
        bar.update(2, "loss 0.41")

    assert capsys.readouterr() == ("", "train  20 %  loss 0.41  2.0 s, 8.0 s left\n")


def test_a_training_says_its_epoch_loss_and_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress, progress.training("digits: lora") as say:
        step = Step(epoch=1, epochs=2, images=0, total_images=64, loss=0.414, images_per_second=31.2)
        say(step)
        for epoch, top1 in ((1, 0.5), (2, 0.935)):
            clock.now += 3.0
            say(replace(step, epoch=epoch, images=32 * epoch - 16))
            say(replace(step, epoch=epoch, images=32 * epoch, val_top1=top1))

    assert capsys.readouterr() == (
        "",
        "digits: lora  25 %  epoch 1/2  loss 0.41  31 images/s  3.0 s, 9.0 s left\n"
        "digits: lora  50 %  epoch 1/2  loss 0.41  val 50.0 %  31 images/s  3.0 s, 3.0 s left\n"
        "digits: lora  75 %  epoch 2/2  loss 0.41  val 50.0 %  31 images/s  6.0 s, 2.0 s left\n"
        "digits: lora  100 %  epoch 2/2  loss 0.41  val 93.5 %  31 images/s  6.0 s\n",
    )


def test_stages_in_a_row_end_where_the_next_begins(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress, progress.stages() as begin:
        for label, seconds in (("trace", 8.0), ("export", 1.5)):
            begin(label)
            clock.now += seconds

    assert capsys.readouterr() == ("", "trace  8.0 s\nexport  1.5 s\n")


def test_quiet_progress_says_nothing_even_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Tty()
    monkeypatch.setattr("sys.stderr", stream)

    with Progress(quiet=True) as progress, progress.stage("trace"), progress.bar("train", 2) as bar:
        bar.update(2, "loss 0.41")

    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_note_and_time_left_and_then_one_line(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout, stderr = io.StringIO(), Tty()
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("COLUMNS", "80")
    with Progress() as progress:
        with progress.stage("trace"):
            clock.now += 8.14
        with progress.bar("train", 10) as bar:
            for done in range(1, 6):
                clock.now += 1.0
                bar.update(done, "loss 0.41  31.2 images/s")
        stdout.write("answer\n")  # a verb's own output, in the middle of it all

    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stderr.getvalue())
    frames = [frame.rstrip() for frame in re.split(r"[\r\n]+", plain) if frame.strip()]
    bar_of = "━" * 24
    assert stdout.getvalue() == "answer\n"
    assert [re.sub("[━╸╺]+", bar_of, frame) for frame in frames] == [
        "trace …",
        "trace  8.1 s",
        f"train {bar_of}   0 %  -:--:--",
        f"train {bar_of}  10 % loss 0.41  31.2 images/s -:--:--",
        f"train {bar_of}  20 % loss 0.41  31.2 images/s 0:00:08",
        f"train {bar_of}  30 % loss 0.41  31.2 images/s 0:00:07",
        f"train {bar_of}  40 % loss 0.41  31.2 images/s 0:00:06",
        f"train {bar_of}  50 % loss 0.41  31.2 images/s 0:00:05",
        "train  50 %  loss 0.41  31.2 images/s  5.0 s, 5.0 s left",
    ]


def test_a_terminal_is_not_redrawn_more_than_ten_times_a_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Tty()
    monkeypatch.setattr("sys.stderr", stream)

    with Progress() as progress, progress.bar("rounds", 1000) as bar:
        for done in range(1, 1001):
            clock.now += 0.001
            bar.update(done)

    assert stream.getvalue().count(" % ") <= 11 + 1  # one a tenth of a second and the empty one; the line at the end


def test_a_command_to_paste_is_the_path_it_was_started_by_where_no_shell_finds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", [".venv/bin/edgepet", "demo"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert program() == ".venv/bin/edgepet"

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert program() == "edgepet"
