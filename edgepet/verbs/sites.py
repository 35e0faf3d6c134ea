"""``sites``: how few numbers suffice to tune each submodule of a backbone on a task, and where a method should go."""

from __future__ import annotations

import hashlib
import itertools
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.canonical import canonical_json, parse_json
from edgepet.errors import InputError, option, require
from edgepet.files import cache_folder, made_cache, made_folder, read_file, write_file
from edgepet.images.folders import Split
from edgepet.images.held import ALONE, forget
from edgepet.images.notes import Tell, tell_nobody, tell_of
from edgepet.images.sets import ImageSet, draw, load_sets
from edgepet.measuring.machine import environment
from edgepet.methods.method import fp16_bytes
from edgepet.reports.screen import Screen, lines, program
from edgepet.reports.tables import (
    NONE,
    Table,
    format_bytes,
    format_number,
    format_percent,
    format_seconds,
    left,
    right,
)
from edgepet.spec import FilePath, ImageSize, spelled_size
from edgepet.strict import ObjectReader
from edgepet.verbs.verb import (
    Options,
    Parser,
    Verb,
    backbone_option,
    image_size_option,
    natural,
    pairs,
)

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone
    from edgepet.reports.progress import Progress
    from edgepet.tuning.intrinsic import Ground, Measured, Reached
    from edgepet.tuning.placing import Choice, Place
    from edgepet.tuning.subspaces import Submodule

