"""A head that reads maps, as data: a few layers of the closed vocabulary, and what their last answer means.

A classifier is one product of pooled features (``delta.Head``). A head for masks reads the maps that the backbone's
graph puts out at a few depths, through layers that read one another by name. Nothing here knows how it was trained.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from edgepet.deltas.detection import Detect
from edgepet.deltas.layers import Layer, Shape, bilinear, tensors, with_tensors
from edgepet.errors import InputError
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray

Answer: TypeAlias = Literal["mask", "boxes", "labels"]
ANSWERS: tuple[Answer, ...] = ("mask", "boxes", "labels")
METRICS: dict[Answer, str] = {  # what a head is judged by, as packs and JSON call it
    "mask": "miou",
    "boxes": "map",
    "labels": "map",
}

FEATURES = "features"  # what pooled features are read as; maps are read by their own names
MOST_LAYERS, MOST_CHANNELS = 64, 1 << 14  # so that a head of few bytes cannot ask for much work
MOST_CLASSES = 255  # of a mask: its values are bytes, and one says that a pixel is not counted
NOT_COUNTED = 255  # in the truth only: no head answers it

_HEAD = re.compile(r"[a-z][a-z0-9-]{0,31}")
MAP_NAME = re.compile(r"map\.(?:0|[1-9][0-9]?)")
_GIVEN = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """One of the maps that a backbone puts out: ``channels`` x ``height`` x ``width`` of one image.

    ``point`` is where it flows, as branches name points; ``stride`` the pixels between two of its places.
    """

    name: str
    point: str
    channels: int
    stride: int
    height: int
    width: int

    @property
    def shape(self) -> Shape:
        """(channels, height, width)."""
        return (self.channels, self.height, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What the numbers that a head called ``name`` gives stand for."""

    name: str
    answer: Literal["class"] | Answer
    labels: tuple[str, ...]
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One layer of a head: it ``reads`` maps, or what steps before it gave, and ``gives`` one array a name."""

    layer: Layer
    reads: tuple[str, ...]
    gives: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapHead:
    """A head that reads maps. Its last step gives, for "mask", one map of logits a label at the head's own stride, for
    "boxes" those that ``Detect`` finds, for "labels" one logit a label.

    The mask is what ``mask_of`` makes of logits; of boxes that overlap, those are meant that ``suppressed`` keeps. An
    image has the labels whose σ(logit) is at least their one of ``thresholds``, which no other answer has.

    Raises:
        InputError: a name, an answer or labels that it cannot have; no steps or too many; a step that reads what is not
            given before it, gives what is there already, is read by none, or whose layer is wrong in itself.
    """

    name: str
    answer: Answer
    labels: tuple[str, ...]
    steps: tuple[Step, ...]
    thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if _HEAD.fullmatch(self.name) is None:
            what = "needs a name of small letters, digits and '-', at most 32"
            raise InputError("head", what, got=repr(self.name[:80]))
        if self.answer not in ANSWERS:
            raise InputError(self.name, f"needs one of {', '.join(ANSWERS)} as answer", got=repr(self.answer))
        least = 2 if self.answer == "mask" else 1
        if not least <= len(self.labels) <= MOST_CLASSES:
            raise InputError(self.name, f"needs {least} to {MOST_CLASSES} labels", got=len(self.labels))
        if len(set(self.labels)) < len(self.labels):
            raise InputError(self.name, "needs labels that differ", got=format_names(self.labels))
        wanted = len(self.labels) if self.answer == "labels" else 0
        if len(self.thresholds) != wanted or not all(0 <= each <= 1 for each in self.thresholds):
            got = ", ".join(f"{each:g}" for each in self.thresholds[:5])
            raise InputError(self.name, f"needs {wanted} thresholds from 0 to 1", got=got or "none")
        for label in self.labels:
            if not label or any("\ud800" <= character <= "\udfff" for character in label):
                raise InputError(self.name, "needs labels that UTF-8 can spell", got=ascii(label))
        if not 1 <= len(self.steps) <= MOST_LAYERS:
            raise InputError(self.name, f"needs 1 to {MOST_LAYERS} layers", got=len(self.steps))
        known = dict.fromkeys(name for name in self.inputs)
        for step in self.steps:
            _check_step(step, known, self.name)
            known[step.gives] = None
        for number, step in enumerate(self.steps, start=1):
            last = number == len(self.steps)
            if isinstance(step.layer, Detect) != (last and self.answer == "boxes"):
                what = "needs a layer detect where it answers boxes, as the last one, and nowhere else"
                raise InputError(self.name, what, got=f"{step.layer.kind} as layer {number}")
        unread = [step.gives for step in self.steps[:-1] if not self._readers[step.gives]]
        if unread:
            raise InputError(f"{self.name}: {unread[0]}", "must be read by a layer behind it, or be the last")

    @property
    def meaning(self) -> Meaning:
        """What its answers stand for."""
        return Meaning(name=self.name, answer=self.answer, labels=self.labels, thresholds=self.thresholds)

    @property
    def _readers(self) -> Counter[str]:
        return Counter(name for step in self.steps for name in step.reads)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The maps that it reads, and ``features`` where it reads them, sorted by name."""
        read = {name for step in self.steps for name in step.reads}
        return tuple(sorted(name for name in read if name == FEATURES or MAP_NAME.fullmatch(name)))

    @property
    def stored_values(self) -> int:
        """Numbers that its layers carry, an array that several share once."""
        return sum({id(array): int(array.size) for array in self.arrays()}.values())

    def arrays(self) -> list[NpArray]:
        """Every tensor of its layers, step by step."""
        return [array for step in self.steps for array in tensors(step.layer).values()]

    def astype(self, dtype: np.typing.DTypeLike) -> MapHead:
        """The same head in another number format: packs may store fp16, and runtimes compute in fp32."""
        made = {id(array): array.astype(dtype) for array in self.arrays()}  # what is shared stays shared
        return replace(self, steps=tuple(_remade(step, made) for step in self.steps))

    def shapes(self, maps: Sequence[Map], *, width: int | None = None) -> dict[str, Shape]:
        """The shape of everything that flows through it, by name, for one image.

        Args:
            maps: what the backbone puts out.
            width: of its pooled features.

        Raises:
            InputError: a map that is not among them, one that a layer cannot read, more channels or places than a head
                may have, or an answer that is not one map a label.
        """
        known: dict[str, Shape] = {each.name: each.shape for each in maps}
        if width is not None:
            known[FEATURES] = (width,)
        absent = [name for name in self.inputs if name not in known]
        if absent:
            told, fix = ", ".join(known) or "none", "use the backbone that the head was trained on"
            raise InputError(f"{self.name}: {absent[0]}", "is not what the backbone puts out", got=told, fix=fix)
        most = max((each.stride * each.height * each.stride * each.width for each in maps), default=1)
        for step in self.steps:
            where, given = f"{self.name}: {step.gives}", [known[name] for name in step.reads]
            wrong = step.layer.mismatch(*given)
            if wrong is not None:
                raise InputError(where, f"{step.layer.kind} {wrong}")
            shape = step.layer.shape(*given)
            if shape[0] > MOST_CHANNELS or int(np.prod(shape[1:], dtype=np.int64)) > most:
                raise InputError(where, f"needs at most {MOST_CHANNELS} channels, and a place a pixel", got=shape)
            known[step.gives] = shape
        answer, last = known[self.steps[-1].gives], self.steps[-1]
        if self.answer == "boxes":
            found = known[last.reads[0]][0]
            if found != len(self.labels):
                raise InputError(self.name, f"needs maps of {len(self.labels)} classes, one a label", got=found)
        elif self.answer == "labels":
            if answer != (len(self.labels),):
                raise InputError(self.name, f"needs {len(self.labels)} numbers an image, one a label", got=answer)
        elif len(answer) != 3 or answer[0] != len(self.labels):
            raise InputError(self.name, f"needs a map of {len(self.labels)} channels, one a label", got=answer)
        return known

    def __call__(self, given: Mapping[str, NpArray]) -> NpArray:
        """What its last step gives: for a mask logits (n, C, h, w), for boxes (n, boxes, 6), for labels (n, C).

        Args:
            given: maps (n, channels, height, width) by name, and ``features`` (n, width) where they are read.
        """
        return self.steps[-1].layer(*self.read_last(given))

    def read_last(self, given: Mapping[str, NpArray]) -> tuple[NpArray, ...]:
        """What its last step reads, of what it is ``given`` as ``__call__`` is."""
        known = {name: given[name] for name in self.inputs}
        left = self._readers
        for step in self.steps[:-1]:
            known[step.gives] = step.layer(*(known[name] for name in step.reads))
            left.subtract(step.reads)
            for name in set(step.reads):
                if not left[name]:
                    del known[name]  # maps are large, and nobody reads this one again
        return tuple(known[name] for name in self.steps[-1].reads)


