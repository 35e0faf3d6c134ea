"""Shifts in front of a batch norm are learnt in that norm's deviations: a small one is not drowned by its start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from edgepet.images.preprocess import normalize
from edgepet.methods import RLRR, SSF, BitFit, Consolidator, GLoRA
from edgepet.methods.method import flatten
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.spec import NpArray
from edgepet.tuning.model import TunedModel, logits_of
from tests.tiny import random_pixels, seeded

SMALLER = 2.0**-7


def resnet(folder: Path, *, scaled: float) -> Backbone:
    """Every convolution's weight times ``scaled``, and its batch norm's mean and deviation too: the same function."""
    module = seeded(timm.create_model("test_resnet", pretrained=False, num_classes=0), 5)
    state = module.state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 4 or name.endswith("running_mean"):
            tensor.mul_(scaled)
        elif name.endswith("running_var"):
            tensor.mul_(scaled**2)
    for norm in (each for each in module.modules() if isinstance(each, torch.nn.BatchNorm2d)):
        norm.eps *= scaled**2
    file = folder / f"resnet{scaled}.safetensors"
    safetensors.torch.save_file(state, file)
    backbone = load_backbone(f"test_resnet@{file}", image_size=32)
    for norm in (each for each in backbone.module.modules() if isinstance(each, torch.nn.BatchNorm2d)):
        norm.eps *= scaled**2
    return backbone


def features(backbone: Backbone) -> NpArray:
    """What SSF's start makes of four images."""
    model = TunedModel(backbone, SSF(), backbone.width).eval()
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(backbone.width))
    return logits_of(model, normalize(random_pixels(0, 4), backbone.preprocess))


def test_a_start_is_the_same_whatever_a_convolutions_outputs_are_counted_in(tmp_path: Path) -> None:
    large, small = features(resnet(tmp_path, scaled=1.0)), features(resnet(tmp_path, scaled=SMALLER))

    # an epsilon of 1e-5 is 16 % of the smallest variance here, and moves some units by a power of two
    assert np.abs(large - small).max() < 0.1 * np.abs(large).max()


def test_without_units_the_same_start_drowns_the_smaller_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SSF, "units", lambda self, sites, base: {})

    large, small = features(resnet(tmp_path, scaled=1.0)), features(resnet(tmp_path, scaled=SMALLER))

    assert np.abs(large - small).max() > np.abs(large).max()


def test_a_unit_is_the_power_of_two_nearest_to_the_deviation(tmp_path: Path) -> None:
    backbone = resnet(tmp_path, scaled=SMALLER)
    sites = SSF().sites(backbone.layers)
    units = SSF().units(sites, backbone.tensors)
    before = [site for site in sites if site.mean is not None]

    assert len(before) == len(units) > 4
    for site in before:
        deviation = np.sqrt(backbone.tensors[str(site.mean).replace("running_mean", "running_var")] + 1e-5)
        unit = units[site.name]["beta"]
        mantissa, _ = np.frexp(unit)
        assert (mantissa == 0.5).all()
        assert (np.abs(np.log2(unit / deviation)) <= 0.5 + 1e-6).all()


@pytest.mark.parametrize("method", [SSF(), RLRR(), GLoRA(), Consolidator(groups=(4, 8))], ids=lambda each: each.name)
def test_what_is_learnt_times_its_unit_is_what_acts_to_the_bit(
    method: SSF | RLRR | GLoRA | Consolidator, tmp_path: Path
) -> None:
    backbone = resnet(tmp_path, scaled=SMALLER)
    model = TunedModel(backbone, method, 2)
    start = flatten(method.start(model.sites, backbone.tensors, np.random.default_rng(0)))
    units = {name: unit for name, unit in flatten(method.units(model.sites, backbone.tensors)).items() if name in start}

    learnt = dict(zip(start, (p.detach().numpy() for p in model.tensors), strict=True))

    assert len(units) > 4
    assert all(unit.shape == start[name].shape and unit.max() < 1 for name, unit in units.items())
    for name, array in model.arrays().items():
        np.testing.assert_array_equal(array, start[name])
        np.testing.assert_array_equal(learnt[name] * units.get(name, np.float32(1)), start[name])


def test_a_step_moves_a_shift_by_its_rate_times_the_unit(tmp_path: Path) -> None:
    backbone = resnet(tmp_path, scaled=SMALLER)
    model = TunedModel(backbone, SSF(), 2)
    units = flatten(SSF().units(model.sites, backbone.tensors))
    before = model.arrays()
    for parameter in model.tensors:
        parameter.grad = torch.ones_like(parameter)

    torch.optim.SGD(model.tensors, lr=0.125).step()

    for name, array in model.arrays().items():
        moved = before[name] - array
        np.testing.assert_allclose(
            moved, np.broadcast_to(0.125 * units.get(name, np.float32(1)), moved.shape), rtol=1e-4
        )


@pytest.mark.parametrize(("method", "told"), [(SSF(), True), (BitFit(), False)], ids=lambda each: str(each)[:6])
def test_a_training_says_whether_its_checkpoint_is_in_units(method: SSF | BitFit, told: bool, tmp_path: Path) -> None:
    assert TunedModel(resnet(tmp_path, scaled=SMALLER), method, 2).in_units is told
