"""Find the layers of a network by watching it run once, whatever its modules are called. Needs the ``train`` extra.

A layer is a torch operator that reads tensors of the state dict: ``conv2d(x, W, b)`` with W a named kernel. So a
convolution that pads first is one, a normalisation with its activation inside one module is one, and a kernel that is
standardised on the way, whose fold would be undone, is none.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgepet.spec import Block, Site

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
ARGUMENTS: dict[str, tuple[str, ...]] = {  # of the operators that are layers, in torch's order
    "linear": ("input", "weight", "bias"),
    "conv1d": _CONV,
    "conv2d": _CONV,
    "conv3d": _CONV,
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "rms_norm": ("input", "normalized_shape", "weight"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
}
_KINDS: dict[str, Literal["linear", "conv", "norm"]] = {"linear": "linear", **dict.fromkeys(ARGUMENTS, "norm")}
_KINDS |= {"linear": "linear", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv"}
_Torch: TypeAlias = Any  # what torch hands to its modes: any operator, and anything that it takes or gives
_IN_PLACE = re.compile(r"(?!requires_grad).*[^_]_|__setitem__")
CHANNELS_FIRST = frozenset({"conv1d", "conv2d", "conv3d", "group_norm", "batch_norm"})


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one forward pass showed: the layers in the order they ran, the blocks, and the network's output.

    ``unread`` are the state-dict names of tensors that no operator read, ``written`` of those that one wrote into.
    """

    sites: tuple[Site, ...]
    blocks: tuple[Block, ...]
    output: _Torch
    unread: frozenset[str]
    written: Mapping[str, str]  # name -> operator


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One run of a layer's operator; ``names`` are the state-dict names of its tensor arguments."""

    operator: str
    given: Mapping[str, _Torch]
    names: Mapping[str, str]
    output: Tensor


