"""``demo``: the whole flow on real data, two tasks, two methods, three formats. Offline once installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgepet.device.runtimes import ENGINES, FORMATS
from edgepet.errors import require
from edgepet.exporters import EXPORTERS
from edgepet.exporters.exporter import ExportOptions
from edgepet.files import made_cache, made_folder, require_space
from edgepet.measuring.latency import BenchReport
from edgepet.measuring.machine import runtimes
from edgepet.reports.progress import Progress
from edgepet.reports.screen import Screen, lines, program
from edgepet.reports.tables import Table, format_bytes, format_number, format_percent, left, right
from edgepet.samples.tasks import build_task
from edgepet.samples.weights import WEIGHTS
from edgepet.tuning.options import TrainOptions
from edgepet.verbs import bench as bench_verb
from edgepet.verbs import export as export_verb
from edgepet.verbs import storage as storage_verb
from edgepet.verbs.bench import bench
from edgepet.verbs.evaluate import EvalReport, evaluate
from edgepet.verbs.export import ExportReport, export
from edgepet.verbs.storage import StorageReport, storage
from edgepet.verbs.train import TrainReport, train
from edgepet.verbs.verb import Options, Parser, Verb

BACKBONE, IMAGE_SIZE = "demo:vit-small", 112
DEMO_BYTES = 600_000_000  # two tasks in three formats of 88 MB each, images, and some room
TEST_IMAGES = 500  # of each task: enough for a margin of four points, and a few seconds


@dataclass(frozen=True, slots=True)
class DemoTraining:
    """How one task of the demo is trained."""

    task: str
    method: str
    epochs: int


TRAININGS = (DemoTraining("digits", "ssf", 5), DemoTraining("landcover", "lora", 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTask:
    """A task as it was trained, and its accuracy on ONNX Runtime."""

    task: str
    trained: TrainReport
    test: EvalReport


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """``backbone`` says what the weights are; ``commands`` are what to try next, ready to paste."""

    backbone: str
    tasks: tuple[DemoTask, ...]
    storage: StorageReport
    bench: BenchReport
    artifacts: ExportReport
    skipped: tuple[str, ...]
    commands: tuple[str, ...]


def demo(folder: Path, *, progress: Progress) -> DemoReport:
    """Train, merge, export, measure and count in ``folder``.

    Raises:
        MissingError: the ``demo`` or ``train`` extra is not installed.
    """
    for package in ("torch", "timm", "onnx", "onnxscript"):
        require(package, extra="train,openvino,tensorrt-rtx,demo", purpose="demo")
    made_cache()
    require_space(made_folder(folder, "everything of the demo goes there"), DEMO_BYTES, "the demo")
    trained = {asked.task: _train(asked, folder, progress) for asked in TRAININGS}
    packs = [report.pack for report in trained.values()]
    artifacts, skipped = _export(packs, folder, progress)
    tasks = []
    for asked in TRAININGS:
        with progress.stage(f"{asked.task}: test on ONNX Runtime"):
            test = cast(EvalReport, evaluate(folder / f"{asked.task}-onnx-fp32", folder / "data" / asked.task))
        tasks.append(DemoTask(task=asked.task, trained=trained[asked.task], test=test))
    with progress.stage("storage: run every task from one folder"):
        stored = storage(packs)
    with progress.stage("bench: interleaved rounds"):
        timed = bench(packs[:1], rounds=60, warmup=5, plain=True)
    return DemoReport(
        backbone=WEIGHTS[BACKBONE.removeprefix("demo:")].description,
        tasks=tuple(tasks),
        storage=stored,
        bench=timed,
        artifacts=artifacts,
        skipped=skipped,
        commands=_commands(folder),
    )


def _train(asked: DemoTraining, folder: Path, progress: Progress) -> TrainReport:
    with progress.stage(f"{asked.task}: images"):
        build_task(asked.task, folder / "data" / asked.task, test_cap=TEST_IMAGES)
    with progress.stages() as stage, progress.training(f"{asked.task}: {asked.method}") as say:
        made = train(
            folder / "data" / asked.task,
            BACKBONE,
            asked.method,
            folder / f"{asked.task}.pet",
            options=TrainOptions(image_size=IMAGE_SIZE, epochs=asked.epochs, task="class"),
            say=say,
            stage=lambda name: stage(f"{asked.task}: {name}"),
        )
    return cast(TrainReport, made)  # of class folders


def _export(packs: list[Path], folder: Path, progress: Progress) -> tuple[ExportReport, tuple[str, ...]]:
    """Every format whose runtime is installed; what is missing is said, not hidden."""
    here = {status.name: status for status in runtimes(ENGINES)}
    engines = {name: [here[engine.name] for engine in FORMATS[name].engines] for name in EXPORTERS}
    formats = tuple(name for name, found in engines.items() if any(engine.available for engine in found))
    with progress.stages() as stage:
        report = export(packs, folder, options=ExportOptions(to=formats), stage=stage)
    return report, tuple(f"{name}: {found[-1].fix}" for name, found in engines.items() if name not in formats)


def _commands(folder: Path) -> tuple[str, ...]:
    run = program()
    return (
        f"{run} inspect {folder}/digits.pet",
        f"{run} verify {folder}/landcover-openvino-fp32",
        f"{run} eval {folder}/landcover.pet {folder}/data/landcover --runtime openvino",
        f"{run} merge {folder}/landcover.pet -o {folder}/landcover.safetensors",
        f"{run} bench {folder}/digits.pet {folder}/digits-onnx-fp32 --plain",
        f"{run} train {folder}/data/landcover --backbone {BACKBONE} --img-size {IMAGE_SIZE} --method consolidator"
        f" -o {folder}/landcover-consolidator.pet",
    )


def _options(parser: Parser) -> None:
    parser.add_argument("--dir", default="demo", metavar="DIR", help="where everything goes (default: %(default)s)")


def _run(options: Options, progress: Progress) -> DemoReport:
    return demo(Path(options.dir), progress=progress)


def _screen(report: DemoReport) -> Screen:
    yield lines("", report.backbone)
    rows = [
        (
            t.task,
            t.trained.method,
            format_number(t.trained.trainable_params),
            format_bytes(t.trained.pack_bytes),
            format_percent(t.trained.val.top1),
            f"{format_percent(t.test.top1)} of {t.test.n}",
        )
        for t in report.tasks
    ]
    yield Table("tasks", (*left("task", "method"), *right("parameters", "pack", "val", "test")), rows)
    yield from export_verb.screen(report.artifacts)
    yield from storage_verb.screen(report.storage)
    yield from bench_verb.screen(report.bench)
    yield lines(*(f"left out: {skipped}" for skipped in report.skipped))
    yield lines("", "next:", *(f"  {command}" for command in report.commands))


VERB = Verb(options=_options, run=_run, screen=_screen)
