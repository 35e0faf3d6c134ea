"""The self-test of a task: images that a seed stands for, and what the task answers to them.

Whoever installs a task asks for these answers on the machine that will serve. The images are blocks of even colour,
which are nearer to pictures than noise is: a network that was barely tuned answers to noise by chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepet.deltas.generator import uniform
from edgepet.spec import NpArray, Preprocess

IMAGES, BLOCKS = 4, 16  # images of a probe, and rows and columns of blocks in each
_PLACES = 1 << 32  # the generator's first output for places: those for images are before it


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """What a task answers in one precision: logits (n, C), float32, which a machine may miss by ``tolerance``.

    Of a head that reads maps they are what ``told_of`` makes of its answers.
    """

    seed: int
    logits: NpArray
    tolerance: float

    def images(self, preprocess: Preprocess) -> NpArray:
        """The images that are asked about, as ``probe_images`` makes them."""
        return probe_images(self.seed, preprocess, len(self.logits))

    def told(self, answers: NpArray) -> NpArray:
        """What a network answers to these images, as ``logits`` are: (n, C)."""
        return told_of(answers, self.seed, self.logits.shape[1])


def told_of(answers: NpArray, seed: int, classes: int) -> NpArray:
    """What a head answers as one number for each class of each image, (n, C).

    Logits (n, C) as they are, of every place (n, C, h, w) by ``condensed``, and boxes (n, m, 6) by ``condensed_boxes``.
    """
    if answers.ndim == 3:
        return condensed_boxes(answers, classes)
    return answers if answers.ndim == 2 else condensed(answers, seed)


def condensed(answers: NpArray, seed: int) -> NpArray:
    """Logits of every place (n, C, h, w) as one number for each class of each image, float32 (n, C).

    A mean over places, place p with the weight 1 + output 2^32 + p of the generator, a number from -1 to 1: a map that
    is turned, or moved by a place, has another one.
    """
    count, classes, height, width = answers.shape
    weights = 1 + uniform(seed, _PLACES, height * width)
    means: NpArray = answers.reshape(count, classes, -1).astype(np.float64) @ weights / (height * width)
    return means.astype(np.float32)


def condensed_boxes(found: NpArray, classes: int) -> NpArray:
    """Boxes (n, m, 6) as one number for each class of each image, float32 (n, C).

    The sum over the boxes of (x1 + 2 y1 + 3 x2 + 4 y2) / 1000, times what their score is above the least of the image.

    So two that are nearly equal may change places, also the last one with the first that is not found.
    """
    found = found.astype(np.float64)
    where = found[:, :, :4] @ np.array([1.0, 2.0, 3.0, 4.0]) / 1000
    weighted = where * (found[:, :, 4] - found[:, :, 4].min(axis=1, keepdims=True))
    told = [np.where(found[:, :, 5] == label, weighted, 0).sum(axis=1) for label in range(classes)]
    return np.stack(told, axis=1).astype(np.float32)


def probe_images(seed: int, preprocess: Preprocess, count: int = IMAGES) -> NpArray:
    """Preprocessed images (count, 3, H, W), or clips (count, frames, 3, H, W), float32 between -2 and 2.

    Block (row, column) of channel c of picture p is twice output ((3 p + c) 16 + row) 16 + column of the pack's
    generator as a number from -1 to 1; pixel (y, x) lies in block (16 y // H, 16 x // W).
    """
    (height, width), pictures = preprocess.image_size, count * preprocess.frames
    drawn = 2 * uniform(seed, 0, pictures * 3 * BLOCKS * BLOCKS)
    blocks = drawn.astype(np.float32).reshape(pictures, 3, BLOCKS, BLOCKS)
    rows, columns = np.arange(height) * BLOCKS // height, np.arange(width) * BLOCKS // width
    made = np.ascontiguousarray(blocks[:, :, rows[:, None], columns])
    return made.reshape(-1, *preprocess.input_shape)
