"""SSF: scale and shift what a layer puts out.

Lian et al. 2022, "Scaling & Shifting Your Features", arXiv:2210.08823, section 3.2:
y' = gamma * (W x + b) + beta, hence W' = diag(gamma) W and b' = gamma * b + beta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Scale, Targeted
from edgepet.methods.method import Recipe, Start, shift, shift_units
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class SSF:
    """Per-channel scale and shift after every linear, convolution and norm layer.

    Behind a convolution without a bias the shift goes into the mean of its batch norm. A layer without either has
    nothing to write a shift into: there only the scale is trained.
    """

    name: ClassVar[str] = "ssf"
    paper: ClassVar[str] = "Lian et al. 2022, arXiv:2210.08823"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = False
    activation_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")  # a norm's own vectors are cheaper to fold into

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear, convolution and norm layers, but those whose bias is put together on the way (``Site.scalable``)."""
        return tuple(site for site in layers if site.scalable and site.operates)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``gamma`` (out,) normal around 1 and, where the layer takes a shift, ``beta`` (out,) around 0.

        Both have a deviation of 0.02, ``beta`` in front of a batch norm of 0.02 of that norm's own.
        """
        units = self.units(sites, base)
        return {site.name: self._start(site, rng, units.get(site.name, {})) for site in sites}

    def _start(self, site: Site, rng: np.random.Generator, units: Mapping[str, NpArray]) -> Mapping[str, NpArray]:
        gamma = rng.normal(1.0, 0.02, site.out_features).astype(np.float32)
        if not site.takes_shift:
            return {"gamma": gamma}
        beta = rng.normal(0.0, 0.02, site.out_features).astype(np.float32)
        return {"gamma": gamma, "beta": beta * units.get("beta", np.float32(1))}

    def units(self, sites: Sequence[Site], base: Tensors) -> Start:
        """A shift in front of a batch norm is learnt in that norm's deviations."""
        return shift_units(sites, base, "beta")

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """gamma as ``Scale`` of the weight's rows and of the bias, then beta as ``Add`` where a shift goes."""
        del base
        updates = []
        for site in sites:
            scale = Scale(tuned[site.name]["gamma"])
            updates.append(Targeted(Target(site.weight), scale))
            if site.bias is not None:
                updates.append(Targeted(Target(site.bias), scale))
            if site.takes_shift:
                updates.append(shift(site, tuned[site.name]["beta"]))
        return tuple(updates)

    def forward(self, site: Site, x: Array, y: Array, tuned: Mapping[str, Array], *, training: bool) -> Array:
        """gamma * y + beta, or gamma * y without a beta, in the shape and dtype of ``y``; ``x`` is not read.

        ``y`` has its channels where ``Site.channel_axis`` says: (..., out) or (n, out, ...).
        """
        import torch

        del x, training
        shape = (-1,) + (1,) * (y.ndim - 2) if site.channel_axis == 1 else (-1,)
        gamma = tuned["gamma"].reshape(shape).to(y.dtype)
        return torch.addcmul(tuned["beta"].reshape(shape).to(y.dtype), y, gamma) if "beta" in tuned else y * gamma
