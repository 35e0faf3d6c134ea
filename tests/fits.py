"""Fits of tiny data that are ended on the way, with a checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgepet.networks.backbone import Backbone
from edgepet.reports.progress import Step
from edgepet.tuning.checkpoint import Keeper
from edgepet.tuning.fit import Fit, Judge, LabelledPixels, Plan, fit, top1_and_loss
from edgepet.tuning.model import TunedModel
from tests.tiny import random_pixels


class StopError(Exception):
    """What ends a fit here, in place of a killed process."""


def images(seed: int, n: int) -> LabelledPixels:
    return LabelledPixels(pixels=random_pixels(seed, n), labels=np.arange(n, dtype=np.int64) % 3)


def keeper(folder: Path, *, every_s: float = 0.0, **identity: object) -> Keeper:
    return Keeper(path=folder / "flowers.checkpoint", identity=identity, every_s=every_s)


def stepping(
    model: TunedModel,
    backbone: Backbone,
    plan: Plan,
    kept: Keeper | None,
    *,
    after: int | None,
    judge: Judge = top1_and_loss,
) -> Fit:
    """Fit ``model``, and raise ``StopError`` behind step ``after``."""
    seen = 0

    def say(step: Step) -> None:
        nonlocal seen
        seen += step.val_top1 is None
        if after is not None and seen > after:
            raise StopError

    return fit(model, images(1, 12), images(2, 6), backbone.preprocess, plan, say, keeper=kept, judge=judge)
