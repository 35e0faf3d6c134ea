"""IA3: learned vectors that rescale keys, values and the inside of the MLP.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3: l_k * K, l_v * V and W_2 (l_ff * gelu(W_1 x)), all ones at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Scale, Targeted
from edgepet.methods.method import Recipe, Start
from edgepet.methods.places import attention, block, parts
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class IA3:
    """Scales of what the parts named in ``on`` put out, and of what the layers named in ``inner`` read.

    A network without attention and without such layers, as a ResNet, has a scale behind every dense layer.
    """

    on: tuple[str, ...] = ("k", "v", "k_proj", "v_proj")
    inner: tuple[str, ...] = ("fc2",)

    name: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2205.05638"
    recipe: ClassVar[Recipe] = Recipe(lr=2e-2)
    starts_as_identity: ClassVar[bool] = True

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` or ``inner`` names; where there are none, every dense layer.

        A layer whose bias is put together on the way (``Site.scalable``) is left out.
        """
        inner = {site.name for site in layers if site.kind in ("linear", "conv") and parts(site, self.inner)}
        chosen = inner | attention(layers, self.on, otherwise_dense=not inner).keys()
        return tuple(
            site for site in layers if site.name in chosen and site.kind in ("linear", "conv") and site.scalable
        )

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """Ones: ``inner`` (in,) for a layer that ``inner`` names, else ``s`` (out,) for each part, "k.s" of a block."""
        del base, rng
        return {site.name: self._start(site) for site in sites}

    def _start(self, site: Site) -> dict[str, NpArray]:
        if parts(site, self.inner):
            return {"inner": np.ones(site.in_features, np.float32)}
        return {
            f"{part}s": np.ones(last - first, np.float32)
            for part, (first, last) in attention((site,), self.on)[site.name].items()
        }

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W diag(inner) as ``Scale`` of what is read, or diag(s) W and s * b as ``Scale`` of each part's rows."""
        del base
        updates = []
        for site in sites:
            if parts(site, self.inner):
                updates.append(Targeted(Target(site.weight), Scale(tuned[site.name]["inner"], "in")))
                continue
            for part, rows in attention((site,), self.on)[site.name].items():
                scale, target = Scale(tuned[site.name][f"{part}s"]), block(site, part, rows)
                updates.append(Targeted(target, scale))
                if site.bias is not None:
                    updates.append(Targeted(Target(site.bias, target.rows), scale))
        return tuple(updates)
