"""Every method of a transformer that stays in the graph against an independent reading of its paper or official code.

The reference runs a whole ViT by hand, in float64; ``tests.test_conv_references`` does so with ConvNets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.deltas.delta import Head
from edgepet.methods import (
    MAM,
    Adapter,
    AdaptFormer,
    Convpass,
    Houlsby,
    ParallelAdapter,
    Prefix,
    ProTuning,
    SemanticPrompt,
    VPTDeep,
    VPTShallow,
)
from edgepet.networks.backbone import Backbone
from edgepet.spec import Preprocess
from edgepet.tuning.model import TunedModel
from tests.by_hand import ROUNDING, Activation, Values, check, network_of, semantic_prompt, stage_prompt
from tests.tiny import random_images, sites_of

SIZE, PATCHES = (48, 64), 12  # 3 x 4 patches of 16 pixels: rows are not columns
NETWORKS = pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        pytest.param("test_vit", {}, id="class token"),  # which alone is read at the end
        pytest.param("test_vit", {"reg_tokens": 2}, id="registers"),  # three tokens in front of the patches
        pytest.param("test_vit", {"qk_norm": True}, id="normed"),  # queries and keys, head by head
        pytest.param("test_vit2", {}, id="scaled"),  # LayerScale, one register, and the mean of the patches at the end
    ],
)


# -------------------------------------------------------------------------------------------------- a ViT, by hand


def embedded(network: Any, images: Tensor) -> Tensor:
    """Patches behind the class token and the registers, with their positions."""
    patch = network.patch_embed.proj
    patches = functional.conv2d(images, patch.weight, patch.bias, stride=16).flatten(2).transpose(1, 2)
    front = [t.expand(len(images), -1, -1) for t in (network.cls_token, network.reg_token) if t is not None]
    return torch.cat([*front, patches], dim=1) + network.pos_embed


def pooled(network: Any, x: Tensor) -> Tensor:
    """The class token, or the mean of the patches: what is in front, prompts too, is not among them."""
    if network.global_pool == "token":
        return network.norm(x)[:, 0]
    return network.fc_norm(x[:, -PATCHES:].mean(1))


def heads_of(attn: Any, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, divided by the root of their width, keys and values (B, N, d / heads) of every head."""
    parts = functional.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)
    each = zip(*(part.chunk(attn.num_heads, dim=-1) for part in parts), strict=True)
    return [(attn.q_norm(q) / q.shape[-1] ** 0.5, attn.k_norm(k), v) for q, k, v in each]


def attended(attn: Any, x: Tensor) -> Tensor:
    out = [torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v for q, k, v in heads_of(attn, x)]
    return attn.proj(torch.cat(out, dim=-1))


