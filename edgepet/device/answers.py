"""What a task says of an image, in words: a class with its score, what each class takes of a mask, boxes, or labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.delta import Delta
from edgepet.deltas.detection import boxes_in, suppressed
from edgepet.deltas.heads import Meaning, mask_of
from edgepet.deltas.layer import sigmoid
from edgepet.device.map_heads import map_head_of, map_heads_of
from edgepet.device.runtime import scores_of
from edgepet.images.masks import resized
from edgepet.spec import NpArray, Preprocess

LEAST_SCORE = 0.05  # of a box that is told at all: those below are guesses by the hundred


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBox:
    """An object: its class with its score, 0..1, and ``box``: x, y, width and height in pixels of the image."""

    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxesAnswer:
    """The objects that ``task`` finds on an image, those of the largest scores first; at least LEAST_SCORE each.

    ``image`` is as of ``Answer``, ``preprocess`` how it was prepared; ``labels`` are all classes of the task.
    """

    image: str
    task: str
    boxes: tuple[FoundBox, ...]
    labels: tuple[str, ...]
    preprocess: Preprocess

    shown: ClassVar[tuple[str, ...]] = ("image", "task", "boxes")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelsAnswer:
    """The labels that ``task`` says an image has, with their scores, 0..1: those at their threshold or above it, the
    largest score first. ``image`` is as of ``Answer``.
    """

    image: str
    task: str
    labels: tuple[Guess, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralAnswers:
    """What each of several heads of ``task`` says of an image, by the head's name; else as of ``Answer``.

    Their own ``task`` is TASK.HEAD.
    """

    image: str
    task: str
    heads: Mapping[str, MaskAnswer | BoxesAnswer | LabelsAnswer]


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


def boxed(
    image: str, task: str, labels: Sequence[str], found: NpArray, preprocess: Preprocess, size: tuple[int, int]
) -> BoxesAnswer:
    """The answer that one image's boxes ``found`` (m, 6) are: those that no better one overlaps, on the image."""
    kept = boxes_in(suppressed(found[found[:, 4] >= LEAST_SCORE]), preprocess.image_size, size)
    boxes = tuple(
        FoundBox(label=labels[int(label)], score=score, box=(x1, y1, x2 - x1, y2 - y1))
        for x1, y1, x2, y2, score, label in kept.tolist()
    )
    return BoxesAnswer(image=image, task=task, boxes=boxes, labels=tuple(labels), preprocess=preprocess)


def labelled(image: str, task: str, meaning: Meaning, logits: NpArray) -> LabelsAnswer:
    """The answer that one image's ``logits`` (C,) are: the labels that it has."""
    scores = sigmoid(logits.astype(np.float64))
    there = np.flatnonzero(scores >= np.array(meaning.thresholds))
    best = there[np.argsort(-scores[there], kind="stable")]
    return LabelsAnswer(image=image, task=task, labels=tuple(Guess(meaning.labels[k], float(scores[k])) for k in best))


def answered(
    image: str, task: str, meaning: Meaning, given: NpArray, preprocess: Preprocess, size: tuple[int, int]
) -> MaskAnswer | BoxesAnswer | LabelsAnswer:
    """What a head that reads maps says, of what it gives for one image of ``size`` (height, width)."""
    if meaning.answer == "labels":
        return labelled(image, task, meaning, given)
    made = masked if meaning.answer == "mask" else boxed
    return made(image, task, meaning.labels, given, preprocess, size)


def all_answered(
    image: str, task: str, meanings: Sequence[Meaning], given: Sequence[NpArray], preprocess: Preprocess,
    size: tuple[int, int],
) -> MaskAnswer | BoxesAnswer | LabelsAnswer | SeveralAnswers:  # fmt: skip
    """What the heads of a task say, of what each gives for one image of ``size`` (height, width)."""
    if len(meanings) == 1:
        return answered(image, task, meanings[0], given[0], preprocess, size)
    heads = {
        meaning.name: answered(image, f"{task}.{meaning.name}", meaning, each, preprocess, size)
        for meaning, each in zip(meanings, given, strict=True)
    }
    return SeveralAnswers(image=image, task=task, heads=heads)


def shares(mask: NpArray, labels: Sequence[str]) -> tuple[ClassShare, ...]:
    """What each label takes of ``mask``, the largest first; labels that no pixel has are left out."""
    parts = np.bincount(mask.ravel(), minlength=len(labels)) / mask.size
    found = [place for place in np.argsort(-parts, kind="stable") if parts[place]]
    return tuple(ClassShare(label=labels[place], pixels=float(parts[place])) for place in found)


def meanings_of(delta: Delta) -> tuple[Meaning, ...]:
    """What each head of a task answers."""
    heads = tuple(head.meaning for head in map_heads_of(delta))
    return heads or (Meaning(name="class", answer="class", labels=delta.labels),)


def meaning_of(delta: Delta) -> Meaning:
    """What the one head of a task answers."""
    map_head_of(delta)
    return meanings_of(delta)[0]


def labels_of(delta: Delta) -> tuple[str, ...]:
    """The labels that the one head of a task answers."""
    return meaning_of(delta).labels
