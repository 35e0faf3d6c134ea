"""The vocabulary of deltas: what can happen to one backbone tensor, and the only code that knows its maths.

A linear weight is (out, in); a convolution kernel (out, in, kh, kw) is seen as (out, in * kh * kw). ``fold`` uses only
operators that NumPy arrays and torch tensors share, so training, merging and the device compute one formula. Every
exactly mergeable method of the literature is W* = diag(g) (W + dW) M, cut into these pieces (ADR-0002). A factor is an
array, or an expression over smaller ones (ADR-0011).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from edgepet.deltas.expressions import Expression, Factor, cast, leaves, remade, settings, value
from edgepet.errors import InputError
from edgepet.spec import Array, Target

Shape: TypeAlias = tuple[int, ...]


def _need(name: str, want: object, got: Array) -> str | None:
    return None if tuple(got.shape) == want else f"needs {name} {want}, got {tuple(got.shape)}"


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """out: W <- diag(s) W, and a vector b <- s * b. in: W <- W diag(s), each input channel over kh * kw."""

    kind: ClassVar[str] = "scale"
    s: Array
    axis: Literal["out", "in"] = "out"

    def mismatch(self, shape: Shape) -> str | None:
        """Why ``s`` does not fit a matrix or vector of ``shape``, None where it does."""
        if not shape:
            return "needs a tensor with axes, got a scalar"
        if self.axis == "out":
            return _need("s", (shape[0],), self.s)
        if len(shape) < 2:
            return "scales input channels, got a vector"
        divides = len(self.s.shape) == 1 and self.s.shape[0] > 0 and shape[1] % self.s.shape[0] == 0
        return None if divides else _need("s", (shape[1],), self.s)

    def fold(self, weight: Array) -> Array:
        """``weight`` (out, in) or (out,), each row or input channel times its number of ``s``, as a new tensor."""
        if self.axis == "out":
            return weight * self.s.reshape((-1,) + (1,) * (weight.ndim - 1))
        channels = self.s.shape[0]
        spread = weight.reshape(weight.shape[0], channels, -1) * self.s.reshape(1, channels, 1)
        return spread.reshape(weight.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """t <- t + d: biases, norms, batch-norm statistics."""

    kind: ClassVar[str] = "add"
    d: Array

    def mismatch(self, shape: Shape) -> str | None:
        """Why ``d`` is not of ``shape``, None where it is."""
        return _need("d", shape, self.d)

    def fold(self, weight: Array) -> Array:
        """``weight`` + d, of any shape, as a new tensor."""
        return weight + self.d


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """W <- W + scale * left @ core @ right; ``left`` (out, r), ``right`` (r, in), ``core`` the identity if None."""

    kind: ClassVar[str] = "low-rank"
    left: Array
    right: Array
    core: Array | None = None
    scale: float = 1.0

    def mismatch(self, shape: Shape) -> str | None:
        """Why the factors do not fit a matrix of ``shape``, None where they do."""
        if len(shape) != 2:
            return "needs a matrix or a kernel, got a vector"
        if len(self.left.shape) != 2 or len(self.right.shape) != 2:
            return "needs left and right with two axes"
        wrong = _need("left", (shape[0], self.left.shape[1]), self.left)
        if self.core is None:
            return wrong or _need("right", (self.left.shape[1], shape[1]), self.right)
        inner = (self.left.shape[1], self.right.shape[0])
        return wrong or _need("core", inner, self.core) or _need("right", (inner[1], shape[1]), self.right)

    def fold(self, weight: Array) -> Array:
        """``weight`` (out, in) + scale * left @ core @ right, as a new matrix."""
        inner = self.right if self.core is None else self.core @ self.right
        return weight + self.scale * (self.left @ inner)


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """W[:, order] <- W[:, order] + blockdiag(blocks); ``blocks`` (g, out/g, in/g).

    ``order`` is a permutation of the input columns, or None; for a k x k kernel it permutes input channels.
    """

    kind: ClassVar[str] = "grouped"
    blocks: Array
    order: Array | None = None

    def mismatch(self, shape: Shape) -> str | None:
        """Why ``blocks`` or ``order`` do not fit a matrix of ``shape``, None where they do."""
        if len(shape) != 2 or len(self.blocks.shape) != 3:
            return "needs blocks (g, out/g, in/g) for a matrix or a kernel"
        groups = self.blocks.shape[0]
        if groups == 0 or shape[0] % groups or shape[1] % groups:
            return f"needs a number of groups that divides {shape[0]} and {shape[1]}, got {groups}"
        wrong = _need("blocks", (groups, shape[0] // groups, shape[1] // groups), self.blocks)
        if wrong or self.order is None:
            return wrong
        channels = self.order.shape[0] if len(self.order.shape) == 1 else 0
        if channels == 0 or shape[1] % channels:
            return _need("order", (shape[1],), self.order)
        ordered = np.sort(np.asarray(self.order))
        return None if bool((ordered == np.arange(channels)).all()) else "needs an order that names every column once"

    def fold(self, weight: Array) -> Array:
        """``weight`` (out, in) + blockdiag(blocks) on its columns in ``order``, as a new matrix."""
        groups, rows, cols = self.blocks.shape
        columns = np.arange(weight.shape[1])
        if self.order is not None:
            taps = weight.shape[1] // self.order.shape[0]
            columns = (np.asarray(self.order)[:, None] * taps + np.arange(taps)).reshape(-1)
        # Advanced indices on both sides of a slice put the group axis first: (g, out/g, in/g), the blocks' own shape.
        cut = (weight[:, columns] * 1).reshape(groups, rows, groups, cols)
        each = np.arange(groups)
        cut[each, :, each, :] = cut[each, :, each, :] + self.blocks
        return cut.reshape(weight.shape)[:, np.argsort(columns)]


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """W <- W + scale * sum_i left_i (x) right_i; ``left`` (n, p, q), ``right`` (n, out/p, in/q)."""

    kind: ClassVar[str] = "kronecker"
    left: Array
    right: Array
    scale: float = 1.0

    def mismatch(self, shape: Shape) -> str | None:
        """Why the factors do not fit a matrix of ``shape``, None where they do."""
        if len(shape) != 2 or len(self.left.shape) != 3:
            return "needs left (n, p, q) for a matrix or a kernel"
        terms, p, q = self.left.shape
        if p == 0 or q == 0 or shape[0] % p or shape[1] % q:
            return f"needs a left that divides {shape[0]} by {shape[1]}, got {p} by {q}"
        return _need("right", (terms, shape[0] // p, shape[1] // q), self.right)

    def fold(self, weight: Array) -> Array:
        """``weight`` (out, in) + scale * sum_i left_i (x) right_i, as a new matrix."""
        terms, p, q = self.left.shape
        rows, cols = self.right.shape[1:]
        # sum_n left[n, p, q] right[n, r, c] is one matrix product over n; its axes are then put in Kronecker order.
        product = self.left.reshape(terms, p * q).T @ self.right.reshape(terms, rows * cols)
        return weight + self.scale * product.reshape(p, q, rows, cols).swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Precompose:
    """W <- W + scale * (W blockdiag(left)) right: a linear change of the layer's input (RepAdapter).

    ``left`` (g, in/g, r/g), ``right`` (r, in).
    """

    kind: ClassVar[str] = "precompose"
    left: Array
    right: Array
    scale: float = 1.0

    def mismatch(self, shape: Shape) -> str | None:
        """Why the factors do not fit a matrix of ``shape``, None where they do."""
        if len(shape) != 2 or len(self.left.shape) != 3:
            return "needs left (g, in/g, r/g) for a matrix or a kernel"
        groups, _, rank = self.left.shape
        if groups == 0 or shape[1] % groups:
            return f"needs a number of groups that divides {shape[1]}, got {groups}"
        wrong = _need("left", (groups, shape[1] // groups, rank), self.left)
        return wrong or _need("right", (groups * rank, shape[1]), self.right)

    def fold(self, weight: Array) -> Array:
        """``weight`` (out, in) + scale * (weight blockdiag(left)) right, as a new matrix."""
        groups, cols, rank = self.left.shape
        through = weight.reshape(weight.shape[0], groups, cols).swapaxes(0, 1) @ self.left  # (g, out, r/g)
        return weight + self.scale * (through.swapaxes(0, 1).reshape(weight.shape[0], groups * rank) @ self.right)


@dataclass(frozen=True, slots=True, eq=False)
class Replace:
    """t <- value: statistics that moved, full fine-tuning."""

    kind: ClassVar[str] = "replace"
    value: Array

    def mismatch(self, shape: Shape) -> str | None:
        """Why ``value`` is not of ``shape``, None where it is."""
        return _need("value", shape, self.value)

    def fold(self, weight: Array) -> Array:
        """A copy of ``value``, whatever ``weight`` holds."""
        del weight
        return self.value * 1


Update: TypeAlias = Scale | Add | LowRank | Grouped | Kronecker | Precompose | Replace
UPDATES: dict[str, type[Update]] = {
    "scale": Scale,
    "add": Add,
    "low-rank": LowRank,
    "grouped": Grouped,
    "kronecker": Kronecker,
    "precompose": Precompose,
    "replace": Replace,
}
FACTORS: dict[str, tuple[str, ...]] = {  # the arrays of each update, in the order a pack stores them
    "scale": ("s",),
    "add": ("d",),
    "low-rank": ("left", "core", "right"),
    "grouped": ("blocks", "order"),
    "kronecker": ("left", "right"),
    "precompose": ("left", "right"),
    "replace": ("value",),
}
WHOLE_TENSOR = (Add, Replace)  # these see a tensor in its own shape, the others a matrix or a vector


@dataclass(frozen=True, slots=True, eq=False)
class Targeted:
    """One update and the tensor, or block of it, that it changes. It touches nothing else."""

    target: Target
    update: Update


def keeps_codes(targeted: Targeted) -> bool:
    """Whether a weight's rows are only scaled: they then have the int8 codes that they had, and other steps."""
    update = targeted.update
    return isinstance(update, Scale) and update.axis == "out" and targeted.target.cols is None


