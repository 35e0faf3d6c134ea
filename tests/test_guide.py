"""The guide of the device: every command and every program in it, in their order."""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from edgepet import read_pack
from edgepet.packs.pack import write_pack
from tests.flow import Tasks, edgepet
from tests.interpreters import DEVICE, block, python

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "on-the-device.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

FED = {  # what stands before a pipe
    "": "", "capture": "a.jpg\n",
    "batch": '[{"image": "a.jpg", "task": "birds"}, {"image": "b.jpg", "task": "flowers"}]\n',
}  # fmt: skip


@pytest.mark.slow
def test_the_guide_of_the_device_is_what_happens(tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography", reason="the guide signs a pack")
    monkeypatch.chdir(tmp_path)
    for name, source, sequence in (
        ("flowers", tasks.shapes, 0),
        ("birds", tasks.tints, 0),
        ("flowers", tasks.shapes, 2),
    ):
        file = f"{name}-{sequence}.pet" if sequence else f"{name}.pet"
        write_pack(file, replace(read_pack(source).delta, task=name), sequence=sequence)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), (200, 30, 90)).save(name)
    commands, programs = 0, list[str]()

    for kind, text in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if kind == "python":
            ran = python(block(DEVICE) + text, cwd=tmp_path)
            assert (ran.returncode, ran.stderr) == (0, ""), text
            programs.append(ran.stdout)
            continue
        for written in text.splitlines():
            fed, _, line = written.rpartition(" | ")
            monkeypatch.setattr("sys.stdin", io.StringIO(FED[fed]))
            program, *arguments = shlex.split(line)
            assert program == "edgepet", line
            done = edgepet(*arguments)
            assert done.code == 0, (line, done.err)
            commands += 1

    assert commands >= 18
    assert [len(printed.splitlines()) for printed in programs] == [4, 2, 3, 4]
    assert "device" not in programs[0]  # no class, no path: numbers, names and scores
