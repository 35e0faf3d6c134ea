"""One task exported: its model in every format and precision that was asked for, each compared before it is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgepet.calibration.fp16 import stored_types
from edgepet.device.answers import meanings_of
from edgepet.device.artifact import Artifact, Takes, files_of, open_artifact, write_artifact
from edgepet.device.map_heads import map_heads_of
from edgepet.device.model_heads import HeadFacts, Probe
from edgepet.device.runtimes import Format
from edgepet.errors import CheckError, MissingError, option
from edgepet.exporters import EXPORTERS
from edgepet.exporters.exporter import ExportOptions
from edgepet.exporters.pixels import taking_pixels
from edgepet.files import folder_bytes, move_folder, new_folder, require_space, scratch_folder
from edgepet.graphs.head_graph import answer_names
from edgepet.graphs.manifest import listing
from edgepet.proving.checks import prove
from edgepet.proving.exported import Exported
from edgepet.proving.precision import Model, fastest, in_precision
from edgepet.proving.subject import PROBE_SEED, Subject, probe_of
from edgepet.spec import StoredPrecision

_ENDS: dict[Takes, str] = {"float32": "", "uint8": "-uint8", "uint8, any size": "-uint8-resize"}
SHARE = {"fp32": 1.0, "fp16": 0.5, "int8": 0.25, "auto": 1.75}  # of the backbone's bytes, at least


def export_task(subject: Subject, folder: Path, options: ExportOptions, stage: Callable[[str], None]) -> list[Exported]:
    """One task in every format that was asked for, each in its place below ``folder``.

    Raises:
        EdgepetError: as ``edgepet.export``.
    """
    subject.check_backbone()
    _ = subject.images  # what cannot be compared on is refused before the work
    stage(f"graph of {subject.delta.backbone}")
    size_bytes = round(SHARE[options.precision] * subject.graph.weights_bytes)
    require_space(folder, size_bytes * len(options.to), f"{subject.delta.task} in {', '.join(options.to)}")
    if options.precision == "auto":
        return _fastest(subject, folder, options, stage)
    models = in_precision(subject, options.precision, options, stage)
    made = []
    for name in options.to:
        stage(f"{subject.delta.task} to {name}")
        made.append(_export_one(subject, models[name], name, folder, options))
    return made


def place_of(folder: Path, task: str, name: Format, precision: str, takes: Takes = "float32") -> Path:
    """The folder of an artefact below ``folder``."""
    return folder / f"{task}-{name}-{precision}{_ENDS[takes]}"


def _fastest(subject: Subject, folder: Path, options: ExportOptions, stage: Callable[[str], None]) -> list[Exported]:
    """Of each format the precision that is fastest here, among those that pass their checks."""
    models, unfit = dict[StoredPrecision, dict[Format, Model]](), list[str]()
    precisions: tuple[StoredPrecision, ...] = ("fp32", "fp16", "int8")
    for precision in precisions:
        try:
            models[precision] = in_precision(subject, precision, options, stage)
        except CheckError as error:
            unfit.append(_out(precision, error))
    chosen = []
    for name in options.to:
        made, out = dict[StoredPrecision, Exported](), list(unfit)
        with scratch_folder(place_of(folder, subject.delta.task, name, "auto", options.takes)) as scratch:
            for precision, model in models.items():
                stage(f"{subject.delta.task} to {name}, {precision}")
                try:
                    made[precision] = _export_one(subject, model[name], name, scratch, options)
                except CheckError as error:
                    out.append(_out(precision, error))
            if not made:
                raise CheckError(option("precision", "auto"), "needs one precision that passes its checks", got="none")
            stage(f"{subject.delta.task} to {name}: measure")
            precision, why = _best(made)
            place = place_of(folder, subject.delta.task, name, precision, options.takes)
            move_folder(made[precision].path, place, only=files_of(place))
        chosen.append(replace(made[precision], path=place, why="; ".join([why, *out])))
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
    delta, meanings = subject.delta, meanings_of(subject.delta)
    probe, *probes = _probes(subject, model)
    path = place_of(folder, delta.task, name, model.precision, options.takes)
    with new_folder(path, only=files_of(path)) as scratch:
        began = time.perf_counter()
        proto = model.proto
        if options.takes != "float32":
            proto = taking_pixels(proto, delta.preprocess, resize=options.resize, where=delta.task)
        written = EXPORTERS[name](proto, model.precision, scratch, options, delta.task)
        seconds = model.seconds + time.perf_counter() - began
        began = time.perf_counter()
        artifact = Artifact(
            task=delta.task,
            format=name,
            engine=written.engine,
            precision=model.precision,
            labels=meanings[0].labels,
            answer=meanings[0].answer,
            thresholds=meanings[0].thresholds,
            head=meanings[0].name,
            further=tuple(
                HeadFacts(meaning=meaning, probe=asked, parity=None)
                for meaning, asked in zip(meanings[1:], probes, strict=True)
            ),
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
            probe=probe,
            evidence={
                "stored": stored_types(model.proto),
                "executed": dict(written.layers or {}),
                "kept_fp32": [asdict(node) for node in model.kept],
                "calibration": model.calibration,
                **({"int8": model.int8} if model.int8 else {}),
            },
            takes=options.takes,
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
        warning=model.warning,
    )


def _probes(subject: Subject, model: Model) -> list[Probe]:
    """Each head's answers to noise: of the merged network, or where codes decide, of the same codes in ONNX Runtime."""
    if model.precision != "int8":
        return [of.probe for of in subject.heads]
    given = model.answers(subject.probe_images, answer_names(map_heads_of(subject.delta)))
    return [
        probe_of(PROBE_SEED, answers, len(meaning.labels))
        for answers, meaning in zip(given, meanings_of(subject.delta), strict=True)
    ]


def _verified(subject: Subject, artifact: Artifact, scratch: Path, path: Path) -> Artifact:
    """The artefact with what comparing it showed, or why nothing here could run it."""
    try:
        runner = open_artifact(scratch, artifact)
    except MissingError as error:
        return replace(artifact, reason=f"not run: {artifact.reason or error.what}")
    try:
        first, *others = [
            prove(of, artifact.of_head(place), artifact.of_head_run(runner, place), where=str(path))
            for place, of in enumerate(subject.heads)
        ]
        evidence = {**artifact.evidence, "executed": runner.evidence}
    finally:
        runner.close()
    further = tuple(replace(each, parity=parity) for each, parity in zip(artifact.further, others, strict=True))
    return replace(artifact, verified=True, reason=None, parity=first, further=further, evidence=evidence)


def _versions(engine: str) -> dict[str, object]:
    versions: dict[str, object] = {}
    for name in ("edgepet", "onnx", engine):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
