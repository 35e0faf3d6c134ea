"""AdaptFormer: a bottleneck beside the MLP, which reads the stream before its norm.

Chen et al. 2022, "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", arXiv:2205.13535,
equation 4: x' = x + mlp(norm x) + s (U relu(D x + b) + c).
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
class AdaptFormer(BranchesOnly):
    """``rank`` channels beside the MLP of every transformer block, behind its layer scale.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 64
    scale: float = 0.1

    name: ClassVar[str] = "adaptformer"
    paper: ClassVar[str] = "Chen et al. 2022, arXiv:2205.13535"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks on tokens, or on maps whose channels come last, with modules called norm2, mlp and drop_path2."""
        return token_blocks(layers, "norm2", "mlp", "drop_path2", at=("norm2:in", "drop_path2:out"))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``down.weight`` as a linear layer's weight; ``down.bias``, ``up.weight`` and ``up.bias`` zero.

        In this order (rank, d), (rank,), (d, rank) and (d,), d the block's width.
        """
        del base
        return {site.name: start_bottleneck(site.out_features, self.rank, rng, how="as LoRA") for site in sites}

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "bottleneck" branch with ReLU for each block: reads what goes into norm2, adds to what drop_path2 puts out.

        ``scale`` is folded into U and c.
        """
        return tuple(
            bottleneck(tuned[site.name], tap=f"{site.name}.norm2:in", into=f"{site.name}.drop_path2:out",
                       activation="relu", scale=self.scale)
            for site in sites
        )  # fmt: skip
