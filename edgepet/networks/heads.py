"""One torch forward for each layer of a head, and a head of them as a module. Needs the ``train`` extra.

What a layer computes is said once, in NumPy, by ``deltas.layers``; a contract test ties the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.deltas.detection import SIDES, Detect
from edgepet.deltas.heads import MapHead, Step
from edgepet.deltas.layers import Layer, settings, tensors

_Settings: TypeAlias = Mapping[str, Any]  # each kind's own, as ``SETTINGS`` declares them
_Held: TypeAlias = Mapping[str, Tensor]  # a layer's tensors; those that it does without are not there
_Forward: TypeAlias = Callable[[tuple[Tensor, ...], _Held, _Settings], Tensor]


class HeadNetwork(nn.Module):
    """``head`` in torch: maps by name give what the head's last step gives, for a mask logits (n, C, h, w).

    Its tensors are copies of the head's, as buffers; gradients flow to maps.
    """

    def __init__(self, head: MapHead) -> None:
        super().__init__()
        self.head = head
        self._held: dict[str, dict[str, str]] = {}
        for number, step in enumerate(head.steps):
            names = {name: f"layer{number}_{name}" for name in tensors(step.layer)}
            for name, tensor in tensors(step.layer).items():
                self.register_buffer(names[name], torch.from_numpy(np.array(tensor)))
            self._held[step.gives] = names

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """Maps (n, channels, height, width) by name, and ``features`` (n, width) where the head reads them."""
        return self.last(self.read_last(given))

    def read_last(self, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What its last step reads, of what ``forward`` takes."""
        known = {name: given[name] for name in self.head.inputs}
        for step in self.head.steps[:-1]:
            known[step.gives] = self._step(step, tuple(known[name] for name in step.reads))
        return tuple(known[name] for name in self.head.steps[-1].reads)

    def last(self, read: tuple[Tensor, ...]) -> Tensor:
        """What its last step gives for what ``read_last`` gave."""
        return self._step(self.head.steps[-1], read)

    def _step(self, step: Step, read: tuple[Tensor, ...]) -> Tensor:
        held = {name: self.get_buffer(buffer) for name, buffer in self._held[step.gives].items()}
        return forward(step.layer, read, held)


def forward(layer: Layer, inputs: tuple[Tensor, ...], held: Mapping[str, Tensor]) -> Tensor:
    """What ``layer`` gives for a batch of ``inputs``, with ``held`` for its tensors; gradients flow to both."""
    return _FORWARDS[layer.kind](inputs, held, settings(layer))


