"""Factors that are computed from smaller tensors, or from a seed: a pack stores those, ``fold`` asks for the value.

They keep what a method has compressed. Like the updates they use only operators that NumPy and torch share. Version 1
of the pack format has these and no more (ADR-0026).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import numpy as np

from edgepet.deltas.generator import MOST_VALUES, SEEDS, balanced, uniform
from edgepet.spec import Array, NpArray


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

    def value(self, like: Array) -> Array:
        """The product (..., p, q), a new array."""
        del like
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

    def value(self, like: Array) -> Array:
        """The cut (r, r); ``cube`` is not touched, and nothing beside the cut is mixed."""
        rank, _, depth = self.cube.shape
        columns = np.arange(self.part * rank, (self.part + 1) * rank)
        inner, mixture = columns // self.weights.shape[1], columns % self.weights.shape[1]  # axes 1 and 2 of (r, r, m)
        first, last = int(inner[0]), int(inner[-1]) + 1
        used = np.unique(mixture)
        mixed = self.cube[:, first:last].reshape(-1, depth) @ self.weights[:, used]
        cut = mixed.reshape(rank, last - first, len(used))[:, inner - first, np.searchsorted(used, mixture)]
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

    def value(self, like: Array) -> Array:
        """A new array of the shape of ``bits`` and the dtype of ``levels``."""
        del like
        return self.levels[self.bits * 1]

    def mismatch(self) -> str | None:
        """Why ``levels`` are not two, None where they are."""
        levels = tuple(self.levels.shape)
        return None if levels == (2,) else f"needs two levels for its bits, got {levels}"


@dataclass(frozen=True, slots=True, eq=False)
class Householder:
    """(I - left left^T) D (I - right right^T), D (p, q) with ``d`` on its diagonal and zero elsewhere.

    ``left`` (p,), ``d`` (the smaller of p and q,), ``right`` (q,). A vector v of squared length 2 makes a reflection of
    I - v v^T; one of zeros leaves out its side.
    """

    kind: ClassVar[str] = "householder"
    tensors: ClassVar[tuple[str, ...]] = ("left", "d", "right")
    left: Array
    d: Array
    right: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(p, q), of the value, which is not computed."""
        return (self.left.shape[0], self.right.shape[0])

    def value(self, like: Array) -> Array:
        """The matrix (p, q), a new array."""
        rows, columns = self.shape
        diagonal = self.d.reshape((-1, 1) if rows <= columns else (1, -1))
        half = constant(np.eye(rows, columns), like) * diagonal
        half = half - self.left.reshape(-1, 1) * (self.left @ half)
        return half - (half @ self.right).reshape(-1, 1) * self.right

    def mismatch(self) -> str | None:
        """Why the three are no vectors of p, q and the smaller of both; None where they are."""
        left, d, right = tuple(self.left.shape), tuple(self.d.shape), tuple(self.right.shape)
        fits = len(left) == len(right) == 1 and d == (min(left[0], right[0]),)
        return None if fits else f"needs left (p,), d (min(p, q),) and right (q,), got {left}, {d} and {right}"


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a sequence that is made and not stored: ``shape`` values in C order, the first of number ``start``."""

    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def mismatch(self, end: int) -> str | None:
        """Why it is no part of a sequence of ``end`` values, or too large a one; None where it is."""
        fits = self.start >= 0 and 0 < self.size <= MOST_VALUES and self.start + self.size <= end
        if fits:
            return None
        return f"needs 1 to {MOST_VALUES} of {end} values, got {self.shape} from {self.start}"


@dataclass(frozen=True, slots=True, eq=False)
class Seeded:
    """Values drawn evenly from -``bound`` to ``bound`` by the pack's own generator; nothing of them is stored.

    ``draws`` are the numbers of the outputs that they are made of: expressions of one seed and one window are equal.
    """

    kind: ClassVar[str] = "seeded"
    tensors: ClassVar[tuple[str, ...]] = ()
    seed: int
    bound: float
    draws: Window

    @property
    def shape(self) -> tuple[int, ...]:
        """That of ``draws``."""
        return self.draws.shape

    def value(self, like: Array) -> Array:
        """A new array: one rounding to float64, and one to the precision of ``like``."""
        values = uniform(self.seed, self.draws.start, self.draws.size).reshape(self.draws.shape)
        return constant(values * self.bound, like)

    def mismatch(self) -> str | None:
        """Why it cannot be drawn, None where it can."""
        return _wrong_seed(self.seed) or self.draws.mismatch(SEEDS)


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """Some of ``total`` values, each one of ``values`` (d,) over the square root of how many of them are that one.

    Which one it is comes from ``seed`` (``generator.balanced``); ``index`` are the numbers of those that are taken. So
    all factors of a network are a rotation of d values (Uni-LoRA: Li et al. 2025, arXiv:2506.00799, section 3).
    """

    kind: ClassVar[str] = "gather"
    tensors: ClassVar[tuple[str, ...]] = ("values",)
    values: Array
    seed: int
    total: int
    index: Window

    @property
    def shape(self) -> tuple[int, ...]:
        """That of ``index``."""
        return self.index.shape

    def value(self, like: Array) -> Array:
        """A new array in the precision of ``values``."""
        count = self.values.shape[0]
        taken = balanced(self.seed, self.total, count)[self.index.start : self.index.start + self.index.size]
        times = self.total // count + (np.arange(count) < self.total % count)
        return (self.values * constant(times**-0.5, like))[taken.astype(np.int64).reshape(self.index.shape)]

    def mismatch(self) -> str | None:
        """Why nothing can be taken, None where it can."""
        values = tuple(self.values.shape)
        if len(values) != 1 or not 0 < values[0] <= self.total <= MOST_VALUES:
            return f"needs values (d,) for d to {MOST_VALUES} factors, got {values} for {self.total}"
        return _wrong_seed(self.seed) or self.index.mismatch(self.total)


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """diag(c) base, or diag(c) base^T where ``transposed``: ``c`` (p,), ``base`` a matrix of p rows, or p columns.

    ``base`` may be computed itself, though not by another ``Scaled``. Many updates share one: it is stored once.
    """

    kind: ClassVar[str] = "scaled"
    tensors: ClassVar[tuple[str, ...]] = ("c", "base")
    c: Array
    base: Factor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of ``base``, turned where ``transposed``."""
        return tuple(self.base.shape)[:: -1 if self.transposed else 1]

    def value(self, like: Array) -> Array:
        """The scaled matrix, a new array."""
        base = value(self.base, like)
        return self.c.reshape(-1, 1) * (base.T if self.transposed else base)

    def mismatch(self) -> str | None:
        """Why ``c`` does not scale the rows of ``base``, None where it does."""
        if isinstance(self.base, Scaled):
            return "needs a base that is not scaled itself"
        inner = self.base.mismatch() if isinstance(self.base, Expression) else None
        if inner is not None:
            return inner
        c, rows = tuple(self.c.shape), self.shape[:1]
        fits = len(self.shape) == 2 and c == rows
        return None if fits else f"needs c (p,) and a base of p rows, got {c} and {self.shape}"


