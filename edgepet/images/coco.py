"""COCO's JSON, and masks drawn of what it says of each image: polygons and run lengths.

Pixels of no object are the class "background", number 0; categories follow in the order of their ids, whatever these
are. Of objects that overlap the smaller one lies on top. Crowds are not counted, where no object lies on them.
Format: Lin et al. 2014, arXiv:1405.0312, as cocodataset.org/#format-data has it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepet.errors import InputError
from edgepet.files import read_file
from edgepet.images.masks import MOST_CLASSES, NOT_COUNTED, Mask, Masked, MaskSet
from edgepet.images.preprocess import MOST_PIXELS
from edgepet.strict import ObjectReader

BACKGROUND = "background"


@dataclass(frozen=True, slots=True)
class _Shape:
    """One object: its value in the mask, its area, and polygons (x, y, x, y, ...) in pixels, or run lengths: down the
    columns, the pixels outside first.
    """

    value: int
    area: float
    outlines: tuple[tuple[float, ...], ...] = ()
    runs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that a COCO file names, and its (height, width) as that says it."""

    name: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class DrawnMask:
    """A mask that is drawn of an image's objects when it is read."""

    where: Path
    size: tuple[int, int]  # height and width
    shapes: tuple[_Shape, ...]

    def read(self) -> Mask:
        """The mask, as of ``masks.Masked``."""
        mask = np.zeros(self.size, np.uint8)
        crowds_first = sorted(self.shapes, key=lambda each: (each.value != NOT_COUNTED, -each.area))
        for shape in crowds_first:
            mask[_covered(shape, self.size)] = shape.value
        return mask


def read_coco(file: Path, images: Path) -> MaskSet:
    """The images of a COCO file, which lie in the folder ``images``, with masks that are drawn when they are read.

    Raises:
        InputError: the file is no such JSON; an image, a category or a segmentation that is none, each with its place.
    """
    table = open_coco(file)
    numbers, classes = _categories(table)
    pictures = coco_pictures(table)
    shapes: dict[int, list[_Shape]] = defaultdict(list)
    for each in table.nested_list("annotations"):
        number = picture_of(each, pictures)
        shape = _shape(each, numbers, pictures[number].size)
        shapes[number] += [] if shape is None else [shape]
    order = sorted(pictures, key=lambda number: pictures[number].name)
    drawn: list[Masked] = [
        DrawnMask(within(images, pictures[n].name, file), pictures[n].size, tuple(shapes[n])) for n in order
    ]
    return MaskSet(classes, tuple(each.where for each in drawn), tuple(drawn))


def open_coco(file: Path) -> ObjectReader:
    """The document of a COCO file.

    Raises:
        InputError: it is no JSON, or no object.
    """
    try:
        document = json.loads(read_file(file))
    except (ValueError, RecursionError) as error:
        raise InputError(str(file), "must be JSON", got=str(error)[:80]) from error
    return ObjectReader(document, str(file), error=InputError)


def coco_pictures(table: ObjectReader) -> dict[int, Picture]:
    """The images of a document, by their ids.

    Raises:
        InputError: none, or one without an id of its own, a name or a size.
    """
    pictures = dict[int, Picture]()
    for each in table.nested_list("images"):
        number, name = each.integer("id"), each.text("file_name")
        if number in pictures:
            raise each.refusal("id", "must be an image's own", number)
        size = (each.integer("height", least=1), each.integer("width", least=1))
        if size[0] * size[1] > MOST_PIXELS:
            raise each.refusal("", f"must have at most {MOST_PIXELS} pixels", f"{size}")
        pictures[number] = Picture(name, size)
    if not pictures:
        raise table.refusal("images", "needs one image or more", 0)
    return pictures


def picture_of(each: ObjectReader, pictures: Mapping[int, Picture]) -> int:
    """The id of the image that an annotation is of.

    Raises:
        InputError: no image has it.
    """
    number = each.integer("image_id")
    if number not in pictures:
        raise each.refusal("image_id", "must be an image's id", number)
    return number