def _point(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    (x,) = inputs
    weight, bias = held["weight"], held.get("bias")
    return functional.linear(x, weight, bias) if x.ndim == 2 else functional.conv2d(x, weight[:, :, None, None], bias)


def _depthwise(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    kernel = held["weight"][:, None]
    return functional.conv2d(inputs[0], kernel, held.get("bias"), padding=kernel.shape[-1] // 2, groups=len(kernel))


def _conv(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    kernel = held["weight"]
    return functional.conv2d(inputs[0], kernel, held.get("bias"), told["stride"], padding=kernel.shape[-1] // 2)


def _deconv(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return functional.conv_transpose2d(inputs[0], held["weight"], held.get("bias"), stride=2)


def _resize(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    if told["mode"] == "nearest":
        return functional.interpolate(inputs[0], scale_factor=told["factor"], mode="nearest")
    return functional.interpolate(inputs[0], scale_factor=told["factor"], mode="bilinear", align_corners=False)


def _pool(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return functional.max_pool2d(inputs[0], told["size"])


def _add(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return sum(inputs[1:], start=inputs[0])


def _multiply(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return inputs[0] * inputs[1]


def _concat(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return torch.cat(inputs, dim=1)


def _activation(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return _ACTIVATIONS[told["name"]](inputs[0])


def _norm(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    last = inputs[0].movedim(1, -1)
    normed = functional.layer_norm(last, last.shape[-1:], held.get("weight"), held.get("bias"), told["eps"])
    return normed.movedim(-1, 1)


def _unit(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return functional.normalize(inputs[0], dim=1, eps=told["eps"])


def _attend(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    (x,) = inputs
    asked = torch.einsum("hkc,ncyx->nhkyx", held["keys"], x)
    if "key_bias" in held:
        asked = asked + held["key_bias"][:, :, None, None]
    told_back = torch.einsum("hko,nhkyx->noyx", held["values"], asked.softmax(dim=2))
    return told_back + held["bias"][:, None, None] if "bias" in held else told_back


def _regions(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    (x,) = inputs
    shares = torch.einsum("kc,ncyx->nkyx", held["queries"], x).flatten(2).softmax(dim=2)
    found = torch.einsum("nkp,ncp->nkc", shares, x.flatten(2))
    return torch.einsum("nkc,ncyx->nkyx", found @ held["weight"].T, x)


def _mean(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return inputs[0].mean(dim=(2, 3))


def _detect(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    layer = Detect(held["scales"].detach().cpu().numpy(), told["stride"], told["top"])
    classes, beside = (torch.cat([x.flatten(2) for x in inputs[side::2]], dim=2) for side in (0, 1))
    grid = layer.grid(*(tuple(x.shape[1:]) for x in inputs))
    points, reaches = (torch.from_numpy(each).to(classes) for each in grid)
    reached = functional.relu(beside[:, :SIDES] * reaches)
    corners = points + torch.cat([-reached[:, :2], reached[:, 2:]], dim=1)
    scores = (classes.amax(dim=1).sigmoid() * beside[:, SIDES].sigmoid()).sqrt()
    rows = torch.cat([corners, scores[:, None], classes.argmax(dim=1)[:, None].to(classes)], dim=1).transpose(1, 2)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : told["top"]]
    return rows.take_along_dim(best[:, :, None], dim=1)


def _shift(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    return inputs[0] + held["value"]


def _ask(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    keys, values = _joined(inputs)
    return _answered(torch.einsum("hkc,ncp->nhkp", held["queries"], keys), values)[..., None]


def _attention(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    asking, (keys, values) = inputs[0], _joined(inputs[1:])
    queries, given = (torch.unflatten(x, 1, (told["heads"], -1)) for x in (asking.flatten(2), keys))
    answer = _answered(torch.einsum("nhcq,nhcp->nhqp", queries, given), values)
    return torch.unflatten(answer, 2, tuple(asking.shape[2:]))


def _compare(inputs: tuple[Tensor, ...], held: _Held, told: _Settings) -> Tensor:
    x, rows = inputs
    return torch.einsum("nck,ncyx->nkyx", rows.flatten(2), x) * float(told["scale"])


def _joined(pairs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values (n, C, places) of all pairs; features are one place."""
    flat = [x[..., None] if x.ndim == 2 else x.flatten(2) for x in pairs]
    return torch.cat(flat[::2], dim=2), torch.cat(flat[1::2], dim=2)


def _answered(asked: Tensor, values: Tensor) -> Tensor:
    apart = torch.unflatten(values, 1, (asked.shape[1], -1))
    return torch.einsum("nhkp,nhcp->nhck", asked.softmax(dim=3), apart).flatten(1, 2)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "sigmoid": torch.sigmoid,
}
_FORWARDS: dict[str, _Forward] = {
    "point": _point,
    "depthwise": _depthwise,
    "conv": _conv,
    "deconv": _deconv,
    "resize": _resize,
    "pool": _pool,
    "add": _add,
    "multiply": _multiply,
    "concat": _concat,
    "activation": _activation,
    "norm": _norm,
    "unit": _unit,
    "attend": _attend,
    "regions": _regions,
    "mean": _mean,
    "detect": _detect,
    "shift": _shift,
    "ask": _ask,
    "attention": _attention,
    "compare": _compare,
}
