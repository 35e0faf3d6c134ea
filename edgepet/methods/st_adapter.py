"""ST-Adapter: a convolution over the frames of a clip, in a bottleneck on the residual stream of an image transformer.

Pan et al. 2022, "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning", arXiv:2206.13559, section 3.3:
x' = x + up(conv3x1x1(down x)) on the patches, depthwise, without an activation; the class token passes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.methods.limits import require_rank
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.places import blocks_with
from edgepet.methods.starts import uniform
from edgepet.spec import Block, Site, Tensors, Tuned

FRAMES = 3  # that a kernel reaches over


@dataclass(frozen=True, slots=True)
class STAdapter(BranchesOnly):
    """``rank`` channels in front of every block, as the paper has it for Kinetics-400.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 384

    name: ClassVar[str] = "st-adapter"
    paper: ClassVar[str] = "Pan et al. 2022, arXiv:2206.13559"
    recipe: ClassVar[Recipe] = Recipe(lr=1e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks with a module called attn, whose patches form a grid."""
        return tuple(block for block in blocks_with(layers, "attn") if block.grid)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``down`` and ``up`` as linear layers' weights, ``conv`` and the biases zero.

        ``down.weight`` (rank, d), ``down.bias`` (rank,), ``conv.weight`` (rank, ``FRAMES``), ``conv.bias`` (rank,),
        ``up.weight`` (d, rank), ``up.bias`` (d,).
        """
        del base
        return {
            site.name: {
                "down.weight": uniform(rng, site.in_features**-0.5, self.rank, site.in_features),
                "down.bias": np.zeros(self.rank, np.float32),
                "conv.weight": np.zeros((self.rank, FRAMES), np.float32),
                "conv.bias": np.zeros(self.rank, np.float32),
                "up.weight": uniform(rng, self.rank**-0.5, site.in_features, self.rank),
                "up.bias": np.zeros(site.in_features, np.float32),
            }
            for site in sites
        }

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "temporal" branch for each block: reads what goes into it and adds to that, on the patches of a clip."""
        return tuple(self._branch(site, tuned) for site in sites if isinstance(site, Block))

    def _branch(self, block: Block, tuned: Tuned) -> Branch:
        return Branch(
            kind="temporal",
            tap=f"{block.name}:in",
            into=f"{block.name}:in",
            settings={"prefix": block.prefix, "frames": block.frames},
            tensors=tuned[block.name],
        )
