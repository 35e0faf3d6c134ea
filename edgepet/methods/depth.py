"""Any method on some of a network's blocks or layers, and the rest of the network left as it is.

Every method has the setting ``blocks`` by what is here, and ``on`` where it has none of its own; none knows of it: only
the layers that a method is shown are fewer. A method that is given neither is its plain self, and a pack of it has no
such setting.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from edgepet.errors import InputError, option
from edgepet.methods.method import Method
from edgepet.methods.places import named
from edgepet.spec import Block, Site

BLOCKS, ON = "blocks", "on"
M = TypeVar("M", bound=Method)
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


@functools.cache
def limited(kind: type[M]) -> type[M]:
    """``kind`` with one setting more: ``blocks``, a range "6-11" or a number "9", as ``within`` reads it."""
    return _shown(kind, BLOCKS, str, within)


@functools.cache
def placed(kind: type[M]) -> type[M]:
    """``kind``, which has no setting ``on``, with it: names of layers or of row blocks, as ``places.named`` reads them.

    A method of branches beside blocks finds nothing among layers.
    """
    return _shown(kind, ON, tuple[str, ...], named)


def takes_on(kind: type[Method]) -> bool:
    """Whether ``kind`` has a setting ``on`` of its own."""
    return ON in {field.name for field in dataclasses.fields(cast(Any, kind))}


def _shown(kind: type[M], setting: str, of: Any, fewer: Callable[[Sequence[Site], Any], tuple[Site, ...]]) -> type[M]:
    def sites(self: Any, layers: Sequence[Site]) -> tuple[Site, ...]:
        return kind.sites(self, fewer(layers, getattr(self, setting)))

    field = (setting, of, dataclasses.field(kw_only=True))
    namespace = {"sites": sites, "__doc__": kind.__doc__, "__module__": kind.__module__}
    made = dataclasses.make_dataclass(
        kind.__name__, [field], bases=(kind,), namespace=namespace, frozen=True, slots=True
    )
    return cast(type[M], made)


def in_blocks(method: M, blocks: str) -> M:
    """``method`` on these blocks only, as ``within`` reads them; its other settings stay."""
    given = {field.name: getattr(method, field.name) for field in dataclasses.fields(cast(Any, method))}
    kind: Any = type(method)
    return cast(M, (kind if BLOCKS in given else limited(kind))(**given | {BLOCKS: blocks}))


def blocks_of(method: Method) -> str | None:
    """The blocks that ``method`` is kept to, or None."""
    return getattr(method, BLOCKS, None)


def first_block(method: Method, layers: Sequence[Site]) -> str | None:
    """The first of the blocks that ``method`` is kept to, where a block lies before it; else None.

    Raises:
        InputError: as ``within``.
    """
    blocks = blocks_of(method)
    if blocks is None:
        return None
    every = blocks_in_order(layers)
    first, _ = _range(blocks, len(every))
    return every[first].name if first else None


def blocks_in_order(layers: Sequence[Site]) -> tuple[Block, ...]:
    """The blocks of a network in the order in which they run: ``blocks`` counts them from 0, through all stages."""
    places = {site.name: place for place, site in enumerate(layers) if site.operates}
    found = [site for site in layers if isinstance(site, Block)]
    return tuple(sorted(found, key=lambda block: _span(block.name, places)[0]))


def within(layers: Sequence[Site], blocks: str) -> tuple[Site, ...]:
    """Those of ``layers`` that run from the first to the last of ``blocks``, "6-11" or "9", in their order.

    What runs before the first of them is left out, such as a patch embedding, also where that is block 0. What runs
    behind the last is left out too, unless no block comes behind it: then a final norm is in. Between them, what lies
    in no block is in, such as a stage's downsampling. A parameter by itself runs where its module's layers do; one that
    is the whole network's own, such as a position table, counts as before all blocks.

    Raises:
        InputError: ``blocks`` is no range of the network's blocks; the message says how many it has.
    """
    every = blocks_in_order(layers)
    first, last = _range(blocks, len(every))
    places = {site.name: place for place, site in enumerate(layers) if site.operates}
    chosen = every[first : last + 1]
    begin = _span(chosen[0].name, places)[0]
    end = len(layers) if chosen[-1] is every[-1] else max(_span(block.name, places)[1] for block in chosen)
    names = {block.name for block in chosen}

    def runs(site: Site) -> bool:
        block = next((each.name for each in every if _inside(site.name, each.name)), None)
        return begin <= _place(site, places) <= end if block is None else block in names

    return tuple(site for site in layers if runs(site))


def _range(blocks: str, count: int) -> tuple[int, int]:
    where = f"{option('settings')} {BLOCKS}"
    if not count:
        raise InputError(where, "names blocks, and this backbone has 0", got=repr(blocks))
    match = _RANGE.fullmatch(blocks)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
    if not first <= last < count:
        what = f"needs a range of the backbone's {count} blocks, 0-{count - 1}, or the number of one of them"
        raise InputError(where, what, got=repr(blocks))
    return first, last


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _span(module: str, places: dict[str, int]) -> tuple[int, int]:
    """Where the first and the last layer of a module run."""
    own = [place for name, place in places.items() if _inside(name, module)]
    return (min(own), max(own)) if own else (-1, -1)


def _place(site: Site, places: dict[str, int]) -> int:
    if site.name in places:
        return places[site.name]
    module = site.name.rpartition(".")[0]
    return _span(module, places)[0] if module else -1
