"""Stage-wise prompt matching: between stages, a prompt made of the features and of a first guess at their semantics.

Liu et al. 2022, "Prompt-Matched Semantic Segmentation", arXiv:2208.10159: the backbone is frozen and cut into stages,
and a light matcher between two of them turns what one puts out into a better input of the next, recurrently and guided
by interim semantic maps. There is no code: this is our reading of the paper's abstract. Behind a stage with output x

    z = gelu(R x);  T times: m = S z,  z = z + dw3x3(gelu(M [z; softmax(m)]));  x' = x + O z

where the T recurrences share all weights. While masks are trained m is judged as well (``tuning.dense``), by a product
that no pack has. Widths, T, the place of the softmax and the start of O at zero are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import numpy as np

from edgepet.deltas.branches import MOST_RECURRENCES, Branch
from edgepet.errors import InputError
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.places import grid_of, on_grid
from edgepet.methods.starts import uniform
from edgepet.spec import Block, NpArray, Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class SemanticPrompt(BranchesOnly):
    """Prompts between the last ``stages`` stages; a network whose maps are all of one size is cut into so many.

    A stage is what has maps of one size. ``width`` channels carry a prompt, ``slots`` are what its semantics is told
    in: no number of classes, so that tasks share a graph.

    Raises:
        InputError: ``width``, ``slots`` or ``recurrences`` is below 1, ``stages`` below 2, or ``recurrences`` above 8.
    """

    width: int = 32
    slots: int = 16
    recurrences: int = 2
    stages: int = 4

    name: ClassVar[str] = "semantic-prompt"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2208.10159 (our reading)"
    recipe: ClassVar[Recipe] = Recipe(lr=2e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.width < 1 or self.slots < 1 or self.stages < 2:
            got = (self.width, self.slots, self.stages)
            raise InputError(self.name, "needs a width and slots of at least 1, and stages of at least 2", got=got)
        if not 1 <= self.recurrences <= MOST_RECURRENCES:
            raise InputError(self.name, f"needs 1 to {MOST_RECURRENCES} recurrences", got=self.recurrences)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """The last block of each of the last ``stages`` stages but the very last, or of even parts of the blocks."""
        blocks = [(site, grid) for site in layers if isinstance(site, Block) and (grid := grid_of(site)) is not None]
        ends = [list(stage)[-1][0] for _, stage in groupby(blocks, key=lambda block: block[1])]
        if len(ends) > 1:
            return tuple(ends[-self.stages : -1])
        cuts = {round((part + 1) * len(blocks) / self.stages) - 1 for part in range(self.stages - 1)}
        return tuple(block for number, (block, _) in enumerate(blocks) if number in cuts)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """All layers as those of their kind start, but ``out`` and the biases, which are zero.

        ``reduce`` (r, d), ``slots`` (s, r), ``mix`` (r, r + s), ``conv`` (r, 1, 3, 3),
        ``out`` (d, r), and ``bias`` (3 r + s + d), those of the five in this order: in one vector, so that a
        pack has to tell of fewer tensors.
        """
        del base
        return {site.name: self._start(site.out_features, rng) for site in sites}

    def _start(self, features: int, rng: np.random.Generator) -> dict[str, NpArray]:
        width, both = self.width, self.width + self.slots
        return {
            "reduce": uniform(rng, features**-0.5, width, features),
            "slots": uniform(rng, width**-0.5, self.slots, width),
            "mix": uniform(rng, both**-0.5, width, both),
            "conv": uniform(rng, 1 / 3, width, 1, 3, 3),
            "out": np.zeros((features, width), np.float32),
            "bias": np.zeros(3 * width + self.slots + features, np.float32),
        }

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "semantic-prompt" branch for each site: reads what the block puts out, and adds to it.

        Of tokens it reads the patches, and adds nothing to the tokens in front of them.
        """
        return tuple(
            Branch(
                kind="semantic-prompt",
                tap=f"{site.name}:out",
                into=f"{site.name}:out",
                settings={**on_grid(site), "recurrences": self.recurrences},
                tensors=dict(tuned[site.name]),
            )
            for site in sites
        )
