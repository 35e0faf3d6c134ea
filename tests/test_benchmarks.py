"""Benchmarks: each can be imported, and the committed results name commands that can be given."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgepet.images.mask_folders import open_masks
from tests.mask_folders import NAMES, index_folder
from tests.tiny import tiny_vit

ROOT = Path(__file__).parent.parent
PARTS = (
    "adapters",
    "harness",
    "judging",
    "neighbours",
    "peer_ways",
    "rows",
    "serving_many",
    "trainings",
    "trial_pages",
    "unseen",
)  # of other benchmarks
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in PARTS)
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks find one another as scripts do, and no test finds them afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield
    for name in {*PARTS, *SCRIPTS} - before:
        sys.modules.pop(name, None)


def imported(name: str) -> ModuleType:
    return importlib.import_module(name)


def arguments(command: str) -> tuple[str, list[str]]:
    """The script of a command, and what it is given."""
    python, script, *given = shlex.split(command)
    assert (python, Path(script).parent) == ("python", Path("benchmarks"))
    return Path(script).stem, given


def parsed(command: str) -> argparse.Namespace:
    name, given = arguments(command)
    parser: argparse.ArgumentParser = imported(name).parser()
    return parser.parse_args(given)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_is_imported_and_has_a_quick_run(name: str) -> None:
    module = imported(name)

    options = module.parser().parse_args(["--quick", "--dir", "somewhere", "--results", "elsewhere"])

    assert callable(module.main)
    assert (options.quick, options.dir, options.results) == (True, Path("somewhere"), Path("elsewhere"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_committed_result_names_a_command_that_can_be_given(path: Path) -> None:
    command = json.loads(path.read_text())["command"]

    assert arguments(command)[0] in SCRIPTS
    assert not parsed(command).quick


def test_every_command_of_the_makefile_can_be_given() -> None:
    commands = re.findall(
        r"\$\(BIN\)/(python benchmarks/.*) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )

    assert {arguments(command)[0] for command in commands} == set(SCRIPTS)
    assert all(parsed(f"{command} --quick").quick for command in commands)


def test_types_of_benchmarks_are_checked() -> None:
    """A function that is renamed and still called by its old name fails ``make check``."""
    assert "benchmarks" in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["/home/me/benchmarks/latency.py"], "python benchmarks/latency.py"),
        (["half.py", "--pack", "/tmp/x/iris.pet", "--pack=/tmp/a.pet"], "--pack iris.pet --pack=a.pet"),
        (["int8.py", "--quick", "--dir", "/work/me", "--results=/tmp/there"], "--quick --dir DIR --results RESULTS"),
    ],
)
def test_a_result_tells_its_command_without_the_folders_of_whoever_ran_it(argv: list[str], told: str) -> None:
    assert imported("harness").command(argv).endswith(told)


def test_a_result_has_its_command_the_machine_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness: Any = imported("harness")
    monkeypatch.setattr(sys, "argv", ["benchmarks/latency.py", "--dir", str(tmp_path / "bench")])
    options = harness.parser_of(None).parse_args(["--results", str(tmp_path / "results")])

    path = harness.write_result(harness.asked(options), "speed", {"rows": [{"ms": 1.5}], "names": ("a",)})

    result = json.loads(path.read_text())
    assert path == tmp_path / "results" / "speed.json"
    assert list(result) == ["command", "rows", "names", "environment"]
    assert result["command"] == "python benchmarks/latency.py --dir DIR"
    assert (result["rows"], result["names"]) == ([{"ms": 1.5}], ["a"])
    assert {"cpu", "cores", "date", "versions"} <= result["environment"].keys()


def test_a_quick_run_never_writes_over_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness: Any = imported("harness")
    monkeypatch.setattr(harness.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))

    assert harness.asked(harness.parser_of(None).parse_args([])).results == ROOT / "benchmarks" / "results"
    assert harness.asked(harness.parser_of(None).parse_args(["--quick"])).results == tmp_path / "edgepet-bench-"


def test_tables_go_between_the_marks_of_a_page_or_of_its_copy(tmp_path: Path) -> None:
    marks, page = imported("harness").Marks("<!-- made -->", "<!-- end -->"), tmp_path / "page.md"
    page.write_text("before\n<!-- made -->\n\nold\n<!-- end -->\nafter\n")
    (tmp_path / "copies").mkdir()

    marks.put(page, "copied\n", into=tmp_path / "copies")
    marks.put(page, "new\n")

    shown = "before\n<!-- made -->\n\n{}\n\n<!-- end -->\nafter\n"
    assert page.read_text() == shown.format("new")
    assert (tmp_path / "copies" / "page.md").read_text() == shown.format("copied")


def test_the_sweeps_table_says_how_far_each_precision_is_and_who_refuses_what() -> None:
    def proven(max_abs: float, limit: float | None) -> dict[str, float | None]:
        return {"max_abs": max_abs, "limit": limit, "top1_agreement": 1.0, "n": 10}

    sweep: Any = imported("timm_sweep")
    row = {
        "family": "resnet",
        "onnxruntime": 1e-7,
        "openvino": 3e-3,
        "fp32": {"onnxruntime": proven(1e-6, 2e-4), "tensorrt-rtx": {"built": True}},
        "fp16": {"onnxruntime": proven(4e-3, 4e-2), "openvino": {"refused": "x: is not finite"}},
        "int8": {"onnxruntime": proven(0.06, None), "openvino": proven(0.1, None)},
    }

    assert sweep.relative(row, "fp16") == "2e-03/–"
    assert sweep.relative(row, "int8") == "3e-02/5e-02"
    assert sweep.relative({"family": "coat", "refused": "coat_tiny: cannot be exported"}, "int8") == ""
    assert sweep.reason(row) == "openvino: beyond the limit; fp16, openvino: x: is not finite"


def test_a_table_grows_by_what_no_earlier_run_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever that ran: threads and precision are the machine's."""
    trainings: Any = imported("trainings")
    rows_of: Any = imported("rows")
    harness: Any = imported("harness")
    monkeypatch.setattr(sys, "argv", ["benchmarks/trials.py"])
    run = harness.Asked(command="a", quick=False, folder=tmp_path, results=tmp_path)
    asked = [
        trainings.Training(task=task, backbone="vit-small", method=method, image_size=112)
        for task, method in (("digits", "ssf"), ("digits", "lora"), ("cards", "ssf"), ("digits", "hta"))
    ]

    more = [
        trainings.Training(task=task, backbone="vit-small", method=method, image_size=112)
        for task, method in (("digits", "ssf"), ("cards", "lora"))
    ]

    def on_threads(threads: int) -> Any:
        def planned(_: object, each: Any) -> list[tuple[Any, None]]:
            options = {"seed": 0, "precision": f"fp{threads}"}
            asked_for = [{"of": [one.task, one.method], "options": options, "threads": threads} for one in each]
            return [(trainings.Job(function="trainings:train_pack", specification=one), None) for one in asked_for]

        return planned

    def add(rows: Any, number: int, threads: int) -> None:
        (job, _), *_ = on_threads(threads)(None, [asked[number]])
        rows.add(
            types.SimpleNamespace(result=types.SimpleNamespace(job=job, measured={})),
            {"task": asked[number].task, "n": number},
        )

    def methods(rows: Any) -> list[tuple[str, str]]:
        return [(each.task, each.method) for each in rows.missing]

    monkeypatch.setattr(rows_of, "planned", on_threads(1))
    first = rows_of.Rows(run, "table", asked, {"images": 5})
    add(first, 3, 1)
    monkeypatch.setattr(rows_of, "planned", on_threads(2))
    second = rows_of.Rows(run, "table", asked, {"images": 5}, task="digits")
    assert methods(second) == [("digits", "ssf"), ("digits", "lora")]
    add(first, 2, 1)  # another run, at the same time
    add(second, 0, 2)
    assert methods(rows_of.Rows(run, "table", asked, {"images": 5})) == [("digits", "lora")]
    add(second, 1, 2)

    written = json.loads((tmp_path / "table.json").read_text())
    assert [row["n"] for row in written["rows"]] == [0, 1, 3, 2]  # by task, in the order of the table
    assert (written["trainings"], written["images"]) == (4, 5)
    assert len(rows_of.Rows(run, "table", asked, {"images": 6}).missing) == 4

    beside = rows_of.Rows(run, "beside", [asked[2], *more], task="cards")
    beside.adopt(["nowhere", "table"])
    assert methods(beside) == [("cards", "lora")]
    whole = rows_of.Rows(run, "beside", [asked[2], *more])
    assert methods(whole) == [("digits", "ssf"), ("cards", "lora")]
    whole.adopt(["table"])
    assert [row["n"] for row in json.loads((tmp_path / "beside.json").read_text())["rows"]] == [2, 0]


