"""What a head for masks is fitted to: cross entropy of every pixel, and mean overlap by which epochs are compared.

Losses are taken at a quarter of the input's size, where 255 counts for nothing. Needs the ``train`` extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgepet.deltas.heads import Answer
from edgepet.images.masks import Masked, read_masks
from edgepet.measuring.overlap import confusion, mean_iou
from edgepet.networks.head_forms import MapForm
from edgepet.spec import Preprocess
from edgepet.tuning.computing import AT_ONCE
from edgepet.tuning.dense import DenseModel, Judged
from edgepet.tuning.dense_fit import VALUES_AT_ONCE, Objective, Taken
from edgepet.tuning.fit import Plan
from edgepet.tuning.joint import moved_masks
from edgepet.tuning.mask_losses import cross_entropy, dice_loss, interim_loss, separation_loss

QUARTER = 4  # pixels of the input to one of the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What a mask's loss is made of: cross entropy, each class's times its ``weights``, and ``dice`` times Dice's."""

    weights: tuple[float, ...] | None = None
    dice: float = 0.0


def quarter(preprocess: Preprocess) -> tuple[int, int]:
    """Height and width at which losses are taken."""
    height, width = preprocess.image_size
    return (max(1, height // QUARTER), max(1, width // QUARTER))


class MaskObjective(Objective[Judged]):
    """A class for every pixel; truths are ``Masked``."""

    answer: ClassVar[Answer] = "mask"

    def __init__(
        self, form: MapForm, preprocess: Preprocess, plan: Plan, *, weight: float = 1.0, losses: Losses = Losses()
    ) -> None:
        super().__init__(form, preprocess, plan, weight=weight)
        self.dice = losses.dice
        self.weights = None if losses.weights is None else torch.tensor(losses.weights, device=plan.device)
        height, width = preprocess.image_size
        self.at_once = max(1, min(AT_ONCE, VALUES_AT_ONCE // (form.classes * height * width)))

    def given(self, model: DenseModel, maps: Mapping[str, Tensor]) -> Judged:
        """As of ``Objective``: what branches and a separation find on the way is judged too."""
        return model.judged(maps)

    def loss(self, given: Judged, taken: Taken) -> Tensor:
        """As of ``Objective``."""
        size, moves = quarter(self.preprocess), [taken.moves[place] for place in taken.part]
        masks = [taken.truths[place] for place in taken.part]
        read = read_masks(masks, self.preprocess.image_size if self.plan.augment else size)
        truth = moved_masks(read, moves, size).to(self.plan.device)
        summed = cross_entropy(given.logits, truth, self.weights)
        if given.interim:
            summed = summed + interim_loss(given.interim, truth, self.weights)
        if given.separated is not None:
            summed = summed + separation_loss(given.separated, truth)
        loss = summed / len(taken.truths)
        if self.dice:
            loss = loss + self.dice * dice_loss(given.logits, truth) * (len(taken.part) / len(taken.truths))
        return loss

    def meter(self, truths: Sequence[Masked]) -> _MaskMeter:
        """As of ``Objective``."""
        return _MaskMeter(truths, self.form.classes, self.preprocess)


class _MaskMeter:
    """Mean intersection over union at the input's size, and mean cross entropy."""

    def __init__(self, truths: Sequence[Masked], classes: int, preprocess: Preprocess) -> None:
        self._truths, self._classes, self._preprocess = truths, classes, preprocess
        self._counts, self._total = np.zeros((classes, classes), np.int64), 0.0

    def add(self, given: Tensor, chosen: slice) -> None:
        size, masks = self._preprocess.image_size, self._truths[chosen]
        small = torch.from_numpy(read_masks(masks, quarter(self._preprocess)).astype(np.int64))
        self._total += float(cross_entropy(given, small.to(given.device)))
        full = functional.interpolate(given, size=size, mode="bilinear", align_corners=False)
        self._counts += confusion(full.argmax(1).cpu().numpy(), read_masks(masks, size), self._classes)

    def result(self) -> tuple[float, float]:
        return mean_iou(self._counts), self._total / len(self._truths)
