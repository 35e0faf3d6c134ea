"""Which submodules a method should go to within a budget, by what tuning each gains and how few numbers that takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgepet.errors import InputError, option
from edgepet.methods import Method, configure
from edgepet.methods.depth import BLOCKS, ON
from edgepet.methods.method import count, fp16_bytes, fp16_size, stored_arrays
from edgepet.networks.backbone import Backbone
from edgepet.spec import NpArray, Site, Tensors
from edgepet.tuning.intrinsic import Measured
from edgepet.tuning.subspaces import Submodule

MOST_KINDS = 10  # that are combined, those that gain most: all sets of more would take minutes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """What a method trains, and what arrays it stores, in the kinds of layers ``on`` of one group of blocks.

    ``on`` has one kind; none, and the place is the whole group, for a method that goes to no layers. What several kinds
    share, such as factors, is one array in all their places; what groups that go to no layers share is not known here.
    """

    on: tuple[str, ...]
    blocks: str
    values: int
    arrays: tuple[NpArray, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """``on`` and ``blocks`` are settings of a method; of the gains added up they reach ``gain``.

    ``on`` is empty for a method that goes to no layers. ``fp16_bytes`` is what the method stores there in an fp16 pack,
    head and manifest left out.
    """

    on: tuple[str, ...]
    blocks: str
    gain: float
    fp16_bytes: int


def unplaced(name: str, settings: Mapping[str, str]) -> Method:
    """The method ``name`` before it is told where to go.

    Raises:
        InputError: as ``configure``, or ``settings`` have ``on`` or ``blocks``.
    """
    for key in (ON, BLOCKS):
        if key in settings:
            what = "is what is asked for"
            raise InputError(f"{option('settings')} {key}", what, got=repr(settings[key]), fix="leave it out")
    return configure(name, settings)


def places(backbone: Backbone, name: str, settings: Mapping[str, str], found: Sequence[Submodule]) -> tuple[Place, ...]:
    """Where the method can go: the submodules ``found``, or for one that goes to no layers the groups of their blocks.

    Raises:
        InputError: it can go nowhere.
    """
    layers, base = backbone.layers, backbone.tensors
    kinds = list(dict.fromkeys(each.on for each in found))
    rng = np.random.default_rng(0)
    for by_layer in (True, False):
        everywhere = _at(name, settings, kinds if by_layer else (), "")
        sites = everywhere.sites(layers)
        whole = stored_arrays(everywhere, sites, base, everywhere.start(sites, base, rng)) if by_layer else []
        there = []
        for on, blocks in dict.fromkeys(((each.on,) if by_layer else (), each.blocks) for each in found):
            method = _at(name, settings, on, blocks)
            if (sites := method.sites(layers)) and (own := _stored(method, sites, base, rng)):
                moved = {what for what, _ in own}
                arrays = tuple(array for what, array in whole or own if what in moved)
                there.append(Place(on=on, blocks=blocks, values=count(method, layers, base), arrays=arrays))
        if there:
            return tuple(there)
    raise InputError(option("method"), f"tunes nothing in the blocks of {backbone.label}", got=repr(name))


def _stored(
    method: Method, sites: Sequence[Site], base: Tensors, rng: np.random.Generator
) -> list[tuple[str, NpArray]]:
    """What the method stores there; nothing where there is too little for it, as for more values than layers have."""
    try:
        return stored_arrays(method, sites, base, method.start(sites, base, rng))
    except InputError:
        return []


def require_a_place(there: Sequence[Place], budget_bytes: int) -> None:
    """Refuse a budget, before anything is measured.

    Raises:
        InputError: it holds not one of the places.
    """
    least = min(fp16_size(place.arrays) for place in there)
    if least > budget_bytes:
        what = f"must hold at least one submodule, and the smallest takes {least / 1000:g} kB"
        raise InputError(option("budget"), what, got=f"{budget_bytes / 1000:g}")


def ranked(measured: Sequence[Measured], there: Sequence[Place]) -> tuple[Choice, ...]:
    """Every set of kinds in every range of blocks that gains anything, by its gains added up; of equals the smaller.

    A gain within its standard error is none. A method with fewer values in a submodule than its dimension is taken to
    reach that part of its gain.

    Args:
        there: as ``places`` of the submodules ``measured``.
    """
    found = _candidates(_worths(measured, there), there)
    return tuple(sorted(found, key=lambda each: (-each.gain, each.fp16_bytes)))


def choose(found: Sequence[Choice], budget_bytes: int, exact: Callable[[tuple[str, ...], str], int]) -> Choice | None:
    """The first of ``found``, as ``ranked``, that takes at most ``budget_bytes`` in an fp16 pack; None where none does.

    Args:
        exact: bytes of the method at these kinds and blocks, as ``size_of`` has them: between groups of blocks there
            may be layers that belong to none.
    """
    for each in found:
        if (each.fp16_bytes <= budget_bytes or not each.on) and (size := exact(each.on, each.blocks)) <= budget_bytes:
            return replace(each, fp16_bytes=size)
    return None


def size_of(backbone: Backbone, name: str, settings: Mapping[str, str]) -> Callable[[tuple[str, ...], str], int]:
    """Bytes of the method in an fp16 pack, by kinds of layers and range of blocks."""
    return lambda on, blocks: fp16_bytes(_at(name, settings, on, blocks), backbone.layers, backbone.tensors)


def _at(name: str, settings: Mapping[str, str], on: Sequence[str], blocks: str) -> Method:
    given = {ON: ",".join(on), BLOCKS: blocks}
    return configure(name, {**settings, **{key: value for key, value in given.items() if value}})


def _worths(measured: Sequence[Measured], there: Sequence[Place]) -> dict[tuple[tuple[str, ...], str], float]:
    """What each place would gain."""
    worths = {}
    for place in there:
        own = [each for each in measured if each.submodule.blocks == place.blocks]
        own = [each for each in own if not place.on or (each.submodule.on,) == place.on]
        needs = sum(each.dimension or 0 for each in own)
        share = min(1.0, place.values / needs) if needs else 0.0
        worths[place.on, place.blocks] = share * sum(each.gain for each in own)
    return worths


def _candidates(worths: Mapping[tuple[tuple[str, ...], str], float], there: Sequence[Place]) -> Iterator[Choice]:
    """Every set of kinds that gain in every range of groups that follow one another, with what its places store."""
    groups = list(dict.fromkeys(place.blocks for place in there))
    arrays = {(place.on, place.blocks): place.arrays for place in there}
    kinds = list(dict.fromkeys(place.on for place in there))
    for first, last in itertools.combinations_with_replacement(range(len(groups)), 2):
        inside = groups[first : last + 1]
        gains = {kind: sum(worths.get((kind, blocks), 0.0) for blocks in inside) for kind in kinds}
        most = sorted((kind for kind in kinds if gains[kind] > 0), key=gains.__getitem__)[-MOST_KINDS:]
        stored = {kind: [a for blocks in inside for a in arrays.get((kind, blocks), ())] for kind in most}
        for chosen in _sets([kind for kind in kinds if kind in most]):
            yield Choice(
                on=tuple(itertools.chain.from_iterable(chosen)),
                blocks=_joined(inside),
                gain=sum(gains[kind] for kind in chosen),
                fp16_bytes=fp16_size(itertools.chain.from_iterable(stored[kind] for kind in chosen)),
            )


def _sets(kinds: Sequence[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], ...]]:
    return itertools.chain.from_iterable(itertools.combinations(kinds, size) for size in range(1, len(kinds) + 1))


def _joined(groups: Sequence[str]) -> str:
    """Of groups that follow one another: of "0-2" and "3-5" it is "0-5"."""
    first, last = groups[0].partition("-")[0], groups[-1].rpartition("-")[2]
    return first if first == last else f"{first}-{last}"
