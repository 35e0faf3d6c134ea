"""The generator of packs: what a seed stands for, the same bits wherever it is written again.

SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators", doi:10.1145/2660193.2660195)
as a function of seed and counter, without state. docs/spec/pack-v1.md, "Generator", in code; generator-v1.json beside
it has its numbers. NumPy's own generators are never used here: their streams may change (NEP 19).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from edgepet.spec import NpArray

SEEDS = 1 << 53  # a seed is below: every JSON reader has these integers exactly
MOST_VALUES = 1 << 22  # of one window, and of one shuffle: what a pack may ask a device to make at once
_AT_ONCE = 1 << 14  # plain numbers that are held while a shuffle is made

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_MOST = np.uint64(2**64 - 1)


def outputs(seed: int, start: int, count: int) -> NpArray:
    """Outputs number ``start`` to ``start + count``, uint64 (count,), of the generator seeded with ``seed``.

    Both are at least 0; the first output has number 0.
    """
    numbers = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    mixed = numbers * _STEP + np.uint64(seed)  # arrays of unsigned integers wrap around
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    made: NpArray = mixed ^ (mixed >> np.uint64(31))
    return made


@lru_cache(maxsize=8)
def uniform(seed: int, start: int, count: int) -> NpArray:
    """Float64 values (count,) from -1 to below 1, one output each: twice its upper 53 bits as a fraction, minus 1.

    Every one is exact. The array is shared and cannot be written.
    """
    values: NpArray = (outputs(seed, start, count) >> np.uint64(11)) * 2.0**-53 * 2 - 1
    values.flags.writeable = False
    return values


def below(seed: int, sizes: Iterable[int]) -> NpArray:
    """One number from 0 to below each of ``sizes``, 1 to 2^64 - 1, uint64, in order.

    An output z gives z mod size, and is passed over where it lies behind the last whole multiple of the size: the small
    remainders would be likelier.
    """
    wanted = np.fromiter(sizes, np.uint64)
    last = _MOST - (np.uint64(0) - wanted) % wanted  # (2^64 - size) mod size is 2^64 mod size
    found = np.empty(len(wanted), np.uint64)
    done = at = 0
    while done < len(wanted):
        drawn = outputs(seed, at, len(wanted) - done)
        fits = drawn <= last[done:]
        taken = len(drawn) if fits.all() else int(np.argmin(fits))
        found[done : done + taken] = drawn[:taken] % wanted[done : done + taken]
        done, at = done + taken, at + taken + 1
    return found


@lru_cache(maxsize=4)
def balanced(seed: int, total: int, count: int) -> NpArray:
    """``total`` numbers below ``count``, int32, each as often as every other or once more, in an order of the seed.

    0, 1, .. count - 1, 0, 1, .. is shuffled (Fisher and Yates): from the last place down to the second, each changes
    with one of those up to itself. The array is shared and cannot be written.
    """
    made = (np.arange(total, dtype=np.int64) % count).astype(np.int32)
    partners = below(seed, range(total, 1, -1))
    order = made.data  # plain numbers, one at a time, and no list of them all
    for start in range(0, total - 1, _AT_ONCE):
        for step, partner in enumerate(partners[start : start + _AT_ONCE].tolist(), start):
            place = total - 1 - step
            order[place], order[partner] = order[partner], order[place]
    made.flags.writeable = False
    return made