def factors(update: Update) -> dict[str, Array]:
    """The stored arrays of ``update`` by name, absent ones left out; an expression's as ``left.right`` and the like."""
    return {name: array for factor, given in _given(update).items() for name, array in leaves(factor, given).items()}


def with_arrays(update: Update, arrays: Mapping[str, Array]) -> Update:
    """``update`` with ``arrays`` in place of its own, under the names of ``factors``; permutations and bits too."""
    return replace(update, **{name: remade(given, name, arrays) for name, given in _given(update).items()})


def attributes(update: Update) -> dict[str, object]:
    """What of ``update`` is not an array: ``axis``, ``scale``, and which of its factors are what expressions."""
    plain = {f.name: getattr(update, f.name) for f in fields(update) if f.name not in FACTORS[update.kind]}
    return plain | {n: settings(given) for n, given in _given(update).items() if isinstance(given, Expression)}


def in_precision_of(update: Update, tensor: Array) -> Update:
    """``update`` with floating-point factors in the dtype of the NumPy array ``tensor``."""
    return replace(update, **{name: cast(given, tensor.dtype) for name, given in _given(update).items()})


def _given(update: Update) -> dict[str, Factor]:
    named = {name: getattr(update, name) for name in FACTORS[update.kind]}
    return {name: given for name, given in named.items() if given is not None}


