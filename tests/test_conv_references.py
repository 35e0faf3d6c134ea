"""Conv-Adapter's four schemes, Pro-tuning and prompt matching in ConvNets that are run by hand in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from edgepet.methods import ConvAdapter, ProTuning, SemanticPrompt
from edgepet.methods.conv_adapter import SCHEMES
from tests.architectures import swin
from tests.by_hand import ROUNDING, Activation, Values, check, network_of, semantic_prompt, stage_prompt
from tests.tiny import random_images, seeded, sites_of

SIZE = (64, 96)  # 2 x 3 pixels at the end
Part: TypeAlias = Callable[[Tensor], Tensor]
Change: TypeAlias = Callable[[str, Any, Tensor], Tensor]  # what runs in place of a block, by its name


def adapter(own: Mapping[str, Tensor], activation: Activation, stride: int, x: Tensor, dilation: int = 1) -> Tensor:
    """The official module, design 2: a convolution in groups of four, activation, 1 x 1, and a factor by channel."""
    kernel, bias = own["conv.weight"], own["conv.bias"]
    padding = {2: 0, 3: 1, 5: 2, 7: 3}[kernel.shape[2]] * dilation
    hidden = [
        functional.conv2d(four, kernel[i : i + 1], bias[i : i + 1], stride, padding, dilation)
        for i, four in enumerate(x.split(4, dim=1))
    ]
    point = torch.einsum("crij,brhw->bchw", own["point.weight"], activation(torch.cat(hidden, dim=1)))
    return own["factor"][:, None, None] * (point + own["point.bias"][:, None, None])


def placed(
    scheme: str, adapt: Part, x: Tensor, front: Part, host: Part, rest: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Figure 3: a block is ``rest(host(front(x)), x)``, ``host`` its k x k convolution with what belongs to it."""
    read = front(x)
    inner = host(read)
    if scheme == "conv-parallel":
        inner = inner + adapt(read)
    if scheme == "conv-sequential":
        inner = inner + adapt(inner)
    out = rest(inner, x)
    if scheme == "residual-parallel":
        out = out + adapt(x)
    if scheme == "residual-sequential":
        out = out + adapt(out)
    return out


def no_adapter(x: Tensor) -> Tensor:
    return torch.zeros(1, dtype=x.dtype)


def stride_of(scheme: str, host: int, block: int) -> int:
    return {"conv-parallel": host, "residual-parallel": block}.get(scheme, 1)


# ---------------------------------------------------------------------------------------------------------- ResNet


def basic(block: Any, scheme: str, adapt: Part, x: Tensor) -> Tensor:
    """The second convolution is the host, with its batch norm: the sum is ahead of the shortcut and of the ReLU."""
    return placed(
        scheme,
        adapt,
        x,
        lambda x: functional.relu(block.bn1(block.conv1(x))),
        lambda x: block.bn2(block.conv2(x)),
        lambda x, shortcut: functional.relu(x + (block.downsample or torch.nn.Identity())(shortcut)),
    )


def bottleneck(block: Any, scheme: str, adapt: Part, x: Tensor) -> Tensor:
    """As in the official code: reads behind the first ReLU, and is added behind the second, before the last 1 x 1."""
    return placed(
        scheme,
        adapt,
        x,
        lambda x: functional.relu(block.bn1(block.conv1(x))),
        lambda x: functional.relu(block.bn2(block.conv2(x))),
        lambda x, shortcut: functional.relu(block.bn3(block.conv3(x)) + block.downsample(shortcut)),
    )


def resnet_block(scheme: str, values: Values, name: str, block: Any, x: Tensor) -> Tensor:
    kind = bottleneck if hasattr(block, "conv3") else basic
    stride = stride_of(scheme, block.conv2.stride[0], block.conv1.stride[0] * block.conv2.stride[0])
    dilation = block.conv2.dilation[0]
    adapt = partial(adapter, values[name], functional.relu, stride, dilation=dilation) if name in values else no_adapter
    return kind(block, scheme, adapt, x)


