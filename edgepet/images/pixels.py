"""Pixels again of what was preprocessed: for models that preprocess by themselves."""

from __future__ import annotations

import numpy as np

from edgepet.images.preprocess import Pixels, crop_start, resized
from edgepet.spec import NpArray, Preprocess


def pixels_of(images: NpArray, preprocess: Preprocess) -> Pixels:
    """The pixels, uint8 (..., H, W, 3), that ``images`` (..., 3, H, W) were before ``normalize``, or the nearest."""
    mean, std = (np.asarray(each, np.float64)[:, None, None] for each in (preprocess.mean, preprocess.std))
    values = np.clip(np.rint((images * std + mean) * 255), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(values, -3, -1))


def uncropped(pixels: Pixels, preprocess: Preprocess) -> Pixels:
    """Pictures (n, h, w, 3) that resizing leaves as they are and whose centre crop is ``pixels`` (n, H, W, 3)."""
    height, width = (int(edge / preprocess.crop_fraction) for edge in preprocess.image_size)
    height, width = resized(height, width, preprocess)
    made = np.zeros((len(pixels), height, width, 3), np.uint8)
    top, left = (crop_start(edge, crop) for edge, crop in zip((height, width), preprocess.image_size, strict=True))
    made[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return made
