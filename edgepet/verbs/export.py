"""The verbs between a pack and a device: ``merge``, ``export`` and ``verify``. Each is verified, or it fails."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import numpy as np
import safetensors.numpy

from edgepet.calibration.budget import Drop
from edgepet.calibration.fp16 import Kept, stored_types
from edgepet.deltas.merge import require_foldable
from edgepet.device.artifact import (
    MANIFEST,
    Artifact,
    Format,
    Probe,
    damaged,
    listed,
    open_artifact,
    read_artifact,
    write_artifact,
)
from edgepet.errors import CheckError, InputError, MissingError, require
from edgepet.exporters import EXPORTERS
from edgepet.exporters.exporter import ExportOptions
from edgepet.files import folder_bytes, new_folder, write_file
from edgepet.measuring.latency import Candidate, measure
from edgepet.measuring.machine import environment
from edgepet.measuring.parity import SAME_CODES, Against, Inputs, Parity, compare, require_parity
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.precision import Model, in_precision, require_images
from edgepet.proving.subject import Subject, plain_network
from edgepet.spec import FilePath, NpArray, Precision

DEFAULTS = ExportOptions()
PRECISIONS = ("fp32", "fp16", "int8", "auto")
AUTO_ROUNDS = 60  # enough to tell precisions apart, which differ by tenths
AUTO_TIE = 1.05  # of the fastest: an fp16 file that is computed in fp32 is as fast as that but for noise


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Dense weights on disk. ``max_abs_diff`` is on logits, against the network that ``against`` names.

    ``loads_into`` is the Python that makes the network which takes them strictly.
    """

    path: Path
    bytes: int
    create_args: dict[str, object]
    loads_into: str
    max_abs_diff: float
    limit: float
    n: int
    inputs: Inputs
    against: Against


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One artefact. ``seconds`` is folding and writing, ``verify_seconds`` the comparison.

    ``stored`` counts tensors and bytes by type, ``executed`` is what the runtime says of its nodes, or what was built
    where nothing here can run it; ``kept_fp32`` is what an fp16 or int8 model computes in fp32. ``int8`` is the recipe
    and what it costs. ``why`` says why "auto" chose this precision.
    """

    task: str
    format: Format
    engine: str
    precision: Precision
    path: Path
    size_bytes: int
    seconds: float
    verify_seconds: float
    verified: bool
    reason: str | None
    parity: Parity | None
    stored: Mapping[str, object]
    executed: Mapping[str, object]
    kept_fp32: tuple[Kept, ...]
    calibration: Mapping[str, object] | None
    int8: Mapping[str, object] | None
    drop: Drop | None
    warning: str | None
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    artifacts: tuple[Exported, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison: ``value`` must not be above ``limit``."""

    name: str
    ok: bool
    value: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    ok: bool
    checks: tuple[Check, ...]
    reason: str | None = None


def merge(
    pack: FilePath, output: FilePath, *, backbone: AnyBackbone = None, data: FilePath | None = None
) -> MergeReport:
    """Write dense weights that plain timm loads strictly, after loading them there and comparing.

    Raises:
        InputError: pack or backbone at fault.
        CheckError: the merged network answers otherwise than the tuned one.
        MissingError: torch or timm is not installed.
    """
    require("torch", extra="train", purpose="merge")
    from edgepet.tuning.model import logits_of

    output = Path(output)
    subject = Subject(pack, backbone, data)
    require_foldable(subject.delta)
    weights = subject.dense_weights
    plain = plain_network(subject)
    parity = subject.judge(logits_of(plain, subject.images[0]))
    require_parity(parity, str(output))
    write_file(
        output, safetensors.numpy.save({name: np.asarray(tensor, order="C") for name, tensor in weights.items()})
    )
    return MergeReport(
        path=output,
        bytes=output.stat().st_size,
        create_args=subject.backbone.create_args,
        loads_into=subject.backbone.spelled_with_head(len(subject.delta.labels)),
        max_abs_diff=parity.max_abs,
        limit=cast(float, parity.limit),
        n=parity.n,
        inputs=parity.inputs,
        against=parity.against,
    )


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
        raise InputError("--to", f"knows {', '.join(EXPORTERS)}", got=repr(unknown[0]) if unknown else "none of them")
    subjects = [Subject(path, backbone, data) for path in packs]
    names = [subject.delta.task for subject in subjects]
    if len(set(names)) != len(names):
        raise InputError("export", "needs packs of different tasks", got=", ".join(names))
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


