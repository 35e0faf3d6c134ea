"""How well a network's masks fit those of images, each compared as large as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgepet.deltas.heads import mask_of
from edgepet.errors import InputError
from edgepet.images.masks import MaskSet, resized
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_batches
from edgepet.measuring.overlap import Overlap, confusion, overlap
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray, Preprocess

AT_ONCE = 8  # images that go through the network together: their logits are large


def judge_masks(
    network: Callable[[NpArray], NpArray], images: MaskSet, preprocess: Preprocess, classes: int
) -> Overlap:
    """Run ``network``, preprocessed images (n, 3, H, W) to logits (n, C, h, w), on ``images`` and judge its masks.

    A mask is made at the input's size and brought to that of the image, where each pixel has the nearest one's class.

    Raises:
        InputError: an image or a mask cannot be read any more.
    """
    matrices, first = list[NpArray](), 0
    for pixels in load_batches(images.images, preprocess, AT_ONCE):
        answers = mask_of(network(normalize(pixels, preprocess)), preprocess.image_size)
        for answer, masked in zip(answers, images.masks[first : first + len(answers)], strict=True):
            truth = masked.read()
            matrices.append(confusion(resized(answer, (truth.shape[0], truth.shape[1])), truth, classes))
        first += len(answers)
    return overlap(matrices)


def require_mask_classes(images: MaskSet, labels: tuple[str, ...], data: Path, model: str) -> None:
    """Refuse masks of other classes than the ``labels`` of ``model``: their numbers would mean something else.

    Raises:
        InputError: they are other ones, or in another order.
    """
    if images.classes != labels:
        what = f"needs the {len(labels)} classes of {model} in their order, {format_names(labels[:5])}"
        raise InputError(str(data), what, got=format_names(images.classes[:5]))
