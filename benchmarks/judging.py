"""Which test images a task answers rightly: with a table's row, so that any two trainings can be compared in pairs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.spec import NpArray

if TYPE_CHECKING:
    from edgepet.deltas.delta import Delta
    from edgepet.networks.backbone import Backbone

Z = 1.959964  # of a 95 % interval


def tested_images(delta: Delta, data: Path, count: int | None) -> tuple[NpArray, NpArray]:
    """The test split as ``delta`` takes it, thinned evenly to ``count`` images, and its labels in the pack's order."""
    from edgepet.images.preprocess import normalize
    from edgepet.images.sets import load_set, open_split

    test = open_split(data, "test")
    index = np.unique(np.linspace(0, len(test) - 1, count or len(test)).round().astype(int))
    pixels, labels = load_set(test.at(index.tolist()), delta.preprocess)
    order = np.array([delta.labels.index(name) for name in test.classes])
    return normalize(pixels, delta.preprocess), order[labels]


def logits_on_device(backbone: Backbone, delta: Delta, images: NpArray) -> NpArray:
    """Logits (n, C) as a device's ONNX Runtime puts them out, the task merged."""
    from edgepet.device.runtime import open_task
    from edgepet.exporters.trace import base_graph
    from edgepet.images.batches import batched

    with open_task(base_graph(backbone, delta.branches), delta) as network:
        return batched(network, images)


def right_answers(backbone: Backbone, delta: Delta, data: Path) -> NpArray:
    """Of each test image whether the answer is its label: bool (n,)."""
    images, labels = tested_images(delta, data, None)
    right: NpArray = logits_on_device(backbone, delta, images).argmax(axis=1) == labels
    return right


def written(right: NpArray) -> str:
    """As JSON has it: a bit for each image, in base 64."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def read(text: str, count: int) -> NpArray:
    """What ``written`` wrote of ``count`` images."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


def points_between(first: Mapping[str, Sequence[NpArray]], second: Mapping[str, Sequence[NpArray]]) -> list[float]:
    """By how many points the second answers more images rightly on the mean over tasks: mean, low and high.

    Both have by task what is right of the same images, once for each seed. The 95 % interval is of the images, which
    are paired; that seeds differ is in it only as far as they differ on these.
    """
    apart = [np.mean(second[task], axis=0) - np.mean(first[task], axis=0) for task in first]
    mean = float(np.mean([each.mean() for each in apart]))
    spread = float(np.sqrt(sum(each.var(ddof=1) / len(each) for each in apart))) / len(apart)
    return [100 * mean, 100 * (mean - Z * spread), 100 * (mean + Z * spread)]
