"""The image size of a timm network: the one that its weights are for, and the one that was asked for.

What takes one size only is found by asking timm for it, and what of its tensors depends on the size by their shapes: no
architecture is known here by its name. Needs the ``train`` extra.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from edgepet.errors import InputError, first_line, option, require
from edgepet.spec import ImageSize, spelled_size

if TYPE_CHECKING:
    from torch import Tensor, nn

Sides: TypeAlias = tuple[int, int]  # height and width in pixels
# What ``timm.create_model`` makes without a classifier, by what it needs besides the name.
Build: TypeAlias = "Callable[[Mapping[str, object]], nn.Module]"

MOST_SIDE = 8192  # pixels: beyond it a table of positions alone fills the memory
REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, ZeroDivisionError)  # whatever a network says of a size
_NEAR = 4  # patches on both sides of what the length of a table says


def sides_of(image_size: ImageSize | None) -> Sides | None:
    """Height and width of what was asked for; None where nothing was.

    Raises:
        InputError: it is not one or two whole numbers of 1 to ``MOST_SIDE``.
    """
    if image_size is None:
        return None
    given = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(given) != 2 or not all(isinstance(side, int) for side in given):
        what = "is the side of a square in pixels, or a height and a width"
        raise InputError(option("image_size"), what, got=image_size)
    if not all(1 <= side <= MOST_SIDE for side in given):
        what = "must be at least 1" if min(given) < 1 else f"must be at most {MOST_SIDE}"
        raise InputError(option("image_size"), what, got=spelled_size(given))
    return given


def takes_one_size(module: nn.Module) -> bool:
    """Whether timm builds the network for images of one size, which it is told as ``img_size``."""
    fixed = cast(Mapping[str, Any], module.pretrained_cfg).get("fixed_input_size")
    return bool(fixed) or _resamples_itself(module)


def native_module(
    module: nn.Module,
    build: Build,
    state: Mapping[str, Tensor],
    asked: Sides | None,
    arguments: Mapping[str, object],
) -> tuple[nn.Module, Sides]:
    """``module``, without its weights, at the image size that the tables in ``state`` are for, and that size.

    It is the architecture's own where they fit it, else what was ``asked`` for, else a square found by the length of
    a table. Where nothing fits the architecture's own is left, and timm's own reading of ``state`` has the word.
    """
    own = own_sides(module)
    if not takes_one_size(module) or not _unlike(module, state):
        return module, own
    for sides in (*((asked,) if asked else ()), *_squares(module, own, state)):
        sized = {**arguments, "img_size": _told(sides)}
        if _fits(partial(build, sized), state):
            return build(sized), sides
    return module, own


def own_sides(module: nn.Module) -> Sides:
    """The image size of a network's architecture."""
    timm = require("timm", extra="train", purpose="an image size")
    height, width = timm.data.resolve_data_config({}, model=module)["input_size"][-2:]
    return int(height), int(width)


def at_size(
    build: Build,
    native: nn.Module,
    held: Sides,
    sides: Sides,
    arguments: Mapping[str, object],
    load: Callable[[nn.Module], None],
) -> tuple[nn.Module, dict[str, object]]:
    """``native``, whose weights are for ``held``, as it takes images of ``sides``; and what timm makes that from.

    Args:
        load: puts the weights of ``native`` into another module, resampled as timm does.

    Raises:
        InputError: timm builds no such network, or does not resample its weights. No file is at fault.
    """
    if not takes_one_size(native):
        return native, dict(arguments)
    name = cast(Mapping[str, Any], native.pretrained_cfg).get("architecture", type(native).__name__)
    dynamic = _resamples_itself(native)  # its table, in every forward pass
    fixed = {"dynamic_img_size": False} if dynamic else {}
    create_args: dict[str, object] = {**arguments, "img_size": _told(sides), **fixed}
    if sides == held and not dynamic:
        return native, create_args
    try:
        module = build(create_args)
    except REFUSALS as error:
        what = f"{name} cannot be built for images of {spelled_size(sides)} pixels"
        raise InputError(option("image_size"), what, got=first_line(error), fix="use another image size") from error
    try:
        load(module)
    except InputError as error:
        if _answers(native, sides):  # it makes what it needs of its own tables, or of the images
            return native, {**arguments, "img_size": _told(held)}
        what = f"{name} has weights for images of {spelled_size(held)} pixels, which timm resamples to no other size"
        fix = f"leave it out, or give weights that were tuned at {spelled_size(sides)} pixels"
        raise InputError(option("image_size"), what, got=error.got, fix=fix) from error
    return module, create_args


def require_patches(module: nn.Module, sides: Sides, spec: str) -> None:
    """Refuse a size that a network would cut off at its right and lower edge.

    Raises:
        InputError: it is no multiple of the patches.
    """
    patch = _patch(module)
    if patch is None or not takes_one_size(module):
        return
    low = tuple(max(side // each, 1) * each for side, each in zip(sides, patch, strict=True))
    if low != sides:
        high = tuple(a + each * (a != side) for a, side, each in zip(low, sides, patch, strict=True))
        what = f"{spec} cuts images into patches of {spelled_size(patch)} pixels"
        fix = f"use {spelled_size((low[0], low[1]))} or {spelled_size((high[0], high[1]))}"
        raise InputError(option("image_size"), what, got=spelled_size(sides), fix=fix)


def _told(sides: Sides) -> ImageSize:
    """As timm and reports have it: one number for a square."""
    return sides[0] if sides[0] == sides[1] else sides


def _resamples_itself(module: nn.Module) -> bool:
    return bool(getattr(module, "dynamic_img_size", False))


def _patch(module: nn.Module) -> Sides | None:
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    return (int(patch[0]), int(patch[1])) if isinstance(patch, (tuple, list)) and len(patch) == 2 else None


def _unlike(module: nn.Module, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tensors of one name and different shapes: of the module, and of ``state``."""
    own = module.state_dict()
    return [(own[key], given) for key, given in state.items() if key in own and own[key].shape != given.shape]


def _fits(build: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> bool:
    """Whether a network has the very tensors of ``state``; it is built without memory."""
    import torch

    try:
        with torch.device("meta"):
            module = build()
    except REFUSALS:
        return False
    return not _unlike(module, state)


def _answers(module: nn.Module, sides: Sides) -> bool:
    import torch

    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, 3, *sides))
    except REFUSALS:
        return False
    return True


def _squares(module: nn.Module, own: Sides, state: Mapping[str, Tensor]) -> Iterator[Sides]:
    """Squares that ``state`` may be for, nearest first: its tables are longer by the square of their side."""
    table, given = _unlike(module, state)[0]
    unit = max(_patch(module) or (32, 32))
    side = math.sqrt(math.prod(own) * given.numel() / max(table.numel(), 1))
    nearest = round(side / unit)
    for patches in sorted(range(nearest - _NEAR, nearest + _NEAR + 1), key=lambda n: abs(n * unit - side)):
        if 0 < patches * unit <= MOST_SIDE:
            yield patches * unit, patches * unit


@contextlib.contextmanager
def quiet(library: str = "timm") -> Iterator[None]:
    """Keep a library from logging what edgepet says in its own words, and timm from warning."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"timm\.")  # torch's, of how it resamples tables of distances
            yield
    finally:
        logger.setLevel(level)
