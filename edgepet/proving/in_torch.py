"""A pack as networks in torch: plain, with branches, with heads that read maps, and as it was tuned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from edgepet.deltas.joined import apart
from edgepet.deltas.layers import Shape
from edgepet.deltas.merge import task_tensors
from edgepet.device.map_heads import map_heads_of
from edgepet.errors import InputError
from edgepet.methods.settings import restored
from edgepet.proving.subject import Subject
from edgepet.spec import NpArray
from edgepet.tuning.work_folder import work_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgepet.tuning.model import TunedModel


def plain_network(subject: Subject, *, merged: bool = True) -> nn.Module:
    """A torch module that knows nothing of edgepet, with the merged weights loaded strictly, or the backbone's own.

    Raises:
        InputError: weights are to be ``merged``, and the pack has branches.
    """
    import torch

    backbone, head = subject.backbone, subject.delta.head
    module = backbone.with_head(head)
    weights = subject.dense_weights if merged else backbone.named_weights(backbone.tensors, head)
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in weights.items()}
    module.load_state_dict(state, strict=True)
    return module


def branched_network(subject: Subject) -> nn.Module:
    """A torch module of the pack as stored: a copy of the backbone with its updates folded in, branches and head."""
    import torch

    from edgepet.networks.graft import Grafted, in_torch

    tensors, head = task_tensors(subject.backbone.base, subject.delta), subject.delta.head
    body = copy.deepcopy(subject.backbone.module)
    body.load_state_dict({name: torch.from_numpy(np.array(tensors[name])) for name in body.state_dict()}, strict=True)
    last = torch.nn.Linear(*head.weight.shape[::-1])
    values = {"weight": head.weight, "bias": head.bias}
    last.load_state_dict({name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()})
    branches = in_torch([branch.with_tensors(tensors) for branch in subject.delta.branches])
    return torch.nn.Sequential(Grafted(body, branches), last).eval()


def _dense_network(
    subject: Subject, *, plain: bool
) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[Shape, ...]]:
    """A pack with heads that read maps as stored, or with ``plain`` its heads alone on the backbone's own maps."""
    import torch

    from edgepet.tuning.dense import MergedHead

    delta = replace(subject.delta, updates=(), branches=()) if plain else subject.delta
    network = MergedHead(subject.backbone, delta)
    return (lambda images: torch.from_numpy(network(images.numpy()))), network.shapes


def tuned_network(subject: Subject) -> TunedModel:
    """The network as it was trained, through its activation path, from the work folder beside the pack.

    Raises:
        InputError: there is no work folder that belongs to the pack, or it is damaged.
    """
    from edgepet.tuning.model import TunedModel

    work = subject.work
    if work is None:
        raise InputError(
            str(work_folder(subject.path)), "is needed for the tuned network", fix="train again, or leave out tuned"
        )
    method = restored(work.method, work.settings)
    model = TunedModel(subject.backbone, method, len(work.head.bias))
    unlike = model.unlike(work.tensors)
    if unlike or work.head.weight.shape[1] != subject.backbone.width:
        got = ", ".join(unlike[:3]) or f"a head for {work.head.weight.shape[1]} features"
        raise InputError(str(work_folder(subject.path)), "is damaged", got=got, fix="train again, or delete the folder")
    model.load(work.tensors, work.head)
    return model.eval()


class TorchNetwork:
    """A pack in torch fp32: "tuned" as it was trained, "merged", with "branches", or the "plain" backbone and head.

    It takes float32 images (n, 3, H, W) or clips and puts out logits (n, C). ``threads`` are torch's of the whole
    process until ``close``; None leaves them.

    Raises:
        InputError: as ``tuned_network`` and ``plain_network``.
    """

    def __init__(self, subject: Subject, mode: str, *, threads: int | None = None) -> None:
        import torch

        self._torch, self._threads_before = torch, torch.get_num_threads()
        self._module: nn.Module | Callable[[torch.Tensor], torch.Tensor] | None  # until it is closed
        self._shapes: tuple[Shape, ...] = ()
        if map_heads_of(subject.delta):
            self._module, self._shapes = _dense_network(subject, plain=mode == "plain")
        elif mode == "tuned":
            self._module = tuned_network(subject)
        elif mode == "branches":
            self._module = branched_network(subject)
        else:
            self._module = plain_network(subject, merged=mode == "merged")
        if threads is not None:
            torch.set_num_threads(threads)  # the process's: given back by close

    def __call__(self, images: NpArray) -> NpArray:
        with self._torch.inference_mode():
            module = cast("Callable[[torch.Tensor], torch.Tensor]", self._module)
            output: NpArray = module(self._torch.from_numpy(images)).numpy()
        return output

    def each(self, images: NpArray) -> tuple[NpArray, ...]:
        """What each head gives."""
        answers = self(images)
        return apart(answers, self._shapes) if self._shapes else (answers,)

    def close(self) -> None:
        """Give the network back, and torch its number of threads."""
        self._module = None
        self._torch.set_num_threads(self._threads_before)
