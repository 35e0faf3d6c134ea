"""FacT: all weights of a transformer change by one factorised tensor.

Jie and Deng 2023, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", arXiv:2212.03145. Every
weight is cut into square tiles as wide as the network: q, k, v and the projection are one each, the MLP's are four.
Tensor train (section 3.2): a tile changes by s V S U, with V and U shared by the network and S its own. Tucker
(section 3.3): S is a mix of the slices of one cube C.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.expressions import Factor, Mix
from edgepet.deltas.updates import LowRank, Targeted
from edgepet.methods.limits import require_rank
from edgepet.methods.method import SHARED, Recipe, Start
from edgepet.methods.starts import uniform
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned


@dataclass(frozen=True, slots=True)
class FacTTT:
    """Tensor train: U (rank, width), V (width, rank), and a core (rank, rank) for every tile.

    Networks whose width grows, as ConvNeXt and Swin, have one U and one V for every width.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 16
    scale: float = 1.0

    name: ClassVar[str] = "fact-tt"
    paper: ClassVar[str] = "Jie and Deng 2023, arXiv:2212.03145"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Dense layers of one tap, one side of which divides the other, and neither of which is below 4."""
        return _sites(layers)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """Shared, for a width of 384, "384.u" (rank, 384) as a linear layer's weight and "384.v" (384, rank) zero.

        For tile i of a layer "core.i" (rank, rank) as a linear layer's weight; the cores of a layer that narrows, an
        fc2, as one layer of tiles * rank inputs.
        """
        del base
        starts = _start_shared(sites, self.rank, rng)
        for site in sites:
            count = len(list(_tiles(site)))
            reads = count if site.in_features > site.out_features else 1  # an fc2 is one layer that reads all cores
            cores = uniform(rng, (reads * self.rank) ** -0.5, count, self.rank, self.rank)
            starts[site.name] = {f"core.{i}": core for i, core in enumerate(cores)}
        return starts

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W + scale V S U as ``LowRank`` on each tile: rows of a layer that widens, columns of one that narrows."""
        del base
        return tuple(
            _tile(tile, site, tuned, core=tuned[site.name][f"core.{i}"], scale=self.scale)
            for site in sites
            for i, tile in enumerate(_tiles(site))
        )


@dataclass(frozen=True, slots=True)
class FacTTK:
    """Tucker: U, V and a cube C (rank, rank, rank) for every width, and ``rank`` weights of its slices for every tile.

    The slices of an MLP are woven into each other, and transposed but for the second layer, as in the official code.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 32
    scale: float = 1.0

    name: ClassVar[str] = "fact-tk"
    paper: ClassVar[str] = "Jie and Deng 2023, arXiv:2212.03145"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """As ``FacTTT.sites``."""
        return _sites(layers)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """Shared "384.u" and "384.v" as ``FacTTT.start``, and "384.cube" (rank, rank, rank), for each width, here 384.

        For tile i of a qkv or a square layer "weights.i" (rank, 1), for any other layer ``weights`` (rank, tiles). Cube
        and weights are Xavier uniform, the weights as columns of one matrix (rank, tiles of that width in the network).
        """
        del base
        starts, rank = _start_shared(sites, self.rank, rng), self.rank
        for side in sorted({_side(site) for site in sites}):
            fans = rank * rank * 2  # Xavier uniform, as torch counts the fans of a tensor of three axes
            starts[SHARED][f"{side}.cube"] = uniform(rng, (6 / fans) ** 0.5, rank, rank, rank)
            count = sum(len(list(_tiles(site))) for site in sites if _side(site) == side)
            for site in (site for site in sites if _side(site) == side):
                mlp = [(6 / (rank + count)) ** 0.5, rank]
                starts[site.name] = {n: uniform(rng, *mlp, columns) for n, columns in _weights(site).items()}
        return starts

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W + scale V S U as ``LowRank`` on each tile, S a ``Mix`` of the cube's slices by the tile's weights."""
        del base
        updates = []
        for site in sites:
            cube = tuned[SHARED][f"{_side(site)}.cube"]
            widens = site.in_features <= site.out_features
            for i, tile in enumerate(_tiles(site)):
                if site.blocks or site.in_features == site.out_features:
                    core = Mix(cube, tuned[site.name][f"weights.{i}"], transposed=True)
                else:
                    core = Mix(cube, tuned[site.name]["weights"], part=i, transposed=widens)
                updates.append(_tile(tile, site, tuned, core=core, scale=self.scale))
        return tuple(updates)


def _weights(site: Site) -> dict[str, int]:
    """Columns of the weights of a layer's tiles: q, k, v and a projection have their own, an MLP's lie together."""
    count = len(list(_tiles(site)))
    if site.blocks or count == 1:
        return {f"weights.{i}": 1 for i in range(count)}
    return {"weights": count}


def _sites(layers: Sequence[Site]) -> tuple[Site, ...]:
    """Linear layers, also those that are convolutions of one tap, one side of which divides the other."""
    matrices = (site for site in layers if site.dense and site.taps == 1)
    sides = ((site, site.in_features, site.out_features) for site in matrices)
    return tuple(site for site, *both in sides if max(both) % min(both) == 0 and min(both) > 3)  # 3: an image


def _side(site: Site) -> int:
    return min(site.in_features, site.out_features)


def _tiles(site: Site) -> Iterator[Target]:
    side = _side(site)
    if site.in_features > site.out_features:
        yield from (Target(site.weight, None, (i, i + side)) for i in range(0, site.in_features, side))
    elif site.in_features < site.out_features:
        yield from (Target(site.weight, (i, i + side)) for i in range(0, site.out_features, side))
    else:
        yield Target(site.weight)


def _start_shared(sites: Sequence[Site], rank: int, rng: np.random.Generator) -> dict[str, dict[str, NpArray]]:
    shared: dict[str, NpArray] = {}
    for side in sorted({_side(site) for site in sites}):
        shared[f"{side}.u"] = uniform(rng, side**-0.5, rank, side)  # as a linear layer starts
        shared[f"{side}.v"] = np.zeros((side, rank), np.float32)
    return {SHARED: shared} if sites else {}


def _tile(target: Target, site: Site, tuned: Tuned, *, core: Factor, scale: float) -> Targeted:
    shared, side = tuned[SHARED], _side(site)
    return Targeted(target, LowRank(left=shared[f"{side}.v"], right=shared[f"{side}.u"], core=core, scale=scale))
