"""The maps that a network puts out beside its features, for heads that answer for every place.

Which ones is the network's matter and no task's, so that all tasks share them. timm's ``feature_info`` names, for every
depth, a module, its channels and its reduction: of a network of stages the last module of each reduction from 4 to 32,
of a plain transformer or mixer, whose blocks have one reduction, blocks at four depths, the last behind the final norm.
A network of your own may have such a list, of ``{"module": NAME, "num_chs": C, "reduction": R}``.

What a module puts out becomes (n, C, h, w): channels that come last are put first, and of tokens the last h * w are the
patches, whatever class tokens, registers and prompts stand before them. Maps are compared with what timm's own
``forward_intermediates`` gives, where a network has it: where patches lie in another order, there is no map.

Needs the ``train`` extra.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from edgepet.deltas.heads import Map
from edgepet.errors import InputError

REDUCTIONS = (4, 8, 16, 32)  # strides of the maps of stages
DEPTHS = 4  # maps of a network whose blocks all have one stride
_FINAL_NORM = "norm"  # as timm calls it in transformers and mixers
_SAME = 1e-4  # of the largest value: one network, run twice in float32

Layout: TypeAlias = Literal["nchw", "nhwc", "tokens"]  # where channels lie, or that patches are tokens
_Torch: TypeAlias = Any  # what modules put out, and what timm's networks have beside modules


@dataclass(frozen=True, slots=True)
class _Depth:
    """One entry of a network's list: its place there, and modules that may put out its map, the best first."""

    number: int
    modules: tuple[str, ...]
    channels: int
    stride: int


def find_maps(module: nn.Module, input_shape: tuple[int, ...], where: str) -> tuple[Map, ...]:
    """The maps of ``module`` at one image size, finest first, named ``map.0`` and so on; found by running it.

    Raises:
        InputError: about ``where``: it has no such list, puts out no map that can be read, or takes clips.
        Exception: whatever ``module`` raises.
    """
    if len(input_shape) != 3:
        raise InputError(where, "must take images to put out maps", got="clips")
    depths = _depths(module)
    if not depths:
        what = "must name its maps in a list feature_info"
        fix = "give the network feature_info = [{'module': NAME, 'num_chs': C, 'reduction': R}, ...], as timm's have it"
        raise InputError(where, what, fix=fix)
    images = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    found, reasons = list[Map](), list[str]()
    with torch.no_grad(), _kept(module, [name for each in depths for name in each.modules]) as kept:
        module(images)
        for depth in depths:
            readable, why = _readable(module, depth, images, kept, f"map.{len(found)}")
            if readable is None:
                reasons.append(why)
            else:
                found.append(readable)
    if not found:
        raise InputError(where, "puts out no map that can be read", got=reasons[0])
    return tuple(found)


@contextlib.contextmanager
def taking(module: nn.Module, maps: Sequence[Map]) -> Iterator[Mapping[str, Tensor]]:
    """While the block runs, each call of ``module`` leaves its maps, (n, C, h, w), in what is yielded, by name.

    Hooks that change what a module puts out must be there before: maps are what flows on. Gradients flow to them.
    """
    taken = dict[str, Tensor]()
    with contextlib.ExitStack() as stack:
        for each in maps:
            _hook(module, each, lambda x, each: taken.update({each.name: _as_map(module, x, each)}), stack)
        yield taken


@contextlib.contextmanager
def flowing(module: nn.Module, maps: Sequence[Map]) -> Iterator[Mapping[str, Tensor]]:
    """As ``taking``, but each map as it flows through ``module``, in the layout that ``layouts_of`` tells."""
    taken = dict[str, Tensor]()
    with contextlib.ExitStack() as stack:
        for each in maps:
            _hook(module, each, lambda x, each: taken.update({each.name: x}), stack)
        yield taken


def _hook(module: nn.Module, each: Map, take: Callable[[Tensor, Map], None], stack: contextlib.ExitStack) -> None:
    def hook(part: nn.Module, inputs: tuple[_Torch, ...], output: Tensor) -> None:
        del part, inputs
        take(output, each)

    stack.callback(module.get_submodule(each.point.partition(":")[0]).register_forward_hook(hook).remove)


def _as_map(module: nn.Module, x: Tensor, each: Map) -> Tensor:
    """What flows at the point of ``each``, as (n, channels, height, width)."""
    layout = _layout(module, x, each)
    if layout == "tokens":
        patches = x[:, x.shape[1] - each.height * each.width :]
        return torch.unflatten(patches.transpose(1, 2), 2, (each.height, each.width))
    return x if layout == "nchw" else x.movedim(-1, 1)


