"""timm's network under the names of the one that PEFT adapted, so that PEFT itself runs the adapter on it."""

from __future__ import annotations

from collections import defaultdict
from typing import cast

import torch
from torch import Tensor, nn

from edgepet.peft.naming import Naming


class _Below(nn.Module):
    """Runs a network that lies below a prefix."""

    def __init__(self, prefix: str, network: nn.Module) -> None:
        super().__init__()
        _put(self, prefix.removesuffix("."), network)
        self._place = prefix.removesuffix(".")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.get_submodule(self._place)(images)
        return logits


class _Respelled(nn.Module):
    """Runs a network whose layers are here under other names: PEFT finds and replaces them here, and they are used.

    The network itself is no submodule, or PEFT would find each of its layers a second time.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = (network,)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self._network[0].to(images.dtype)(images)
        return logits


class _Elsewhere(nn.Module):
    """Stands for a layer, or for three side by side, of another module; what is there when it runs is run."""

    def __init__(self, root: nn.Module, names: list[str]) -> None:
        super().__init__()
        self._root, self._names = (root,), names

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = [self._root[0].get_submodule(name)(x) for name in self._names]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def renamed(network: nn.Module, naming: Naming) -> nn.Module:
    """``network``, timm's with a classifier behind it, as ``naming`` calls its layers; it is a part of what returns."""
    if naming.prefix is not None:
        return _Below(naming.prefix, network) if naming.prefix else network
    root = _Respelled(network)
    layers = defaultdict[str, list[str]](list)
    for theirs, part in naming.parts.items():  # query, key and value in this order
        if theirs.endswith(".weight"):
            layers[part.name.removesuffix(".weight")].append(theirs.removesuffix(".weight"))
    for ours, names in layers.items():
        layer = network.get_submodule(ours)
        for name, piece in zip(names, [layer] if len(names) == 1 else _cut(layer, len(names)), strict=True):
            _put(root, name, piece)
        _put(network, ours, _Elsewhere(root, names))
    return root


def _cut(layer: nn.Module, pieces: int) -> list[nn.Module]:
    """A linear layer as several, each with its share of the rows."""
    weights, bias = cast("Tensor", layer.weight).chunk(pieces), cast("Tensor | None", layer.bias)
    biases = [None] * pieces if bias is None else bias.chunk(pieces)
    return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    made.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return made.eval()


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make ``module`` the submodule ``name``, with empty ones above it where there are none."""
    *above, last = name.split(".")
    for part in above:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
