"""``verify``: an exported model's files against its manifest, then the comparison again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepet.device.artifact import MANIFEST, Artifact, open_artifact, read_artifact
from edgepet.device.runner import ModelRunner
from edgepet.errors import InputError, MissingError, option
from edgepet.files import sha256_file
from edgepet.graphs.manifest import damaged
from edgepet.images.batches import batched
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.pack import EVERY
from edgepet.proving.checks import Check, check_data, check_probe, check_resizing, probe_images
from edgepet.proving.subject import Subject
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, left, right
from edgepet.spec import FilePath
from edgepet.verbs.verb import Options, Parser, Verb, backbone_option, path

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Every comparison that was made, and why another was not; ``ok`` where none said no."""

    ok: bool
    checks: tuple[Check, ...]
    reason: str | None = None


def verify(
    folder: FilePath,
    *,
    data: FilePath | None = None,
    pack: FilePath | None = None,
    backbone: AnyBackbone = None,
) -> VerifyReport:
    """Check an artefact's files against its manifest, then run the comparison again.

    Without ``data`` the inputs are the seeded noise that was run when it was made; with it, the pack merged in torch is
    compared on real images, and the pack is looked for beside the artefact where ``pack`` is None.

    Raises:
        InputError: no artefact, or no pack to compare with.
    """
    folder = Path(folder)
    artifact = read_artifact(folder)
    broken = damaged(folder, artifact.files)
    files = Check(name="files", ok=not broken, value=float(len(broken)), limit=0.0)
    if broken:
        return VerifyReport(ok=False, checks=(files,), reason=f"damaged: {', '.join(broken)}")
    try:
        runner = open_artifact(folder, artifact)
    except MissingError as error:
        return VerifyReport(ok=True, checks=(files,), reason=f"not run: {error.what}")
    try:
        subject = None
        if data is not None:
            subject = Subject(pack or _find_pack(folder, artifact), backbone, data, answers=EVERY)
        checks = [files, *_compared(artifact, runner, subject)]
    finally:
        runner.close()
    return VerifyReport(ok=all(check.ok for check in checks), checks=tuple(checks))


def _compared(artifact: Artifact, runner: ModelRunner, subject: Subject | None) -> Iterator[Check]:
    """The comparisons of each head; of several they are called by it."""
    for place, head in enumerate(artifact.heads):
        one, run = artifact.of_head(place), artifact.of_head_run(runner, place)
        checks = [check_probe(one, run(probe_images(one))), *check_resizing(one, run)]
        if subject is not None:
            of = subject.heads[place]
            checks.append(check_data(one, of.merged_reference, batched(run, of.images[0])))
        name = f"{head.meaning.name}: " if artifact.further else ""
        yield from (replace(check, name=f"{name}{check.name}") for check in checks)


def _find_pack(folder: Path, artifact: Artifact) -> Path:
    places = (folder.absolute().parent, folder.absolute().parent.parent, Path.cwd())
    for place in places:
        found = place / f"{artifact.task}.pet"
        if found.is_file() and sha256_file(found) == artifact.pack_sha256:
            return found
    what = f"{option('data')} needs the pack {artifact.task}.pet that it was exported from"
    raise InputError(str(folder / MANIFEST), what, fix=f"pass {option('pack', 'FILE')}")


def _options(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="an exported model's folder")
    told = "images to compare on, against the merged pack (default: the noise of when it was made)"
    parser.add_argument("--data", metavar="DIR", help=told)
    told = "with --data, the pack that it was exported from (default: looked for beside the folder)"
    parser.add_argument("--pack", metavar="TASK.pet", help=told)
    backbone_option(parser)


def _run(options: Options, progress: Progress) -> VerifyReport:
    with progress.stage(f"verify {options.folder}"):
        return verify(Path(options.folder), data=path(options.data), pack=path(options.pack), backbone=options.backbone)


def _screen(report: VerifyReport) -> Screen:
    rows = [(c.name, "ok" if c.ok else "FAILED", f"{c.value:.1e}", f"{c.limit:.1e}") for c in report.checks]
    yield Table("", (*left("check", ""), *right("value", "limit")), rows)
    yield lines(report.reason)


def _failed(report: VerifyReport) -> bool:
    return not report.ok


VERB = Verb(options=_options, run=_run, screen=_screen, failed=_failed)
