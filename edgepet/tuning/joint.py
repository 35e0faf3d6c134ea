"""Images and their masks, flipped and cropped together. Needs the ``train`` extra.

Which part of an image is seen is drawn by torchvision's transforms v2, which resize the image as well. The mask's part
is resized here: torchvision takes the number at a pixel's corner, half a pixel off the image's, ``masks.resized`` the
one at its middle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgepet.errors import InputError, option, require
from edgepet.images.masks import resized
from edgepet.images.preprocess import normalize
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.augmenting import put_back, sow
from edgepet.tuning.recipes import Augmentations, augmentations

_JOINT = 3  # what a seed is for, beside those of ``augmenting``
_AREA, _RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of a crop, in parts of the image, and its width over its height


def joint_augmentations(names: Sequence[str]) -> Augmentations:
    """What ``names`` ask for, where it moves masks as images.

    Raises:
        InputError: it is not known, or would not move the mask.
    """
    asked = augmentations(names)
    others = [name for name in names if name not in ("flip", "crop")]
    if others:
        fix = f"train with {option('augment', 'flip,crop')}"
        raise InputError(option("augment"), "moves masks by flip and crop alone", got=repr(others[0]), fix=fix)
    return asked


class JointAugmenter:
    """The images and masks of each step of one training; each becomes the same whatever was drawn before it."""

    def __init__(self, names: Sequence[str], preprocess: Preprocess, *, batch_size: int, seed: int) -> None:
        self.asked, self.preprocess, self.batch_size, self.seed = (
            joint_augmentations(names), preprocess, batch_size, seed,
        )  # fmt: skip

    def __call__(
        self, pixels: NpArray, masks: NpArray, part: Tensor, at: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Images as the network takes them, and masks, int64 (n, height, width), at ``size``.

        Args:
            pixels: uint8 (n, H, W, 3).
            masks: uint8 (n, H, W), or of ``size`` where nothing is asked for.
            part: the images' places in the step.
            at: the epoch, and the step's place in it from 0.
        """
        if self.asked.flip or self.asked.crop:
            epoch, step = at
            pixels, masks = pixels.copy(), masks.copy()
            with put_back():
                for image, mask, place in zip(pixels, masks, part.tolist(), strict=True):
                    sow(self.seed, epoch, step * self.batch_size + place, _JOINT)
                    self._move(image, mask)
        small = np.stack([resized(mask, size) for mask in masks])
        return torch.from_numpy(normalize(pixels, self.preprocess)), torch.from_numpy(small.astype(np.int64))

    def _move(self, image: NpArray, mask: NpArray) -> None:
        """Change one image and its mask in place."""
        if self.asked.crop:
            v2 = require("torchvision.transforms.v2", extra="train", purpose="crop images")
            seen, (height, width) = torch.from_numpy(image).movedim(-1, 0), mask.shape
            crop = v2.RandomResizedCrop((height, width), scale=_AREA, ratio=_RATIO, antialias=True)
            box = crop.make_params([seen])
            image[:] = crop.transform(seen, box).movedim(0, -1).numpy()
            rows = slice(box["top"], box["top"] + box["height"])
            mask[:] = resized(mask[rows, box["left"] : box["left"] + box["width"]].copy(), (height, width))
        if self.asked.flip and torch.rand(()) < 0.5:
            image[:], mask[:] = image[:, ::-1].copy(), mask[:, ::-1].copy()