def test_a_table_takes_several_trainings_at_a_time_and_tells_of_the_gpu_that_made_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: Any = imported("trainings")
    rows_of: Any = imported("rows")
    monkeypatch.setattr(sys, "argv", ["benchmarks/trials.py"])
    options = rows_of.rows_parser("of a table").parse_args(["--results", str(tmp_path), "--processes", "2"])
    run = imported("harness").asked(options)
    every = [
        trainings.Training(task="digits", backbone="vit-small", method=method, image_size=112)
        for method in ("ssf", "lora", "hta")
    ]
    begun = list[list[str]]()

    def planned(_: object, each: Any) -> list[tuple[Any, None]]:
        asked_for = [{"of": one.method, "options": {}} for one in each]
        return [(trainings.Job(function="trainings:train_pack", specification=one), None) for one in asked_for]

    def trained(_: object, each: Any) -> list[Any]:
        begun.append([one.method for one in each])
        gpu = {"ssf": {"gpu": "H200"}}
        jobs = [job for job, _ in planned(None, each)]
        return [
            types.SimpleNamespace(training=one, result=types.SimpleNamespace(job=job, measured=gpu.get(one.method, {})))
            for one, job in zip(each, jobs, strict=True)
        ]

    monkeypatch.setattr(rows_of, "planned", planned)
    monkeypatch.setattr(rows_of, "trained", trained)
    rows_of.Rows(run, "table", every).fill(lambda made: {"task": made.training.task, "method": made.training.method})

    assert begun == [["ssf", "lora"], ["hta"]]
    written = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row.get("gpu") for row in written] == ["H200", None, None]
    assert (
        imported("harness")
        .source(json.loads((tmp_path / "table.json").read_text()))
        .endswith("; 1 of 3 trainings on H200.")
    )


