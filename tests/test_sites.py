"""Layers are found by what a network runs: which operators read which tensors, and what reads their outputs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgepet.deltas.delta import Head
from edgepet.errors import InputError
from edgepet.networks.backbone import Backbone
from edgepet.networks.sites import parameters, watch
from edgepet.spec import Block, Preprocess, Site
from tests.architectures import swin
from tests.tiny import same_bits, sites_of

SIZE = 8


def found(module: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in watch(module.eval(), torch.zeros(2, 3, SIZE, SIZE)).sites}


class Net(nn.Module):
    """Convolution, batch norm, activation; ``forward`` is what each test gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def test_a_convolution_a_batch_norm_and_a_linear_layer_are_found_in_the_order_they_run() -> None:
    assert list(found(Net()).values()) == [
        Site(
            name="conv", kind="conv", weight="conv.weight", bias=None, in_features=3, out_features=6, taps=9,
            channel_axis=1, mean="norm.running_mean",
        ),
        Site(
            name="norm", kind="norm", weight="norm.weight", bias="norm.bias", in_features=6, out_features=6,
            channel_axis=1,
        ),
        Site(name="fc", kind="linear", weight="fc.weight", bias="fc.bias", in_features=6, out_features=4),
    ]  # fmt: skip


def test_a_batch_norm_takes_a_shift_only_from_the_convolution_that_it_alone_reads() -> None:
    class Skip(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.fc((self.norm(y) + y).mean((2, 3)))

    class Between(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(torch.relu(self.conv(x))).mean((2, 3)))

    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc((self.norm(self.conv(x)) + self.norm(x.repeat(1, 2, 1, 1))).mean((2, 3)))

    means = {kind.__name__: found(kind())["conv"].mean for kind in (Net, Skip, Between, Twice)}
    assert means == {"Net": "norm.running_mean", "Skip": None, "Between": None, "Twice": None}
    assert not found(Skip())["conv"].takes_shift


def test_a_layer_whose_module_puts_out_something_else_is_not_exposed() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    class Activated(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu_()

    class Functional(nn.Conv2d):
        pass

    def net(conv: nn.Conv2d) -> nn.Module:
        return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Functional(3, 6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(x, self.conv.weight, self.conv.bias).mean((2, 3))

    assert found(net(Padded(3, 6, 3)))["0"].exposed
    assert not found(net(Activated(3, 6, 3)))["0"].exposed
    assert not found(Apart())["conv"].exposed


def test_a_kernel_that_is_computed_on_the_way_is_no_layer() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    assert found(nn.Sequential(Standardised(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())) == {}


def test_a_weight_used_twice_is_one_layer_that_is_folded() -> None:
    class Shared(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc((self.conv(x) + self.conv(x.flip(-1))).mean((2, 3)))

    site = found(Shared())["conv"]

    assert (site.exposed, site.mean) == (False, None)


def test_a_weight_under_two_names_is_no_layer() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Conv2d(3, 6, 3, padding=1, bias=False)
            self.twin.weight = self.conv.weight

    assert list(found(Tied())) == ["norm", "fc"]


def test_a_bias_that_is_put_together_on_the_way_is_not_scalable() -> None:
    class Composed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = torch.cat([self.fc.bias[:2], torch.zeros(2)])
            return functional.linear(self.norm(self.conv(x)).mean((2, 3)), self.fc.weight, bias)

    site = found(Composed())["fc"]

    assert (site.bias, site.scalable, site.takes_shift) == (None, False, False)


def test_q_k_and_v_are_the_thirds_of_an_output_that_is_cut_so_and_of_no_other() -> None:
    thirds = (("q", (0, 384)), ("k", (384, 768)), ("v", (768, 1152)))

    assert {site.blocks for site in sites_of("vit_small_patch14_dinov2") if site.name.endswith("qkv")} == {thirds}

    class HeadsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(3, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # as MaxViT: one head's q, k and v lie side by side
            q, k, v = self.qkv(x.mean((2, 3))).view(len(x), 2, 6).chunk(3, dim=2)
            return (q * k + v).flatten(1)

    assert found(HeadsFirst())["qkv"].blocks == ()


def test_a_parameter_that_nothing_reads_is_no_site() -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.scale = nn.LayerNorm(4), nn.Parameter(torch.ones(4))
            self.twin = nn.Linear(6, 4)
            self.twin.weight = self.fc.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    module = Spare().eval()
    seen = watch(module, torch.zeros(2, 3, SIZE, SIZE))

    assert {name for name in seen.unread if "num_batches" not in name} == {"spare.weight", "spare.bias", "twin.bias"}
    names = [site.name for site in parameters(module, seen.unread)]
    assert names == ["scale", "conv.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias"]


def test_every_parameter_is_a_site_of_its_own() -> None:
    names = [site.name for site in parameters(Net())]
    assert names == ["conv.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias"]


# ------------------------------------------------------------------------------------------------------------ blocks


def blocks_of(module: nn.Module, size: int) -> list[Block]:
    seen = watch(module.eval(), torch.zeros(1, 3, size, size))
    return list(seen.blocks)


def test_a_block_on_maps_has_its_channels_where_its_first_layer_finds_them() -> None:
    assert [(b.in_features, b.channel_axis, b.points[":in"]) for b in blocks_of(swin(), 32)] == [
        (16, -1, (16, 16, 16)),  # every side is 16: the norm reads the last
        (16, -1, (16, 16, 16)),
        (32, -1, (8, 8, 32)),
    ]
    convolutions = [site for site in sites_of("test_convnext") if isinstance(site, Block)]
    assert {(block.channel_axis, block.in_features == block.points[":in"][0]) for block in convolutions} == {(1, True)}


def test_attention_in_windows_is_a_part_of_its_block() -> None:
    windows = blocks_of(swin(), 32)[0]

    assert windows.has("attn", "mlp")
    assert "attn:out" not in windows.points  # windows are no images
    assert windows.heads == 0


# --------------------------------------------------------------------------------------------- a network of one's own


def own(module: nn.Module) -> Backbone:
    return Backbone.from_module(module, name="net", preprocess=Preprocess(image_size=(SIZE, SIZE)))


def test_a_network_of_ones_own_is_copied() -> None:
    module = Net().train()
    before = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}

    backbone = own(module)

    assert (backbone.label, backbone.width, backbone.create_args) == ("module:net", 4, {})
    assert module.training
    assert module.conv.weight.requires_grad
    with torch.no_grad():
        backbone.module.get_parameter("fc.weight").zero_()
    assert same_bits({name: tensor.numpy() for name, tensor in module.state_dict().items()}, before)


def test_a_network_that_puts_out_no_features_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        own(nn.Conv2d(3, 6, 3))
    assert str(refused.value) == ("module:net: must put out features (n, d) for images (n, 3, H, W), got (2, 6, 6, 6)")


@pytest.mark.parametrize("write", ["clamp_", "__setitem__"])
def test_a_network_that_writes_into_its_own_tensors_is_refused(write: str) -> None:
    class Restless(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.fc.weight.data
            if write == "clamp_":  # as the official RevCol does with its alphas
                weight.clamp_(min=1e-3)
            else:
                weight[0] = 0
            return super().forward(x)

    with pytest.raises(InputError) as refused:
        own(Restless())
    assert str(refused.value) == (
        f"module:net: must not write into its own tensors, got {write} on fc.weight\n"
        "  fix: do it once, before the network is handed over"
    )


def test_a_network_that_cannot_take_the_size_is_refused_with_its_own_words() -> None:
    with pytest.raises(InputError) as refused:
        own(nn.Sequential(nn.Conv2d(3, 6, 9), nn.Flatten()))
    assert str(refused.value).startswith("module:net: cannot take images of 8 x 8 pixels, got ")
    assert str(refused.value).endswith("fix: use another image size")


def test_a_network_of_ones_own_is_given_a_head_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = own(Net())
    monkeypatch.setitem(sys.modules, "timm", None)

    head = Head(weight=np.ones((3, 4), np.float32), bias=np.zeros(3, np.float32))

    weights = backbone.named_weights(backbone.tensors, head)
    assert backbone.with_head(head).state_dict().keys() == weights.keys()
