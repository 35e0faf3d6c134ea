"""What timm puts behind a network's features, found by building it. Needs the ``train`` extra.

The classifier is what is there with classes and not without: a linear layer, two where a network was distilled, and in
LeViT and its like a batch norm in front of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import numpy as np

from edgepet.networks.forms import inference_form
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from torch import nn

    from edgepet.deltas.delta import Head

T = TypeVar("T")
Arguments: TypeAlias = Mapping[str, object]  # what ``timm.create_model`` needs besides the name and ``num_classes``
# Arguments of networks whose classifier is an MLP, of which a linear layer cannot be made, that make it a linear layer.
LINEAR: tuple[Arguments, ...] = ({}, {"use_mlp_head": False})
_AUXILIARY = "aux"  # begins the names of layers that timm adds to the classifier's answer
_CLASSES = 7919  # of a network that is only looked at: no width of a layer
_EPS = 1e-5  # of a batch norm: torch's default, which those of timm's classifiers have


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """``layers`` put out logits, ``norms`` are the batch norms in front of them, ``rest`` is anything else.

    All are names of modules; ``arguments`` are what made ``timm.create_model`` build this one.
    """

    layers: tuple[str, ...]
    norms: tuple[str, ...]
    rest: tuple[str, ...]
    arguments: Arguments
    shapes: Mapping[str, tuple[int, ...]]

    def takes(self, width: int) -> bool:
        """Whether it can compute what a linear layer on ``width`` features does."""
        wide = all(int(np.prod(self.shapes[f"{layer}.weight"][1:])) == width for layer in self.layers)
        return bool(self.layers) and wide and not self.rest and all(f"{x}.bias" in self.shapes for x in self.layers)

    def tensors(self, head: Head) -> dict[str, NpArray]:
        """Its float32 state dict where it is to compute ``head``.

        Batch norms change nothing then. Of two layers whose mean is taken each is the head; an auxiliary one, whose
        largest answer over all tokens VOLO adds, puts out zeros.
        """
        made: dict[str, NpArray] = {}
        for layer in self.layers:  # a classifier may be a convolution of one tap
            shape, kept = (len(head.weight), *self.shapes[f"{layer}.weight"][1:]), not layer.startswith(_AUXILIARY)
            made[f"{layer}.weight"] = np.ascontiguousarray(head.weight * kept, np.float32).reshape(shape)
            made[f"{layer}.bias"] = np.ascontiguousarray(head.bias * kept, np.float32)
        for norm in self.norms:
            made |= self._neutral(norm)
        return made

    def _neutral(self, norm: str) -> dict[str, NpArray]:
        shape = self.shapes[f"{norm}.running_var"]
        neutral: dict[str, NpArray] = {
            "weight": np.full(shape, np.sqrt(1 + _EPS), np.float32),
            "bias": np.zeros(shape, np.float32),
            "running_mean": np.zeros(shape, np.float32),
            "running_var": np.ones(shape, np.float32),
            "num_batches_tracked": np.zeros((), np.int64),
        }
        return {key: value for name, value in neutral.items() if (key := f"{norm}.{name}") in self.shapes}


def headed(name: str, classes: int, arguments: Arguments, *, fused: bool) -> nn.Module:
    """timm's network with a classifier, in its inference form where it is ``fused``."""
    import timm

    module = cast("nn.Module", timm.create_model(name, pretrained=False, num_classes=classes, **arguments)).eval()
    return inference_form(module) if fused else module


def spelled(name: str, classes: int, arguments: Arguments, *, fused: bool) -> str:
    """Python that makes ``headed``'s network, for people to read."""
    more = "".join(f", {key}={value!r}" for key, value in arguments.items())
    made = f'timm.create_model("{name}", num_classes={classes}{more})'
    return f"timm.utils.reparameterize_model({made}.eval())" if fused else made


def find_classifier(name: str, bare: nn.Module, arguments: Arguments, *, fused: bool) -> Classifier:
    """What timm puts behind ``bare``, the network without it; no weights are made."""
    from torch import nn

    module = _weightless(name, arguments, fused=fused)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if key not in bare.state_dict()}
    parts = {part: module.get_submodule(part) for part in dict.fromkeys(key.rpartition(".")[0] for key in shapes)}
    layers = [part for part in parts if shapes.get(f"{part}.weight", ())[:1] == (_CLASSES,)]
    norms = [part for part, one in parts.items() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    return Classifier(
        layers=tuple(layers),
        norms=tuple(norms),
        rest=tuple(part for part in parts if part not in layers and part not in norms),
        arguments=arguments,
        shapes=shapes,
    )


def find_linear(name: str, bare: nn.Module, arguments: Arguments, *, width: int, fused: bool) -> Classifier | None:
    """What timm puts behind ``bare``, or would with other arguments, that can compute a linear layer on ``width``."""
    for more in LINEAR:
        with contextlib.suppress(TypeError):  # the network has no such argument
            found = find_classifier(name, bare, {**arguments, **more}, fused=fused)
            if found.takes(width):
                return found
    return None


def without_classifier(
    state: Mapping[str, T], module: nn.Module, classifiers: tuple[str, ...], *, fused: bool
) -> dict[str, T]:
    """``state`` without the tensors of what timm puts behind ``module``, whatever the number of classes.

    Args:
        classifiers: layers that timm's configuration names; a network is only built where ``state`` has more.
    """
    own, named = module.state_dict().keys(), {f"{layer}.{kind}" for layer in classifiers for kind in ("weight", "bias")}
    left = {key: value for key, value in state.items() if key in own or key not in named}
    architecture = cast(Mapping[str, str], module.pretrained_cfg).get("architecture")
    if architecture is None or left.keys() <= own:
        return left
    behind = find_classifier(architecture, module, {}, fused=fused).shapes
    return {key: value for key, value in left.items() if key in own or key not in behind}


def _weightless(name: str, arguments: Arguments, *, fused: bool) -> nn.Module:
    import torch

    try:
        with torch.device("meta"):
            return headed(name, _CLASSES, arguments, fused=fused)
    except (RuntimeError, NotImplementedError):  # an initialisation, or a form, that needs numbers
        return headed(name, _CLASSES, arguments, fused=fused)
