"""Boxes as exported models: named outputs, compared by matching, and what is refused."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgepet
from edgepet.device.artifact import MANIFEST, open_artifact, read_artifact
from edgepet.device.onnxruntime import open_model
from edgepet.errors import CheckError
from edgepet.exporters.trace import base_graph, keep_weights
from edgepet.measuring.parity import compare, require_parity
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import EVERY, read_pack
from edgepet.spec import NpArray
from edgepet.tuning.dense import MergedHead
from tests.box_folders import coco_folder
from tests.box_packs import LABELS, box_delta, require_same_boxes
from tests.flow import edgepet as command
from tests.flow import has_openvino
from tests.mask_packs import mask_backbone, mask_pack

FORMATS = ["onnx", *(["openvino"] if has_openvino else [])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of boxes, exported in fp32 and fp16, and data/ of boxes."""
    folder = tmp_path_factory.mktemp("export")
    backbone = mask_backbone(folder)
    keep_weights(backbone)
    delta = box_delta(backbone, "ssf", task="things")
    base_graph(backbone, delta.branches)
    mask_pack(folder / "things.pet", backbone, delta)
    coco_folder(folder / "data", train=4, val=6, test=2, size=(48, 64))
    for precision in ("fp32", "fp16"):
        said = command(
            "export", folder / "things.pet", "--backbone", f"test_vit@{folder / 'test_vit-5.safetensors'}", "--to",
            ",".join(FORMATS), "--precision", precision, "--data", folder / "data", "-o", folder / "out", "--json", "--quiet",
        )  # fmt: skip
        assert said.code == 0, said.err
    return folder


def images(count: int = 3) -> NpArray:
    return np.random.default_rng(7).standard_normal((count, 3, 64, 64), dtype=np.float32)


@pytest.fixture(scope="module")
def backbone(place: Path) -> Backbone:
    return mask_backbone(place)


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_model_puts_out_boxes_by_their_names(name: str, place: Path, backbone: Backbone) -> None:
    folder = place / f"out/things-{name}-fp32"
    artifact = read_artifact(folder)
    expected = MergedHead(backbone, read_pack(place / "things.pet", answers=EVERY).delta)(images())

    runner = open_artifact(folder, artifact, threads=1)
    found, boxes, scores, labels = runner.outputs(images())

    assert (artifact.answer, artifact.labels) == ("boxes", LABELS)
    assert (boxes.shape, scores.shape, labels.shape) == ((3, 84, 4), (3, 84), (3, 84))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate([boxes, scores[:, :, None], labels[:, :, None]], axis=2), found)
    for one, other in zip(found, expected, strict=True):
        require_same_boxes(one, other)
    if name == "onnx":
        model = onnx.load(str(folder / "model.onnx"))
        assert [each.name for each in model.graph.output] == ["found", "boxes", "scores", "labels"]
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", FORMATS)
def test_verify_matches_boxes_again(name: str, precision: str, place: Path) -> None:
    folder = place / f"out/things-{name}-{precision}"
    said = command(
        "verify", folder, "--data", place / "data", "--backbone", f"test_vit@{place / 'test_vit-5.safetensors'}", "--json",
        "--quiet",
    )  # fmt: skip

    assert said.code == 0, said.err
    names = [each["name"] for each in said.json["checks"]]
    assert names[-2:] == ["probe", "data boxes"]
    parity = read_artifact(folder).parity
    assert parity is not None
    assert parity.boxes
    assert parity.n > 20
    assert parity.top1_agreement >= parity.least_agreement == {"fp32": 0.999, "fp16": 0.99}[precision]


def test_an_exported_model_is_judged_and_asked_as_its_pack(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="the package faster-coco-eval is not installed")
    folder, data = place / "out/things-onnx-fp32", place / "data"
    judged: list[Any] = [edgepet.evaluate(model, data) for model in (folder, place / "things.pet")]
    asked = [
        command("predict", model, data / "images/test", "--json", "--quiet").json["results"][0]["tasks"]["things"]
        for model in (folder, place / "things.pet")
    ]

    assert judged[0].value == pytest.approx(judged[1].value, abs=1e-3)
    assert [each["label"] for each in asked[0]["boxes"]] == [each["label"] for each in asked[1]["boxes"]]
    assert len(asked[0]["boxes"]) > 3


def test_a_model_that_finds_others_is_refused(place: Path) -> None:
    folder = place / "out/things-onnx-fp32"
    found = open_model(onnx.load(str(folder / "model.onnx"))).run(["found"], {"images": images()})[0]
    moved = found + np.array([2, 0, 2, 0, 0, 0], np.float32)

    shuffled = compare(found, found[:, ::-1], stored="fp32", inputs="data", against="merged")
    apart = compare(found, moved, stored="fp32", inputs="data", against="merged")

    assert shuffled.ok
    assert not apart.ok
    with pytest.raises(CheckError) as error:
        require_parity(apart, "things-onnx-fp32")
    assert "must answer as the merged network does, within 1.0e-03 on scores and with 99.9% equal answers" in str(
        error.value
    )
    assert "boxes (data)" in str(error.value)
    assert not compare(found, found * np.nan, stored="fp32", inputs="data", against="merged").ok


def test_a_sliver_that_rounding_moves_is_the_same_box() -> None:
    sliver = np.array([[[20.0, 56.0, 28.0, 56.05, 0.5, 1.0], [0.0, 0.0, 8.0, 8.0, 0.01, 0.0]]], np.float32)
    moved, away = sliver.copy(), sliver.copy()
    moved[0, 0, 3] += 0.02
    away[0, 0, 3] += 0.2

    assert compare(sliver, moved, stored="fp16", inputs="data", against="merged").ok
    assert not compare(sliver, moved, stored="fp32", inputs="data", against="merged").ok
    assert not compare(sliver, away, stored="fp16", inputs="data", against="merged").ok


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the package tensorrt-rtx is not installed")
def test_tensorrt_rtx_builds_a_detector(place: Path, tmp_path: Path) -> None:
    said = command(
        "export", place / "things.pet", "--backbone", f"test_vit@{place / 'test_vit-5.safetensors'}", "--to", "tensorrt",
        "--precision", "fp16", "-o", tmp_path, "--json", "--quiet",
    )  # fmt: skip

    assert said.code == 0, said.err
    assert (tmp_path / "things-tensorrt-fp16" / MANIFEST).is_file()
    assert (tmp_path / "things-tensorrt-fp16/model.engine.json").read_text().count('"name":"labels"') == 1
