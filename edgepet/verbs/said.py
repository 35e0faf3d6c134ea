"""What ``predict`` says of an image, by what a task answers, as JSON and in a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from edgepet.device.answers import ClassShare, FoundBox
from edgepet.device.runtime import scores_of
from edgepet.reports.tables import format_percent
from edgepet.spec import NpArray
from edgepet.verbs.drawings import told, told_boxes


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A class and its softmax score, 0..1."""

    label: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one task says of an image: the best class, and the best ``top`` of them."""

    label: str
    score: float
    top: tuple[Guess, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidMask:
    """What one task says of every pixel of an image: what each class takes, and the files that were written."""

    classes: tuple[ClassShare, ...]
    mask: Path | None
    drawn: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidBoxes:
    """The objects that one task finds on an image, and the file that was written."""

    boxes: tuple[FoundBox, ...]
    drawn: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidSeveral:
    """What each of several heads of a task says of an image, by the head's name."""

    heads: Mapping[str, SaidMask | SaidBoxes | SaidLabels]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidLabels:
    """The labels that one task says an image has, those at their threshold or above it."""

    labels: tuple[Guess, ...]


AnySaid: TypeAlias = "Said | SaidMask | SaidBoxes | SaidLabels | SaidSeveral"


def said_of(logits: NpArray, labels: Sequence[str], top: int) -> Said:
    """A class, of one image's logits (C,), with the best ``top`` of them."""
    scores = scores_of(logits)
    best = np.argsort(-scores, kind="stable")[:top]
    guesses = tuple(Guess(label=labels[k], score=float(scores[k])) for k in best)
    return Said(label=guesses[0].label, score=guesses[0].score, top=guesses)


def told_of(said: AnySaid) -> str:
    """What a task says, in a line."""
    if isinstance(said, SaidBoxes):
        return told_boxes(said.boxes)
    if isinstance(said, SaidMask):
        return told(said.classes)
    if isinstance(said, SaidSeveral):
        return "; ".join(f"{head}: {told_of(each)}" for head, each in said.heads.items())
    if isinstance(said, SaidLabels):
        return ", ".join(f"{each.label} {format_percent(each.score)}" for each in said.labels) or "none"
    return ", ".join(f"{guess.label} {format_percent(guess.score)}" for guess in said.top)
