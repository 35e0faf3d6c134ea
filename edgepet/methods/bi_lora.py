"""1-bit LoRA: both factors have two values each, and more of them for the same bytes.

Jie et al. 2023, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
arXiv:2307.16867, section 3: a tensor is standardised, each value goes to the nearer of the two codewords of a normal
distribution, -0.6745 and 0.6745, and back; gradients pass straight through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.expressions import Binary, Factor
from edgepet.deltas.updates import LowRank, Targeted
from edgepet.methods.limits import require_rank
from edgepet.methods.method import Recipe, Start
from edgepet.methods.places import attended, attended_parts, block
from edgepet.methods.starts import cut_normal, uniform
from edgepet.spec import Array, NpArray, Site, Tensors, Tuned

CODEWORD = 0.6744897501960817  # the third quartile of N(0, 1): the median of its upper half


@dataclass(frozen=True, slots=True)
class BiLoRA:
    """LoRA's factors on the parts that ``on`` names as LoRA's does, each stored as bits and two levels.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 32
    scale: float = 1.0
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "bi-lora"
    paper: ClassVar[str] = "Jie et al. 2023, arXiv:2307.16867"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = False  # zeros cannot be standardised

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, those of q and v, else every dense one."""
        return attended(layers, self.on)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part ``a`` (rank, in * kh * kw) as a linear layer's weight, ``b`` (out, rank) near zero.

        ``b`` is normal with deviation 1e-3, cut at two deviations. Those of a row block are "q.a" and "q.b".
        """
        del base
        starts: dict[str, dict[str, NpArray]] = {}
        for site in sites:
            tensors = starts[site.name] = {}
            for part, (first, last) in attended_parts(site, self.on).items():
                tensors[f"{part}a"] = uniform(rng, 1 / np.sqrt(site.columns), self.rank, site.columns)
                tensors[f"{part}b"] = cut_normal(rng, 1e-3, last - first, self.rank)
        return starts

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W + scale B A as ``LowRank`` on each part's rows, both factors of two values each.

        NumPy factors become ``Binary``; torch ones the values that it stands for, with a gradient straight through.
        """
        del base
        updates = []
        for site in sites:
            for part, rows in attended_parts(site, self.on).items():
                a, b = (_binary(tuned[site.name][f"{part}{name}"]) for name in "ab")
                updates.append(Targeted(block(site, part, rows), LowRank(left=b, right=a, scale=self.scale)))
        return tuple(updates)


def _binary(latent: Array) -> Factor:
    """Bits and levels of a NumPy array; of a torch tensor their values, with the gradient of the tensor itself."""
    mean = latent.mean()
    spread = (((latent - mean) ** 2).sum() / (np.prod(latent.shape) - 1)) ** 0.5
    bits = latent > mean
    if isinstance(latent, np.ndarray):
        levels = np.stack([mean - CODEWORD * spread, mean + CODEWORD * spread])
        return Binary(bits, levels)
    nearest = mean + CODEWORD * spread * (bits * 2 - 1)
    return latent + (nearest - latent).detach()
