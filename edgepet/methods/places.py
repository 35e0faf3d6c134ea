"""Where methods go: the parts of layers, and the blocks, that their settings name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from edgepet.spec import Block, Site, Target

T = TypeVar("T")
QUERY_AND_VALUE = ("q", "v", "q_proj", "v_proj")  # blocks of a fused layer, or layers that are not fused
_WHOLE = ""  # the part of a layer that is not cut into blocks


def parts(site: Site, on: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Rows of a layer by the name of the part: the blocks of a fused weight that ``on`` names, else the whole layer.

    ``on`` holds names of row blocks ("q", "k", "v") and ends of layer names ("fc1", "attn.proj"). A part's name ends
    with a dot; that of a whole layer is empty. Nothing where ``on`` names neither.
    """
    blocks = {f"{name}.": rows for name, rows in site.blocks if name in on}
    return blocks or ({_WHOLE: (0, site.out_features)} if _named(site, on) else {})


def all_parts(site: Site) -> dict[str, tuple[int, int]]:
    """Every row block of a fused layer as ``parts`` names them, or the whole layer."""
    return {f"{name}.": rows for name, rows in site.blocks} or {_WHOLE: (0, site.out_features)}


def block(site: Site, part: str, rows: tuple[int, int]) -> Target:
    """The target of a part of a layer's weight: its rows ``rows``, or the weight itself for a whole layer."""
    return Target(site.weight, None if part == _WHOLE else rows)


def attention(
    layers: Sequence[Site], on: Sequence[str], *, otherwise_dense: bool = True
) -> dict[str, dict[str, tuple[int, int]]]:
    """Parts of the layers that ``on`` names, by site; where there are none, as in a ConvNet, each dense layer whole."""
    layers = [site for site in layers if site.kind in ("linear", "conv")]
    found = {site.name: parts(site, on) for site in layers}
    found = {name: chosen for name, chosen in found.items() if chosen}
    dense = {site.name: {_WHOLE: (0, site.out_features)} for site in layers if site.dense and otherwise_dense}
    return found or dense


def named(layers: Sequence[Site], on: Sequence[str]) -> tuple[Site, ...]:
    """The layers that ``on`` names, with their bare parameters; one of which it names a row block is there whole."""
    chosen = {site.name for site in layers if site.operates and parts(site, on)}
    return tuple(site for site in layers if (site.name if site.operates else site.name.rpartition(".")[0]) in chosen)


def attended(layers: Sequence[Site], on: Sequence[str], default: Sequence[str] = QUERY_AND_VALUE) -> tuple[Site, ...]:
    """The layers that ``on`` names, or those that ``default`` does where it is empty, else all dense ones."""
    chosen = attention(layers, on or default, otherwise_dense=not on)
    return tuple(site for site in layers if site.name in chosen and site.kind in ("linear", "conv"))


def attended_parts(
    site: Site, on: Sequence[str], default: Sequence[str] = QUERY_AND_VALUE
) -> dict[str, tuple[int, int]]:
    """The parts of a layer that ``attended`` chooses by the same names."""
    return attention((site,), on or default)[site.name]


def linears(layers: Sequence[Site]) -> tuple[Site, ...]:
    """Every linear layer; where there are none, as in a ResNet, every dense one."""
    return tuple(site for site in layers if site.kind == "linear") or tuple(site for site in layers if site.dense)


def takes_prompt(site: Site) -> bool:
    """Whether a constant added to the layer's input is one of its output, and there is a tensor to write that into.

    A kernel of several taps may pad what it reads with zeros, and those would not be shifted.
    """
    return site.takes_shift and site.taps == 1


def ending(site: Site, by_name: Mapping[str, T], otherwise: T) -> T:
    """The value for the end of a layer's name, the longest that fits."""
    fitting = [name for name in by_name if _named(site, (name,))]
    return by_name[max(fitting, key=len)] if fitting else otherwise


def blocks_with(layers: Sequence[Site], *children: str) -> tuple[Block, ...]:
    """The blocks that have modules of these names right in them."""
    return tuple(site for site in layers if isinstance(site, Block) and site.has(*children))


def token_blocks(layers: Sequence[Site], *children: str, at: Sequence[str]) -> tuple[Block, ...]:
    """Those of ``blocks_with`` whose channels come last, at the points ``at`` as many as the block puts out.

    A point where windows of images flow is not looked at: attention in windows keeps its width.
    """
    return tuple(
        block
        for block in blocks_with(layers, *children)
        if not block.on_maps
        and all(block.points.get(point, (block.out_features,))[-1] == block.out_features for point in at)
    )


def _named(site: Site, endings: Sequence[str]) -> bool:
    return any(f".{site.name}".endswith(f".{ending}") for ending in endings)


def grid_of(site: Block) -> tuple[int, int] | None:
    """Rows and columns of the places that a block puts out, maps or patches; None where it puts out no such thing."""
    given = site.points.get(":out", ())
    return (given[1], given[2]) if site.on_maps and len(given) == 3 else site.grid_behind


def on_grid(site: Site) -> dict[str, int]:
    """The settings by which a branch reads what a block puts out: ``height`` and ``width`` are 0 of maps."""
    block = site if isinstance(site, Block) else None
    rows, columns = (block.grid_behind if block else None) or (0, 0)
    return {"prefix": block.prefix if block and block.grid else 0, "height": rows, "width": columns}
