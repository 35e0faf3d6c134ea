"""Noise on what a method changes of each layer: h = y0 + z * (y - y0). Needs the ``train`` extra.

Ni et al. 2024, "PACE: marrying generalization in PArameter-efficient fine-tuning with Consistency rEgularization",
arXiv:2409.17137: y0 is what the frozen layer puts out for the same input and y what the tuned one does; z has one value
for each sample and output channel, shared by its tokens or positions, drawn from N(1, sigma_l ** 2). How sigma_l falls
with depth is told by its authors' code, github.com/MaxwellYaoNi/PACE, Vision/train.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgepet.networks.sites import ARGUMENTS, CHANNELS_FIRST
from edgepet.spec import Block, Site

HEAD = "head"  # the name of the last layer, whose frozen counterpart answers zero
_Torch: TypeAlias = Any  # what torch hands to its modes: any operator, and anything that it takes or gives


def layers_of(layers: Sequence[Site]) -> dict[str, str]:
    """Tensors of the state dict by which a layer is tuned -> the layer's name here, which is that of its weight."""
    run = [site for site in layers if site.operates]
    return {name: site.weight for site in run for name in (site.weight, site.bias, site.mean) if name is not None}


def falling(sigma: float, layers: Sequence[Site], sites: Sequence[Site]) -> dict[str, float]:
    """sigma_l of every layer among ``layers`` that ``sites`` tune, and of ``HEAD``; layers without noise have none.

    It falls in equal steps over the blocks that are tuned, from ``sigma`` in the first of n to sigma / n in the head,
    which counts as the last. A layer between two blocks belongs to the later one. Where blocks work on tokens (N, d)
    the first one and what lies before it have none: so the authors have it for ViT-B, and noise everywhere for Swin-B.
    """
    run = [site for site in layers if site.operates]
    blocks = {site.name: site for site in layers if isinstance(site, Block)}
    within = {site.weight: _part(site, blocks) for site in run}
    order = {part: place for place, part in enumerate(dict.fromkeys(part for part in within.values() if part))}
    depths, place = dict[str, int](), len(order)
    for site in reversed(run):
        place = order.get(within[site.weight], place)
        depths[site.weight] = place
    names = layers_of(layers)
    tuned = {names[site.weight] for site in sites if site.weight in names}
    first = next(iter(order), "")
    quiet = 1 if first in blocks and len(blocks[first].points[":in"]) == 2 else 0
    loud = {name: depths[name] for name in depths if name in tuned and depths[name] >= quiet} | {HEAD: len(order)}
    steps = sorted(set(loud.values()))
    return {name: sigma * (len(steps) - steps.index(depth)) / len(steps) for name, depth in loud.items()}


def _part(site: Site, blocks: Mapping[str, Block]) -> str:
    """The block that a layer lies in, or nothing; without blocks every layer is a part by itself."""
    return next((name for name in blocks if site.name.startswith(f"{name}.")), "" if blocks else site.weight)


class Noise:
    """z of one pass over the images at the places ``part`` of a step, drawn layer by layer in the order they run.

    It is drawn for all ``images`` of the step, so that one has the same z in whatever part and process it is. A layer
    that works on windows or frames of an image has one z for all of them, and one that works on no image one for all.
    """

    def __init__(
        self, sigmas: Mapping[str, float], images: int, part: Tensor, seeds: Sequence[int], device: str
    ) -> None:
        self.sigmas, self._images, self._part = sigmas, images, part.to(device)
        self._generator = torch.Generator(device)
        self._generator.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))
        self._last = dict[str, Tensor]()

    def between(self, layer: str, frozen: Tensor, tuned: Tensor, channel_axis: int) -> Tensor:
        """``frozen`` and z times what ``tuned`` differs from it by; ``tuned`` itself where the layer has no noise."""
        if layer not in self.sigmas:
            return tuned
        self._last[layer] = z = self._z(layer, tuned, channel_axis)
        return frozen + z * (tuned - frozen)

    def shift(self, layer: str, output: Tensor, moved: Tensor) -> Tensor:
        """What the layer's last ``output`` (n, out, ...) is moved by behind it, (out, 1, ...), times the z that it had.

        It had none if only its shift is tuned; then z is drawn here.
        """
        if layer not in self.sigmas:
            return moved
        z = self._last.pop(layer, None)
        return (self._z(layer, output, 1) if z is None else z) * moved

    def _z(self, layer: str, output: Tensor, channel_axis: int) -> Tensor:
        channels, (rows, left) = output.shape[channel_axis], divmod(len(output), len(self._part))
        drawn = torch.randn(self._images, channels, generator=self._generator, device=output.device)
        drawn = drawn[:1] if left else drawn[self._part].repeat_interleave(rows, 0)
        shape = [len(drawn)] + [1] * (output.ndim - 1)
        shape[channel_axis] = channels
        return (1 + self.sigmas[layer] * drawn.reshape(shape)).to(output.dtype)


class Disturbed(TorchFunctionMode):
    """While it is entered, layers that read a tuned tensor put out what ``noise`` makes of both their outputs.

    ``tensors`` are state-dict names with a tuned tensor and the frozen one, ``layers`` the layers whose they are. A
    layer runs twice, on the same input. Tensors that no layer reads, as a position table, are tuned without noise.
    """

    def __init__(self, noise: Noise, tensors: Mapping[str, tuple[Tensor, Tensor]], layers: Mapping[str, str]) -> None:
        super().__init__()
        loud = {name: pair for name, pair in tensors.items() if layers.get(name) in noise.sigmas}
        self._noise = noise
        self._layers = {id(tuned): layers[name] for name, (tuned, _) in loud.items()}
        self._frozen = {id(tuned): frozen for tuned, frozen in loud.values()}

    def __torch_function__(
        self, func: _Torch, types: object, args: tuple[_Torch, ...] = (), kwargs: Mapping[str, _Torch] | None = None
    ) -> _Torch:
        output, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name not in ARGUMENTS:
            return output
        named = dict(kwargs or {})
        layer = next((self._layers[id(each)] for each in (*args, *named.values()) if id(each) in self._layers), None)
        if layer is None:
            return output
        frozen = func(*map(self._frozen_of, args), **{key: self._frozen_of(value) for key, value in named.items()})
        return self._noise.between(layer, frozen, output, 1 if name in CHANNELS_FIRST else -1)

    def _frozen_of(self, value: _Torch) -> _Torch:
        return self._frozen.get(id(value), value)
