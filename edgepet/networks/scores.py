"""Maps beside text: score maps, and attention of pixels to text. Needs the ``train`` extra.

Score maps are those of DenseCLIP (arXiv:2112.01518, section 3.2): cosines of pixels and of vectors of classes. The
backbone there is CLIP's, whose maps have as many numbers as its text; any other's are brought to so many by products
that are learnt. ``Language`` is our reading of LV-Adapter (Liang et al. 2022, arXiv:2209.08953), which has no code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.deltas.heads import Map, Step
from edgepet.deltas.layers import Add, Attend, Compare, Layer, Point, Resize, Unit
from edgepet.deltas.text import TextTable
from edgepet.networks.context import Context
from edgepet.networks.lowering import array_of, behind
from edgepet.spec import NpArray

TEMPERATURE = 0.07  # of cosines that are judged, CLIP's first
EPS = 1e-6  # of lengths
ASKED = 64  # numbers of a query, of a head


class Scores(nn.Module):
    """Cosines of places and text: standardised maps become (n, K, h, w) of the finest, between -1 and 1.

    The text is that of ``table``, and of each image's own where ``layers`` of a context decoder, ``inner`` wide, have
    seen it; with ``residual`` what is learnt beside each vector is added.
    """

    def __init__(
        self, levels: Sequence[Map], table: TextTable, *, layers: int = 0, inner: int = 64, residual: bool = False
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.table: Tensor
        self.register_buffer("table", torch.from_numpy(table.unit.astype(np.float32)))
        self.projections = nn.ModuleList([nn.Linear(each.channels, table.width, bias=False) for each in levels])
        self.shift = nn.Parameter(torch.zeros(table.width))
        self.context = Context(table.width, inner, layers) if layers else None
        self.residual = nn.Parameter(torch.zeros_like(self.table)) if residual else None

    def begin(self, rng: np.random.Generator) -> None:
        """As drawn; nothing is added to the text."""
        with torch.no_grad():
            for level, projection in zip(self.levels, self.projections, strict=True):
                weight = cast(nn.Linear, projection).weight
                spread = (level.channels * len(self.levels)) ** -0.5
                weight.copy_(torch.from_numpy(rng.normal(0, spread, tuple(weight.shape))))
            nn.init.zeros_(self.shift)
            if self.residual is not None:
                nn.init.zeros_(self.residual)
            if self.context is not None:
                self.context.begin(rng)

    def adopt(self, projection: NpArray, mean: NpArray, deviation: NpArray) -> None:
        """Begin with ``projection`` (C, d) of the one map as it is, before it is standardised."""
        weight = cast(nn.Linear, self.projections[0]).weight
        with torch.no_grad():
            weight.copy_(torch.from_numpy(projection * deviation))
            self.shift.copy_(torch.from_numpy(projection @ mean))

    @property
    def text(self) -> Tensor:
        """Vectors of classes (K, C)."""
        return self.table if self.residual is None else self.table + self.residual

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Of standardised maps, one a level."""
        x = self.shift[:, None, None]
        for level, given, projection in zip(self.levels, maps, self.projections, strict=True):
            y = functional.conv2d(given, cast(nn.Linear, projection).weight[:, :, None, None])
            factor = self.levels[0].height // level.height
            x = x + (y if factor == 1 else functional.interpolate(y, scale_factor=factor, mode="bilinear"))
        text = self.text if self.context is None else self.context(self.text, x)
        words = functional.normalize(text, dim=-1, eps=EPS).expand(len(x), -1, -1)
        return torch.einsum("nkc,nchw->nkhw", words, functional.normalize(x, dim=1, eps=EPS))

    def lower(
        self, statistics: Sequence[tuple[NpArray, NpArray]], *, scale: float, gives: str, reads: Sequence[str] = ()
    ) -> list[Step]:
        """Layers that read maps as they are and give ``scale`` times the cosines; float64 tensors.

        Args:
            statistics: mean and deviation (C,) by which each map is standardised.
            reads: what each map is called where it is not called as itself.
        """
        products, shift = list[NpArray](), array_of(self.shift)
        for projection, (mean, deviation) in zip(self.projections, statistics, strict=True):
            products.append(array_of(cast(nn.Linear, projection).weight) / deviation)
            shift = shift - products[-1] @ mean
        levels = (
            [replace(each, name=name) for each, name in zip(self.levels, reads, strict=True)] if reads else self.levels
        )
        steps = summed(levels, products, shift, last="projected")
        text = array_of(self.text)
        if self.context is not None:
            steps += self.context.lower(text, "projected")
            steps.append(behind(steps, Unit(EPS), "words"))
        steps.append(Step(layer=Unit(EPS), reads=("projected",), gives="places"))
        if self.context is not None:
            return [*steps, Step(layer=Compare(scale), reads=("places", "words"), gives=gives)]
        unit = text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), EPS)
        return [*steps, behind(steps, Point(scale * unit), gives)]


