"""PACE: logits of an image shall agree whatever noise disturbs its layers. Needs the ``train`` extra.

Ni et al. 2024, arXiv:2409.17137: loss = CE(f1) + weight * mean over images of the sum over logits of (f1 - f2) ** 2, f1
under noise (``tuning.noise``) and f2 under noise drawn anew, with gradients of both; or, in the cheap form, f2 what f1
was in the epoch before, without a gradient. The first epoch of the cheap form has no second term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgepet.errors import InputError, option
from edgepet.methods import Branching, LinearProbe, Method
from edgepet.tuning.noise import Noise, falling
from edgepet.tuning.processes import Processes
from edgepet.tuning.recipes import CHEAP, FULL, Consistency, consistency

if TYPE_CHECKING:
    from edgepet.tuning.model import TunedModel

_TABLE = "consistency/logits"
_SEED = 0x50414345  # of this noise, apart from all else that is drawn by seed, epoch and place


def require_differences(text: str | None, method: Method) -> None:
    """Refuse a method that changes no layer's output: there is nothing to disturb.

    Raises:
        InputError: it is a branch beside the layers, or only a head.
    """
    if consistency(text) is None:
        return
    where, what = option("consistency"), "disturbs what a method changes of each layer, for methods that fold"
    if isinstance(method, Branching):
        fix = f"train without it, or choose a method that folds, as {option('method', 'ssf')}"
        raise InputError(where, what, got=f"{method.name}, whose branches stay beside the layers", fix=fix)
    if isinstance(method, LinearProbe):
        raise InputError(where, what, got=f"{method.name}, which changes none", fix="train it without")


def table_bytes(text: str | None, images: int, classes: int) -> int:
    """What the logits of all training images take in a checkpoint, where it keeps them."""
    asked = consistency(text)
    return 4 * images * classes if asked is not None and _remembers(asked) else 0


def _remembers(asked: Consistency) -> bool:
    return asked.form == CHEAP and asked.weight > 0


def pace_of(text: str | None, model: TunedModel, images: int, seed: int, device: str) -> Pace | None:
    """What ``text`` asks for, of a training of ``model`` on so many images; None for plain training."""
    asked = consistency(text)
    return None if asked is None else Pace(asked, model, images, seed, device)


class Pace:
    """The disturbed answers of one training, and how far from others they are.

    ``logits`` (images, classes) are those of each training image when it was seen last, in float32 on the CPU; NaN
    where it was not yet. They are there for the cheap form alone, and are all that steps to come depend on.
    """

    def __init__(self, asked: Consistency, model: TunedModel, images: int, seed: int, device: str) -> None:
        self.asked, self.model, self.seed, self.device = asked, model, seed, device
        self.sigmas = falling(asked.sigma, model.layers, model.sites)
        shape = (images, model.linear.out_features)
        self.logits = torch.full(shape, torch.nan) if _remembers(asked) else None
        self._seen = list[tuple[Tensor, Tensor]]()

    def answers(self, batch: Tensor, index: Tensor, part: Tensor, at: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Logits (n, C) of ``batch``, and its share of the second term's sum over the images ``index``.

        Args:
            batch: preprocessed images at the places ``part`` of ``index``.
            at: the epoch, and the step's place in it from 0.
        """
        other: Tensor | None = None
        if self.asked.form == FULL and self.asked.weight:
            gpus = [self.device] if self.device.startswith("cuda") else []
            with torch.random.fork_rng(gpus):  # what the method draws by itself is the same in both passes
                other = self._disturbed(batch, index, part, at, 1)
        logits = self._disturbed(batch, index, part, at, 0)
        if self.logits is not None:
            self._seen.append((part, logits.detach().cpu()))
            before = self.logits[index[part]].to(self.device)
            other = torch.where(before.isnan(), logits.detach(), before)
        if other is None:
            return logits, torch.zeros_like(logits).sum()
        return logits, self.asked.weight * (logits - other).square().sum()

    def remember(self, index: Tensor, processes: Processes) -> None:
        """Keep the logits that ``answers`` gave for the images ``index`` of a step that has ended, in all processes.

        Of an image that the step saw twice the last ones stay.
        """
        if self.logits is None:
            return
        rows = torch.zeros(len(index), self.logits.shape[1])
        for part, logits in self._seen:
            rows[part] = logits
        self._seen.clear()
        rows = processes.sum(rows.to(self.device)).cpu()
        self.logits.numpy()[index.numpy()] = rows.numpy()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {} if self.logits is None else {_TABLE: self.logits}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up ``state``.

        Raises:
            KeyError, ValueError: it is not there, or of other images.
        """
        if self.logits is None:
            return
        if tensors[_TABLE].shape != self.logits.shape:
            raise ValueError(f"{_TABLE} is {tuple(tensors[_TABLE].shape)}")
        self.logits = tensors[_TABLE]

    def _disturbed(self, batch: Tensor, index: Tensor, part: Tensor, at: tuple[int, int], turn: int) -> Tensor:
        noise = Noise(self.sigmas, len(index), part, (self.seed, _SEED, *at, turn), self.device)
        logits: Tensor = self.model(batch, noise)
        return logits.float()