def _check_step(step: Step, known: Mapping[str, None], head: str) -> None:
    where = f"{head}: {step.gives[:80]}"
    if _GIVEN.fullmatch(step.gives) is None or step.gives == FEATURES:
        what = f"needs a name of small letters, digits and '_', at most 32, that is not {FEATURES!r}"
        raise InputError(head, what, got=repr(step.gives[:80]))
    if step.gives in known:
        raise InputError(where, "is given by two layers")
    wanted, got = step.layer.inputs, len(step.reads)
    if got != wanted if wanted is not None else got < 2:
        told = "two inputs or more" if wanted is None else f"{wanted} input{'s' if wanted > 1 else ''}"
        raise InputError(where, f"{step.layer.kind} reads {told}", got=got)
    for name in step.reads:
        if name not in known:
            raise InputError(where, "reads a map, or what a layer before it gives", got=repr(name[:80]))
    wrong = step.layer.wrong()
    if wrong is not None:
        raise InputError(where, f"{step.layer.kind} {wrong}")


def _remade(step: Step, made: Mapping[int, NpArray]) -> Step:
    given = {name: made[id(array)] for name, array in tensors(step.layer).items()}
    return replace(step, layer=with_tensors(step.layer, given))


def mask_of(logits: NpArray, size: tuple[int, int]) -> NpArray:
    """The label of every pixel, uint8 (n, height, width): the largest of ``logits`` (n, C, h, w) resized to ``size``.

    They are resized as ``bilinear`` does it; of two that are equal the first counts.
    """
    labels: NpArray = bilinear(logits, size).argmax(axis=1).astype(np.uint8)
    return labels
