"""What several heads give for an image as one row of numbers, and apart again; of one head it stays what it is.

Whoever runs a task, or compares it, has one array that way, however many heads it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from edgepet.deltas.heads import Map, MapHead
from edgepet.deltas.layers import Shape
from edgepet.deltas.probe import told_of
from edgepet.spec import NpArray


def as_rows(answers: Sequence[NpArray]) -> NpArray:
    """Arrays (n, …) as rows (n, values), one behind another; a single one as it is."""
    if len(answers) == 1:
        return answers[0]
    return np.concatenate([each.reshape(len(each), -1) for each in answers], axis=1)


def apart(rows: NpArray, shapes: Sequence[Shape]) -> tuple[NpArray, ...]:
    """What ``as_rows`` joined, of these ``shapes`` of one image."""
    if len(shapes) == 1:
        return (rows,)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(rows, ends[:-1], axis=1)
    return tuple(part.reshape(len(rows), *shape) for part, shape in zip(parts, shapes, strict=True))


def answer_shapes(heads: Iterable[MapHead], maps: Sequence[Map], width: int) -> tuple[Shape, ...]:
    """What each of ``heads`` gives of one image, of a backbone with these maps and ``width`` features.

    Raises:
        InputError: as ``MapHead.shapes``.
    """
    return tuple(head.shapes(maps, width=width)[head.steps[-1].gives] for head in heads)


def reads_of(heads: Iterable[MapHead]) -> tuple[str, ...]:
    """The maps, and features, that any of ``heads`` reads, sorted by name."""
    return tuple(sorted({name for head in heads for name in head.inputs}))


def told_apart(answers: Sequence[NpArray], seed: int, classes: Sequence[int]) -> NpArray:
    """As ``told_of``, of several heads that have so many ``classes``: their numbers one behind another."""
    return np.concatenate(
        [told_of(each, seed, count) for each, count in zip(answers, classes, strict=True)], axis=1
    )  # fmt: skip