def summed(levels: Sequence[Map], products: Sequence[NpArray], shift: NpArray, *, last: str) -> list[Step]:
    """The sum of a product of each map at the finest stride, and ``shift``, added where places are fewest."""
    steps, parts = list[Step](), list[str]()
    for number, (level, product) in enumerate(zip(levels, products, strict=True)):
        made = last if len(products) == 1 else f"{last}_{number}"
        bias = shift if number == len(products) - 1 else None
        steps.append(Step(layer=Point(product, bias), reads=(level.name,), gives=made))
        factor = levels[0].height // level.height
        if factor > 1:
            made = f"{last}_up_{number}"
            steps.append(behind(steps, Resize(factor), made))
        parts.append(made)
    return steps if len(products) == 1 else [*steps, Step(layer=Add(), reads=tuple(parts), gives=last)]


class Language(nn.Module):
    """Pixels of one map ask the text: x + γ ⊙ W_o softmax(W_q x (W_k T)ᵀ / √a) W_v T, γ = 0 at first; our reading.

    a is ASKED for each of ``heads`` heads. No image changes T: attention is keys and values of K rows when it is
    lowered, and behind a product of the map even its values are.
    """

    def __init__(self, channels: int, table: TextTable, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table: Tensor
        self.register_buffer("table", torch.from_numpy(table.unit.astype(np.float32)))
        inner = heads * ASKED
        self.queries, self.keys = nn.Linear(channels, inner, bias=False), nn.Linear(table.width, inner, bias=False)
        self.values, self.out = nn.Linear(table.width, inner, bias=False), nn.Linear(inner, channels, bias=False)
        self.gamma = nn.Parameter(torch.zeros(channels))

    def begin(self, rng: np.random.Generator) -> None:
        """As drawn; nothing is added to the map."""
        with torch.no_grad():
            for module in (self.queries, self.keys, self.values, self.out):
                drawn = rng.normal(0, module.in_features**-0.5, tuple(module.weight.shape))
                module.weight.copy_(torch.from_numpy(drawn))
            nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Of a standardised map (n, C, h, w), whose shape it keeps."""
        asking = torch.unflatten(self.queries(x.flatten(2).transpose(1, 2)), 2, (self.heads, -1))
        keys, values = (
            torch.unflatten(product(self.table), 1, (self.heads, -1)) for product in (self.keys, self.values)
        )
        shares = (torch.einsum("npha,kha->nphk", asking, keys) * ASKED**-0.5).softmax(dim=3)
        told = torch.einsum("nphk,kha->npha", shares, values).flatten(2)
        return x + torch.unflatten((self.gamma * self.out(told)).transpose(1, 2), 2, tuple(x.shape[2:]))

    def steps(
        self, product: NpArray, constant: NpArray | None, statistics: tuple[NpArray, NpArray], read: str, gives: str
    ) -> list[Step]:
        """What ``product`` (out, C) and ``constant`` make of the map as it is, and of what text tells of it.

        ``statistics`` are mean and deviation (C,) by which the map is standardised, which ``product`` has within.
        """
        mean, deviation = statistics
        return [
            Step(layer=Point(product, constant), reads=(read,), gives=f"{gives}_pixels"),
            Step(layer=self.lower(product * deviation, mean, deviation), reads=(read,), gives=f"{gives}_told"),
            Step(layer=Add(), reads=(f"{gives}_pixels", f"{gives}_told"), gives=gives),
        ]

    def lower(self, product: NpArray, mean: NpArray, deviation: NpArray) -> Layer:
        """What ``product`` (out, C) makes of that which is added to the map, as a layer of the map as it is."""
        text = array_of(self.table)
        width = len(array_of(self.gamma))
        queries = array_of(self.queries.weight).reshape(self.heads, ASKED, width)
        keys, values = (
            (text @ array_of(each.weight).T).reshape(len(text), self.heads, ASKED) for each in (self.keys, self.values)
        )
        out = (product * array_of(self.gamma)) @ array_of(self.out.weight)
        asked = np.einsum("kga,gac->gkc", keys, queries) * ASKED**-0.5 / deviation
        told = np.einsum("kga,oga->gko", values, out.reshape(len(out), self.heads, ASKED))
        return Attend(asked, told, key_bias=-(asked @ mean))
