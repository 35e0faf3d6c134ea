"""Fit a detector, and what is tuned below it; the best epoch is the one of the largest AP on val.

Focal loss, generalized IoU and the binary cross entropy of how central a place is, all three torchvision's or torch's,
over the number of places that have an object: Tian et al. 2019, "FCOS", arXiv:1904.01355, section 3. Places lie in the
middle of their pixels, and limits of levels follow the input's size: both as torchvision's own
FCOS does not have it. Needs the ``train`` extra.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgepet.deltas.detection import SIDES, suppressed
from edgepet.errors import require
from edgepet.images.boxes import Boxes
from edgepet.measuring.average_precision import box_fit
from edgepet.networks.box_forms import BoxForm
from edgepet.reports.progress import Say
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.checkpoint import Keeper
from edgepet.tuning.computing import AT_ONCE, autocast, computing
from edgepet.tuning.dense import DenseModel
from edgepet.tuning.dense_fit import DensePixels, DenseRun, maps_of
from edgepet.tuning.fit import Fit, LabelledPixels, Plan
from edgepet.tuning.joint import JointAugmenter
from edgepet.tuning.model import TunedModel
from edgepet.tuning.processes import ALONE, Processes

RADIUS = 1.5  # strides around the middle of an object in which places have it
REACH = 8.0  # strides to the farthest side of an object, beyond which it is the next level's
USUAL = 448.0  # pixels of an input whose limits are these; smaller ones have smaller objects
NOWHERE, NOT_COUNTED = -1, -2  # in place of the number of an object


@dataclass(frozen=True, slots=True, eq=False)
class BoxedPixels(DensePixels):
    """Images as of ``DensePixels``, and the boxes of each in pixels of the network's input."""

    boxes: tuple[Boxes, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the places of all levels lie, x and y (places, 2), their strides, and what distances are theirs.

    An object is of the level at whose places the farthest side is more than ``low`` away and at most ``high``.
    """

    points: Tensor
    strides: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, form: BoxForm, size: tuple[int, int]) -> Places:
        """Those of ``form`` on inputs of ``size`` (height, width)."""
        parts, low = list[Tensor](), 0.0
        shrunk = min(1.0, min(size) / USUAL)
        for number, (height, width) in enumerate(form.sizes):
            stride = form.stride * form.sizes[0][0] / height
            high = math.inf if number == len(form.sizes) - 1 else REACH * stride * shrunk
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            points = (torch.stack([columns, rows], dim=-1).reshape(-1, 2) + 0.5) * stride
            parts.append(torch.cat([points, torch.tensor([stride, low, high]).expand(len(points), 3)], dim=1))
            low = high
        points, strides, lows, highs = torch.split(torch.cat(parts), [2, 1, 1, 1], dim=1)
        return cls(points, strides[:, 0], lows[:, 0], highs[:, 0])

    def objects(self, boxes: Boxes) -> Tensor:
        """The number of each place's object, int64 (places,), NOWHERE, or NOT_COUNTED within a crowd.

        A place has the object in which it lies, whose middle is within RADIUS strides and whose farthest side is of its
        level; of several the one with the smallest area.
        """
        found = torch.full((len(self.points),), NOWHERE)
        if not len(boxes):
            return found
        corners, crowds = torch.from_numpy(boxes.corners).float(), torch.from_numpy(boxes.crowds)
        sides = torch.cat([self.points[:, None] - corners[:, :2], corners[:, 2:] - self.points[:, None]], dim=2)
        inside, farthest = sides.amin(dim=2) > 0, sides.amax(dim=2)
        middles = (corners[:, :2] + corners[:, 2:]) / 2
        near = (self.points[:, None] - middles).abs().amax(dim=2) < RADIUS * self.strides[:, None]
        level = (farthest > self.low[:, None]) & (farthest <= self.high[:, None])
        areas = (corners[:, 2:] - corners[:, :2]).prod(dim=1).expand(len(self.points), -1)
        smallest, number = areas.where(inside & near & level & ~crowds, math.inf).min(dim=1)
        found[(inside & crowds).any(dim=1)] = NOT_COUNTED
        return torch.where(smallest < math.inf, number, found)


def detection_loss(given: Tensor, places: Places, scales: Tensor, boxes: Sequence[Boxes], objects: Tensor) -> Tensor:
    """The sum of the three losses over all places of all images; to be divided by the number that have an object.

    Args:
        given: (n, classes + 5, places), as ``BoxForm`` puts it out.
        scales: of each place's level, (places,).
        objects: of each image the number of each place's object, (n, places).
    """
    device, classes = given.device, given.shape[1] - SIDES - 1
    truth = torch.zeros(given.shape[0], given.shape[2], classes)
    corners = torch.zeros(given.shape[0], given.shape[2], SIDES)
    for image, each in enumerate(boxes):
        there = objects[image] >= 0
        numbers = objects[image][there]
        truth[image, there] = functional.one_hot(torch.from_numpy(each.labels)[numbers], classes).float()
        corners[image, there] = torch.from_numpy(each.corners).float()[numbers]
    truth, there = truth.to(device), (objects >= 0).to(device)
    raw = given.float().transpose(1, 2)
    ops = require("torchvision.ops", extra="train", purpose="the losses of boxes")
    focal: Tensor = ops.sigmoid_focal_loss(raw[..., :classes], truth, reduction="none")
    total = (focal * (objects != NOT_COUNTED).to(device)[..., None]).sum()
    points = places.points.to(device).expand(len(given), -1, -1)[there]
    target = corners.to(device)[there]
    reach = (scales * places.strides.to(device)).expand(len(given), -1)[there]
    sides = functional.relu(raw[..., classes : classes + SIDES][there] * reach[:, None])
    found = torch.cat([points - sides[:, :2], points + sides[:, 2:]], dim=1)
    total = total + cast(Tensor, ops.generalized_box_iou_loss(found, target, reduction="sum"))
    left, right = points - target[:, :2], target[:, 2:] - points
    central = (torch.minimum(left, right) / torch.maximum(left, right)).prod(dim=1).sqrt()
    beside = raw[..., -1][there]
    return total + functional.binary_cross_entropy_with_logits(beside, central, reduction="sum")


def scales_of(form: BoxForm) -> Tensor:
    """The scale of each place's level, (places,); gradients flow to it."""
    counts = torch.tensor([height * width for height, width in form.sizes], device=form.scales.device)
    return form.scales.repeat_interleave(counts)


def ap_and_loss(
    model: TunedModel, val: LabelledPixels, preprocess: Preprocess, plan: Plan, held: Tensor | None
) -> tuple[float, float]:
    """AP and mean loss of ``model`` on ``val``."""
    del held  # what is remembered are rows of ``val``
    model.eval()
    dense, images = cast(DenseModel, model), cast(BoxedPixels, val)
    form = cast(BoxForm, dense.form)
    places, found, total, positives = Places.of(form, preprocess.image_size), list[NpArray](), 0.0, 0
    for at in range(0, len(images), AT_ONCE):
        boxes = images.boxes[at : at + AT_ONCE]
        objects = torch.stack([places.objects(each) for each in boxes])
        with torch.no_grad(), autocast(plan):
            maps = maps_of(dense, images, slice(at, at + AT_ONCE), preprocess, plan)
            given = dense.classify_maps(maps).float()
            total += float(detection_loss(given, places, scales_of(form), boxes, objects))
        positives += int((objects >= 0).sum())
        found += [suppressed(each) for each in form.found(given.cpu().numpy())]
    judged = box_fit(found, images.boxes, form.classes, interval=False)
    return judged.ap, total / max(1, positives)


def fit_boxes(
    model: DenseModel,
    train: BoxedPixels,
    val: BoxedPixels,
    preprocess: Preprocess,
    plan: Plan,
    say: Say,
    *,
    keeper: Keeper | None = None,
    processes: Processes = ALONE,
) -> Fit:
    """Train ``model`` and leave it at its best epoch by val AP, the lower loss deciding between equals.

    ``Fit.val`` has the AP where a classifier has its top-1. Else as ``fit.fit``.

    Raises:
        InputError, KeyboardInterrupt: as ``fit.fit``.
        MissingError: the package that computes AP is not installed.
    """
    try:
        with computing(model, plan, learning=True):
            return _BoxRun(model, train, val, preprocess, plan, processes).fit(say, keeper)
    finally:
        model.to("cpu").eval()


class _BoxRun(DenseRun):
    """One fit of a detector."""

    def __init__(
        self, model: DenseModel, train: BoxedPixels, val: BoxedPixels, preprocess: Preprocess, plan: Plan,
        processes: Processes,
    ) -> None:  # fmt: skip
        self.images, self.form = train, cast(BoxForm, model.form)
        super().__init__(model, train, val, preprocess, plan, processes, ap_and_loss)

    def prepare(self) -> None:
        plan, size = self.plan, self.preprocess.image_size
        self.joint = JointAugmenter(plan.augment, self.preprocess, batch_size=plan.batch_size, seed=plan.seed)
        self.places = Places.of(self.form, size)

    def backward(self, index: Tensor, part: Tensor) -> float:
        plan, chosen = self.plan, index[part].numpy()
        moves = self.joint.moves(torch.arange(len(index)), (self.epoch, self.position))
        boxes = [
            move.boxes(self.images.boxes[place], self.preprocess.image_size)
            for move, place in zip(moves, index.tolist(), strict=True)
        ]
        objects = torch.stack([self.places.objects(each) for each in boxes])  # of the whole step: losses are over them
        with autocast(plan):
            if self.images.rows is not None:
                maps = self.dense.from_rows(torch.from_numpy(np.array(self.images.rows[chosen])).to(plan.device))
            else:
                own = [moves[place] for place in part.tolist()]
                pixels = self.joint.images(np.asarray(self.images.pixels[chosen]), own)
                maps = self.dense.maps(pixels.to(plan.device))
            given = self.dense.classify_maps(maps)
        mine = [boxes[place] for place in part.tolist()]
        summed = detection_loss(given, self.places, scales_of(self.form), mine, objects[part])
        loss = summed / max(1, int((objects >= 0).sum()))
        torch.autograd.backward(loss)
        return loss.item()
