"""DoRA: LoRA for the direction of every row of a weight, and a trained length for it.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, equation 5:
W' = m * (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, lengths taken row by row, and m = |W| at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import LowRank, Scale, Targeted, fold
from edgepet.methods.limits import require_rank
from edgepet.methods.method import Recipe, Start
from edgepet.methods.places import attended, attended_parts, block
from edgepet.methods.starts import zero_product
from edgepet.spec import Array, NpArray, Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class DoRA:
    """LoRA's factors and a length for each row, on the layers that ``on`` names as LoRA's does.

    It lowers to a low-rank addition and a scale of rows, m / |W + B A|: a device computes no lengths. Gradients go
    through the lengths too; the paper's section 4.3 holds them constant to save memory.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 8
    alpha: float = 8.0
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2402.09353"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, those of q and v, else every dense one."""
        return attended(layers, self.on)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part ``a`` (rank, in * kh * kw) as a linear layer's weight, ``b`` (out, rank) zero, ``m`` (out,).

        ``m`` is the length of each row of W. Those of a row block are "q.a", "q.b" and "q.m".
        """
        return {site.name: self._start(site, base, rng) for site in sites}

    def _start(self, site: Site, base: Tensors, rng: np.random.Generator) -> dict[str, NpArray]:
        tensors: dict[str, NpArray] = {}
        for part, (first, last) in attended_parts(site, self.on).items():
            pair = zero_product(rng, self.rank, last - first, site.columns)
            tensors[f"{part}a"], tensors[f"{part}b"] = pair
            rows = base[site.weight][first:last].astype(np.float64)
            tensors[f"{part}m"] = (_squares(rows.reshape(len(rows), -1)) ** 0.5).astype(np.float32)
        return tensors

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """For each part V = W + (alpha / rank) B A as ``LowRank``, then m / |V|, row by row, as ``Scale``."""
        updates = []
        for site in sites:
            for part, rows in attended_parts(site, self.on).items():
                a, b, m = (tuned[site.name][f"{part}{name}"] for name in "abm")
                low_rank = Targeted(block(site, part, rows), LowRank(left=b, right=a, scale=self.alpha / self.rank))
                updates += [low_rank, rescaled(low_rank, base[site.weight], m)]
        return tuple(updates)


def rescaled(low_rank: Targeted, weight: Array, lengths: Array) -> Targeted:
    """The scale behind ``low_rank`` that gives the rows of its target in ``weight`` these ``lengths``, (rows,).

    ``weight`` is the whole tensor and is not touched. A row that is zero by then, which no scale lengthens, is taken
    for one of length 1: it stays zero.
    """
    moved = fold(low_rank, weight)
    first, last = low_rank.target.rows or (0, len(moved))
    squares = _squares(moved.reshape(len(moved), -1)[first:last])
    return Targeted(low_rank.target, Scale(lengths / (squares + (squares == 0)) ** 0.5))


def _squares(rows: Array) -> Array:
    return (rows * rows).sum(-1)
