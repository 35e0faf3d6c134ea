"""Fit a head for masks, and what is tuned below it; the best epoch is the one of the largest mean overlap on val.

Losses are taken at a quarter of the input's size, where 255 counts for nothing. Needs the ``train`` extra.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgepet.images.masks import Masked, read_masks
from edgepet.measuring.overlap import confusion, mean_iou
from edgepet.reports.progress import Say
from edgepet.spec import Preprocess
from edgepet.tuning.checkpoint import Keeper
from edgepet.tuning.computing import AT_ONCE, autocast, computing
from edgepet.tuning.dense import DenseModel
from edgepet.tuning.dense_fit import VALUES_AT_ONCE, DensePixels, DenseRun, maps_of
from edgepet.tuning.fit import Fit, LabelledPixels, Plan
from edgepet.tuning.joint import JointAugmenter
from edgepet.tuning.mask_losses import cross_entropy, dice_loss, interim_loss, separation_loss
from edgepet.tuning.model import TunedModel
from edgepet.tuning.processes import ALONE, Processes

QUARTER = 4  # pixels of the input to one of the loss


@dataclass(frozen=True, slots=True, eq=False)
class MaskedPixels(DensePixels):
    """Images as of ``DensePixels``, and where the mask of each comes from."""

    masks: tuple[Masked, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What a mask's loss is made of: cross entropy, each class's times its ``weights``, and ``dice`` times Dice's."""

    weights: tuple[float, ...] | None = None
    dice: float = 0.0


def quarter(preprocess: Preprocess) -> tuple[int, int]:
    """Height and width at which losses are taken."""
    height, width = preprocess.image_size
    return (max(1, height // QUARTER), max(1, width // QUARTER))


def miou_and_loss(
    model: TunedModel, val: LabelledPixels, preprocess: Preprocess, plan: Plan, held: Tensor | None
) -> tuple[float, float]:
    """Mean intersection over union, at the input's size, and mean cross entropy of ``model`` on ``val``."""
    del held  # what is remembered are rows of ``val``
    model.eval()
    dense, images = cast(DenseModel, model), cast(MaskedPixels, val)
    classes, size = dense.form.classes, preprocess.image_size
    counts, total = np.zeros((classes, classes), np.int64), 0.0
    step = max(1, min(AT_ONCE, VALUES_AT_ONCE // (classes * size[0] * size[1])))
    for at in range(0, len(images), step):
        truth = read_masks(images.masks[at : at + step], size)
        small = torch.from_numpy(read_masks(images.masks[at : at + step], quarter(preprocess)).astype(np.int64))
        with torch.no_grad(), autocast(plan):
            logits = dense.classify_maps(maps_of(dense, images, slice(at, at + step), preprocess, plan)).float()
        total += float(cross_entropy(logits, small.to(plan.device)))
        full = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        counts += confusion(full.argmax(1).cpu().numpy(), truth, classes)
    return mean_iou(counts), total / len(images)


def fit_masks(
    model: DenseModel,
    train: MaskedPixels,
    val: MaskedPixels,
    preprocess: Preprocess,
    plan: Plan,
    say: Say,
    *,
    losses: Losses = Losses(),
    keeper: Keeper | None = None,
    processes: Processes = ALONE,
) -> Fit:
    """Train ``model`` and leave it at its best epoch by val mIoU, the lower loss deciding between equals.

    ``Fit.val`` has the mIoU, at the network's input size, where a classifier has its top-1. Else as ``fit.fit``.

    Raises:
        InputError, KeyboardInterrupt: as ``fit.fit``.
    """
    try:
        with computing(model, plan, learning=True):
            return _MaskRun(model, train, val, preprocess, plan, processes, losses).fit(say, keeper)
    finally:
        model.to("cpu").eval()


class _MaskRun(DenseRun):
    """One fit of a head for masks."""

    def __init__(
        self, model: DenseModel, train: MaskedPixels, val: MaskedPixels, preprocess: Preprocess, plan: Plan,
        processes: Processes, losses: Losses,
    ) -> None:  # fmt: skip
        self.losses, self.images = losses, train
        super().__init__(model, train, val, preprocess, plan, processes, miou_and_loss)

    def prepare(self) -> None:
        self.joint = JointAugmenter(
            self.plan.augment, self.preprocess, batch_size=self.plan.batch_size, seed=self.plan.seed
        )
        if self.losses.weights is not None:
            self.weights = torch.tensor(self.losses.weights, device=self.plan.device)

    def backward(self, index: Tensor, part: Tensor) -> float:
        plan, chosen, size = self.plan, index[part].numpy(), quarter(self.preprocess)
        masks = [self.images.masks[place] for place in chosen.tolist()]
        if self.images.rows is not None:
            truth = torch.from_numpy(read_masks(masks, size).astype(np.int64))
            maps = self.dense.from_rows(torch.from_numpy(np.array(self.images.rows[chosen])).to(plan.device))
        else:
            moved = bool(plan.augment)
            read = read_masks(masks, self.preprocess.image_size if moved else size)
            moves = self.joint.moves(part, (self.epoch, self.position))
            pixels = self.joint.images(np.asarray(self.images.pixels[chosen]), moves)
            truth = self.joint.masks(read, moves, size)
        truth = truth.to(plan.device)
        with autocast(plan):
            if self.images.rows is None:
                maps = self.dense.maps(pixels.to(plan.device))
            judged = self.dense.judged(maps)
        summed = cross_entropy(judged.logits, truth, self.weights)
        if judged.interim:
            summed = summed + interim_loss(judged.interim, truth, self.weights)
        if judged.separated is not None:
            summed = summed + separation_loss(judged.separated, truth)
        loss = summed / len(index)
        if self.losses.dice:
            loss = loss + self.losses.dice * dice_loss(judged.logits, truth) * (len(part) / len(index))
        torch.autograd.backward(loss)
        return loss.item()
