"""A network of one's own goes through every verb: trained, merged, exported, verified, judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import edgepet
from edgepet import Backbone, ExportOptions, Preprocess
from edgepet.errors import InputError
from edgepet.graphs.base import open_graph
from edgepet.proving.in_torch import plain_network
from edgepet.proving.subject import Subject
from edgepet.reports.screen import lines
from edgepet.tuning.model import logits_of
from edgepet.verbs.methods import VERB, methods
from tests.flow import Tasks, has_openvino
from tests.tiny import seeded

FORMATS = ("onnx", "openvino") if has_openvino else ("onnx",)


class TwoPaths(nn.Module):
    """Nothing that timm has: two convolutions side by side, one gating the other, and a norm that is called as one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.gate, self.value = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.out = nn.Linear(16, 24)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(images)))
        x = self.norm(self.value(x) * torch.sigmoid(self.gate(x)) + x)
        return self.out(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Backbone:
    return Backbone.from_module(
        seeded(TwoPaths(), 3), name="two-paths", preprocess=Preprocess(image_size=(32, 32)), licence="CC0-1.0"
    )


@pytest.fixture(scope="module", params=["ssf", "lora", "consolidator", "full"])
def pack(
    request: pytest.FixtureRequest, network: Backbone, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    method: str = request.param
    pack = tmp_path_factory.mktemp(method) / "shapes.pet"
    report = edgepet.train(tasks.data, network, method, pack, epochs=2, batch_size=8, precision="fp32")
    assert report.backbone.name == "module:two-paths"
    assert report.algebra_max_abs <= report.algebra_limit
    return pack


def test_every_format_answers_as_the_tuned_network(pack: Path, network: Backbone, tmp_path: Path) -> None:
    report = edgepet.export([pack], tmp_path, backbone=network, options=ExportOptions(to=FORMATS))

    assert [(row.verified, row.parity and row.parity.against) for row in report.artifacts] == [(True, "tuned")] * len(
        FORMATS
    )
    assert edgepet.verify(report.artifacts[0].path).ok


def test_merged_weights_load_strictly_into_the_network_with_a_head(
    pack: Path, network: Backbone, tmp_path: Path
) -> None:
    report = edgepet.merge(pack, tmp_path / "merged.safetensors", backbone=network)

    plain = nn.Sequential()
    plain.add_module("backbone", TwoPaths())
    plain.add_module("head", nn.Linear(24, 3))
    plain.load_state_dict(safetensors.torch.load_file(report.path), strict=True)
    images = Subject(pack, network, None).images[0]
    assert np.array_equal(
        logits_of(plain.eval(), images), logits_of(plain_network(Subject(pack, network, None)), images)
    )
    assert report.loads_into == "Sequential(OrderedDict(backbone=yours, head=Linear(24, 3)))"


def test_a_device_runs_the_pack_without_the_network(
    pack: Path, network: Backbone, tasks: Tasks, tmp_path: Path
) -> None:
    edgepet.export([pack], tmp_path, backbone=network)

    report = edgepet.evaluate(pack, tasks.data)

    assert report.runtime == "onnxruntime"
    assert open_graph(network.fingerprint, network.preprocess).backbone == "module:two-paths"
    assert report.top1 == edgepet.evaluate(pack, tasks.data, runtime="torch", backbone=network).top1


def test_what_needs_the_network_says_how_to_give_it(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        edgepet.merge(pack, tmp_path / "merged.safetensors")

    assert str(refusal.value) == (
        "module:two-paths: is a module of its user's own and cannot be built from its name\n"
        "  fix: in Python pass backbone=Backbone.from_module(...)"
    )


def test_a_method_whose_defaults_do_not_suit_a_network_is_listed_with_the_reason(network: Backbone) -> None:
    report = methods(network)

    (row,) = (each for each in report.methods if each.name == "uni-lora")
    needs = "uni-lora: needs factors of 2000 (d) to 4194304 values in all, got 1184"
    assert (row.trainable_params, row.fp16_bytes, row.reason) == (0, 0, needs)
    assert all(each.reason is None for each in report.methods if each.name != "uni-lora")
    assert lines(f"  {needs}") in tuple(VERB.screen(report))
