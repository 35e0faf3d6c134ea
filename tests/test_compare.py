"""New results beside committed ones: worse is what is beyond noise, on the machine kind that made them."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HERE = {"machine": "x86_64", "cpu": "Tiny CPU", "cores": 2, "cpu_features": ["avx2"], "date": "2026-11-20"}


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("compare")
    for name in {"harness", "compare"} - before:
        sys.modules.pop(name, None)


def speed(median: float, low: float, high: float) -> dict[str, Any]:
    ratio = {"median": median, "low": low, "high": high}
    return {"cases": [{"method": "ssf", "ratios": {"onnxruntime merged": ratio}}], "environment": HERE}


def scored(top1: float, n: int = 2000) -> dict[str, Any]:
    row = {"backbone": "net", "task": "digits", "method": "ssf", "test_top1": top1, "test_n": n}
    return {"rows": [row], "environment": HERE}


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        ((1.00, 0.99, 1.01), (1.10, 1.09, 1.11), "worse"),
        ((1.10, 1.09, 1.11), (1.00, 0.99, 1.01), "better"),
        ((1.00, 0.99, 1.01), (1.04, 1.03, 1.05), "same"),  # apart, and within what days differ by
        ((1.00, 0.90, 1.12), (1.10, 1.08, 1.20), "same"),  # farther, and within noise
        ((1.00, 0.99, 1.01), (1.00, 0.99, 1.01), "same"),
    ],
)
def test_a_ratio_is_worse_where_intervals_are_apart_by_more_than_days_differ(
    before: tuple[float, float, float], now: tuple[float, float, float], verdict: str, compare: Any
) -> None:
    made = speed(*now) | {"environment": HERE | {"date": "2026-11-27"}}

    found = compare.compare("latency-net", speed(*before), made)

    assert found.measures == 1
    assert (len(found.worse), len(found.better)) == {"worse": (1, 0), "better": (0, 1), "same": (0, 0)}[verdict]


def test_more_images_a_second_are_better_and_so_is_top_1(compare: Any) -> None:
    faster, slower = (
        {"ratios": {"default over peft": {"median": median, "low": low, "high": high}}, "environment": HERE}
        for median, low, high in ((2.6, 2.5, 2.7), (2.0, 1.9, 2.1))
    )
    assert [name for name, _, _ in compare.compare("training", faster, slower).worse] == ["ratios default over peft"]
    assert len(compare.compare("training", slower, faster).better) == 1

    lost = compare.compare("accuracy-net", scored(0.98), scored(0.95))
    assert [name for name, _, _ in lost.worse] == ["rows net digits ssf top-1"]
    assert compare.compare("accuracy-net", scored(0.98), scored(0.975)).worse == ()  # ten images of 2,000
    assert compare.compare("accuracy-net", scored(0.98, 50), scored(0.90, 50)).worse == ()


def test_another_kind_of_machine_and_what_was_not_made_anew_are_not_compared(compare: Any) -> None:
    before, now = speed(1.0, 0.99, 1.01), speed(2.0, 1.99, 2.01)
    assert compare.compare("x", before, copy.deepcopy(before)).reason == "not made anew"

    elsewhere = now | {"environment": HERE | {"cores": 1}}
    found = compare.compare("x", before, elsewhere)

    assert (found.reason, found.worse) == ("another kind of machine: cores 1 for 2", ())
    assert "- x: not compared, another kind of machine: cores 1 for 2" in compare.table([found])


def test_what_a_new_result_lacks_is_told(compare: Any) -> None:
    before, now = speed(1.0, 0.99, 1.01), speed(1.0, 0.99, 1.01)
    before["cases"][0]["ratios"]["openvino merged"] = {"median": 1.0, "low": 0.9, "high": 1.1}

    shown = compare.table([compare.compare("x", before, now)])

    told = "- x: 1 measures, 0 worse, 0 better; gone: cases ssf ratios openvino merged"
    assert shown == f"Nothing has changed beyond noise.\n\n{told}"


def test_every_measure_of_the_committed_results_has_a_name_of_its_own(compare: Any) -> None:
    counts = {}
    for path in sorted(RESULTS.glob("*.json")):
        names = [name for name, _ in compare.measures(path.stem, json.loads(path.read_text()))]
        assert len(set(names)) == len(names), path.stem
        counts[path.stem] = len(names)

    assert counts["latency-vit-small"] == 10
    assert counts["accuracy-vit-small"] == 8
    assert counts["serving"] > 30
    assert counts["training"] == 5


def test_the_command_fails_with_4_where_something_is_worse_and_says_what(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, result in (("before", speed(1.0, 0.99, 1.01)), ("now", speed(1.5, 1.49, 1.51))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latency-net.json").write_text(json.dumps(result))
    words = ["compare.py", "--results", str(tmp_path / "now"), "--baseline", str(tmp_path / "before")]
    monkeypatch.setattr(sys, "argv", words)

    with pytest.raises(SystemExit) as ended:
        compare.main()

    assert ended.value.code == 4
    name = "cases ssf ratios onnxruntime merged"
    told = f"| latency-net | worse | {name} | 1.000 (0.990 to 1.010) | 1.500 (1.490 to 1.510) |"
    assert told in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--quick"])
    compare.main()
    assert "- latency-net: not compared, not made anew" in capsys.readouterr().out