def test_the_table_of_boxes_has_packs_in_codes_where_they_are_measured() -> None:
    score = {"value": 0.5, "map50": 0.75, "low": 0.25, "high": 0.625}
    first: dict[str, Any] = {
        "task": "trees", "method": "ssf", "backbone": "demo:efficientnet-lite0", "trainable_params": 7,
        "head_params": 8, "pack_bytes": 2000, "test": {"boxes": score},
    }  # fmt: skip
    rows = [first, {**first, "coded_bytes": 1000, "coded_test": {"boxes": {**score, "value": 0.375}}}]
    environment = json.loads(RESULTS[0].read_text())["environment"]

    told = imported("boxes").box_tables(
        {"boxes": {"rows": rows, "trainings": 2, "command": "python benchmarks/boxes.py", "environment": environment}}
    )

    (shown,) = [line for line in told.splitlines() if line.startswith("| trees")]
    cells = [cell.strip() for cell in shown.strip("|").split("|")]
    assert cells[4:6] == ["2.0 kB", "1.0 kB"]
    ranges = ["50.0 % (50.0 % to 50.0 %)", "75.0 % (75.0 % to 75.0 %)", "25.0 % to 62.5 %"]
    assert cells[6:] == [*ranges, "37.5 %", "2"]


def test_a_class_is_taken_out_of_all_pixels_that_are_learnt_from(tmp_path: Path) -> None:
    unseen: Any = imported("unseen")
    drawn = index_folder(tmp_path / "drawn")

    data = unseen.without(drawn, "green", tmp_path / "data")

    for split in ("train", "val"):
        for path in sorted((drawn / "masks" / split).iterdir()):
            before, after = (np.asarray(Image.open(root / "masks" / split / path.name)) for root in (drawn, data))
            np.testing.assert_array_equal(after, np.array([0, 255, 1])[before])
    assert not (data / "masks/test").exists()
    assert [mask.classes for mask in (open_masks(data, "train"), open_masks(data, "val"))] == [("red", "blue")] * 2
    masks = np.stack([np.asarray(Image.open(path)) for path in (drawn / "masks/test").iterdir()])
    assert [unseen.share(drawn, name) for name in NAMES] == [np.mean(masks == number) for number in range(3)]


