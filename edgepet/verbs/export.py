"""``export``: a model for each task, format and precision, each compared before it takes its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgepet.calibration.budget import Drop
from edgepet.device.artifact import files_of, read_artifact
from edgepet.device.runtimes import FORMATS, Format
from edgepet.errors import InputError, MissingError, option, require
from edgepet.exporters import EXPORTERS
from edgepet.exporters.exporter import ExportOptions
from edgepet.exporters.portable import OLDEST, require_opset
from edgepet.files import folder_bytes, move_folder, require_only, require_place
from edgepet.graphs.onnx_file import OPSET
from edgepet.jobs.job import MEASURED, Result
from edgepet.measuring.machine import runtimes
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.pack import EVERY
from edgepet.proving.exported import Exported
from edgepet.proving.exporting import export_task, place_of
from edgepet.proving.precision import require_images
from edgepet.proving.subject import Subject
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, format_percent, left, right
from edgepet.spec import FilePath
from edgepet.verbs.many import (
    JOBS,
    MOST_JOBS,
    begin,
    finish,
    folder_of,
    jobs_option,
    make_graphs,
    of_task,
    require_several,
    run_packs,
    tasks_of,
)
from edgepet.verbs.verb import (
    Options,
    Parser,
    Verb,
    at_least_one,
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
INPUTS = ("float32", "uint8")
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
    jobs: int | None = None,
    ray: str | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> ExportReport:
    """Write one artefact folder per task and format under ``folder``, each compared before it takes its place.

    Of several packs each has its own images where ``data`` and ``options.calib`` have a folder of its task's name.

    Args:
        jobs: packs at the same time, each in a process of its own; all artefacts take their places when all are made.
            None is one pack after another in this process.
        ray: the address of a Ray cluster whose nodes run them; they see the same files.

    Raises:
        InputError: a pack, backbone or option at fault, or an operator that a runtime does not know.
        CheckError: an artefact answers otherwise; nothing of it is kept.
        MissingError: a runtime is not installed.
    """
    _check_precision(options)
    _check_input(options)
    at_least_one("jobs", jobs, most=MOST_JOBS)
    if options.opset is not None:
        if "onnx" not in options.to:
            raise InputError(option("opset"), "is for ONNX files", got=option("to", ",".join(options.to)))
        require_opset(options.opset)
    require_several(ray, packs)
    if (jobs or ray) and options.precision == "auto":
        what = "is not for several at the same time: it measures how fast they are"
        raise InputError(option("precision", "auto"), what, fix=f"leave out {option('ray' if ray else 'jobs')}")
    unknown = [name for name in options.to if name not in EXPORTERS]
    if unknown or not options.to:
        got = repr(unknown[0]) if unknown else "none of them"
        raise InputError(option("to"), f"knows {', '.join(EXPORTERS)}", got=got)
    _require_packages(options)
    tasks = tasks_of(packs, "export")
    require_place(Path(folder) / "task", makes_parents=True)
    for task in tasks.values():
        for place in (place_of(Path(folder), task, name, options.precision, options.takes) for name in options.to):
            require_only(place, files_of(place))  # before hours of work, not after
    if (jobs or ray) and len(tasks) > 1:
        return _export_in_jobs(tasks, Path(folder), backbone, data, options, jobs or 1, ray, stage)
    artifacts: list[Exported] = []
    for pack, task in tasks.items():
        own = task if len(tasks) > 1 else None
        images = replace(options, calib=of_task(options.calib, own))
        artifacts += export_task(
            Subject(pack, backbone, of_task(data, own), pictures=options.takes != "float32", answers=EVERY),
            Path(folder),
            images,
            stage,
        )
    return ExportReport(artifacts=tuple(artifacts))


def _require_packages(options: ExportOptions) -> None:
    for name in options.to:
        engines = FORMATS[name].engines
        states = runtimes(engines)
        if any(state.available for state in states):
            continue
        if (extra := engines[-1].extra) is not None:
            require(engines[-1].module, extra=extra, purpose=option("to", name))
        raise MissingError(option("to", name), "needs a runtime that can be imported", got="none", fix=states[-1].fix)
    if options.simplify:
        require("onnxsim", extra="onnxsim", purpose=option("simplify"))


def _check_precision(options: ExportOptions) -> None:
    if options.precision not in PRECISIONS:
        raise InputError(option("precision"), f"is one of {', '.join(PRECISIONS)}", got=repr(options.precision))
    if options.calib is not None and options.precision == "fp32":
        what = f"is for {option('precision', 'fp16')}, int8 and auto: fp32 needs no images to measure ranges on"
        raise InputError(option("calib"), what)
    if options.precision in ("int8", "auto"):
        require_images(options)
    at_least_one("calib_images", options.calib_images)
    if options.max_drop is not None and options.precision not in ("int8", "auto"):
        what, got = f"is for {option('precision', 'int8')} and auto", option("precision", options.precision)
        raise InputError(option("max_drop"), what, got=got)


def _check_input(options: ExportOptions) -> None:
    if options.input not in INPUTS:
        raise InputError(option("input"), f"is one of {', '.join(INPUTS)}", got=repr(options.input))
    if options.resize and options.input != "uint8":
        raise InputError(option("resize"), f"is for {option('input', 'uint8')}", got=option("input", options.input))
    if options.resize and "tensorrt" in options.to:
        what = f"is not for {option('to', 'tensorrt')}, whose engines are built for one size of images"
        raise InputError(option("resize"), what, fix=f"leave out {option('resize')}, or tensorrt")


# ------------------------------------------------------------------------------------------- several at the same time


def _export_in_jobs(
    tasks: Mapping[Path, str], folder: Path, backbone: AnyBackbone, data: FilePath | None, options: ExportOptions,
    processes: int, ray: str | None, stage: Callable[[str], None],
) -> ExportReport:  # fmt: skip
    """Every pack in a job of its own."""
    make_graphs(tasks, backbone, stage)
    settings = {name: value for name, value in asdict(options).items() if name != "calib"}
    results = run_packs(
        "edgepet.verbs.export:export_job", tasks, folder / JOBS, backbone=backbone,
        images={"data": data, "calib": options.calib}, settings=settings, processes=processes, ray=ray, tell=stage,
    )  # fmt: skip
    artifacts = [_moved(result, folder, told) for result in results for told in result.report["artifacts"]]
    finish(results)
    return ExportReport(artifacts=tuple(artifacts))


def export_job(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """The job of one pack: its artefacts, in ``folder``, and what their manifests do not say."""
    path, settings = begin(specification), dict(specification["settings"])
    options = ExportOptions(**settings, calib=folder_of(specification, "calib"))
    report = export(
        [path], folder, backbone=specification["backbone"], data=folder_of(specification, "data"), options=options
    )
    return {
        "artifacts": [{"folder": made.path.name, "warning": made.warning} for made in report.artifacts],
        MEASURED: {
            made.path.name: {"seconds": made.seconds, "verify_seconds": made.verify_seconds}
            for made in report.artifacts
        },
    }


def _moved(result: Result, folder: Path, told: Mapping[str, Any]) -> Exported:
    """An artefact that a job made, in its place below ``folder``."""
    path = folder / told["folder"]
    move_folder(result.folder / told["folder"], path, only=files_of(path))
    return Exported(
        artifact=read_artifact(path),
        path=path,
        size_bytes=folder_bytes(path),
        warning=told["warning"],
        **result.measured[told["folder"]],
    )


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
    told = f"of ONNX files, from {OLDEST}: for parsers that read no newer one (default: {OPSET})"
    add("--opset", type=int, metavar="N", help=told)
    told = "what models take: preprocessed float32 images, or pictures, normalised inside (default: %(default)s)"
    add("--input", default=DEFAULTS.input, choices=INPUTS, help=told)
    told = "with --input uint8, pictures of any size, resized inside (default: of the model's own size)"
    add("--resize", action="store_true", help=told)
    data_option(parser)
    jobs_option(parser, None)
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
        opset=options.opset,
        input=options.input,
        resize=options.resize,
    )
    with progress.stages() as stage:
        return export(
            [Path(pack) for pack in options.packs], Path(options.output), backbone=options.backbone,
            data=path(options.data), options=chosen, jobs=options.jobs, ray=options.ray, stage=stage,
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
    yield lines(*(f"  {told}" for told in dict.fromkeys(_near_ties(a) for a in report.artifacts) if told))
    yield lines(*(f"  {told}" for told in dict.fromkeys(_kept_fp32(a) for a in report.artifacts if a.kept_fp32)))
    for a in report.artifacts:
        cost = _int8(a) if a.int8 else None
        yield lines(*(f"  {told}" for told in (cost, a.why, a.warning) if told))


def _near_ties(artifact: Exported) -> str | None:
    """How many answers changed that were too near to call, if any."""
    parity = artifact.parity
    if parity is None or not parity.near_ties:
        return None
    where = f"{artifact.task} {artifact.precision} on {artifact.engine}"
    return f"{where}: {parity.near_ties} of {parity.n} answers differ where two classes are a near tie, and may"


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
    told = lost(artifact.drop)
    return f"{artifact.task} int8: {told}; {recipe(chosen)}{ran if executed else ''}"


CALLED = {"top1": "top-1", "miou": "mIoU", "map": "AP"}


def recipe(facts: Mapping[str, object]) -> str:
    """A recipe of int8 in one line."""
    smooth = "no smoothing" if facts["smooth"] is None else f"SmoothQuant {facts['smooth']}"
    corrected = "bias correction" if facts["bias_correction"] else "no bias correction"
    return f"{smooth}, {facts['estimator']} ranges, {corrected}"


def lost(drop: Drop | None) -> str:
    """Points of its metric that int8 loses, the interval, and on how many images."""
    if drop is None:
        return "not judged"
    reach = f"{drop.low:.2f} to {drop.high:.2f}"
    return f"loses {drop.points:.2f} points of {CALLED[drop.metric]} ({reach}, n = {drop.n}), divergence {drop.kl:.2g}"


VERB = Verb(options=_options, run=_run, screen=screen)
