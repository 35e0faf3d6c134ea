"""LoRA_mul + VPT_add, the host of PACE that did best: a weight times low rank, and a constant added to what it reads.

Ni et al. 2024, "PACE: Marrying generalization in PArameter-efficient fine-tuning with Consistency rEgularization",
arXiv:2409.17137: W' = W * (1 + B A) and y = W' (x + c) + b * (1 + d), hence b' = b * (1 + d) + W' c. The released code
(MaxwellYaoNi/PACE) multiplies c by W and not by W', and trains it as a product of two matrices: the same vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Modulate, Scale, Targeted
from edgepet.methods.limits import require_rank
from edgepet.methods.method import Recipe, Start, pushed
from edgepet.methods.places import linears, takes_prompt
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class LoRAMul:
    """Two factors, a factor for the bias and a prompt on every linear layer; in a network without any, on dense layers.

    A layer that takes no shift, or a kernel of several taps, has no prompt; one without a bias has no factor for it.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 10

    name: ClassVar[str] = "lora-mul"
    paper: ClassVar[str] = "Ni et al. 2024, arXiv:2409.17137"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers, or dense ones where there are none."""
        return linears(layers)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``a`` (rank, in * kh * kw) Xavier uniform, ``b`` (out, rank) zero.

        Zero as well: ``d`` (out,) where the layer has a bias, and ``c`` (in,) where it takes a prompt.
        """
        del base
        return {site.name: self._start(site, rng) for site in sites}

    def _start(self, site: Site, rng: np.random.Generator) -> dict[str, NpArray]:
        bound = (6 / (self.rank + site.columns)) ** 0.5
        tensors = {
            "a": uniform(rng, bound, self.rank, site.columns),
            "b": np.zeros((site.out_features, self.rank), np.float32),
        }
        if site.bias is not None:
            tensors["d"] = np.zeros(site.out_features, np.float32)
        if takes_prompt(site):
            tensors["c"] = np.zeros(site.in_features, np.float32)
        return tensors

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W * (1 + B A) as ``Modulate``, b * (1 + d) as ``Scale``, and the changed W times c as ``Push``."""
        del base
        updates = []
        for site in sites:
            own = tuned[site.name]
            updates.append(Targeted(Target(site.weight), Modulate(left=own["b"], right=own["a"])))
            if site.bias is not None:
                updates.append(Targeted(Target(site.bias), Scale(1 + own["d"])))
            if "c" in own:
                updates.append(pushed(site, own["c"], "updated"))
        return tuple(updates)
