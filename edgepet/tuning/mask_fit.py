"""Fit a head for masks, and what is tuned below it; the best epoch is the one of the largest mean overlap on val.

Losses are taken at a quarter of the input's size, where 255 counts for nothing. Needs the ``train`` extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgepet.images.masks import Masked, read_masks
from edgepet.measuring.overlap import confusion, mean_iou
from edgepet.reports.progress import Say
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.checkpoint import Keeper
from edgepet.tuning.computing import AT_ONCE, autocast, computing, inputs_of
from edgepet.tuning.dense import DenseModel
from edgepet.tuning.fit import Fit, LabelledPixels, Plan, Run
from edgepet.tuning.joint import JointAugmenter
from edgepet.tuning.mask_losses import cross_entropy, dice_loss, interim_loss, separation_loss
from edgepet.tuning.model import TunedModel
from edgepet.tuning.processes import ALONE, Processes

QUARTER = 4  # pixels of the input to one of the loss
_LOGITS_AT_ONCE = 1 << 26  # numbers at the input's size, of the images that are judged together


@dataclass(frozen=True, slots=True, eq=False)
class MaskedPixels(LabelledPixels):
    """Decoded images, uint8 (n, H, W, 3), and where the mask of each comes from; ``labels`` say nothing.

    ``rows`` are what a frozen network makes of the images, float32 (n, values), where that is remembered.
    """

    masks: tuple[Masked, ...] = ()
    rows: NpArray | None = None


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
    step = max(1, min(AT_ONCE, _LOGITS_AT_ONCE // (classes * size[0] * size[1])))
    for at in range(0, len(images), step):
        truth = read_masks(images.masks[at : at + step], size)
        small = torch.from_numpy(read_masks(images.masks[at : at + step], quarter(preprocess)).astype(np.int64))
        with torch.no_grad(), autocast(plan):
            logits = dense.classify_maps(_maps(dense, images, slice(at, at + step), preprocess, plan)).float()
        total += float(cross_entropy(logits, small.to(plan.device)))
        full = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        counts += confusion(full.argmax(1).cpu().numpy(), truth, classes)
    return mean_iou(counts), total / len(images)


def _maps(
    model: DenseModel, images: MaskedPixels, chosen: slice, preprocess: Preprocess, plan: Plan
) -> dict[str, Tensor]:
    if images.rows is not None:
        return model.from_rows(torch.from_numpy(np.array(images.rows[chosen])).to(plan.device))
    return model.maps(inputs_of(model, images.pixels[chosen], preprocess).to(plan.device))


def _all_maps(
    model: DenseModel, images: MaskedPixels, preprocess: Preprocess, plan: Plan
) -> Iterator[dict[str, Tensor]]:
    """The maps of all images, a few at a time, in eval mode and without gradients."""
    model.eval()
    step = max(1, min(AT_ONCE, _LOGITS_AT_ONCE // model.row_values))
    for at in range(0, len(images), step):
        with torch.no_grad(), autocast(plan):
            maps = _maps(model, images, slice(at, at + step), preprocess, plan)
        yield {name: each.float() for name, each in maps.items()}


def fill_rows(array: NpArray, model: DenseModel, images: MaskedPixels, preprocess: Preprocess, plan: Plan) -> None:
    """Compute the maps of all images once, into ``array`` (n, values)."""
    first = 0
    for maps in _all_maps(model, images, preprocess, plan):
        rows = model.rows(maps).cpu().numpy()
        array[first : first + len(rows)] = rows
        first += len(rows)


def standardize(model: DenseModel, images: MaskedPixels, preprocess: Preprocess, plan: Plan) -> None:
    """Fix what the head sees maps by to the mean and deviation of each channel over all places of ``images``."""
    levels = model.form.levels
    sums = [np.zeros((3, level.channels)) for level in levels]  # of values less the first batch's mean, and squared
    shifts = list[NpArray]()
    for maps in _all_maps(model, images, preprocess, plan):
        for number, level in enumerate(levels):
            seen = model.form.seen(number, maps[level.name]).cpu().double()
            if len(shifts) <= number:
                shifts.append(seen.mean((0, 2, 3)).numpy())
            moved = seen - torch.from_numpy(shifts[number])[:, None, None]
            places = np.full(level.channels, float(moved[:, 0].numel()))
            sums[number] += np.stack([places, moved.sum((0, 2, 3)).numpy(), moved.square().sum((0, 2, 3)).numpy()])
    means = [total[1] / total[0] for total in sums]
    deviations = [
        np.sqrt(np.maximum(total[2] / total[0] - mean**2, 0)) for total, mean in zip(sums, means, strict=True)
    ]
    model.form.standardize([mean + shift for mean, shift in zip(means, shifts, strict=True)], deviations)


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


class _MaskRun(Run):
    """One fit of a head for masks."""

    def __init__(
        self, model: DenseModel, train: MaskedPixels, val: MaskedPixels, preprocess: Preprocess, plan: Plan,
        processes: Processes, losses: Losses,
    ) -> None:  # fmt: skip
        self.losses, self.dense, self.images = losses, model, train
        super().__init__(model, train, val, preprocess, plan, processes, miou_and_loss)

    def prepare(self) -> None:
        self.joint = JointAugmenter(
            self.plan.augment, self.preprocess, batch_size=self.plan.batch_size, seed=self.plan.seed
        )
        if self.losses.weights is not None:
            self.weights = torch.tensor(self.losses.weights, device=self.plan.device)

    def look(self) -> None:
        if self.dense.fake_quant is not None:
            self.dense.fake_quant.train(True)
        standardize(self.dense, self.images, self.preprocess, self.plan)

    def backward(self, index: Tensor, part: Tensor) -> float:
        plan, chosen, size = self.plan, index[part].numpy(), quarter(self.preprocess)
        masks = [self.images.masks[place] for place in chosen.tolist()]
        if self.images.rows is not None:
            truth = torch.from_numpy(read_masks(masks, size).astype(np.int64))
            maps = self.dense.from_rows(torch.from_numpy(np.array(self.images.rows[chosen])).to(plan.device))
        else:
            moved = bool(plan.augment)
            read = read_masks(masks, self.preprocess.image_size if moved else size)
            at = (self.epoch, self.position)
            pixels, truth = self.joint(np.asarray(self.images.pixels[chosen]), read, part, at, size)
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
