"""The val split of a folder as what a pack's answers lose points on, head by head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepet.calibration.budget import Answers, Drop, drop_between
from edgepet.calibration.head_images import head_drop, in_order
from edgepet.deltas.delta import Delta
from edgepet.device.answers import meanings_of
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_set, open_split
from edgepet.proving.classes import class_order
from edgepet.proving.coding import Judge
from edgepet.spec import NpArray
from edgepet.verbs.dense_answers import ANSWERED


def judged_images(data: Path, delta: Delta) -> tuple[NpArray, Judge]:
    """The images of the val split, preprocessed, float32 (n, 3, H, W) or clips; and who judges answers to them.

    Raises:
        InputError: no such split, classes that the task has not, truths that are none, or that are of other images for
            one head than for another.
        MissingError: the package that computes AP of boxes is not installed.
    """
    return _of_heads(data, delta) if delta.heads else _of_classes(data, delta)


def _of_classes(data: Path, delta: Delta) -> tuple[NpArray, Judge]:
    images = open_split(data, "val", clips=delta.preprocess.frames > 1)
    order = class_order(images, delta.labels, data, f"{delta.task}.pet")
    pixels, labels = load_set(images, delta.preprocess)

    def judge(before: Answers, after: Answers) -> Mapping[str, Drop]:
        return {"class": drop_between(before[0], after[0], order[labels])}

    return normalize(pixels, delta.preprocess), judge


def _of_heads(data: Path, delta: Delta) -> tuple[NpArray, Judge]:
    heads, preprocess, truths = list(delta.heads), delta.preprocess, list[Any]()
    for meaning, each in zip(meanings_of(delta), heads, strict=True):
        row = ANSWERED[each.head.answer]
        row.require()
        told = row.images(data, "val", meaning, preprocess, f"{delta.task}.pet")
        truths.append(in_order(told, truths[0], data, meaning.name) if truths else told)
    pixels, _ = load_set(truths[0].images, preprocess)

    def judge(before: Answers, after: Answers) -> Mapping[str, Drop]:
        answered = zip((each.head for each in heads), before, after, truths, strict=True)
        return {
            head.name: head_drop(head.answer, was, now, truth, preprocess) for head, was, now, truth in answered
        }  # fmt: skip

    return normalize(pixels, preprocess), judge
