"""``export``: a model for each task, format and precision, each compared before it takes its place."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgepet.calibration.budget import Drop
from edgepet.calibration.fp16 import stored_types
from edgepet.device.artifact import Artifact, Probe, files_of, open_artifact, write_artifact
from edgepet.device.runtimes import Format
from edgepet.errors import CheckError, InputError, MissingError, option
from edgepet.exporters import EXPORTERS
from edgepet.exporters.exporter import ExportOptions
from edgepet.files import folder_bytes, new_folder, require_only
from edgepet.graphs.manifest import listing
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.checks import prove
from edgepet.proving.exported import Exported
from edgepet.proving.precision import Model, fastest, in_precision, require_images
from edgepet.proving.subject import Subject
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, format_percent, left, right
from edgepet.spec import FilePath, StoredPrecision
from edgepet.verbs.verb import (
    Options,
    Parser,
    Verb,
    backbone_option,
    budget_options,
    data_option,
    names,
    output_option,
    path,
)

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress

DEFAULTS = ExportOptions()
PRECISIONS = ("fp32", "fp16", "int8", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """A row for each artefact, task by task."""

    artifacts: tuple[Exported, ...]


def export(
    packs: Sequence[FilePath],
    folder: FilePath,
    *,
    backbone: AnyBackbone = None,
    data: FilePath | None = None,
    options: ExportOptions = DEFAULTS,
    stage: Callable[[str], None] = lambda name: None,
) -> ExportReport:
    """Write one artefact folder per task and format under ``folder``, each compared before it takes its place.

    Raises:
        InputError: a pack, backbone or option at fault, or an operator that a runtime does not know.
        CheckError: an artefact answers otherwise; nothing of it is kept.
        MissingError: a runtime is not installed.
    """
    _check_precision(options)
    unknown = [name for name in options.to if name not in EXPORTERS]
    if unknown or not options.to:
        got = repr(unknown[0]) if unknown else "none of them"
        raise InputError(option("to"), f"knows {', '.join(EXPORTERS)}", got=got)
    subjects = [Subject(path, backbone, data) for path in packs]
    names = [subject.delta.task for subject in subjects]
    if len(set(names)) != len(names):
        raise InputError("export", "needs packs of different tasks", got=", ".join(names))
    for task in names:
        for place in (_place(Path(folder), task, name, options.precision) for name in options.to):
            require_only(place, files_of(place))  # before hours of work, not after
    artifacts: list[Exported] = []
    for subject in subjects:
        subject.check_backbone()
        stage(f"graph of {subject.delta.backbone}")
        if options.precision == "auto":
            artifacts += _fastest(subject, Path(folder), options, stage)
            continue
        model = in_precision(subject, options.precision, options, stage)
        for name in options.to:
            stage(f"{subject.delta.task} to {name}")
            artifacts.append(_export_one(subject, model, name, Path(folder), options))
    return ExportReport(artifacts=tuple(artifacts))


def _place(folder: Path, task: str, name: Format, precision: str) -> Path:
    return folder / f"{task}-{name}-{precision}"


def _check_precision(options: ExportOptions) -> None:
    if options.precision not in PRECISIONS:
        raise InputError(option("precision"), f"is one of {', '.join(PRECISIONS)}", got=repr(options.precision))
    if options.calib is not None and options.precision == "fp32":
        what = f"is for {option('precision', 'fp16')}, int8 and auto: fp32 needs no images to measure ranges on"
        raise InputError(option("calib"), what)
    if options.precision in ("int8", "auto"):
        require_images(options)
    if options.max_drop is not None and options.precision not in ("int8", "auto"):
        what, got = f"is for {option('precision', 'int8')} and auto", option("precision", options.precision)
        raise InputError(option("max_drop"), what, got=got)


def _fastest(subject: Subject, folder: Path, options: ExportOptions, stage: Callable[[str], None]) -> list[Exported]:
    """Of each format the precision that is fastest here, among those that pass their checks."""
    models, unfit = dict[StoredPrecision, Model](), list[str]()
    for precision in ("fp32", "fp16", "int8"):
        try:
            models[precision] = in_precision(subject, precision, options, stage)
        except CheckError as error:
            unfit.append(_out(precision, error))
    chosen = []
    for name in options.to:
        made, out = dict[StoredPrecision, Exported](), list(unfit)
        with tempfile.TemporaryDirectory(prefix="edgepet-") as scratch:
            for precision, model in models.items():
                stage(f"{subject.delta.task} to {name}, {precision}")
                try:
                    made[precision] = _export_one(subject, model, name, Path(scratch), options)
                except CheckError as error:
                    out.append(_out(precision, error))
            if not made:
                raise CheckError(option("precision", "auto"), "needs one precision that passes its checks", got="none")
            stage(f"{subject.delta.task} to {name}: measure")
            precision, why = _best(made)
        written = _export_one(subject, models[precision], name, folder, options)
        chosen.append(replace(written, why="; ".join([why, *out])))
    return chosen


def _out(precision: str, error: CheckError) -> str:
    got = str(error.got).splitlines()[0].partition(";")[0]  # without the table of layers
    return f"{precision} is out: {error.what}, got {got}"


def _best(made: Mapping[StoredPrecision, Exported]) -> tuple[StoredPrecision, str]:
    """The fastest of artefacts of one format, and the numbers that say so."""
    for exported in made.values():
        if not exported.verified:
            return "fp32", f"fp32: no precision could be measured here, {exported.reason}"
    precision, why = fastest({precision: exported.path for precision, exported in made.items()})
    drop = made[precision].drop
    lost = f", and loses {drop.points:.2f} points ({drop.low:.2f} to {drop.high:.2f}, n = {drop.n})" if drop else ""
    return precision, why + lost


def _export_one(subject: Subject, model: Model, name: Format, folder: Path, options: ExportOptions) -> Exported:
    delta = subject.delta
    path = _place(folder, delta.task, name, model.precision)
    with new_folder(path, only=files_of(path)) as scratch:
        began = time.perf_counter()
        written = EXPORTERS[name](model.proto, model.precision, scratch, options, delta.task)
        seconds = model.seconds + time.perf_counter() - began
        began = time.perf_counter()
        artifact = Artifact(
            task=delta.task,
            format=name,
            engine=written.engine,
            precision=model.precision,
            labels=delta.labels,
            preprocess=delta.preprocess,
            backbone=delta.backbone,
            fingerprint=delta.fingerprint,
            method=delta.method,
            branches=len(delta.branches),
            pack_sha256=subject.pack.sha256,
            codec=subject.pack.codec,
            files=listing(scratch, written.files),
            versions=_versions(written.engine),
            verified=False,
            reason=written.note,
            parity=None,
            probe=_probe(subject, model),
            evidence={
                "stored": stored_types(model.proto),
                "executed": dict(written.layers or {}),
                "kept_fp32": [asdict(node) for node in model.kept],
                "calibration": model.calibration,
                **({"int8": model.int8} if model.int8 else {}),
            },
        )
        artifact = _verified(subject, artifact, scratch, path)
        write_artifact(scratch, artifact)
        verify_seconds = time.perf_counter() - began
    return Exported(
        artifact=artifact,
        path=path,
        size_bytes=folder_bytes(path),
        seconds=seconds,
        verify_seconds=verify_seconds,
        kept_fp32=model.kept,
        drop=model.drop,
        warning=model.warning,
    )


def _probe(subject: Subject, model: Model) -> Probe:
    """Answers to noise: those of the merged network, or where codes decide, those of the same codes in ONNX Runtime."""
    if model.precision != "int8":
        return subject.probe
    return replace(subject.probe, logits=model.logits(subject.probe.images(subject.delta.preprocess)))


def _verified(subject: Subject, artifact: Artifact, scratch: Path, path: Path) -> Artifact:
    """The artefact with what comparing it showed, or why nothing here could run it."""
    try:
        runner = open_artifact(scratch, artifact)
    except MissingError as error:
        return replace(artifact, reason=f"not run: {artifact.reason or error.what}")
    try:
        parity = prove(subject, artifact, runner, where=str(path))
        evidence = {**artifact.evidence, "executed": runner.evidence}
    finally:
        runner.close()
    return replace(artifact, verified=True, reason=None, parity=parity, evidence=evidence)


def _versions(engine: str) -> dict[str, object]:
    versions: dict[str, object] = {}
    for name in ("edgepet", "onnx", engine):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


# -------------------------------------------------------------------------------------------------- the command line


def _options(parser: Parser) -> None:
    add = parser.add_argument
    add("packs", nargs="+", metavar="TASK.pet", help="tasks of one backbone or several")
    backbone_option(parser)
    told = f"formats, of {', '.join(EXPORTERS)}, with commas between (default: onnx)"
    add("--to", type=names, default=list(DEFAULTS.to), metavar=",".join(EXPORTERS), help=told)
    told = "what the model stores; auto measures and takes the fastest that passes (default: %(default)s)"
    add("--precision", default=DEFAULTS.precision, choices=PRECISIONS, help=told)
    told = "labelled images: int8 measures ranges on them and needs them (fp16's default: as --data)"
    add("--calib", metavar="DIR", help=told)
    budget_options(parser)
    told = "compute capabilities of a TensorRT engine, 86 for 8.6 (default: %(default)s)"
    add("--sm", dest="sms", default=",".join(map(str, DEFAULTS.sms)), metavar="86,89,120", help=told)
    told = "through onnxsim, kept only if the answers stay (default: the graph as it was traced)"
    add("--simplify", action="store_true", help=told)
    told = "ONNX weights in a file of their own (default: only where one file cannot hold them)"
    add("--external-data", action="store_true", help=told)
    data_option(parser)
    output_option(parser, "DIR", "the folder that gets a folder for each model")


def _run(options: Options, progress: Progress) -> ExportReport:
    chosen = ExportOptions(
        to=cast(tuple[Format, ...], tuple(options.to)),
        precision=options.precision,
        sms=_sms(options.sms),
        simplify=options.simplify,
        calib=options.calib,
        calib_images=options.calib_images,
        max_drop=options.max_drop,
        external_data=options.external_data,
    )
    with progress.stages() as stage:
        return export(
            [Path(pack) for pack in options.packs], Path(options.output), backbone=options.backbone,
            data=path(options.data), options=chosen, stage=stage,
        )  # fmt: skip


def _sms(text: str) -> tuple[int, ...]:
    found = names(text)
    if not found or not all(name.isdecimal() for name in found):
        raise InputError(option("sms"), "needs compute capabilities such as 86,89,120", got=repr(text))
    return tuple(int(name) for name in found)


def screen(report: ExportReport) -> Screen:
    """A table of the artefacts, and below it what of them is not verified, not in the precision asked for, or lost."""
    rows = [
        (
            a.task,
            a.engine,
            a.precision,
            format_bytes(a.size_bytes),
            f"{a.seconds:.2f} s",
            f"{a.parity.max_abs:.1e}" if a.parity else "–",
            format_percent(a.parity.top1_agreement) if a.parity else "–",
            "yes" if a.verified else "not verified",
            str(a.path),
        )
        for a in report.artifacts
    ]
    columns = (
        *left("task", "engine", "precision"),
        *right("size", "fold+write", "max|Δ|", "same top-1"),
        *left("verified", "folder"),
    )
    yield Table("artefacts", columns, rows)
    yield lines(*(f"  {reason}" for reason in dict.fromkeys(a.reason for a in report.artifacts if a.reason)))
    yield lines(*(f"  {told}" for told in dict.fromkeys(_kept_fp32(a) for a in report.artifacts if a.kept_fp32)))
    for a in report.artifacts:
        cost = _int8(a) if a.int8 else None
        yield lines(*(f"  {told}" for told in (cost, a.why, a.warning) if told))


def _kept_fp32(artifact: Exported) -> str:
    """What an fp16 or int8 model computes in fp32: layers that its numbers keep by name, operators by their count."""
    kinds = Counter(node.op for node in artifact.kept_fp32 if not node.forced)
    forced = [f"{node.name} ({node.op}, {node.reason})" for node in artifact.kept_fp32 if node.forced]
    parts = [*forced, *(f"{count} {op}" for op, count in sorted(kinds.items()))]
    facts = artifact.calibration or {}
    looked = f"{facts.get('n')} images ({facts.get('inputs')})"
    return f"{artifact.task} {artifact.precision}, ranges on {looked}: fp32 in {', '.join(parts)}"


def _int8(artifact: Exported) -> str:
    """What int8 costs on how many images, by which recipe, and what was executed."""
    chosen = cast(Mapping[str, object], (artifact.int8 or {})["recipe"])
    executed = cast(Mapping[str, int], artifact.executed.get("layers", {}))
    ran = f"; {artifact.format} ran {executed.get('int8', 0)} of {sum(executed.values())} products on int8 codes"
    return f"{artifact.task} int8: {lost(artifact.drop)}; {recipe(chosen)}{ran if executed else ''}"


def recipe(facts: Mapping[str, object]) -> str:
    """A recipe of int8 in one line."""
    smooth = "no smoothing" if facts["smooth"] is None else f"SmoothQuant {facts['smooth']}"
    corrected = "bias correction" if facts["bias_correction"] else "no bias correction"
    return f"{smooth}, {facts['estimator']} ranges, {corrected}"


def lost(drop: Drop | None) -> str:
    """Points of top-1 that int8 loses, the interval, and on how many images."""
    if drop is None:
        return "not judged"
    reach = f"{drop.low:.2f} to {drop.high:.2f}"
    return f"loses {drop.points:.2f} points of top-1 ({reach}, n = {drop.n}), divergence {drop.kl:.2g}"


VERB = Verb(options=_options, run=_run, screen=screen)
