"""Tasks of masks exported: one file with logits and a mask, compared by pixels, in every format and precision."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgepet
from edgepet.canonical import canonical_json
from edgepet.deltas.heads import mask_of
from edgepet.device.artifact import Artifact, open_artifact, read_artifact, write_artifact
from edgepet.device.store import Store
from edgepet.device.tensorrt import read_sidecar
from edgepet.errors import CheckError, InputError
from edgepet.exporters.exporter import ExportOptions
from edgepet.exporters.trace import base_graph
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.checks import check_probe, prove
from edgepet.proving.subject import Subject
from edgepet.tuning.dense import MergedHead
from tests.flow import edgepet as command
from tests.flow import has_openvino, needs_tensorrt_rtx
from tests.mask_folders import index_folder
from tests.mask_packs import LABELS, mask_backbone, mask_delta, mask_pack
from tests.tiny import random_images

FORMATS = ("onnx", *(["openvino"] if has_openvino else []))
HEAD = Form(width=8, depthwise=True, norm=True, separation=True)  # layers of nearly every kind
MADE = [(name, precision) for name in FORMATS for precision in ("fp32", "fp16")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ssf.pet``, its artefacts in ``out``, and data/ of images with masks."""
    folder = tmp_path_factory.mktemp("export")
    backbone = mask_backbone(folder)
    base_graph(backbone)
    mask_pack(folder / "ssf.pet", backbone, mask_delta(backbone, "ssf", form=HEAD))
    index_folder(folder / "data", train=2, val=4, test=3, size=(40, 48))
    for precision in ("fp32", "fp16"):
        edgepet.export([folder / "ssf.pet"], folder / "out", options=ExportOptions(to=FORMATS, precision=precision))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def backbone(place: Path) -> Backbone:
    return mask_backbone(place)


def in_torch(place: Path, backbone: Backbone, images: Any) -> Any:
    return MergedHead(backbone, read_pack(place / "ssf.pet", answers=EVERY).delta)(images)


@pytest.mark.parametrize(("name", "precision"), MADE)
def test_an_artefact_gives_logits_and_a_mask(name: str, precision: str, place: Path, backbone: Backbone) -> None:
    folder = place / f"out/ssf-{name}-{precision}"
    artifact, images = read_artifact(folder), random_images(4, 5, 64)
    expected = in_torch(place, backbone, images)

    runner = open_artifact(folder, artifact, threads=1)
    logits, mask = runner.outputs(images)
    alone = runner(images)
    runner.close()

    assert artifact.verified
    assert (artifact.answer, artifact.labels) == ("mask", LABELS)
    assert artifact.parity is not None
    assert (artifact.parity.places, artifact.parity.n) == (True, 8 * 4 * 4)
    assert np.array_equal(alone, logits)
    limit, least = {"fp32": (1e-4, 0.999), "fp16": (2e-2, 0.99)}[precision]
    assert np.abs(logits - expected).max() <= limit * np.abs(expected).max()
    assert (mask.dtype, mask.shape) == (np.uint8, (5, 64, 64))
    assert (mask == mask_of(expected, (64, 64))).mean() >= least


@pytest.mark.parametrize(("name", "precision"), MADE)
def test_verify_and_eval_take_an_artefact_of_masks(name: str, precision: str, place: Path) -> None:
    folder = place / f"out/ssf-{name}-{precision}"

    verified: Any = command("verify", folder, "--data", place / "data", "--json", "--quiet").json
    judged: Any = command("eval", folder, place / "data", "--json", "--quiet").json
    packed: Any = command("eval", place / "ssf.pet", place / "data", "--runtime", "torch", "--json", "--quiet").json

    assert [each["name"] for each in verified["checks"]] == ["files", "probe", "data pixels"]
    assert verified["ok"]
    assert verified["checks"][2]["limit"] == pytest.approx(0.001 if precision == "fp32" else 0.01)
    assert judged["metric"] == "miou"
    assert judged["value"] == pytest.approx(packed["value"], abs=1e-6 if precision == "fp32" else 0.01)
    assert [each["name"] for each in judged["classes"]] == list(LABELS)


