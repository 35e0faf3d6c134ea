"""The demo, with shorter training: what it prints is what a stranger sees first. Slow: minutes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgepet.cli.main import main
from edgepet.verbs import demo

pytestmark = pytest.mark.slow


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAININGS", tuple(replace(asked, epochs=1) for asked in demo.TRAININGS))
    monkeypatch.setattr(demo, "TEST_IMAGES", 50)


@pytest.mark.usefixtures("short")
def test_the_demo_ends_with_tables_and_commands_that_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"

    assert main(["demo", "--dir", str(folder), "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert {"tasks", "storage", "bench", "artifacts"} <= set(report)
    assert [task["task"] for task in report["tasks"]] == ["digits", "landcover"]
    assert report["backbone"].endswith("not DINOv2-S.")
    made = [(a["task"], a["format"], a["verified"]) for a in report["artifacts"]["artifacts"]]
    assert [row for row in made if row[1] != "tensorrt"] == [
        ("digits", "onnx", True),
        ("digits", "openvino", True),
        ("landcover", "onnx", True),
        ("landcover", "openvino", True),
    ]
    for command in report["commands"][:4]:
        assert main(command.split()[1:]) == 0, command