def _check_precision(options: ExportOptions) -> None:
    if options.precision not in PRECISIONS:
        raise InputError("--precision", f"is one of {', '.join(PRECISIONS)}", got=repr(options.precision))
    if options.calib is not None and options.precision == "fp32":
        raise InputError("--calib", "is for --precision fp16, int8 and auto: fp32 needs no images to measure ranges on")
    if options.precision in ("int8", "auto"):
        require_images(options)
    if options.max_drop is not None and options.precision not in ("int8", "auto"):
        raise InputError("--max-drop", "is for --precision int8 and auto", got=f"--precision {options.precision}")


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
    broken = damaged(folder, artifact)
    files = Check(name="files", ok=not broken, value=float(len(broken)), limit=0.0)
    if broken:
        return VerifyReport(ok=False, checks=(files,), reason=f"damaged: {', '.join(broken)}")
    try:
        runner = open_artifact(folder, artifact)
    except MissingError as error:
        return VerifyReport(ok=True, checks=(files,), reason=f"not run: {error.what}")
    try:
        got = runner(artifact.probe.images(artifact.preprocess))
        checks = [files, _check("probe", artifact, artifact.probe.logits, got)]
        if data is not None:
            subject = Subject(pack or _find_pack(folder, artifact), backbone, data)
            checks.append(_check("data", artifact, subject.merged_reference, runner(subject.images[0])))
    finally:
        runner.close()
    return VerifyReport(ok=all(check.ok for check in checks), checks=tuple(checks))


def _fastest(subject: Subject, folder: Path, options: ExportOptions, stage: Callable[[str], None]) -> list[Exported]:
    """Of each format the precision that is fastest here, among those that pass their checks."""
    models, unfit = dict[Precision, Model](), list[str]()
    for precision in ("fp32", "fp16", "int8"):
        try:
            models[precision] = in_precision(subject, precision, options, stage)
        except CheckError as error:
            unfit.append(_out(precision, error))
    chosen = []
    for name in options.to:
        made, out = dict[Precision, Exported](), list(unfit)
        with tempfile.TemporaryDirectory(prefix="edgepet-") as scratch:
            for precision, model in models.items():
                stage(f"{subject.delta.task} to {name}, {precision}")
                try:
                    made[precision] = _export_one(subject, model, name, Path(scratch), options)
                except CheckError as error:
                    out.append(_out(precision, error))
            stage(f"{subject.delta.task} to {name}: measure")
            precision, why = _measured(made)
        written = _export_one(subject, models[precision], name, folder, options)
        chosen.append(replace(written, why="; ".join([why, *out])))
    return chosen


def _out(precision: str, error: CheckError) -> str:
    got = str(error.got).splitlines()[0].partition(";")[0]  # without the table of layers
    return f"{precision} is out: {error.what}, got {got}"


def _measured(made: Mapping[Precision, Exported]) -> tuple[Precision, str]:
    """The fastest of artefacts of one format, of equally fast ones the smallest; and the numbers that say so."""
    if not made:
        raise CheckError("--precision auto", "needs one precision that passes its checks", got="none")
    if not all(exported.verified for exported in made.values()):
        reason = next(exported.reason for exported in made.values() if not exported.verified)
        return "fp32", f"fp32: no precision could be measured here, {reason}"
    threads = environment().cores
    candidates = [
        Candidate(
            model=exported.path.name,
            runtime=exported.format,
            precision=precision,
            mode="merged",
            open=partial(open_artifact, exported.path, read_artifact(exported.path), threads=threads),
        )
        for precision, exported in made.items()
    ]
    shape = read_artifact(next(iter(made.values())).path).preprocess.input_shape
    report = measure(candidates, np.zeros((1, *shape), np.float32), threads=threads, rounds=AUTO_ROUNDS, warmup=5)
    fastest = min(row.p50_ms for row in report.rows)
    near = [row for row in report.rows if row.p50_ms <= AUTO_TIE * fastest]
    best = min(near, key=lambda row: made[cast(Precision, row.precision)].size_bytes)
    others = ", ".join(f"{row.precision} {row.p50_ms:.2f}" for row in report.rows if row is not best)
    why = f"{best.precision}: {best.p50_ms:.2f} ms, {others} (p50 of {AUTO_ROUNDS} rounds, {threads} threads)"
    drop = made[cast(Precision, best.precision)].drop
    lost = f", and loses {drop.points:.2f} points ({drop.low:.2f} to {drop.high:.2f}, n = {drop.n})" if drop else ""
    return cast(Precision, best.precision), why + lost


