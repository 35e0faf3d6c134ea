"""The proofs on real weights and real images, for every method with trained values. Slow: minutes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from edgepet import ExportOptions, export, merge, read_pack, train, write_pack
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.files import sha256_file
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_set, open_split
from edgepet.measuring.parity import compare
from edgepet.methods.method import unflatten
from edgepet.networks.merged import merged_logits
from edgepet.packs.pack import Codec
from edgepet.proving.in_torch import tuned_network
from edgepet.proving.subject import Subject
from edgepet.samples.tasks import build_task
from edgepet.tuning.model import logits_of
from edgepet.verbs.calibrate import share
from edgepet.verbs.train import TrainReport

pytestmark = pytest.mark.slow

IMAGE_SIZE = 112
# ViT: the papers' formulas. Lite0's 49 convolutions and its 49 batch norms put out 21,008 channels each: SSF has four
# values for every one. LoRA has rank * (inputs + outputs) for each of the 33 dense convolutions, Consolidator the
# blocks and shifts of the 32 whose sides share a divisor of 8.
PARAMETERS = {
    ("demo:vit-small", "ssf"): 102_912,
    ("demo:vit-small", "lora"): 147_456,
    ("demo:vit-small", "consolidator"): 96_768,
    ("demo:efficientnet-lite0", "ssf"): 4 * 21_008,
    ("demo:efficientnet-lite0", "lora"): 182_744,
    ("demo:efficientnet-lite0", "consolidator"): 39_920,
}
VIT = [case for case in PARAMETERS if case[0] == "demo:vit-small"]
ARCHITECTURES = {"demo:vit-small": "vit_small_patch14_dinov2", "demo:efficientnet-lite0": "tf_efficientnet_lite0"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    build_task("digits", folder, test_cap=100)
    return folder


@pytest.fixture(scope="module", params=list(PARAMETERS), ids=" ".join)
def trained(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainReport:
    backbone, method = request.param
    pack = tmp_path_factory.mktemp(method) / f"{method}.pet"
    # Ten steps leave SSF on Lite0 with logits of hundreds: its random shifts stand before batch norms of tiny variance.
    # A pack in fp16 of such a network is beyond its limit, and is refused by export and merge.
    codec: Codec = "fp32" if backbone == "demo:efficientnet-lite0" else "fp16"
    return train(digits, backbone, method, pack, image_size=IMAGE_SIZE, epochs=2, shots=16, codec=codec)


def test_lowering_is_exact_in_float64(trained: TrainReport) -> None:
    assert trained.trainable_params == PARAMETERS[trained.backbone.name, trained.method]
    assert read_pack(trained.pack).delta.stored_values == trained.trainable_params
    assert trained.algebra_max_abs <= trained.algebra_limit


def test_training_moved_the_backbone(trained: TrainReport) -> None:
    subject = Subject(trained.pack, None, None)
    images, _ = subject.images
    plain = subject.backbone.module(torch.from_numpy(images)).detach().numpy()
    merged = merged_logits(subject.backbone, subject.delta, images)

    assert np.abs(merged - subject.delta.head(plain)).max() > 1e-2  # or a merge that does nothing would pass


@pytest.mark.parametrize("codec", ["fp32", "fp16"])
def test_the_pack_as_stored_answers_as_the_tuned_network_did(trained: TrainReport, codec: str, digits: Path) -> None:
    subject = Subject(trained.pack, None, None)
    network = tuned_network(subject)
    images = normalize(load_set(open_split(digits, "test"), subject.delta.preprocess)[0], subject.delta.preprocess)
    exact = trained.pack.with_name(f"{codec}.pet")
    lowered = network.method.lower(
        subject.backbone.tensors, network.sites, unflatten(subject.work.tensors, network.sites)
    )
    write_pack(exact, replace(subject.delta, updates=lowered, head=subject.work.head), codec=codec)
    stored = read_pack(exact).delta

    parity = compare(
        logits_of(network, images), merged_logits(subject.backbone, stored, images),
        stored=codec, inputs="data", against="tuned",
    )  # fmt: skip

    assert parity.ok, parity


def test_every_export_is_within_its_limit_and_tensorrt_says_it_was_not_run(
    trained: TrainReport, tmp_path: Path
) -> None:
    report = export([trained.pack], tmp_path, options=ExportOptions(to=("onnx", "openvino", "tensorrt")))

    onnx, openvino, tensorrt = report.artifacts
    assert (onnx.verified, openvino.verified) == (True, True)
    assert onnx.parity is not None
    assert onnx.parity.against == "tuned"
    assert tensorrt.engine == "tensorrt-rtx"
    sidecar = json.loads((tensorrt.path / "model.engine.json").read_bytes())
    assert sidecar["sms"] == [86, 89, 120]
    if not tensorrt.verified:
        assert tensorrt.reason == (
            "not run: no CUDA driver here: the engine's bytes and container were read, execution was not run"
        )


@pytest.mark.parametrize("trained", VIT, indirect=True, ids=" ".join)
def test_an_fp16_export_takes_half_the_bytes_and_stays_within_its_limit(trained: TrainReport, tmp_path: Path) -> None:
    whole = export([trained.pack], tmp_path, options=ExportOptions(to=("onnx",)))
    half = export(
        [trained.pack], tmp_path, options=ExportOptions(to=("onnx", "openvino", "tensorrt"), precision="fp16")
    )

    onnx, openvino, tensorrt = half.artifacts
    assert (onnx.verified, openvino.verified) == (True, True)
    assert 0.47 < onnx.size_bytes / whole.artifacts[0].size_bytes < 0.53  # batch norms are folded away
    assert tensorrt.executed["layers_by_output_type"]["half"] > 0
    assert [node for node in onnx.kept_fp32 if node.forced] == []


INT8 = [*(case for case in VIT if case[1] != "consolidator"), ("demo:efficientnet-lite0", "lora")]


@pytest.mark.parametrize("trained", INT8, indirect=True, ids=" ".join)
def test_int8_is_a_quarter_of_the_bytes_alone_and_on_codes_that_no_task_changes(
    trained: TrainReport, digits: Path, tmp_path: Path
) -> None:
    options = ExportOptions(
        to=("onnx", "openvino", "tensorrt"), precision="int8", calib=digits, calib_images=64, max_drop=2.0
    )
    whole = export([trained.pack], tmp_path, options=ExportOptions(to=("onnx",))).artifacts[0].size_bytes
    graph = int8_graph(Subject(trained.pack, None, None).graph)
    codes = sha256_file(graph.codes_path)

    onnx, openvino, tensorrt = export([trained.pack], tmp_path, options=options).artifacts
    # LoRA on shared codes is rounded twice; two epochs on a ConvNet do not survive it, and a budget would say so.
    budget = None if trained.backbone.name == "demo:efficientnet-lite0" else 2.0
    shared = share(trained.pack, digits, tmp_path / "shared.pet", images=64, max_drop=budget)

    assert (onnx.verified, openvino.verified) == (True, True)
    assert 0.24 < onnx.size_bytes / whole < 0.32
    assert openvino.executed["layers"]["int8"] >= 49
    assert tensorrt.executed["layers_by_output_type"]["int8"] > 0
    assert sha256_file(graph.codes_path) == codes == shared.codes_sha256
    assert (shared.own_codes_bytes == 0) == (trained.method == "ssf")
    assert {run.runtime for run in shared.runs} == {"onnxruntime", "openvino"}


def test_merged_weights_load_strictly_into_plain_timm(trained: TrainReport, tmp_path: Path) -> None:
    import timm

    report = merge(trained.pack, tmp_path / "merged.safetensors")
    model = timm.create_model(ARCHITECTURES[trained.backbone.name], num_classes=10, **report.create_args)

    result = model.load_state_dict(safetensors.torch.load_file(report.path), strict=True)

    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert report.max_abs_diff <= report.limit
