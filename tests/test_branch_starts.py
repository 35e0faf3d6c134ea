"""How the tensors of the methods that stay in the graph start: distributions, judged from many values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgepet.methods import (
    MAM,
    Adapter,
    AdaptFormer,
    BiLoRA,
    ConvAdapter,
    Convpass,
    Houlsby,
    Method,
    MultiScaleAdapter,
    ParallelAdapter,
    Prefix,
    ProTuning,
    SemanticPrompt,
    VPTDeep,
    VPTShallow,
)
from edgepet.spec import NpArray
from tests.tiny import ones, sites_of

SMALL, PATCH = 384, 14  # width and patch of the ViT below
VIT, RESNET, CONVNEXT = "vit_small_patch14_dinov2", "resnet50", "convnext_tiny"
Judge = Callable[[NpArray], None]


def all_are(value: float) -> Judge:
    def judge(values: NpArray) -> None:
        assert set(values.tolist()) == {value}

    return judge


def even(bound: float) -> Judge:
    """U(-bound, bound), whose variance is bound^2 / 3 and the variance of whose squares bound^4 * 4 / 45."""

    def judge(values: NpArray) -> None:
        n = values.size
        assert bound * (1 - 10 / n) < np.abs(values).max() <= bound * (1 + 1e-6)
        assert abs(values.mean()) < 5 * bound / np.sqrt(3 * n)
        assert abs((values**2).mean() - bound**2 / 3) < 5 * bound**2 * np.sqrt(4 / 45 / n)

    return judge


def normal(std: float, within: float, share: float) -> Judge:
    """Mean 0 and ``std`` to five standard errors, and the share of the values that ``within`` leaves out."""

    def judge(values: NpArray) -> None:
        n = values.size
        assert abs(values.mean()) < 5 * std / np.sqrt(n)
        assert abs(values.std() - std) < 5 * std / np.sqrt(2 * n)
        assert abs((np.abs(values) > within).mean() - share) <= 5 * np.sqrt(share / n)

    return judge


def cut(values: NpArray) -> None:
    """A normal distribution of 1e-3 whose values beyond two deviations are drawn again, as TensorFlow and torch do.

    Its deviation is sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) = 0.8796 of what it was, and 28.48 % are beyond one of those.
    """
    assert np.abs(values).max() <= np.float32(2e-3)
    assert (np.abs(values) > 1.9999e-3).mean() < 1e-3  # none is moved to the edge
    normal(0.87962e-3, within=1e-3, share=0.28477)(values)


ZERO = all_are(0)
STARTS: list[tuple[Method, str, str, Judge]] = [
    (Adapter(), VIT, "down.weight", cut),
    (Adapter(), VIT, "up.weight", cut),
    (Adapter(), VIT, "bias", ZERO),
    (Houlsby(), VIT, "attn.down.weight", cut),
    (Houlsby(), VIT, "mlp.up.weight", cut),
    (Houlsby(), VIT, "bias", ZERO),
    (AdaptFormer(), VIT, "down.weight", even(SMALL**-0.5)),  # Kaiming, a = sqrt(5), as LoRA's
    (AdaptFormer(), VIT, "up.weight", ZERO),
    (AdaptFormer(), VIT, "bias", ZERO),
    (ParallelAdapter(), VIT, "down.weight", even(SMALL**-0.5)),
    (ParallelAdapter(), VIT, "up.weight", ZERO),
    (ParallelAdapter(), VIT, "bias", ZERO),
    (Prefix(), VIT, "keys", normal(0.02, within=0.04, share=0.0455)),
    (Prefix(), VIT, "values", normal(0.02, within=0.04, share=0.0455)),
    (MAM(), VIT, "keys", normal(0.02, within=0.04, share=0.0455)),
    (MAM(), VIT, "values", normal(0.02, within=0.04, share=0.0455)),
    (MAM(), VIT, "down.weight", even(SMALL**-0.5)),
    (MAM(), VIT, "up.weight", ZERO),
    (VPTShallow(), VIT, "prompt", even((6 / (3 * PATCH**2 + SMALL)) ** 0.5)),  # Xavier, of the patch embedding
    (VPTDeep(), VIT, "prompt", even((6 / (3 * PATCH**2 + SMALL)) ** 0.5)),
    (Convpass(rank=8), VIT, "down.weight", even((6 / (SMALL + 8)) ** 0.5)),  # Xavier
    (Convpass(), VIT, "up.weight", ZERO),
    (Convpass(), VIT, "bias", ZERO),
    (ConvAdapter(), RESNET, "factor", all_are(1)),
    (ConvAdapter(), CONVNEXT, "factor", all_are(1)),
    (ProTuning(), VIT, "reduce.weight", even(SMALL**-0.5)),
    (ProTuning(), VIT, "conv.weight", even(1 / 5)),
    (ProTuning(), VIT, "out.weight", ZERO),
    (ProTuning(), VIT, "bias", ZERO),
    (MultiScaleAdapter(), VIT, "down.weight", even(SMALL**-0.5)),
    (MultiScaleAdapter(), VIT, "conv3", even(1 / 3)),
    (MultiScaleAdapter(), VIT, "conv5", even(1 / 5)),
    (MultiScaleAdapter(), VIT, "up.weight", ZERO),
    (MultiScaleAdapter(), VIT, "bias", ZERO),
    (SemanticPrompt(), VIT, "/reduce", even(SMALL**-0.5)),
    (SemanticPrompt(), VIT, "/slots", even(32**-0.5)),
    (SemanticPrompt(), VIT, "/mix", even(48**-0.5)),
    (SemanticPrompt(), VIT, "/conv", even(1 / 3)),
    (SemanticPrompt(), VIT, "/out", ZERO),
    (SemanticPrompt(), VIT, "bias", ZERO),
    (BiLoRA(), VIT, "q.b", cut),
]


def started(method: Method, architecture: str) -> dict[str, NpArray]:
    """Every tensor, in float64, under ``site/name``."""
    layers = sites_of(architecture)
    start = method.start(method.sites(layers), ones(layers), np.random.default_rng(0))
    named = {f"{site}/{name}": array for site, tensors in start.items() for name, array in tensors.items()}
    assert {array.dtype.name for array in named.values()} == {"float32"}
    return {name: array.astype(np.float64) for name, array in named.items()}


def together(arrays: Iterable[NpArray]) -> NpArray:
    return np.concatenate([array.reshape(-1) for array in arrays])


@pytest.mark.parametrize(
    ("method", "architecture", "ending", "judge"), STARTS, ids=[f"{m.name} {name}" for m, _, name, _ in STARTS]
)
def test_a_method_starts_as_its_paper_or_code_says(
    method: Method, architecture: str, ending: str, judge: Judge
) -> None:
    judge(together(array for name, array in started(method, architecture).items() if name.endswith(ending)))


def test_convpass_starts_with_kernels_that_pass_every_channel_on() -> None:
    kernels = [array for name, array in started(Convpass(rank=8), VIT).items() if name.endswith("conv.weight")]

    x = np.random.default_rng(1).standard_normal((1, 8, 3, 4))
    for kernel in kernels:
        passed = functional.conv2d(torch.from_numpy(x), torch.from_numpy(kernel), padding=1)
        assert passed.numpy().tolist() == x.tolist()
    assert len(kernels) == 2 * 12


def read_by(site: str) -> tuple[int, int]:
    """Channels that the adapter of a ResNet-50 or a ConvNeXt-T reads, and the side of its kernel."""
    stage = int(re.findall(r"\d", site)[0])
    if site.startswith("layer"):
        return 32 * 2**stage, 3
    return (48 * 2**stage, 2) if "downsample" in site else (96 * 2**stage, 7)


@pytest.mark.parametrize("architecture", [RESNET, CONVNEXT])
def test_a_conv_adapter_starts_as_torchs_convolutions_do(architecture: str) -> None:
    """Kaiming with a = sqrt(5): weights and biases are even up to 1 / sqrt(inputs of one output)."""
    relative = dict[str, list[NpArray]]()
    for name, array in started(ConvAdapter(reduction=8), architecture).items():
        site, _, tensor = name.partition("/")
        channels, side = read_by(site)
        if tensor == "conv.weight":
            assert array.shape == (channels // 8, 8, side, side)
        inputs = 8 * side**2 if tensor.startswith("conv") else channels // 8
        relative.setdefault(tensor, []).append(array * inputs**0.5)

    for tensor in ("conv.weight", "conv.bias", "point.weight", "point.bias"):
        even(1)(together(relative[tensor]))


def test_a_group_has_as_many_channels_as_divide_them_all() -> None:
    starts = started(ConvAdapter(reduction=7), "test_convnext")

    kernels = [starts[f"stages.{i}.blocks.0/conv.weight"].shape for i in range(4)]
    assert kernels == [(4, 6, 7, 7), (8, 4, 7, 7), (8, 6, 7, 7), (16, 4, 7, 7)]  # of 24, 32, 48 and 64 channels
