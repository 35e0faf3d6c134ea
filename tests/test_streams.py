"""What a command prints where not every character goes, and where nobody reads."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepet.cli.main import main
from edgepet.packs.pack import write_pack
from edgepet.reports.streams import json_line, take_any_text
from tests.tiny import make_delta

LABELS = ("épicéa", "木", "a–b")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "trees.pet"
    write_pack(path, make_delta(labels=LABELS))
    return path


@pytest.fixture(params=["ascii", "cp1252", "utf-8"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def printed(encoding: str, patch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What a command writes to a stdout of this encoding; it must end well."""
    written = io.BytesIO()
    patch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    assert main([str(argument) for argument in arguments]) == 0
    return written.getvalue().decode(encoding)


SPELLED = {"ascii": r"\xe9pic\xe9a, \u6728, a-b", "cp1252": r"épicéa, \u6728, a–b", "utf-8": "épicéa, 木, a–b"}


def test_a_screen_has_escapes_for_what_an_encoding_lacks(
    pack: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SPELLED[encoding] in printed(encoding, monkeypatch, "inspect", pack)


def test_json_is_the_same_in_every_encoding(pack: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(printed(encoding, monkeypatch, "inspect", pack, "--json"))["classes"] == list(LABELS)


def test_json_of_a_file_name_in_no_encoding_is_json(encoding: str) -> None:
    line = json_line({"path": "caf\udce9"}, encoding)

    assert json.loads(line.encode(encoding)) == {"path": "caf\udce9"}


def test_signs_of_ours_have_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", errors="surrogateescape"))

    take_any_text()
    sys.stdout.write("max|Δ| – 3.1× …\n")
    sys.stdout.flush()

    assert written.getvalue() == b"max|d| - 3.1x ...\n"


def test_what_was_asked_for_by_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr("sys.stdout", stream)

    take_any_text()

    assert stream.errors == "replace"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_progress_and_errors_on_a_full_disk_are_said_to_nobody(pack: Path, tmp_path: Path) -> None:
    """Each of them would be a traceback, and the end of a training."""
    program = (
        "import sys; from edgepet.reports.progress import Progress\n"
        "with Progress() as progress:\n"
        "    for label in ('one', 'two'):\n"
        "        with progress.stage(label): pass\n"
        "from edgepet.cli.main import main\n"
        "print(main(['inspect', sys.argv[1]]))"
    )
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "none.pet")],
            stdout=subprocess.PIPE, stderr=full, check=False, env=os.environ,
        )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, b"3\n")
