"""Which maps a network puts out, that they are those of timm, and that tuning and prompts go through them."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.models.davit import DaVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.mlp_mixer import MlpMixer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.xcit import Xcit
from torch import nn

from edgepet.deltas.branches import Branch
from edgepet.errors import InputError
from edgepet.networks.graft import grafted
from edgepet.networks.maps import find_maps, taking
from tests.tiny import seeded, tiny_vit


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=64,
        patch_size=4,
        window_size=2,
        embed_dim=8,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 2),
        num_classes=0,
    )


def mixer() -> nn.Module:
    return MlpMixer(img_size=64, patch_size=16, num_blocks=8, embed_dim=16, num_classes=0)


def distilled() -> nn.Module:
    """A class token and one of distillation."""
    return VisionTransformerDistilled(img_size=64, patch_size=8, embed_dim=16, depth=5, num_heads=2, num_classes=0)


def pyramid() -> nn.Module:
    return PyramidVisionTransformerV2(depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 2, 2), num_classes=0)  # fmt: skip


def dual() -> nn.Module:
    return DaVit(depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 2), window_size=2, num_classes=0)


def cross_covariance() -> nn.Module:
    """Its class token comes late, and attends to patches in blocks behind those that are listed."""
    return Xcit(img_size=64, patch_size=16, embed_dim=16, depth=4, num_heads=2, cls_attn_layers=1, num_classes=0)


def named(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=0)


STAGES = [4, 8, 16, 32]
# How to make one, pixels, the strides of its maps, and the depths that a plain one is read at.
FAMILIES = {
    "convnext": (named("test_convnext"), 64, STAGES, None),
    "resnet": (named("test_resnet"), 64, STAGES, None),
    "efficientnet": (named("test_efficientnet"), 64, STAGES, None),
    "byobnet": (named("test_byobnet"), 64, STAGES, None),
    "nfnet": (named("test_nfnet"), 64, STAGES, None),
    "mambaout": (named("test_mambaout"), 64, STAGES, None),
    "swin": (swin, 64, STAGES, None),
    "pvt_v2": (pyramid, 64, STAGES, None),
    "davit": (dual, 64, STAGES, None),
    "vit": (named("test_vit"), 160, [16] * 4, [1, 2, 4, 5]),
    "mixer": (mixer, 64, [16] * 4, [1, 3, 5, 7]),
    "deit": (distilled, 64, [8] * 4, [1, 2, 3, 4]),
    "xcit": (cross_covariance, 64, [16] * 4, [0, 1, 2, 3]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_that_timm_names_and_gives(family: str) -> None:
    make, pixels, strides, depths = FAMILIES[family]
    module = seeded(make(), 3).eval()
    images = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))

    maps = find_maps(module, (3, pixels, pixels), family)

    with torch.no_grad(), taking(module, maps) as taken:
        module(images)
        info = getattr(module.feature_info, "info", module.feature_info)
        chosen = depths or [max(n for n, each in enumerate(info) if each["reduction"] == stride) for stride in strides]
        expected = [module.forward_intermediates(images, indices=[n], intermediates_only=True)[0] for n in chosen]
        # The last alone is behind the final norm, which was trained for it; XCiT's patches change on the way there.
        if depths is not None and family != "xcit":
            expected[-1] = module.forward_intermediates(
                images, indices=[chosen[-1]], norm=True, intermediates_only=True
            )[0]
    assert [each.name for each in maps] == ["map.0", "map.1", "map.2", "map.3"]
    assert [each.stride for each in maps] == strides
    assert [each.channels for each in maps] == [info[n]["num_chs"] for n in chosen]
    assert [(each.height, each.width) for each in maps] == [(pixels // stride,) * 2 for stride in strides]
    assert [tuple(taken[each.name].shape[1:]) for each in maps] == [each.shape for each in maps]
    for each, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(taken[each.name], wanted, rtol=1e-4, atol=1e-5)


def test_maps_of_an_oblong_image_are_as_oblong() -> None:
    maps = find_maps(timm.create_model("test_resnet", num_classes=0).eval(), (3, 64, 96), "resnet")

    assert [(each.height, each.width) for each in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_a_backbone_knows_its_maps(tmp_path: Path) -> None:
    backbone = tiny_vit(tmp_path, 5)

    assert [(each.point, each.channels, each.stride, each.height) for each in backbone.maps] == [
        ("blocks.1:out", 64, 16, 2), ("blocks.2:out", 64, 16, 2), ("blocks.4:out", 64, 16, 2), ("norm:out", 64, 16, 2),
    ]  # fmt: skip


def test_prompts_are_cut_off_before_tokens_become_a_grid(tmp_path: Path) -> None:
    """Their tokens are in the stream from the first block to the last: the patches are still where they were."""
    backbone = tiny_vit(tmp_path, 5)
    maps = backbone.maps
    prompt, images = torch.randn(7, 64), torch.randn(2, 3, 32, 32)
    tokens = Branch(
        kind="tokens", tap="blocks.0:in", into="norm:in", settings={"prefix": 1}, tensors={"prompt": prompt}
    )
    seen = dict[str, torch.Tensor]()

    def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        seen["tokens"] = output

    handle = backbone.module.get_submodule("blocks.2").register_forward_hook(keep)
    with torch.no_grad(), grafted(backbone.module, [tokens]), taking(backbone.module, maps) as taken:
        backbone.module(images)
    handle.remove()

    assert seen["tokens"].shape == (2, 1 + 7 + 4, 64)
    assert all(tuple(x.shape) == (2, 64, 2, 2) for x in taken.values())
    torch.testing.assert_close(taken["map.1"], seen["tokens"][:, 8:].transpose(1, 2).reshape(2, 64, 2, 2))


def test_maps_are_what_flows_on_behind_a_branch(tmp_path: Path) -> None:
    module = seeded(timm.create_model("test_resnet", num_classes=0), 3).eval()
    maps = find_maps(module, (3, 64, 64), "resnet")
    images = torch.randn(1, 3, 64, 64)
    wide = maps[1].channels
    drawn = {
        "reduce.weight": torch.randn(2, wide), "reduce.bias": torch.randn(2), "conv.weight": torch.randn(2, 1, 3, 3),
        "conv.bias": torch.randn(2), "out.weight": torch.randn(wide, 2), "out.bias": torch.randn(wide),
    }  # fmt: skip
    settings = {"prefix": 0, "height": 0, "width": 0, "activation": "relu"}
    prompt = Branch(kind="stage-prompt", tap=maps[1].point, into=maps[1].point, settings=settings, tensors=drawn)

    with torch.no_grad(), taking(module, maps) as taken:
        module(images)
        before = dict(taken)
    with torch.no_grad(), grafted(module, [prompt]), taking(module, maps) as taken:
        module(images)

    assert torch.equal(taken["map.0"], before["map.0"])
    assert all(not torch.equal(taken[name], before[name]) for name in ("map.1", "map.2", "map.3"))


def test_gradients_flow_to_maps_and_no_hook_is_left() -> None:
    module = seeded(timm.create_model("test_convnext", num_classes=0), 3).eval()
    maps = find_maps(module, (3, 64, 64), "convnext")

    with taking(module, maps) as taken:
        module(torch.randn(1, 3, 64, 64))
    taken["map.3"].sum().backward()

    assert all(p.grad is not None for name, p in module.named_parameters() if name.startswith("stages.0"))
    assert all(not part._forward_hooks for part in module.modules())


class Strided(nn.Module):
    """A network of somebody's own that names its maps."""

    def __init__(self, **entry: object) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 5, 4, stride=4), nn.ReLU(inplace=True)
        if entry:
            self.feature_info = [{"module": "first", "num_chs": 5, "reduction": 4, **entry}]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.act(self.first(images)).mean((2, 3))