METHOD, VAL_FRACTION = "lora", 0.2
IMAGES, JUDGED = 200, 3  # to tune on, and as many times that to judge on: a fit of a ViT-S at 112 px takes seconds
MOST_BUDGET = 1e9  # kilobytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRow:
    """A submodule: layers of the kind ``on`` in ``blocks``, with ``parameters`` weights and biases.

    ``dimension`` is of the smallest random subspace in which tuning takes 90 % of ``gain`` off the loss on held-out
    images, which is what tuning the whole submodule takes off it; None where that is not above ``error``, its standard
    error, and ``parameters`` where no subspace that was tried reached it. ``top1`` is that of the whole submodule;
    ``tried`` are all fits, the whole submodule's first.
    """

    name: str
    on: str
    blocks: str
    parameters: int
    dimension: int | None
    gain: float
    error: float
    top1: float
    tried: tuple[Reached, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SitesReport:
    """``on`` and ``blocks`` are the settings that ``method`` should have within ``budget_bytes``.

    ``on`` is empty where the method goes to no layers; ``blocks`` is None, and so is ``fp16_bytes``, where nothing
    gains, or nothing that fits. ``fp16_bytes`` is what the method stores there in an fp16 pack, head and manifest left
    out; ``least_bytes`` what it stores in the smallest place that gains, None where none does. ``train`` are the words
    behind ``edgepet`` that train it so, output aside. ``probe_top1`` is what the head alone reaches.
    ``estimate_seconds`` is what was said before; None where all was known from a run before.
    """

    backbone: str
    sites: tuple[SiteRow, ...]
    method: str
    settings: Mapping[str, str]
    on: tuple[str, ...]
    blocks: str | None
    fp16_bytes: int | None
    least_bytes: int | None
    budget_bytes: int
    train: tuple[str, ...]
    probe_top1: float
    images: Mapping[str, int]
    estimate_seconds: float | None
    seconds: float


def sites(
    data: FilePath,
    backbone: str | Backbone,
    *,
    budget: float | None = None,
    method: str = METHOD,
    settings: Mapping[str, str] | None = None,
    image_size: ImageSize | None = None,
    images: int = IMAGES,
    seed: int = 0,
    val_fraction: float = VAL_FRACTION,
    stage: Callable[[str], None] = lambda name: None,
    tell: Tell = tell_nobody,
) -> SitesReport:
    """Measure the local intrinsic dimension of every submodule of ``backbone`` on ``data``, and choose among them.

    What was measured is kept in the cache: a run that was killed goes on, and another budget or method takes seconds.

    Args:
        data: a folder as ``train`` takes it; test/ is not looked at.
        budget: kilobytes, of 1000 bytes, that the method may store in an fp16 pack, head and manifest left out; None
            is what it takes where it goes by itself.
        method: what would be tuned there. It decides nothing of what is measured.
        settings: of the method, but for ``on`` and ``blocks``.
        images: as many of train are tuned on, at most, and on up to three times as many of val, and of train's others,
            they are judged; drawn by ``seed``, as everything is.

    Raises:
        InputError: data, backbone or method at fault, a budget that holds nothing, or a loss that stopped being
            finite.
        MissingError: torch or timm is not installed.
    """
    require("torch", extra="train", purpose="sites")
    began, settings, folder = time.perf_counter(), dict(settings or {}), Path(data)
    made_cache()
    from edgepet.tuning.placing import choose, ranked, size_of

    _require(images, budget, method, settings)
    sets = draw(folder, images, JUDGED * images, val_fraction=val_fraction, seed=seed)
    tell_of(folder, sets, tell)
    stage("load the backbone")
    loaded = _loaded(backbone, image_size)
    parts, there, budget_bytes = _places(loaded, method, settings, budget)
    stage("read images, and train the head alone")
    ground = _ground(loaded, sets, seed)
    measured, estimate = _measured(ground, parts, stage, tell)
    found = ranked(measured, there)
    choice = choose(found, budget_bytes, size_of(loaded, method, settings))
    flags = {"backbone": loaded.spec, "method": method, "seed": str(seed) if seed else None,
             "img-size": None if image_size is None else spelled_size(loaded.preprocess.image_size),
             "val-fraction": None if val_fraction == VAL_FRACTION else str(val_fraction)}  # fmt: skip
    return SitesReport(
        backbone=loaded.label, sites=tuple(map(_row, measured)), method=method, settings=settings,
        on=choice.on if choice else (), blocks=choice.blocks if choice else None,
        fp16_bytes=choice.fp16_bytes if choice else None, budget_bytes=budget_bytes,
        least_bytes=min((each.fp16_bytes for each in found), default=None),
        train=_command(choice, folder, flags, settings) if choice else (), probe_top1=ground.top1,
        images={split: len(each) for split, each in sets.items()}, estimate_seconds=estimate,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _require(images: int, budget: float | None, method: str, settings: Mapping[str, str]) -> None:
    """Refuse what needs neither data nor backbone to be seen."""
    from edgepet.tuning.placing import unplaced

    if images < 2:
        raise InputError(option("images"), "must be at least 2: one alone has no standard error", got=images)
    if budget is not None and not 0 < budget <= MOST_BUDGET:
        raise InputError(option("budget"), f"must be above 0 kilobytes, and at most {MOST_BUDGET:g}", got=budget)
    unplaced(method, settings)


def _places(
    backbone: Backbone, method: str, settings: Mapping[str, str], budget: float | None
) -> tuple[tuple[Submodule, ...], tuple[Place, ...], int]:
    """The submodules of ``backbone``, where among them the method can go, and the bytes that it may store there."""
    from edgepet.tuning.placing import places, require_a_place, unplaced
    from edgepet.tuning.subspaces import submodules

    parts = submodules(backbone.layers, backbone.tensors)
    if not parts:
        raise InputError(backbone.label, "has no numbered blocks with linear layers or convolutions in them")
    there = places(backbone, method, settings, parts)
    own_bytes = fp16_bytes(unplaced(method, settings), backbone.layers, backbone.tensors)
    budget_bytes = own_bytes if budget is None else round(1000 * budget)
    require_a_place(there, budget_bytes)
    return parts, there, budget_bytes


def _command(
    choice: Choice, data: Path, given: Mapping[str, str | None], settings: Mapping[str, str]
) -> tuple[str, ...]:
    placed = dict(settings) | ({"on": ",".join(choice.on)} if choice.on else {}) | {"blocks": choice.blocks}
    flags = [(f"--{name}", value) for name, value in given.items() if value is not None]
    flags += [("--set", f"{name}={value}") for name, value in placed.items()]
    return ("train", str(data), *itertools.chain.from_iterable(flags))


def _loaded(backbone: str | Backbone, image_size: ImageSize | None) -> Backbone:
    from edgepet.networks.loading import load_backbone

    return load_backbone(backbone, image_size=image_size) if isinstance(backbone, str) else backbone


def _ground(backbone: Backbone, sets: Mapping[Split, ImageSet], seed: int) -> Ground:
    from edgepet.tuning.fit import LabelledPixels
    from edgepet.tuning.intrinsic import prepare

    train, val = (LabelledPixels(*loaded) for loaded in load_sets(list(sets.values()), backbone.preprocess))
    return prepare(backbone, train, val, classes=len(sets["train"].classes), seed=seed)


def _row(measured: Measured) -> SiteRow:
    each, whole = measured.submodule, measured.tried[0]
    return SiteRow(
        name=each.name,
        on=each.on,
        blocks=each.blocks,
        parameters=each.parameters,
        dimension=measured.dimension,
        gain=whole.gain,
        error=whole.error,
        top1=whole.top1,
        tried=measured.tried,
    )


def _measured(
    ground: Ground, found: Sequence[Submodule], stage: Callable[[str], None], tell: Tell
) -> tuple[tuple[Measured, ...], float | None]:
    """Every submodule, those that the cache lacks measured now; and how long these were to take."""
    from edgepet.tuning.intrinsic import DIMENSIONS, Group, Measured, most_seconds
    from edgepet.tuning.remembered import Place as Remembering
    from edgepet.tuning.remembered import most_held

    asked = _asked(ground)
    files = {each: _file({**asked, "on": each.on, "blocks": each.blocks}) for each in found}
    known = {each: kept for each, file in files.items() if (kept := _read(file)) is not None}
    missing, estimate = [each for each in found if each not in known], None
    if missing:
        made_folder(_file(asked).parent, "what is measured is kept there")
        estimate = most_seconds(ground, missing)
        before = f", {len(known)} are known from before" if known else ""
        told = f"{len(missing)} submodules{before}: up to {1 + len(DIMENSIONS)} short fits each"
        tell(f"{told}, at most {format_seconds(estimate)} at the speed of now", ())
    place = Remembering(
        folder=_file(asked).with_suffix(".features"), budget_bytes=most_held(), identity=asked, turn=ALONE,
        tell=tell, stage=lambda name: None,
    )  # fmt: skip
    blocks, group = "", None
    for number, each in enumerate(missing, start=1):
        stage(f"{each.name}, {number} of {len(missing)}")
        if group is None or blocks != each.blocks:
            blocks, group = each.blocks, Group(ground, each, place)
        known[each] = group.measured(each)
        _keep(files[each], known[each])
    forget(place.folder)
    return tuple(Measured(submodule=each, tried=known[each]) for each in found), estimate


def _asked(ground: Ground) -> dict[str, object]:
    """All that decides what is measured, but for the submodule."""
    import torch

    from edgepet.tuning import intrinsic

    digest = hashlib.sha256()
    for images in (ground.train, ground.val):
        for array in (images.pixels, images.labels):
            digest.update(np.ascontiguousarray(array).data)
    return {
        "format": "edgepet-sites",
        "version": 1,
        "backbone": ground.backbone.fingerprint,
        "preprocess": ground.backbone.preprocess.as_json(),
        "classes": ground.probe.linear.out_features,
        "images": digest.hexdigest(),
        "seed": ground.seed,
        "fits": intrinsic.SETTINGS,
        "threads": torch.get_num_threads(),
        "versions": {name: environment().versions.get(name) for name in ("edgepet", "torch", "timm")},
    }


def _file(asked: Mapping[str, object]) -> Path:
    return cache_folder() / "sites" / f"{hashlib.sha256(canonical_json(asked)).hexdigest()}.json"


def _read(file: Path) -> tuple[Reached, ...] | None:
    """What an earlier run measured; None where there is nothing, or nothing whole."""
    from edgepet.tuning.intrinsic import Reached

    try:
        told = [ObjectReader(one, str(file), error=InputError) for one in parse_json(read_file(file))["tried"]]
        tried = tuple(
            Reached(
                dimension=one.integer("dimension"),
                gain=one.number("gain"),
                error=one.number("error"),
                top1=one.number("top1"),
            )
            for one in told
        )
    except (InputError, ValueError, TypeError, KeyError):
        return None
    return tried or None


def _keep(file: Path, tried: Sequence[Reached]) -> None:
    write_file(file, canonical_json({"tried": [asdict(one) for one in tried]}))


# -------------------------------------------------------------------------------------------------- the command line


def _options(parser: Parser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", help="a folder with train/ and val/, or of class folders")
    backbone_option(parser, required=True)
    told = "kilobytes that the method may store in an fp16 pack beside the head (default: what it takes by itself)"
    add("--budget", type=float, metavar="KB", help=told)
    add("--method", default=METHOD, metavar="M", help="what would be tuned (default: %(default)s)")
    told = "a setting of the method, as often as needed: --set rank=4 (default: the paper's for a ViT)"
    add("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help=told)
    image_size_option(parser, "pixels of a square input, or HEIGHTxWIDTH (default: the backbone's)")
    told = "images to tune on, at most; up to three times as many judge (default: %(default)s)"
    add("--images", type=natural, default=IMAGES, metavar="N", help=told)
    told = "of every random choice: equal seeds measure the same (default: %(default)s)"
    add("--seed", type=natural, default=0, metavar="N", help=told)
    told = "part of each class held out where DATA has no val/ (default: %(default)s)"
    add("--val-fraction", type=float, default=VAL_FRACTION, metavar="X", help=told)


def _run(options: Options, progress: Progress) -> SitesReport:
    with progress.stages() as stage:
        return sites(
            Path(options.data), options.backbone, budget=options.budget, method=options.method,
            settings=pairs(options.settings), image_size=options.image_size, images=options.images, seed=options.seed,
            val_fraction=options.val_fraction, stage=stage, tell=progress.tell,
        )  # fmt: skip


def _screen(report: SitesReport) -> Screen:
    rows = [
        (row.on, row.blocks, format_number(row.parameters), _dimension(row), _gain(row), format_percent(row.top1))
        for row in report.sites
    ]
    columns = (*left("submodule", "blocks"), *right("weights", "dimension", "off the loss", "top-1"))
    yield Table(f"where {report.backbone} wants to be tuned", columns, rows)
    yield lines(
        f"  of {report.images['val']} held-out images; the head alone has {format_percent(report.probe_top1)}",
        *_chosen(report),
        f"  {format_seconds(report.seconds)} in all",
        f"next: {program()} {shlex.join(report.train)} -o task.pet" if report.train else None,
    )


def _chosen(report: SitesReport) -> list[str]:
    settings = "".join(f" {key}={value}" for key, value in report.settings.items())
    within = f"  within {format_bytes(report.budget_bytes)} of {report.method}{settings}:"
    if report.fp16_bytes is not None:
        on = f"--set on={','.join(report.on)} " if report.on else ""
        return [f"{within} {on}--set blocks={report.blocks}, {format_bytes(report.fp16_bytes)}"]
    if report.least_bytes is None:
        return ["  nothing gains more than its standard error: try more --images"]
    return [f"{within} nothing; the smallest place that gains takes {format_bytes(report.least_bytes)}"]


def _dimension(row: SiteRow) -> str:
    if row.dimension is None:
        return NONE
    largest = max(each.dimension for each in row.tried)
    return f"above {format_number(largest)}" if row.dimension == row.parameters else format_number(row.dimension)


def _gain(row: SiteRow) -> str:
    return f"{row.gain:.4f} ± {row.error:.4f}"


VERB = Verb(options=_options, run=_run, screen=_screen)
