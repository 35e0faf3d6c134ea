"""Begin a network at one of its blocks: what enters the block is given, and what lies before it is not computed.

No architecture is known here. A module that is done before the block begins is passed over: in its place numbers come
out that are no numbers, in the shape that it puts out. What little the network itself computes between its modules goes
on with these, up to the block, which is given the right ones. A network in which anything goes around the block, to
layers behind it, answers with no number at all, so that comparing it once on one batch shows that it cannot be cut
there. The network's own modules come back untouched. Needs the ``train`` extra.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from edgepet.errors import InputError

_Torch: TypeAlias = Any  # what modules take and give


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """``block`` is the module that a network begins at, ``passed`` what the modules that are passed over put out.

    Of one input of ``input_shape``, (3, H, W) or of a clip (frames, 3, H, W), ``shape`` and ``dtype`` enter the block;
    of a clip its frames one behind the other, (frames, ...).
    """

    block: str
    passed: Mapping[str, _Torch]
    input_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Blank:
    """A tensor that nobody may read: ``shape`` is of one input and grows with their number along ``axis``."""

    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    device: torch.device

    def made(self, inputs: int) -> Tensor:
        shape = [size * inputs if axis == self.axis else size for axis, size in enumerate(self.shape)]
        return torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(shape)


def split_at(module: nn.Module, block: str, inputs: Tensor) -> Split:
    """How ``module`` begins at ``block``, found by running it on one and on both of two ``inputs``.

    Raises:
        InputError: ``block`` runs several times, or something else than one tensor of each image enters it.
        Exception: whatever ``module`` raises.
    """
    one, two = (_watched(module, block, inputs[:count]) for count in (1, 2))
    passed = dict[str, _Torch]()
    for name in one.done:
        with contextlib.suppress(_UnfitError):
            passed[name] = _blank(one.done[name], two.done.get(name))
    inside = {name for name in passed if any(name.startswith(f"{outer}.") for outer in passed)}
    pictures = inputs.shape[1:-3].numel()
    if one.entered is None or two.entered is None or [len(one.entered), len(two.entered)] != [pictures, 2 * pictures]:
        raise InputError(block, "must be entered once, by one tensor of every image")
    return Split(
        block=block,
        passed={name: given for name, given in passed.items() if name not in inside},
        input_shape=tuple(inputs.shape[1:]),
        shape=tuple(one.entered.shape if inputs.ndim > 4 else one.entered.shape[1:]),
        dtype=one.entered.dtype,
    )


def entering(module: nn.Module, split: Split, inputs: Tensor) -> Tensor:
    """What enters the block for ``inputs`` (n, ...), as (n, *split.shape); nothing behind is computed."""

    def before(_module: nn.Module, given: tuple[_Torch, ...]) -> None:
        raise _EnteredError(given[0])

    handle = module.get_submodule(split.block).register_forward_pre_hook(before, prepend=True)
    try:
        module(inputs)
    except _EnteredError as entered:
        return entered.given.reshape(len(inputs), *split.shape)
    finally:
        handle.remove()
    raise InputError(split.block, "does not run")


@contextlib.contextmanager
def begun(module: nn.Module, split: Split, entered: Tensor) -> Iterator[Tensor]:
    """While the block runs ``module`` goes on from what has ``entered``, (n, *split.shape); call it with what is given.

    Gradients do not flow to ``entered``, and calls of the modules before compute nothing.
    """
    flat = entered.flatten(0, 1) if len(split.input_shape) > 3 else entered
    count, passed = len(entered), {name: module.get_submodule(name) for name in split.passed}

    def before(_module: nn.Module, given: tuple[_Torch, ...]) -> tuple[_Torch, ...]:
        return (flat, *given[1:])

    handle = module.get_submodule(split.block).register_forward_pre_hook(before, prepend=True)
    try:
        for name, part in passed.items():
            part.__dict__["forward"] = _giving(split.passed[name], count)
        yield torch.full((), torch.nan, device=entered.device).expand(count, *split.input_shape)
    finally:
        handle.remove()
        for part in passed.values():
            part.__dict__.pop("forward", None)


class _EnteredError(Exception):
    """Not a fault: what would enter the block is there, and the rest of the network need not run."""

    def __init__(self, given: Tensor) -> None:
        self.given = given
        super().__init__()


class _UnfitError(Exception):
    """A module does not put out tensors of each input."""


@dataclass(slots=True, eq=False)
class _Watched:
    """``done`` is what the modules put out that ran once, before the block began; ``entered`` what entered it."""

    done: dict[str, _Torch]
    entered: Tensor | None


def _watched(module: nn.Module, block: str, inputs: Tensor) -> _Watched:
    done, ended, entered = dict[str, _Torch](), Counter[str](), list[_Torch]()
    names = {part: name for name, part in module.named_modules()}

    def enter(_module: nn.Module, given: tuple[_Torch, ...]) -> None:
        entered.append(given[0] if given else None)

    def end(part: nn.Module, _inputs: tuple[_Torch, ...], output: _Torch) -> None:
        name = names[part]
        ended[name] += 1
        if not entered:
            done[name] = output

    handles = [part.register_forward_hook(end) for part in names]
    handles.append(module.get_submodule(block).register_forward_pre_hook(enter, prepend=True))
    try:
        module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    first = entered[0] if len(entered) == 1 and isinstance(entered[0], Tensor) else None
    return _Watched({name: output for name, output in done.items() if ended[name] == 1}, first)


def _blank(one: _Torch, two: _Torch) -> _Torch:
    """What a module put out for one input and for two, as something that makes the like of any number."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        grows = [axis for axis, sizes in enumerate(zip(one.shape, two.shape, strict=False)) if sizes[0] != sizes[1]]
        if not one.is_floating_point() or len(grows) != 1 or two.shape[grows[0]] != 2 * one.shape[grows[0]]:
            raise _UnfitError
        return _Blank(tuple(one.shape), grows[0], one.dtype, one.device)
    if type(one) is not type(two):
        raise _UnfitError
    if type(one) in (tuple, list) and len(one) == len(two):
        return type(one)(_blank(*pair) for pair in zip(one, two, strict=True))
    if type(one) is dict and one.keys() == two.keys():
        return {key: _blank(one[key], two[key]) for key in one}
    if one is None or (isinstance(one, (int, str, torch.Size)) and one == two):
        return one
    raise _UnfitError


def _giving(blank: _Torch, inputs: int) -> Any:
    def forward(*_given: object, **_named: object) -> _Torch:
        return _made(blank, inputs)

    return forward


def _made(blank: _Torch, inputs: int) -> _Torch:
    if isinstance(blank, _Blank):
        return blank.made(inputs)
    if isinstance(blank, dict):
        return {key: _made(value, inputs) for key, value in blank.items()}
    if type(blank) in (tuple, list):
        return type(blank)(_made(value, inputs) for value in blank)
    return cast(_Torch, blank)
