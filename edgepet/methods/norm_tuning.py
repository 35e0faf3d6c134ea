"""Norm tuning: train the scale and the bias of every normalisation.

Basu et al. 2023, "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning", arXiv:2304.01917 (LN-Tune); on batch
norms Frankle et al. 2020, "Training BatchNorm and Only BatchNorm", arXiv:2003.00152.
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
class NormTuning:
    """What is learnt is added to the pretrained scale and bias; statistics stay as they are."""

    name: ClassVar[str] = "norm-tuning"
    paper: ClassVar[str] = "Basu et al. 2023, arXiv:2304.01917"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Every norm layer."""
        return tuple(site for site in layers if site.kind == "norm")

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``weight`` (out,) zero and, where the norm has a bias, ``bias`` (out,) zero."""
        del base, rng
        return {site.name: {name: np.zeros(site.out_features, np.float32) for name in _tensors(site)} for site in sites}

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """``weight`` and ``bias`` as ``Add`` on the norm's own."""
        del base
        return tuple(
            Targeted(Target(tensor), Add(tuned[site.name][name]))
            for site in sites
            for name, tensor in _tensors(site).items()
        )


def _tensors(site: Site) -> dict[str, str]:
    return {"weight": site.weight, **({"bias": site.bias} if site.bias is not None else {})}
