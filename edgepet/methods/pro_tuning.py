"""Pro-tuning: an additive prompt made of the features at the end of every stage.

Nie et al. 2022, "Pro-tuning: Unified Prompt Tuning for Vision Tasks", arXiv:2207.14381. There is no official code:
this is our reading of the public description, x' = x + out(act(conv5x5(act(reduce(x))))) with three light convolutions,
1 x 1, 5 x 5 depthwise and 1 x 1. Activation (GELU), reduction and the start at zero are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.errors import InputError
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.places import grid_of, on_grid
from edgepet.methods.starts import uniform
from edgepet.spec import Block, NpArray, Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class ProTuning(BranchesOnly):
    """Prompts behind the last block of every stage; a network that is one stage is cut into ``stages``.

    Such a network, as a ViT is, has none behind its last block: patches are not read there where a token is. The
    convolutions have 1 / ``reduction`` of the channels.

    Raises:
        InputError: ``reduction`` or ``stages`` is below 1.
    """

    reduction: int = 4
    stages: int = 4

    name: ClassVar[str] = "pro-tuning"
    paper: ClassVar[str] = "Nie et al. 2022, arXiv:2207.14381 (our reading)"
    recipe: ClassVar[Recipe] = Recipe(lr=2e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.reduction < 1 or self.stages < 1:
            raise InputError(self.name, "needs a reduction and stages of at least 1", got=(self.reduction, self.stages))

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """The last block of every stage, of blocks on maps, channels first or last, or on a grid of patches.

        A stage is what one container holds; where there is one container, its ``stages`` even parts but the last.
        """
        blocks = [site for site in layers if isinstance(site, Block) and grid_of(site)]
        stages = [list(stage) for _, stage in groupby(blocks, key=lambda block: block.container)]
        if len(stages) > 1:
            return tuple(stage[-1] for stage in stages)
        ends = {round((i + 1) * len(blocks) / self.stages) - 1 for i in range(self.stages - 1)}
        return tuple(block for i, block in enumerate(blocks) if i in ends)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``reduce`` and ``conv`` as layers of their kind start, ``out`` and the biases zero.

        ``reduce.weight`` (h, d), ``reduce.bias`` (h,), ``conv.weight`` (h, 1, 5, 5), ``conv.bias`` (h,), ``out.weight``
        (d, h), ``out.bias`` (d,), where h is d // reduction, but at least 1.
        """
        del base
        return {site.name: self._start(site.out_features, rng) for site in sites}

    def _start(self, width: int, rng: np.random.Generator) -> dict[str, NpArray]:
        inner = max(1, width // self.reduction)
        return {
            "reduce.weight": uniform(rng, width**-0.5, inner, width),
            "reduce.bias": np.zeros(inner, np.float32),
            "conv.weight": uniform(rng, 1 / 5, inner, 1, 5, 5),
            "conv.bias": np.zeros(inner, np.float32),
            "out.weight": np.zeros((width, inner), np.float32),
            "out.bias": np.zeros(width, np.float32),
        }

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "stage-prompt" branch with GELU for each site: reads what the block puts out, and adds to it.

        Of tokens it reads the patches, and adds nothing to the tokens in front of them.
        """
        return tuple(
            Branch(
                kind="stage-prompt",
                tap=f"{site.name}:out",
                into=f"{site.name}:out",
                settings={**on_grid(site), "activation": "gelu"},
                tensors=dict(tuned[site.name]),
            )
            for site in sites
        )
