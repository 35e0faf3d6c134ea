"""What a detector is fitted to: three losses, and average precision by which epochs are compared.

Focal loss, generalized IoU and the binary cross entropy of how central a place is, all three torchvision's or torch's,
over the number of places that have an object: Tian et al. 2019, "FCOS", arXiv:1904.01355, section 3. Places lie in the
middle of their pixels, and limits of levels follow the input's size: both as torchvision's own
FCOS does not have it. Needs the ``train`` extra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from edgepet.deltas.detection import SIDES, suppressed
from edgepet.deltas.heads import Answer
from edgepet.errors import require
from edgepet.images.boxes import Boxes
from edgepet.measuring.average_precision import box_fit
from edgepet.networks.box_forms import BoxForm
from edgepet.networks.head_forms import MapForm
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.dense import DenseModel
from edgepet.tuning.dense_fit import Objective, Taken
from edgepet.tuning.fit import Plan

RADIUS = 1.5  # strides around the middle of an object in which places have it
REACH = 8.0  # strides to the farthest side of an object, beyond which it is the next level's
USUAL = 448.0  # pixels of an input whose limits are these; smaller ones have smaller objects
NOWHERE, NOT_COUNTED = -1, -2  # in place of the number of an object


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


class BoxObjective(Objective[Tensor]):
    """A box around every object; truths are ``Boxes`` in pixels of the network's input."""

    answer: ClassVar[Answer] = "boxes"

    def __init__(self, form: MapForm, preprocess: Preprocess, plan: Plan, *, weight: float = 1.0) -> None:
        super().__init__(form, preprocess, plan, weight=weight)
        self._boxes = cast(BoxForm, form)
        self._places = Places.of(self._boxes, preprocess.image_size)

    def given(self, model: DenseModel, maps: Mapping[str, Tensor]) -> Tensor:
        """As of ``Objective``."""
        given: Tensor = self.form(maps)
        return given

    def loss(self, given: Tensor, taken: Taken) -> Tensor:
        """As of ``Objective``: over the places of the whole step that have an object."""
        size, pairs = self.preprocess.image_size, zip(taken.moves, taken.truths, strict=True)
        boxes = [move.boxes(each, size) for move, each in pairs]
        objects = torch.stack([self._places.objects(each) for each in boxes])
        mine = [boxes[place] for place in taken.part]
        summed = detection_loss(given, self._places, scales_of(self._boxes), mine, objects[list(taken.part)])
        return summed / max(1, int((objects >= 0).sum()))

    def meter(self, truths: Sequence[Boxes]) -> _BoxMeter:
        """As of ``Objective``."""
        return _BoxMeter(truths, self._boxes, self._places)


class _BoxMeter:
    """AP and mean loss."""

    def __init__(self, truths: Sequence[Boxes], form: BoxForm, places: Places) -> None:
        self._truths, self._form, self._places = truths, form, places
        self._found, self._total, self._positives = list[NpArray](), 0.0, 0

    def add(self, given: Tensor, chosen: slice) -> None:
        boxes = self._truths[chosen]
        objects = torch.stack([self._places.objects(each) for each in boxes])
        with torch.no_grad():
            self._total += float(detection_loss(given, self._places, scales_of(self._form), boxes, objects))
        self._positives += int((objects >= 0).sum())
        self._found += [suppressed(each) for each in self._form.found(given.cpu().numpy())]

    def result(self) -> tuple[float, float]:
        judged = box_fit(self._found, self._truths, self._form.classes, interval=False)
        return judged.ap, self._total / max(1, self._positives)
