"""What a verb is to the command line, and the options that several verbs have."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from edgepet.deltas.delta import require_task
from edgepet.device.runtimes import DEVICES
from edgepet.errors import InputError, option
from edgepet.files import require_file_place
from edgepet.spec import ImageSize

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress
    from edgepet.reports.screen import Screen

MOST_THREADS = 1024  # of a runtime: more is a slip, and some take it at its word
Options: TypeAlias = argparse.Namespace
Parser: TypeAlias = argparse.ArgumentParser


def _never(report: object) -> bool:
    del report
    return False


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A verb that answers as questions come: ``asked`` is whether it was asked to, ``run`` gives a report for each.

    ``screen`` is what of one report people see; ``failed`` whether it is of a question that had no answer.
    """

    asked: Callable[[Options], bool]
    run: Callable[[Options, Progress], Iterator[object]]
    screen: Callable[[Any], Screen]
    failed: Callable[[Any], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb of the command line.

    ``options`` declares its options. Their ``dest`` is the field of the library that they fill, so that an error about
    a field can be told of its flag. ``run`` does it and returns its report; ``screen`` is what of the report people
    see; ``failed`` is whether a check in it said no; ``speaks`` is false in all processes of a training but one;
    ``stream`` is another way of running it.
    """

    options: Callable[[Parser], None]
    run: Callable[[Options, Progress], object]
    screen: Callable[[Any], Screen]
    failed: Callable[[Any], bool] = _never
    speaks: Callable[[], bool] = _always
    stream: Stream | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A verb that is a word before others: each of ``actions``, by its name, with what it does."""

    actions: Mapping[str, tuple[Verb, str]]


# ----------------------------------------------------------------------------------------- options that verbs share


def backbone_option(parser: Parser, *, required: bool = False) -> None:
    """--backbone, by default the one that the pack names."""
    told = "a timm name, NAME@FILE, or demo:vit-small" + ("" if required else " (default: the one that the pack names)")
    parser.add_argument("--backbone", required=required, metavar="B", help=told)


def image_size_option(parser: Parser, told: str) -> None:
    """--img-size, with what it means to the verb."""
    parser.add_argument("--img-size", dest="image_size", type=sides, metavar="N", help=told)


def data_option(parser: Parser, default: str = "the work folder's") -> None:
    """--data, images to compare on."""
    parser.add_argument("--data", metavar="DIR", help=f"images to compare on (default: {default})")


def output_option(parser: Parser, metavar: str, told: str) -> None:
    """-o, what is written."""
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=told)


def budget_options(parser: Parser) -> None:
    """--calib-images and --max-drop."""
    told = "images of --calib to use, at most (default: %(default)s)"
    parser.add_argument("--calib-images", type=natural, default=256, metavar="N", help=told)
    told = "points of top-1 that int8 may lose on train and val (default: the loss is reported, not limited)"
    parser.add_argument("--max-drop", type=float, metavar="POINTS", help=told)


def pack_precision_option(parser: Parser) -> None:
    """--precision of packs."""
    told = "of packs: int8 is on the int8 backbone that tasks share (default: %(default)s)"
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int8"], help=told)


def store_option(parser: Parser) -> None:
    """--store, the folder of a device."""
    parser.add_argument("--store", required=True, metavar="DIR", help="the device's folder")


def threads_option(parser: Parser) -> None:
    """--threads."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the runtime (default: all cores)")


def device_option(parser: Parser) -> None:
    """--device."""
    told = "what it runs on, where the runtime has one here (default: the CPU, of an engine a GPU)"
    parser.add_argument("--device", choices=DEVICES, help=told)


# ------------------------------------------------------------------------------------------- texts that become values


def natural(text: str) -> int:
    """A whole number of at least 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 0, got {text!r}")
    return int(text)


def size_bytes(text: str) -> int:
    """Bytes of a size such as 500MB or 2GB, of 1000 each, 2GiB, of 1024, or a plain number.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?(?:([kMGT])(i?))?B?", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"needs a size such as 500MB or 2GB, got {text!r}")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".find((prefix or "").lower()) + 1 if prefix else 0))


def sides(text: str) -> ImageSize:
    """An image size: ``224``, a square, or ``224x384``, height and width.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    match = re.fullmatch(r"(-?[0-9]{1,9})(?:[xX]([0-9]{1,9}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"needs a number of pixels, or HEIGHTxWIDTH, got {text!r}")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def names(text: str) -> list[str]:
    """Names with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]


def pairs(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, many times.

    Raises:
        InputError: one has no equals sign or no name.
    """
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(option("settings"), "needs NAME=VALUE", got=repr(pair))
        found[key] = value
    return found


def require_pack_place(output: Path) -> None:
    """Refuse a pack's place before the work: its name, or a folder that cannot take it.

    Raises:
        InputError: the name does not end in .pet, a folder is there, or the folder that it is in cannot be written.
    """
    if output.suffix != ".pet":
        raise InputError(option("output"), "needs a file name ending in .pet", got=repr(output.name))
    require_file_place(output)


def require_task_name(output: Path) -> None:
    """Refuse an output whose name, which becomes the task's, is no task's name.

    Raises:
        InputError: it is none.
    """
    require_task(output.stem, option("output"), "names the task, and needs a name")


def path(text: str | None) -> Path | None:
    """A path, or None where none was given."""
    return None if text is None else Path(text)


def at_least_one(field: str, count: int | None, most: int | None = None) -> None:
    """Refuse a count below 1, or above ``most``; None is no count.

    Raises:
        InputError: it is.
    """
    if count is not None and count < 1:
        raise InputError(option(field), "must be at least 1", got=count)
    if count is not None and most is not None and count > most:
        raise InputError(option(field), f"must be at most {most}", got=count)
