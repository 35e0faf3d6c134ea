"""Run a torch network with branches in it; the network's own modules stay untouched. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from edgepet.deltas.branches import Branch, named_tensors, ordered
from edgepet.deltas.heads import Map
from edgepet.networks.maps import flowing

_Change: TypeAlias = Callable[[Tensor], "Tensor | None"]
_Settings: TypeAlias = Mapping[str, Any]  # each kind's own, as ``BRANCHES`` declares and packs check them
_Torch: TypeAlias = Any  # what torch hands to its hooks and modes: any operator, and anything that it takes or gives
Interim: TypeAlias = dict[str, list[Tensor]]
Rows: TypeAlias = tuple[Tensor, Tensor]  # further keys and values, (heads, rows, d / heads) each

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "none": lambda x: x,
}


@contextlib.contextmanager
def grafted(module: nn.Module, branches: Sequence[Branch], interim: Interim | None = None) -> Iterator[None]:
    """While the block runs, calls of ``module`` go through ``branches`` too.

    The branches' tensors are torch tensors; gradients flow to them. ``interim`` is given what branches find on the way
    and do not put out: by ``into``, of "semantic-prompt" its maps of slots (n, slots, h, w), one a recurrence.
    """
    with contextlib.ExitStack() as stack:
        attention = _Attention()
        for branch in ordered(branches):
            if branch.kind in _ROWS:
                attention.attach(module, branch, stack)
            elif branch.kind == "tokens":
                _insert_tokens(module, branch, stack)
            else:
                _add(module, branch, stack, interim)
        if attention.attached:
            stack.enter_context(attention)
        yield


def in_torch(branches: Sequence[Branch]) -> list[Branch]:
    """``branches`` with torch tensors of the same numbers, which are copied."""
    return [
        replace(branch, tensors={name: torch.from_numpy(np.array(tensor)) for name, tensor in branch.tensors.items()})
        for branch in branches
    ]


class Grafted(nn.Module):
    """``module`` with ``branches`` as one network, for tracing; ``tensors`` are called ``names``.

    With ``maps`` it puts out a tuple: features, and each map as it flows.
    """

    def __init__(self, module: nn.Module, branches: Sequence[Branch], maps: Sequence[Map] = ()) -> None:
        super().__init__()
        self.backbone, self._branches, self._maps = module, branches, maps
        named = named_tensors(branches)
        self.names = tuple(named)
        self.tensors = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in named.values()])

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What ``module`` puts out for ``images``, with the branches in it."""
        named = dict(zip(self.names, self.tensors, strict=True))
        branches = [branch.with_tensors(named) for branch in self._branches]
        with grafted(self.backbone, branches), flowing(self.backbone, self._maps) as taken:
            features = cast(Tensor, self.backbone(images))
        return (features, *(taken[each.name] for each in self._maps)) if self._maps else features


def _hook(module: nn.Module, point: str, change: _Change, stack: contextlib.ExitStack) -> None:
    """Call ``change`` with what flows through ``point``; what it returns, if anything, flows on instead."""
    name, _, side = point.partition(":")
    part = module.get_submodule(name)
    if side == "out":
        handle = part.register_forward_hook(lambda _module, _inputs, output: change(output))
    else:

        def before(_module: nn.Module, inputs: tuple[_Torch, ...]) -> tuple[_Torch, ...] | None:
            changed = change(inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        handle = part.register_forward_pre_hook(before)
    stack.callback(handle.remove)


def _add(module: nn.Module, branch: Branch, stack: contextlib.ExitStack, interim: Interim | None) -> None:
    compute, held = _KINDS[branch.kind], list[Tensor]()
    if interim is not None and branch.kind == "semantic-prompt":
        compute = partial(_semantic_prompt, found=interim.setdefault(branch.into, []))

    def read(x: Tensor) -> None:
        held[:] = [compute(x, branch.tensors, branch.settings)]

    def add(y: Tensor) -> Tensor:
        return y + held.pop()

    if branch.tap == branch.into:
        _hook(module, branch.into, lambda x: x + compute(x, branch.tensors, branch.settings), stack)
    else:
        _hook(module, branch.tap, read, stack)
        _hook(module, branch.into, add, stack)


def _insert_tokens(module: nn.Module, branch: Branch, stack: contextlib.ExitStack) -> None:
    prompt, front = branch.tensors["prompt"], int(branch.settings["prefix"])

    def insert(x: Tensor) -> Tensor:
        rows = prompt.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :front], rows, x[:, front:]], dim=1)

    def remove(x: Tensor) -> Tensor:
        return torch.cat([x[:, :front], x[:, front + prompt.shape[0] :]], dim=1)

    _hook(module, branch.tap, insert, stack)
    _hook(module, branch.into, remove, stack)


