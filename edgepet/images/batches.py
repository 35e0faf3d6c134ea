"""How many images a network is given at once: large ones take gigabytes each between its layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgepet.spec import NpArray

MOST_IMAGES, MOST_PIXELS = 64, 64 * 224 * 224  # of one call


def in_batches(images: NpArray, most: int = MOST_IMAGES) -> list[NpArray]:
    """Views of ``images`` (n, 3, H, W), or of clips (n, frames, 3, H, W), in order.

    Each has at most ``most`` of them, and no more pixels than 64 images of 224 by 224, one image at least.
    """
    pixels = math.prod(images.shape[1:]) // 3
    step = max(1, min(most, MOST_PIXELS // max(1, pixels)))
    return np.split(images, range(step, len(images), step))


def batched(network: Callable[[NpArray], NpArray], images: NpArray) -> NpArray:
    """What ``network`` puts out for ``images``, asked batch by batch."""
    return np.concatenate([network(batch) for batch in in_batches(images)])