def within(folder: Path, name: str, file: Path) -> Path:
    """The image of this name; as some tools write it, with folders of the machine that it was annotated on."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(str(file), "needs file names within the images' folder", got=repr(name[:80]))
    plain = folder / Path(name).name
    return plain if plain.exists() and not (folder / name).exists() else folder / name


def named_categories(table: ObjectReader) -> dict[int, str]:
    """The name of each category id.

    Raises:
        InputError: an id or a name is there twice.
    """
    named = dict[int, str]()
    for each in table.nested_list("categories"):
        number, name = each.integer("id"), each.text("name")
        if number in named or name in named.values():
            raise each.refusal("", "must have an id and a name of its own", f"{number} and {name!r}")
        named[number] = name
    return named


def _categories(table: ObjectReader) -> tuple[dict[int, int], tuple[str, ...]]:
    """The mask's value of each category id, and the names of all values."""
    named = named_categories(table)
    own = [(number, name) for number, name in sorted(named.items()) if name != BACKGROUND]
    if not 1 <= len(own) < MOST_CLASSES:
        raise table.refusal("categories", f"needs 1 to {MOST_CLASSES - 1} categories", len(own))
    numbers = {number: value for value, (number, _) in enumerate(own, start=1)}
    numbers |= {number: 0 for number, name in named.items() if name == BACKGROUND}
    return numbers, (BACKGROUND, *(name for _, name in own))


def _shape(each: ObjectReader, numbers: dict[int, int], size: tuple[int, int]) -> _Shape | None:
    """What one annotation covers; None where it is a box alone."""
    category = each.integer("category_id")
    if category not in numbers:
        raise each.refusal("category_id", "must be a category's id", category)
    value = NOT_COUNTED if is_crowd(each) else numbers[category]
    outlines, runs = silhouette(each, size)
    area = float(sum(runs[1::2])) if runs else sum(map(_area, outlines))
    return _Shape(value, area, outlines, runs) if runs or outlines else None


def is_crowd(each: ObjectReader) -> bool:
    """Whether an annotation says that nothing is counted there."""
    return each.has("iscrowd") and each.integer("iscrowd") > 0


def silhouette(each: ObjectReader, size: tuple[int, int]) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """The polygons of an annotation, or the run lengths; both are empty where it is a box alone.

    Raises:
        InputError: what is there is neither.
    """
    given = each.raw("segmentation") if each.has("segmentation") else []
    if isinstance(given, dict):
        return (), _runs(ObjectReader(given, f"{each.where}.segmentation", error=InputError), size)
    if not isinstance(given, list):
        raise each.refusal("segmentation", "needs polygons or run lengths", str(given)[:80])
    return tuple(_polygon(each, polygon) for polygon in given), ()


def _polygon(each: ObjectReader, given: Any) -> tuple[float, ...]:
    numbers = isinstance(given, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in given)
    if not numbers or len(given) < 6 or len(given) % 2:
        raise each.refusal("segmentation", "needs polygons of three points or more", str(given)[:80])
    return tuple(map(float, given))


def _area(outline: Sequence[float]) -> float:
    x, y = np.asarray(outline).reshape(-1, 2).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def _runs(table: ObjectReader, size: tuple[int, int]) -> tuple[int, ...]:
    told = table.integers("size")
    if told != size:
        raise table.refusal("size", f"must be the image's {list(size)}", list(told))
    counts = table.raw("counts")
    lengths = _decompressed(counts) if isinstance(counts, str) else table.integers("counts")
    if lengths is None or min(lengths, default=0) < 0 or sum(lengths) != size[0] * size[1]:
        got = "text that is none" if lengths is None else sum(lengths)
        raise table.refusal("counts", f"must be lengths that sum to {size[0] * size[1]} pixels", got)
    return tuple(lengths)


def _decompressed(text: str) -> list[int] | None:
    """COCO's spelling of run lengths: five bits a character, the sixth says that more follow; differences from the
    fourth on are to the length two before.
    """
    lengths, value, shift = list[int](), 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
    return None if shift else lengths


def _covered(shape: _Shape, size: tuple[int, int]) -> NDArray[np.bool_]:
    height, width = size
    if shape.runs:
        flat = np.repeat(np.arange(len(shape.runs)) % 2 == 1, np.array(shape.runs))
        return flat.reshape(width, height).T
    covered = np.zeros(size, bool)
    for outline in shape.outlines:
        covered |= _inside(outline, size)
    return covered


def _inside(outline: tuple[float, ...], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose middles lie within a polygon: those left of which an odd number of its edges passes."""
    height, width = size
    corners, middles = np.asarray(outline).reshape(-1, 2), np.arange(height) + 0.5
    passed = np.zeros((height, width + 1), np.int32)
    for (x, y), (to_x, to_y) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        rows = np.flatnonzero((y <= middles) != (to_y <= middles))
        if len(rows):
            crossing = x + (middles[rows] - y) * ((to_x - x) / (to_y - y))
            np.add.at(passed, (rows, np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)), 1)
    inside: NDArray[np.bool_] = passed[:, :width].cumsum(axis=1) % 2 == 1
    return inside
