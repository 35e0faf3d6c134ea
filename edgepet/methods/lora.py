"""LoRA: a low-rank addition to chosen weights.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1:
W' = W + (alpha / rank) B A, with A drawn as a linear layer's weight and B zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.errors import InputError
from edgepet.methods.method import Recipe
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned
from edgepet.updates import LowRank, Targeted

_WHOLE = ""  # the part of a layer that is not cut into blocks
_ATTENTION = ("q", "v", "q_proj", "v_proj")  # layers of attention that is not fused


@dataclass(frozen=True, slots=True)
class LoRA:
    """A factor pair for every row block or layer named in ``on``.

    ``on`` holds row blocks of a fused weight ("q", "k", "v") or ends of layer names ("fc1", "attn.proj"). Empty, it
    is q and v, and in a network without attention every linear layer and every convolution of one group. A kernel
    is factored as the matrix (out, in * kh * kw): a k x k convolution to ``rank`` channels, then a 1 x 1.
    """

    rank: int = 8
    alpha: float = 8.0
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True
    activation_kinds: ClassVar[tuple[str, ...]] = ("linear",)  # a convolution's padding is not the hook's to repeat

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError("lora", "needs a rank of at least 1", got=self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        if self.on:
            return tuple(site for site in layers if self._parts(site))
        attention = tuple(site for site in layers if site.blocks or _named(site, _ATTENTION))
        return attention or tuple(site for site in layers if site.dense)

    def start(self, site: Site, base: Tensors, rng: np.random.Generator) -> Mapping[str, NpArray]:
        del base
        bound = 1 / np.sqrt(site.columns)  # Kaiming uniform with a = sqrt(5), as a linear layer starts
        tensors: dict[str, NpArray] = {}
        for part, (first, last) in self._parts(site).items():
            tensors[f"{part}a"] = rng.uniform(-bound, bound, (self.rank, site.columns)).astype(np.float32)
            tensors[f"{part}b"] = np.zeros((last - first, self.rank), np.float32)
        return tensors

    def lower(self, base: Tensors, sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        del base
        updates = []
        for site in sites:
            for part, rows in self._parts(site).items():
                target = Target(site.weight, None if part == _WHOLE else rows)
                a, b = tuned[site.name][f"{part}a"], tuned[site.name][f"{part}b"]
                updates.append(Targeted(target, LowRank(left=b, right=a, scale=self.alpha / self.rank)))
        return tuple(updates)

    def forward(self, site: Site, x: Array, y: Array, tuned: Mapping[str, Array], *, training: bool) -> Array:
        import torch
        from torch.nn.functional import linear, pad

        del training
        parts = self._parts(site)
        down = torch.cat([tuned[f"{part}a"] for part in parts])
        # All blocks in two products: row blocks that carry nothing are zero rows of the second factor.
        columns = [
            pad(tuned[f"{part}b"], (0, 0, first, site.out_features - last)) for part, (first, last) in parts.items()
        ]
        up = self.alpha / self.rank * torch.cat(columns, dim=1)
        # The scale rides on the small factor and the sum inside the product: no further pass over the activations.
        flat = torch.addmm(y.reshape(-1, site.out_features), linear(x, down).reshape(-1, up.shape[1]), up.T)
        return flat.reshape(y.shape)

    def _parts(self, site: Site) -> dict[str, tuple[int, int]]:
        """Row ranges by part name, with a dot behind it; the whole layer is the part without a name."""
        if site.kind not in ("linear", "conv"):
            return {}
        blocks = {f"{name}.": rows for name, rows in site.blocks if name in (self.on or ("q", "v"))}
        if blocks:
            return blocks
        return {_WHOLE: (0, site.out_features)} if not self.on or _named(site, self.on) else {}


def _named(site: Site, endings: tuple[str, ...]) -> bool:
    return any(f".{site.name}".endswith(f".{ending}") for ending in endings)
