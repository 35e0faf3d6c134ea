"""How PEFT is told which layers it adapts: by names and the numbers of blocks, or by a pattern of all names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgepet.spec import Block, Site


def targets(adapted: Sequence[str], layers: Sequence[Site], *, numbered: bool) -> dict[str, object]:
    """The keys of a configuration that choose the layers named ``adapted``, and no others.

    Where these are the same layers in some of the blocks of one list, and ``numbered``, that is what is said: PEFT's
    ``layers_to_transform``. Else it is a pattern of all names.
    """
    blocks = [site for site in layers if isinstance(site, Block)]
    inside = {name: block for name in adapted for block in blocks if name.startswith(f"{block.name}.")}
    containers = {block.container for block in inside.values()}
    if numbered and len(inside) == len(adapted) and len(containers) == 1:
        (container,) = containers
        ends = sorted({name.removeprefix(f"{block.name}.") for name, block in inside.items()})
        numbers = sorted({int(block.name.rpartition(".")[2]) for block in inside.values()})
        fewer = len(numbers) < sum(block.container == container for block in blocks)
        if fewer and _named(ends, container, numbers, layers) == set(adapted):
            pattern = re.escape(container)
            return {"target_modules": ends, "layers_to_transform": numbers, "layers_pattern": [pattern]}
    return {"target_modules": exactly(adapted)}


def _named(ends: Sequence[str], container: str, numbers: Sequence[int], layers: Sequence[Site]) -> set[str]:
    """The layers that PEFT finds: whose name ends so, in one of these blocks."""
    within = tuple(f"{container}.{number}." for number in numbers)
    ending = tuple(f".{end}" for end in ends)
    return {
        site.name for site in layers if site.operates and site.name.startswith(within) and site.name.endswith(ending)
    }


def exactly(names: Iterable[str]) -> str:
    """A pattern for these layers and no others: PEFT takes a plain name for every name that ends with it."""
    return "|".join(re.escape(name) for name in names)
