"""Compute as an int8 or int4 backbone does while a method is tuned on it: the delta then repairs the rounding too.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, section 3, with the backbone frozen: its weights are what their codes stand for, and what its layers
read is rounded to 8 bits. Rounding has the gradient 1 within its range and 0 beyond (straight through).

A weight that is folded at every step is coded anew, as a device has to, unless its rows are only scaled: then the codes
stay. What a method adds on its activation path (LoRA's B A x) stays float, and so do branches, which read what is not
rounded. Needs the ``train`` extra.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from edgepet.calibration.qdq import ONE_SIDED
from edgepet.calibration.ranges import LEAST
from edgepet.calibration.slot_graphs import backbone_layers, coded_backbone
from edgepet.deltas.codes import HIGH, LOW, coded
from edgepet.errors import InputError, option
from edgepet.graphs.base import BaseGraph

BITS = {"int8": 8, "int4": 4}  # of weights; activations have 8
NEWEST = 0.01  # what a batch weighs in a range once a hundred were seen; until then all weigh the same


class FakeQuant(nn.Module):
    """The weights of a backbone's layers in codes, and the ranges of what these layers read.

    ``least`` and ``most`` (layers,) are running means of each batch's extremes, ``batches`` (layers,) how many were
    seen, in the order of the layers. They move in training mode, and in the first batch whatever the mode.
    """

    def __init__(self, graph: BaseGraph, precision: str) -> None:
        """Code the layers of ``graph``, which has no branches; ``precision`` is one of ``BITS``.

        Raises:
            InputError: none of its layers has codes.
            MissingError: onnx is not installed.
        """
        super().__init__()
        self.precision = precision
        layers = backbone_layers(graph)
        if not layers:
            what = f"has no linear layer or convolution that {precision} is for"
            raise InputError(graph.backbone, what, fix=f"tune it with {option('backbone_precision', 'fp32')}")
        fixed = {layer.reads for layer in layers if layer.padded or layer.norm}
        self._codes = coded_backbone(graph, BITS[precision])
        self._shifts = {layer.weight: layer.reads not in fixed for layer in layers}
        for name, code in self._codes.items():  # a checkpoint needs none of these: they follow from the backbone
            self.register_buffer(_key(name), torch.from_numpy(code.dense), persistent=False)
            if code.divisors is not None:
                self.register_buffer(_key(name, "divisors"), torch.from_numpy(code.divisors), persistent=False)
        self.least: Tensor
        self.most: Tensor
        self.batches: Tensor
        for kept in ("least", "most", "batches"):
            self.register_buffer(kept, torch.zeros(len(self._codes)))

    @property
    def weights(self) -> dict[str, Tensor]:
        """What the codes of each weight stand for, float32 (out, ...), by its name; not copied."""
        return {name: self.get_buffer(_key(name)) for name in self._codes}

    @property
    def ranges(self) -> tuple[Tensor, ...]:
        """Everything here that training changes: ``least``, ``most`` and ``batches`` themselves, (layers,) each."""
        return self.least, self.most, self.batches

    def recoded(self, name: str, weight: Tensor) -> Tensor:
        """``weight`` (out, ...) as its own codes give it back, in a new tensor; the gradient goes straight through."""
        with np.errstate(all="ignore"):  # a training that runs away is ended by its loss
            made = coded(weight.detach().float().cpu().numpy(), self._codes[name].divisors, BITS[self.precision])
            dense = torch.from_numpy(made.dense).to(weight)
        return dense + (weight - weight.detach())

    @contextlib.contextmanager
    def reading(self, module: nn.Module) -> Iterator[None]:
        """While the block runs, the layers of ``module`` read what is rounded; hooks on what they put out see that too.

        A layer that torch does not call as a module, as within ``nn.MultiheadAttention``, reads what it did.
        """
        parts = dict(module.named_modules())
        with contextlib.ExitStack() as stack:
            for index, name in enumerate(self._codes):
                part = parts.get(name.removesuffix(".weight"))
                if isinstance(part, (nn.Linear, nn.Conv2d)):
                    stack.callback(part.register_forward_pre_hook(self._hook(index, name)).remove)
            yield

    def _hook(self, index: int, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        divisors = self.get_buffer(_key(name, "divisors")) if self._codes[name].divisors is not None else None

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            del module
            read = inputs[0].float()  # bf16 has no more digits than the codes
            read = read if divisors is None else read / divisors
            if self.training or not self.batches[index]:
                self._follow(index, read.detach())
            scale, shift = range_of(self.least[index], self.most[index], may_shift=self._shifts[name])
            codes = rounded(read, scale, shift)
            return ((codes if divisors is None else codes * divisors).to(inputs[0].dtype), *inputs[1:])

        return before

    def _follow(self, index: int, values: Tensor) -> None:
        self.batches[index] += 1
        weight = (1 / self.batches[index]).clamp_min(NEWEST)
        for kept, seen in zip((self.least, self.most), torch.aminmax(values), strict=True):
            kept[index] += weight * (seen - kept[index])


def range_of(least: Tensor, most: Tensor, *, may_shift: bool) -> tuple[Tensor, Tensor]:
    """Scale and shift (``codes.Range``) of a tensor between two extremes, as ``calibration.qdq`` takes them.

    Both have the shape of ``least`` and ``most``, which are not modified.

    Args:
        may_shift: no layer that reads it pads it with zeros, and no layer norm puts it out.
    """
    low, high = least.clamp(max=0), most.clamp(min=0)
    scale, shift = torch.maximum(-low, high).clamp_min(LEAST) / HIGH, torch.zeros_like(low)
    if not may_shift:
        return scale, shift
    finer = (high - low).clamp_min(LEAST) / (HIGH - LOW)
    one_sided = -low < ONE_SIDED * high
    return torch.where(one_sided, finer, scale), torch.where(one_sided, low - LOW * finer, shift)


def rounded(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``codes.Range(scale, shift).rounded`` in torch, of any shape; ``values`` are not modified.

    The gradient is 1 where they have a code, 0 beyond.
    """
    return cast(Tensor, _Rounded.apply(values, scale, shift))


class _Rounded(torch.autograd.Function):
    """A function of its own because the backward pass then keeps one byte of an activation, not its values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        codes = torch.round((values - shift) / scale)
        ctx.save_for_backward((codes >= LOW) & (codes <= HIGH))
        return codes.clamp(LOW, HIGH) * scale + shift

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def _key(weight: str, *more: str) -> str:
    """The name of a buffer: torch allows no dots."""
    return "/".join((*weight.split("."), *more))
