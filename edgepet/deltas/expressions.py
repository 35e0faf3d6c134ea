"""Factors that are computed from smaller tensors: a pack stores the tensors, ``fold`` asks for the value.

They keep what a method has compressed. Like the updates they use only operators that NumPy and torch share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import numpy as np

from edgepet.spec import Array


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """``left @ right``, matrix by matrix: (..., p, r) and (..., r, q) with the same leading axes."""

    kind: ClassVar[str] = "product"
    tensors: ClassVar[tuple[str, ...]] = ("left", "right")
    left: Array
    right: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., p, q), of the value, which is not computed."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def value(self) -> Array:
        """The product (..., p, q), a new array."""
        return self.left @ self.right

    def mismatch(self) -> str | None:
        """Why the two make no product, None where they do."""
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        fits = len(left) == len(right) >= 2 and left[:-2] == right[:-2] and left[-1] == right[-2]
        return None if fits else f"needs a product of (..., p, r) and (..., r, q), got {left} and {right}"


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """One square cut of ``cube`` (r, r, k) mixed by ``weights`` (k, m) along its last axis.

    The mixed cube (r, r, m) is read as the matrix (r, r * m), the last axis running fastest, and columns
    ``part * r`` to ``(part + 1) * r`` are taken, then transposed where asked. With m = 1 it is sum_k w_k cube[:, :, k].
    """

    kind: ClassVar[str] = "mix"
    tensors: ClassVar[tuple[str, ...]] = ("cube", "weights")
    cube: Array
    weights: Array
    part: int = 0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(r, r), of the value, which is not computed."""
        return tuple(self.cube.shape[:2])

    @property
    def value(self) -> Array:
        """The cut (r, r); ``cube`` is not touched."""
        rank, _, depth = self.cube.shape
        mixed = (self.cube.reshape(rank * rank, depth) @ self.weights).reshape(rank, -1)
        cut = mixed[:, self.part * rank : (self.part + 1) * rank]
        return cut.T if self.transposed else cut

    def mismatch(self) -> str | None:
        """Why ``weights`` do not mix ``cube``, or ``part`` is no cut of it; None where all fits."""
        cube, weights = tuple(self.cube.shape), tuple(self.weights.shape)
        fits = len(cube) == 3 and cube[0] == cube[1] and len(weights) == 2 and weights[0] == cube[2]
        if not fits:
            return f"needs a mix of a cube (r, r, k) by weights (k, m), got {cube} and {weights}"
        return None if 0 <= self.part < weights[1] else f"needs a part below {weights[1]}, got {self.part}"


@dataclass(frozen=True, slots=True, eq=False)
class Binary:
    """Each of ``bits`` (bool, any shape) as one of two ``levels``: low for 0, high for 1."""

    kind: ClassVar[str] = "binary"
    tensors: ClassVar[tuple[str, ...]] = ("bits", "levels")
    bits: Array
    levels: Array  # (2,)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of ``bits``."""
        return tuple(self.bits.shape)

    @property
    def value(self) -> Array:
        """A new array of the shape of ``bits`` and the dtype of ``levels``."""
        return self.levels[self.bits * 1]

    def mismatch(self) -> str | None:
        """Why ``levels`` are not two, None where they are."""
        levels = tuple(self.levels.shape)
        return None if levels == (2,) else f"needs two levels for its bits, got {levels}"


Expression: TypeAlias = Product | Mix | Binary
Factor: TypeAlias = Array  # or an expression: an array may be of any library, so no union says more than this
EXPRESSIONS: dict[str, type[Expression]] = {"product": Product, "mix": Mix, "binary": Binary}
SETTINGS: dict[str, dict[str, type]] = {"mix": {"part": int, "transposed": bool}}  # beside the tensors


def leaves(name: str, factor: Factor) -> dict[str, Array]:
    """The stored tensors of a factor: itself as ``name``, or an expression's as ``name.left``, ``name.right``."""
    if not isinstance(factor, Expression):
        return {name: factor}
    return {f"{name}.{part}": getattr(factor, part) for part in factor.tensors}


def remade(factor: Factor, name: str, arrays: Mapping[str, Array]) -> Factor:
    """A factor of other tensors, which are called as ``leaves`` calls them."""
    if not isinstance(factor, Expression):
        return arrays[name]
    return replace(factor, **{part: arrays[f"{name}.{part}"] for part in factor.tensors})


def settings(factor: Expression) -> dict[str, object]:
    """What of an expression is not a tensor, its kind among it."""
    return {"kind": factor.kind, **{name: getattr(factor, name) for name in SETTINGS.get(factor.kind, {})}}


def cast(factor: Factor, dtype: np.dtype[np.generic]) -> Factor:
    """A NumPy factor with its floating-point tensors in ``dtype``; permutations and bits stay what they are."""
    if isinstance(factor, Expression):
        return replace(factor, **{part: cast(getattr(factor, part), dtype) for part in factor.tensors})
    return factor.astype(dtype) if factor.dtype.kind == "f" else factor


def value(factor: Factor) -> Array:
    """The array that a factor stands for."""
    return factor.value if isinstance(factor, Expression) else factor
