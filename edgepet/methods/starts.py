"""How method tensors are drawn before training."""

from __future__ import annotations

import numpy as np

from edgepet.spec import NpArray


def uniform(rng: np.random.Generator, bound: float, *shape: int) -> NpArray:
    """Float32 values drawn evenly from -bound to bound."""
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def zero_product(rng: np.random.Generator, rank: int, rows: int, columns: int) -> tuple[NpArray, NpArray]:
    """Two factors whose product is zero: (rank, columns) as a linear layer's weight, and (rows, rank) of zeros.

    The first is Kaiming uniform with a = sqrt(5), as torch has it.
    """
    return uniform(rng, 1 / np.sqrt(columns), rank, columns), np.zeros((rows, rank), np.float32)


def cut_normal(rng: np.random.Generator, deviation: float, *shape: int) -> NpArray:
    """Float32 values of a normal distribution, those beyond two deviations drawn again (TensorFlow's truncated one)."""
    values = rng.normal(0, deviation, shape)
    while (far := np.abs(values) > 2 * deviation).any():
        values[far] = rng.normal(0, deviation, int(far.sum()))
    return values.astype(np.float32)
