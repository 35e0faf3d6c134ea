"""Multi-scale adapters: behind the maps of a frozen backbone, what places see of neighbourhoods of three sizes.

Liang et al. 2022, "Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving", arXiv:2209.08953
(NeurIPS 2022): pretrain, adapt, finetune, where learnable multi-scale adapters are tuned on all tasks together and the
pretrained weights stay. There is no code: this is our reading of the abstract. Behind a map x

    x' = x + U gelu(sum over k in 1, 3, 5 of DW_k(gelu(D x)))

with one bias for the three depthwise kernels, which sum to one kernel of 5 x 5 when the method is lowered. Width, sizes
and places are ours. Its stages are `edgepet pretrain` and `edgepet train --init`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, TypeAlias

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.errors import InputError
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.places import grid_of, on_grid
from edgepet.methods.starts import uniform
from edgepet.spec import Block, NpArray, Site, Tensors, Tuned

_Kernel: TypeAlias = Any  # of NumPy or of torch
SIDES = (1, 3, 5)
PLAIN = 3 / 4  # of the blocks of a network whose maps have one size: in front of the last, so that tokens see it


@dataclass(frozen=True, slots=True)
class MultiScaleAdapter(BranchesOnly):
    """Adapters behind the last ``stages`` stages; in a network whose maps have one size one, behind three quarters.

    A stage is what has maps of one size. The convolutions have ``width`` channels.

    Raises:
        InputError: ``width`` or ``stages`` is below 1.
    """

    width: int = 32
    stages: int = 3

    name: ClassVar[str] = "multi-scale-adapter"
    paper: ClassVar[str] = "Liang et al. 2022, arXiv:2209.08953 (our reading)"
    recipe: ClassVar[Recipe] = Recipe(lr=2e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.width < 1 or self.stages < 1:
            raise InputError(self.name, "needs a width and stages of at least 1", got=(self.width, self.stages))

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """The last block of each of the last ``stages`` stages, or one of the blocks of a network of one."""
        blocks = [(site, grid) for site in layers if isinstance(site, Block) and (grid := grid_of(site)) is not None]
        ends = [list(stage)[-1][0] for _, stage in groupby(blocks, key=lambda block: block[1])]
        if len(ends) > 1:
            return tuple(ends[-self.stages :])
        return tuple(block for block, _ in blocks[max(0, round(PLAIN * len(blocks)) - 1) :][:1])

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``down`` and the kernels as layers of their kind start, ``up`` and the biases zero.

        ``down.weight`` (r, d), ``down.bias`` (r,), ``conv1``, ``conv3`` and ``conv5`` (r, 1, k, k), ``conv.bias`` (r,),
        ``up.weight`` (d, r), ``up.bias`` (d,).
        """
        del base
        return {site.name: self._start(site.out_features, rng) for site in sites}

    def _start(self, features: int, rng: np.random.Generator) -> dict[str, NpArray]:
        return {
            "down.weight": uniform(rng, features**-0.5, self.width, features),
            "down.bias": np.zeros(self.width, np.float32),
            **{f"conv{side}": uniform(rng, 1 / side, self.width, 1, side, side) for side in SIDES},
            "conv.bias": np.zeros(self.width, np.float32),
            "up.weight": np.zeros((features, self.width), np.float32),
            "up.bias": np.zeros(features, np.float32),
        }

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "stage-prompt" branch with GELU for each site, its kernels summed: reads what the block puts out, and adds.

        Of tokens it reads the patches, and adds nothing to the tokens in front of them.
        """
        return tuple(self._branch(site, tuned[site.name]) for site in sites)

    def _branch(self, site: Site, own: Any) -> Branch:
        return Branch(
            kind="stage-prompt",
            tap=f"{site.name}:out",
            into=f"{site.name}:out",
            settings={**on_grid(site), "activation": "gelu"},
            tensors={
                "reduce.weight": own["down.weight"],
                "reduce.bias": own["down.bias"],
                "conv.weight": sum(_widened(own[f"conv{side}"], side) for side in SIDES),
                "conv.bias": own["conv.bias"],
                "out.weight": own["up.weight"],
                "out.bias": own["up.bias"],
            },
        )


def _widened(kernel: _Kernel, side: int) -> _Kernel:
    """A kernel with zeros around it, as large as the largest."""
    by = (SIDES[-1] - side) // 2
    if isinstance(kernel, np.ndarray):
        return np.pad(kernel, ((0, 0), (0, 0), (by, by), (by, by)))
    from torch.nn.functional import pad

    return pad(kernel, (by,) * 4)
