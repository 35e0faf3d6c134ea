"""Visual prompt tuning: learned tokens beside the patches, once or anew in every block.

Jia et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119, equations 4 to 8. What a block makes of deep prompts is
thrown away behind it, so that only their keys and values count: those are constants, and no prompt runs through an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.methods.limits import require_length
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.prefix import attending
from edgepet.methods.starts import uniform
from edgepet.spec import Block, NpArray, Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class VPTShallow(BranchesOnly):
    """``length`` tokens between the class token and the patches, from the first block to behind the last.

    Raises:
        InputError: ``length`` is below 1.
    """

    length: int = 50

    name: ClassVar[str] = "vpt-shallow"
    paper: ClassVar[str] = "Jia et al. 2022, arXiv:2203.12119"
    recipe: ClassVar[Recipe] = Recipe(lr=2e-2)
    starts_as_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_length(self.name, self.length)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """The first and the last block whose attention takes further keys and values."""
        blocks = attending(layers)
        return (blocks[0], blocks[-1]) if len(blocks) > 1 else blocks

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``prompt`` (length, d) of the first block, evenly within Xavier's bound for the patch embedding."""
        del base
        return {sites[0].name: {"prompt": _prompt(sites[0], self.length, rng)}} if sites else {}

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """One "tokens" branch: the prompt goes in between prefix and patches, and out behind the last block."""
        if not sites:
            return ()
        first, last = sites[0], sites[-1]
        front = first.prefix if isinstance(first, Block) else 0
        return (
            Branch(
                kind="tokens",
                tap=f"{first.name}:in",
                into=f"{last.name}:out",
                settings={"prefix": front},
                tensors={"prompt": tuned[first.name]["prompt"]},
            ),
        )


@dataclass(frozen=True, slots=True)
class VPTDeep(BranchesOnly):
    """``length`` tokens of its own for every block.

    Raises:
        InputError: ``length`` is below 1.
    """

    length: int = 10

    name: ClassVar[str] = "vpt-deep"
    paper: ClassVar[str] = "Jia et al. 2022, arXiv:2203.12119"
    recipe: ClassVar[Recipe] = Recipe(lr=2e-2)
    starts_as_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_length(self.name, self.length)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks whose attention takes further keys and values."""
        return attending(layers)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``prompt`` (length, d) of each block, evenly within Xavier's bound for the patch embedding."""
        del base
        return {site.name: {"prompt": _prompt(site, self.length, rng)} for site in sites}

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "prompts" branch for each block: the prompt through norm1 and attention's own projection.

        What comes of it are further keys and values, in front of attention's own.
        """
        return tuple(
            Branch(
                kind="prompts",
                tap=f"{site.name}.norm1:in",
                into=f"{site.name}.attn:in",
                settings={"heads": site.heads},
                tensors={"prompt": tuned[site.name]["prompt"]},
            )
            for site in sites
            if isinstance(site, Block)
        )


def _prompt(site: Site, length: int, rng: np.random.Generator) -> NpArray:
    """Xavier's bound for the patch embedding, as the official code has it."""
    stem = site.stem_columns if isinstance(site, Block) else 1
    return uniform(rng, (6 / (stem + site.in_features)) ** 0.5, length, site.in_features)
