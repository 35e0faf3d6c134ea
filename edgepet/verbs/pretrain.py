"""``pretrain``: tune a method on a broad data set and keep its tensors, for trainings to start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepet.deltas.delta import Score
from edgepet.errors import InputError, option, require
from edgepet.images.notes import Tell, tell_nobody
from edgepet.measuring.parity import Accuracy
from edgepet.methods import Method
from edgepet.methods.method import count
from edgepet.reports.progress import Step
from edgepet.reports.screen import Screen, lines, program
from edgepet.reports.tables import format_number, format_percent, format_seconds
from edgepet.spec import FilePath
from edgepet.tuning.options import TrainOptions
from edgepet.verbs.dense_answers import DenseScore, mean_of
from edgepet.verbs.train import ended_early, keep_work, no_better, run_training, speaks, val_accuracy
from edgepet.verbs.train_dense import (
    HeadReport,
    Judged,
    dense_tasks,
    head_lines,
    head_reports,
    keep_dense_work,
    task_of,
)
from edgepet.verbs.training import DEFAULTS, asked_options, training_options
from edgepet.verbs.verb import Options, Parser, Verb, output_option, require_task_name

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone
    from edgepet.reports.progress import Progress
    from edgepet.tuning.training import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainReport:
    """What ``pretrain`` made: the work folder at ``path``, from which trainings start. ``max_abs_diff`` is the largest
    difference of logits between tuned and lowered network in float64, ``probe`` what a linear probe reaches, as it is
    in the report of ``train``. ``epochs_run`` is below ``epochs`` where the training ended early.
    """

    path: Path
    method: str
    trainable_params: int
    classes: int
    epochs: int
    epochs_run: int
    best_epoch: int
    seconds: float
    val: Accuracy
    probe: Score | None
    max_abs_diff: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePretrainReport:
    """As ``PretrainReport``, of images with masks, boxes or labels, or of several of these.

    ``heads`` are what was tuned for, and start anew in each training that begins here; ``val`` is their mean.
    """

    path: Path
    method: str
    trainable_params: int
    epochs: int
    epochs_run: int
    best_epoch: int
    seconds: float
    val: DenseScore
    heads: tuple[HeadReport, ...]
    max_abs_diff: float


def pretrain(
    data: FilePath,
    backbone: str | Backbone,
    method: str | Method,
    output: FilePath,
    *,
    options: TrainOptions = DEFAULTS,
    say: Callable[[Step], None] = lambda step: None,
    stage: Callable[[str], None] = lambda name: None,
    tell: Tell = tell_nobody,
    **fields: Any,
) -> PretrainReport | DensePretrainReport:
    """Tune ``method`` on a broad data set and keep its tensors in the folder ``output``: ``train`` starts from them.

    Give it to ``train`` as ``init``. The arguments are those of ``train``.

    Raises:
        InputError, CheckError, MissingError, KeyboardInterrupt: as ``train`` does.

    Source: the first stage of PVP, arXiv:2304.13639.
    """
    require("torch", extra="train", purpose="pretrain")
    output = Path(output)
    if output.suffix != ".work":
        raise InputError(option("output"), "needs a folder name ending in .work", got=repr(output.name))
    require_task_name(output)
    from edgepet.tuning.training import Training, run

    training = Training(
        data=Path(data), backbone=backbone, method=method, output=output, options=replace(options, **fields), say=say,
        stage=stage, tell=tell,
    )  # fmt: skip
    training.options.check()
    task = task_of(Path(data), training.options.task)
    if task != "class":
        return _pretrain_dense(training, task)
    made, seconds = run_training(training, lambda made: keep_work(output, made), run)
    return PretrainReport(
        path=output,
        method=made.model.method.name,
        trainable_params=count(made.model.method, made.backbone.layers, made.backbone.tensors),
        classes=len(made.delta.labels),
        epochs=made.plan.epochs,
        epochs_run=made.fitted.epochs,
        best_epoch=made.fitted.best_epoch,
        seconds=seconds,
        val=val_accuracy(made, made.delta),
        probe=made.fitted.probe,
        max_abs_diff=made.proof[0],
    )


def _pretrain_dense(training: Training, task: str) -> DensePretrainReport:
    """On heads that read maps: their tensors are not kept, what was tuned below them is."""
    from edgepet.tuning.dense_training import run_dense

    output, judged = training.output, Judged()
    made, seconds = run_training(
        training, lambda made: keep_dense_work(output, made), partial(run_dense, tasks=dense_tasks(task))
    )
    heads = head_reports(made, made.delta, judged)
    return DensePretrainReport(
        path=output,
        method=made.model.method.name,
        trainable_params=count(made.model.method, made.backbone.layers, made.backbone.tensors),
        epochs=made.plan.epochs,
        epochs_run=made.fitted.epochs,
        best_epoch=made.fitted.best_epoch,
        seconds=seconds,
        val=mean_of([each.val for each in heads]),
        heads=heads,
        max_abs_diff=made.proof[0],
    )


def _options(parser: Parser) -> None:
    training_options(parser)
    output_option(parser, "NAME.work", "the folder to write, for `edgepet train --init`")


def _run(options: Options, progress: Progress) -> PretrainReport | DensePretrainReport:
    label = f"{options.method} on {options.data}"
    with progress.stages() as stage, progress.training(label) as say:
        return pretrain(
            Path(options.data), options.backbone, options.method, Path(options.output),
            options=asked_options(options), say=say, stage=stage, tell=progress.tell,
        )  # fmt: skip


def _screen(report: PretrainReport | DensePretrainReport) -> Screen:
    if isinstance(report, DensePretrainReport):
        ended = ended_early(report.epochs_run, report.epochs)
        yield lines(
            f"{report.path}",
            f"  {format_number(report.trainable_params)} parameters of {report.method}",
            *head_lines(report.heads, f"epoch {report.best_epoch} of {report.epochs}{ended}", stored=""),
            f"  {format_seconds(report.seconds)} in all",
            f"  lowered equals tuned in float64: {report.max_abs_diff:.1e}",
            f"next: {program()} train DATA --method {report.method} --init {report.path} ...",
        )
        return
    yield lines(
        f"{report.path}",
        f"  {format_number(report.trainable_params)} parameters of {report.method}, tuned on {report.classes} classes",
        f"  val {format_percent(report.val.top1)} of {report.val.n} images; epoch {report.best_epoch}"
        f" of {report.epochs}{ended_early(report.epochs_run, report.epochs)}; {format_seconds(report.seconds)} in all",
        *no_better(report.method, report.val, report.probe),
        f"  lowered equals tuned in float64: {report.max_abs_diff:.1e}",
        f"next: {program()} train DATA --method {report.method} --init {report.path} ...",
    )


VERB = Verb(options=_options, run=_run, screen=_screen, speaks=speaks)
