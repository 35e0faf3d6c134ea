"""What a head for masks is asked to be, before there is one. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgepet.deltas.heads import Map
from edgepet.deltas.weightless import LARGEST_FACTOR
from edgepet.errors import InputError, option
from edgepet.spec import spelled_size

FormName: TypeAlias = Literal["linear", "mlp"]
FORMS: tuple[FormName, ...] = ("linear", "mlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a head for masks is asked to be.

    ``maps`` are numbers of the backbone's maps, finest first; none is the last one for ``linear`` and all for ``mlp``.
    ``norm`` puts a layer norm without weights on each of them first, as ConvNeXt and HorNet have one there for dense
    tasks. ``width`` and ``depthwise``, a 3 x 3 convolution of every channel and a product behind the fusion, are of
    ``mlp``, and so is ``separation`` (``networks.separation``), which reads two maps or more.
    """

    name: FormName = "mlp"
    width: int = 64
    maps: tuple[int, ...] = ()
    depthwise: bool = False
    norm: bool = False
    separation: bool = False

    def __str__(self) -> str:
        maps = ("maps=" + "/".join(map(str, self.maps)),) if self.maps else ()
        of_mlp = (f"width={self.width}", f"depthwise={str(self.depthwise).lower()}") if self.name == "mlp" else ()
        separation = ("separation=true",) if self.separation else ()
        return ",".join((self.name, *of_mlp, *maps, f"norm={str(self.norm).lower()}", *separation))

    def of(self, maps: Sequence[Map]) -> tuple[Map, ...]:
        """Those of ``maps`` that the head reads, finest first.

        Raises:
            InputError: a number that no map has, one map where ``separation`` needs two, or maps whose sides are no
                powers of two of one another.
        """
        absent = [number for number in self.maps if number >= len(maps)]
        if absent:
            told = ", ".join(f"{n} of stride {each.stride}" for n, each in enumerate(maps))
            raise InputError(option("head"), f"needs maps that the backbone has, {told}", got=absent[0])
        usual = maps[-1:] if self.name == "linear" else maps
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
