"""What every layer of a head has, and the arithmetic that several share.

*Shapes* are those of one image: (C, h, w) of a map, (C,) of pooled features. Arrays have a batch in front. All layers
compute in the number format that they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias, cast

import numpy as np

from edgepet.spec import NpArray

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What all layers say of themselves; ``inputs`` is how many arrays it reads, None for two or more."""

    kind: ClassVar[str]
    inputs: ClassVar[int | None] = 1

    def wrong(self) -> str | None:
        """Why its own tensors and settings make no layer, None where they do."""
        return None

    def mismatch(self, *shapes: Shape) -> str | None:
        """Why inputs of these shapes cannot be read, None where they can; the layer itself is not ``wrong``."""
        return no_map(shapes[0])

    def shape(self, *shapes: Shape) -> Shape:
        """What it gives for inputs without ``mismatch``."""
        return shapes[0]

    def __call__(self, *given: NpArray) -> NpArray:
        """What it gives for a batch of inputs, none of which is modified."""
        raise NotImplementedError


def wrong_axes(**wanted: tuple[NpArray, int]) -> str | None:
    """Why a tensor has another number of axes than it must, or none of its own length."""
    for name, (tensor, axes) in wanted.items():
        if tensor.ndim != axes or 0 in tensor.shape:
            return f"needs {name} of {axes} axes, got {tuple(tensor.shape)}"
    return None


def wrong_vector(name: str, tensor: NpArray | None, length: int) -> str | None:
    """Why ``tensor``, where it is there, is not one of ``length`` values."""
    if tensor is None or tensor.shape == (length,):
        return None
    return f"needs {name} ({length},), got {tuple(tensor.shape)}"


def wrong_kernel(weight: NpArray) -> str | None:
    """Why the last two axes are no kernel with a middle."""
    rows, columns = weight.shape[-2:]
    return None if rows == columns and rows % 2 else f"needs a kernel of k x k, k odd, got {rows} x {columns}"


def other_channels(shape: Shape, channels: int) -> str | None:
    """Why ``shape`` is not one of so many channels."""
    return None if shape[0] == channels else f"reads {channels} channels, got {shape}"


def no_map(shape: Shape) -> str | None:
    """Why ``shape`` is not a map's."""
    return None if len(shape) == 3 else f"reads a map, got {shape}"


def listed(shapes: tuple[Shape, ...]) -> str:
    """Shapes in a message."""
    return " and ".join(map(str, shapes))


def by_channel(values: NpArray, x: NpArray) -> NpArray:
    """``values`` (C,) so that they are broadcast over the channels of ``x`` (n, C, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 2))


def with_bias(out: NpArray, bias: NpArray | None) -> NpArray:
    """``out`` (n, C, ...) + ``bias`` (C,), where there is one."""
    return out if bias is None else out + by_channel(bias, out)


def places(x: NpArray) -> NpArray:
    """(n, C, h, w) or (n, C) as (n, C, places), the places of a map row by row."""
    return x.reshape(*x.shape[:2], -1)


def sigmoid(x: NpArray) -> NpArray:
    """1 / (1 + e^-x) of every number; nothing overflows."""
    raised = np.exp(-np.abs(x))  # of a number below 0
    return cast(NpArray, np.where(x < 0, raised, 1) / (1 + raised))


def padded(x: NpArray, by: int) -> NpArray:
    """``x`` (n, C, h, w) with ``by`` rows and columns of zeros on every side."""
    return np.pad(x, ((0, 0), (0, 0), (by, by), (by, by)))


def softmax(x: NpArray, axis: int) -> NpArray:
    """exp(x) over its sum along ``axis``; the largest is taken off first, so that nothing overflows."""
    raised = np.exp(x - x.max(axis=axis, keepdims=True))
    return cast(NpArray, raised / raised.sum(axis=axis, keepdims=True))


def bilinear(x: NpArray, size: tuple[int, int]) -> NpArray:
    """``x`` (n, C, h, w) at another height and width, linearly between the middles of its places.

    As ONNX's Resize with half_pixel and torch's interpolate without align_corners; nothing is smoothed on the way to a
    smaller size.
    """
    rows, columns = (_between(was, now, x.dtype) for was, now in zip(x.shape[2:], size, strict=True))
    return rows @ x @ columns.T


def _between(was: int, now: int, dtype: np.dtype[np.generic]) -> NpArray:
    """The matrix (now, was) that interpolates along one axis; its rows sum to 1."""
    at = np.clip((np.arange(now) + 0.5) * (was / now) - 0.5, 0, was - 1)
    low = np.minimum(at.astype(np.int64), was - 1)
    high = np.minimum(low + 1, was - 1)
    matrix = np.zeros((now, was))
    np.add.at(matrix, (np.arange(now), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(now), high), at - low)
    return matrix.astype(dtype)