class _Watch(TorchFunctionMode):
    """Notes every layer's operator, and which operators read the parameters and what layers put out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names, self.calls = _names(module), list[_Call]()
        self.written = dict[str, str]()
        self._storages = {_storage(tensor): name for name, tensor in _state(module)}
        self.readers: dict[int, list[tuple[str, tuple[_Torch, ...]]]] = defaultdict(list)
        self._outputs = set[int]()  # ids of tensors that ``calls`` keeps alive, so that none is used twice

    def __torch_function__(
        self, func: _Torch, types: object, args: tuple[_Torch, ...] = (), kwargs: Mapping[str, _Torch] | None = None
    ) -> _Torch:
        output, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if _IN_PLACE.fullmatch(name) and args and isinstance(args[0], Tensor) and _storage(args[0]) in self._storages:
            self.written.setdefault(self._storages[_storage(args[0])], name)
        if _holds_tensor(output):  # a shape or a dtype that is asked for is no reader
            for tensor in _tensors((*args, *(kwargs or {}).values())):
                if id(tensor) in self._outputs or id(tensor) in self.names:
                    self.readers[id(tensor)].append((name, args))
        if name in ARGUMENTS:
            given = dict(zip(ARGUMENTS[name], args, strict=False)) | dict(kwargs or {})
            names = {key: self.names[id(v)] for key, v in given.items() if id(v) in self.names}
            self.calls.append(_Call(name, given, names, output))
            self._outputs.add(id(output))
        return output


def watch(module: nn.Module, images: Tensor) -> Seen:
    """Run ``module`` once on ``images`` (n, 3, H, W) or clips (n, frames, 3, H, W), without gradients; list its layers.

    Raises:
        Exception: whatever ``module`` raises.
    """
    watcher, put_out = _Watch(module), dict[str, Tensor]()
    points, ran = dict[str, tuple[int, ...]](), set[str]()
    pictures = images.shape[:-3].numel()  # frames of all clips, where ``images`` are clips

    def note(name: str, part: nn.Module, inputs: tuple[_Torch, ...], output: _Torch) -> None:
        for point, flows in ((f"{name}:in", next(iter(inputs), None)), (f"{name}:out", output)):
            if isinstance(flows, Tensor) and len(flows) == pictures:  # windows of images are no images
                points.setdefault(point, tuple(flows.shape[1:]))
        if isinstance(output, Tensor):
            ran.add(name)
        if isinstance(getattr(part, "weight", None), Tensor) and not watcher.readers[id(output)]:
            put_out[name] = output  # else an activation worked on it in place

    hooks = [part.register_forward_hook(partial(note, name)) for name, part in module.named_modules()]
    try:
        with torch.no_grad(), watcher:
            output = module(images)
    finally:
        for hook in hooks:
            hook.remove()
    first: dict[str, _Call] = {}
    for call in watcher.calls:
        if "weight" in call.names and (_KINDS[call.operator] != "norm" or call.given["weight"].ndim == 1):
            first.setdefault(call.names["weight"], call)
    sites = tuple(_site(call, watcher, put_out) for call in first.values())
    unread = frozenset(name for key, name in watcher.names.items() if not watcher.readers[key])
    frames, (height, width) = pictures // len(images), images.shape[-2:]
    found = _blocks(module, points, ran, sites, (height, width))
    blocks = tuple(replace(block, frames=frames) for block in found)
    return Seen(sites, blocks, output, unread, watcher.written)


def _blocks(
    module: nn.Module,
    points: Mapping[str, tuple[int, ...]],
    ran: Collection[str],
    sites: Sequence[Site],
    sides: tuple[int, int],
) -> Iterator[Block]:
    """Numbered parts of a list that hold two layers or more, and no such parts themselves."""
    layers = [site.name for site in sites]
    numbered = [
        name
        for name, _ in module.named_modules()
        if name.rpartition(".")[2].isdigit() and sum(layer.startswith(f"{name}.") for layer in layers) > 1
    ]
    front, stem = int(getattr(module, "num_prefix_tokens", 0) or 0), sites[0].columns if sites else 1
    for name in numbered:
        if any(other.startswith(f"{name}.") for other in numbered) or f"{name}:in" not in points:
            continue
        inside = {name, *(f"{name}.{child}" for child, _ in module.get_submodule(name).named_children())}
        own = {
            point.removeprefix(name).removeprefix("."): shape
            for point, shape in points.items()
            if point.partition(":")[0] in inside
        }
        reads, gives = own[":in"], own.get(":out", own[":in"])
        channel_axis = _channel_axis(reads, next(site for site in sites if site.name.startswith(f"{name}.")))
        axis = 0 if channel_axis == 1 else -1
        yield Block(
            name=name,
            kind="block",
            weight="",
            bias=None,
            in_features=reads[axis],
            out_features=gives[axis],
            channel_axis=channel_axis,
            points=own,
            ran=frozenset(part.removeprefix(f"{name}.") for part in inside & set(ran) - {name}),
            container=name.rpartition(".")[0],
            heads=_heads(module, name, own),
            prefix=front,
            grid=_grid(module, reads, front, sides),
            stem_columns=stem,
        )


def _channel_axis(reads: tuple[int, ...], first: Site) -> Literal[-1, 1]:
    """Where a block that reads features of this shape has its channels: where its ``first`` layer finds its own."""
    channels = first.out_features if first.kind == "norm" else first.in_features * first.groups
    if len(reads) != 3:
        return -1
    if (reads[0] == channels) != (reads[-1] == channels):
        return 1 if reads[0] == channels else -1
    return -1 if first.channel_axis == -1 and first.exposed else 1  # a norm that turns its map hides what it puts out


def _heads(module: nn.Module, block: str, points: Mapping[str, tuple[int, ...]]) -> int:
    """Heads of an attention over all tokens that torch's operator computes, without positions of its own."""
    if len(points.get("attn:in", ())) != 2 or getattr(module, "rope", None) is not None:
        return 0
    attention = module.get_submodule(f"{block}.attn")
    plain = all(hasattr(attention, name) for name in ("qkv", "k_norm", "num_heads", "fused_attn"))
    return int(cast(_Torch, attention).num_heads) if plain else 0