def _broken(update: Update) -> str | None:
    """What is wrong with an expression of ``update`` by itself."""
    problems = (given.mismatch() for given in _given(update).values() if isinstance(given, Expression))
    return next((problem for problem in problems if problem), None)


def check(targeted: Targeted, shape: Shape, *, where: str, fix: str | None = None) -> None:
    """Refuse an update that does not fit a tensor of ``shape``.

    Raises:
        InputError: the block is outside the tensor, or the factors do not fit it or one another.
    """
    target, update = targeted.target, targeted.update
    what = None
    if target.rows is None and target.cols is None:
        seen = shape if isinstance(update, WHOLE_TENSOR) else _flat(shape)
    elif not shape or (len(shape) < 2 and target.cols is not None):
        what, seen = f"needs a {'tensor with axes' if not shape else 'matrix'} for its block, got {shape}", ()
    else:
        bounds = zip(_flat(shape), (target.rows, target.cols), strict=False)
        seen = tuple(size if span is None else span[1] - span[0] for size, span in bounds)
        ends = zip(_flat(shape), (target.rows, target.cols), strict=False)
        if any(span is not None and span[1] > size for size, span in ends):
            what = f"needs a block inside {_flat(shape)}"
    problem = what or _broken(update) or update.mismatch(seen)
    if problem is not None:
        raise InputError(f"{where}: {target}", f"{type(update).__name__} {problem}", fix=fix)


def fold(targeted: Targeted, tensor: Array) -> Array:
    """Apply one update and return a new tensor of the same shape; ``tensor`` is not touched.

    The factors must have been checked against ``tensor`` and be of its library and dtype.
    """
    target, given = targeted.target, targeted.update
    update = replace(given, **{name: value(factor) for name, factor in _given(given).items()})
    if isinstance(update, WHOLE_TENSOR) and target.rows is None and target.cols is None:
        return update.fold(tensor)
    matrix = tensor if tensor.ndim == 1 else tensor.reshape(tensor.shape[0], -1)
    if target.rows is None and target.cols is None:
        return update.fold(matrix).reshape(tensor.shape)
    block = tuple(slice(*span) if span else slice(None) for span in (target.rows, target.cols)[: matrix.ndim])
    whole = matrix * 1
    whole[block] = update.fold(matrix[block])
    return whole.reshape(tensor.shape)


def _flat(shape: Shape) -> Shape:
    return shape if len(shape) < 2 else (shape[0], int(np.prod(shape[1:])))
