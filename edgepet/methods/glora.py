"""GLoRA: every linear change of a layer at once, of its weight, of its bias and of what it reads.

Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv:2306.07967:
W' = W + W * A + B and b' = b + b * D + E + W C. A and B are of low rank, or A is one number for each row and B is
left out: the int8 codes of the weight are then what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import LowRank, Modulate, Scale, Targeted
from edgepet.errors import InputError
from edgepet.methods.limits import require_rank
from edgepet.methods.method import Recipe, Start, pushed, shift, shift_units
from edgepet.methods.places import linears, takes_prompt
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned

MODES = ("vector", "low-rank")


@dataclass(frozen=True, slots=True)
class GLoRA:
    """A, B, C, D and E on every linear layer; in a network without any, on every dense one.

    With ``mode`` "vector" A is (out, 1) and there is no B, with "low-rank" both are of ``rank``. A layer that takes no
    shift has no E and no C, a kernel of several taps no C, one without a bias no D. The paper searches for the form of
    each of them, layer by layer: here all layers have the same.

    Raises:
        InputError: ``rank`` is below 1, or ``mode`` is neither.
    """

    mode: str = "vector"
    rank: int = 4

    name: ClassVar[str] = "glora"
    paper: ClassVar[str] = "Chavan et al. 2023, arXiv:2306.07967"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)
        if self.mode not in MODES:
            raise InputError(self.name, f"needs a mode of {', '.join(MODES)}", got=repr(self.mode))

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers, or dense ones where there are none."""
        return linears(layers)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``a`` (out,) zero; or "a.up" and "b.up" (rank, in * kh * kw), Xavier uniform, and "a.down" and "b.down" zero.

        These two are (out, rank). Zero as well: ``c`` (in,) where the layer takes a prompt, ``d`` (out,) where it has a
        bias, ``e`` (out,) where it takes a shift.
        """
        del base
        return {site.name: self._start(site, rng) for site in sites}

    def _start(self, site: Site, rng: np.random.Generator) -> dict[str, NpArray]:
        tensors: dict[str, NpArray] = {}
        if self.mode == "vector":
            tensors["a"] = np.zeros(site.out_features, np.float32)
        else:
            for path in "ab":
                bound = (6 / (self.rank + site.columns)) ** 0.5
                tensors[f"{path}.down"] = np.zeros((site.out_features, self.rank), np.float32)
                tensors[f"{path}.up"] = uniform(rng, bound, self.rank, site.columns)
        if takes_prompt(site):
            tensors["c"] = np.zeros(site.in_features, np.float32)
        if site.bias is not None:
            tensors["d"] = np.zeros(site.out_features, np.float32)
        if site.takes_shift:
            tensors["e"] = np.zeros(site.out_features, np.float32)
        return tensors

    def units(self, sites: Sequence[Site], base: Tensors) -> Start:
        """E in front of a batch norm is learnt in that norm's deviations."""
        return shift_units(sites, base, "e")

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """A as ``Scale`` of rows or ``Modulate``, B as ``LowRank``; D as ``Scale``, E as ``Add``, W C as ``Push``."""
        del base
        updates = []
        for site in sites:
            own, weight = tuned[site.name], Target(site.weight)
            if self.mode == "vector":
                updates.append(Targeted(weight, Scale(1 + own["a"])))
            else:
                updates.append(Targeted(weight, Modulate(own["a.down"], own["a.up"])))
                updates.append(Targeted(weight, LowRank(own["b.down"], own["b.up"])))
            if site.bias is not None:
                updates.append(Targeted(Target(site.bias), Scale(1 + own["d"])))
            if "e" in own:
                updates.append(shift(site, own["e"]))
            if "c" in own:
                updates.append(pushed(site, own["c"]))
        return tuple(updates)
