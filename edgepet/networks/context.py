"""The context decoder of DenseCLIP: vectors of classes that have seen the image.

Rao et al. 2022, "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", arXiv:2112.01518, section
3.3, "post-model prompting", as its code has it: with T (K, C) the text and V the image's map of as many channels, its
mean g in front of its places,

    M = LN(Linear(LN([g; V])));  x = Linear(LN(T));  x += SA(LN x);  x += CA(LN x, M);  x += MLP(LN x), ``layers`` times
    T' = T + γ ⊙ Linear(LN(x)),  γ = 1e-4 at first

without the biases of queries, keys and values, and without dropout. g is the mean of V here: there is no class token
whose projection is known. Up to the query of the first cross attention nothing sees the image: there it is constant
when the decoder is lowered, and so is T. Needs the ``train`` extra.
"""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.deltas.heads import Step
from edgepet.deltas.layers import Activation, Add, Ask, Attention, Layer, Mean, Norm, Point, Shift
from edgepet.networks.head_settings import CONTEXT_HEADS
from edgepet.networks.lowering import array_of, behind
from edgepet.spec import NpArray

GAMMA = 1e-4
EPS = 1e-5  # of its layer norms: torch's default, as the code has it
_SPREAD = 0.02  # of what products start with
_WIDER = 4  # times the width within the MLP
_SOURCES = ("memory", "whole")  # the map's places, and its mean


