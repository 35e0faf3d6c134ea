"""Scaled parallel adapter: a bottleneck beside the MLP, which reads what the MLP reads.

He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366, section 3.3 and
table 5: y' = mlp(x) + s (U relu(D x + b) + c); the paper's s is 4.
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
class ParallelAdapter(BranchesOnly):
    """``rank`` channels beside the MLP of every transformer block, before its layer scale; ``scale`` 1 is unscaled.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 32
    scale: float = 4.0

    name: ClassVar[str] = "parallel-adapter"
    paper: ClassVar[str] = "He et al. 2022, arXiv:2110.04366"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-4)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks on tokens, or on maps whose channels come last, with modules called attn and mlp."""
        return token_blocks(layers, "attn", "mlp", at=("mlp:in", "mlp:out"))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``down.weight`` as a linear layer's weight; ``down.bias``, ``up.weight`` and ``up.bias`` zero.

        In this order (rank, d), (rank,), (d, rank) and (d,), d the block's width.
        """
        del base
        return {site.name: start_bottleneck(site.out_features, self.rank, rng, how="as LoRA") for site in sites}

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "bottleneck" branch with ReLU for each block: reads what goes into mlp, adds to what mlp puts out.

        ``scale`` is folded into U and c.
        """
        return tuple(
            bottleneck(tuned[site.name], tap=f"{site.name}.mlp:in", into=f"{site.name}.mlp:out",
                       activation="relu", scale=self.scale)
            for site in sites
        )  # fmt: skip
