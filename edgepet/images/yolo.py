"""YOLO's text, one file an image: a line an object, its class's number and its middle and size in parts of the image.

A line may have an outline in place of a box, x and y of three points or more: its box is taken. Format: Ultralytics'
documentation, "Object Detection Datasets Overview" and "Instance Segmentation Datasets Overview".
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from edgepet.errors import InputError
from edgepet.files import read_file
from edgepet.images.boxes import FRACTIONS, Boxes, box_within

_ENTRY = re.compile(r"(?:-|\d+\s*:)\s*(.+)")  # of a list or a table below `names:`


def read_yolo(file: Path, classes: int, bad: list[InputError]) -> Boxes:
    """The boxes of one image in parts of it; lines that are none are put into ``bad``.

    Raises:
        InputError: the file is no text.
    """
    objects, seen = list[tuple[tuple[float, ...], int, bool]](), set[str]()
    for number, line in enumerate(_lines(file), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            where = f"{file}:{number}"
            if " ".join(fields) in seen:
                raise InputError(where, "must be another object than those above", got=repr(line[:80]))
            seen.add(" ".join(fields))
            objects.append((*_object(fields, classes, where), False))
        except InputError as error:
            bad.append(error)
    return Boxes.of(objects)


def _object(fields: list[str], classes: int, where: str) -> tuple[tuple[float, ...], int]:
    label, told = fields[0], [_number(text) for text in fields[1:]]
    if not label.isdecimal() or int(label) >= classes:
        raise InputError(where, f"needs the number of a class, 0 to {classes - 1}, first", got=repr(label[:80]))
    outline = len(told) >= 6 and len(told) % 2 == 0
    if not all(map(math.isfinite, told)) or (len(told) != 4 and not outline):
        what = "needs middle x and y, width and height behind the class, or the points of an outline"
        raise InputError(where, what, got=repr(" ".join(fields[1:])[:80]))
    if outline:
        x, y = told[0::2], told[1::2]
        return box_within((min(x), min(y), max(x), max(y)), FRACTIONS, where), int(label)
    x_middle, y_middle, width, height = told
    corners = (x_middle - width / 2, y_middle - height / 2, x_middle + width / 2, y_middle + height / 2)
    return box_within(corners, FRACTIONS, where), int(label)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def yaml_names(file: Path) -> tuple[str, ...]:
    """The names of the classes that a ``data.yaml`` lists under ``names``, as Ultralytics and Roboflow write them.

    Raises:
        InputError: it has no such list in one of three forms: ``[a, b]``, ``- a`` a line, or ``0: a`` a line.
    """
    lines = _lines(file)
    start = next((number for number, line in enumerate(lines) if line.startswith("names:")), None)
    names = list[str]()
    if start is not None:
        told = _bare(lines[start].removeprefix("names:"))
        if told.startswith("["):
            below = [told, *(line.strip() for line in lines[start + 1 :])]
            inside, closed, _ = " ".join(below)[1:].partition("]")
            names = [_bare(each) for each in inside.split(",") if each.strip()] if closed else []
        else:
            for line in lines[start + 1 :]:
                entry = _ENTRY.fullmatch(_bare(line))
                if entry is None and _bare(line):
                    break
                names += [] if entry is None else [_bare(entry[1])]
    if not names or len(set(names)) < len(names):
        fix = f"write {file.parent / 'classes.txt'} with a class a line"
        got = "a name twice" if names else "none that is read here"
        raise InputError(str(file), "needs a list of names of its own under `names:`", got=got, fix=fix)
    return tuple(names)


def _bare(text: str) -> str:
    """Without a comment, spaces and quotes around."""
    text = text.split(" #")[0].strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _lines(file: Path) -> list[str]:
    try:
        return read_file(file).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(str(file), "must be text in UTF-8", got=f"byte {error.start}") from error
