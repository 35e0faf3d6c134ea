"""Which submodules a method should go to within a budget, by what tuning each gains and how few numbers that takes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgepet.errors import InputError, option
from edgepet.methods import METHODS, Method, configure
from edgepet.methods.method import count, fp16_bytes
from edgepet.networks.backbone import Backbone
from edgepet.tuning.intrinsic import Measured

MOST_KINDS = 10  # that are combined, those that gain most: all sets of more would take minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """``on`` and ``blocks`` are settings of a method; of the gains added up they reach ``gain``.

    ``fp16_bytes`` is what the method stores there in an fp16 pack, head and manifest left out.
    """

    on: tuple[str, ...]
    blocks: str
    gain: float
    fp16_bytes: int


def placed_method(name: str, settings: Mapping[str, str]) -> Method:
    """The method ``name``, which must be one that is told where to go.

    Raises:
        InputError: it has no setting ``on``, or as ``configure``; or ``settings`` have ``on`` or ``blocks``.
    """
    method = configure(name, settings)
    placed = [each for each, kind in METHODS.items() if _has_on(kind)]
    if name not in placed:
        raise InputError(option("method"), f"is told where to go, as {', '.join(placed)} are", got=repr(name))
    for key in ("on", "blocks"):
        if key in settings:
            what = "is what is asked for"
            raise InputError(f"{option('settings')} {key}", what, got=repr(settings[key]), fix="leave it out")
    return method


def _has_on(kind: Any) -> bool:
    return "on" in {field.name for field in dataclasses.fields(kind)}


def choose(
    measured: Sequence[Measured], backbone: Backbone, name: str, settings: Mapping[str, str], budget_bytes: int
) -> Choice:
    """The kinds and the range of blocks whose gains add up to most, in an fp16 pack of at most ``budget_bytes``.

    A method with fewer values in a submodule than its dimension is taken to reach that part of its gain. Of equals the
    smaller is taken.

    Raises:
        InputError: not one submodule of the method fits.
    """
    groups = list(dict.fromkeys(each.submodule.blocks for each in measured))
    worth, sizes = dict[tuple[str, str], float](), dict[tuple[str, str], int]()
    for each in measured:
        place = each.submodule.on, each.submodule.blocks
        values, sizes[place] = _cost(backbone, name, settings, (place[0],), place[1])
        worth[place] = each.gain * min(1.0, values / each.dimension) if each.dimension and values else 0.0
    best: Choice | None = None
    for first, last in itertools.combinations_with_replacement(range(len(groups)), 2):
        inside = groups[first : last + 1]
        by_kind = {kind: sum(worth.get((kind, blocks), 0.0) for blocks in inside) for kind, _ in worth}
        kinds = sorted((kind for kind in by_kind if by_kind[kind] > 0), key=by_kind.__getitem__)[-MOST_KINDS:]
        for on in _sets([kind for kind in by_kind if kind in kinds]):
            gain = sum(by_kind[kind] for kind in on)
            size = sum(sizes.get((kind, blocks), 0) for kind in on for blocks in inside)
            if size <= budget_bytes and (best is None or (gain, -size) > (best.gain, -best.fp16_bytes)):
                best = Choice(on=on, blocks=_joined(inside), gain=gain, fp16_bytes=size)
    if best is None:
        least = min((size for place, size in sizes.items() if worth[place] > 0), default=None)
        got = f"{budget_bytes / 1000:g}"
        if least is None:
            raise InputError("sites", f"found no submodule that {name} could tune for the better", fix=_MORE)
        what = f"must hold at least one submodule: the smallest of {name} takes {least / 1000:g} kB"
        raise InputError(option("budget"), what, got=got)
    _, size = _cost(backbone, name, settings, best.on, best.blocks)
    return dataclasses.replace(best, fp16_bytes=size)


_MORE = f"measure on more images: {option('images', 400)}"


def _cost(
    backbone: Backbone, name: str, settings: Mapping[str, str], on: tuple[str, ...], blocks: str
) -> tuple[int, int]:
    """Trained values and fp16 bytes of the method there; both 0 where it has no place."""
    method = configure(name, {**settings, "on": ",".join(on), "blocks": blocks})
    if not method.sites(backbone.layers):
        return 0, 0
    return (
        count(method, backbone.layers, backbone.tensors),
        fp16_bytes(method, backbone.layers, backbone.tensors),
    )


def _sets(kinds: Sequence[str]) -> itertools.chain[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(kinds, size) for size in range(1, len(kinds) + 1))


def _joined(groups: Sequence[str]) -> str:
    """Of groups that follow one another: of "0-2" and "3-5" it is "0-5"."""
    first, last = groups[0].partition("-")[0], groups[-1].rpartition("-")[2]
    return first if first == last else f"{first}-{last}"