def test_what_is_right_is_kept_in_bits_and_compared_in_pairs() -> None:
    judging: Any = imported("judging")
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 3, 500)) < 0.5  # of three seeds, on the same images
    second |= first

    kept = judging.written(first[0])
    mean, low, high = judging.points_between({"a": first, "b": first}, {"a": second, "b": first})

    assert len(kept) == 84
    np.testing.assert_array_equal(judging.read(kept, 500), first[0])
    gained = (second.mean(axis=0) - first.mean(axis=0)) * 100
    assert mean == pytest.approx(gained.mean() / 2)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(1.96 * gained.std(ddof=1) / 500**0.5 / 2, rel=1e-4)


def test_a_peer_learns_and_is_left_at_its_best_epoch_by_val(tmp_path: Path) -> None:
    """The loop that PEFT's LoRA is trained by: one that learns nothing would flatter edgepet."""
    peers: Any = imported("peers")
    adapters: Any = imported("adapters")
    backbone, rng = tiny_vit(tmp_path, seed=3), np.random.default_rng(0)
    truth = np.arange(48) % 2
    images = rng.normal(truth[:, None, None, None] - 0.5, 1.0, (48, 3, 32, 32)).astype(np.float32)
    train, val = (images[:32], truth[:32]), (images[32:], truth[32:])
    torch.manual_seed(0)
    model = adapters.peft_lora(backbone, 2)
    before = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    plan = {"epochs": 6, "batch_size": 8, "lr": 5e-3, "seed": 0, "precision": "fp32"}

    top1, loss, epoch = peers.tune(model, train, val, plan)

    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(val[0]))
    assert top1 == float((logits.argmax(1).numpy() == val[1]).mean()) == 1.0
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(val[1]))), rel=1e-4)
    assert 1 <= epoch <= 6
    assert all(torch.equal(each, dict(model.named_parameters())[name]) for name, each in before.items())


def test_a_peer_begins_with_the_weights_of_the_backbone(tmp_path: Path) -> None:
    adapters: Any = imported("adapters")
    backbone = tiny_vit(tmp_path, seed=3)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32))

    with torch.no_grad():
        network = adapters.peft_lora(backbone, 2).eval().base_model.model
        features = network.forward_head(network.forward_features(images), pre_logits=True)

        torch.testing.assert_close(features, backbone.module(images))


def test_the_table_of_peers_has_what_each_way_costs_where_it_runs() -> None:
    peers: Any = imported("peers")
    row = {
        "model": "ssf pack",
        "who": "edgepet",
        "trained": "ssf",
        "kept_as": "pack, fp32 backbone",
        "training_seconds": 609,
        "test_top1": 0.6665,
        "test_n": 2000,
        "same_answers": 1999,
        "task_bytes": 199_236,
        "many_bytes": 90_412_000,
        "times": {"onnxruntime": {"p50_ms": 12.34, "switch_ms": -0.01}, "openvino": {"p50_ms": 11.0, "switch_ms": 1}},
    }
    other = row | {"who": "PEFT, NNCF", "trained": "peft", "kept_as": "file, int8",
                   "times": {"openvino": {"p50_ms": 5.55, "switch_ms": 900.0}}}  # fmt: skip
    result = {"command": "python benchmarks/peers.py --dir DIR", "task": "landcover", "backbone": "demo:vit-small",
              "image_size": 112, "epochs": 8, "batch_size": 32, "precision": "bf16", "calib_images": 128, "runs": 3,
              "rounds": 60, "threads": 1, "peft": {"val_top1": {"0.0002": 0.5, "0.005": 0.61}}, "rows": [row, other],
              "environment": {"versions": {}, "cpu": "Tiny", "cores": 2, "date": "2026-11-28"}}  # fmt: skip

    shown = peers.peer_tables({"fastest": {}, "peers": result, "peers-digits": result | {"task": "digits"}})

    assert peers.peer_tables({"fastest": {}}) == "Not measured yet.\n"
    assert [line for line in shown.splitlines() if line.startswith("**")] == [
        "**landcover on demo:vit-small, 112 px**", "**digits on demo:vit-small, 112 px**"
    ]  # fmt: skip
    both = "10 min 9 s | 66.6 % | 1,999 | 199.2 kB | 90.4 MB"
    assert shown.splitlines()[4:6] == [
        f"| edgepet | ssf | pack, fp32 backbone | {both} | 12.3 | 0.00 | 11.0 | 1.00 |",
        f"| PEFT, NNCF | lora | file, int8 | {both} | – | – | 5.5 | 900.00 |",
    ]
    assert "PEFT's learning rates by val: 0.0002 50.0 %, 0.005 61.0 %." in shown
