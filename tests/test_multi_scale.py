"""Multi-scale adapters: where they go, how many values they have, and what they compute, written out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgepet.errors import InputError
from edgepet.methods import MultiScaleAdapter
from tests.by_hand import Values, check, multi_scale_adapter, network_of
from tests.tiny import sites_of

# The last block of each stage of strides 8, 16 and 32, and the values of our reading at a width of 32.
PLACES: dict[str, tuple[list[tuple[str, int]], int]] = {
    "vit_small_patch14_dinov2": ([("blocks.8", 384)], 26_144),
    "tf_efficientnet_lite0": ([("blocks.2.1", 40), ("blocks.4.2", 112), ("blocks.6.0", 320)], 34_232),
    "resnet50": ([("layer2.3", 512), ("layer3.5", 1024), ("layer4.2", 2048)], 236_512),
    "swin_tiny_patch4_window7_224": (
        [("layers.1.blocks.1", 192), ("layers.2.blocks.5", 384), ("layers.3.blocks.1", 768)], 65 * 1344 + 3 * 37 * 32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", PLACES)
def test_adapters_are_behind_the_last_stages_and_have_the_values_of_their_formula(architecture: str) -> None:
    places, values = PLACES[architecture]
    method = MultiScaleAdapter()

    sites = method.sites(sites_of(architecture))

    assert [(site.name, site.out_features) for site in sites] == places
    drawn = method.start(sites, {}, np.random.default_rng(1))
    assert sum(tensor.size for own in drawn.values() for tensor in own.values()) == values
    (branch, *_) = method.branches(sites, drawn)
    assert branch.tensors["conv.weight"].shape == (32, 1, 5, 5)  # of three kernels one is left


@pytest.mark.parametrize("registers", [0, 2])
def test_in_a_transformer_one_adapter_is_in_front_of_its_last_quarter(registers: int) -> None:
    patches = 12

    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        assert values.keys() == {"blocks.3"}  # of six blocks
        x = network._pos_embed(network.patch_embed(images))
        for i, block in enumerate(network.blocks):
            x = block(x)
            if i == 3:
                grid = x[:, -patches:].transpose(1, 2).reshape(len(x), 64, 3, 4)
                prompt = multi_scale_adapter(values["blocks.3"], grid).flatten(2).transpose(1, 2)
                x = torch.cat([x[:, :-patches], x[:, -patches:] + prompt], dim=1)
        return network.forward_head(network.norm(x), pre_logits=True)

    size = (48, 64)
    check(MultiScaleAdapter(width=6), network_of("test_vit", img_size=size, reg_tokens=registers), reference, size)


def test_in_a_convnet_an_adapter_is_behind_each_of_the_last_stages() -> None:
    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        assert list(values) == ["layer3.0", "layer4.0"]
        x = network.maxpool(network.act1(network.bn1(network.conv1(images))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = network.get_submodule(name)(x)
            x = x + multi_scale_adapter(values[f"{name}.0"], x) if f"{name}.0" in values else x
        return network.global_pool(x)

    check(MultiScaleAdapter(width=6, stages=2), network_of("test_resnet"), reference, (48, 64))


@pytest.mark.parametrize("settings", [{"width": 0}, {"stages": 0}])
def test_settings_that_make_no_adapter_are_refused(settings: dict[str, int]) -> None:
    got = (settings.get("width", 32), settings.get("stages", 3))
    told = f"multi-scale-adapter: needs a width and stages of at least 1, got {got}"

    with pytest.raises(InputError, match=f"^{re.escape(told)}$"):
        MultiScaleAdapter(**settings)
