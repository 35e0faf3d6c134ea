"""Fit heads that read maps, and what is tuned below them: what all of them have in common.

What depends on what a head answers, its truths, its loss and its judge, is an ``Objective``. Needs the ``train`` extra.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from edgepet.deltas.heads import Answer
from edgepet.networks.head_forms import MapForm
from edgepet.reports.progress import Say
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.checkpoint import Keeper
from edgepet.tuning.computing import AT_ONCE, at_once, autocast, computing, inputs_of
from edgepet.tuning.dense import DenseModel
from edgepet.tuning.fit import Fit, Judge, LabelledPixels, Plan, Run
from edgepet.tuning.joint import JointAugmenter, Move
from edgepet.tuning.model import TunedModel
from edgepet.tuning.processes import ALONE, Processes

VALUES_AT_ONCE = 1 << 26  # numbers of the images that go through a network together: maps and logits are large

GivenT = TypeVar("GivenT")


@dataclass(frozen=True, slots=True, eq=False)
class DensePixels(LabelledPixels):
    """Decoded images, uint8 (n, H, W, 3); ``labels`` say nothing, ``truths`` have one of each answer for each image.

    ``rows`` are what a frozen network makes of the images, float32 (n, values), where that is remembered.
    """

    truths: Mapping[Answer, Sequence[Any]] = field(default_factory=dict)
    rows: NpArray | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What of a training's images a step takes: the truths of all images of the ``step``, and how each is moved.

    ``part`` are the places among them whose loss is asked for: the step's may be taken in several parts.
    """

    truths: Sequence[Any]
    moves: Sequence[Move]
    part: tuple[int, ...]


class Meter(Protocol):
    """What judges an epoch's head on val."""

    def add(self, given: Tensor, chosen: slice) -> None:
        """What the head puts out for the images ``chosen``, on the plan's device."""

    def result(self) -> tuple[float, float]:
        """Its metric, a fraction of 1, and its mean loss."""


class Objective(ABC, Generic[GivenT]):
    """What a head is fitted to: a loss, which counts ``weight`` among others, and what its epochs are judged by."""

    answer: ClassVar[Answer]
    at_once: int = AT_ONCE  # images that are judged together

    def __init__(self, form: MapForm, preprocess: Preprocess, plan: Plan, *, weight: float = 1.0) -> None:
        self.form, self.preprocess, self.plan, self.weight = form, preprocess, plan, weight

    def weighing(self, weight: float) -> Self:
        """The same, whose loss counts ``weight``."""
        self.weight = weight
        return self

    @abstractmethod
    def given(self, model: DenseModel, maps: Mapping[str, Tensor]) -> GivenT:
        """All of a step's images that the loss is made of."""

    @abstractmethod
    def loss(self, given: GivenT, taken: Taken) -> Tensor:
        """What the images in ``taken.part`` have in the mean loss over all of the step."""

    @abstractmethod
    def meter(self, truths: Sequence[Any]) -> Meter:
        """A judge of images with these ``truths``."""


def maps_of(
    model: DenseModel, images: DensePixels, chosen: slice, preprocess: Preprocess, plan: Plan
) -> dict[str, Tensor]:
    """The maps that the heads read of some images, remembered or computed."""
    if images.rows is not None:
        return model.from_rows(torch.from_numpy(np.array(images.rows[chosen])).to(plan.device))
    return model.maps(inputs_of(model, images.pixels[chosen], preprocess).to(plan.device))


