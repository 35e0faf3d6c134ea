"""The pack format's generator once more, in Python's own integers, as its page of the spec says it."""

from __future__ import annotations

from collections.abc import Iterator

WORD = 1 << 64


def output(seed: int, number: int) -> int:
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def uniform(seed: int, number: int) -> float:
    """From -1 to below 1."""
    return 2 * ((output(seed, number) >> 11) / (1 << 53)) - 1


def below(seed: int, sizes: Iterator[int]) -> Iterator[int]:
    number = 0
    for size in sizes:
        whole = WORD // size * size
        while (z := output(seed, number)) >= whole:
            number += 1
        number += 1
        yield z % size


def balanced(seed: int, total: int, count: int) -> list[int]:
    order = [i % count for i in range(total)]
    places = range(total - 1, 0, -1)
    for i, j in zip(places, below(seed, iter(place + 1 for place in places)), strict=True):
        order[i], order[j] = order[j], order[i]
    return order
