"""Representation separation in a head for masks: what makes neighbouring places, and regions, differ.

Hong et al. 2022, "Representation Separation for Semantic Segmentation with Vision Transformers", arXiv:2212.13764:
a second pathway of local discrepancy beside a transformer's deep and over-smooth maps, a spatially adaptive
separation, and a discriminative cross attention with supervisions of its own. There is no code: this is our reading of
the abstract, on the hidden maps y (n, w, h, w) of the head ``mlp``. With rough(y) = y - mean3x3(y), zeros around,

    y' = y + sigmoid(A y) * rough(y);  s = Q W_k y' / sqrt(w);  r_k = sum over places of softmax(s_k) W_v y'
    logits_k = y' . (W_r r_k), beside those of the head's own last product

and the finest map that the head reads enters by rough() of its product: it is the second pathway. While it is trained
s are judged against the masks, and r_k told apart by one product that is not lowered. Needs the ``train`` extra.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.deltas.heads import Step
from edgepet.deltas.layers import Activation, Add, Depthwise, Layer, Multiply, Point, Regions
from edgepet.networks.lowering import array_of

CLOSED = -2.0  # where the gate starts, before its sigmoid
_SIDE = 3


@dataclass(frozen=True, slots=True, eq=False)
class Separated:
    """``maps`` y' (n, w, h, w'), what they add to the ``logits``, and what is judged while it is trained.

    ``affinities`` s (n, classes, h, w') are before their softmax; ``regions`` (n, classes, classes) are logits of the
    class of each r_k.
    """

    maps: Tensor
    logits: Tensor
    affinities: Tensor
    regions: Tensor


class Separation(nn.Module):
    """The module above for ``width`` channels and so many classes; ``rough`` (width, 3, 3) is fixed."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(width, 1, 1)
        self.queries = nn.Parameter(torch.empty(classes, width))
        self.keys, self.values, self.region = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.teller = nn.Linear(width, classes)
        kernel = torch.full((width, _SIDE, _SIDE), -1 / _SIDE**2)
        kernel[:, 1, 1] += 1
        self.kernel: Tensor
        self.register_buffer("kernel", kernel, persistent=False)  # no training changes it

    def begin(self) -> None:
        """Where products were drawn: the gate hardly open, and no logit moved."""
        nn.init.constant_(cast(Tensor, self.gate.bias), CLOSED)
        for zero in (self.region.weight, self.teller.weight, self.teller.bias):
            nn.init.zeros_(zero)

    def rough(self, y: Tensor) -> Tensor:
        """What of each place its neighbourhood is not, (n, w, h, w')."""
        return functional.conv2d(y, self.kernel[:, None], padding=_SIDE // 2, groups=len(self.kernel))

    def forward(self, y: Tensor) -> Separated:
        """Of hidden maps (n, w, h, w')."""
        apart = y + torch.sigmoid(self.gate(y)) * self.rough(y)
        asked = self.queries @ self.keys.weight / len(self.kernel) ** 0.5
        affinities = torch.einsum("kc,nchw->nkhw", asked, apart)
        shares = affinities.flatten(2).softmax(dim=2)
        found = self.values(torch.einsum("nkp,ncp->nkc", shares, apart.flatten(2)))
        logits = torch.einsum("nkc,nchw->nkhw", self.region(found), apart)
        return Separated(maps=apart, logits=logits, affinities=affinities, regions=self.teller(found))

    def lower(self, read: str, last: Layer, rough: Layer) -> tuple[Step, ...]:
        """Layers that read hidden maps ``read`` and give "logits", those of ``last`` among them; float64 tensors.

        ``rough`` is what ``lowered_rough`` gave: so its kernel is stored once.
        """
        gate = Point(array_of(self.gate.weight)[:, :, 0, 0], array_of(cast(Tensor, self.gate.bias)))
        asked = array_of(self.queries) @ array_of(self.keys.weight) / len(self.kernel) ** 0.5
        regions = Regions(asked, array_of(self.region.weight) @ array_of(self.values.weight))
        return (
            Step(layer=rough, reads=(read,), gives="rough"),
            Step(layer=gate, reads=(read,), gives="gate"),
            Step(layer=Activation("sigmoid"), reads=("gate",), gives="opened"),
            Step(layer=Multiply(), reads=("rough", "opened"), gives="gated"),
            Step(layer=Add(), reads=(read, "gated"), gives="apart"),
            Step(layer=last, reads=("apart",), gives="told"),
            Step(layer=regions, reads=("apart",), gives="regions"),
            Step(layer=Add(), reads=("told", "regions"), gives="logits"),
        )

    def lowered_rough(self) -> Depthwise:
        """``rough`` as a layer."""
        return Depthwise(array_of(self.kernel))
