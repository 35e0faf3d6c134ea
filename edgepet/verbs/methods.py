"""``methods``: every method, its paper, and its parameters and kilobytes on a backbone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgepet.errors import InputError
from edgepet.methods import METHODS, Branching, configure
from edgepet.methods.method import count, fp16_bytes
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, format_number, left, right
from edgepet.spec import ImageSize
from edgepet.verbs.verb import Options, Parser, Verb, image_size_option

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """``fp16_bytes`` is what a pack stores in fp16, head and manifest left out; 0 where there is no place for it.

    ``reason`` is why its defaults do not suit the backbone, as more values than its layers have: both are 0 then.
    """

    name: str
    paper: str
    foldable: bool
    trainable_params: int | None
    fp16_bytes: int | None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodList:
    """A row for each method, in the order of ``METHODS``."""

    methods: tuple[MethodRow, ...]


def methods(backbone: str | Backbone | None = None, *, image_size: ImageSize | None = None) -> MethodList:
    """Every method at its defaults; without a backbone nothing is counted.

    Raises:
        InputError: no such backbone, or a size that it cannot take.
        MissingError: a backbone is given, and torch or timm is not installed.
    """
    loaded = load_backbone(backbone, image_size=image_size) if isinstance(backbone, str) else backbone
    return MethodList(methods=tuple(_row(name, loaded) for name in METHODS))


def _row(name: str, backbone: Backbone | None) -> MethodRow:
    method = configure(name)
    row = MethodRow(
        name=name, paper=method.paper, foldable=not isinstance(method, Branching), trainable_params=None,
        fp16_bytes=None,
    )  # fmt: skip
    if backbone is None:
        return row
    layers, tensors = backbone.layers, backbone.tensors
    try:
        return replace(
            row, trainable_params=count(method, layers, tensors), fp16_bytes=fp16_bytes(method, layers, tensors)
        )
    except InputError as refusal:
        return replace(row, trainable_params=0, fp16_bytes=0, reason=str(refusal).partition("\n")[0])


def _options(parser: Parser) -> None:
    parser.add_argument("--backbone", metavar="B", help="count parameters on it (default: nothing is counted)")
    image_size_option(parser, "pixels of a square input, or HEIGHTxWIDTH, with --backbone (default: the backbone's)")


def _run(options: Options, progress: Progress) -> MethodList:
    del progress
    return methods(options.backbone or None, image_size=options.image_size)


def _screen(report: MethodList) -> Screen:
    rows = [(m.name, m.paper, "folds" if m.foldable else "branch", *_size(m)) for m in report.methods]
    yield Table("methods", (*left("method", "paper", ""), *right("parameters", "fp16")), rows)
    yield lines(*(f"  {row.reason}" for row in report.methods if row.reason))


def _size(row: MethodRow) -> tuple[str, str]:
    if row.fp16_bytes is None:
        return "–", "–"
    if not row.trainable_params and row.name != "linear-probe":
        return "no place", "–"
    return format_number(row.trainable_params), format_bytes(row.fp16_bytes)


VERB = Verb(options=_options, run=_run, screen=_screen)
