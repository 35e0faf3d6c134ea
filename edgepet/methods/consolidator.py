"""Consolidator: grouped linear branches beside every linear layer, folded twice.

Hao et al. 2023, "Consolidator: Mergeable Adapter with Grouped Connections for Visual Adaptation", arXiv:2305.00603,
section 3: y' = W x + b + sum_i droppath(T_i x[order_i] + c_i) with T_i block-diagonal. Adaptation to storage: branches
of one order whose groups nest are summed into one block-diagonal matrix. Loading to inference: it is added to W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from edgepet.deltas.updates import Grouped, Targeted
from edgepet.errors import InputError
from edgepet.methods.method import Recipe, Start, shift, shift_units
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned

FEWEST_GROUPS = 8  # fewer would be nearly dense; images of three channels, for example
FEW_INPUTS = 4  # inputs of a group up to which products of elements are faster than matrix products


@dataclass(frozen=True, slots=True)
class Consolidator:
    """One branch for each number in ``groups`` on every linear layer and every convolution of one group.

    Where a number does not divide both sides of a layer, the largest one below it that does is taken, if that is
    ``FEWEST_GROUPS`` or more; else the layer goes without that branch. With ``shuffle`` every branch reads the input
    channels in its own order: viewed as g groups and transposed. ``drop_path`` is the probability that one sample skips
    one linear layer's branches while training; a convolution's are folded at every step and never dropped.

    Raises:
        InputError: ``groups`` is empty, names a number twice or one below 1, or ``drop_path`` is not in [0, 1).
    """

    groups: tuple[int, ...] = (384,)
    shuffle: bool = False
    drop_path: float = 0.2

    name: ClassVar[str] = "consolidator"
    paper: ClassVar[str] = "Hao et al. 2023, arXiv:2305.00603"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-3)
    starts_as_identity: ClassVar[bool] = False
    activation_kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def __post_init__(self) -> None:
        if not self.groups or min(self.groups) < 1 or len(set(self.groups)) != len(self.groups):
            raise InputError("consolidator", "needs groups that differ and are at least 1", got=self.groups)
        if not 0 <= self.drop_path < 1:
            raise InputError("consolidator", "needs a drop_path in [0, 1)", got=self.drop_path)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Dense layers that at least one branch fits."""
        return tuple(site for site in layers if site.dense and self._fitting(site))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """For a branch of g groups, 384 for example, "384.weight" (g, out / g, in * kh * kw / g) and "384.bias" (out,).

        Both are drawn evenly from -1e-3 to 1e-3, a bias in front of a batch norm in that norm's deviations; where the
        layer takes no shift there is no bias.
        """
        units = self.units(sites, base)
        return {site.name: self._start(site, rng, units.get(site.name, {})) for site in sites}

    def _start(self, site: Site, rng: np.random.Generator, units: Mapping[str, NpArray]) -> Mapping[str, NpArray]:
        tensors: dict[str, NpArray] = {}
        for g in self._fitting(site):
            shape = (g, site.out_features // g, site.columns // g)
            tensors[f"{g}.weight"] = rng.uniform(-1e-3, 1e-3, shape).astype(np.float32)
            if site.takes_shift:
                bias = rng.uniform(-1e-3, 1e-3, site.out_features).astype(np.float32)
                tensors[f"{g}.bias"] = bias * units.get(f"{g}.bias", np.float32(1))
        return tensors

    def units(self, sites: Sequence[Site], base: Tensors) -> Start:
        """Biases in front of a batch norm are learnt in that norm's deviations."""
        return shift_units(sites, base, *(f"{g}.bias" for g in self.groups))

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """W[:, order_i] + T_i as ``Grouped`` for each branch, and the sum of all c_i as ``Add`` where a shift goes.

        Without ``shuffle`` branches whose groups nest are summed first; with it each has its own order.
        """
        del base
        updates = []
        for site in sites:
            branches = {g: tuned[site.name][f"{g}.weight"] for g in self._fitting(site)}
            for g, blocks in (branches if self.shuffle else _summed(branches)).items():
                order = _order(site.in_features, g) if self.shuffle and g > 1 else None
                updates.append(Targeted(Target(site.weight), Grouped(blocks, order)))
            if site.takes_shift:
                updates.append(shift(site, sum(tuned[site.name][f"{g}.bias"] for g in branches)))
        return tuple(updates)

    def forward(self, site: Site, x: Array, y: Array, tuned: Mapping[str, Array], *, training: bool) -> Array:
        """y + sum_i (T_i x[order_i] + c_i) for ``x`` (n, ..., in) and ``y`` (n, ..., out); shape and dtype of ``y``.

        In training a sample's whole sum is dropped with probability ``drop_path``, else divided by 1 - ``drop_path``.
        """
        import torch

        branches: Array = None
        for g in self._fitting(site):
            read = x[..., torch.from_numpy(_order(site.in_features, g))] if self.shuffle else x
            cut, weight = read.reshape(*x.shape[:-1], g, -1).to(y.dtype), tuned[f"{g}.weight"].to(y.dtype)
            if cut.shape[-1] <= FEW_INPUTS:  # products of elements: a batch of g tiny matrices would be slower
                out = cut[..., :1] * weight[:, :, 0]
                for i in range(1, cut.shape[-1]):
                    out = torch.addcmul(out, cut[..., i : i + 1], weight[:, :, i])
            else:
                out = torch.einsum("...gi,goi->...go", cut, weight)
            branches = out.reshape(y.shape) if branches is None else branches + out.reshape(y.shape)
            if f"{g}.bias" in tuned:
                branches = branches + tuned[f"{g}.bias"].to(y.dtype)
        if not training or self.drop_path == 0:
            return y + branches
        keep = 1 - self.drop_path
        kept = torch.rand((y.shape[0],) + (1,) * (y.ndim - 1), device=y.device) < keep
        return torch.addcmul(y, branches, kept.to(y.dtype) / keep)

    def _fitting(self, site: Site) -> tuple[int, ...]:
        """The number of groups of each branch on this layer, in the order of ``groups``, each once."""
        sides = math.gcd(site.out_features, site.in_features)
        nearest = {most: next(g for g in range(min(most, sides), 0, -1) if sides % g == 0) for most in self.groups}
        return tuple(dict.fromkeys(g for most, g in nearest.items() if g >= min(most, FEWEST_GROUPS)))


def _summed(branches: Mapping[int, Array]) -> dict[int, Array]:
    """Branches whose groups nest, as one: the blocks of 2g groups lie inside the blocks of g groups."""
    summed: dict[int, Array] = {}
    for g in sorted(branches):
        wide = next((h for h in summed if g % h == 0), None)
        if wide is None:
            summed[g] = branches[g]
            continue
        ratio, (_, rows, cols) = g // wide, branches[g].shape
        inner = (summed[wide] * 1).reshape(wide, ratio, rows, ratio, cols)
        each = np.arange(ratio)
        inner[:, each, :, each, :] += branches[g].reshape(wide, ratio, rows, cols).swapaxes(0, 1)
        summed[wide] = inner.reshape(wide, ratio * rows, ratio * cols)
    return summed


@lru_cache(maxsize=64)
def _order(channels: int, g: int) -> NpArray:
    """Column c of a branch reads input column order[c]; one array for all layers of a width: a pack stores it once."""
    return np.arange(channels).reshape(g, channels // g).T.reshape(-1)
