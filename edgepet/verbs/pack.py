"""``pack``: store a task in fewer bytes, sign it, number it; and ``keygen``: a key to sign with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from edgepet.calibration.budget import Drop, require_resolution
from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import METRICS
from edgepet.device.answers import labels_of
from edgepet.errors import CheckError, InputError, option, require
from edgepet.files import read_file, write_file
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.codecs import CODECS, Codec, Coding
from edgepet.packs.container import is_old
from edgepet.packs.manifest import MAX_SEQUENCE
from edgepet.packs.old import read_old
from edgepet.packs.pack import EVERY, Pack, PackCodec, encode_pack, read_pack
from edgepet.packs.signatures import make_keys, require_key, sign
from edgepet.proving.coding import Recoded, Recoding, reworded
from edgepet.proving.subject import Subject
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, format_names, format_number, left, right
from edgepet.spec import FilePath
from edgepet.verbs.export import CALLED
from edgepet.verbs.judged_images import judged_images
from edgepet.verbs.verb import (
    Options,
    Parser,
    Verb,
    backbone_option,
    data_option,
    natural,
    output_option,
    path,
    require_pack_place,
)

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress

Asked: TypeAlias = Codec | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneReport:
    """A plane of a pack: ``format`` and ``group`` (values of one scale, 0 where there are no codes), and its bytes."""

    name: str
    format: str
    group: int
    values: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What ``pack`` wrote.

    ``max_abs_diff`` is on logits of ``n`` images, of the pack that was read and the one that was written, of boxes also
    on the distances to their sides from all places, in strides, before any is chosen; of several heads it is the
    largest. Where no number was stored otherwise, both are 0. ``drop`` is in points of ``metric``, "top1", "miou" or
    "map", with its interval, of several ``heads`` of the one that loses most, None where no labels were given;
    ``top1_drop`` is the same as a fraction of 1, None of other metrics too. ``classes`` are those that it was given by
    text, none where it has those that it had. ``answers`` are of the pack's heads.
    """

    path: Path
    bytes: int
    source_bytes: int
    codec: PackCodec
    planes: tuple[PlaneReport, ...]
    max_abs_diff: float
    top1_drop: float | None
    n: int
    drop: Drop | None
    sequence: int
    signed: bool
    metric: str = "top1"
    classes: tuple[str, ...] = ()
    heads: Mapping[str, Drop] = field(default_factory=dict)
    answers: tuple[str, ...] = ("class",)

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has: ``heads`` where there are several."""
        left_out = {"answers"} if len(self.answers) > 1 else {"answers", "heads"}
        return [each.name for each in fields(self) if each.name not in left_out]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReport:
    """What ``keygen`` wrote: a private key, and the public one that devices trust."""

    path: Path
    public: Path


def pack(
    source: FilePath,
    output: FilePath,
    *,
    codec: Asked | None = None,
    backbone: AnyBackbone = None,
    data: FilePath | None = None,
    max_drop: float | None = None,
    key: FilePath | None = None,
    sequence: int | None = None,
    text: FilePath | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> PackReport:
    """Write the pack ``source`` again as ``output``: in fewer bytes, signed, with another number, or all of it.

    Without ``codec`` every number stays as it is stored. With one, the folded network's answers are compared with those
    of ``source``: on the val split of ``data``, else on what training held out, else on noise. A pack from before
    version 1 was final is written anew.

    Args:
        codec: of every plane, or "auto": the smallest of every plane that together lose at most ``max_drop``.
        max_drop: points of its metric that it may lose on ``data``, of several heads the one that loses most.
        key: the file of a private key to sign with; without one the pack is not signed, whatever ``source`` was.
        sequence: the number among the task's packs (default: that of ``source``).
        text: a table with a vector for each class that the task is to have instead, where its head compares places with
            text; nothing is trained, and how well the new classes fit is judged by ``evaluate``.

    Raises:
        PackError, InputError: ``source``, images or options at fault.
        CheckError: it loses more than ``max_drop``.
        MissingError: torch, to compare with, what computes AP of boxes, or cryptography, to sign with, is not there.
    """
    source, output = Path(source), Path(output)
    require_pack_place(output)
    _require_together(codec, data, max_drop, text)
    if sequence is not None and not 0 <= sequence <= MAX_SEQUENCE:
        raise InputError(option("sequence"), f"must be from 0 to {MAX_SEQUENCE}", got=sequence)
    if key is not None:
        require_key(Path(key))
    given = read_file(source)
    made = _made(source, given, codec, backbone, data, max_drop, sequence, text, stage)
    signed = made.data if key is None else sign(made.data, Path(key))
    written = read_pack(signed, answers=EVERY)  # what a device would refuse is not written
    write_file(output, signed)
    return PackReport(
        path=output,
        bytes=len(signed),
        source_bytes=len(given),
        codec=written.codec,
        planes=_planes(written),
        classes=() if text is None else labels_of(written.delta),
        sequence=written.sequence,
        signed=key is not None,
        **_compared(made, written.delta),
    )


def _compared(made: Recoded, delta: Delta) -> dict[str, Any]:
    """What a report says of how answers have changed; where nothing was judged, ``metric`` is the first head's."""
    metric = "top1" if delta.labels else METRICS[delta.heads[0].head.answer]
    return {
        "max_abs_diff": made.max_abs,
        "n": made.n,
        "drop": made.drop,
        "top1_drop": None if made.drop is None or not delta.labels else made.drop.points / 100,
        "metric": metric if made.drop is None else made.drop.metric,
        "heads": made.drops,
        "answers": delta.answers,
    }


