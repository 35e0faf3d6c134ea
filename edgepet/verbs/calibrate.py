"""``calibrate``: what int8 costs tasks on their own, or with ``-o`` on the int8 backbone that all tasks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgepet.calibration.budget import Drop, LayerDrop, require_resolution
from edgepet.calibration.images import CalibrationImages
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.search import Tried
from edgepet.deltas.codes import Range
from edgepet.errors import CheckError, InputError, option
from edgepet.exporters.exporter import ExportOptions
from edgepet.files import cache_folder, made_folder, move_file, require_other
from edgepet.graphs.slots import task_slots
from edgepet.jobs.job import MEASURED
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.pack import EVERY, write_pack
from edgepet.proving.precision import calibration_of, express, int8_of, task_images
from edgepet.proving.probing import probed_int8
from edgepet.proving.shared_runs import SharedRun, installed, run_shared
from edgepet.proving.subject import Subject
from edgepet.reports.as_json import to_json
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, format_ms, left, right
from edgepet.spec import FilePath
from edgepet.verbs.export import lost, recipe
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
    path,
    require_pack_place,
)

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateReport:
    """What int8 costs. ``layers`` are alone in int8, the worst first; ``ranges`` have the tensors' names in the graph.

    ``drop`` is of all layers but those that ``recipe`` keeps, on all of train and val, of several heads of the one that
    loses most.
    """

    layers: tuple[LayerDrop, ...]
    recipe: Int8Recipe
    ranges: Mapping[str, Range]
    tried: tuple[Tried, ...]
    drop: Drop
    held_out: int
    calibration: Mapping[str, object]
    warning: str | None

    @property
    def metric(self) -> str:
        """What the points are of: "top1", "miou" or "map"."""
        return self.drop.metric

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has: ``metric`` where it is not top-1."""
        return [*(each.name for each in fields(self)), *(["metric"] if self.metric != "top1" else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareReport:
    """A pack with ranges for the int8 backbone. ``own_memory_bytes`` is what the task adds in memory to the codes that
    all share, ``own_codes_bytes`` the part of it that are codes which changed. ``own_ranges`` of its ranges are in the
    pack, and the backbone's own hold for ``trunk_ranges``, in the trunk that ends at the tensor ``trunk``.
    """

    pack: Path
    pack_bytes: int
    codes_sha256: str
    codes_bytes: int
    own_memory_bytes: int
    own_codes_bytes: int
    own_ranges: int
    trunk_ranges: int
    trunk: str | None
    recipe: Int8Recipe
    runs: tuple[SharedRun, ...]
    calibration: Mapping[str, object]
    warning: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateAllReport:
    """Several packs. Each of ``tasks`` has its ``task``, the ``source`` and the JSON of its own report."""

    tasks: tuple[Mapping[str, Any], ...]


def calibrate(
    pack: FilePath,
    calib: FilePath,
    *,
    backbone: AnyBackbone = None,
    data: FilePath | None = None,
    images: int = 256,
    max_drop: float | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> CalibrateReport:
    """What ``export --precision int8`` would do with a task: its recipe and ranges, and what every layer costs.

    Raises:
        InputError: images that cannot be used, or a budget finer than they show.
        CheckError: half of the layers in float do not hold the budget.
    """
    subject = Subject(pack, backbone, data, answers=EVERY)
    chosen = _images(subject, calib, images)
    stage(f"graph of {subject.delta.backbone}")
    calibration = calibration_of(subject, chosen).for_format("onnx")
    made = calibration.run(max_drop=max_drop, stage=stage)
    stage("every layer alone in int8")
    return CalibrateReport(
        layers=made.layers or calibration.sensitivity(made.recipe),
        recipe=made.recipe,
        ranges=made.int8.ranges,
        tried=made.tried,
        drop=made.drop,
        held_out=len(chosen.held_out),
        calibration=chosen.facts,
        warning=chosen.warning,
    )


def share(
    pack: FilePath,
    calib: FilePath,
    output: FilePath,
    *,
    backbone: AnyBackbone = None,
    data: FilePath | None = None,
    images: int = 256,
    max_drop: float | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> ShareReport:
    """Express a task against the int8 backbone that all tasks share, and write its pack with the ranges it needs.

    The backbone's codes are made where they are not there, and its own ranges, which hold before what the task
    changes, are measured on the images of the first task; no task changes them. Every installed runtime is then
    compared with the Q/DQ graph of the same numbers, and judged on all of train and val.

    Raises:
        InputError: images that cannot be used, or a budget finer than they show.
        CheckError: a runtime answers otherwise than the Q/DQ graph, or the budget does not hold.
    """
    subject, output = Subject(pack, backbone, data, answers=EVERY), Path(output)
    require_pack_place(output)
    chosen = _images(subject, calib, images)
    if max_drop is not None and subject.delta.labels:  # of masks pixels count, not images
        require_resolution(max_drop, len(chosen.judged))
    stage(f"int8 backbone of {subject.delta.backbone}")
    graph = int8_of(subject, images=lambda: chosen)
    stage("measure ranges")
    expressed = express(subject.delta, subject.graph, graph, chosen)
    runs = list[SharedRun]()
    for runtime in installed():
        stage(f"compare on {runtime}")
        runs.append(run_shared(expressed, graph, runtime, chosen))
        if max_drop is not None and runs[-1].drop.points > max_drop:
            what, got = f"must lose at most {max_drop:g} points on {runtime}", f"{runs[-1].drop.points:.2f}"
            fix = f"train with {option('backbone_precision', 'int8')}, or export a model of its own"
            raise CheckError(str(output), what, got=f"{got} on {runs[-1].drop.n} images", fix=fix)
    stage("ask for the answers that the pack takes along")
    delta = probed_int8(expressed, graph, installed())
    slots, trunk = task_slots(graph, delta), expressed.trunk
    before = 0 if trunk is None else trunk.reads
    return ShareReport(
        pack=output,
        pack_bytes=write_pack(output, delta, kept=subject.pack.planes, sequence=subject.pack.sequence),
        codes_sha256=graph.codes_sha256,
        codes_bytes=graph.weights_bytes,
        own_memory_bytes=slots.own_bytes,
        own_codes_bytes=sum(codes.nbytes for codes in slots.codes.values()),
        own_ranges=len(graph.reads) - before,
        trunk_ranges=before,
        trunk=None if trunk is None else trunk.at,
        recipe=expressed.recipe,
        runs=tuple(runs),
        calibration=chosen.facts,
        warning=chosen.warning,
    )


def calibrate_all(
    packs: Sequence[FilePath],
    calib: FilePath,
    folder: FilePath | None = None,
    *,
    backbone: AnyBackbone = None,
    data: FilePath | None = None,
    images: int = 256,
    max_drop: float | None = None,
    jobs: int = 1,
    ray: str | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> CalibrateAllReport:
    """``calibrate`` several packs, or where a folder is given ``share`` them: each under its own name in there.

    Each has its own images where ``calib`` and ``data`` have a folder of its task's name.

    Args:
        jobs: packs at the same time, each in a process of its own. All packs take their places when all are made.
        ray: the address of a Ray cluster whose nodes run them; they see the same files.

    Raises:
        EdgepetError: as ``calibrate`` and ``share``, of the first pack that failed, when all others are done.
    """
    at_least_one("jobs", jobs, most=MOST_JOBS)
    tasks, out = tasks_of(packs, "calibrate"), None if folder is None else Path(folder)
    if out is not None:
        if len({pack.name for pack in tasks}) != len(tasks):
            raise InputError("calibrate", "needs packs of different names", got=", ".join(map(str, tasks)))
        made_folder(out, f"{option('output')} of several packs")
        for pack in tasks:
            require_pack_place(out / pack.name)
            require_other(out / pack.name, *tasks)

    def graphs(subject: Subject) -> None:
        _ = subject.graph
        if out is not None:
            int8_of(subject)
            with contextlib.suppress(InputError):  # of its images: the pack's own job says it
                int8_of(subject, images=lambda: _images(subject, of_task(calib, subject.delta.task), images))

    make_graphs(tasks, backbone, stage, graphs)
    settings = {"images": images, "max_drop": max_drop, "shared": out is not None}
    results = run_packs(
        "edgepet.verbs.calibrate:calibrate_job", tasks, out / JOBS if out else cache_folder() / "jobs",
        backbone=backbone, images={"calib": calib, "data": data}, settings=settings, processes=jobs, ray=ray,
        tell=stage,
    )  # fmt: skip
    told = []
    for (pack, task), result in zip(tasks.items(), results, strict=True):
        report = {"task": task, "source": str(pack), **result.report}
        if out is not None:
            move_file(result.folder / pack.name, out / pack.name)
            report["pack"] = str(out / pack.name)
            report["runs"] = [{**run, "bind_ms": result.measured["bind_ms"][run["runtime"]]} for run in report["runs"]]
        told.append(report)
    finish(results)
    return CalibrateAllReport(tasks=tuple(told))


def calibrate_job(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """The job of one pack: its report as JSON, and the pack on the shared backbone in ``folder``."""
    pack, settings = begin(specification), dict(specification["settings"])
    calib, output = folder_of(specification, "calib"), folder / pack.name if settings.pop("shared") else None
    data, backbone = folder_of(specification, "data"), specification["backbone"]
    if calib is None:
        raise InputError(option("calib"), "needs labelled images")
    if output is None:
        return cast(dict[str, object], to_json(calibrate(pack, calib, backbone=backbone, data=data, **settings)))
    report = cast(dict[str, Any], to_json(share(pack, calib, output, backbone=backbone, data=data, **settings)))
    bound = {run["runtime"]: run.pop("bind_ms") for run in report["runs"]}
    return {**report, "pack": output.name, MEASURED: {"bind_ms": bound}}


def _images(subject: Subject, calib: FilePath | None, images: int) -> CalibrationImages:
    at_least_one("calib_images", images)
    return task_images(subject, ExportOptions(precision="int8", calib=calib, calib_images=images))


# -------------------------------------------------------------------------------------------------- the command line


def _options(parser: Parser) -> None:
    told = "the task to look at, or several: each on the images of --calib/TASK, where that is a folder"
    parser.add_argument("packs", nargs="+", metavar="TASK.pet", help=told)
    backbone_option(parser)
    parser.add_argument("--calib", required=True, metavar="DIR", help="labelled images of the task, as for train")
    budget_options(parser)
    told = "where the test images are that must not be calibrated on (default: test/ in and beside --calib)"
    parser.add_argument("--data", metavar="DIR", help=told)
    told = (
        "calibrate on the int8 backbone that tasks share, and write the pack with its ranges"
        " (default: what int8 costs a model of its own); of several packs a folder"
    )
    jobs_option(parser, 1)
    parser.add_argument("-o", "--output", metavar="OUT.pet", help=told)


def _run(options: Options, progress: Progress) -> CalibrateReport | ShareReport | CalibrateAllReport:
    packs, data, output = [Path(pack) for pack in options.packs], path(options.data), path(options.output)
    require_several(options.ray, packs)
    with progress.stages() as stage:
        if len(packs) > 1:
            return calibrate_all(
                packs, options.calib, output, backbone=options.backbone, data=data, images=options.calib_images,
                max_drop=options.max_drop, jobs=options.jobs, ray=options.ray, stage=stage,
            )  # fmt: skip
        if output is not None:
            return share(
                packs[0], options.calib, output, backbone=options.backbone, data=data,
                images=options.calib_images, max_drop=options.max_drop, stage=stage,
            )  # fmt: skip
        return calibrate(
            packs[0], options.calib, backbone=options.backbone, data=data, images=options.calib_images,
            max_drop=options.max_drop, stage=stage,
        )  # fmt: skip


def _screen(report: CalibrateReport | ShareReport | CalibrateAllReport) -> Screen:
    if isinstance(report, CalibrateAllReport):
        return _all(report)
    return _shared(report) if isinstance(report, ShareReport) else _own(report)


def _all(report: CalibrateAllReport) -> Screen:
    rows = [
        (
            told["task"],
            run.get("runtime", "a model of its own"),
            f"{run['drop']['points']:.2f} ({run['drop']['low']:.2f} to {run['drop']['high']:.2f})",
            str(run["drop"]["n"]),
            f"{run['drop']['kl']:.2g}",
            recipe(told["recipe"]),
            format_bytes(told["pack_bytes"]) if "pack_bytes" in told else "–",
        )
        for told in report.tasks
        for run in told.get("runs", [told])
    ]
    numbers = right("points lost", "n", "divergence")
    columns = (*left("task", "on"), *numbers, *left("recipe"), *right("pack"))
    yield Table("what int8 costs", columns, rows)
    yield lines(*(f"  {told['task']}: {told['warning']}" for told in report.tasks if told["warning"]))


def _own(report: CalibrateReport) -> Screen:
    rows = [(layer.name, f"{layer.drop:+.2f}", f"{layer.kl:.2g}") for layer in report.layers]
    title = f"sensitivity on {report.held_out} held-out images, the worst first"
    yield Table(title, (*left("layer, alone in int8"), *right("points", "divergence")), rows)
    chosen = report.recipe
    yield lines(
        f"  recipe: {recipe(asdict(chosen))}, of {len(report.tried)} tried on the held-out images",
        f"  all layers in int8: {lost(report.drop)}",
        f"  in float for the budget: {', '.join(chosen.keep)}" if chosen.keep else None,
        f"  {report.warning}" if report.warning else None,
    )


def _shared(report: ShareReport) -> Screen:
    rows = [
        (
            run.runtime,
            f"{run.drop.points:.2f} ({run.drop.low:.2f} to {run.drop.high:.2f})",
            f"{run.drop.kl:.2g}",
            f"{run.layers.get('int8', 0)} of {sum(run.layers.values())}",
            format_ms(run.bind_ms),
        )
        for run in report.runs
    ]
    numbers = right(f"points lost, n = {report.runs[0].drop.n}", "divergence", "products on codes", "bind")
    yield Table("on the int8 backbone that tasks share", (*left("runtime"), *numbers), rows)
    own = f", {format_bytes(report.own_codes_bytes)} of it codes of its own" if report.own_codes_bytes else ""
    shared = f"; {report.trunk_ranges} are the backbone's, up to {report.trunk}" if report.trunk_ranges else ""
    yield lines(
        f"  {report.pack}  {format_bytes(report.pack_bytes)}; codes {format_bytes(report.codes_bytes)},"
        f" sha256 {report.codes_sha256[:12]}, for all tasks",
        f"  ranges of its own: {report.own_ranges}{shared}",
        f"  in memory the task adds {format_bytes(report.own_memory_bytes)}{own}",
        f"  {report.warning}" if report.warning else None,
    )


VERB = Verb(options=_options, run=_run, screen=_screen)
