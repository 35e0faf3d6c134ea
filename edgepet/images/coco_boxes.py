"""The boxes of COCO's JSON: [x, y, width, height] in pixels, of categories whose ids may be any.

Silhouettes are checked and not used. Format: Lin et al. 2014, arXiv:1405.0312, as cocodataset.org/#format-data has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from edgepet.errors import InputError
from edgepet.images.boxes import WHAT, Boxes, BoxSet, box_within
from edgepet.images.coco import (
    Picture,
    coco_pictures,
    is_crowd,
    named_categories,
    open_coco,
    picture_of,
    silhouette,
    within,
)
from edgepet.images.masks import MOST_CLASSES, joined
from edgepet.strict import ObjectReader


def read_coco_boxes(file: Path, images: Path) -> BoxSet:
    """The images of a COCO file, which lie in the folder ``images``, and their boxes.

    Classes are the categories in the order of their ids.

    Raises:
        InputError: the file is no such JSON, an image or a category that is none; or annotations that are none, all of
            them in one message, each with its place.
    """
    table = open_coco(file)
    named = named_categories(table)
    if not 1 <= len(named) <= MOST_CLASSES:
        raise table.refusal("categories", f"needs 1 to {MOST_CLASSES} categories", len(named))
    numbers = {category: number for number, category in enumerate(sorted(named))}
    pictures = coco_pictures(table)
    objects: dict[int, list[tuple[tuple[float, ...], int, bool]]] = defaultdict(list)
    bad, seen, annotations = list[InputError](), set[int](), table.nested_list("annotations")
    for each in annotations:
        try:
            _require_own(each, seen)
            number = picture_of(each, pictures)
            objects[number].append(_object(each, numbers, pictures[number]))
        except InputError as error:
            bad.append(error)
    if bad:
        raise joined(bad, len(annotations), WHAT)
    order = sorted(pictures, key=lambda number: pictures[number].name)
    return BoxSet(
        classes=tuple(named[category] for category in sorted(named)),
        paths=tuple(within(images, pictures[number].name, file) for number in order),
        boxes=tuple(Boxes.of(objects[number]) for number in order),
        extents=tuple((float(pictures[number].size[0]), float(pictures[number].size[1])) for number in order),
    )


def _require_own(each: ObjectReader, seen: set[int]) -> None:
    """Refuse an id that is there twice: two annotations of one object, or a file that was joined of two."""
    if each.has("id"):
        number = each.integer("id")
        if number in seen:
            raise each.refusal("id", "must be an annotation's own", number)
        seen.add(number)


def _object(each: ObjectReader, numbers: Mapping[int, int], picture: Picture) -> tuple[tuple[float, ...], int, bool]:
    category = each.integer("category_id")
    if category not in numbers:
        raise each.refusal("category_id", "must be a category's id", category)
    silhouette(each, picture.size)
    x, y, width, height = each.numbers("bbox", count=4)
    extent = (float(picture.size[0]), float(picture.size[1]))
    return box_within((x, y, x + width, y + height), extent, f"{each.where}.bbox"), numbers[category], is_crowd(each)