def test_the_file_says_what_it_answers(place: Path) -> None:
    model = onnx.load(str(place / "out/ssf-onnx-fp32/model.onnx"))
    onnx.checker.check_model(model, full_check=True)

    told = {entry.key: entry.value for entry in model.metadata_props}
    outputs = {
        each.name: [side.dim_param or side.dim_value for side in each.type.tensor_type.shape.dim]
        for each in model.graph.output
    }
    assert told["edgepet.answer"] == "mask"
    assert json.loads(told["edgepet.labels"]) == list(LABELS)
    assert outputs == {"logits": ["batch", 3, 4, 4], "mask": ["batch", 64, 64]}
    assert not [tensor.name for tensor in model.graph.initializer if tensor.data_location == tensor.EXTERNAL]


def test_an_artefact_is_read_as_it_was_written(place: Path, tmp_path: Path) -> None:
    folder = place / "out/ssf-onnx-fp32"
    write_artifact(tmp_path, read_artifact(folder))

    assert (tmp_path / "artifact.json").read_bytes() == (folder / "artifact.json").read_bytes()
    manifest = json.loads((folder / "artifact.json").read_text())
    assert (manifest["answer"], manifest["outputs"]) == ("mask", ["logits", "mask"])
    assert len(canonical_json(manifest["probe"])) < 1000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": "text"}, "artifact.json.answer: needs one of mask, boxes, labels, got 'text'"),
        ({"outputs": ["mask"]}, "artifact.json.outputs: needs logits, mask"),
    ],
)
def test_an_artefact_that_says_otherwise_is_refused(change: dict[str, object], told: str, place: Path, tmp_path: Path) -> None:  # fmt: skip
    manifest = json.loads((place / "out/ssf-onnx-fp32/artifact.json").read_text())
    (tmp_path / "artifact.json").write_bytes(canonical_json({**manifest, **change}))

    with pytest.raises(InputError) as error:
        read_artifact(tmp_path)
    assert told in str(error.value)


def probed(artifact: Artifact, **changes: Any) -> Artifact:
    places = artifact.probe.places
    assert places is not None
    return replace(artifact, probe=replace(artifact.probe, places=replace(places, **changes)))


def test_other_labels_of_places_are_told_by_pixels(place: Path) -> None:
    folder = place / "out/ssf-onnx-fp32"
    artifact = read_artifact(folder)
    runner = open_artifact(folder, artifact)
    got = runner(artifact.probe.images(artifact.preprocess))
    assert artifact.probe.places is not None
    other = artifact.probe.places.labels.copy()
    other[0, 0, 0] = (other[0, 0, 0] + 1) % 3

    assert check_probe(artifact, got).ok
    said = check_probe(probed(artifact, labels=other), got)
    moved = check_probe(artifact, got + 0.01 * np.abs(got).max())

    assert (said.name, said.ok, said.value) == ("probe pixels", False, 1 / (4 * 4 * 4))
    assert (moved.name, moved.ok) == ("probe", False)


def test_a_mask_that_is_not_that_of_the_logits_fails(place: Path) -> None:
    """The second output is what people use: it is compared as the first is."""

    class Turned:
        runtime, executed, evidence = "onnxruntime", "fp32", {}

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, images: Any) -> Any:
            return self.inner(images)

        def outputs(self, images: Any) -> Any:
            logits, mask = self.inner.outputs(images)
            return [logits, np.swapaxes(mask, 1, 2)]

        def close(self) -> None:
            self.inner.close()

    folder = place / "out/ssf-onnx-fp32"
    artifact = read_artifact(folder)

    with pytest.raises(CheckError) as error:
        prove(
            Subject(place / "ssf.pet", None, None, answers=EVERY),
            artifact,
            Turned(open_artifact(folder, artifact)),
            where="out",
        )  # type: ignore[arg-type]
    assert str(error.value).startswith("out: must give masks with 99.9% equal pixels, got ")