# -------------------------------------------------------------------------------------------------------- what is added


def _linear(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _bottleneck(x: Tensor, tensors: Mapping[str, Tensor], settings: _Settings) -> Tensor:
    return _linear(_ACTIVATIONS[settings["activation"]](_linear(x, tensors, "down")), tensors, "up")


def _patch_conv(x: Tensor, tensors: Mapping[str, Tensor], settings: _Settings) -> Tensor:
    """Convpass: a token in front of the patches is an image of one pixel, which meets the kernel's middle only."""
    act, front = _ACTIVATIONS[settings["activation"]], settings["prefix"]
    kernel, bias = tensors["conv.weight"], tensors["conv.bias"]
    hidden = act(_linear(x, tensors, "down"))
    patches = torch.unflatten(hidden[:, front:].transpose(1, 2), 2, (settings["height"], settings["width"]))
    patches = functional.conv2d(patches, kernel, bias, padding="same").flatten(2).transpose(1, 2)
    if front:
        middle = kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2]
        patches = torch.cat([functional.linear(hidden[:, :front], middle, bias), patches], dim=1)
    return _linear(act(patches), tensors, "up")


def _conv_pair(x: Tensor, tensors: Mapping[str, Tensor], settings: _Settings) -> Tensor:
    kernel = tensors["conv.weight"]
    hidden = functional.conv2d(x, kernel, tensors["conv.bias"], stride=settings["stride"], padding=settings["padding"],
                               dilation=settings["dilation"], groups=kernel.shape[0])  # fmt: skip
    return functional.conv2d(
        _ACTIVATIONS[settings["activation"]](hidden), tensors["point.weight"], tensors["point.bias"]
    )


def _conv_pair_last(x: Tensor, tensors: Mapping[str, Tensor], settings: _Settings) -> Tensor:
    return _conv_pair(x.movedim(-1, 1), tensors, settings).movedim(1, -1)


def _stage_prompt(x: Tensor, tensors: Mapping[str, Tensor], settings: _Settings) -> Tensor:
    act, kernel = _ACTIVATIONS[settings["activation"]], tensors["conv.weight"]

    def prompt(grid: Tensor) -> Tensor:
        hidden = act(_point(grid, tensors, "reduce"))
        hidden = functional.conv2d(hidden, kernel, tensors["conv.bias"], padding="same", groups=kernel.shape[0])
        return _point(act(hidden), tensors, "out")

    return _on_grid(prompt, x, settings)


def _semantic_prompt(
    x: Tensor, tensors: Mapping[str, Tensor], settings: _Settings, found: list[Tensor] | None = None
) -> Tensor:
    """Maps of slots are put into ``found``, where it is given."""
    kernels = {name: tensors[name] for name in ("reduce", "slots", "mix", "conv", "out")}
    parts = torch.split(tensors["bias"], [len(kernel) for kernel in kernels.values()])
    biases: dict[str, Tensor] = dict(zip(kernels, parts, strict=True))

    def product(name: str, given: Tensor) -> Tensor:
        return functional.conv2d(given, kernels[name][:, :, None, None]) + biases[name][:, None, None]

    def prompt(grid: Tensor) -> Tensor:
        z = functional.gelu(product("reduce", grid))
        for _ in range(settings["recurrences"]):
            slots = product("slots", z)
            if found is not None:
                found.append(slots)
            mixed = functional.gelu(product("mix", torch.cat([z, slots.softmax(dim=1)], dim=1)))
            moved = functional.conv2d(mixed, kernels["conv"], padding="same", groups=len(kernels["conv"]))
            z = z + moved + biases["conv"][:, None, None]
        return product("out", z)

    return _on_grid(prompt, x, settings)