def _export_one(subject: Subject, model: Model, name: Format, folder: Path, options: ExportOptions) -> Exported:
    delta = subject.delta
    path = folder / f"{delta.task}-{name}-{model.precision}"
    with new_folder(path) as scratch:
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
            files=listed(scratch, written.files),
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
        task=delta.task,
        format=name,
        engine=written.engine,
        precision=model.precision,
        path=path,
        size_bytes=folder_bytes(path),
        seconds=seconds,
        verify_seconds=verify_seconds,
        verified=artifact.verified,
        reason=artifact.reason,
        parity=artifact.parity,
        stored=cast(Mapping[str, object], artifact.evidence["stored"]),
        executed=cast(Mapping[str, object], artifact.evidence["executed"]),
        kept_fp32=model.kept,
        calibration=model.calibration,
        int8=model.int8,
        drop=model.drop,
        warning=model.warning,
    )


def _probe(subject: Subject, model: Model) -> Probe:
    """Answers to noise: those of the merged network, or where codes decide, those of the same codes in ONNX Runtime."""
    if model.precision != "int8":
        return subject.probe
    return replace(subject.probe, logits=model.logits(subject.probe.images(subject.delta.preprocess)))


def _verified(subject: Subject, artifact: Artifact, scratch: Path, path: Path) -> Artifact:
    """Compare with the merged network, where nothing may be lost, and the tuned one, where storage may cost."""
    try:
        runner = open_artifact(scratch, artifact)
    except MissingError as error:
        return replace(artifact, reason=f"not run: {artifact.reason or error.what}")
    try:
        images, inputs = subject.images
        got = runner(images)
        stored = artifact.precision
        require_parity(
            compare(subject.merged_reference, got, stored=stored, inputs=inputs, against="merged"), str(path)
        )
        parity = subject.judge(got, precision=stored)
        require_parity(parity, str(path))
        probe = _check("probe", artifact, artifact.probe.logits, runner(artifact.probe.images(artifact.preprocess)))
        if not probe.ok:
            raise CheckError(str(path), f"must repeat its probe within {probe.limit:.1e}", got=f"{probe.value:.1e}")
        evidence = {**artifact.evidence, "executed": runner.evidence}
    finally:
        runner.close()
    return replace(artifact, verified=True, reason=None, parity=parity, evidence=evidence)


def _check(name: str, artifact: Artifact, expected: NpArray, got: NpArray) -> Check:
    """``probe`` repeats what was run when the artefact was made; int8's answers to images are judged by their top-1."""
    if artifact.precision == "int8" and name == "data":
        parity = compare(expected, got, stored="int8", inputs="data", against="merged")
        limit = 1 - parity.least_agreement
        return Check(name="data top-1", ok=parity.ok, value=1 - parity.top1_agreement, limit=limit)
    stored = SAME_CODES if artifact.precision == "int8" else artifact.precision
    parity = compare(expected, got, stored=stored, inputs="synthetic", against="merged")
    return Check(name=name, ok=parity.ok, value=parity.max_abs, limit=cast(float, parity.limit))


def _find_pack(folder: Path, artifact: Artifact) -> Path:
    from edgepet.files import sha256_file

    places = (folder.absolute().parent, folder.absolute().parent.parent, Path.cwd())
    for place in places:
        path = place / f"{artifact.task}.pet"
        if path.is_file() and sha256_file(path) == artifact.pack_sha256:
            return path
    raise InputError(
        str(folder / MANIFEST),
        f"--data needs the pack {artifact.task}.pet that it was exported from",
        fix="pass --pack FILE",
    )


def _versions(engine: str) -> dict[str, object]:
    versions: dict[str, object] = {}
    for name in ("edgepet", "onnx", engine):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def parse_formats(text: str) -> tuple[Format, ...]:
    """``onnx,openvino`` as a tuple, checked by ``export``."""
    return cast(tuple[Format, ...], tuple(part.strip() for part in text.split(",") if part.strip()))
