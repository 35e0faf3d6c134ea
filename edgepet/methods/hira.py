"""HiRA: a weight times, element by element, an addition of low rank.

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR,
openreview TwJrTz9cRS: W' = W + W * (B A), with A drawn as a linear layer's weight and B zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Modulate, Targeted
from edgepet.methods.limits import require_rank
from edgepet.methods.method import Recipe, Start
from edgepet.methods.places import attended, attended_parts, block
from edgepet.methods.starts import zero_product
from edgepet.spec import Array, NpArray, Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class HiRA:
    """A factor pair for every row block or layer that ``on`` names as LoRA's does.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 32
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "hira"
    paper: ClassVar[str] = "Huang et al. 2025, openreview:TwJrTz9cRS"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, those of q and v, else every dense one."""
        return attended(layers, self.on)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part ``a`` (rank, in * kh * kw) as a linear layer's weight and ``b`` (out, rank) zero.

        Those of a row block are "q.a" and "q.b", and its out are the block's rows.
        """
        del base
        starts: dict[str, dict[str, NpArray]] = {}
        for site in sites:
            tensors = starts[site.name] = {}
            for part, (first, last) in attended_parts(site, self.on).items():
                pair = zero_product(rng, self.rank, last - first, site.columns)
                tensors[f"{part}a"], tensors[f"{part}b"] = pair
        return starts

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W + W * (B A) as ``Modulate`` on each part's rows."""
        del base
        updates = []
        for site in sites:
            for part, rows in attended_parts(site, self.on).items():
                a, b = tuned[site.name][f"{part}a"], tuned[site.name][f"{part}b"]
                updates.append(Targeted(block(site, part, rows), Modulate(left=b, right=a)))
        return tuple(updates)
