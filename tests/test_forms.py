"""Networks made to be re-parameterised are tuned, merged and exported without the branches of their training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from edgepet.deltas.delta import Score
from edgepet.errors import CheckError
from edgepet.exporters.trace import keep_weights
from edgepet.graphs.base import WEIGHTS
from edgepet.methods import LoRA
from edgepet.networks.backbone import Backbone
from edgepet.networks.forms import without_branches
from edgepet.networks.loading import load_backbone
from edgepet.packs.pack import write_pack
from edgepet.proving.subject import Subject
from edgepet.tuning.model import TunedModel, extract, logits_of
from edgepet.verbs.merge import merge
from tests.tiny import perturb, random_images, seeded

BRANCHED = {  # timm's name -> whether it is among the fast
    "repghostnet_050": True,  # its branch is a batch norm alone
    "mobileone_s0": False,
    "repvit_m1": False,  # two classifiers, a batch norm in front of each
    "repvgg_a0": False,
    "fastvit_t8": False,
    "lcnetv2_small": False,
    "ghostnetv3_050": False,
}
PARAMS = [pytest.param(name, marks=() if fast else pytest.mark.slow, id=name) for name, fast in BRANCHED.items()]


def stored(state: Mapping[str, torch.Tensor], file: Path) -> Path:
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, file)
    return file


@pytest.fixture(scope="module", params=PARAMS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The name of a network, its weights as trained, and those of timm's inference form of it."""
    folder = tmp_path_factory.mktemp("forms")
    module = seeded(timm.create_model(request.param, pretrained=False, num_classes=3), 7).eval()
    fused = reparameterize_model(module)
    return (
        request.param,
        stored(module.state_dict(), folder / "a.pth.safetensors"),
        stored(fused.state_dict(), folder / "b.safetensors"),
    )


@pytest.fixture(scope="module")
def backbone(files: tuple[str, Path, Path]) -> Backbone:
    return load_backbone(f"{files[0]}@{files[1]}", image_size=64)


def test_branches_are_summed_exactly_and_the_backbone_says_so(
    files: tuple[str, Path, Path], backbone: Backbone
) -> None:
    trained = load_backbone(f"{files[0]}@{files[1]}", image_size=64, keep_branches=True)

    assert (backbone.fused, trained.fused) == (True, False)
    assert backbone.native_bytes < trained.native_bytes
    assert backbone.description == (
        f"timm {files[0]}, whose branches for training are summed into one kernel each (timm's reparameterize_model)"
    )
    images = random_images(4, 2, 64)
    exact = logits_of(copy.deepcopy(trained.module).double(), images.astype(np.float64))
    apart, rounded = (np.abs(logits_of(each.module, images) - exact).max() for each in (backbone, trained))
    # Seeded weights let a GhostNet answer 1e10 in float32, and as much apart from itself in float64.
    assert apart <= max(1e-4 * np.abs(exact).max(), 2 * rounded)


def test_weights_of_the_inference_form_are_taken_with_their_classifier(
    files: tuple[str, Path, Path], backbone: Backbone
) -> None:
    fused = load_backbone(f"{files[0]}@{files[2]}", image_size=64)

    assert fused.fused
    assert fused.native.keys() == backbone.native.keys()
    for name, tensor in fused.native.items():  # timm summed them in float32
        assert np.allclose(tensor, backbone.native[name], rtol=1e-3, atol=1e-3 * float(np.abs(tensor).max())), name


def test_a_backbone_that_is_kept_comes_back_to_the_bit(
    files: tuple[str, Path, Path], backbone: Backbone, tmp_path: Path
) -> None:
    keep_weights(backbone, tmp_path)

    again = load_backbone(f"{files[0]}@{tmp_path / WEIGHTS}", image_size=64)
    assert (again.fused, again.fingerprint) == (True, backbone.fingerprint)


def pack_of(backbone: Backbone, folder: Path) -> Path:
    model = perturb(TunedModel(backbone, LoRA(rank=2), 3, seed=1), seed=3, by=0.02)
    delta = extract(model, backbone, task="flowers", labels=tuple("abc"), val=Score(top1=1.0, n=3))
    write_pack(folder / "flowers.pet", delta, codec="fp32")
    return folder / "flowers.pet"


def test_merged_weights_load_strictly_into_timms_inference_form(
    files: tuple[str, Path, Path], backbone: Backbone, tmp_path: Path
) -> None:
    pack = pack_of(backbone, tmp_path)

    report = merge(pack, tmp_path / "merged.safetensors", backbone=backbone)

    spelled = f'timm.utils.reparameterize_model(timm.create_model("{files[0]}", num_classes=3).eval())'
    assert report.loads_into == spelled
    network = reparameterize_model(timm.create_model(files[0], num_classes=3).eval())
    network.load_state_dict(safetensors.torch.load_file(report.path), strict=True)
    subject = Subject(pack, backbone, None)
    expected = subject.merged_reference
    assert np.abs(logits_of(network, subject.images[0]) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_pack_from_before_branches_were_summed_finds_its_backbone(
    files: tuple[str, Path, Path], tmp_path: Path
) -> None:
    spec = f"{files[0]}@{files[1]}"
    trained = load_backbone(spec, image_size=64, keep_branches=True)

    found = Subject(pack_of(trained, tmp_path), spec, None).backbone

    assert (found.fused, found.fingerprint) == (False, trained.fingerprint)


class Wrong(nn.Module):
    """Two convolutions whose sum is taken for the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + (0 if self.two is None else self.two(x))

    def reparameterize(self) -> None:
        self.two = None  # type: ignore[assignment]


class Network(nn.Module):
    def __init__(self, part: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.pretrained_cfg: dict[str, Any] = {"input_size": (3, 8, 8)}
        self.part = part()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x).mean((2, 3))


def test_a_form_that_answers_otherwise_is_refused() -> None:
    with pytest.raises(CheckError) as refused:
        without_branches(seeded(Network(Wrong), 3), "net")

    said = str(refused.value)
    assert said.startswith("net: its branches, summed into one kernel, must answer as they do, within ")


def test_a_network_without_a_form_of_inference_stays_as_it_is() -> None:
    assert without_branches(seeded(Network(lambda: nn.Conv2d(3, 4, 3)), 3), "net") is None


@pytest.mark.slow  # ten seconds
@pytest.mark.parametrize("name", ["efficientvit_m0", "levit_128s", "tiny_vit_5m_224", "shvit_s1", "nextvit_small"])
def test_a_network_of_which_only_norms_would_be_folded_stays_as_it_is(name: str, tmp_path: Path) -> None:
    module = seeded(timm.create_model(name, pretrained=False, num_classes=5), 7).eval()
    trained = load_backbone(f"{name}@{stored(module.state_dict(), tmp_path / 'a.safetensors')}")
    fused = load_backbone(f"{name}@{stored(reparameterize_model(module).state_dict(), tmp_path / 'b.safetensors')}")

    assert (trained.fused, fused.fused) == (False, True)
    assert trained.create_args == fused.create_args
    images = random_images(4, 1, trained.preprocess.image_size[0])
    expected = logits_of(trained.module, images)
    assert np.abs(logits_of(fused.module, images) - expected).max() <= 1e-4 * np.abs(expected).max()
