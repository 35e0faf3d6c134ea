"""How well a network's boxes fit those of images, each in the pixels of its own image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgepet.deltas.detection import boxes_in, suppressed
from edgepet.errors import InputError
from edgepet.images.boxes import BoxSet
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_batches
from edgepet.measuring.average_precision import BoxFit, box_fit
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray, Preprocess

AT_ONCE = 16  # images that go through the network together


def judge_boxes(network: Callable[[NpArray], NpArray], images: BoxSet, preprocess: Preprocess, classes: int) -> BoxFit:
    """Run ``network``, preprocessed images (n, 3, H, W) to boxes (n, m, 6), on ``images``; judge those that are kept.

    Args:
        images: as ``check_boxes`` made them.

    Raises:
        InputError: an image cannot be read any more.
        MissingError: the package that computes AP is not installed.
    """
    found, first = list[NpArray](), 0
    for pixels in load_batches(images.images, preprocess, AT_ONCE):
        sizes = images.extents[first : first + len(pixels)]
        for each, (height, width) in zip(network(normalize(pixels, preprocess)), sizes, strict=True):
            found.append(boxes_in(suppressed(each), preprocess.image_size, (int(height), int(width))))
        first += len(pixels)
    return box_fit(found, images.boxes, classes)


def require_box_classes(images: BoxSet, labels: tuple[str, ...], data: Path, model: str) -> BoxSet:
    """``images`` with the numbers that ``labels`` of ``model`` have; other data may order its classes otherwise.

    Raises:
        InputError: a class that the model has not.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    others = [name for name in images.classes if name not in numbers]
    if others:
        what = f"needs classes of {model}, {format_names(labels[:5])}"
        raise InputError(str(data), what, got=format_names(others[:5]))
    return images.renumbered(labels, [numbers[name] for name in images.classes])