def _grid(module: nn.Module, tokens: tuple[int, ...], front: int, sides: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the patches: what the network says, or what has the shape of images of ``sides`` pixels."""
    if len(tokens) != 2 or tokens[0] <= front:
        return None
    known = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    patch = math.sqrt(math.prod(sides) / (tokens[0] - front))
    grid = [int(edge) for edge in known] if known is not None else [round(side / patch) for side in sides]
    return (grid[0], grid[1]) if grid[0] * grid[1] == tokens[0] - front else None


def parameters(module: nn.Module, unread: Collection[str] = ()) -> Iterator[Site]:
    """Every parameter by itself, as full fine-tuning takes it: position tables, layer scales and GRNs among them.

    Those that are ``unread`` are left out: they would get no gradient, and a graph does not hold them.
    """
    for name, parameter in module.named_parameters():
        if name in unread:
            continue
        rows = int(parameter.shape[0]) if parameter.ndim else 1
        width = parameter.numel() // rows
        yield Site(name=name, kind="tensor", weight=name, bias=None, in_features=width, out_features=rows)


def _site(call: _Call, watcher: _Watch, put_out: Mapping[str, Tensor]) -> Site:
    weight, shape = call.names["weight"], call.given["weight"].shape
    name, own_bias = weight.removesuffix(".weight"), call.given.get("bias") is not None
    alone = len(watcher.readers[id(call.given["weight"])]) == 1
    return Site(
        name=name,
        kind=_KINDS[call.operator],
        weight=weight,
        bias=call.names.get("bias"),
        mean=_batch_norm_behind(call, watcher) if alone and not own_bias else None,
        in_features=int(shape[min(1, len(shape) - 1)]),
        out_features=int(shape[0]),
        taps=int(shape[2:].numel()),
        stride=_first(call.given.get("stride", 1)),
        dilation=_first(call.given.get("dilation", 1)),
        groups=int(call.given.get("groups", 1)) if call.operator.startswith("conv") else 1,
        channel_axis=1 if call.operator in CHANNELS_FIRST else -1,
        blocks=_thirds(call, watcher) if call.operator == "linear" and name.endswith("qkv") else (),
        scalable=not own_bias or "bias" in call.names,
        exposed=alone and put_out.get(name) is call.output,
    )


def _first(value: _Torch) -> int:
    return int(value[0] if isinstance(value, (tuple, list)) else value)


def _batch_norm_behind(call: _Call, watcher: _Watch) -> str | None:
    """The running mean of the batch norm that alone reads what a convolution puts out."""
    readers = watcher.readers[id(call.output)]
    if _KINDS[call.operator] != "conv" or [name for name, _ in readers] != ["batch_norm"]:
        return None
    norms = [other for other in watcher.calls if other.given["input"] is call.output]
    mean = norms[0].names.get("running_mean") if norms else None
    means = [other for other in watcher.calls if other.names.get("running_mean") == mean]
    return mean if len(means) == 1 else None


def _thirds(call: _Call, watcher: _Watch) -> tuple[tuple[str, tuple[int, int]], ...]:
    """q, k and v, where the output's last axis is at once cut into three: (..., 3, ...) or three chunks."""
    axis, rows = call.output.ndim - 1, int(call.given["weight"].shape[0]) // 3
    for name, args in watcher.readers[id(call.output)][:1]:
        shape = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        cut = name in ("reshape", "view") and len(shape) > axis + 1 and shape[axis] == 3
        if cut or (name == "chunk" and args[1] == 3):
            return tuple((part, (i * rows, (i + 1) * rows)) for i, part in enumerate("qkv"))
    return ()


def _names(module: nn.Module) -> dict[int, str]:
    """State-dict names by tensor; a tensor with two names has none, for a fold would have to change both."""
    named = [(name, tensor) for name, tensor in _state(module)]
    twins = Counter(id(tensor) for _, tensor in named)
    return {id(tensor): name for name, tensor in named if twins[id(tensor)] == 1}


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    stored = module.state_dict(keep_vars=True)
    return ((name, cast(Tensor, tensor)) for name, tensor in stored.items())


def _storage(tensor: Tensor) -> int:
    """The same for all views of one tensor, ``.data`` among them, on the meta device too."""
    return cast(int, tensor.untyped_storage()._cdata)


def _holds_tensor(value: object) -> bool:
    return next(_tensors((value,)), None) is not None


def _tensors(values: tuple[object, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(tuple(value))
