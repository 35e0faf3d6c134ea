"""What a head for masks, boxes or labels is asked to be, before there is one. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgepet.deltas.heads import FEATURES, Answer, Map
from edgepet.deltas.weightless import LARGEST_FACTOR
from edgepet.errors import InputError, option
from edgepet.spec import spelled_size

FormName: TypeAlias = Literal["linear", "mlp", "fcos", "pooled"]
FORMS: dict[FormName, Answer] = {  # what each answers
    "linear": "mask",
    "mlp": "mask",
    "fcos": "boxes",
    "pooled": "labels",
}
MOST_DEPTH = 2  # of towers: three levels of two towers have 36 layers then, of 64 that a head may have
_COARSE = 8  # the finest stride that a detector reads where nothing is asked: small objects are few, places are many


def features_map(width: int) -> Map:
    """Pooled features as what a head reads: a map of one place, behind the backbone's own."""
    return Map(name=FEATURES, point="", channels=width, stride=1, height=1, width=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a head is asked to be.

    ``maps`` are numbers of the backbone's maps, finest first; none is the last one for ``linear``, all for ``mlp``, and
    for ``fcos`` those of stride 8 and more, or half of the depths of a plain transformer.
    ``norm`` puts a layer norm without weights on each of them first, as ConvNeXt and HorNet have one there for dense
    tasks. ``width`` is of ``mlp`` and ``fcos``. ``depthwise``, a 3 x 3 convolution of every channel and a product
    behind the fusion, is of ``mlp``, and so is ``separation`` (``networks.separation``), which reads two maps or more;
    ``depth``, the number of such pairs in each tower, of ``fcos``. ``pooled`` reads pooled features and has no setting.
    """

    name: FormName = "mlp"
    width: int = 64
    maps: tuple[int, ...] = ()
    depthwise: bool = False
    norm: bool = False
    depth: int = 2
    separation: bool = False

    def __str__(self) -> str:
        if self.name == "pooled":
            return self.name
        maps = ("maps=" + "/".join(map(str, self.maps)),) if self.maps else ()
        width = f"width={self.width}"
        own = {
            "linear": (), "mlp": (width, f"depthwise={str(self.depthwise).lower()}"),
            "fcos": (width, f"depth={self.depth}"),
        }  # fmt: skip
        separation = ("separation=true",) if self.separation else ()
        return ",".join((self.name, *own[self.name], *maps, f"norm={str(self.norm).lower()}", *separation))

    @property
    def answer(self) -> Answer:
        """What the head answers."""
        return FORMS[self.name]

    def of(self, maps: Sequence[Map]) -> tuple[Map, ...]:
        """Those of ``maps`` that the head reads, finest first.

        Raises:
            InputError: a number that no map has, one map where ``separation`` needs two, or maps whose sides are no
                powers of two of one another.
        """
        if self.name == "pooled":
            return tuple(each for each in maps if each.name == FEATURES)
        maps = [each for each in maps if each.name != FEATURES]
        absent = [number for number in self.maps if number >= len(maps)]
        if absent:
            told = ", ".join(f"{n} of stride {each.stride}" for n, each in enumerate(maps))
            raise InputError(option("head"), f"needs maps that the backbone has, {told}", got=absent[0])
        usual = maps[-1:] if self.name == "linear" else maps
        if self.name == "fcos":
            coarse = [each for each in maps if each.stride >= _COARSE]
            usual = (maps[1::2] if self.is_plain(maps) else coarse) or maps[-1:]
        chosen = [maps[number] for number in sorted(set(self.maps))] or list(usual)
        if self.separation and len(chosen) < 2:
            fix = "name two maps, as maps=0/3"
            raise InputError(option("head"), "needs two maps to separate a fine one from deep ones", got=1, fix=fix)
        first = chosen[0]
        for each in chosen:
            factors = {first.height / each.height, first.width / each.width}
            if not factors <= {2.0**n for n in range(LARGEST_FACTOR.bit_length())} or len(factors) > 1:
                got = " and ".join(f"{spelled_size((m.height, m.width))} at stride {m.stride}" for m in (first, each))
                fix = f"choose an {option('image_size')} that is a multiple of {each.stride}"
                raise InputError(option("head"), "needs maps that fit on one another", got=got, fix=fix)
        return tuple(chosen)

    def is_plain(self, maps: Sequence[Map]) -> bool:
        """Whether all of them have one stride, as a plain transformer's."""
        return len({each.stride for each in maps}) == 1

    def levels(self, maps: Sequence[Map]) -> tuple[tuple[tuple[int, int], ...], int]:
        """Of a detector that reads ``maps``, heights and widths of its levels, the finest first, and that one's stride.

        Raises:
            InputError: maps that are not each twice as fine as the next, or of which no pyramid can be made.
        """
        first, sizes = maps[0], tuple((each.height, each.width) for each in maps)
        if self.is_plain(maps):
            if first.height % 2 or first.width % 2 or first.stride % 2:
                fix = f"choose an {option('image_size')} that is a multiple of {2 * first.stride}"
                got = f"{spelled_size(sizes[0])} at stride {first.stride}"
                raise InputError(option("head"), "needs maps of an even height and width", got=got, fix=fix)
            return tuple((int(first.height * by), int(first.width * by)) for by in (2, 1, 0.5)), first.stride // 2
        for finer, coarser in itertools.pairwise(sizes):
            if finer != (2 * coarser[0], 2 * coarser[1]):
                got = " and ".join(map(spelled_size, (finer, coarser)))
                raise InputError(option("head"), "needs maps each half as high and wide as the one before", got=got)
        return sizes, first.stride
