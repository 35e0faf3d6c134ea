"""``inspect``: what a pack or an exported model says of itself, read without its backbone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgepet.deltas.branches import Branch
from edgepet.deltas.delta import JudgedHead
from edgepet.deltas.heads import METRICS, Answer, Meaning
from edgepet.deltas.updates import Targeted, factors
from edgepet.device.artifact import Artifact
from edgepet.errors import InputError, option
from edgepet.files import read_file
from edgepet.packs.pack import Pack
from edgepet.packs.signatures import signer
from edgepet.proving.sources import PackSource, open_source
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, format_names, format_number, format_percent, left, right
from edgepet.spec import FilePath
from edgepet.verbs.card import require_card_place, write_card
from edgepet.verbs.verb import Options, Parser, Verb, path

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


_MOST_CLASSES = 8  # on the screen


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCount:
    """Updates or branches of one kind, how many there are, and the values that they bring, shared ones once."""

    kind: str
    count: int
    values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLine:
    """A head that reads maps: ``layers`` are kinds of layers in their order, ``values`` the numbers that they carry.

    ``metric`` is "miou" of masks and "map" of boxes and labels, and ``value`` what it was on ``n`` val images, None
    where it was not judged.
    """

    name: str
    answer: str
    classes: tuple[str, ...]
    reads: tuple[str, ...]
    layers: tuple[str, ...]
    values: int
    metric: str
    value: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneName:
    """The backbone that a model was made for, by name and by content."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """A pack or an artefact, read without its backbone; what an artefact does not keep is empty.

    ``int8_codes`` is the sha256 of the int8 backbone's codes that a pack has ranges for, ``int8_trunk`` that of the
    backbone's own ranges, where they hold in its trunk. ``signed`` is whether a pack
    has a signature; ``signed_by`` is the trusted key that it is of, None where no folder of such keys was given.
    ``answer`` is what the first head answers, of a class or a mask, and ``heads`` are those of a pack that read maps.
    ``codecs`` are those of a pack's planes. ``card`` are the files of a model card, where one was asked for.
    """

    kind: str
    task: str
    method: str
    settings: dict[str, object]
    backbone: BackboneName
    updates: tuple[UpdateCount, ...]
    branches: tuple[UpdateCount, ...]
    classes: tuple[str, ...]
    preprocess: dict[str, object]
    bytes_by_kind: dict[str, int]
    val_top1: float | None
    training: dict[str, object]
    licences: tuple[str, ...]
    signed_by: str | None
    verified: bool | None
    int8_codes: str | None = None
    int8_trunk: str | None = None
    signed: bool | None = None
    sequence: int | None = None
    codecs: dict[str, str] | None = None
    card: tuple[Path, Path] | None = None
    answer: str = "class"
    heads: tuple[HeadLine, ...] = ()


def inspect(path: FilePath, *, trusted: FilePath | None = None, card: FilePath | None = None) -> InspectReport:
    """What a pack or an artefact says of itself, and with a folder of ``trusted`` keys, who signed a pack.

    Args:
        card: where to write a pack's model card, a name ending in .md; its CycloneDX form is written beside it.

    Raises:
        PackError, InputError: it is neither, or is damaged; the card is of an artefact, or cannot be written there.
        CheckError: none of the trusted keys has signed it as it is.
        MissingError: it is signed, keys are given, and cryptography is not installed.
    """
    where = Path(path)
    if card is not None:
        require_card_place(Path(card), where)
    data = read_file(where) if trusted and where.is_file() else None
    signed_by = None if data is None else signer(data, Path(trusted or ""), where.name)
    source = open_source(path)
    if isinstance(source, PackSource):
        if data is not None and hashlib.sha256(data).hexdigest() != source.pack.sha256:
            raise InputError(str(where), "changed while it was read")
        report = _of_pack(source.pack, signed_by)
        return report if card is None else replace(report, card=write_card(source.pack, signed_by, Path(card)))
    if card is not None:
        got, fix = f"{where}, an exported model", "name the pack that it was exported from"
        raise InputError(option("card"), "is of packs alone", got=got, fix=fix)
    return _of_artifact(source.artifact)


def _of_pack(pack: Pack, signed_by: str | None) -> InspectReport:
    delta = pack.delta
    return InspectReport(
        kind="pack",
        task=delta.task,
        method=delta.method,
        settings=dict(delta.settings),
        backbone=BackboneName(name=delta.backbone, fingerprint=delta.fingerprint),
        updates=_updates(delta.updates),
        branches=_branches(delta.branches),
        classes=delta.labels or delta.heads[0].head.labels,
        preprocess=delta.preprocess.as_json(),
        bytes_by_kind={**pack.bytes_by_kind, "header": pack.size_bytes - sum(pack.bytes_by_kind.values())},
        val_top1=delta.val.top1 if delta.val.n else None,
        training=dict(delta.training),
        licences=delta.licences,
        signed_by=signed_by,
        verified=None,
        int8_codes=delta.int8.codes if delta.int8 else None,
        int8_trunk=delta.int8.trunk if delta.int8 else None,
        signed=pack.signature is not None,
        sequence=pack.sequence,
        codecs={name: plane.stored.coding.format for name, plane in sorted(pack.planes.items())},
        answer=delta.answers[0],
        heads=tuple(map(_head, delta.heads)),
    )


def _head(judged: JudgedHead) -> HeadLine:
    head = judged.head
    return HeadLine(
        name=head.name,
        answer=head.answer,
        classes=head.labels,
        reads=head.inputs,
        layers=tuple(step.layer.kind for step in head.steps),
        values=head.stored_values,
        metric=METRICS[head.answer],
        value=judged.value if judged.n else None,
        n=judged.n,
    )


def _head_of_artifact(meaning: Meaning) -> HeadLine:
    metric = METRICS[cast(Answer, meaning.answer)]
    return HeadLine(name=meaning.name, answer=meaning.answer, classes=meaning.labels, reads=(), layers=(), values=0,
                    metric=metric, value=None, n=0)  # fmt: skip


def _of_artifact(artifact: Artifact) -> InspectReport:
    return InspectReport(
        kind="artifact",
        task=artifact.task,
        method=artifact.method,
        settings={},
        backbone=BackboneName(name=artifact.backbone, fingerprint=artifact.fingerprint),
        updates=(),
        branches=(),
        classes=artifact.labels,
        preprocess=artifact.preprocess.as_json(),
        bytes_by_kind={name: size for name, (_, size) in artifact.files.items()},
        val_top1=None,
        training={},
        licences=(),
        signed_by=None,
        verified=artifact.verified,
        answer=artifact.answer,
        heads=tuple(_head_of_artifact(each.meaning) for each in artifact.heads) if artifact.further else (),
    )


def _updates(updates: Sequence[Targeted]) -> tuple[UpdateCount, ...]:
    counts, values, seen = Counter(targeted.update.kind for targeted in updates), Counter[str](), set[int]()
    for targeted in updates:
        for array in factors(targeted.update).values():
            if id(array) not in seen:
                seen.add(id(array))
                values[targeted.update.kind] += int(array.size)
    return tuple(UpdateCount(kind=kind, count=n, values=values[kind]) for kind, n in sorted(counts.items()))


def _branches(branches: Sequence[Branch]) -> tuple[UpdateCount, ...]:
    counts, values = Counter(branch.kind for branch in branches), Counter[str]()
    for branch in branches:
        values[branch.kind] += sum(int(array.size) for array in branch.tensors.values())
    return tuple(UpdateCount(kind=kind, count=n, values=values[kind]) for kind, n in sorted(counts.items()))


def _options(parser: Parser) -> None:
    parser.add_argument("file", metavar="MODEL", help="TASK.pet or an exported folder")
    parser.add_argument(
        "--trusted", metavar="DIR", help="say whose signature it is, by public keys NAME.pub (default: not asked)"
    )
    told = "write a pack's model card in Markdown, and in CycloneDX beside it as OUT.cdx.json (default: not written)"
    parser.add_argument("--card", metavar="OUT.md", help=told)


def _run(options: Options, progress: Progress) -> InspectReport:
    del progress
    return inspect(Path(options.file), trusted=path(options.trusted), card=path(options.card))


def _signature(report: InspectReport) -> str:
    if report.signed_by is not None:
        return f"signed by: {report.signed_by}"
    return "signed, and by whom was not asked (--trusted)" if report.signed else "signed by: nobody"


def _classes(report: InspectReport) -> Iterator[str]:
    """A line for the classes, or one for those of each of several heads."""
    several = {f"{each.name}: ": each.classes for each in report.heads} if len(report.heads) > 1 else {}
    for name, classes in (several or {"": report.classes}).items():
        more = ", …" if len(classes) > _MOST_CLASSES else ""
        count = f"{len(classes)} {'class' if len(classes) == 1 else 'classes'}"
        yield f"  {name}{count}: {format_names(classes[:_MOST_CLASSES])}{more}"


def _screen(report: InspectReport) -> Screen:
    size = sum(report.bytes_by_kind.values())
    settings = ", ".join(f"{key}={value}" for key, value in report.settings.items())
    metrics = {"mask": "mIoU", "boxes": "AP", "labels": "mean AP"}
    judged = [
        f"val {metrics[each.answer]} {format_percent(each.value)}" for each in report.heads if each.value is not None
    ]
    scored = f"val {format_percent(report.val_top1)}" if report.val_top1 is not None else ""
    scored = ", ".join(filter(None, [scored, *judged])) or "not scored"
    pack = report.kind == "pack"
    yield lines(
        f"{report.kind} {report.task}  {format_bytes(size)}",
        f"  {report.method}{f' ({settings})' if settings else ''} on {report.backbone.name}"
        f" {report.backbone.fingerprint[:19]}…",
        *_classes(report),
        f"  {scored}; {_signature(report)}; sequence {report.sequence}" if pack else None,
        f"  has ranges for the int8 codes {report.int8_codes[:12]}…" if report.int8_codes else None,
        f"  behind a trunk with the backbone's own {report.int8_trunk[:12]}…" if report.int8_trunk else None,
        None if report.verified is None else f"  {'' if report.verified else 'not '}verified when it was made",
        None if report.card is None else f"  wrote {report.card[0]} and {report.card[1]}",
    )
    headed = [
        (each.name, each.answer, ", ".join(each.reads), format_number(len(each.layers)), format_number(each.values))
        for each in report.heads
    ]
    if headed and pack:
        yield Table("heads", (*left("name", "answers", "reads"), *right("layers", "values")), headed)
    for title, counts in (("updates", report.updates), ("branches", report.branches)):
        rows = [(u.kind, format_number(u.count), format_number(u.values)) for u in counts]
        if rows:
            yield Table(title, (*left("kind"), *right("targets", "new values")), rows)
    parts = [(kind, format_bytes(count)) for kind, count in report.bytes_by_kind.items()]
    yield Table("bytes", (*left("part"), *right("size")), parts)


VERB = Verb(options=_options, run=_run, screen=_screen)
