"""Packs with a detector that nobody trained: every number drawn from a seed."""

from __future__ import annotations

import numpy as np

from edgepet.deltas.delta import Delta
from edgepet.geometry import overlaps
from edgepet.methods import METHODS
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.spec import NpArray
from edgepet.tuning.dense import DenseModel, extract_dense
from tests.mask_packs import moved_model

LABELS = ("round", "square")
FCOS = Form(name="fcos", width=8, depth=1)


def box_delta(backbone: Backbone, method: str, *, form: Form = FCOS, task: str | None = None, seed: int = 3) -> Delta:
    """A task of boxes, its method and its head away from where they start: scores of all sizes."""
    settings = {"length": 3} if method.startswith("vpt") else {}
    model = DenseModel(backbone, METHODS[method](**settings), form, len(LABELS), seed=1)
    return extract_dense(moved_model(model, seed), backbone, task=task or method, labels=LABELS)


def require_same_boxes(got: NpArray, expected: NpArray, *, above: float = 0.05, apart: float = 1e-3) -> None:
    """Each box (m, 6) of one with a score above ``above`` is in the other: IoU of 0.99, one class, one score."""
    assert got.shape == expected.shape
    for one, other in ((got, expected), (expected, got)):
        told = one[one[:, 4] > above]
        same = (
            (overlaps(told[:, :4], other[:, :4]) >= 0.99)
            & (np.abs(told[:, None, 4] - other[None, :, 4]) <= apart)
            & (told[:, None, 5] == other[None, :, 5])
        )
        flat = ((told[:, 2:4] - told[:, :2]).min(axis=1) <= 0) if len(told) else np.zeros(0, bool)  # no area, no IoU
        assert (same.any(axis=1) | flat).all()
