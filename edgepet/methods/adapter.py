"""Adapters: a bottleneck with an activation and a residual of its own, behind the MLP or behind attention as well.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, section 2.1 (both places);
Pfeiffer et al. 2020, "AdapterFusion", arXiv:2005.00247 (behind the MLP only): y' = y + s (U gelu(D y + b) + c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.methods.bottleneck import bottleneck, start_bottleneck
from edgepet.methods.limits import require_rank
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.places import token_blocks
from edgepet.spec import Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class Adapter(BranchesOnly):
    """Pfeiffer's: ``rank`` channels behind the MLP of every transformer block, before its layer scale.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 8
    scale: float = 1.0

    name: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "Pfeiffer et al. 2020, arXiv:2005.00247"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ("mlp",)

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks on tokens, or on maps whose channels come last, with modules called attn and mlp."""
        return token_blocks(layers, "attn", "mlp", at=[f"{place}:out" for place in self.places])

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each of ``places``, as "mlp.down.weight" and so on, ``down`` and ``up`` near zero and their biases zero.

        ``down.weight`` (rank, d), ``down.bias`` (rank,), ``up.weight`` (d, rank) and ``up.bias`` (d,), d the width.
        """
        del base
        return {
            site.name: {
                name: value
                for place in self.places
                for name, value in start_bottleneck(
                    site.out_features, self.rank, rng, how="near zero", prefix=f"{place}."
                ).items()
            }
            for site in sites
        }

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "bottleneck" branch with GELU for each of ``places``: reads what that module puts out, and adds to it.

        ``scale`` is folded into U and c.
        """
        return tuple(
            bottleneck(
                tuned[site.name],
                tap=f"{site.name}.{place}:out",
                into=f"{site.name}.{place}:out",
                activation="gelu",
                scale=self.scale,
                prefix=f"{place}.",
            )
            for site in sites
            for place in self.places
        )


@dataclass(frozen=True, slots=True)
class Houlsby(Adapter):
    """Houlsby's: behind attention too.

    Raises:
        InputError: as ``Adapter``.
    """

    name: ClassVar[str] = "houlsby"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv:1902.00751"
    places: ClassVar[tuple[str, ...]] = ("attn", "mlp")