def _all_maps(
    model: DenseModel, images: DensePixels, preprocess: Preprocess, plan: Plan
) -> Iterator[dict[str, Tensor]]:
    """The maps of all images, a few at a time, in eval mode and without gradients."""
    model.eval()
    step = max(1, min(at_once(preprocess), VALUES_AT_ONCE // model.row_values))
    for at in range(0, len(images), step):
        with torch.no_grad(), autocast(plan):
            maps = maps_of(model, images, slice(at, at + step), preprocess, plan)
        yield {name: each.float() for name, each in maps.items()}


def fill_rows(array: NpArray, model: DenseModel, images: DensePixels, preprocess: Preprocess, plan: Plan) -> None:
    """Compute the maps of all images once, into ``array`` (n, values)."""
    first = 0
    for maps in _all_maps(model, images, preprocess, plan):
        rows = model.rows(maps).cpu().numpy()
        array[first : first + len(rows)] = rows
        first += len(rows)


class _Statistics:
    """Mean and deviation of each channel that a form sees, over all places of images that come one after another."""

    def __init__(self, form: MapForm) -> None:
        self._form, self._shifts = form, list[NpArray]()
        self._sums = [np.zeros((3, each.channels)) for each in form.levels]  # of values less the first batch's mean

    def add(self, maps: Mapping[str, Tensor]) -> None:
        for number, level in enumerate(self._form.levels):
            seen = self._form.seen(number, maps[level.name]).cpu().double()
            if len(self._shifts) <= number:
                self._shifts.append(seen.mean((0, 2, 3)).numpy())
            moved = seen - torch.from_numpy(self._shifts[number])[:, None, None]
            places = np.full(level.channels, float(moved[:, 0].numel()))
            self._sums[number] += np.stack(
                [places, moved.sum((0, 2, 3)).numpy(), moved.square().sum((0, 2, 3)).numpy()]
            )

    def fix(self) -> None:
        """Standardise what the form sees by them."""
        means = [total[1] / total[0] for total in self._sums]
        deviations = [
            np.sqrt(np.maximum(total[2] / total[0] - mean**2, 0)) for total, mean in zip(self._sums, means, strict=True)
        ]
        shifted = [mean + shift for mean, shift in zip(means, self._shifts, strict=True)]
        self._form.standardize(shifted, deviations)


def standardize(model: DenseModel, images: DensePixels, preprocess: Preprocess, plan: Plan) -> None:
    """Fix what each head sees maps by to the mean and deviation of each channel over all places of ``images``."""
    found = [_Statistics(form) for form in model.forms]
    for maps in _all_maps(model, images, preprocess, plan):
        for each in found:
            each.add(maps)
    for each in found:
        each.fix()


def judged_by(objectives: Sequence[Objective[Any]]) -> Judge:
    """What compares epochs: the mean of the heads' metrics, and the sum of their mean losses, each times its weight."""

    def judge(
        model: TunedModel, val: LabelledPixels, preprocess: Preprocess, plan: Plan, held: Tensor | None
    ) -> tuple[float, float]:
        del held  # what is remembered are rows of ``val``
        model.eval()
        dense, images = cast(DenseModel, model), cast(DensePixels, val)
        meters = [each.meter(images.truths[each.answer]) for each in objectives]
        step = min(at_once(preprocess), *(each.at_once for each in objectives))
        for at in range(0, len(images), step):
            chosen = slice(at, at + step)
            with torch.no_grad(), autocast(plan):
                maps = maps_of(dense, images, chosen, preprocess, plan)
                found = [each.form(maps).float() for each in objectives]
            for meter, given in zip(meters, found, strict=True):
                meter.add(given, chosen)
        results = [meter.result() for meter in meters]
        metric = float(np.mean([metric for metric, _ in results]))
        return metric, sum(each.weight * loss for each, (_, loss) in zip(objectives, results, strict=True))

    return judge


def fit_dense(
    model: DenseModel,
    train: DensePixels,
    val: DensePixels,
    preprocess: Preprocess,
    plan: Plan,
    say: Say,
    *,
    objectives: Sequence[Objective[Any]],
    keeper: Keeper | None = None,
    processes: Processes = ALONE,
) -> Fit:
    """Train ``model`` and leave it at its best epoch by the mean of its heads' metrics on val, at the network's size.

    The lower loss decides between equals. ``Fit.val`` has that mean where a classifier has its top-1. Else as
    ``fit.fit``.

    Raises:
        InputError, KeyboardInterrupt: as ``fit.fit``.
        MissingError: a package that judges a head is not installed.
    """
    try:
        with computing(model, plan, learning=True):
            return _DenseRun(model, train, val, preprocess, plan, processes, objectives).fit(say, keeper)
    finally:
        model.to("cpu").eval()


class _DenseRun(Run):
    """One fit of heads that read maps."""

    def __init__(
        self, model: DenseModel, train: DensePixels, val: DensePixels, preprocess: Preprocess, plan: Plan,
        processes: Processes, objectives: Sequence[Objective[Any]],
    ) -> None:  # fmt: skip
        self.dense, self.images, self.objectives = model, train, objectives
        super().__init__(model, train, val, preprocess, plan, processes, judged_by(objectives))

    def prepare(self) -> None:
        plan = self.plan
        self.joint = JointAugmenter(plan.augment, self.preprocess, batch_size=plan.batch_size, seed=plan.seed)

    def look(self) -> None:
        """As of ``Run``: what the heads see maps by is fixed."""
        if self.dense.fake_quant is not None:
            self.dense.fake_quant.train(True)
        standardize(self.dense, self.images, self.preprocess, self.plan)

    def backward(self, index: Tensor, part: Tensor) -> float:
        plan, places, chosen = self.plan, index.tolist(), tuple(part.tolist())
        moves = self.joint.moves(torch.arange(len(places)), (self.epoch, self.position))
        own = index[part].numpy()
        with autocast(plan):
            if self.images.rows is not None:
                maps = self.dense.from_rows(torch.from_numpy(np.array(self.images.rows[own])).to(plan.device))
            else:
                pixels = self.joint.images(np.asarray(self.images.pixels[own]), [moves[place] for place in chosen])
                maps = self.dense.maps(pixels.to(plan.device))
            found = [each.given(self.dense, maps) for each in self.objectives]
        losses = list[Tensor]()
        for each, given in zip(self.objectives, found, strict=True):
            truths = self.images.truths[each.answer]
            taken = Taken(truths=[truths[place] for place in places], moves=moves, part=chosen)
            losses.append(each.weight * each.loss(given, taken))
        loss = torch.stack(losses).sum()
        torch.autograd.backward(loss)
        return loss.item()
