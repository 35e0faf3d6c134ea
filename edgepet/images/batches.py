"""How many images a network is given at once: large ones take gigabytes each between its layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgepet.spec import NpArray

MOST_IMAGES, PIXELS = 64, 224 * 224  # of one call, of images of so many pixels


def in_batches(images: NpArray, most: int = MOST_IMAGES) -> list[NpArray]:
    """Views of ``images`` (n, 3, H, W), or of clips (n, frames, 3, H, W), in order.

    Each has at most ``most`` of them, and takes no more memory than 64 images of 224 by 224, but for one image alone.
    Of larger images that grows with the square of their pixels, for attention meets every patch with every other.
    """
    frames, larger = math.prod(images.shape[1:-3]), math.prod(images.shape[-2:]) / PIXELS
    step = max(1, min(most, int(MOST_IMAGES / (frames * max(larger, larger**2)))))
    return np.split(images, range(step, len(images), step))


def batched(network: Callable[[NpArray], NpArray], images: NpArray) -> NpArray:
    """What ``network`` puts out for ``images``, asked batch by batch."""
    return np.concatenate([network(batch) for batch in in_batches(images)])
