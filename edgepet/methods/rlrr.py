"""RLRR: residual low-rank rescaling, one scale for every row of a weight and one for every column.

Dong et al. 2024, "Low-Rank Rescaled Vision Transformer Fine-Tuning: A Residual Design Approach", arXiv:2403.19067:
y = (W + diag(l) W diag(r)) x + b + f on queries, keys, values, projections and the MLP, hence W' = W * (1 + l r^T) and
b' = b + f. Its code (zstarN70/RLRR) scales and shifts norms and the patch embedding as SSF does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Modulate, Targeted
from edgepet.methods.method import Recipe, Start, shift, shift_units
from edgepet.methods.places import all_parts, block
from edgepet.methods.ssf import SSF
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Tensors, Tuned

_ELSEWHERE = SSF()
CHANNELS = 3  # of an image: what reads one is an embedding of patches, or a stem


@dataclass(frozen=True, slots=True)
class RLRR:
    """Rows and columns of every dense layer, its row blocks one by one; SSF on norms, depthwise layers and the first.

    A layer that takes no shift has none. A kernel's columns are in * kh * kw.
    """

    name: ClassVar[str] = "rlrr"
    paper: ClassVar[str] = "Dong et al. 2024, arXiv:2403.19067"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = False

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear, convolution and norm layers, but those to be scaled whose bias is put together on the way."""
        return tuple(site for site in layers if site.operates and (_rescaled(site) or site.scalable))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part of a rescaled layer ``l`` (out, 1) and ``r`` (1, in * kh * kw), those of a block as "q.l".

        Both are Kaiming uniform, that is up to the square root of 6 and of 6 / columns; ``f`` (out,) is zero. Elsewhere
        SSF's ``gamma`` and ``beta``.
        """
        return {site.name: self._start(site, base, rng) for site in sites}

    def _start(self, site: Site, base: Tensors, rng: np.random.Generator) -> Mapping[str, NpArray]:
        if not _rescaled(site):
            return _ELSEWHERE.start((site,), base, rng)[site.name]
        tensors: dict[str, NpArray] = {}
        for part, (first, last) in all_parts(site).items():
            tensors[f"{part}l"] = uniform(rng, 6**0.5, last - first, 1)
            tensors[f"{part}r"] = uniform(rng, (6 / site.columns) ** 0.5, 1, site.columns)
        if site.takes_shift:
            tensors["f"] = np.zeros(site.out_features, np.float32)
        return tensors

    def units(self, sites: Sequence[Site], base: Tensors) -> Start:
        """f and beta in front of a batch norm are learnt in that norm's deviations."""
        return shift_units(sites, base, "f", "beta")

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W * (1 + l r^T) as ``Modulate`` on each part's rows, and f as ``Add``; elsewhere as SSF."""
        updates = list[Targeted]()
        for site in sites:
            if not _rescaled(site):
                updates += _ELSEWHERE.lower(base, (site,), tuned)
                continue
            own = tuned[site.name]
            for part, rows in all_parts(site).items():
                updates.append(Targeted(block(site, part, rows), Modulate(own[f"{part}l"], own[f"{part}r"])))
            if site.takes_shift:
                updates.append(shift(site, own["f"]))
        return tuple(updates)


def _rescaled(site: Site) -> bool:
    return site.dense and site.in_features > CHANNELS
