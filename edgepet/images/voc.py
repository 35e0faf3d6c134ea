"""Pascal VOC's XML, one file an image: corners in pixels that count from 1, and both of them are inside.

What is ``difficult`` is not counted, as VOC's own evaluation has it. Format: Everingham et al. 2010, "The Pascal Visual
Object Classes (VOC) Challenge", and the development kit's Annotations/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree

from edgepet.errors import InputError
from edgepet.files import read_file
from edgepet.images.boxes import Boxes, box_within

_Element: TypeAlias = "ElementTree.Element[str]"


@dataclass(frozen=True, slots=True)
class VocFile:
    """One image's XML, before classes have numbers; ``extent`` (height, width), None where it tells none."""

    where: Path
    extent: tuple[float, float] | None
    objects: tuple[tuple[str, tuple[float, ...], bool], ...]

    @property
    def names(self) -> set[str]:
        """The classes that it has objects of."""
        return {name for name, _, _ in self.objects}

    def boxes(self, numbers: Mapping[str, int], extent: tuple[float, float], bad: list[InputError]) -> Boxes:
        """Its objects on an image of ``extent``; what is none is put into ``bad``."""
        found = list[tuple[tuple[float, ...], int, bool]]()
        for number, (name, corners, difficult) in enumerate(self.objects):
            where = f"{self.where}: object {number}"
            try:
                if name not in numbers:
                    fix = "name the class in classes.txt, or remove the object"
                    raise InputError(where, "must be of a class of the folder", got=repr(name[:80]), fix=fix)
                found.append((box_within(corners, extent, where), numbers[name], difficult))
            except InputError as error:
                bad.append(error)
        return Boxes.of(found)


def read_voc(file: Path) -> VocFile:
    """The objects of one image, their corners counted from 0 as everywhere else.

    Raises:
        InputError: it is no XML of this kind, or a number is none.
    """
    data = read_file(file)
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise InputError(str(file), "must be XML without declarations of its own", got="a DOCTYPE or an ENTITY")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(str(file), "must be XML", got=str(error)[:80]) from error
    if root.tag != "annotation":
        raise InputError(str(file), "must have <annotation> around all", got=f"<{root.tag[:80]}>")
    size = root.find("size")
    extent = None if size is None else (_number(size, "height", file, "size"), _number(size, "width", file, "size"))
    if extent is not None and min(extent) < 1:  # as tools write it that have not opened the image
        extent = None
    objects = tuple(_object(each, file, f"object {n}") for n, each in enumerate(root.findall("object")))
    return VocFile(file, extent, objects)


def _object(each: _Element, file: Path, place: str) -> tuple[str, tuple[float, ...], bool]:
    name, box = (each.findtext("name") or "").strip(), each.find("bndbox")
    if not name or box is None:
        raise InputError(f"{file}: {place}", "needs <name> and <bndbox>", got="no <bndbox>" if name else "no <name>")
    x1, y1, x2, y2 = (_number(box, key, file, f"{place}: bndbox") for key in ("xmin", "ymin", "xmax", "ymax"))
    return name, (x1 - 1, y1 - 1, x2, y2), (each.findtext("difficult") or "0").strip() == "1"


def _number(element: _Element, key: str, file: Path, place: str) -> float:
    text = (element.findtext(key) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{file}: {place}", f"needs a number in <{key}>", got=repr(text[:80]))
    return value
