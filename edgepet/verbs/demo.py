"""The whole flow on real data: two tasks, two methods, one backbone, three formats. Offline once installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgepet.device.artifact import Format
from edgepet.exporters import EXPORTERS
from edgepet.exporters.exporter import ExportOptions
from edgepet.measuring.latency import BenchReport
from edgepet.measuring.machine import runtimes
from edgepet.reports.tables import Progress, program
from edgepet.samples.tasks import WEIGHTS, build_task
from edgepet.verbs.evaluate import EvalReport, bench, evaluate, storage
from edgepet.verbs.export import ExportReport, export
from edgepet.verbs.storage import StorageReport
from edgepet.verbs.train import TrainReport, train

BACKBONE, IMAGE_SIZE = "demo:vit-small", 112
TEST_IMAGES = 500  # of each task: enough for a margin of four points, and a few seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """One task of the demo."""

    task: str
    method: str
    epochs: int


PLANS = (Plan("digits", "ssf", 5), Plan("landcover", "lora", 4))


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
    folder.mkdir(parents=True, exist_ok=True)
    trained = {plan.task: _train(plan, folder, progress) for plan in PLANS}
    packs = [report.pack for report in trained.values()]
    artifacts, skipped = _export(packs, folder, progress)
    tasks = []
    for plan in PLANS:
        with progress.stage(f"{plan.task}: test on ONNX Runtime"):
            test = evaluate(folder / f"{plan.task}-onnx-fp32", folder / "data" / plan.task)
        tasks.append(DemoTask(task=plan.task, trained=trained[plan.task], test=test))
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


def _train(plan: Plan, folder: Path, progress: Progress) -> TrainReport:
    with progress.stage(f"{plan.task}: images"):
        build_task(plan.task, folder / "data" / plan.task, test_cap=TEST_IMAGES)
    with progress.stages() as stage, progress.training(f"{plan.task}: {plan.method}") as say:
        return train(
            folder / "data" / plan.task,
            BACKBONE,
            plan.method,
            folder / f"{plan.task}.pet",
            image_size=IMAGE_SIZE,
            epochs=plan.epochs,
            say=say,
            stage=lambda name: stage(f"{plan.task}: {name}"),
        )


def _export(packs: list[Path], folder: Path, progress: Progress) -> tuple[ExportReport, tuple[str, ...]]:
    """Every format whose runtime is installed; what is missing is said, not hidden."""
    here = {status.name: status for status in runtimes()}
    engines: dict[Format, tuple[str, ...]] = {"openvino": ("openvino",), "tensorrt": ("tensorrt", "tensorrt-rtx")}
    missing = {name: any_of for name, any_of in engines.items() if not any(here[engine].available for engine in any_of)}
    formats = tuple(name for name in EXPORTERS if name not in missing)
    with progress.stages() as stage:
        report = export(packs, folder, options=ExportOptions(to=formats), stage=stage)
    return report, tuple(f"{name}: {here[any_of[-1]].fix}" for name, any_of in missing.items())


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
