"""HTA: a diagonal between two Householder transformations, and a low-rank addition.

Dong et al. 2024, "Efficient Adaptation of Pre-trained Vision Transformer via Householder Transformation",
arXiv:2410.22952, equations 3 to 6: W' = W + (I - l l^T) D (I - r r^T) + B A, with D diagonal and B A of rank 1. A
transformation reflects where its vector has a squared length of 2; the paper holds it to none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.expressions import Householder
from edgepet.deltas.updates import Add, LowRank, Targeted
from edgepet.errors import InputError
from edgepet.methods.method import Recipe, Start
from edgepet.methods.places import attended, attended_parts
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned

PROJECTIONS = ("q", "k", "v", "q_proj", "k_proj", "v_proj", "attn.proj")  # of an attention, all four


@dataclass(frozen=True, slots=True)
class HTA:
    """Two vectors, a diagonal and ``rank`` pairs of factors for every part that ``on`` names as LoRA's does.

    Where ``on`` is empty that is queries, keys, values and attention's projection, and in a network without attention
    every dense layer. A part that is not square has a rectangular diagonal.

    Raises:
        InputError: ``rank`` is below 0.
    """

    rank: int = 1
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "hta"
    paper: ClassVar[str] = "Dong et al. 2024, arXiv:2410.22952"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(self.name, "needs a rank of at least 0", got=self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, attention's four, else every dense one."""
        return attended(layers, self.on, PROJECTIONS)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part ``l`` (out,) and ``r`` (in * kh * kw,) of squared length 2 on average, even; ``d`` zero.

        ``d`` is as long as the shorter of both. ``a`` (rank, in * kh * kw) as a linear layer's weight and ``b``
        (out, rank) zero. Those of a row block are "q.l" and so on, and its out are the block's rows.
        """
        del base
        return {site.name: self._start(site, rng) for site in sites}

    def _start(self, site: Site, rng: np.random.Generator) -> dict[str, NpArray]:
        tensors: dict[str, NpArray] = {}
        for part, (first, last) in attended_parts(site, self.on, PROJECTIONS).items():
            rows, columns = last - first, site.columns
            tensors[f"{part}l"] = uniform(rng, (6 / rows) ** 0.5, rows)
            tensors[f"{part}d"] = np.zeros(min(rows, columns), np.float32)
            tensors[f"{part}r"] = uniform(rng, (6 / columns) ** 0.5, columns)
            if self.rank:
                tensors[f"{part}a"] = uniform(rng, columns**-0.5, self.rank, columns)
                tensors[f"{part}b"] = np.zeros((rows, self.rank), np.float32)
        return tensors

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """(I - l l^T) D (I - r r^T) as ``Add`` of a ``Householder``, then B A as ``LowRank``, on each part's rows."""
        del base
        updates = []
        for site in sites:
            own = tuned[site.name]
            for part, rows in attended_parts(site, self.on, PROJECTIONS).items():
                target = Target(site.weight, rows)  # rows of a whole layer too: a kernel is then seen as a matrix
                turned = Householder(left=own[f"{part}l"], d=own[f"{part}d"], right=own[f"{part}r"])
                updates.append(Targeted(target, Add(turned)))
                if self.rank:
                    updates.append(Targeted(target, LowRank(left=own[f"{part}b"], right=own[f"{part}a"])))
        return tuple(updates)
