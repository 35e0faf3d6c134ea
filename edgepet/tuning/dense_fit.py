"""What fits of heads that read maps have in common: maps that are remembered, and what maps are seen by.

Needs the ``train`` extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.computing import AT_ONCE, autocast, inputs_of
from edgepet.tuning.dense import DenseModel
from edgepet.tuning.fit import Judge, LabelledPixels, Plan, Run
from edgepet.tuning.processes import Processes

VALUES_AT_ONCE = 1 << 26  # numbers of the images that go through a network together: maps and logits are large


@dataclass(frozen=True, slots=True, eq=False)
class DensePixels(LabelledPixels):
    """Decoded images, uint8 (n, H, W, 3); ``labels`` say nothing.

    ``rows`` are what a frozen network makes of the images, float32 (n, values), where that is remembered.
    """

    rows: NpArray | None = field(default=None, kw_only=True)


def maps_of(
    model: DenseModel, images: DensePixels, chosen: slice, preprocess: Preprocess, plan: Plan
) -> dict[str, Tensor]:
    """The maps that the head reads of some images, remembered or computed."""
    if images.rows is not None:
        return model.from_rows(torch.from_numpy(np.array(images.rows[chosen])).to(plan.device))
    return model.maps(inputs_of(model, images.pixels[chosen], preprocess).to(plan.device))


def _all_maps(
    model: DenseModel, images: DensePixels, preprocess: Preprocess, plan: Plan
) -> Iterator[dict[str, Tensor]]:
    """The maps of all images, a few at a time, in eval mode and without gradients."""
    model.eval()
    step = max(1, min(AT_ONCE, VALUES_AT_ONCE // model.row_values))
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


def standardize(model: DenseModel, images: DensePixels, preprocess: Preprocess, plan: Plan) -> None:
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


class DenseRun(Run):
    """One fit of a head that reads maps; its own ``prepare`` and ``backward`` are to be added."""

    def __init__(
        self, model: DenseModel, train: DensePixels, val: DensePixels, preprocess: Preprocess, plan: Plan,
        processes: Processes, judge: Judge,
    ) -> None:  # fmt: skip
        self.dense, self.seen_images = model, train
        super().__init__(model, train, val, preprocess, plan, processes, judge)

    def look(self) -> None:
        """As of ``Run``: what the head sees maps by is fixed."""
        if self.dense.fake_quant is not None:
            self.dense.fake_quant.train(True)
        standardize(self.dense, self.seen_images, self.preprocess, self.plan)
