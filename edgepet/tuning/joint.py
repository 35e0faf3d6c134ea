"""Images and their masks or boxes, flipped and cropped together. Needs the ``train`` extra.

Which part of an image is seen is drawn by torchvision's transforms v2, which resize the image as well. The mask's part
is resized here: torchvision takes the number at a pixel's corner, half a pixel off the image's, ``masks.resized`` the
one at its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgepet.errors import InputError, option, require
from edgepet.images.boxes import Boxes
from edgepet.images.masks import resized
from edgepet.images.preprocess import normalize
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.augmenting import put_back, sow
from edgepet.tuning.recipes import Augmentations, augmentations

_JOINT = 3  # what a seed is for, beside those of ``augmenting``
_SEEN = 0.25  # of a box: less of it is no object
_AREA, _RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of a crop, in parts of the image, and its width over its height


def joint_augmentations(names: Sequence[str]) -> Augmentations:
    """What ``names`` ask for, where it moves masks and boxes as images.

    Raises:
        InputError: it is not known, or would not move them.
    """
    asked = augmentations(names)
    others = [name for name in names if name not in ("flip", "crop")]
    if others:
        fix = f"train with {option('augment', 'flip,crop')}"
        raise InputError(
            option("augment"), "moves masks and boxes by flip and crop alone", got=repr(others[0]), fix=fix
        )
    return asked


@dataclass(frozen=True, slots=True)
class Move:
    """How an image is moved: the ``part`` of it that is seen, (top, left, height, width) or all, and left to right."""

    part: tuple[int, int, int, int] | None = None
    flipped: bool = False

    @property
    def is_any(self) -> bool:
        """Whether the image is moved at all."""
        return self.flipped or self.part is not None

    def image(self, pixels: NpArray) -> NpArray:
        """``pixels`` (H, W, 3), moved: a new array."""
        moved = torch.from_numpy(pixels).movedim(-1, 0)
        if self.part is not None:
            v2 = require("torchvision.transforms.v2", extra="train", purpose="crop images")
            moved = v2.functional.resized_crop(moved, *self.part, list(pixels.shape[:2]), antialias=True)
        out = moved.movedim(0, -1).numpy()
        return np.array(out[:, ::-1] if self.flipped else out)

    def mask(self, mask: NpArray) -> NpArray:
        """``mask`` (H, W) of the image, moved: a new array."""
        if self.part is not None:
            top, left, height, width = self.part
            mask = resized(mask[top : top + height, left : left + width].copy(), (mask.shape[0], mask.shape[1]))
        return np.array(mask[:, ::-1] if self.flipped else mask)

    def boxes(self, boxes: Boxes, size: tuple[int, int]) -> Boxes:
        """``boxes`` of the image, whose (height, width) are ``size``, moved.

        Those of which less than a quarter is seen are no objects any more, nor is anything counted there; those of
        which nothing is seen are left out.
        """
        height, width = size
        corners = boxes.corners
        if self.part is not None:
            top, left, rows, columns = self.part
            scale = np.array([width / columns, height / rows] * 2)
            corners = (corners - [left, top, left, top]) * scale
        if self.flipped:
            corners = np.stack([width - corners[:, 2], corners[:, 1], width - corners[:, 0], corners[:, 3]], axis=1)
        seen = np.clip(corners, 0, [width, height, width, height])
        areas = [(each[:, 2:] - each[:, :2]).prod(axis=1) for each in (corners, seen)]
        there, little = areas[1] > 0, areas[1] < _SEEN * areas[0]
        return Boxes(seen[there], boxes.labels[there], (boxes.crowds | little)[there])


def moved_masks(masks: NpArray, moves: Sequence[Move], size: tuple[int, int]) -> Tensor:
    """Masks, int64 (n, height, width), at ``size``, of uint8 (n, H, W), or of ``size`` where nothing moves."""
    moved = [move.mask(each) if move.is_any else each for each, move in zip(masks, moves, strict=True)]
    return torch.from_numpy(np.stack([resized(each, size) for each in moved]).astype(np.int64))


class JointAugmenter:
    """How the images of each step of one training are moved; each is the same whatever was drawn before it."""

    def __init__(self, names: Sequence[str], preprocess: Preprocess, *, batch_size: int, seed: int) -> None:
        self.asked, self.preprocess, self.batch_size, self.seed = (
            joint_augmentations(names), preprocess, batch_size, seed,
        )  # fmt: skip

    def moves(self, part: Tensor, at: tuple[int, int]) -> list[Move]:
        """How the images at some places of a step are moved.

        Args:
            part: the images' places in the step.
            at: the epoch, and the step's place in it from 0.
        """
        if not (self.asked.flip or self.asked.crop):
            return [Move()] * len(part)
        (epoch, step), drawn = at, list[Move]()
        with put_back():
            for place in part.tolist():
                sow(self.seed, epoch, step * self.batch_size + place, _JOINT)
                drawn.append(self._drawn())
        return drawn

    def images(self, pixels: NpArray, moves: Sequence[Move]) -> Tensor:
        """Images as the network takes them, of uint8 (n, H, W, 3)."""
        moved = [move.image(each) if move.is_any else each for each, move in zip(pixels, moves, strict=True)]
        return torch.from_numpy(normalize(np.stack(moved), self.preprocess))

    def _drawn(self) -> Move:
        part: tuple[int, int, int, int] | None = None
        height, width = self.preprocess.image_size
        if self.asked.crop:
            v2 = require("torchvision.transforms.v2", extra="train", purpose="crop images")
            crop = v2.RandomResizedCrop((height, width), scale=_AREA, ratio=_RATIO, antialias=True)
            box = crop.make_params([torch.empty(3, height, width)])
            part = (box["top"], box["left"], box["height"], box["width"])
        return Move(part, bool(self.asked.flip and torch.rand(()) < 0.5))
