"""What a task says of an image, in words: a class with its score, or for a mask what each class takes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import mask_of
from edgepet.device.map_heads import map_head_of
from edgepet.device.runtime import scores_of
from edgepet.images.masks import resized
from edgepet.spec import NpArray, Preprocess


@dataclass(frozen=True, slots=True)
class Guess:
    """A label and its softmax score, 0..1."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What ``task`` says of an image: the best label with its softmax score, 0..1, and the best ones in ``top``.

    ``image`` is the name of its file, of a clip's folder, or its number where it was given as a picture.
    """

    image: str
    label: str
    score: float
    task: str = ""
    top: tuple[Guess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassShare:
    """What part of an image's pixels, 0..1, has a label."""

    label: str
    pixels: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskAnswer:
    """What ``task`` says of every pixel of an image. ``classes`` are those that it has, the largest first.

    ``mask`` is as large as the image, (height, width), uint8: the number of each pixel's label. ``image`` is as of
    ``Answer``, ``preprocess`` how it was prepared.
    """

    image: str
    task: str
    classes: tuple[ClassShare, ...]
    mask: NpArray
    preprocess: Preprocess

    shown: ClassVar[tuple[str, ...]] = ("image", "task", "classes")


def classified(image: str, task: str, labels: Sequence[str], logits: NpArray, top: int) -> Answer:
    """The answer that one image's ``logits`` (C,) are, with the best ``top`` labels."""
    scores = scores_of(logits)
    best = np.argsort(-scores, kind="stable")[:top]
    guesses = tuple(Guess(labels[k], float(scores[k])) for k in best)
    return Answer(image, guesses[0].label, guesses[0].score, task, guesses)


def masked(
    image: str, task: str, labels: Sequence[str], logits: NpArray, preprocess: Preprocess, size: tuple[int, int]
) -> MaskAnswer:
    """The answer that one image's ``logits`` (C, h, w) are: a mask at the input's size, brought to the image's.

    Each pixel of the image has the label of the nearest one of the input.
    """
    mask = resized(mask_of(logits[None], preprocess.image_size)[0], size)
    return MaskAnswer(image=image, task=task, classes=shares(mask, labels), mask=mask, preprocess=preprocess)


def shares(mask: NpArray, labels: Sequence[str]) -> tuple[ClassShare, ...]:
    """What each label takes of ``mask``, the largest first; labels that no pixel has are left out."""
    parts = np.bincount(mask.ravel(), minlength=len(labels)) / mask.size
    found = [place for place in np.argsort(-parts, kind="stable") if parts[place]]
    return tuple(ClassShare(label=labels[place], pixels=float(parts[place])) for place in found)


def labels_of(delta: Delta) -> tuple[str, ...]:
    """The labels that the one head of a task answers."""
    head = map_head_of(delta)
    return delta.labels if head is None else head.labels
