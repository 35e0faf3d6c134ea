"""RepAdapter: a linear adapter in front of a layer, folded into it.

Luo et al. 2023, "Towards Efficient Visual Adaption via Structural Re-parameterization", arXiv:2302.08106, equation 6:
x' = x + s (B (A x + a) + b) with B in groups, hence W' = W (I + s B A) and a shift of s W (B a + b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Precompose, Targeted
from edgepet.errors import InputError
from edgepet.methods.method import Recipe, Start, pushed
from edgepet.methods.places import parts
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class RepAdapter:
    """An adapter to ``rank`` channels and back in ``groups`` in front of the layers whose names end as ``on`` says.

    Those are linear layers, or convolutions of one tap: padding a shifted input with zeros is not exact. A layer that
    takes no shift has an adapter without biases.

    Raises:
        InputError: ``rank`` or ``groups`` is below 1, or ``groups`` does not divide ``rank``.
    """

    rank: int = 8
    groups: int = 2
    scale: float = 1.0
    on: tuple[str, ...] = ("qkv", "q_proj", "k_proj", "v_proj", "fc1")

    name: ClassVar[str] = "repadapter"
    paper: ClassVar[str] = "Luo et al. 2023, arXiv:2302.08106"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.groups < 1 or self.rank < 1 or self.rank % self.groups:
            raise InputError(self.name, "needs a rank that its groups divide", got=(self.rank, self.groups))

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Dense layers of one tap that ``on`` names and whose inputs ``groups`` divides."""
        flat = (site for site in layers if site.dense and site.taps == 1 and site.in_features % self.groups == 0)
        return tuple(site for site in flat if parts(site, self.on))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``down`` (rank, in) Xavier uniform, ``up`` (groups, in / groups, rank / groups) zero.

        Where the layer takes a shift ``down.bias`` (rank,) and ``up.bias`` (in,), zero.
        """
        del base
        return {site.name: self._start(site, rng) for site in sites}

    def _start(self, site: Site, rng: np.random.Generator) -> dict[str, NpArray]:
        width = site.in_features
        tensors: dict[str, NpArray] = {
            "down": uniform(rng, (6 / (width + self.rank)) ** 0.5, self.rank, width),  # Xavier uniform
            "up": np.zeros((self.groups, width // self.groups, self.rank // self.groups), np.float32),
        }
        if site.takes_shift:
            tensors |= {"down.bias": np.zeros(self.rank, np.float32), "up.bias": np.zeros(width, np.float32)}
        return tensors

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W (I + scale B A) as ``Precompose`` and scale W (B a + b) as ``Push`` where a shift goes.

        A is ``down``, B block-diagonal of ``up``, a and b are their biases, which are stored as the one vector B a + b.
        """
        del base
        updates = []
        for site in sites:
            up, down = tuned[site.name]["up"], tuned[site.name]["down"]
            updates.append(Targeted(Target(site.weight), Precompose(left=up, right=down, scale=self.scale)))
            if site.takes_shift:
                a, b = tuned[site.name]["down.bias"], tuned[site.name]["up.bias"]
                moved = (up @ a.reshape(self.groups, -1, 1)).reshape(-1) + b
                updates.append(pushed(site, moved, scale=self.scale))
        return tuple(updates)
