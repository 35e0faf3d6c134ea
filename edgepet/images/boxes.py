"""The boxes of images: where objects are and of which class, checked all at once.

A box is two corners x1, y1, x2, y2 in pixels of its image: the first pixel reaches from 0 to 1.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edgepet.errors import InputError
from edgepet.images.folders import PassedOver
from edgepet.images.masks import joined
from edgepet.images.preprocess import upright_size
from edgepet.images.sets import ImageSet
from edgepet.spec import Preprocess

Colour: TypeAlias = tuple[int, int, int]

WHAT = "needs boxes that fit their images"  # begins messages of several that do not
SLACK = 1.0  # pixels that a box may reach over its image, as tools round: it is cut there
FRACTIONS = (1.0, 1.0)  # the extent of images whose boxes are told in parts of them


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """The objects of one image: ``corners`` float64 (n, 4), ``labels`` int64 (n,), numbers of classes.

    ``crowds`` bool (n,) says of which nothing is counted: whoever finds something there has found no object and made no
    mistake.
    """

    corners: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowds: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, objects: Sequence[tuple[Sequence[float], int, bool]]) -> Boxes:
        """From corners, class and whether it is a crowd, of every object; there may be none."""
        corners = np.array([each[0] for each in objects], np.float64).reshape(-1, 4)
        labels, crowds = (np.array([each[place] for each in objects]) for place in (1, 2))
        return cls(corners, labels.astype(np.int64), crowds.astype(bool))

    def scaled(self, by: tuple[float, float]) -> Boxes:
        """The same on an image that is so many times as high and as wide."""
        rows, columns = by
        return replace(self, corners=self.corners * np.array([columns, rows, columns, rows]))


@dataclass(frozen=True, slots=True)
class BoxSet:
    """Image files and the boxes of each; ``classes`` are the names of their labels.

    Ordered by the images' names. ``extents`` are the (height, width) that the boxes of each are told in: as their file
    says it, or FRACTIONS. Where ``check_boxes`` made the set, they are those of the images. ``passed_over`` is what
    lies among them and is not used.
    """

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    boxes: tuple[Boxes, ...]
    extents: tuple[tuple[float, float], ...]
    passed_over: tuple[PassedOver, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def images(self) -> ImageSet:
        """The images alone; none has a class of its own."""
        return ImageSet(self.classes, self.paths, (0,) * len(self.paths), self.passed_over)

    def at(self, indices: Iterable[int]) -> BoxSet:
        """Those of its images that ``indices`` name, in their order."""
        chosen = tuple(indices)
        return replace(
            self,
            paths=tuple(self.paths[index] for index in chosen),
            boxes=tuple(self.boxes[index] for index in chosen),
            extents=tuple(self.extents[index] for index in chosen),
        )

    def renumbered(self, classes: tuple[str, ...], numbers: Sequence[int]) -> BoxSet:
        """The same with other ``classes``, among which each of its own has one of the ``numbers``."""
        table = np.array(numbers, np.int64)
        boxes = tuple(replace(each, labels=table[each.labels]) for each in self.boxes)
        return replace(self, classes=classes, boxes=boxes)

    def counts(self) -> NDArray[np.int64]:
        """How many objects each class has, crowds left out, (classes,)."""
        counts = np.zeros(len(self.classes), np.int64)
        for each in self.boxes:
            counts += np.bincount(each.labels[~each.crowds], minlength=len(counts))
        return counts


def box_within(corners: Sequence[float], extent: tuple[float, float], where: str) -> tuple[float, ...]:
    """``corners`` cut at the edges of an image, over which they reach by SLACK at most.

    Args:
        extent: height and width of the image, or FRACTIONS.

    Raises:
        InputError: about ``where``: a box without width or height, or one that lies outside of its image.
    """
    x1, y1, x2, y2 = corners
    if not (x2 > x1 and y2 > y1):
        fix = "draw the box again, or remove it"
        raise InputError(where, "needs a box of some width and height", got=f"{x2 - x1:g} x {y2 - y1:g}", fix=fix)
    height, width = extent
    slack = SLACK if extent != FRACTIONS else SLACK / 100
    cut = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    beyond = max(-x1, -y1, x2 - width, y2 - height)
    if beyond > slack or cut[2] <= cut[0] or cut[3] <= cut[1]:
        size = "in parts of it from 0 to 1" if extent == FRACTIONS else f"{width:g} x {height:g}"
        got = f"{x1:g}, {y1:g} to {x2:g}, {y2:g}"
        raise InputError(where, f"must lie within its image, {size}", got=got, fix="draw the box again, or remove it")
    return cut


def check_boxes(images: BoxSet, preprocess: Preprocess) -> BoxSet:
    """``images`` with boxes in pixels of the images, each of which is opened for its size alone.

    Raises:
        InputError: an image that cannot be opened, or whose size is another than its boxes were drawn on; all of them
            in one message.
    """

    def look(index: int) -> tuple[int, int] | InputError:
        path, told = images.paths[index], images.extents[index]
        try:
            size = upright_size(path, preprocess)
            if told not in (FRACTIONS, size):
                size = upright_size(path, preprocess, decode=True)
        except InputError as error:
            return error
        if told in (FRACTIONS, size):
            return size
        what, got = f"must be as large as its boxes say, {told[1]:g} x {told[0]:g}", f"{size[1]} x {size[0]}"
        return InputError(str(path), what, got=got, fix="draw the boxes on the image itself, or remove both")

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(look, range(len(images))))
    bad = [each for each in found if isinstance(each, InputError)]
    if bad:
        raise joined(bad, len(images), WHAT)
    sizes = [each for each in found if not isinstance(each, InputError)]
    boxes = tuple(
        each.scaled((size[0] / told[0], size[1] / told[1]))
        for each, size, told in zip(images.boxes, sizes, images.extents, strict=True)
    )
    return replace(images, boxes=boxes, extents=tuple((float(h), float(w)) for h, w in sizes))


def require_objects(images: BoxSet, where: Path) -> list[str]:
    """The classes that have no object.

    Raises:
        InputError: none has one.
    """
    counts = images.counts().tolist()
    if not any(counts):
        fix = "draw boxes around the objects of some of them"
        raise InputError(str(where), "needs training images with objects", got=f"none in {len(images)}", fix=fix)
    return [name for name, count in zip(images.classes, counts, strict=True) if not count]


def boxes_png(
    picture: NDArray[np.uint8], boxes: Sequence[Sequence[float]], told: Sequence[str], colours: Sequence[Colour]
) -> bytes:
    """A PNG of ``picture`` (height, width, 3) with ``boxes``, x, y, width and height each, and what is told of each.

    ``colours`` are those of the boxes.
    """
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    line = max(1, round(min(image.size) / 200))
    for (x, y, width, height), text, colour in zip(boxes, told, colours, strict=True):
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline=colour, width=line)
        left, top, right, bottom = pen.textbbox((x, y), text)
        above = min(y, bottom - top + 2 * line)
        pen.rectangle((left - line, top - above, right + line, bottom - above + line), fill=colour)
        pen.text((x, y - above), text, fill=(0, 0, 0) if sum(colour) > 382 else (255, 255, 255))
    made = io.BytesIO()
    image.save(made, format="PNG")
    return made.getvalue()