Expression: TypeAlias = Product | Mix | Binary | Scaled | Householder | Seeded | Gather
Factor: TypeAlias = Array  # or an expression: an array may be of any library, so no union says more than this
EXPRESSIONS: dict[str, type[Expression]] = {
    "product": Product,
    "mix": Mix,
    "binary": Binary,
    "scaled": Scaled,
    "householder": Householder,
    "seeded": Seeded,
    "gather": Gather,
}
SETTINGS: dict[str, dict[str, type]] = {  # beside the tensors
    "mix": {"part": int, "transposed": bool},
    "scaled": {"transposed": bool},
    "seeded": {"seed": int, "bound": float},
    "gather": {"seed": int, "total": int},
}
LIMITS = {"seed": (0, SEEDS - 1), "total": (1, MOST_VALUES)}  # of whole numbers; the others are at least 0
WINDOWS = {"seeded": ("draws",), "gather": ("index",)}  # which parts of what is made, not stored
NESTED = {"scaled": ("base",)}  # tensors that may be expressions themselves, of any kind that is not here


def leaves(name: str, factor: Factor) -> dict[str, Array]:
    """The stored tensors of a factor: itself as ``name``, or an expression's as ``name.left``, ``name.right``."""
    if not isinstance(factor, Expression):
        return {name: factor}
    return {
        leaf: array
        for part in factor.tensors
        for leaf, array in leaves(f"{name}.{part}", getattr(factor, part)).items()
    }


def windows(name: str, factor: Factor) -> dict[str, Window]:
    """The windows of a factor, called as its tensors are: ``name.index``, ``name.base.draws``."""
    return dict(_windows(name, factor))


def _windows(name: str, factor: Factor) -> Iterator[tuple[str, Window]]:
    if isinstance(factor, Expression):
        for part in WINDOWS.get(factor.kind, ()):
            yield f"{name}.{part}", getattr(factor, part)
        for part in NESTED.get(factor.kind, ()):
            yield from _windows(f"{name}.{part}", getattr(factor, part))


def made_sizes(factor: Factor) -> Iterator[tuple[object, int]]:
    """What a factor makes from seeds, and bytes of it: draws in float64, and a shuffle in int32."""
    if isinstance(factor, Seeded):
        yield ("draws", factor.seed), 8 * factor.draws.size
    if isinstance(factor, Gather):
        yield ("shuffle", factor.seed, factor.total), 4 * factor.total
        yield ("gathered", factor.seed, factor.total), 8 * factor.index.size
    if isinstance(factor, Expression):
        for part in NESTED.get(factor.kind, ()):
            yield from made_sizes(getattr(factor, part))


def remade(factor: Factor, name: str, arrays: Mapping[str, Array]) -> Factor:
    """A factor of other tensors, which are called as ``leaves`` calls them."""
    if not isinstance(factor, Expression):
        return arrays[name]
    return replace(factor, **{part: remade(getattr(factor, part), f"{name}.{part}", arrays) for part in factor.tensors})


def settings(factor: Expression) -> dict[str, object]:
    """What of an expression is not a tensor, its kind among it, and the same of the expressions within it."""
    plain = {"kind": factor.kind, **{name: getattr(factor, name) for name in SETTINGS.get(factor.kind, {})}}
    within = {part: getattr(factor, part) for part in NESTED.get(factor.kind, ())}
    return plain | {part: settings(inner) for part, inner in within.items() if isinstance(inner, Expression)}


def cast(factor: Factor, dtype: np.dtype[np.generic]) -> Factor:
    """A NumPy factor with its floating-point tensors in ``dtype``; permutations and bits stay what they are."""
    if isinstance(factor, Expression):
        return replace(factor, **{part: cast(getattr(factor, part), dtype) for part in factor.tensors})
    return factor.astype(dtype) if factor.dtype.kind == "f" else factor


def value(factor: Factor, like: Array) -> Array:
    """The array that a factor stands for; what has no tensors is of the library and precision of ``like``."""
    return factor.value(like) if isinstance(factor, Expression) else factor


def constant(values: NpArray, like: Array) -> Array:
    """A copy of ``values`` in the library and precision of ``like``, and where that lies."""
    return values.astype(like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(values)


def _wrong_seed(seed: int) -> str | None:
    return None if 0 <= seed < SEEDS else f"needs a seed from 0 to below 2^53, got {seed}"
