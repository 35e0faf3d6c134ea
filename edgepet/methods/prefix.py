"""Prefix tuning, and MAM: learned keys and values in every attention, alone or with a scaled parallel adapter.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190. He et al. 2022,
"Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366, equation 5 and section 4.6 (MAM):
softmax(q [P_k; K]^T) [P_v; V]. Both papers make P with an MLP while training; here its values are trained themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.methods.limits import require_length, require_rank
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.parallel_adapter import ParallelAdapter
from edgepet.methods.places import blocks_with
from edgepet.spec import Block, Site, Tensors, Tuned


def attending(layers: Sequence[Site]) -> tuple[Block, ...]:
    """Blocks whose attention takes further keys and values: over all tokens, without positions of its own."""
    return tuple(block for block in blocks_with(layers, "norm1", "attn") if block.heads)


@dataclass(frozen=True, slots=True)
class Prefix(BranchesOnly):
    """``length`` keys and values of the network's width in every block.

    Raises:
        InputError: ``length`` is below 1.
    """

    length: int = 10

    name: ClassVar[str] = "prefix"
    paper: ClassVar[str] = "Li and Liang 2021, arXiv:2101.00190"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-2)
    starts_as_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_length(self.name, self.length)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks whose attention takes further keys and values."""
        return attending(layers)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``keys`` and ``values`` (length, d), normal around 0 with a deviation of 0.02."""
        del base
        return {
            site.name: {
                name: rng.normal(0, 0.02, (self.length, site.in_features)).astype(np.float32)
                for name in ("keys", "values")
            }
            for site in sites
        }

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "key-values" branch for each block: rows in front of attention's own keys and values, cut into heads."""
        return tuple(
            Branch(
                kind="key-values",
                tap=f"{site.name}.attn:in",
                into=f"{site.name}.attn:in",
                settings={"heads": site.heads},
                tensors={name: tuned[site.name][name] for name in ("keys", "values")},
            )
            for site in sites
            if isinstance(site, Block)
        )


@dataclass(frozen=True, slots=True)
class MAM(BranchesOnly):
    """A prefix of ``length`` in attention and a scaled parallel adapter of ``rank`` channels beside the MLP.

    Raises:
        InputError: ``length`` or ``rank`` is below 1.
    """

    length: int = 30
    rank: int = 32
    scale: float = 4.0

    name: ClassVar[str] = "mam"
    paper: ClassVar[str] = "He et al. 2022, arXiv:2110.04366"
    recipe: ClassVar[Recipe] = Recipe(lr=1e-3)
    starts_as_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_length(self.name, self.length)
        require_rank(self.name, self.rank)

    @property
    def _parts(self) -> tuple[Prefix, ParallelAdapter]:
        return Prefix(self.length), ParallelAdapter(self.rank, self.scale)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks whose attention takes further keys and values, and that have a module called mlp."""
        return tuple(site for site in attending(layers) if site.has("mlp"))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """The tensors of ``Prefix.start`` and of ``ParallelAdapter.start``, drawn in that order."""
        prefix, adapter = (part.start(sites, base, rng) for part in self._parts)
        return {site.name: {**prefix[site.name], **adapter[site.name]} for site in sites}

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """Those of ``Prefix`` for all blocks, then those of ``ParallelAdapter``."""
        return tuple(branch for part in self._parts for branch in part.branches(sites, tuned))
