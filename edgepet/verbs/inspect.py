"""``inspect``: what a pack or an exported model says of itself, read without its backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgepet.deltas.branches import Branch
from edgepet.deltas.updates import Targeted, factors
from edgepet.device.artifact import Artifact
from edgepet.packs.pack import Pack
from edgepet.proving.sources import PackSource, open_source
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, format_names, format_number, format_percent, left, right
from edgepet.spec import FilePath
from edgepet.verbs.verb import Options, Parser, Verb

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCount:
    """Updates or branches of one kind, how many there are, and the values that they bring, shared ones once."""

    kind: str
    count: int
    values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneName:
    """The backbone that a model was made for, by name and by content."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """A pack or an artefact, read without its backbone; what an artefact does not keep is empty.

    ``int8_codes`` is the sha256 of the int8 backbone's codes that a pack has ranges for.
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


def inspect(path: FilePath) -> InspectReport:
    """What a pack or an artefact says of itself.

    Raises:
        PackError, InputError: it is neither, or is damaged.
    """
    source = open_source(path)
    return _of_pack(source.pack) if isinstance(source, PackSource) else _of_artifact(source.artifact)


def _of_pack(pack: Pack) -> InspectReport:
    delta = pack.delta
    return InspectReport(
        kind="pack",
        task=delta.task,
        method=delta.method,
        settings=dict(delta.settings),
        backbone=BackboneName(name=delta.backbone, fingerprint=delta.fingerprint),
        updates=_updates(delta.updates),
        branches=_branches(delta.branches),
        classes=delta.labels,
        preprocess=delta.preprocess.as_json(),
        bytes_by_kind={**pack.bytes_by_kind, "header": pack.size_bytes - sum(pack.bytes_by_kind.values())},
        val_top1=delta.val.top1 if delta.val.n else None,
        training=dict(delta.training),
        licences=delta.licences,
        signed_by=None,
        verified=None,
        int8_codes=delta.int8.codes if delta.int8 else None,
    )


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


def _run(options: Options, progress: Progress) -> InspectReport:
    del progress
    return inspect(Path(options.file))


def _screen(report: InspectReport) -> Screen:
    size = sum(report.bytes_by_kind.values())
    settings = ", ".join(f"{key}={value}" for key, value in report.settings.items())
    scored = f"val {format_percent(report.val_top1)}" if report.val_top1 is not None else "not scored"
    pack = report.kind == "pack"
    yield lines(
        f"{report.kind} {report.task}  {format_bytes(size)}",
        f"  {report.method}{f' ({settings})' if settings else ''} on {report.backbone.name}"
        f" {report.backbone.fingerprint[:19]}…",
        f"  {len(report.classes)} classes: {format_names(report.classes[:8])}"
        f"{', …' if len(report.classes) > 8 else ''}",
        f"  {scored}; signed by: {report.signed_by or 'nobody'}" if pack else None,
        f"  has ranges for the int8 codes {report.int8_codes[:12]}…" if report.int8_codes else None,
        None if report.verified is None else f"  {'' if report.verified else 'not '}verified when it was made",
    )
    for title, counts in (("updates", report.updates), ("branches", report.branches)):
        rows = [(u.kind, format_number(u.count), format_number(u.values)) for u in counts]
        if rows:
            yield Table(title, (*left("kind"), *right("targets", "new values")), rows)
    parts = [(kind, format_bytes(count)) for kind, count in report.bytes_by_kind.items()]
    yield Table("bytes", (*left("part"), *right("size")), parts)


VERB = Verb(options=_options, run=_run, screen=_screen)
