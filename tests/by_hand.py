"""A tuned network beside one that a test runs by hand, in float64: what the references of several files share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.methods import Method
from edgepet.networks.backbone import Backbone
from edgepet.spec import Preprocess
from edgepet.tuning.model import TunedModel
from tests.tiny import perturb, random_images, seeded

ROUNDING = 1e-10  # float64, through all the blocks
Values: TypeAlias = Mapping[str, Mapping[str, Tensor]]  # a method's trained tensors by site and name
Activation: TypeAlias = Callable[[Tensor], Tensor]


def network_of(architecture: str, **changes: Any) -> nn.Module:
    return seeded(timm.create_model(architecture, pretrained=False, num_classes=0, **changes), 7).eval()


def check(
    method: Method, network: nn.Module, reference: Callable[[Any, Values, Tensor], Tensor], size: tuple[int, int]
) -> None:
    """The tuned network against ``reference(network, values, images)``, where ``network`` is untouched, in float64."""
    backbone = Backbone.from_module(network, name="tiny", preprocess=Preprocess(image_size=size))
    model = perturb(TunedModel(backbone, method, 2, seed=1), seed=3, by=0.2).double()
    images = torch.from_numpy(random_images(4, 2, max(size))).double()[:, :, : size[0], : size[1]]
    network = network.double()
    with torch.no_grad():
        got, frozen = model.features(images), network(images)
        expected = reference(network, model.tuned(), images)
    assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert (got - frozen).abs().max() > 1e-3 * frozen.abs().max()


def stage_prompt(own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """1 x 1, GELU, 5 x 5 depthwise, GELU, 1 x 1 on (B, C, H, W)."""
    hidden = functional.gelu(torch.einsum("rc,bchw->brhw", own["reduce.weight"], x) + own["reduce.bias"][:, None, None])
    channels = [
        functional.conv2d(hidden[:, i : i + 1], own["conv.weight"][i : i + 1], own["conv.bias"][i : i + 1], padding=2)
        for i in range(hidden.shape[1])
    ]
    hidden = functional.gelu(torch.cat(channels, dim=1))
    return torch.einsum("cr,brhw->bchw", own["out.weight"], hidden) + own["out.bias"][:, None, None]


def multi_scale_adapter(own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """1 x 1, GELU, three depthwise convolutions beside each other and a bias, GELU, 1 x 1 on (B, C, H, W)."""
    hidden = functional.gelu(torch.einsum("rc,bchw->brhw", own["down.weight"], x) + own["down.bias"][:, None, None])
    seen = own["conv.bias"][:, None, None].expand_as(hidden)
    for side in (1, 3, 5):
        channels = [
            functional.conv2d(hidden[:, i : i + 1], own[f"conv{side}"][i : i + 1], padding=side // 2)
            for i in range(hidden.shape[1])
        ]
        seen = seen + torch.cat(channels, dim=1)
    return torch.einsum("cr,brhw->bchw", own["up.weight"], functional.gelu(seen)) + own["up.bias"][:, None, None]


def semantic_prompt(own: Mapping[str, Tensor], x: Tensor, recurrences: int) -> Tensor:
    """Features to z; so often, z and what slots it is in give what is added to it; z to features. On (B, C, H, W)."""
    width, slots = len(own["mix"]), len(own["slots"])
    ends = {"reduce": width, "slots": width + slots, "mix": 2 * width + slots, "conv": 3 * width + slots, "out": None}
    starts = dict(zip(ends, [0, *ends.values()], strict=False))
    bias = {name: own["bias"][starts[name] : end] for name, end in ends.items()}

    def product(name: str, given: Tensor) -> Tensor:
        return torch.einsum("oc,bchw->bohw", own[name], given) + bias[name][:, None, None]

    z = functional.gelu(product("reduce", x))
    for _ in range(recurrences):
        raised = product("slots", z).exp()
        hidden = functional.gelu(product("mix", torch.cat([z, raised / raised.sum(1, keepdim=True)], dim=1)))
        channels = [
            functional.conv2d(hidden[:, i : i + 1], own["conv"][i : i + 1], bias["conv"][i : i + 1], padding=1)
            for i in range(hidden.shape[1])
        ]
        z = z + torch.cat(channels, dim=1)
    return product("out", z)