def _made(
    source: Path, given: bytes, codec: Asked | None, backbone: AnyBackbone, data: FilePath | None,
    max_drop: float | None, sequence: int | None, text: FilePath | None, stage: Callable[[str], None],
) -> Recoded:  # fmt: skip
    """What is asked for of the file ``source``, whose bytes are ``given``; nobody has signed it."""
    if is_old(given):
        return _anew(given, source.name, codec, sequence)
    if text is not None:
        return reworded(source, backbone, Path(text), sequence)
    return _recoded(source, codec, backbone, data, max_drop, sequence, stage)


def keygen(output: FilePath) -> KeyReport:
    """Make a key: the private one as ``output``, which only its owner can read, and the public one beside it.

    Raises:
        InputError: either is there already, or cannot be written.
        MissingError: cryptography is not installed.
    """
    return KeyReport(path=Path(output), public=make_keys(Path(output)))


def _require_together(
    codec: Asked | None, data: FilePath | None, max_drop: float | None, text: FilePath | None
) -> None:
    if text is not None and codec is not None:
        fix = f"leave {option('codec')} out, and store what comes out in fewer bytes"
        raise InputError(option("text"), f"does not go with {option('codec')}", got=codec, fix=fix)
    if codec is None and (data is not None or max_drop is not None):
        raise InputError(option("codec"), "is needed: without it nothing is stored otherwise, and nothing compared")
    if max_drop is not None and data is None:
        raise InputError(option("max_drop"), "needs images with labels", fix=f"add {option('data')}")
    if codec == "auto" and max_drop is None:
        raise InputError(
            option("codec", "auto"), "needs a budget", fix=f"add {option('max_drop')} and {option('data')}"
        )


def _anew(given: bytes, where: str, asked: Asked | None, sequence: int | None) -> Recoded:
    """An old pack in the final format, with the very numbers that it had: no other codec may be asked for."""
    if asked is not None:
        fix = f"edgepet pack {where} -o NEW.pet, then this with NEW.pet"
        raise InputError(where, "was written before version 1 was final", fix=fix)
    delta, codec = read_old(given, where)
    made = encode_pack(delta, codec=codec, sequence=sequence or 0)
    if not _same(read_pack(made), delta):  # a scale far from one: fp16 has its difference from one less exactly
        made = encode_pack(delta, codec=codec, codings={"scale.s": Coding("fp32")}, sequence=sequence or 0)
    return Recoded(data=made)


def _same(pack: Pack, delta: Delta) -> bool:
    exact = read_pack(encode_pack(delta, codec="fp32")).planes
    return all(np.array_equal(plane.values, exact[name].values) for name, plane in pack.planes.items())


def _recoded(
    source: Path,
    codec: Asked | None,
    backbone: AnyBackbone,
    data: FilePath | None,
    max_drop: float | None,
    sequence: int | None,
    stage: Callable[[str], None],
) -> Recoded:
    subject = Subject(source, backbone, data, answers=EVERY)
    number = subject.pack.sequence if sequence is None else sequence
    if codec is None:
        kept = encode_pack(subject.delta, kept=subject.pack.planes, sequence=number)
        return Recoded(data=kept)
    require("torch", extra="train", purpose="comparing with the network in torch")
    images, judge = (subject.images[0], None) if data is None else judged_images(Path(data), subject.delta)
    if codec == "auto" and max_drop is not None and subject.delta.labels:  # of masks pixels count, of boxes objects
        require_resolution(max_drop, len(images))
    recoding = Recoding(subject, images, judge, number)
    if codec == "auto" and max_drop is not None:
        return recoding.smallest(max_drop, stage)
    stage(f"all planes in {codec}")
    made = recoding.in_codec(cast(Codec, codec))
    if made.drop is not None and max_drop is not None and made.drop.points > max_drop:
        what, fix = f"must lose at most {max_drop:g} points in {codec}", f"{option('codec', 'auto')}, or a wider"
        raise CheckError(str(source), what, got=made.told, fix=f"{fix} {option('max_drop')}")
    return made