def test_a_network_of_ones_own_names_its_maps() -> None:
    (found,) = find_maps(Strided(module="act"), (3, 8, 12), "mine")

    assert (found.point, found.shape, found.stride) == ("act:out", (5, 2, 3), 4)


@pytest.mark.parametrize(
    ("module", "shape", "told"),
    [
        (
            Strided(), (3, 8, 8),
            "mine: must name its maps in a list feature_info\n  fix: give the network feature_info ="
            " [{'module': NAME, 'num_chs': C, 'reduction': R}, ...], as timm's have it",
        ),
        (Strided(num_chs=6), (3, 8, 8), "mine: puts out no map that can be read, got (5, 2, 2) of first in place of (6, 2, 2)"),
        (Strided(reduction=8), (3, 8, 8), "mine: puts out no map that can be read, got (5, 2, 2) of first in place of (5, 1, 1)"),
        (Strided(module="last"), (3, 8, 8), "mine: puts out no map that can be read, got nothing of last"),
        (Strided(module="first"), (3, 8, 8), "mine: puts out no map that can be read, got what first puts out is written over behind it"),
        (Strided(module="act"), (4, 3, 8, 8), "mine: must take images to put out maps, got clips"),
    ],
)  # fmt: skip
def test_a_network_without_maps_is_refused(module: nn.Module, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(InputError) as error:
        find_maps(module, shape, "mine")
    assert str(error.value) == told


def test_patches_in_another_order_than_timms_are_no_map() -> None:
    """Hiera rolls the patches of a window together: its first three stages are left out."""
    hiera = timm.create_model("hiera_tiny_224", pretrained=False, num_classes=0, img_size=64, embed_dim=8, num_heads=1)

    (found,) = find_maps(seeded(hiera, 3).eval(), (3, 64, 64), "hiera")

    assert (found.point, found.stride) == ("blocks.11:out", 32)
