"""The layers of a head that have weights: what a head has learnt.

``bias`` is None where nothing is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.layer import (
    Layer,
    Shape,
    by_channel,
    no_map,
    other_channels,
    padded,
    places,
    softmax,
    with_bias,
    wrong_axes,
    wrong_kernel,
    wrong_vector,
)
from edgepet.spec import NpArray


@dataclass(frozen=True, slots=True, eq=False)
class Point(Layer):
    """One product at every place: W x + b; ``weight`` (out, in), ``bias`` (out,). Takes features too."""

    kind: ClassVar[str] = "point"
    weight: NpArray
    bias: NpArray | None = None

    def wrong(self) -> str | None:
        """As of every layer."""
        return wrong_axes(weight=(self.weight, 2)) or wrong_vector("bias", self.bias, len(self.weight))

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return other_channels(shapes[0], self.weight.shape[1])

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (len(self.weight), *shapes[0][1:])

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, in, h, w) or (n, in) becomes (n, out, h, w) or (n, out)."""
        (x,) = given
        flat = self.weight @ places(x)
        return with_bias(flat.reshape(len(x), len(self.weight), *x.shape[2:]), self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Depthwise(Layer):
    """Every channel under a kernel of its own, k odd, with zeros around; ``weight`` (C, k, k), ``bias`` (C,)."""

    kind: ClassVar[str] = "depthwise"
    weight: NpArray
    bias: NpArray | None = None

    def wrong(self) -> str | None:
        """As of every layer."""
        return (
            wrong_axes(weight=(self.weight, 3))
            or wrong_kernel(self.weight)
            or wrong_vector("bias", self.bias, len(self.weight))
        )

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return no_map(shapes[0]) or other_channels(shapes[0], len(self.weight))

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w) becomes (n, C, h, w)."""
        (x,) = given
        side = self.weight.shape[1]
        framed = padded(x, side // 2)
        height, width = x.shape[2:]
        out = np.zeros_like(x)
        for row, column in np.ndindex(side, side):
            tap = self.weight[:, row, column, None, None]
            out = out + tap * framed[:, :, row : row + height, column : column + width]
        return with_bias(out, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Conv(Layer):
    """A convolution, k odd, with zeros around; ``weight`` (out, in, k, k), ``bias`` (out,)."""

    kind: ClassVar[str] = "conv"
    weight: NpArray
    bias: NpArray | None = None
    stride: int = 1

    def wrong(self) -> str | None:
        """As of every layer."""
        if self.stride not in (1, 2):
            return f"needs a stride of 1 or 2, got {self.stride}"
        return (
            wrong_axes(weight=(self.weight, 4))
            or wrong_kernel(self.weight)
            or wrong_vector("bias", self.bias, len(self.weight))
        )

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return no_map(shapes[0]) or other_channels(shapes[0], self.weight.shape[1])

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (len(self.weight), *(-(-side // self.stride) for side in shapes[0][1:]))

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, in, h, w) becomes (n, out, h / stride, w / stride), rounded up."""
        (x,) = given
        side = self.weight.shape[2]
        framed = padded(x, side // 2)
        out, height, width = self.shape(x.shape[1:])
        flat = np.zeros((len(x), out, height * width), x.dtype)
        for row, column in np.ndindex(side, side):
            rows = slice(row, row + self.stride * (height - 1) + 1, self.stride)
            columns = slice(column, column + self.stride * (width - 1) + 1, self.stride)
            flat = flat + self.weight[:, :, row, column] @ places(framed[:, :, rows, columns])
        return with_bias(flat.reshape(len(x), out, height, width), self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Deconv(Layer):
    """Every place becomes 2 x 2 of its own; ``weight`` (in, out, 2, 2), ``bias`` (out,)."""

    kind: ClassVar[str] = "deconv"
    weight: NpArray
    bias: NpArray | None = None

    def wrong(self) -> str | None:
        """As of every layer."""
        wrong = wrong_axes(weight=(self.weight, 4)) or wrong_vector("bias", self.bias, self.weight.shape[1])
        return wrong or (None if self.weight.shape[2:] == (2, 2) else f"needs taps (2, 2), got {self.weight.shape[2:]}")

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return no_map(shapes[0]) or other_channels(shapes[0], len(self.weight))

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (self.weight.shape[1], 2 * shapes[0][1], 2 * shapes[0][2])

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, in, h, w) becomes (n, out, 2 h, 2 w)."""
        (x,) = given
        out = np.empty((len(x), *self.shape(x.shape[1:])), x.dtype)
        for row, column in np.ndindex(2, 2):
            flat = self.weight[:, :, row, column].T @ places(x)
            out[:, :, row::2, column::2] = flat.reshape(len(x), -1, *x.shape[2:])
        return with_bias(out, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Norm(Layer):
    """A layer norm over the channels of every place; ``weight`` and ``bias`` (C,), or none of both. Takes features too.

    (x - mean) / sqrt(variance + eps), Ba et al. 2016, arXiv:1607.06450.
    """

    kind: ClassVar[str] = "norm"
    weight: NpArray | None = None
    bias: NpArray | None = None
    eps: float = 1e-6

    def wrong(self) -> str | None:
        """As of every layer."""
        if (self.weight is None) != (self.bias is None):
            return "needs weight and bias, or none of both"
        if not 0 < self.eps < 1:
            return f"needs an eps between 0 and 1, got {self.eps}"
        if self.weight is None:
            return None
        return wrong_axes(weight=(self.weight, 1)) or wrong_vector("bias", self.bias, len(self.weight))

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return None if self.weight is None else other_channels(shapes[0], len(self.weight))

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w) or (n, C), which is kept."""
        (x,) = given
        centred = x - x.mean(axis=1, keepdims=True)
        normed = centred / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + x.dtype.type(self.eps))
        return normed if self.weight is None else with_bias(normed * by_channel(self.weight, x), self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Attend(Layer):
    """Every place asks a constant table: Σ over heads of valuesᵀ softmax(keys x + key_bias) + bias, softmax over rows.

    ``keys`` (heads, rows, in), ``key_bias`` (heads, rows), ``values`` (heads, rows, out), ``bias`` (out,). Cross
    attention of pixels to class vectors lowers to this exactly: no query, key or output projection is left.
    """

    kind: ClassVar[str] = "attend"
    keys: NpArray
    values: NpArray
    key_bias: NpArray | None = None
    bias: NpArray | None = None

    def wrong(self) -> str | None:
        """As of every layer."""
        wrong = wrong_axes(keys=(self.keys, 3), values=(self.values, 3))
        if wrong is not None:
            return wrong
        rows = self.keys.shape[:2]
        if self.values.shape[:2] != rows:
            return f"needs values ({rows[0]}, {rows[1]}, out), got {tuple(self.values.shape)}"
        if self.key_bias is not None and self.key_bias.shape != rows:
            return f"needs key_bias {rows}, got {tuple(self.key_bias.shape)}"
        return wrong_vector("bias", self.bias, self.values.shape[2])

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return no_map(shapes[0]) or other_channels(shapes[0], self.keys.shape[2])

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (self.values.shape[2], *shapes[0][1:])

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, in, h, w) becomes (n, out, h, w)."""
        (x,) = given
        asked = self.keys @ places(x)[:, None]  # (n, heads, rows, places)
        if self.key_bias is not None:
            asked = asked + self.key_bias[:, :, None]
        told = (np.swapaxes(self.values, 1, 2) @ softmax(asked, axis=2)).sum(axis=1)
        return with_bias(told.reshape(len(x), -1, *x.shape[2:]), self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Regions(Layer):
    """Constant queries ask all places, and every place is then compared with what each of them found.

    Query k finds r_k = Σ over places p of softmax_p(queries_k · x_p) x_p; its channel at p is x_p · (weight r_k).
    ``queries`` (out, in), ``weight`` (in, in). One such layer is a discriminative cross attention with learnt class
    queries, its projections of keys, values and regions multiplied out: our reading of Hong et al. 2022,
    arXiv:2212.13764, which has no code.
    """

    kind: ClassVar[str] = "regions"
    queries: NpArray
    weight: NpArray

    def wrong(self) -> str | None:
        """As of every layer."""
        wrong = wrong_axes(queries=(self.queries, 2), weight=(self.weight, 2))
        if wrong is not None:
            return wrong
        square = (self.queries.shape[1],) * 2
        return None if self.weight.shape == square else f"needs weight {square}, got {tuple(self.weight.shape)}"

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return no_map(shapes[0]) or other_channels(shapes[0], self.queries.shape[1])

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (len(self.queries), *shapes[0][1:])

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, in, h, w) becomes (n, out, h, w)."""
        (x,) = given
        flat = places(x)
        found = softmax(self.queries @ flat, axis=2) @ np.swapaxes(flat, 1, 2)  # (n, out, in)
        return (found @ self.weight.T @ flat).reshape(len(x), -1, *x.shape[2:])
