"""Adapters that multiply a weight element by element, as PEFT's HiRA and GLoRA keep them.

HiRA is W + W * (B A), GLoRA W + W * A + B and b + b * D + E + W C. PEFT adapts whole layers: row blocks of a fused
weight become rows of one adapter that is zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from edgepet.deltas.updates import Add, LowRank, Modulate, Push, Scale, Targeted
from edgepet.peft.layers import Factors, Layer, factors_of, refused
from edgepet.spec import NpArray, Target, Tensors

Written: TypeAlias = tuple[dict[str, object], dict[str, NpArray]]


def generalised(layers: Sequence[Layer], kinds: set[str]) -> bool:
    """Whether of PEFT's adapters GLoRA alone may do what is done to ``layers``, by updates of ``kinds`` to weights.

    Row scales are IA3's where nothing is pushed into a bias, additions in front of them LoRA's and DoRA's, and a
    product is HiRA's where no bias changes.
    """
    if not kinds <= {"scale", "modulate", "low-rank"}:
        return False
    if "modulate" in kinds:
        return len(kinds) > 1 or any(layer.bias for layer in layers)
    if kinds == {"scale", "low-rank"}:
        orders = [[targeted.update.kind for targeted in layer.weight] for layer in layers]
        return any(order[0] == "scale" and "low-rank" in order for order in orders)
    return kinds != {"low-rank"} and any(isinstance(t.update, Push) for layer in layers for t in layer.bias)


def hira(layers: Sequence[Layer], base: Tensors, where: str) -> Written:
    """One product for every layer, all of one rank: PEFT 0.21.2 reads ``rank_pattern`` and does not look at it.

    Raises:
        InputError: two products meet, or a convolution has groups.
    """
    factors = {layer.site.name: _paths(layer, where, "HiRA")[0] for layer in layers}
    rank = max(len(right) for _, right in factors.values())
    tensors: dict[str, NpArray] = {}
    for layer in layers:
        name, groups = layer.site.name, layer.site.groups
        if not layer.site.dense:
            raise refused(where, layer.weight[0], f"is of {groups} groups, and PEFT's HiRA adapts those of one")
        left, right = _padded(factors[name], rank)
        tensors[f"{name}.hira_A"] = right.reshape(layer.shape(rank, base))
        tensors[f"{name}.hira_B"] = left.reshape(*left.shape, *layer.ones(base))
    config: dict[str, object] = {
        "peft_type": "HIRA", "r": rank, "rank_pattern": {}, "hira_dropout": 0.0, "fan_in_fan_out": False,
        "init_weights": True,
    }  # fmt: skip
    return config, tensors


def glora(layers: Sequence[Layer], base: Tensors, where: str, changed: Tensors) -> Written:
    """All five paths of every layer, A and B as vectors where those of all layers are, else of one rank.

    Args:
        changed: the layers' biases that change, with all of it folded in.

    Raises:
        InputError: a layer is a convolution, or its updates come in another order than GLoRA's.
    """
    for layer in layers:
        if layer.site.kind != "linear":
            what = "is of a convolution, and PEFT's GLoRA adapts linear layers alone"
            raise refused(where, [*layer.weight, *layer.bias][0], what)
    paths = {layer.site.name: _paths(layer, where, "GLoRA") for layer in layers}
    every = [factors for pair in paths.values() for factors in pair]
    vector, rank = all(map(_alike, every)), max(1, *(len(right) for _, right in every))
    tensors: dict[str, NpArray] = {}
    for layer in layers:
        for letter, factors in zip("AB", paths[layer.site.name], strict=True):
            path = f"{layer.site.name}.glora_{letter}"
            if vector:
                tensors[f"{path}.X"] = factors[0] @ factors[1][:, :1]
            else:
                tensors[f"{path}.Xd"], tensors[f"{path}.Xu"] = _padded(factors, rank)
        end = "zeros" if layer.site.bias is None else "X"  # PEFT's name where there is no bias to change
        for letter, vectors in zip("CDE", _of_bias(layer, base, changed), strict=True):
            tensors[f"{layer.site.name}.glora_{letter}.{end}"] = vectors
    config: dict[str, object] = {
        "peft_type": "GLORA", "r": rank, "config_A_B": "vector" if vector else "lora", "config_C": "vector",
        "config_D_E": "vector", "bias": "none", "init_weights": True,
    }  # fmt: skip
    return config, tensors


def _paths(layer: Layer, where: str, form: str) -> tuple[Factors, Factors]:
    """A and B of W + W * A + B."""
    out, columns = layer.site.out_features, layer.site.columns
    paths: tuple[list[Factors], list[Factors]] = ([], [])
    taken = np.zeros((out, columns), bool)
    for targeted in layer.weight:
        factors, target = _factors(targeted), targeted.target
        rows, cols = slice(*(target.rows or (0, out))), slice(*(target.cols or (0, columns)))
        adds = isinstance(targeted.update, LowRank)
        if factors is None or (taken[rows, cols].any() and not adds):
            raise refused(where, targeted, f"comes where PEFT's {form} has no place for it")
        taken[rows, cols] = True
        paths[adds].append(layer.whole(target, factors))
    a, b = (_joined(found, out, columns) for found in paths)
    return a, b


def _factors(targeted: Targeted) -> Factors | None:
    """What is added to the part of W that is changed, or what that is multiplied by less one; None of other updates."""
    update = targeted.update
    if isinstance(update, Scale) and update.axis == "out":
        target = targeted.target
        width = None if target.cols is None else target.cols[1] - target.cols[0]
        return update.s[:, None] - 1, np.ones((1, width or 1))
    if not isinstance(update, LowRank | Modulate):
        return None
    left, right = factors_of(update)
    return update.scale * left, right


def _joined(found: Sequence[Factors], out: int, columns: int) -> Factors:
    """The sum of all of them, of rank 0 where there are none."""
    left = np.hstack([np.zeros((out, 0)), *(left for left, _ in found)])
    return left, np.vstack([np.zeros((0, columns)), *(right for _, right in found)])


def _padded(factors: Factors, rank: int) -> Factors:
    left, right = factors
    more = rank - len(right)
    return np.pad(left, ((0, 0), (0, more))), np.pad(right, ((0, more), (0, 0)))


def _alike(factors: Factors) -> bool:
    """Whether the product is one number in each row."""
    return bool((factors[1] == factors[1][:, :1]).all())


def _of_bias(layer: Layer, base: Tensors, changed: Tensors) -> tuple[NpArray, NpArray, NpArray]:
    """C (in, 1), D and E (out,): the updates of the bias where they are GLoRA's, else E for all that they do."""
    site = layer.site
    c, d, e = np.zeros((site.in_features, 1)), np.zeros(site.out_features), np.zeros(site.out_features)
    for targeted in layer.bias:
        update, whole = targeted.update, targeted.target == Target(str(site.bias))
        if isinstance(update, Scale) and whole and not c.any():
            d, e = (1 + d) * update.s - 1, e * update.s
        elif isinstance(update, Add) and whole:
            e = e + update.d
        elif isinstance(update, Push) and whole and (update.reads, update.of) == (Target(site.weight), "frozen"):
            c = c + update.scale * np.repeat(update.c, site.in_features // len(update.c))[:, None]
        else:
            name = str(site.bias)
            return 0 * c, 0 * d, changed[name] - base[name]
    return c, d, e
