"""Submodules of a network, and tuning one of them within a random subspace of all its weights and biases.

Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv:1804.08838, equation 2:
theta = theta_0 + P z, with P (D, d) random and fixed, its columns of unit length, and z trained. A dense P costs D d;
here every weight belongs to one coordinate of z, by a balanced random assignment, with a random sign: P has one number
in each row, its columns are orthonormal, and a step costs D. Needs the ``train`` extra.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from edgepet.deltas.updates import Add, Targeted
from edgepet.methods.depth import blocks_in_order, in_blocks
from edgepet.methods.method import SHARED, Recipe, Start
from edgepet.methods.places import attention, block
from edgepet.spec import Array, Block, Site, Target, Tensors, Tuned

GROUP = 3  # blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Submodule:
    """All layers of one kind in some blocks: ``on`` and ``blocks`` are what methods take as settings of these names.

    ``parameters`` are the weights and biases in it.
    """

    on: str
    blocks: str
    parameters: int

    @property
    def name(self) -> str:
        """For people, as "q in 0-2"."""
        return f"{self.on} in {self.blocks}"


@dataclass(frozen=True, slots=True)
class InSubspace:
    """The parts of layers that ``on`` names, as LoRA's does, in a subspace of ``dimension``; 0 is the whole of them."""

    on: tuple[str, ...]
    dimension: int = 0
    seed: int = 0

    name: ClassVar[str] = "subspace"
    paper: ClassVar[str] = "Li et al. 2018, arXiv:1804.08838"
    recipe: ClassVar[Recipe] = Recipe(lr=1e-4)
    starts_as_identity: ClassVar[bool] = True

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Linear layers and convolutions of one group that ``on`` names."""
        dense = [site for site in layers if site.dense]
        chosen = attention(dense, self.on, otherwise_dense=False)
        return tuple(site for site in dense if site.name in chosen)

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """Shared ``z`` (dimension,), or (D,) for the whole, zero."""
        del rng
        total = sum(math.prod(_shape(target, base[target.tensor].shape)) for target in self.targets(sites))
        return {SHARED: {"z": np.zeros(self.dimension or total, np.float32)}} if sites else {}

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """P z as ``Add``, cut to the weights and biases; ``z`` is torch's."""
        targets = self.targets(sites)
        shapes = [_shape(target, tuple(base[target.tensor].shape)) for target in targets]
        sizes = [math.prod(shape) for shape in shapes]
        z = cast(Tensor, tuned[SHARED]["z"])
        if self.dimension:
            places, signs = projection(sum(sizes), self.dimension, self.seed)
            z = z.index_select(0, places) * signs
        moved = torch.split(z, sizes)
        return tuple(
            Targeted(target, Add(part.reshape(shape)))
            for target, part, shape in zip(targets, moved, shapes, strict=True)
        )

    def targets(self, sites: Sequence[Site]) -> tuple[Target, ...]:
        """The weights, and behind each its bias, of the parts that are moved."""
        found = []
        for site in sites:
            for part, rows in attention((site,), self.on)[site.name].items():
                weight = block(site, part, rows)
                found += [weight, *([Target(site.bias, weight.rows)] if site.bias else [])]
        return tuple(found)


def _shape(target: Target, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of what ``Add`` adds to a target: of a block of rows of a kernel it is a matrix, as all updates see it."""
    if target.rows is None:
        return shape
    rows = target.rows[1] - target.rows[0]
    return (rows,) if len(shape) == 1 else (rows, math.prod(shape[1:]))


@functools.lru_cache(maxsize=2)
def projection(total: int, dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    """P as the column of each row, int64 (D,), and the number there, float32 (D,)."""
    rng = np.random.default_rng((seed, total, dimension))
    places = rng.permutation(total) % dimension
    lengths = np.sqrt(np.bincount(places, minlength=dimension)).astype(np.float32)
    signs = rng.choice(np.array([-1, 1], np.float32), total) / lengths[places]
    return torch.from_numpy(places), torch.from_numpy(signs)


def submodules(layers: Sequence[Site], tensors: Tensors) -> tuple[Submodule, ...]:
    """Every kind of layer in every group of three blocks that follow one another, in the order in which they run.

    The kinds are the row blocks of fused weights, q, k and v, and the names that dense layers have in their blocks.
    """
    every = blocks_in_order(layers)
    found = []
    for first in range(0, len(every), GROUP):
        last = min(first + GROUP, len(every)) - 1
        blocks = f"{first}-{last}" if last > first else f"{first}"
        kinds = dict.fromkeys(kind for each in every[first : last + 1] for kind in _kinds(each, layers))
        for kind in kinds:
            method = in_blocks(InSubspace((kind,)), blocks)
            start = method.start(method.sites(layers), tensors, np.random.default_rng(0))
            found.append(Submodule(on=kind, blocks=blocks, parameters=int(start[SHARED]["z"].size)))
    return tuple(found)


def _kinds(each: Block, layers: Sequence[Site]) -> list[str]:
    inside = [site for site in layers if site.dense and site.name.startswith(f"{each.name}.")]
    named = [[name for name, _ in site.blocks] or [site.name.removeprefix(f"{each.name}.")] for site in inside]
    return [kind for kinds in named for kind in kinds]
