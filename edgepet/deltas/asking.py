"""Layers of a head in which rows of text ask what an image has, and places are compared with the rows.

Rows are a map (C, K, 1), one place a row: products, norms and sums of places are theirs too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.layer import Layer, Shape, listed, no_map, other_channels, places, softmax, wrong_axes
from edgepet.spec import NpArray

LARGEST_SCALE = 1000.0
MOST_ASKING = 64  # heads


def places_of(shape: Shape) -> int:
    """Places of a map, or the one that features have."""
    return int(np.prod(shape[1:], dtype=np.int64))


def unlike(pairs: tuple[Shape, ...], heads: int) -> str | None:
    """Why ``pairs``, keys and values in turn, cannot be asked by so many heads, None where they can."""
    if not pairs or len(pairs) % 2:
        return f"reads keys and values in turn, got {len(pairs)}"
    keys, values = pairs[::2], pairs[1::2]
    for told, channels in (("keys", {shape[0] for shape in keys}), ("values", {shape[0] for shape in values})):
        if len(channels) > 1:
            return f"reads {told} of one number of channels, got {listed(pairs)}"
    if values[0][0] % heads:
        return f"reads values whose channels {heads} heads share evenly, got {values[0]}"
    same = [places_of(key) == places_of(value) for key, value in zip(keys, values, strict=True)]
    return None if all(same) else f"reads a value for every key, got {listed(pairs)}"


def _joined(pairs: tuple[NpArray, ...]) -> tuple[NpArray, NpArray]:
    """Keys and values (n, C, places) of all pairs, one behind another."""
    keys, values = (np.concatenate([places(x) for x in pairs[side::2]], axis=2) for side in (0, 1))
    return keys, values


def _answered(asked: NpArray, values: NpArray) -> NpArray:
    """(n, heads, rows, places) asked of ``values`` (n, C, places): (n, C, rows), heads sharing the channels."""
    n, heads, rows, _ = asked.shape
    apart = values.reshape(n, heads, -1, values.shape[2])
    told = softmax(asked, axis=3) @ np.swapaxes(apart, 2, 3)
    return np.swapaxes(told, 2, 3).reshape(n, -1, rows)


@dataclass(frozen=True, slots=True, eq=False)
class Shift(Layer):
    """A map and a constant of its very shape: what of it no image changes. ``value`` (C, h, w)."""

    kind: ClassVar[str] = "shift"
    value: NpArray

    def wrong(self) -> str | None:
        """As of every layer."""
        return wrong_axes(value=(self.value, 3))

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        wanted = tuple(self.value.shape)
        return None if shapes[0] == wanted else f"reads {wanted}, got {shapes[0]}"

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w), which is kept."""
        return given[0] + self.value


@dataclass(frozen=True, slots=True, eq=False)
class Ask(Layer):
    """Constant rows ask all places: row k, head g: Σ softmax over places p of (queries_gk · key_p) · value_p.

    ``queries`` (heads, rows, in). It reads keys (in channels) and values in turn, of one or several maps, or features;
    their places are one behind another. Head g has the g-th part of the values' channels. Gives rows (C, rows, 1).
    Cross attention whose query no image changes lowers to this, the projection of keys multiplied into ``queries``.
    """

    kind: ClassVar[str] = "ask"
    inputs: ClassVar[int | None] = None
    queries: NpArray

    def wrong(self) -> str | None:
        """As of every layer."""
        wrong = wrong_axes(queries=(self.queries, 3))
        heads = self.queries.shape[0]
        return wrong or (None if heads <= MOST_ASKING else f"needs at most {MOST_ASKING} heads, got {heads}")

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        return unlike(shapes, len(self.queries)) or other_channels(shapes[0], self.queries.shape[2])

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (shapes[1][0], self.queries.shape[1], 1)

    def __call__(self, *given: NpArray) -> NpArray:
        """Pairs of (n, in, h, w) and (n, C, h, w), or of features, become (n, C, rows, 1)."""
        keys, values = _joined(given)
        return _answered(self.queries @ keys[:, None], values)[..., None]


@dataclass(frozen=True, slots=True, eq=False)
class Attention(Layer):
    """Every place of the first input asks all places of the others: multi-head attention without its projections.

    Behind it are keys and values in turn, as of ``Ask``; head g has the g-th part of all channels. Nothing is scaled.
    """

    kind: ClassVar[str] = "attention"
    inputs: ClassVar[int | None] = None
    heads: int

    def wrong(self) -> str | None:
        """As of every layer."""
        return None if 1 <= self.heads <= MOST_ASKING else f"needs 1 to {MOST_ASKING} heads, got {self.heads}"

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        asking, *pairs = shapes
        wrong = no_map(asking) or unlike(tuple(pairs), self.heads)
        if wrong is None and asking[0] % self.heads:
            return f"reads channels that {self.heads} heads share evenly, got {asking}"
        return wrong or other_channels(pairs[0], asking[0])

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (shapes[2][0], *shapes[0][1:])

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, A, h, w) and pairs of (n, A, ...) and (n, C, ...) become (n, C, h, w)."""
        asking, *pairs = given
        keys, values = _joined(tuple(pairs))
        queries, told = (x.reshape(len(x), self.heads, -1, x.shape[2]) for x in (places(asking), keys))
        answer = _answered(np.swapaxes(queries, 2, 3) @ told, values)
        return answer.reshape(len(asking), -1, *asking.shape[2:])


@dataclass(frozen=True, slots=True, eq=False)
class Compare(Layer):
    """Every place of a map with every row of another: ``scale`` · x_p · row_k in channel k."""

    kind: ClassVar[str] = "compare"
    inputs: ClassVar[int | None] = 2
    scale: float

    def wrong(self) -> str | None:
        """As of every layer."""
        right = 0 < self.scale <= LARGEST_SCALE
        return None if right else f"needs a scale above 0 and at most {LARGEST_SCALE:g}, got {self.scale}"

    def mismatch(self, *shapes: Shape) -> str | None:
        """As of every layer."""
        x, rows = shapes
        return no_map(x) or no_map(rows) or other_channels(rows, x[0])

    def shape(self, *shapes: Shape) -> Shape:
        """As of every layer."""
        return (places_of(shapes[1]), *shapes[0][1:])

    def __call__(self, *given: NpArray) -> NpArray:
        """(n, C, h, w) and rows (n, C, K, 1) become (n, K, h, w)."""
        x, rows = given
        flat: NpArray = np.swapaxes(places(rows), 1, 2) @ places(x)
        told: NpArray = flat.reshape(len(x), -1, *x.shape[2:]) * x.dtype.type(self.scale)
        return told