def plain(block: Any, x: Tensor) -> Tensor:
    x = x + block.ls1(attended(block.attn, block.norm1(x)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def through(change: Callable[[Any, Mapping[str, Tensor], Tensor], Tensor]) -> Callable[[Any, Values, Tensor], Tensor]:
    """A reference that calls ``change(block, its values, x)`` in place of every block."""

    def run(network: Any, values: Values, images: Tensor) -> Tensor:
        x = embedded(network, images)
        for i, block in enumerate(network.blocks):
            x = change(block, values.get(f"blocks.{i}", {}), x)
        return pooled(network, x)

    return run


@NETWORKS
def test_the_network_by_hand_is_the_network_of_timm(architecture: str, changes: dict[str, Any]) -> None:
    network = network_of(architecture, img_size=SIZE, **changes).double()
    images = torch.from_numpy(random_images(4, 2, 64)).double()[:, :, :48]

    with torch.no_grad():
        by_hand, timms = through(lambda block, own, x: plain(block, x))(network, {}, images), network(images)

    assert (by_hand - timms).abs().max() <= ROUNDING * timms.abs().max()


# -------------------------------------------------------------------------------------------------------- adapters


def bottleneck(own: Mapping[str, Tensor], x: Tensor, activation: Activation, prefix: str = "") -> Tensor:
    hidden = activation(x @ own[f"{prefix}down.weight"].T + own[f"{prefix}down.bias"])
    return hidden @ own[f"{prefix}up.weight"].T + own[f"{prefix}up.bias"]


@NETWORKS
def test_an_adapter_is_behind_the_mlp_with_a_residual_of_its_own(architecture: str, changes: dict[str, Any]) -> None:
    def change(block: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        x = x + block.ls1(attended(block.attn, block.norm1(x)))
        y = block.mlp(block.norm2(x))
        return x + block.ls2(y + 0.5 * bottleneck(own, y, functional.gelu, "mlp."))

    check(Adapter(rank=4, scale=0.5), network_of(architecture, img_size=SIZE, **changes), through(change), SIZE)


@NETWORKS
def test_houlsbys_adapter_is_behind_attention_too(architecture: str, changes: dict[str, Any]) -> None:
    def change(block: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y = attended(block.attn, block.norm1(x))
        x = x + block.ls1(y + 0.5 * bottleneck(own, y, functional.gelu, "attn."))
        y = block.mlp(block.norm2(x))
        return x + block.ls2(y + 0.5 * bottleneck(own, y, functional.gelu, "mlp."))

    check(Houlsby(rank=4, scale=0.5), network_of(architecture, img_size=SIZE, **changes), through(change), SIZE)


@NETWORKS
def test_adaptformer_reads_the_stream_before_the_second_norm(architecture: str, changes: dict[str, Any]) -> None:
    def change(block: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        x = x + block.ls1(attended(block.attn, block.norm1(x)))
        return x + block.ls2(block.mlp(block.norm2(x))) + 0.3 * bottleneck(own, x, functional.relu)

    check(AdaptFormer(rank=8, scale=0.3), network_of(architecture, img_size=SIZE, **changes), through(change), SIZE)


@NETWORKS
def test_a_parallel_adapter_reads_what_the_mlp_reads(architecture: str, changes: dict[str, Any]) -> None:
    def change(block: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        x = x + block.ls1(attended(block.attn, block.norm1(x)))
        read = block.norm2(x)
        return x + block.ls2(block.mlp(read) + 4 * bottleneck(own, read, functional.relu))

    check(ParallelAdapter(rank=4, scale=4), network_of(architecture, img_size=SIZE, **changes), through(change), SIZE)


# ------------------------------------------------------------------------------------------------ prefixes and prompts


def gated(attn: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """He et al. 2022, equation 7: (1 - l) Attn(q, K, V) + l Attn(q, P_k, P_v), l the prefix's share of the sum."""
    prefixes = zip(*(own[name].chunk(attn.num_heads, dim=-1) for name in ("keys", "values")), strict=True)
    out = []
    for (q, k, v), (keys, values) in zip(heads_of(attn, x), prefixes, strict=True):
        to_tokens, to_prefix = torch.exp(q @ k.transpose(1, 2)), torch.exp(q @ keys.T)
        of_tokens, of_prefix = to_tokens.sum(-1, keepdim=True), to_prefix.sum(-1, keepdim=True)
        share = of_prefix / (of_prefix + of_tokens)
        out.append((1 - share) * (to_tokens / of_tokens @ v) + share * (to_prefix / of_prefix @ values))
    return attn.proj(torch.cat(out, dim=-1))


@NETWORKS
def test_a_prefix_is_a_gated_attention_to_its_rows(architecture: str, changes: dict[str, Any]) -> None:
    def change(block: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        x = x + block.ls1(gated(block.attn, own, block.norm1(x)))
        return x + block.ls2(block.mlp(block.norm2(x)))

    check(Prefix(length=3), network_of(architecture, img_size=SIZE, **changes), through(change), SIZE)


@NETWORKS
def test_mam_is_a_prefix_and_a_scaled_parallel_adapter(architecture: str, changes: dict[str, Any]) -> None:
    def change(block: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        x = x + block.ls1(gated(block.attn, own, block.norm1(x)))
        read = block.norm2(x)
        return x + block.ls2(block.mlp(read) + 3 * bottleneck(own, read, functional.relu))

    check(MAM(length=3, rank=4, scale=3), network_of(architecture, img_size=SIZE, **changes), through(change), SIZE)


@NETWORKS
def test_deep_prompts_are_tokens_that_every_block_gets_anew(architecture: str, changes: dict[str, Any]) -> None:
    """VPT, equations 6 and 7: [x_i, _, E_i] = L_i([x_i-1, P_i-1, E_i-1]); registers are with x."""

    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        x = embedded(network, images)
        for i, block in enumerate(network.blocks):
            prompt = values[f"blocks.{i}"]["prompt"].expand(len(x), -1, -1)
            x = plain(block, torch.cat([x[:, :-PATCHES], prompt, x[:, -PATCHES:]], dim=1))
            x = torch.cat([x[:, : -PATCHES - 3], x[:, -PATCHES:]], dim=1)
        return pooled(network, x)

    check(VPTDeep(length=3), network_of(architecture, img_size=SIZE, **changes), reference, SIZE)


@NETWORKS
def test_shallow_prompts_are_tokens_of_all_blocks_that_no_pooling_reads(
    architecture: str, changes: dict[str, Any]
) -> None:
    """VPT, equations 4 and 5: [x_1, Z_1, E_1] = L_1([x_0, P, E_0]), and Z goes on through the blocks."""

    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        x = embedded(network, images)
        x = torch.cat([x[:, :-PATCHES], values["blocks.0"]["prompt"].expand(len(x), -1, -1), x[:, -PATCHES:]], dim=1)
        for block in network.blocks:
            x = plain(block, x)
        return pooled(network, x)

    check(VPTShallow(length=5), network_of(architecture, img_size=SIZE, **changes), reference, SIZE)


# --------------------------------------------------------------------------------------------------------- Convpass


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def bypass(own: Mapping[str, Tensor], number: int, x: Tensor) -> Tensor:
    """The official module: one Conv2d, called with the grid of the patches and each other token as a grid of one."""
    conv = nn.Conv2d(4, 4, 3, 1, 1).double()
    conv.weight.copy_(own[f"{number}.conv.weight"])
    conv.bias.copy_(own[f"{number}.conv.bias"])
    down = quick_gelu(functional.linear(x, own[f"{number}.down.weight"], own[f"{number}.down.bias"]))
    patches = conv(
        down[:, -PATCHES:].reshape(-1, 3, 4, 4).permute(0, 3, 1, 2)
    )  # from (B, 3 rows, 4 columns, 4 channels)
    front = [conv(down[:, i].reshape(-1, 4, 1, 1)) for i in range(x.shape[1] - PATCHES)]
    tokens = torch.cat([image.flatten(2) for image in (*front, patches)], dim=2).transpose(1, 2)
    return functional.linear(quick_gelu(tokens), own[f"{number}.up.weight"], own[f"{number}.up.bias"])


@NETWORKS
def test_convpass_is_beside_attention_and_beside_the_mlp(architecture: str, changes: dict[str, Any]) -> None:
    def change(block: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        read = block.norm1(x)
        x = x + block.ls1(attended(block.attn, read)) + 0.5 * bypass(own, 1, read)
        read = block.norm2(x)
        return x + block.ls2(block.mlp(read)) + 0.5 * bypass(own, 2, read)

    check(Convpass(rank=4, scale=0.5), network_of(architecture, img_size=SIZE, **changes), through(change), SIZE)


@NETWORKS
def test_convpass_can_be_beside_attention_only(architecture: str, changes: dict[str, Any]) -> None:
    def change(block: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        read = block.norm1(x)
        x = x + block.ls1(attended(block.attn, read)) + 10 * bypass(own, 1, read)
        return x + block.ls2(block.mlp(block.norm2(x)))

    method = Convpass(rank=4, scale=10, attention_only=True)
    check(method, network_of(architecture, img_size=SIZE, **changes), through(change), SIZE)


class Bare(nn.Module):
    """A transformer's block whose layers are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.drop_path1, self.norm2, self.drop_path2 = (nn.Identity() for _ in range(4))
        self.attn, self.mlp = nn.Linear(1, 1), nn.Linear(1, 1)
        for layer in (self.attn, self.mlp):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Pixels(nn.Module):
    """Every pixel's red is a token of one channel, a token of 1000 is in front of them, and all tokens come out."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 1, 1, bias=False)
        self.patch_embed.weight.data = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)
        self.patch_embed.grid_size = (2, 3)
        self.blocks = nn.ModuleList([Bare()])

    def forward(self, images: Tensor) -> Tensor:
        x = functional.pad(self.patch_embed(images).flatten(1), (1, 0), value=1000.0)[:, :, None]
        return self.blocks[0](x)[:, :, 0]


@pytest.mark.parametrize(
    ("tap", "front", "moved"),
    [
        ((1, 0), 1000, [100, 300, 500, 400, 900, 1100]),  # to the right: 0, 100, 200 and 0, 400, 500 come in
        ((1, 2), 1000, [300, 500, 300, 900, 1100, 600]),  # to the left
        ((0, 1), 1000, [100, 200, 300, 500, 700, 900]),  # down
        ((2, 2), 1000, [600, 800, 300, 400, 500, 600]),  # up and to the left
        ((1, 1), 2000, [200, 400, 600, 800, 1000, 1200]),  # nowhere: only here the token in front meets the kernel
    ],
)
def test_a_kernel_of_one_tap_moves_patches_to_their_neighbours(
    tap: tuple[int, int], front: int, moved: list[int]
) -> None:
    """The patches are 100, 200, 300 above 400, 500, 600; of such numbers the quick GELU is the number itself."""
    backbone = Backbone.from_module(Pixels(), name="pixels", preprocess=Preprocess(image_size=(2, 3)))
    model = TunedModel(backbone, Convpass(rank=1, attention_only=True), 2)
    arrays = {name: np.zeros_like(array) for name, array in model.arrays().items()}
    arrays["blocks.0/1.down.weight"][:] = arrays["blocks.0/1.up.weight"][:] = 1
    arrays["blocks.0/1.conv.weight"][0, 0, *tap] = 1
    model.load(arrays, Head(weight=np.zeros((2, 7), np.float32), bias=np.zeros(2, np.float32)))
    images = torch.tensor([[100.0, 200, 300], [400, 500, 600]]).expand(1, 3, 2, 3)

    with torch.no_grad():
        tokens = model.features(images)

    assert tokens.tolist() == [[front, *moved]]


# ------------------------------------------------------------------------------------------------------- Pro-tuning


@pytest.mark.parametrize("registers", [0, 2])
def test_pro_tuning_adds_a_prompt_to_the_patches_between_thirds_of_the_blocks(registers: int) -> None:
    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        assert values.keys() == {"blocks.1", "blocks.3"}  # of six blocks in three stages; none behind the last
        x = embedded(network, images)
        for i, block in enumerate(network.blocks):
            x = plain(block, x)
            if i in (1, 3):
                grid = x[:, -PATCHES:].transpose(1, 2).reshape(len(x), 64, 3, 4)
                prompt = stage_prompt(values[f"blocks.{i}"], grid).flatten(2).transpose(1, 2)
                x = torch.cat([x[:, :-PATCHES], x[:, -PATCHES:] + prompt], dim=1)
        return pooled(network, x)

    check(
        ProTuning(reduction=4, stages=3), network_of("test_vit", img_size=SIZE, reg_tokens=registers), reference, SIZE
    )


def test_pro_tuning_cuts_a_transformer_into_four_equal_stages() -> None:
    sites = ProTuning().sites(sites_of("vit_small_patch14_dinov2"))

    assert [site.name for site in sites] == ["blocks.2", "blocks.5", "blocks.8"]


# ------------------------------------------------------------------------------------------ stage-wise prompt matching


@pytest.mark.parametrize("recurrences", [1, 3])
def test_semantic_prompts_are_matched_to_the_patches_between_thirds_of_the_blocks(recurrences: int) -> None:
    def reference(network: Any, values: Values, images: Tensor) -> Tensor:
        assert values.keys() == {"blocks.1", "blocks.3"}
        x = embedded(network, images)
        for i, block in enumerate(network.blocks):
            x = plain(block, x)
            if i in (1, 3):
                grid = x[:, -PATCHES:].transpose(1, 2).reshape(len(x), 64, 3, 4)
                prompt = semantic_prompt(values[f"blocks.{i}"], grid, recurrences).flatten(2).transpose(1, 2)
                x = torch.cat([x[:, :-PATCHES], x[:, -PATCHES:] + prompt], dim=1)
        return pooled(network, x)

    method = SemanticPrompt(width=6, slots=3, recurrences=recurrences, stages=3)
    check(method, network_of("test_vit", img_size=SIZE, reg_tokens=2), reference, SIZE)
