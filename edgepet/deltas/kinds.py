"""What can happen to one backbone tensor: every kind of update, and the only code that knows its maths.

A linear weight is (out, in); a convolution kernel (out, in, kh, kw) is seen as (out, in * kh * kw). ``fold`` uses only
operators that NumPy arrays and torch tensors share, so training, merging and the device compute one formula. Every
exactly mergeable method of the literature is W* = diag(g) (W + dW) M, cut into these pieces (ADR-0002). A factor is an
array, or an expression over smaller ones (ADR-0011). Version 1 of the pack format has these and no more (ADR-0026).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from edgepet.spec import Array, NpArray, Target

Shape: TypeAlias = tuple[int, ...]

_CACHED = 1 << 18  # bytes of a matrix that a product is added to at once


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
        return weight + self.left @ self._inner()

    def fold_into(self, weight: NpArray) -> None:
        """The same where ``weight`` lies: some rows at a time, which stay in a processor's cache between two steps."""
        inner = self._inner()
        step = max(1, _CACHED // (weight.shape[1] * weight.itemsize))
        made = np.empty((step, weight.shape[1]), weight.dtype)
        for start in range(0, len(weight), step):
            rows = weight[start : start + step]
            rows += np.matmul(self.left[start : start + step], inner, out=made[: len(rows)])

    def _inner(self) -> Array:
        """scale * core @ right, the smaller factor."""
        return self.scale * (self.right if self.core is None else self.core @ self.right)


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
        made = (weight * 1).reshape(groups, rows, -1)
        at = np.arange(groups)[:, None, None], np.arange(rows)[:, None], columns.reshape(groups, 1, cols)
        made[at] = made[at] + self.blocks
        return made.reshape(weight.shape)


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

    ``left`` (g, in/g, r/g), or (in, r) as one block, ``right`` (r, in).
    """

    kind: ClassVar[str] = "precompose"
    left: Array
    right: Array
    scale: float = 1.0

    def mismatch(self, shape: Shape) -> str | None:
        """Why the factors do not fit a matrix of ``shape``, None where they do."""
        if len(shape) != 2 or len(self.left.shape) not in (2, 3):
            return "needs left (g, in/g, r/g) for a matrix or a kernel"
        if len(self.left.shape) == 2:
            rank = self.left.shape[1]
            return _need("left", (shape[1], rank), self.left) or _need("right", (rank, shape[1]), self.right)
        groups, _, rank = self.left.shape
        if groups == 0 or shape[1] % groups:
            return f"needs a number of groups that divides {shape[1]}, got {groups}"
        wrong = _need("left", (groups, shape[1] // groups, rank), self.left)
        return wrong or _need("right", (groups * rank, shape[1]), self.right)

    def fold(self, weight: Array) -> Array:
        """``weight`` (out, in) + scale * (weight blockdiag(left)) right, as a new matrix."""
        return weight + self.scale * (self.through(weight) @ self.right)

    def through(self, weight: Array) -> Array:
        """``weight`` (out, in) times blockdiag(left), (out, r)."""
        if self.left.ndim == 2:
            return weight @ self.left
        groups, cols, rank = self.left.shape
        through = weight.reshape(weight.shape[0], groups, cols).swapaxes(0, 1) @ self.left  # (g, out, r/g)
        return through.swapaxes(0, 1).reshape(weight.shape[0], groups * rank)


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


@dataclass(frozen=True, slots=True, eq=False)
class Modulate:
    """W <- W + scale * W * (left right), element by element; ``left`` (out, r), ``right`` (r, in)."""

    kind: ClassVar[str] = "modulate"
    left: Array
    right: Array
    scale: float = 1.0

    def mismatch(self, shape: Shape) -> str | None:
        """Why the factors do not fit a matrix of ``shape``, None where they do."""
        if len(shape) != 2:
            return "needs a matrix or a kernel, got a vector"
        if len(self.left.shape) != 2 or len(self.right.shape) != 2:
            return "needs left and right with two axes"
        rank = self.left.shape[1]
        return _need("left", (shape[0], rank), self.left) or _need("right", (rank, shape[1]), self.right)

    def fold(self, weight: Array) -> Array:
        """``weight`` (out, in) times 1 + scale * left @ right, as a new matrix."""
        return weight + self.scale * (weight * (self.left @ self.right))


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal:
    """W <- W + D, D rectangular with ``d`` (the smaller of out and in,) on its diagonal and zero elsewhere."""

    kind: ClassVar[str] = "diagonal"
    d: Array

    def mismatch(self, shape: Shape) -> str | None:
        """Why ``d`` is not as long as the diagonal of a matrix of ``shape``, None where it is."""
        if len(shape) != 2:
            return "needs a matrix or a kernel, got a vector"
        return _need("d", (min(shape),), self.d)

    def fold(self, weight: Array) -> Array:
        """``weight`` (out, in) with ``d`` added to its diagonal, as a new matrix."""
        whole, each = weight * 1, np.arange(self.d.shape[0])
        whole[each, each] = whole[each, each] + self.d
        return whole


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """b <- b + scale * W c: what a constant ``c`` (n,), added to a layer's input, adds to its output.

    The one update that reads another tensor than its target: the weight W, or the block of it, that ``reads`` names;
    ``frozen`` as the backbone has it, ``updated`` as all updates of that tensor leave it. Where n divides the columns
    of W, each value of ``c`` stands for columns / n neighbours, an input channel's taps.
    """

    kind: ClassVar[str] = "push"
    c: Array
    reads: Target
    of: Literal["frozen", "updated"] = "frozen"
    scale: float = 1.0

    def mismatch(self, shape: Shape, weight: Shape) -> str | None:
        """Why W c of a matrix of shape ``weight`` is not of ``shape``, or is none; None where all fits."""
        if len(shape) != 1:
            return "needs a vector to push into"
        if len(weight) != 2:
            return f"reads a matrix or a kernel, got {self.reads} of {weight}"
        if weight[0] != shape[0]:
            return f"needs {shape[0]} rows of {self.reads}, got {weight[0]}"
        c = tuple(self.c.shape)
        divides = len(c) == 1 and c[0] > 0 and weight[1] % c[0] == 0
        return None if divides else _need("c", (weight[1],), self.c)

    def fold(self, vector: Array, weight: Array) -> Array:
        """``vector`` (out,) + scale * ``weight`` (out, in) c, as a new vector."""
        taps = weight.shape[1] // self.c.shape[0]
        channels = weight if taps == 1 else weight.reshape(weight.shape[0], -1, taps).sum(-1)
        return vector + self.scale * (channels @ self.c)


Update: TypeAlias = Scale | Add | LowRank | Grouped | Kronecker | Precompose | Replace | Modulate | Push | Diagonal
UPDATES: dict[str, type[Update]] = {
    "scale": Scale,
    "add": Add,
    "low-rank": LowRank,
    "grouped": Grouped,
    "kronecker": Kronecker,
    "precompose": Precompose,
    "replace": Replace,
    "modulate": Modulate,
    "push": Push,
    "diagonal": Diagonal,
}
FACTORS: dict[str, tuple[str, ...]] = {  # the arrays of each update, in the order a pack stores them
    "scale": ("s",),
    "add": ("d",),
    "low-rank": ("left", "core", "right"),
    "grouped": ("blocks", "order"),
    "kronecker": ("left", "right"),
    "precompose": ("left", "right"),
    "replace": ("value",),
    "modulate": ("left", "right"),
    "push": ("c",),
    "diagonal": ("d",),
}
ATTRIBUTES: dict[str, dict[str, type[float] | tuple[str, ...]]] = {  # a number, or one of some words
    "scale": {"axis": ("out", "in")},
    "low-rank": {"scale": float},
    "kronecker": {"scale": float},
    "precompose": {"scale": float},
    "modulate": {"scale": float},
    "push": {"of": ("frozen", "updated"), "scale": float},
}
NAMES: dict[str, tuple[str, ...]] = {"push": ("reads",)}  # other tensors, which a row names beside its target
WHOLE_TENSOR = (Add, Replace)  # these see a tensor in its own shape, the others a matrix or a vector
