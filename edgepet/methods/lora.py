"""LoRA: a low-rank addition to chosen weights.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1:
W' = W + (alpha / rank) B A, with A drawn as a linear layer's weight and B zero. Rank-stabilised: Kalajdzievski 2023,
"A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732: alpha / sqrt(rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import LowRank, Targeted
from edgepet.methods.limits import require_rank
from edgepet.methods.method import Recipe, Start
from edgepet.methods.places import attended, attended_parts, block, ending
from edgepet.methods.starts import zero_product
from edgepet.spec import Array, NpArray, Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class LoRA:
    """A factor pair for every row block or layer named in ``on``.

    ``on`` holds row blocks of a fused weight ("q", "k", "v") or ends of layer names ("fc1", "attn.proj"). Empty, it
    is q and v, and in a network without attention every linear layer and every convolution of one group. A kernel
    is factored as the matrix (out, in * kh * kw): a k x k convolution to ``rank`` channels, then a 1 x 1.

    ``ranks`` and ``alphas`` give layers by the end of their names another rank or alpha; ``rslora`` divides alpha by
    the rank's square root.

    Raises:
        InputError: ``rank`` or one of ``ranks`` is below 1.
    """

    rank: int = 8
    alpha: float = 8.0
    on: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True
    activation_kinds: ClassVar[tuple[str, ...]] = ("linear",)  # a convolution's padding is not the hook's to repeat

    def __post_init__(self) -> None:
        require_rank(self.name, min((self.rank, *self.ranks.values())))

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, those of q and v, else every dense one."""
        return attended(layers, self.on)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part ``a`` (rank, in * kh * kw) as a linear layer's weight and ``b`` (out, rank) zero.

        Those of a row block are "q.a" and "q.b", and its out are the block's rows.
        """
        del base
        return {site.name: self._start(site, rng) for site in sites}

    def _start(self, site: Site, rng: np.random.Generator) -> dict[str, NpArray]:
        tensors: dict[str, NpArray] = {}
        for part, (first, last) in attended_parts(site, self.on).items():
            pair = zero_product(rng, self._rank(site), last - first, site.columns)
            tensors[f"{part}a"], tensors[f"{part}b"] = pair
        return tensors

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W + ``scale`` B A as ``LowRank`` on each part's rows."""
        del base
        updates = []
        for site in sites:
            for part, rows in attended_parts(site, self.on).items():
                a, b = tuned[site.name][f"{part}a"], tuned[site.name][f"{part}b"]
                updates.append(Targeted(block(site, part, rows), LowRank(left=b, right=a, scale=self.scale(site))))
        return tuple(updates)

    def forward(self, site: Site, x: Array, y: Array, tuned: Mapping[str, Array], *, training: bool) -> Array:
        """y + ``scale`` B A x, each part's on its own rows, for ``x`` (..., in) and ``y`` (..., out)."""
        import torch
        from torch.nn.functional import linear, pad

        del training
        parts = attended_parts(site, self.on)
        down = torch.cat([tuned[f"{part}a"] for part in parts])
        # All blocks in two products: row blocks that carry nothing are zero rows of the second factor.
        columns = [
            pad(tuned[f"{part}b"], (0, 0, first, site.out_features - last)) for part, (first, last) in parts.items()
        ]
        up = self.scale(site) * torch.cat(columns, dim=1)
        # The scale rides on the small factor and the sum inside the product: no further pass over the activations.
        flat = torch.addmm(y.reshape(-1, site.out_features), linear(x, down).reshape(-1, up.shape[1]), up.T)
        return flat.reshape(y.shape)

    def scale(self, site: Site) -> float:
        """What multiplies B A on this layer."""
        rank = self._rank(site)
        return float(ending(site, self.alphas, self.alpha) / (rank**0.5 if self.rslora else rank))

    def _rank(self, site: Site) -> int:
        return ending(site, self.ranks, self.rank)
