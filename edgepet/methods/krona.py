"""KronA and LoKr: a Kronecker product added to chosen weights, whole or with a factor of low rank.

Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv:2212.10650, equation 4:
W' = W + s (A (x) B). Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation", arXiv:2309.14859, section 3.3 (LoKr): W' = W + (alpha / rank) A (x) (C D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.expressions import Product
from edgepet.deltas.updates import Kronecker, Targeted
from edgepet.errors import InputError
from edgepet.methods.limits import require_rank
from edgepet.methods.method import Recipe, Start
from edgepet.methods.places import attended, attended_parts, block
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class KronA:
    """One Kronecker product for every part that ``on`` names as LoRA's does; A starts at zero.

    Each side of a weight is cut into the two factors nearest to its square root; A has the smaller ones. A kernel's
    taps belong to B.
    """

    scale: float = 1.0
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "krona"
    paper: ClassVar[str] = "Edalati et al. 2022, arXiv:2212.10650"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, those of q and v, else every dense one."""
        return attended(layers, self.on)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part ``a`` (1, p, q) zero, ``b`` (1, out / p, in / q * kh * kw) as a linear layer's weight.

        Those of a row block are "q.a" and "q.b".
        """
        del base
        starts: dict[str, dict[str, NpArray]] = {}
        for site in sites:
            tensors = starts[site.name] = {}
            for part, rows in attended_parts(site, self.on).items():
                (p, q), (r, c) = _cut(site, rows, -1)
                tensors[f"{part}a"] = np.zeros((1, p, q), np.float32)
                tensors[f"{part}b"] = uniform(rng, 1 / np.sqrt(c), 1, r, c)
        return starts

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W + scale A (x) B as ``Kronecker`` on each part's rows."""
        del base
        updates = []
        for site in sites:
            for part, rows in attended_parts(site, self.on).items():
                left, right = tuned[site.name][f"{part}a"], tuned[site.name][f"{part}b"]
                updates.append(Targeted(block(site, part, rows), Kronecker(left, right, self.scale)))
        return tuple(updates)


@dataclass(frozen=True, slots=True)
class LoKr:
    """KronA with B = C D where ``rank`` is below half of B's longer side, taps left out, as LyCORIS and PEFT have it.

    ``factor`` is one of the two cuts of each side where it divides (``two_factors``), -1 the pair nearest to the square
    root.

    Raises:
        InputError: ``rank`` is below 1, or ``factor`` is neither -1 nor at least 1.
    """

    rank: int = 8
    alpha: float = 8.0
    factor: int = -1
    on: tuple[str, ...] = ()

    name: ClassVar[str] = "lokr"
    paper: ClassVar[str] = "Yeh et al. 2023, arXiv:2309.14859"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)
        if self.factor != -1 and self.factor < 1:
            raise InputError(self.name, "needs a factor of at least 1, or -1", got=self.factor)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions that ``on`` names; if it is empty, those of q and v, else every dense one."""
        return attended(layers, self.on)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For each part ``a`` (1, p, q) zero, and B (1, out / p, in / q * kh * kw) whole as ``b`` or in two factors.

        Those are ``c`` (1, out / p, rank) and ``d`` (1, rank, in / q * kh * kw). Each but ``a`` is as a linear layer's
        weight; those of a row block are "q.a" and so on.
        """
        del base
        starts: dict[str, dict[str, NpArray]] = {}
        for site in sites:
            tensors = starts[site.name] = {}
            for part, rows in attended_parts(site, self.on).items():
                (p, q), (r, c) = _cut(site, rows, self.factor)
                tensors[f"{part}a"] = np.zeros((1, p, q), np.float32)
                if self.rank < max(r, c // site.taps) / 2:
                    tensors[f"{part}c"] = uniform(rng, 1 / np.sqrt(self.rank), 1, r, self.rank)
                    tensors[f"{part}d"] = uniform(rng, 1 / np.sqrt(c), 1, self.rank, c)
                else:
                    tensors[f"{part}b"] = uniform(rng, 1 / np.sqrt(c), 1, r, c)
        return starts

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W + (alpha / rank) A (x) B as ``Kronecker`` on each part's rows; B = C D is a ``Product``."""
        del base
        updates = []
        for site in sites:
            tensors = tuned[site.name]
            for part, rows in attended_parts(site, self.on).items():
                low_rank = f"{part}c" in tensors
                right = Product(tensors[f"{part}c"], tensors[f"{part}d"]) if low_rank else tensors[f"{part}b"]
                update = Kronecker(tensors[f"{part}a"], right, self.alpha / self.rank)
                updates.append(Targeted(block(site, part, rows), update))
        return tuple(updates)


def _cut(site: Site, rows: tuple[int, int], factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B for rows of a layer's weight."""
    (p, r), (q, c) = two_factors(rows[1] - rows[0], factor), two_factors(site.in_features, factor)
    return (p, q), (r, c * site.taps)


def two_factors(side: int, factor: int = -1) -> tuple[int, int]:
    """``side`` as smaller times larger: ``factor`` times the rest where it divides, else the pair nearest to a square.

    With a ``factor`` that does not divide, the smaller one is the largest divisor above neither it nor the square root
    (PEFT's rule). ``factor`` is -1 or at least 1.
    """
    if factor > 0 and side % factor == 0:
        return min(factor, side // factor), max(factor, side // factor)
    most = math.isqrt(side) if factor == -1 else min(factor, math.isqrt(side))
    small = next(number for number in range(most, 0, -1) if side % number == 0)
    return small, side // small
