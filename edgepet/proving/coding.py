"""The codings of a pack's planes: what each loses, and the smallest that hold a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgepet.calibration.budget import Answers, Drop, worst
from edgepet.deltas.delta import JudgedHead
from edgepet.deltas.text import with_classes
from edgepet.errors import CheckError, InputError, option, require
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.codecs import CODECS, Codec, Coding
from edgepet.packs.manifest import CORRECTIONS, EXACT
from edgepet.packs.pack import EVERY, Pack, encode_pack, read_pack
from edgepet.packs.text_file import read_text
from edgepet.proving.probing import probed
from edgepet.proving.subject import Subject
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from edgepet.tuning.dense import Said

Judge: TypeAlias = Callable[[Answers, Answers], Mapping[str, Drop]]  # what each head loses between two answers, by name

LOOKED_AT = 64  # images on which a plane is judged alone
CANDIDATES: tuple[Codec, ...] = ("int2", "int4", "int8", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recoded:
    """A pack in other codings: its bytes, and how far its answers are from the first one's.

    ``max_abs`` is of ``n`` images, as ``furthest`` has it; ``drops`` are of the heads by name, none where nothing is
    known to be true of the images.
    """

    data: bytes
    codings: Mapping[str, Coding] = field(default_factory=dict)
    max_abs: float = 0.0
    n: int = 0
    drops: Mapping[str, Drop] = field(default_factory=dict)

    @property
    def drop(self) -> Drop | None:
        """What the head loses that loses most."""
        return worst(self.drops.values()) if self.drops else None

    @property
    def told(self) -> str:
        """``drop`` in a message."""
        (head, drop) = max(self.drops.items(), key=lambda each: each[1].points)
        return f"{drop.points:.2f}{f' of {head}' if len(self.drops) > 1 else ''} on {self.n} images"


class Recoding:
    """A pack that is stored otherwise.

    Args:
        images: preprocessed, float32 (n, 3, H, W) or clips.
        judge: by what is true of ``images``; None where nothing is known.
        sequence: of the pack that is made.
    """

    def __init__(self, subject: Subject, images: NpArray, judge: Judge | None, sequence: int) -> None:
        self._subject, self._images, self._judge, self._sequence = subject, images, judge, sequence

    def in_codec(self, codec: Codec) -> Recoded:
        """Every plane in ``codec``, but what is too small for codes or may not be coded.

        Raises:
            InputError: a value that it cannot hold.
        """
        return self._asked(self._judged({name: Coding.of(codec, name) for name in self._planes}))

    def smallest(self, max_drop: float, stage: Callable[[str], None]) -> Recoded:
        """The smallest codings of the planes with which no head loses more than ``max_drop`` points of its metric.

        Each plane is tried alone in each codec, on some of the images. Taking the codec with the smallest sum of bytes
        and error times a number, for larger and larger numbers, gives a row of choices, of which no other is smaller at
        an equal sum of errors; the first of them that holds the budget on all images is taken.

        Raises:
            CheckError: fp16 does not hold it.
        """
        tried = [self._alone(name, stage) for name in self._planes]
        found, row = None, choices(tried)
        low, high = 0, len(row) - 1
        while low <= high:
            middle = (low + high) // 2
            stage(f"choice {middle + 1} of {len(row)}, {sum(each.bytes for each in row[middle])} bytes")
            made = self._judged({each.plane: each.coding for each in row[middle]})
            if made.drop is not None and made.drop.points <= max_drop:
                found, high = made, middle - 1
            else:
                low = middle + 1
        if found is None:
            what = f"must lose at most {max_drop:g} points, and does not in fp16 either"
            raise CheckError(self._subject.delta.task, what, fix=f"a wider {option('max_drop')}")
        return self._asked(found)

    @property
    def _planes(self) -> list[str]:
        return [
            name
            for name, plane in self._subject.pack.planes.items()
            if plane.stored.coding.format in CODECS and name not in (*EXACT, CORRECTIONS)
        ]

    def _alone(self, name: str, stage: Callable[[str], None]) -> list[Tried]:
        stage(f"{name} alone")
        made = list[Tried]()
        for codec in CANDIDATES:
            pack = read_pack(self._encoded({name: Coding.of(codec, name)}), answers=EVERY)
            if pack.planes[name].stored.coding in [each.coding for each in made]:
                continue  # too small for codes, or may have none
            coding, size = pack.planes[name].stored.coding, pack.bytes_by_kind[name]
            made.append(Tried(name, coding, size, moved(self._expected, self._said(pack, LOOKED_AT))))
        return made

    def _encoded(self, codings: Mapping[str, Coding]) -> bytes:
        pack = self._subject.pack
        kept = {name: plane for name, plane in pack.planes.items() if name not in codings}
        return encode_pack(pack.delta, codings=codings, weights=self._weights, kept=kept, sequence=self._sequence)

    def _judged(self, codings: Mapping[str, Coding]) -> Recoded:
        data = self._encoded(codings)
        pack = read_pack(data, answers=EVERY)
        said = self._said(pack, None)
        before, after = (tuple(head.answer for head in heads) for heads in (self._expected, said))
        return Recoded(
            data=data,
            codings={name: plane.stored.coding for name, plane in pack.planes.items()},
            max_abs=furthest(self._expected, said),
            n=len(self._images),
            drops={} if self._judge is None else self._judge(before, after),
        )

    def _asked(self, made: Recoded) -> Recoded:
        """With the probe of what is stored now."""
        pack = read_pack(made.data, answers=EVERY)
        delta = probed(self._subject.backbone, pack.delta)
        return replace(made, data=encode_pack(delta, kept=pack.planes, sequence=self._sequence))

    def _said(self, pack: Pack, count: int | None) -> tuple[Said, ...]:
        from edgepet.tuning.dense import stored_said

        return stored_said(self._subject.backbone, pack.delta, self._images[:count])

    @cached_property
    def _expected(self) -> tuple[Said, ...]:
        return self._said(self._subject.pack, None)

    @cached_property
    def _weights(self) -> dict[int, NpArray]:
        from edgepet.tuning.counted import error_weights

        return error_weights(self._subject.backbone.tensors, self._subject.delta.updates)


@dataclass(frozen=True, slots=True)
class Tried:
    """One plane alone in one coding: what it takes, and how far what heads say has ``moved``."""

    plane: str
    coding: Coding
    bytes: int
    error: float


def furthest(before: Sequence[Said], after: Sequence[Said]) -> float:
    """The largest difference of what heads say of the same images: of logits, and of distances of boxes in strides."""
    heads = zip(before, after, strict=True)
    pairs = (pair for was, now in heads for pair in zip(was.numbers, now.numbers, strict=True))
    return max(float(np.abs(now - was).max()) for was, now in pairs)


def moved(before: Sequence[Said], after: Sequence[Said]) -> float:
    """How far heads moved what they say of images, the first ones of ``before``: the sum over heads of mean squares.

    Each is through the variance of what was said before, and the mean over the kinds of numbers of a head. So logits,
    distances and how central a place is count alike, and a head of a million places no more than one of ten labels.
    """
    heads = list[float]()
    for was, now in zip(before, after, strict=True):
        kinds = zip(was.numbers, now.numbers, strict=True)
        heads.append(float(np.mean([_unlike(one[: len(other)], other) for one, other in kinds])))
    return sum(heads)


def _unlike(before: NpArray, after: NpArray) -> float:
    squares = np.square(after - before).mean(dtype=np.float64)
    return float(squares / (before.var(dtype=np.float64) or 1.0))


def choices(tried: Sequence[Sequence[Tried]]) -> list[list[Tried]]:
    """A coding for every plane, from the fewest bytes to the smallest errors: the lower convex hull of both sums."""
    hulls = [_hull(each) for each in tried]
    steps = sorted(
        (_slope(hull[i], hull[i + 1]), plane, i) for plane, hull in enumerate(hulls) for i in range(len(hull) - 1)
    )
    at = [0] * len(hulls)
    made = [[hull[0] for hull in hulls]]
    for _, plane, i in steps:  # the step that mends most for a byte comes first
        at[plane] = i + 1
        made.append([hull[place] for hull, place in zip(hulls, at, strict=True)])
    return made


def _hull(tried: Sequence[Tried]) -> list[Tried]:
    """Those that no mixture of two others beats in bytes and in error, by bytes."""
    made: list[Tried] = []
    for each in sorted(tried, key=lambda each: (each.bytes, each.error)):
        if made and each.error >= made[-1].error:
            continue
        while len(made) > 1 and _slope(made[-2], each) <= _slope(made[-2], made[-1]):
            made.pop()
        made.append(each)
    return made


def _slope(first: Tried, second: Tried) -> float:
    return (second.error - first.error) / max(1, second.bytes - first.bytes)


def reworded(source: Path, backbone: AnyBackbone, text: Path, sequence: int | None) -> Recoded:
    """The pack ``source`` with the classes of a table of text: its one head judged on no image, its probe made anew.

    Raises:
        PackError, BackboneError: as ``Subject``.
        InputError: it has another head than one of score maps, or a table that does not fit it.
        MissingError: torch is not installed.
    """
    subject, table = Subject(source, backbone, None, answers=EVERY), read_text(text)
    delta, planes = subject.delta, subject.pack.planes
    if len(delta.answers) != 1 or not delta.heads:
        raise InputError(
            str(source), "needs one head, of score maps, for other classes", got=format_names(delta.answers)
        )
    require("torch", extra="train", purpose="making its probe anew")
    head = JudgedHead(head=with_classes(delta.heads[0].head, table), value=0.0, n=0)
    other = replace(delta, heads=(head,), training={**delta.training, "text": table.facts}, probes={})
    codings = {name: plane.stored.coding for name, plane in planes.items()}
    stored = read_pack(encode_pack(other, codings=codings, kept=planes), answers=EVERY)
    made = probed(subject.backbone, stored.delta)
    number = subject.pack.sequence if sequence is None else sequence
    data = encode_pack(made, kept=stored.planes, sequence=number)
    return Recoded(data=data)