def layouts_of(module: nn.Module, maps: Sequence[Map], input_shape: tuple[int, ...]) -> dict[str, Layout]:
    """How each of the maps flows through ``module``, by name; found by running it."""
    with torch.no_grad(), flowing(module, maps) as taken:
        module(torch.zeros(2, *input_shape))
    return {each.name: _layout(module, taken[each.name], each) for each in maps}


def _layout(module: nn.Module, x: Tensor, each: Map) -> Layout:
    """How a map lies in ``x``, what flows at its point: of tokens the patches are behind all others."""
    if x.ndim == 3:
        return "tokens"
    cube = each.channels == each.height == each.width  # where sides do not tell, timm's networks do
    first = getattr(module, "output_fmt", "NCHW") == "NCHW" if cube else tuple(x.shape[1:]) == each.shape
    return "nchw" if first else "nhwc"


def _depths(module: nn.Module) -> list[_Depth]:
    listed = cast(_Torch, getattr(module, "feature_info", None)) or ()
    entries: list[Mapping[str, _Torch]] = list(getattr(listed, "info", listed))
    strides = {int(entry["reduction"]) for entry in entries}
    last = len(entries) - 1
    if len(strides) == 1:
        chosen = sorted({-(-len(entries) * part // DEPTHS) - 1 for part in range(1, DEPTHS + 1)})
    else:
        by_stride = {int(entry["reduction"]): number for number, entry in enumerate(entries)}
        chosen = [by_stride[stride] for stride in REDUCTIONS if stride in by_stride]
    plain = len(strides) == 1
    return [
        _Depth(
            number,
            ((_FINAL_NORM,) if plain and number == last else ()) + (str(entries[number]["module"]),),
            int(entries[number]["num_chs"]),
            int(entries[number]["reduction"]),
        )
        for number in chosen
    ]


@contextlib.contextmanager
def _kept(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[_Torch, int]]]:
    """What each of the modules that are there puts out last, and how often it had been written into by then."""
    kept = dict[str, tuple[_Torch, int]]()

    def keeper(name: str) -> Callable[..., None]:
        def keep(part: nn.Module, inputs: tuple[_Torch, ...], output: _Torch) -> None:
            del part, inputs
            kept[name] = (output, output._version if isinstance(output, Tensor) else 0)

        return keep

    there = dict(module.named_modules())
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(name for name in names if name in there):
            stack.callback(there[name].register_forward_hook(keeper(name)).remove)
        yield kept


def _readable(
    module: nn.Module, depth: _Depth, images: Tensor, kept: Mapping[str, tuple[_Torch, int]], name: str
) -> tuple[Map | None, str]:
    """The map of one depth, or why none of its modules puts out one."""
    height, width = (-(-side // depth.stride) for side in images.shape[-2:])
    why = f"nothing of {depth.modules[-1]}"
    for part in depth.modules:
        output, version = kept.get(part, (None, 0))
        if not isinstance(output, Tensor):
            continue
        each = Map(name=name, point=f"{part}:out", channels=depth.channels, stride=depth.stride, height=height,
                   width=width)  # fmt: skip
        shape = tuple(output.shape[1:])
        tokens = len(shape) == 2 and shape[0] >= height * width and shape[1] == depth.channels
        if not tokens and shape not in (each.shape, (height, width, depth.channels)):
            why = f"{shape} of {part} in place of {each.shape}"
        elif output._version != version:
            why = f"what {part} puts out is written over behind it"
        elif not _as_timm_says(module, depth, images, _as_map(module, output, each), behind_norm=part == _FINAL_NORM):
            why = f"another order of places than timm's in {part}"
        else:
            return each, ""
    return None, why


def _as_timm_says(module: nn.Module, depth: _Depth, images: Tensor, got: Tensor, *, behind_norm: bool) -> bool:
    """Whether timm's ``forward_intermediates`` gives the same map, where the network has it."""
    intermediates = getattr(module, "forward_intermediates", None)
    if intermediates is None:
        return True
    try:
        given = intermediates(images, indices=[depth.number], norm=behind_norm, intermediates_only=True)
    except (AssertionError, NotImplementedError, TypeError, ValueError):  # it has none at such depths, or with norms
        return True
    expected = cast(Tensor, given[0])
    limit = _SAME * float(expected.abs().max())
    return expected.shape == got.shape and float((expected - got).abs().max()) <= limit
