"""A pack's updates as PEFT sees them: layer by layer, each weight with its bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from edgepet.deltas.expressions import value
from edgepet.deltas.updates import LowRank, Modulate, Push, Scale, Targeted
from edgepet.errors import InputError
from edgepet.spec import NpArray, Site, Target, Tensors

Factors: TypeAlias = tuple[NpArray, NpArray]  # left (out, r) and right (r, in)
DOUBLE = np.empty(0)  # factors of a product are not multiplied in a pack's fp16
FORMATS = "LoRA, DoRA, LoKr, IA3, VeRA, HiRA or GLoRA"
MERGE = "edgepet merge writes dense weights of any pack"


@dataclass(slots=True, eq=False)
class Layer:
    """One layer's updates in order: of its weight and of its bias."""

    site: Site
    weight: list[Targeted] = field(default_factory=list)
    bias: list[Targeted] = field(default_factory=list)

    @property
    def scales(self) -> list[Targeted]:
        """Those of its bias."""
        return [targeted for targeted in self.bias if isinstance(targeted.update, Scale)]

    def shape(self, rows: int, base: Tensors) -> tuple[int, ...]:
        """Of a factor with ``rows`` that reads what the layer reads."""
        return (rows, *base[self.site.weight].shape[1:])

    def whole(self, target: Target, factors: Factors) -> Factors:
        """Factors of all of the weight, whose product is theirs at ``target`` and zero elsewhere."""
        out, columns = self.site.out_features, self.site.columns
        (first, last), (begin, end) = target.rows or (0, out), target.cols or (0, columns)
        left, right = np.zeros((out, len(factors[1]))), np.zeros((len(factors[1]), columns))
        left[first:last], right[:, begin:end] = factors
        return left, right

    def ones(self, base: Tensors) -> tuple[int, ...]:
        """Axes of a kernel's taps, all 1; of a linear layer none."""
        return (1,) * (base[self.site.weight].ndim - 2)


def factors_of(update: LowRank | Modulate) -> Factors:
    """Left, with the core in it, and right, as float64 where the arrays are; ``scale`` is left out."""
    left = value(update.left, DOUBLE)
    if isinstance(update, LowRank) and update.core is not None:
        left = left @ value(update.core, DOUBLE)
    return left, value(update.right, DOUBLE)


def by_layer(updates: Sequence[Targeted], layers: Sequence[Site]) -> list[Layer]:
    """The layers whose weights change; where there are none, those whose biases are pushed into."""
    changed = {targeted.target.tensor for targeted in updates}
    pushed = {targeted.target.tensor for targeted in updates if isinstance(targeted.update, Push)}
    sites = [site for site in layers if site.kind in ("linear", "conv")]
    found = [Layer(site) for site in sites if site.weight in changed]
    found = found or [Layer(site) for site in sites if site.bias in pushed]
    weights = {layer.site.weight: layer for layer in found}
    biases = {layer.site.bias: layer for layer in found if layer.site.bias}
    for targeted in updates:
        name = targeted.target.tensor
        if name in weights:
            weights[name].weight.append(targeted)
        elif name in biases:
            biases[name].bias.append(targeted)
    return found


def refused(where: str, targeted: Targeted, what: str) -> InputError:
    """An error that names the update that PEFT has no adapter for."""
    return InputError(f"{where}: {targeted.target}", f"{type(targeted.update).__name__} {what}", fix=MERGE)
