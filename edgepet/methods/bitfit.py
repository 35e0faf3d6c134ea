"""BitFit: train the biases and nothing else.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv:2106.10199, section 3: b' = b + d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Add, Targeted
from edgepet.methods.method import Recipe, Start
from edgepet.spec import Array, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class BitFit:
    """Every bias of a linear, convolution or norm layer; behind a convolution without one it is the batch norm's."""

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "Ben Zaken et al. 2021, arXiv:2106.10199"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Layers whose bias is a tensor of the state dict."""
        return tuple(site for site in layers if site.bias is not None)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``d`` (out,) zero."""
        del base, rng
        return {site.name: {"d": np.zeros(site.out_features, np.float32)} for site in sites}

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """b + d as ``Add`` on every bias."""
        del base
        return tuple(Targeted(Target(str(site.bias)), Add(tuned[site.name]["d"])) for site in sites)
