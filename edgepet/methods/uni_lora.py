"""Uni-LoRA: one vector of d values, of which all low-rank factors of the network are made.

Li et al. 2025, "Uni-LoRA: One Vector is All You Need", arXiv:2506.00799, section 3: the D values of all factors are
P theta. Each row of P has one entry, 1 / sqrt(n) where n rows have theirs in that column, so P^T P = I; which one it is
is drawn from a seed, every column as often as every other, or once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.expressions import Gather, Window
from edgepet.deltas.generator import MOST_VALUES
from edgepet.deltas.updates import LowRank, Targeted
from edgepet.errors import InputError
from edgepet.methods.limits import require_seed
from edgepet.methods.method import SHARED, Recipe, Start
from edgepet.methods.places import attended, attended_parts, block
from edgepet.methods.starts import uniform
from edgepet.spec import Array, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class UniLoRA:
    """Factors of ``rank`` for every part that ``on`` names as LoRA's does, all of one vector of ``d`` values.

    ``seed`` says which value goes where.

    Raises:
        InputError: ``d`` or ``rank`` is below 1, or ``seed`` is not from 0 to below 2^53.
    """

    d: int = 2000
    rank: int = 4
    seed: int = 42
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "uni-lora"
    paper: ClassVar[str] = "Li et al. 2025, arXiv:2506.00799"
    recipe: ClassVar[Recipe] = Recipe(lr=2e-2)
    starts_as_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.d, self.rank) < 1:
            raise InputError(self.name, "needs a d and a rank of at least 1", got=(self.d, self.rank))
        require_seed(self.name, self.seed)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, those of q and v, else every dense one."""
        return attended(layers, self.on)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """Shared ``theta`` (d,), evenly from -0.02 to 0.02; a layer has nothing of its own.

        Raises:
            InputError: all factors together have fewer values than ``d``, or more than a pack may shuffle.
        """
        del base
        if not sites:
            return {}
        total = self._total(sites)
        if not self.d <= total <= MOST_VALUES:
            what = f"needs factors of {self.d} (d) to {MOST_VALUES} values in all"
            raise InputError(self.name, what, got=total, fix="set another d or rank, or other layers with on")
        return {SHARED: {"theta": uniform(rng, 0.02, self.d)}} | {site.name: {} for site in sites}

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """B A as ``LowRank`` of two ``Gather`` on each part's rows.

        Of the D values first A has its own, row by row, then B, part by part in the order of ``sites``, which must be
        all of them.
        """
        del base
        if not sites:
            return ()
        theta, total, at = tuned[SHARED]["theta"], self._total(sites), 0
        updates = []
        for target, rows, columns in self._parts(sites):
            a, b = Window(at, (self.rank, columns)), Window(at + self.rank * columns, (rows, self.rank))
            at = b.start + b.size
            left, right = (Gather(theta, self.seed, total, window) for window in (b, a))
            updates.append(Targeted(target, LowRank(left=left, right=right)))
        return tuple(updates)

    def _parts(self, sites: Sequence[Site]) -> Iterator[tuple[Target, int, int]]:
        for site in sites:
            for part, (first, last) in attended_parts(site, self.on).items():
                yield block(site, part, (first, last)), last - first, site.columns

    def _total(self, sites: Sequence[Site]) -> int:
        return sum(self.rank * (rows + columns) for _, rows, columns in self._parts(sites))