def test_an_export_is_compared_on_images_that_have_masks(place: Path, tmp_path: Path) -> None:
    said = command("export", place / "ssf.pet", "--data", place / "data", "-o", tmp_path, "--json", "--quiet")

    assert said.code == 0, said.err
    (made,) = said.json["artifacts"]
    assert made["parity"]["inputs"] == "data"
    assert made["parity"]["places"] is True
    assert made["parity"]["top1_agreement"] >= 0.999


@needs_tensorrt_rtx
def test_tensorrt_builds_an_engine_with_both_outputs(place: Path, tmp_path: Path) -> None:
    edgepet.export([place / "ssf.pet"], tmp_path, options=ExportOptions(to=("tensorrt",), sms=(89,)))

    sidecar = read_sidecar(tmp_path / "ssf-tensorrt-fp32")
    assert [(each.name, each.dtype, each.shape) for each in sidecar.outputs] == [
        ("logits", "float32", (-1, 3, 4, 4)), ("mask", "uint8", (-1, 64, 64)),
    ]  # fmt: skip


def test_an_artefact_of_masks_is_copied_with_all_it_needs(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out/ssf-onnx-fp32", tmp_path / "there")

    said: Any = command("predict", tmp_path / "there", place / "data/images/test/000.png", "--masks", tmp_path / "m", "--json", "--quiet").json  # fmt: skip

    assert said["results"][0]["tasks"]["ssf"]["mask"] == str(tmp_path / "m/000.png")


# ---------------------------------------------------------------------------------------------------------- codings


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_pack_of_masks_is_coded_and_still_answers(
    codec: Any, place: Path, backbone: Backbone, tmp_path: Path
) -> None:
    report = edgepet.pack(place / "ssf.pet", tmp_path / "small.pet", codec=codec, data=place / "data")
    coded = read_pack(tmp_path / "small.pet", answers=EVERY)
    images = random_images(4, 3, 64)

    expected, got = in_torch(place, backbone, images), MergedHead(backbone, coded.delta)(images)

    assert report.bytes < (place / "ssf.pet").stat().st_size
    assert coded.planes["head.point.weight"].stored.coding.format == codec
    assert (report.metric, report.top1_drop, report.n) == ("miou", None, 4)
    assert report.drop is not None
    assert report.drop.low <= report.drop.points <= report.drop.high
    assert 0 < np.abs(got - expected).max() <= {"int8": 0.05, "int4": 0.8}[codec] * np.abs(expected).max()
    assert coded.delta.probes["fp32"].logits.shape == (4, 3)
    store = Store(tmp_path / "store")
    store.add_graph(base_graph(backbone))
    edgepet.Device(tmp_path / "store").install(tmp_path / "small.pet")


def test_the_smallest_codings_of_masks_hold_a_budget_of_miou(place: Path, tmp_path: Path) -> None:
    told: Any = command(
        "pack", place / "ssf.pet", "--codec", "auto", "--max-drop", "1", "--data", place / "data", "-o", tmp_path / "small.pet",
        "--json", "--quiet",
    )  # fmt: skip

    assert told.code == 0, told.err
    assert told.json["drop"]["points"] <= 1
    assert told.json["bytes"] < (place / "ssf.pet").stat().st_size
    assert told.json["metric"] == "miou"


def test_a_pack_of_masks_is_written_again_as_it_is(place: Path, tmp_path: Path) -> None:
    edgepet.pack(place / "ssf.pet", tmp_path / "again.pet", sequence=7)

    assert read_pack(tmp_path / "again.pet", answers=EVERY).sequence == 7
    edgepet.pack(tmp_path / "again.pet", tmp_path / "same.pet", sequence=0)
    assert (tmp_path / "same.pet").read_bytes() == (place / "ssf.pet").read_bytes()
