"""ARC: low-rank adapters in front of attention and MLP, put together anew from projections that all blocks share.

Dong et al. 2023, "Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing", arXiv:2310.06234:
x' = x + P diag(c) P^T x + b, with one P for attention and one for the MLP, and c and b of each block. Hence
W' = W (I + P diag(c) P^T) and a shift of W b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.expressions import Scaled
from edgepet.deltas.updates import Precompose, Targeted
from edgepet.methods.limits import require_rank
from edgepet.methods.method import SHARED, Recipe, Start, pushed
from edgepet.methods.places import parts
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned

_ATTENTION = ("qkv", "q_proj", "k_proj", "v_proj")  # what reads attention's input


@dataclass(frozen=True, slots=True)
class ARC:
    """An adapter of ``rank`` channels in front of the layers whose names end as ``on`` says.

    Those are linear layers, or convolutions of one tap: padding a shifted input with zeros is not exact. Layers of one
    name and one width share a projection; queries, keys and values share one too, and where they are layers of their
    own each has its own c and b. A layer that takes no shift has no b.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 50
    on: tuple[str, ...] = (*_ATTENTION, "fc1")

    name: ClassVar[str] = "arc"
    paper: ClassVar[str] = "Dong et al. 2023, arXiv:2310.06234"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Dense layers of one tap that ``on`` names."""
        flat = (site for site in layers if site.dense and site.taps == 1)
        return tuple(site for site in flat if parts(site, self.on))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """Shared, for a width of 384, "qkv.384.p" and "fc1.384.p" (384, rank), Xavier uniform.

        For each layer ``c`` (rank,), zero in front of attention, else Xavier uniform as (1, rank), and ``b`` (in,)
        zero where it takes a shift.
        """
        del base
        shared: dict[str, NpArray] = {}
        starts: dict[str, dict[str, NpArray]] = {SHARED: shared} if sites else {}
        for site in sites:
            width, kind = site.in_features, _kind(site)
            if _projection(site) not in shared:
                shared[_projection(site)] = uniform(rng, (6 / (width + self.rank)) ** 0.5, width, self.rank)
            bound = 0.0 if kind == _ATTENTION[0] else (6 / (1 + self.rank)) ** 0.5
            starts[site.name] = {"c": uniform(rng, bound, self.rank)}
            if site.takes_shift:
                starts[site.name]["b"] = np.zeros(width, np.float32)
        return starts

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W (I + P diag(c) P^T) as ``Precompose``, P stored once for the network, and W b as ``Push``."""
        del base
        updates = []
        for site in sites:
            own, p = tuned[site.name], tuned[SHARED][_projection(site)]
            through = Precompose(left=p, right=Scaled(own["c"], p, transposed=True))
            updates.append(Targeted(Target(site.weight), through))
            if site.takes_shift:
                updates.append(pushed(site, own["b"]))
        return tuple(updates)


def _kind(site: Site) -> str:
    name = site.name.rpartition(".")[2]
    return _ATTENTION[0] if name in _ATTENTION else name


def _projection(site: Site) -> str:
    return f"{_kind(site)}.{site.in_features}.p"