def _on_grid(prompt: Callable[[Tensor], Tensor], x: Tensor, settings: _Settings) -> Tensor:
    """What ``prompt`` makes of maps; where ``height`` is not 0, of patches as a map, with zeros in front of them."""
    if settings["height"] == 0:
        return prompt(x)
    if x.ndim == 4:  # maps (n, H, W, C) are tokens on a grid
        return torch.unflatten(_on_grid(prompt, x.flatten(1, 2), settings), 1, tuple(x.shape[1:3]))
    front = settings["prefix"]
    grid = torch.unflatten(x[:, front:].transpose(1, 2), 2, (settings["height"], settings["width"]))
    patches = prompt(grid).flatten(2).transpose(1, 2)
    return functional.pad(patches, (0, 0, front, 0)) if front else patches


def _point(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return functional.conv2d(x, tensors[f"{name}.weight"][:, :, None, None], tensors[f"{name}.bias"])


def _temporal(x: Tensor, tensors: Mapping[str, Tensor], settings: _Settings) -> Tensor:
    """ST-Adapter: a depthwise convolution of three frames on the patches of (clips * frames, N, d)."""
    front, frames = settings["prefix"], settings["frames"]
    kernel = tensors["conv.weight"]  # (w, 3)
    hidden = torch.unflatten(_linear(x[:, front:], tensors, "down"), 0, (-1, frames))  # (clips, frames, patches, w)
    clips = hidden.permute(0, 3, 1, 2)  # (clips, w, frames, patches): a kernel of 3 x 1 goes over the frames
    clips = functional.conv2d(clips, kernel[:, None, :, None], tensors["conv.bias"], padding="same", groups=len(kernel))
    out = _linear(clips.permute(0, 2, 3, 1).flatten(0, 1), tensors, "up")
    return functional.pad(out, (0, 0, front, 0)) if front else out


_KINDS: dict[str, Callable[[Tensor, Mapping[str, Tensor], _Settings], Tensor]] = {
    "bottleneck": _bottleneck,
    "patch-conv": _patch_conv,
    "conv-pair": _conv_pair,
    "conv-pair-last": _conv_pair_last,
    "stage-prompt": _stage_prompt,
    "semantic-prompt": _semantic_prompt,
    "temporal": _temporal,
}


# ------------------------------------------------------------------------------------------- further keys and values


def _key_values(module: nn.Module, branch: Branch) -> Rows:
    del module
    return _heads(branch.tensors["keys"], branch), _heads(branch.tensors["values"], branch)


def _prompts(module: nn.Module, branch: Branch) -> Rows:
    """What the block's own norm and projection make of the prompt: it depends on no image."""
    norm = module.get_submodule(branch.tap.partition(":")[0])
    attention: _Torch = module.get_submodule(branch.into.partition(":")[0])
    fused = attention.qkv.forward(norm.forward(branch.tensors["prompt"][None]))[0]
    _, keys, values = fused.chunk(3, dim=-1)
    return attention.k_norm.forward(_heads(keys, branch)), _heads(values, branch)


def _heads(rows: Tensor, branch: Branch) -> Tensor:
    return torch.unflatten(rows, -1, (int(branch.settings["heads"]), -1)).transpose(0, 1)


_ROWS: dict[str, Callable[[nn.Module, Branch], Rows]] = {"key-values": _key_values, "prompts": _prompts}


class _Attention(TorchFunctionMode):
    """Puts further keys and values into torch's attention operator, in the modules that have some."""

    def __init__(self) -> None:
        super().__init__()
        self.attached, self._rows = False, list[Rows]()

    def attach(self, module: nn.Module, branch: Branch, stack: contextlib.ExitStack) -> None:
        self.attached = True

        def enter(x: Tensor) -> None:
            del x
            self._rows.append(_ROWS[branch.kind](module, branch))

        _hook(module, branch.into, enter, stack)

    def __torch_function__(
        self, func: _Torch, types: object, args: tuple[_Torch, ...] = (), kwargs: Mapping[str, _Torch] | None = None
    ) -> _Torch:
        if func is not functional.scaled_dot_product_attention or not self._rows:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        keys, values = self._rows.pop()
        key = torch.cat([keys.to(key.dtype).expand(key.shape[0], -1, -1, -1), key], dim=2)
        value = torch.cat([values.to(value.dtype).expand(value.shape[0], -1, -1, -1), value], dim=2)
        if key.dtype is torch.bfloat16 and key.device.type == "cpu" and torch.is_grad_enabled():
            # torch's fused operator has a slow backward there
            weights = torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1)
            return weights @ value
        return func(query, key, value, *rest, **(kwargs or {}))
