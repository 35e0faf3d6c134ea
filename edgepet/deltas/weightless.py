"""The layers of a head that have no weights: maps are resized, joined, gated and normalised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np

from edgepet.deltas.layer import Layer, Shape, bilinear, listed, no_map, sigmoid
from edgepet.spec import NpArray

LARGEST_FACTOR = 32  # of one resize: from the coarsest maps that backbones have to pixels

MODES, ACTIVATIONS = ("bilinear", "nearest"), ("relu", "gelu", "sigmoid")

_erf = np.frompyfunc(math.erf, 1, 1)  # NumPy has none, and SciPy is too large for a device


def _unknown(setting: str, value: str, known: tuple[str, ...]) -> str | None:
    return None if value in known else f"needs one of {', '.join(known)} as {setting}, got {value!r}"


@dataclass(frozen=True, slots=True, eq=False)
class Resize(Layer):
    """A map ``factor`` times as high and wide: "bilinear" between the middles of places, or "nearest"."""

    kind: ClassVar[str] = "resize"
    factor: int
    mode: Literal["bilinear", "nearest"] = "bilinear"

    def wrong(self) -> str | None:
        """As of every layer."""
        if not 2 <= self.factor <= LARGEST_FACTOR or self.factor & (self.factor - 1):
            return f"needs a power of two from 2 to {LARGEST_FACTOR} as factor, got {self.factor}"
        return _unknown("mode", self.mode, MODES)

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        channels, height, width = shapes[0]
        return (channels, self.factor * height, self.factor * width)

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w) becomes (n, C, factor h, factor w)."""
        (x,) = given
        _, height, width = self.shape(x.shape[1:])
        if self.mode == "nearest":
            return x.repeat(self.factor, axis=2).repeat(self.factor, axis=3)
        return bilinear(x, (height, width))


@dataclass(frozen=True, slots=True, eq=False)
class Pool(Layer):
    """The largest of every ``size`` x ``size`` places; rows and columns that are left over at the end are dropped."""

    kind: ClassVar[str] = "pool"
    size: int = 2

    def wrong(self) -> str | None:
        """As of every layer."""
        return None if 2 <= self.size <= LARGEST_FACTOR else f"needs a size from 2 to {LARGEST_FACTOR}, got {self.size}"

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        small = no_map(shapes[0]) is None and min(shapes[0][1:]) < self.size
        return f"reads maps of at least {self.size} x {self.size}, got {shapes[0]}" if small else no_map(shapes[0])

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        channels, height, width = shapes[0]
        return (channels, height // self.size, width // self.size)

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w) becomes (n, C, h / size, w / size), rounded down."""
        (x,) = given
        channels, height, width = self.shape(x.shape[1:])
        kept = x[:, :, : height * self.size, : width * self.size]
        largest: NpArray = kept.reshape(len(x), channels, height, self.size, width, self.size).max(axis=(3, 5))
        return largest


@dataclass(frozen=True, slots=True, eq=False)
class Add(Layer):
    """The sum of two or more maps of one shape."""

    kind: ClassVar[str] = "add"
    inputs: ClassVar[int | None] = None

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return None if len(set(shapes)) == 1 else f"reads inputs of one shape, got {listed(shapes)}"

    def __call__(self, *given: NpArray) -> NpArray:
        """Two or more (n, C, h, w), or (n, C), become one."""
        total = given[0]
        for each in given[1:]:
            total = total + each
        return total


@dataclass(frozen=True, slots=True, eq=False)
class Multiply(Layer):
    """One map times another of its shape, or times one channel that all of its own go through."""

    kind: ClassVar[str] = "multiply"
    inputs: ClassVar[int | None] = 2

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        first, second = shapes
        fits = second in (first, (1, *first[1:]))
        return None if fits else f"reads a second input of {first} or of one channel, got {second}"

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w) and (n, C, h, w) or (n, 1, h, w) become (n, C, h, w)."""
        x, gate = given
        return x * gate


@dataclass(frozen=True, slots=True, eq=False)
class Concat(Layer):
    """The channels of two or more maps of one height and width, one behind another."""

    kind: ClassVar[str] = "concat"
    inputs: ClassVar[int | None] = None

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        same = len({shape[1:] for shape in shapes}) == 1
        return None if same else f"reads inputs of one height and width, got {listed(shapes)}"

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, A, h, w), (n, B, h, w), … become (n, A + B + …, h, w)."""
        return np.concatenate(given, axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class Activation(Layer):
    """One function of every number: "relu", "gelu" (exact: x times the normal distribution's) or "sigmoid"."""

    kind: ClassVar[str] = "activation"
    name: Literal["relu", "gelu", "sigmoid"]

    def wrong(self) -> str | None:
        """As of every layer."""
        return _unknown("name", self.name, ACTIVATIONS)

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        del shapes
        return None

    def __call__(self, *given: NpArray) -> NpArray:
        """Any shape, which is kept."""
        (x,) = given
        if self.name == "relu":
            return np.maximum(x, 0)
        if self.name == "gelu":
            return x * (0.5 * (1 + np.asarray(_erf(x / math.sqrt(2)), x.dtype)))
        return sigmoid(x)


@dataclass(frozen=True, slots=True, eq=False)
class Unit(Layer):
    """The channels of every place over their length sqrt(Σ x²), or over ``eps`` where that is less."""

    kind: ClassVar[str] = "unit"
    eps: float = 1e-6

    def wrong(self) -> str | None:
        """As of every layer."""
        return None if 0 < self.eps < 1 else f"needs an eps between 0 and 1, got {self.eps}"

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        del shapes
        return None

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w) or (n, C), which is kept."""
        (x,) = given
        length = np.sqrt((x * x).sum(axis=1, keepdims=True))
        return cast(NpArray, x / np.maximum(length, x.dtype.type(self.eps)))


@dataclass(frozen=True, slots=True, eq=False)
class Mean(Layer):
    """The mean of a map over all its places: pooled features."""

    kind: ClassVar[str] = "mean"

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return shapes[0][:1]

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w) becomes (n, C)."""
        return cast(NpArray, given[0].mean(axis=(2, 3)))
