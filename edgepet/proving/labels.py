"""How well a network's labels fit those of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgepet.deltas.layer import sigmoid
from edgepet.errors import InputError
from edgepet.images.labels import LabelSet
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_batches
from edgepet.measuring.several_labels import LabelFit, label_fit
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray, Preprocess

AT_ONCE = 16  # images that go through the network together


def judge_labels(
    network: Callable[[NpArray], NpArray], images: LabelSet, preprocess: Preprocess, thresholds: tuple[float, ...]
) -> LabelFit:
    """Run ``network``, preprocessed images (n, 3, H, W) to logits (n, C), on ``images`` and judge their scores.

    Args:
        thresholds: of the labels; none are those that are best on these images.

    Raises:
        InputError: an image cannot be read any more.
    """
    parts = [network(normalize(pixels, preprocess)) for pixels in load_batches(images.images, preprocess, AT_ONCE)]
    return label_fit(sigmoid(np.concatenate(parts).astype(np.float64)), images.labels, thresholds)


def require_label_classes(images: LabelSet, labels: tuple[str, ...], data: Path, model: str) -> LabelSet:
    """``images`` with a column for each of the ``labels`` of ``model``; other data may order its labels otherwise.

    Raises:
        InputError: a label that the model has not.
    """
    others = [name for name in images.classes if name not in labels]
    if others:
        what = f"needs labels of {model}, {format_names(labels[:5])}"
        raise InputError(str(data), what, got=format_names(others[:5]))
    table = np.zeros((len(images), len(labels)), np.uint8)
    table[:, [labels.index(name) for name in images.classes]] = images.labels
    return LabelSet(labels, images.paths, table, images.passed_over)
