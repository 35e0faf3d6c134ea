"""The two baselines that every PET method is judged by: only the head, and everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Replace, Targeted
from edgepet.methods.method import Recipe, Start
from edgepet.spec import Array, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """A linear classifier on frozen features: no update at all."""

    name: ClassVar[str] = "linear-probe"
    paper: ClassVar[str] = "baseline"
    recipe: ClassVar[Recipe] = Recipe(lr=0.0, epochs=100)  # an epoch on remembered features costs milliseconds
    starts_as_identity: ClassVar[bool] = True

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """No layer."""
        del layers
        return ()

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """No tensor."""
        del sites, base, rng
        return {}

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """No update."""
        del base, sites, tuned
        return ()


@dataclass(frozen=True, slots=True)
class Full:
    """Full fine-tuning: every parameter that the backbone computes with is trained and shipped."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "baseline"
    recipe: ClassVar[Recipe] = Recipe(lr=1e-4)
    starts_as_identity: ClassVar[bool] = True

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Every parameter by itself, those of layers among them; running statistics are none."""
        return tuple(site for site in layers if site.kind == "tensor")

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``value``: a float32 copy of the parameter, in its own shape."""
        del rng
        return {site.name: {"value": base[site.weight].astype(np.float32)} for site in sites}

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """``Replace`` of every parameter by its ``value``."""
        del base
        return tuple(Targeted(Target(site.weight), Replace(tuned[site.name]["value"])) for site in sites)