def resnet(network: Any, images: Tensor, change: Change) -> Tensor:
    x = network.maxpool(functional.relu(network.bn1(network.conv1(images))))
    for name in ("layer1.0", "layer2.0", "layer3.0", "layer4.0"):  # the third is a bottleneck
        x = change(name, network.get_submodule(name), x)
    return x.mean((2, 3))


# -------------------------------------------------------------------------------------------------------- ConvNeXt


def convnext_block(scheme: str, values: Values, name: str, block: Any, x: Tensor) -> Tensor:
    """The depthwise convolution alone is the host: its norm reads the sum."""
    if name.endswith("downsample"):
        norm, conv = block
        x = norm(x)
        # a downsampling is adapted beside its convolution, which is 2 x 2 with stride 2, and in no other scheme
        return conv(x) + adapter(values[f"{name}.1"], functional.gelu, 2, x) if f"{name}.1" in values else conv(x)

    def rest(x: Tensor, shortcut: Tensor) -> Tensor:
        x = block.mlp(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return shortcut + block.gamma[:, None, None] * x

    adapt = partial(adapter, values[name], functional.gelu, 1) if name in values else no_adapter
    return placed(scheme, adapt, x, lambda x: x, block.conv_dw, rest)


def convnext(network: Any, images: Tensor, change: Change) -> Tensor:
    x = network.stem(images)
    for i, stage in enumerate(network.stages):
        if i:
            x = change(f"stages.{i}.downsample", stage.downsample, x)
        for j, block in enumerate(stage.blocks):
            x = change(f"stages.{i}.blocks.{j}", block, x)
    return network.head.norm(x.mean((2, 3), keepdim=True)).flatten(1)


# ---------------------------------------------------------------------------------------------------- EfficientNet


def efficientnet_block(scheme: str, values: Values, name: str, block: Any, x: Tensor) -> Tensor:
    """The k x k convolution is the host, with its batch norm and activation: squeeze-and-excitation reads the sum."""
    silu, identity = functional.silu, torch.nn.Identity()
    norms = {n: partial(batch_norm, getattr(block, n)) for n in ("bn1", "bn2", "bn3") if hasattr(block, n)}
    if hasattr(block, "conv"):  # a convolution without a residual
        conv = block.conv
        parts = (identity, lambda x: silu(norms["bn1"](conv(x))), lambda x, shortcut: x)
    elif hasattr(block, "conv_exp"):
        conv = block.conv_exp
        parts = (identity, lambda x: silu(norms["bn1"](conv(x))), lambda x, shortcut: norms["bn2"](block.conv_pwl(x)))
    else:
        conv = block.conv_dw
        parts = (
            lambda x: silu(norms["bn1"](block.conv_pw(x))),
            lambda x: silu(norms["bn2"](conv(x))),
            lambda x, shortcut: norms["bn3"](block.conv_pwl(block.se(x))),
        )
    stride = stride_of(scheme, conv.stride[0], conv.stride[0])
    adapt = partial(adapter, values[name], functional.relu, stride) if name in values else no_adapter
    return placed(scheme, adapt, x, *parts)


def batch_norm(norm: Any, x: Tensor) -> Tensor:
    """The norm of a module that has an activation in it."""
    return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def efficientnet(network: Any, images: Tensor, change: Change) -> Tensor:
    x = functional.silu(batch_norm(network.bn1, network.conv_stem(images)))
    for i in range(5):
        x = change(f"blocks.{i}.0", network.blocks[i][0], x)
    return functional.silu(batch_norm(network.bn2, network.conv_head(x))).mean((2, 3))


# ----------------------------------------------------------------------------------------------------------- tests

NETWORKS: dict[str, tuple[Any, Any]] = {
    "test_resnet": (resnet, resnet_block),
    "test_convnext": (convnext, convnext_block),
    "test_efficientnet": (efficientnet, efficientnet_block),
}
BLOCKS = {
    "test_resnet": [f"layer{i}.0" for i in range(1, 5)],
    "test_convnext": [f"stages.{i}.blocks.{j}" for i, depth in enumerate((1, 2, 4, 2)) for j in range(depth)],
    "test_efficientnet": [f"blocks.{i}.0" for i in range(5)],
}
LAST = {**BLOCKS, "test_convnext": [f"stages.{i}.blocks.{last}" for i, last in enumerate((0, 1, 3, 1))]}


@pytest.mark.parametrize("architecture", NETWORKS)
def test_the_network_by_hand_is_the_network_of_timm(architecture: str) -> None:
    network, (run, block) = network_of(architecture).double(), NETWORKS[architecture]
    images = torch.from_numpy(random_images(4, 2, 96)).double()[:, :, :64]

    with torch.no_grad():
        by_hand, timms = run(network, images, partial(block, "none", {})), network(images)

    assert (by_hand - timms).abs().max() <= ROUNDING * timms.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_a_conv_adapter_reads_and_adds_where_its_scheme_says(architecture: str, scheme: str) -> None:
    run, block = NETWORKS[architecture]
    adapted = set(BLOCKS[architecture])
    if architecture == "test_convnext" and scheme == "conv-parallel":
        adapted |= {f"stages.{i}.downsample.1" for i in (1, 2, 3)}

    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        values = {name: own for name, own in values.items() if own}
        assert values.keys() == adapted
        return run(network, images, partial(block, scheme, values))

    check(ConvAdapter(reduction=4, scheme=scheme), network_of(architecture), reference, SIZE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_conv_adapter_has_the_dilation_of_its_host(scheme: str) -> None:
    network = network_of("test_resnet", output_stride=8)
    assert network.layer4[0].conv2.dilation == (4, 4)

    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        return resnet(network, images, partial(resnet_block, scheme, values))

    check(ConvAdapter(reduction=4, scheme=scheme), network, reference, SIZE)


@pytest.mark.parametrize("architecture", NETWORKS)
def test_pro_tuning_adds_a_prompt_behind_every_stage(architecture: str) -> None:
    run, block = NETWORKS[architecture]

    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        assert list(values) == LAST[architecture]

        def change(name: str, part: Any, x: Tensor) -> Tensor:
            x = block("none", {}, name, part, x)
            return x + stage_prompt(values[name], x) if name in values else x

        return run(network, images, change)

    check(ProTuning(reduction=4), network_of(architecture), reference, SIZE)


def test_in_a_swin_an_adapter_is_beside_attention_on_what_its_norm_puts_out() -> None:
    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        assert list(values) == ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
        x = network.patch_embed(images)
        for i, stage in enumerate(network.layers):
            x = stage.downsample(x)
            for j, block in enumerate(stage.blocks):
                normed = block.norm1(x)
                own = values[f"layers.{i}.blocks.{j}"]
                beside = adapter(own, functional.gelu, 1, normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                x = x + block._attn(normed) + beside
                x = x + block.mlp(block.norm2(x))
        return network.norm(x).mean((1, 2))

    check(ConvAdapter(reduction=4), seeded(swin(), 7).eval(), reference, (32, 32))


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_other_schemes_have_no_place_in_a_swin(scheme: str) -> None:
    assert ConvAdapter(scheme=scheme).sites(sites_of("swin_tiny_patch4_window7_224")) == ()


def test_where_the_norm_is_behind_attention_there_is_no_place() -> None:
    assert ConvAdapter().sites(sites_of("swinv2_cr_tiny_224")) == ()


BETWEEN = {  # stages of one size of maps, the last three boundaries
    "test_resnet": ["layer1.0", "layer2.0", "layer3.0"],
    "test_convnext": ["stages.0.blocks.0", "stages.1.blocks.1", "stages.2.blocks.3"],
    "test_efficientnet": ["blocks.1.0", "blocks.2.0", "blocks.3.0"],
}


@pytest.mark.parametrize("architecture", NETWORKS)
def test_semantic_prompts_are_matched_between_stages(architecture: str) -> None:
    run, block = NETWORKS[architecture]

    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        assert list(values) == BETWEEN[architecture]

        def change(name: str, part: Any, x: Tensor) -> Tensor:
            x = block("none", {}, name, part, x)
            return x + semantic_prompt(values[name], x, 2) if name in values else x

        return run(network, images, change)

    check(SemanticPrompt(width=6, slots=3), network_of(architecture), reference, SIZE)
