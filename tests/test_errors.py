"""Every refusal is one message, where, what, got and fix, with its own exit code and without a traceback."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from edgepet.canonical import canonical_json, parse_json
from edgepet.deltas.merge import short
from edgepet.device.runtime import open_features
from edgepet.errors import (
    BackboneError,
    CheckError,
    EdgepetError,
    InputError,
    MissingError,
    PackError,
    require,
)
from edgepet.graphs.base import BaseGraph
from edgepet.packs.pack import read_pack
from tests.flow import RUNTIMES, Artifacts, Tasks, edgepet, needs_openvino, refused, train_arguments
from tests.tiny import tiny_vit


@pytest.fixture
def data(tasks: Tasks, tmp_path: Path) -> Path:
    """A copy of the images, to spoil."""
    return Path(shutil.copytree(tasks.data, tmp_path / "data"))


def rewritten(pack: Path, target: Path, **changes: object) -> Path:
    """A canonical pack whose manifest has ``changes``."""
    data = pack.read_bytes()
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    manifest = parse_json(header["__metadata__"]["edgepet"]) | changes
    metadata = {"edgepet": canonical_json(manifest).decode()}
    target.write_bytes(safetensors.numpy.save(safetensors.numpy.load(data), metadata=metadata))
    return target


# The tree


@pytest.mark.parametrize(
    ("kind", "code"),
    [(EdgepetError, 3), (InputError, 3), (PackError, 3), (BackboneError, 3), (CheckError, 4), (MissingError, 5)],
)
def test_an_error_is_where_what_got_and_fix(kind: type[EdgepetError], code: int) -> None:
    assert kind.exit_code == code
    assert str(kind("here", "needs x")) == "here: needs x"
    assert str(kind("here", "needs x", got=0)) == "here: needs x, got 0"
    assert str(kind("here", "needs x", got="y", fix="do z")) == "here: needs x, got y\n  fix: do z"


# The model


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_a_wrong_backbone(tasks: Tasks, artifacts: Artifacts, tmp_path: Path, verb: str) -> None:
    stranger = tiny_vit(tmp_path, seed=8)
    target = tmp_path / ("out" if verb == "export" else "m.safetensors")

    message = refused(3, verb, tasks.shapes, "--backbone", stranger.spec, "-o", target)

    trained_on = short(read_pack(tasks.shapes).delta.fingerprint)
    assert message == (
        f"task 'shapes': was trained on test_vit {trained_on}, got test_vit {short(stranger.fingerprint)}\n"
        "  fix: pass --backbone test_vit with the weights that it was trained on\n"
    )
    assert not target.exists()


def test_an_unknown_architecture(tasks: Tasks, tmp_path: Path) -> None:
    arguments = train_arguments("vit_nosuch", tasks.data, "ssf", tmp_path / "a.pet")
    message = refused(3, *arguments)
    assert message.startswith("vit_nosuch: is no timm architecture, got 'vit_nosuch'\n  fix: for example ")


def test_a_weights_file_that_is_not_there(tasks: Tasks, tmp_path: Path) -> None:
    spec = f"test_vit@{tmp_path}/nosuch.safetensors"
    assert refused(3, *train_arguments(spec, tasks.data, "ssf", tmp_path / "a.pet")) == (
        f"{tmp_path}/nosuch.safetensors: is no file\n"
    )


# The image size


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (33, "--img-size: {} cuts images into patches of 16 pixels, got 33\n  fix: use 32 or 48\n"),
        (8, "--img-size: {} cuts images into patches of 16 pixels, got 8\n  fix: use 16 or 32\n"),
        (0, "--img-size: must be at least 1, got 0\n"),
    ],
)
def test_a_wrong_image_size(tasks: Tasks, tmp_path: Path, size: int, message: str) -> None:
    arguments = [*train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet"), "--img-size", size]

    assert refused(3, *arguments) == message.format(tasks.spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 3, 33, 33), "float32"), ((1, 1, 32, 32), "float32"), ((3, 32, 32), "float32"), ((1, 3, 32, 32), "float64")],
)
def test_images_that_a_runner_does_not_take(graph: BaseGraph, runtime: str, shape: tuple[int, ...], dtype: str) -> None:
    runner = open_features(graph, {}, runtime=runtime)
    with pytest.raises(InputError) as error:
        runner(np.zeros(shape, dtype))
    runner.close()

    assert str(error.value) == (
        f"test_vit: takes float32 images (n, 3, 32, 32), got {dtype} {shape}\n"
        "  fix: preprocess the images with the artefact's own preprocessing"
    )


def test_a_pack_of_an_image_size_that_was_never_traced(
    tasks: Tasks, graph: BaseGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = read_pack(tasks.shapes).delta.preprocess.as_json() | {"image_size": [48, 48]}
    pack = rewritten(tasks.shapes, tmp_path / "large.pet", preprocess=preprocess)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # a device without torch

    assert refused(3, "eval", pack, tasks.data) == (
        f"{graph.folder}: holds no graph of 48x48 pixels\n  fix: run `edgepet export` once where torch is installed\n"
    )


# The pack


@pytest.mark.parametrize("verb", [["inspect"], ["eval", "DATA"], ["merge", "-o", "OUT"], ["export", "-o", "OUT"]])
def test_a_truncated_pack(tasks: Tasks, tmp_path: Path, verb: list[str]) -> None:
    cut = tmp_path / "cut.pet"
    cut.write_bytes(tasks.shapes.read_bytes()[:100])
    rest = [{"DATA": tasks.data, "OUT": tmp_path / "out"}.get(word, word) for word in verb[1:]]

    assert refused(3, verb[0], cut, *rest) == (
        "cut.pet: is not a pack or is cut short, got 100 bytes\n  fix: copy the file again, whole\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_pack_without_its_last_byte(tasks: Tasks, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pet"
    cut.write_bytes(tasks.shapes.read_bytes()[:-1])
    with pytest.raises(safetensors.SafetensorError) as library:
        safetensors.numpy.load(cut.read_bytes())

    assert refused(3, "inspect", cut) == (
        f"cut.pet: is not a pack or is cut short, got {library.value}\n  fix: copy the file again, whole\n"
    )


def test_an_unknown_key_in_a_packs_manifest(tasks: Tasks, tmp_path: Path) -> None:
    pack = rewritten(tasks.shapes, tmp_path / "new.pet", colour="green")
    assert refused(3, "inspect", pack) == (
        "new.pet: knows no key 'colour'\n  fix: update edgepet if a newer version wrote this file\n"
    )


def test_an_unknown_key_in_an_artefacts_manifest(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts.of("shapes", "onnx"), tmp_path / "new"))
    manifest = folder / "artifact.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"colour": "green"}))

    for verb in ("inspect", "verify"):
        assert refused(3, verb, folder) == (
            f"{manifest}: knows no key 'colour'\n  fix: update edgepet if a newer version wrote this file\n"
        )


def test_a_pack_that_is_not_there(tmp_path: Path) -> None:
    assert refused(3, "inspect", tmp_path / "a.pet") == (
        f"{tmp_path}/a.pet: could not be read, got No such file or directory\n"
    )


# The images


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_an_unreadable_image(tasks: Tasks, artifacts: Artifacts, data: Path, tmp_path: Path, verb: str) -> None:
    broken = data / ("train" if verb == "train" else "test") / "square" / "1.png"
    broken.write_bytes(b"not an image")
    train = train_arguments(tasks.spec, data, "ssf", tmp_path / "a.pet")

    assert refused(3, *(train if verb == "train" else ["eval", tasks.shapes, data])) == (
        f"{broken}: is not a readable image, got bytes of no known image format\n  fix: replace the file or remove it\n"
    )
    assert not (tmp_path / "a.pet").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class(tasks: Tasks, data: Path, tmp_path: Path, split: str) -> None:
    for image in (data / split / "circle").iterdir():
        image.unlink()

    assert refused(3, *train_arguments(tasks.spec, data, "ssf", tmp_path / "a.pet")) == (
        f"{data}/{split}/circle: holds no image\n  fix: remove the folder or add images\n"
    )


def test_classes_that_the_pack_does_not_know(tasks: Tasks, artifacts: Artifacts, data: Path) -> None:
    for split in ("train", "val", "test"):
        (data / split / "circle").rename(data / split / "ring")

    assert refused(3, "eval", tasks.shapes, data) == (
        f"{data}: needs the 3 classes of shapes.pet, got a difference in circle, ring\n"
    )


# A missing extra


def missing(module: str, extra: str, where: str) -> str:
    return (
        f"{where}: needs the package '{module}', got import of {module} halted; None in sys.modules\n"
        f"  fix: pip install 'edgepet[{extra}]'\n"
    )


@pytest.mark.parametrize(
    ("module", "verb", "where"),
    [
        ("torch", "train", "train"),
        ("torch", "merge", "merge"),
        ("torch", "export", "comparing with the network in torch"),
        ("torch", "verify", "comparing with the network in torch"),
        ("torch", "methods", "SPEC"),
        ("torch", "eval", "--runtime torch"),
        ("torch", "bench", "--runtime torch"),
        ("timm", "methods", "SPEC"),
        ("onnx", "export", "ONNX"),
    ],
)
def test_without_the_train_extra(
    tasks: Tasks,
    artifacts: Artifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    verb: str,
    where: str,
) -> None:
    out, shapes = tmp_path / "out", tasks.shapes
    arguments: dict[str, list[object]] = {
        "train": train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet"),
        "merge": ["merge", shapes, "-o", out],
        "export": ["export", shapes, "-o", out],
        "verify": ["verify", artifacts.of("shapes", "onnx"), "--data", tasks.data, "--pack", shapes],
        "methods": ["methods", "--backbone", tasks.spec],
        "eval": ["eval", shapes, tasks.data, "--runtime", "torch"],
        "bench": ["bench", shapes, "--runtime", "torch"],
    }
    monkeypatch.setitem(sys.modules, module, None)

    assert refused(5, *arguments[verb]) == missing(module, "train", where.replace("SPEC", tasks.spec))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("verb", ["export", "eval", "bench"])
def test_without_openvino(
    tasks: Tasks, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    arguments: dict[str, list[object]] = {
        "export": ["export", tasks.shapes, "--to", "openvino", "-o", tmp_path / "out"],
        "eval": ["eval", tasks.shapes, tasks.data, "--runtime", "openvino"],
        "bench": ["bench", tasks.shapes, "--runtime", "openvino", "--rounds", 2],
    }
    monkeypatch.setitem(sys.modules, "openvino", None)

    where = "--to openvino" if verb == "export" else "OpenVINO"
    assert refused(5, *arguments[verb]) == missing("openvino", "openvino", where)


@needs_openvino
def test_an_artefact_whose_runtime_is_missing_is_not_run_and_says_so(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)

    said = edgepet("verify", artifacts.of("shapes", "openvino"), "--json")

    assert said.code == 0
    assert [check["name"] for check in said.json["checks"]] == ["files"]
    assert said.json["reason"] == "not run: needs the package 'openvino'"


def test_without_tensorrt(tasks: Tasks, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)

    message = refused(5, "export", tasks.shapes, "--to", "tensorrt", "-o", tmp_path / "out")

    assert message == missing("tensorrt_rtx", "tensorrt-rtx", "--to tensorrt")
    assert not (tmp_path / "out").exists()


def test_without_onnxsim(tasks: Tasks, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)

    message = refused(5, "export", tasks.shapes, "--simplify", "-o", tmp_path / "out")

    assert message == missing("onnxsim", "onnxsim", "--simplify")


def test_a_package_that_is_there_is_given() -> None:
    assert require("json", extra="none", purpose="tests") is json


# Options that hold no sense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "DATA", "--epochs", "0"], "--epochs: must be at least 1, got 0\n"),
        (["train", "DATA", "--batch-size", "0"], "--batch-size: must be at least 1, got 0\n"),
        (["train", "DATA", "--lr", "0"], "--lr: must be above 0 and finite, got 0.0\n"),
        (["train", "DATA", "--lr", "nan"], "--lr: must be above 0 and finite, got nan\n"),
        (["train", "DATA", "--set", "rank"], "--set: needs NAME=VALUE, got 'rank'\n"),
        (
            ["train", "DATA", "--augment", "blur"],
            "--augment: knows flip, crop, randaugment, erasing, mixup, cutmix and the like of rand-m9-n2, got 'blur'\n",
        ),
        (["train", "DATA", "--head-lr", "0"], "--head-lr: must be above 0 and finite, got 0.0\n"),
        (["train", "DATA", "--weight-decay", "-1"], "--weight-decay: must be at least 0 and finite, got -1.0\n"),
        (["train", "DATA", "--patience", "0"], "--patience: must be at least 1, got 0\n"),
        (
            ["train", "DATA", "--text", "a.npy"],
            "--task class: does not go with --text, got a.npy\n"
            "  fix: leave --text out, or ask for what it is of, --task mask and others\n",
        ),
        (
            ["train", "DATA", "--dice", "1"],
            "--task class: does not go with --dice, got 1.0\n"
            "  fix: leave --dice out, or ask for what it is of, --task mask and others\n",
        ),
        (["train", "DATA", "--log", "paper"], "--log: knows csv, tensorboard, mlflow, wandb, got 'paper'\n"),
        (["export", "PACK", "-o", "OUT", "--to", "tflite"], "--to: knows onnx, openvino, tensorrt, got 'tflite'\n"),
        (["export", "PACK", "-o", "OUT", "--to", ""], "--to: knows onnx, openvino, tensorrt, got none of them\n"),
        (
            ["export", "PACK", "-o", "OUT", "--sm", "8.6"],
            "--sm: needs compute capabilities such as 86,89,120, got '8.6'\n",
        ),
        (["export", "PACK", "PACK", "-o", "OUT"], "export: needs packs of different tasks, got shapes, shapes\n"),
        (["eval", "PACK", "DATA", "--threads", "0"], "--threads: must be at least 1, got 0\n"),
        (["bench", "PACK", "--threads", "-1"], "--threads: must be at least 1, got -1\n"),
        (["bench", "PACK", "--batch", "0"], "--batch: must be at least 1, got 0\n"),
        (["bench", "PACK", "--rounds", "0", "--runtime", "onnxruntime"], "bench: needs one round at least, got 0\n"),
        (
            ["bench", "PACK", "--runtime", "tflite"],
            "--runtime: is one of onnxruntime, openvino, torch, tensorrt, got 'tflite'\n",
        ),
    ],
)
def test_an_option_without_sense(
    tasks: Tasks, artifacts: Artifacts, tmp_path: Path, arguments: list[str], message: str
) -> None:
    meant = {"DATA": tasks.data, "PACK": tasks.shapes, "OUT": tmp_path / "out"}
    words: list[object] = [meant.get(word, word) for word in arguments]
    if arguments[0] == "train":
        words += ["--backbone", tasks.spec, "--method", "lora", "--img-size", 32, "-o", tmp_path / "a.pet"]

    assert refused(3, *words) == message
