"""A table of text: a vector for each class, made elsewhere with any text tower, or of the vectors of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgepet.deltas.asking import Ask
from edgepet.deltas.heads import MOST_CLASSES, MapHead
from edgepet.deltas.layers import Point, Unit
from edgepet.errors import InputError, option
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray

MOST_WIDTH = 4096  # numbers of a class
_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextTable:
    """``vectors`` float32 (K, C), one a class of ``classes``; ``source`` says what made them, for people.

    ``sha256`` are the hex digits of the file that it was read from, and ``where`` that file's name.

    Raises:
        InputError: fewer than one class or too many, a class twice, no vector for each, one that is not finite or zero.
    """

    classes: tuple[str, ...]
    vectors: NpArray
    source: str
    sha256: str
    where: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MOST_CLASSES:
            raise InputError(self.where, f"needs 1 to {MOST_CLASSES} classes", got=len(self.classes))
        twice = [name for number, name in enumerate(self.classes) if name in self.classes[:number]]
        if twice:
            raise InputError(self.where, "needs classes that differ", got=repr(twice[0]))
        shape = tuple(self.vectors.shape)
        if len(shape) != 2 or shape[0] != len(self.classes) or not 1 <= shape[1] <= MOST_WIDTH:
            what = f"needs a vector of 1 to {MOST_WIDTH} numbers for each of {len(self.classes)} classes"
            raise InputError(self.where, what, got=shape)
        for told, rows in (
            ("of finite numbers", ~np.isfinite(self.vectors).all(axis=1)),
            ("that is not zero", ~self.vectors.any(axis=1)),
        ):
            wrong = np.flatnonzero(rows).tolist()
            if wrong:
                got = format_names([self.classes[row] for row in wrong[:_SHOWN]])
                raise InputError(self.where, f"needs a vector {told} for each class", got=got)

    @property
    def width(self) -> int:
        """Numbers of a class."""
        return int(self.vectors.shape[1])

    @property
    def unit(self) -> NpArray:
        """The vectors in float64 over their lengths, (K, C): what heads are made of."""
        wide = self.vectors.astype(np.float64)
        made: NpArray = wide / np.linalg.norm(wide, axis=1, keepdims=True)
        return made

    @property
    def facts(self) -> dict[str, object]:
        """What a pack says of it."""
        return {"source": self.source, "sha256": self.sha256}

    def of(self, labels: Sequence[str]) -> TextTable:
        """The table in the order of ``labels``.

        Raises:
            InputError: its classes are not these.
        """
        absent = [name for name in labels if name not in self.classes]
        others = [name for name in self.classes if name not in set(labels)]
        if absent or others:
            told = [("no ", absent)] if absent else []
            told += [("", others)] if others else []
            got = " and ".join(f"{before}{format_names(names[:_SHOWN])}" for before, names in told)
            raise InputError(self.where, f"needs the {len(labels)} classes of the task, in any order", got=got)
        return self.only(labels)

    def only(self, labels: Sequence[str]) -> TextTable:
        """The rows of ``labels``, which are among its classes, in their order."""
        order = [self.classes.index(name) for name in labels]
        return replace(self, classes=tuple(labels), vectors=self.vectors[order])


def with_classes(head: MapHead, table: TextTable) -> MapHead:
    """``head``, whose answer is how places are like text, for the classes of ``table``; nothing else of it changes.

    Such a head ends in a product of unit vectors, whose rows are unit vectors too, times one scale.

    Raises:
        InputError: its answer is another, its text has seen the image, or the vectors are of another width.
    """
    *before, last = head.steps
    if any(isinstance(step.layer, Ask) for step in before):
        what = "has text that has seen the images of its training: a context decoder's constants are not made anew"
        raise InputError(head.name, what, fix=f"train it without context, or again with this {option('text')}")
    given = {step.gives: step.layer for step in before}
    layer = last.layer
    if not isinstance(layer, Point) or layer.bias is not None or not isinstance(given.get(last.reads[0]), Unit):
        what = "does not answer how places are like text: its classes have weights that are learnt"
        raise InputError(head.name, what, fix=f"train one with {option('head', 'score')}")
    if layer.weight.shape[1] != table.width:
        what = f"needs vectors of {layer.weight.shape[1]} numbers, as those that it was trained with"
        raise InputError(table.where, what, got=table.width)
    scale = float(np.linalg.norm(layer.weight.astype(np.float64), axis=1).mean())
    weight = (scale * table.unit).astype(layer.weight.dtype)
    steps = (*before, replace(last, layer=Point(weight)))
    return replace(head, labels=table.classes, steps=steps)
