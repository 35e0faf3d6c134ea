"""VeRA: two vectors for each layer between random matrices that all layers share and nobody stores.

Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454, equation 2:
W' = W + diag(b) B diag(d) A, A and B frozen and drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.expressions import Scaled, Seeded, Window
from edgepet.deltas.generator import MOST_VALUES
from edgepet.deltas.updates import LowRank, Targeted
from edgepet.errors import InputError
from edgepet.methods.limits import require_rank, require_seed
from edgepet.methods.method import Recipe, Start
from edgepet.methods.places import attended, attended_parts, block
from edgepet.spec import Array, NpArray, Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class VeRA:
    """Two vectors for every part that ``on`` names as LoRA's does, around matrices of ``rank`` drawn from ``seed``.

    A and B are one pair for the network, as long as its largest part: one of fewer columns or rows takes the first of
    them. Each is drawn as Kaiming's for the part's own size. ``d_initial`` is what d starts at.

    Raises:
        InputError: ``rank`` is below 1, or ``seed`` is not from 0 to below 2^53.
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "Kopiczko et al. 2024, arXiv:2310.11454"
    recipe: ClassVar[Recipe] = Recipe(lr=2e-2)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)
        require_seed(self.name, self.seed)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, those of q and v, else every dense one."""
        return attended(layers, self.on)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part ``d`` (rank,) of ``d_initial`` and ``b`` (out,) zero; those of a row block are "q.d", "q.b".

        Raises:
            InputError: a part is so large that a pack could not ask a device to draw its matrices.
        """
        del base, rng
        return {site.name: self._start(site) for site in sites}

    def _start(self, site: Site) -> dict[str, NpArray]:
        tensors: dict[str, NpArray] = {}
        for part, (first, last) in attended_parts(site, self.on).items():
            longest = max(last - first, site.columns)
            if longest * self.rank > MOST_VALUES:
                what = f"needs a rank of at most {MOST_VALUES // longest} on {site.name}: a pack draws {MOST_VALUES}"
                raise InputError(self.name, f"{what} values at once", got=self.rank)
            tensors[f"{part}d"] = np.full(self.rank, self.d_initial, np.float32)
            tensors[f"{part}b"] = np.zeros(last - first, np.float32)
        return tensors

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """diag(b) B diag(d) A as ``LowRank`` of two ``Scaled`` matrices, both ``Seeded``, on each part's rows.

        A is drawn transposed, so that its first columns are the first values of one sequence; B's begin behind them.
        """
        del base
        updates = []
        for site in sites:
            for part, (first, last) in attended_parts(site, self.on).items():
                d, b = tuned[site.name][f"{part}d"], tuned[site.name][f"{part}b"]
                a_drawn = Seeded(self.seed, (6 / site.columns) ** 0.5, Window(0, (site.columns, self.rank)))
                b_drawn = Seeded(self.seed, (6 / self.rank) ** 0.5, Window(MOST_VALUES, (last - first, self.rank)))
                low_rank = LowRank(left=Scaled(b, b_drawn), right=Scaled(d, a_drawn, transposed=True))
                updates.append(Targeted(block(site, part, (first, last)), low_rank))
        return tuple(updates)