def _planes(pack: Pack) -> tuple[PlaneReport, ...]:
    return tuple(
        PlaneReport(
            name=name,
            format=plane.stored.coding.format,
            group=plane.stored.coding.group,
            values=plane.stored.values,
            bytes=int(plane.tensor.nbytes),
        )
        for name, plane in sorted(pack.planes.items())
    )


def _options(parser: Parser) -> None:
    parser.add_argument("source", metavar="TASK.pet", help="the pack to write again")
    told = (
        "numbers as fp32, fp16, or codes of 8, 4 or 2 bits; auto takes for every plane the smallest that the budget"
        " allows (default: as they are)"
    )
    parser.add_argument("--codec", choices=[*CODECS, "auto"], help=told)
    backbone_option(parser)
    data_option(parser)
    told = (
        "points of top-1, mIoU or AP that it may lose on the val split of --data (default: the loss is reported, not"
        " limited)"
    )
    parser.add_argument("--max-drop", type=float, metavar="POINTS", help=told)
    told = "sign it with this private key, which `edgepet keygen` makes (default: it is not signed)"
    parser.add_argument("--sign", dest="key", metavar="KEY", help=told)
    told = "number among the task's packs: a device takes no older one (default: as it is)"
    parser.add_argument("--sequence", type=natural, metavar="N", help=told)
    told = (
        "a vector for each class that a head of score maps is to have instead, without training (default: its classes"
        " stay)"
    )
    parser.add_argument("--text", metavar="TABLE", help=told)
    output_option(parser, "OUT.pet", "where the pack goes")


def _run(options: Options, progress: Progress) -> PackReport:
    with progress.stages() as stage:
        return pack(
            options.source, options.output, codec=options.codec, backbone=options.backbone, data=path(options.data),
            max_drop=options.max_drop, key=path(options.key), sequence=options.sequence, text=path(options.text),
            stage=stage,
        )  # fmt: skip


def _screen(report: PackReport) -> Screen:
    if report.classes:
        compared = f"classes {format_names(report.classes)}, judged on no image yet"
    elif report.n == 0:
        compared = "every number is as it was"
    else:
        compared = f"{_differ(report)} on {report.n} images"
    drops = {f"{name}: " if len(report.heads) > 1 else "": drop for name, drop in report.heads.items()}
    yield lines(
        f"pack {report.path}  {format_bytes(report.source_bytes)} → {format_bytes(report.bytes)}",
        *(f"  {name}{_points(drop)}" for name, drop in drops.items()),
        f"  {compared}",
        f"  sequence {report.sequence}, {'signed' if report.signed else 'not signed'}",
    )
    rows = [
        (p.name, p.format, format_number(p.group) if p.group else "", format_number(p.values), format_bytes(p.bytes))
        for p in report.planes
    ]
    yield Table("planes", (*left("plane", "stored as"), *right("values of a scale", "values", "size")), rows)


def _differ(report: PackReport) -> str:
    what = "logits and distances" if "boxes" in report.answers else "logits"
    return f"{what} differ by at most {report.max_abs_diff:.2g}"


def _points(drop: Drop) -> str:
    of = "" if drop.metric == "top1" else f" of {CALLED[drop.metric]}"
    return f"{drop.points:+.2f} points{of} lost ({drop.low:+.2f} to {drop.high:+.2f}) on {drop.n} images"


def _key_options(parser: Parser) -> None:
    output_option(parser, "KEY", "where the private key goes; the public one goes to KEY.pub")


def _keygen(options: Options, progress: Progress) -> KeyReport:
    del progress
    return keygen(options.output)


def _key_screen(report: KeyReport) -> Screen:
    yield lines(
        f"private key {report.path}: keep it where packs are signed, and nowhere else",
        f"public key {report.public}: put it into the folder of keys that a device trusts",
    )


VERB = Verb(options=_options, run=_run, screen=_screen)
KEYGEN = Verb(options=_key_options, run=_keygen, screen=_key_screen)
