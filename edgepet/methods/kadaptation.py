"""KAdaptation: a sum of Kronecker products whose first factors all blocks share.

He et al. 2023, "Parameter-efficient Model Adaptation for Vision Transformers", arXiv:2203.16329, section 3.3:
W' = W + s sum_i A_i (x) (u_i v_i^T) on queries and values, A_i = l_i r_i^T of rank 1 and shared by all blocks.

The released code zeroes both u and v, so that only its bias learns; this is the paper's form, with v alone at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.expressions import Product
from edgepet.deltas.updates import Add, Kronecker, Targeted
from edgepet.errors import InputError
from edgepet.methods.method import SHARED, Recipe, Start
from edgepet.methods.places import attended, attended_parts, block
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class KAdaptation:
    """``terms`` Kronecker products on every part that ``on`` names as LoRA's does, and a bias that its parts share.

    The shared factors are ``terms`` by ``terms``: a part whose sides ``terms`` does not divide is left alone.

    Raises:
        InputError: ``terms`` is below 1.
    """

    terms: int = 32
    scale: float = 160.0
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "kadaptation"
    paper: ClassVar[str] = "He et al. 2023, arXiv:2203.16329"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise InputError(self.name, "needs at least 1 term", got=self.terms)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Layers that ``on`` names as LoRA's does, if ``terms`` divides both sides of a part."""
        return tuple(site for site in attended(layers, self.on) if self._parts(site))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """Shared for each part's name ``l`` (terms, terms, 1) and ``r`` (terms, 1, terms), evenly from -0.01 to 0.01.

        For each part of a layer ``u`` (terms, out / terms, 1), Xavier uniform term by term, and ``v``
        (terms, 1, in * kh * kw / terms) zero; those of a row block are "q.u" and "q.v". Where the layer has a bias, one
        ``bias`` for all its parts, as long as one has rows, zero.
        """
        del base
        shared: dict[str, NpArray] = {}
        starts: dict[str, dict[str, NpArray]] = {SHARED: shared} if sites else {}
        for site in sites:
            tensors = starts[site.name] = {}
            for part, (first, last) in self._parts(site).items():
                shared.setdefault(f"{part}l", uniform(rng, 0.01, self.terms, self.terms, 1))
                shared.setdefault(f"{part}r", uniform(rng, 0.01, self.terms, 1, self.terms))
                rows, columns = (last - first) // self.terms, site.columns // self.terms
                tensors[f"{part}u"] = uniform(rng, (6 / (rows + 1)) ** 0.5, self.terms, rows, 1)
                tensors[f"{part}v"] = np.zeros((self.terms, 1, columns), np.float32)
            if site.bias is not None:
                tensors["bias"] = np.zeros(last - first, np.float32)
        return starts

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W + scale sum_i (l_i r_i) (x) (u_i v_i) as ``Kronecker`` of two ``Product`` on each part's rows.

        Where the layer has a bias, b + ``bias`` as ``Add`` on the same rows.
        """
        del base
        updates = []
        for site in sites:
            shared, own = tuned[SHARED], tuned[site.name]
            for part, rows in self._parts(site).items():
                left = Product(shared[f"{part}l"], shared[f"{part}r"])
                right = Product(own[f"{part}u"], own[f"{part}v"])
                target = block(site, part, rows)
                updates.append(Targeted(target, Kronecker(left, right, self.scale)))
                if site.bias is not None:
                    updates.append(Targeted(Target(site.bias, target.rows), Add(own["bias"])))
        return tuple(updates)

    def _parts(self, site: Site) -> dict[str, tuple[int, int]]:
        """Parts that can be cut, all of one height: they share the bias."""
        named = attended_parts(site, self.on)
        fits = site.columns % self.terms == 0
        return {part: rows for part, rows in named.items() if fits and (rows[1] - rows[0]) % self.terms == 0}
