"""Layers of every kind, with inputs that they read, for Hypothesis; float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from edgepet.deltas.layers import (
    ACTIVATIONS,
    LAYERS,
    Activation,
    Add,
    Ask,
    Attend,
    Attention,
    Compare,
    Concat,
    Conv,
    Deconv,
    Depthwise,
    Detect,
    Layer,
    Mean,
    Multiply,
    Norm,
    Point,
    Pool,
    Regions,
    Resize,
    Shift,
    Unit,
)
from edgepet.spec import NpArray

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=60)
ON_FEATURES = ("point", "norm", "unit", "activation", "add", "concat")  # kinds that read (n, C) too


@dataclass(frozen=True, slots=True)
class LayerCase:
    """A layer, and what it reads."""

    layer: Layer
    inputs: tuple[NpArray, ...]


@st.composite
def layer_cases(draw: st.DrawFn, kinds: Sequence[str] = tuple(LAYERS)) -> LayerCase:
    """Any layer on maps of any small size, or on features where it takes them."""
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, channels, out, rows = (draw(st.integers(1, 3)) for _ in range(4))
    height, width = (draw(st.integers(2, 6)) for _ in range(2))
    side, bias = draw(st.sampled_from([1, 3, 5])), draw(st.booleans())
    places = () if kind in ON_FEATURES and draw(st.booleans()) else (height, width)

    def drawn(*shape: int) -> Any:
        return rng.standard_normal(shape)

    def or_none(*shape: int) -> Any:
        return drawn(*shape) if bias else None

    x = drawn(n, channels, *places)
    match kind:
        case "point":
            return LayerCase(Point(drawn(out, channels), or_none(out)), (x,))
        case "depthwise":
            return LayerCase(Depthwise(drawn(channels, side, side), or_none(channels)), (x,))
        case "conv":
            stride = draw(st.sampled_from([1, 2]))
            return LayerCase(Conv(drawn(out, channels, side, side), or_none(out), stride), (x,))
        case "deconv":
            return LayerCase(Deconv(drawn(channels, out, 2, 2), or_none(out)), (x,))
        case "resize":
            return LayerCase(
                Resize(draw(st.sampled_from([2, 4])), draw(st.sampled_from(["bilinear", "nearest"]))), (x,)
            )
        case "pool":
            return LayerCase(Pool(draw(st.integers(2, min(height, width)))), (x,))
        case "add" | "concat":
            many = [drawn(n, channels if kind == "add" else draw(st.integers(1, 3)), *places) for _ in range(out)]
            return LayerCase(Add() if kind == "add" else Concat(), (x, *many))
        case "multiply":
            return LayerCase(Multiply(), (x, drawn(n, draw(st.sampled_from([1, channels])), height, width)))
        case "activation":
            return LayerCase(Activation(draw(st.sampled_from(ACTIVATIONS))), (3 * x,))
        case "norm":
            return LayerCase(Norm(or_none(channels), or_none(channels), eps=1e-3), (x,))
        case "unit":
            return LayerCase(Unit(eps=0.5), (x,))
        case "attend":
            keys, values = drawn(out, rows, channels), drawn(out, rows, out)
            return LayerCase(Attend(keys, values, or_none(out, rows), or_none(out)), (x,))
        case "regions":
            return LayerCase(Regions(drawn(rows, channels), drawn(channels, channels)), (x,))
        case "detect":
            levels = [(2 * height, 2 * width), (height, width)][: draw(st.integers(1, 2))]
            maps = [each for sides in levels for each in (drawn(n, channels, *sides), drawn(n, 5, *sides))]
            layer = Detect(rng.uniform(0.5, 2, len(levels)), draw(st.sampled_from([4, 7])), draw(st.integers(1, 200)))
            return LayerCase(layer, tuple(maps))
        case "shift":
            return LayerCase(Shift(drawn(channels, height, width)), (x,))
        case "ask" | "attention":
            sides = [(height, width), ()][: draw(st.integers(1, 2))]  # a map, and perhaps features beside it
            asked = out * channels if kind == "attention" else channels
            pairs = [each for own in sides for each in (drawn(n, asked, *own), drawn(n, out * rows, *own))]
            if kind == "ask":
                return LayerCase(Ask(drawn(out, rows, channels)), tuple(pairs))
            return LayerCase(Attention(out), (drawn(n, asked, rows, draw(st.integers(1, 2))), *pairs))
        case "compare":
            return LayerCase(Compare(draw(st.sampled_from([1.0, 0.25, 7.0]))), (x, drawn(n, channels, rows, 1)))
        case _:
            return LayerCase(Mean(), (x,))