class Heads(nn.Module):
    """Attention of rows (n, K, w) to others (n, P, w), CONTEXT_HEADS heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, rows: Tensor, others: Tensor) -> Tensor:
        """(n, K, w)."""
        asking, keys, values = (
            torch.unflatten(product(x), -1, (CONTEXT_HEADS, -1)).transpose(1, 2)
            for product, x in ((self.queries, rows), (self.keys, others), (self.values, others))
        )
        shares = (asking @ keys.transpose(2, 3) * asking.shape[-1] ** -0.5).softmax(dim=3)
        return cast(Tensor, self.out((shares @ values).transpose(1, 2).flatten(2)))


class Layered(nn.Module):
    """One layer of the decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=EPS) for _ in range(3)])
        self.among, self.across = Heads(width), Heads(width)
        self.wide, self.narrow = nn.Linear(width, _WIDER * width), nn.Linear(_WIDER * width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Rows (n, K, w) that have asked one another and (n, P, w)."""
        seen = self.norms[0](x)
        x = x + self.among(seen, seen)
        x = x + self.across(self.norms[1](x), memory)
        return x + cast(Tensor, self.narrow(functional.gelu(self.wide(self.norms[2](x)))))


class Context(nn.Module):
    """The decoder for vectors of ``channels`` numbers, ``width`` wide; rows (K, C) and maps (n, C, h, w)."""

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        self.seen, self.memory, self.remembered = (
            nn.LayerNorm(channels, eps=EPS), nn.Linear(channels, width), nn.LayerNorm(width, eps=EPS),
        )  # fmt: skip
        self.read, self.text = nn.LayerNorm(channels, eps=EPS), nn.Linear(channels, width)
        self.layers = nn.ModuleList([Layered(width) for _ in range(layers)])
        self.told, self.out = nn.LayerNorm(width, eps=EPS), nn.Linear(width, channels)
        self.gamma = nn.Parameter(torch.full((channels,), GAMMA))

    def begin(self, rng: np.random.Generator) -> None:
        """As drawn: products of a spread of 0.02, all norms as none."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
                elif isinstance(module, nn.Linear):
                    drawn = rng.normal(0, _SPREAD, tuple(module.weight.shape))
                    module.weight.copy_(torch.from_numpy(drawn))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            nn.init.constant_(self.gamma, GAMMA)

    def forward(self, text: Tensor, x: Tensor) -> Tensor:
        """Vectors (n, K, C) of each image."""
        flat = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([flat.mean(dim=1, keepdim=True), flat], dim=1)
        memory = self.remembered(self.memory(self.seen(tokens)))
        rows = self.text(self.read(text)).expand(len(x), -1, -1)
        for layer in self.layers:
            rows = layer(rows, memory)
        told: Tensor = self.out(self.told(rows))
        return text + self.gamma * told

    # ------------------------------------------------------------------------------------------------------- lowering

    def lower(self, text: NpArray, read: str) -> list[Step]:
        """Layers that read the map ``read`` and give its vectors as rows, the last one's; ``text`` float64 (K, C)."""
        exact = copy.deepcopy(self).double()
        product, shift = _behind_norm(self.seen, self.memory)
        steps = [Step(layer=Mean(), reads=(read,), gives="mean")]
        for source, given in zip(_SOURCES, (read, "mean"), strict=True):
            steps.append(Step(layer=Norm(eps=EPS), reads=(given,), gives=f"{source}_in"))
            steps.append(behind(steps, Point(product, shift), f"{source}_width"))
            steps.append(behind(steps, Norm(eps=EPS), source))
        with torch.no_grad():
            first = cast(Layered, exact.layers[0])
            rows = exact.text(exact.read(torch.from_numpy(text).to(exact.gamma)))[None]
            seen = first.norms[0](rows)
            rows = rows + first.among(seen, seen)
            asking = torch.unflatten(first.across.queries(first.norms[1](rows))[0], -1, (CONTEXT_HEADS, -1))
        steps += self._first(first, array_of(rows[0]), array_of(asking))
        for number, layer in enumerate(self.layers):
            if number:
                steps += self._further(cast(Layered, layer), steps[-1].gives, number)
            steps += _mlp(cast(Layered, layer), steps[-1].gives, number)
        gamma = array_of(self.gamma)
        product, shift = _behind_norm(self.told, self.out)
        steps.append(behind(steps, Norm(eps=EPS), "rows_out"))
        steps.append(behind(steps, Point(gamma[:, None] * product), "rows_told"))
        steps.append(behind(steps, Shift((text + gamma * shift).T[:, :, None]), "text"))
        return steps

    def _first(self, layer: Layered, rows: NpArray, asking: NpArray) -> list[Step]:
        """The first cross attention, whose queries (K, CONTEXT_HEADS, a) no image changes."""
        scale, shift = (array_of(x) for x in (self.remembered.weight, self.remembered.bias))
        keys = np.reshape(array_of(layer.across.keys.weight) * scale, (CONTEXT_HEADS, -1, len(scale)))
        queries = np.einsum("kga,gac->gkc", asking, keys) * asking.shape[2] ** -0.5
        values, out = array_of(layer.across.values.weight), array_of(layer.across.out.weight)
        steps = _products(values * scale, "values_0")
        reads = tuple(name for source in _SOURCES for name in (source, f"{source}_values_0"))
        steps.append(Step(layer=Ask(queries), reads=reads, gives="asked_0"))
        steps.append(behind(steps, Point(out), "found_0"))
        constant = rows + out @ (values @ shift) + array_of(layer.across.out.bias)
        steps.append(behind(steps, Shift(constant.T[:, :, None]), "rows_0"))
        return steps

    def _further(self, layer: Layered, read: str, number: int) -> list[Step]:
        """The attentions of a layer behind the first."""
        one = (array_of(self.remembered.weight), array_of(self.remembered.bias))
        own = cast(nn.LayerNorm, layer.norms[0])
        among = (array_of(own.weight), array_of(own.bias))
        steps = [Step(layer=Norm(eps=EPS), reads=(read,), gives=f"seen_{number}")]
        name = steps[-1].gives
        queries, keys, values, out = _attention(layer.among, among, among)
        for part, product in (("queries", queries), ("keys", keys), ("values", values)):
            steps.append(Step(layer=product, reads=(name,), gives=f"{part}_{number}"))
        reads = tuple(f"{part}_{number}" for part in ("queries", "keys", "values"))
        steps.append(Step(layer=Attention(CONTEXT_HEADS), reads=reads, gives=f"among_{number}"))
        steps += [behind(steps, out, f"said_{number}")]
        steps.append(Step(layer=Add(), reads=(read, f"said_{number}"), gives=f"rows_among_{number}"))
        norm = cast(nn.LayerNorm, layer.norms[1])
        queries, keys, values, out = _attention(layer.across, (array_of(norm.weight), array_of(norm.bias)), one)
        steps.append(behind(steps, Norm(eps=EPS), f"asks_{number}"))
        steps.append(behind(steps, queries, f"asking_{number}"))
        steps += [
            Step(layer=product, reads=(source,), gives=f"{source}_{part}_{number}")
            for part, product in (("keys", keys), ("values", values))
            for source in _SOURCES
        ]
        pairs = tuple(f"{source}_{part}_{number}" for source in _SOURCES for part in ("keys", "values"))
        steps.append(Step(layer=Attention(CONTEXT_HEADS), reads=(f"asking_{number}", *pairs), gives=f"asked_{number}"))
        steps.append(behind(steps, out, f"found_{number}"))
        steps.append(Step(layer=Add(), reads=(f"rows_among_{number}", f"found_{number}"), gives=f"rows_{number}"))
        return steps


def _products(weight: NpArray, name: str) -> list[Step]:
    """One product of both sources of the memory; what they share is stored once."""
    return [Step(layer=Point(weight), reads=(source,), gives=f"{source}_{name}") for source in _SOURCES]


def _behind_norm(norm: nn.LayerNorm, product: nn.Linear) -> tuple[NpArray, NpArray]:
    """Weight and bias of ``product`` behind a norm without either."""
    weight = array_of(product.weight)
    return weight * array_of(norm.weight), weight @ array_of(norm.bias) + array_of(product.bias)


def _attention(
    heads: Heads, asking: tuple[NpArray, NpArray], asked: tuple[NpArray, NpArray]
) -> tuple[Layer, Layer, Layer, Layer]:
    """Products of queries, keys and values behind norms of such weight and bias without either, and that of out.

    What a bias adds to keys is the same for all places, and softmax does not see it; what it adds to values comes out
    as it is, for shares sum to one.
    """
    queries, keys, values = (array_of(each.weight) for each in (heads.queries, heads.keys, heads.values))
    scale = (len(queries) // CONTEXT_HEADS) ** -0.5
    out, bias = array_of(heads.out.weight), array_of(heads.out.bias)
    return (
        Point(scale * queries * asking[0], scale * (queries @ asking[1])),
        Point(keys * asked[0]),
        Point(values * asked[0]),
        Point(out, out @ (values @ asked[1]) + bias),
    )


def _mlp(layer: Layered, read: str, number: int) -> list[Step]:
    steps = [Step(layer=Norm(eps=EPS), reads=(read,), gives=f"inner_{number}")]
    steps.append(behind(steps, Point(*_behind_norm(cast(nn.LayerNorm, layer.norms[2]), layer.wide)), f"wide_{number}"))
    steps.append(behind(steps, Activation("gelu"), f"bent_{number}"))
    last = Point(array_of(layer.narrow.weight), array_of(layer.narrow.bias))
    steps.append(behind(steps, last, f"narrow_{number}"))
    return [*steps, Step(layer=Add(), reads=(read, f"narrow_{number}"), gives=f"thought_{number}")]
