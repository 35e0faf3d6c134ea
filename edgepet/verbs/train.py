"""``train``: images and a backbone in, a pack and a work folder out. Torch is imported when a training begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from edgepet.deltas.delta import Delta, Score
from edgepet.errors import require
from edgepet.images.held import features_folder, forget, pixels_folder
from edgepet.images.notes import Tell, tell_nobody
from edgepet.images.sets import batches
from edgepet.measuring.parity import Accuracy, accuracy
from edgepet.methods import Method
from edgepet.methods.method import count
from edgepet.packs.codecs import Rounding
from edgepet.packs.pack import encode_pack, read_pack, write_pack
from edgepet.proving.probing import probed
from edgepet.reports.logs import Place, logged
from edgepet.reports.progress import Step
from edgepet.reports.screen import Screen, lines, program
from edgepet.reports.tables import format_bytes, format_number, format_percent, format_seconds
from edgepet.spec import FilePath
from edgepet.tuning.options import TrainOptions
from edgepet.tuning.work_folder import HELD_OUT, work_folder, write_work
from edgepet.verbs.train_dense import (
    DenseTrainReport,
    Judged,
    dense_screen,
    dense_tasks,
    report_dense,
    task_of,
    write_dense,
)
from edgepet.verbs.training import DEFAULTS, asked_options, training_options
from edgepet.verbs.verb import Options, Parser, Verb, output_option, require_pack_place, require_task_name

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone
    from edgepet.reports.progress import Progress
    from edgepet.tuning.dense_training import MadeDense
    from edgepet.tuning.fit import LabelledPixels
    from edgepet.tuning.model import TunedModel
    from edgepet.tuning.processes import Processes
    from edgepet.tuning.training import Made, Training

AnyMade = TypeVar("AnyMade", "Made", "MadeDense")
_UNTOLD = ("resume", "checkpoint_s", "log", "log_dir", "memory")  # options that decide nothing of what is made
FEW_IMAGES = 100  # of a val set: one image is a point
JUDGED = 64  # val images at a time
IMBALANCE = 3  # times as many images of one class as of another


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneFacts:
    """The backbone of a training; ``bytes`` are those of its tensors at the native image size.

    ``fused`` says that branches which only training needs were summed: it is timm's inference form.
    """

    name: str
    fingerprint: str
    bytes: int
    description: str
    fused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What ``train`` made. ``val`` is of the pack as stored, in float32; ``trainable_params`` leaves the head out.

    ``algebra_max_abs`` is the largest difference of logits between tuned and merged network in float64.
    ``epochs_run`` is below ``epochs`` where the training ended early. ``log_dir`` is where steps were logged to.
    ``images_per_class`` are the fewest and the most that a class was trained on. Where ``backbone_precision``
    is not fp32, ``val_rounded`` is of the network as it was tuned: its backbone rounded, all else float32.
    ``probe`` is what a linear probe of as many epochs reaches on the features that the training began with; None where
    the method is one.
    """

    pack: Path
    work: Path
    method: str
    trainable_params: int
    head_params: int
    pack_bytes: int
    epochs: int
    epochs_run: int
    best_epoch: int
    seconds: float
    images_per_second: float
    precision: str
    backbone_precision: str
    images_per_class: tuple[int, int]
    val: Accuracy
    val_rounded: Accuracy | None
    probe: Score | None
    algebra_max_abs: float
    algebra_limit: float
    backbone: BackboneFacts
    log_dir: Path | None


AnyReport: TypeAlias = "TrainReport | DenseTrainReport"


def train(
    data: FilePath,
    backbone: str | Backbone,
    method: str | Method,
    output: FilePath,
    *,
    options: TrainOptions = DEFAULTS,
    codec: Rounding = "fp16",
    say: Callable[[Step], None] = lambda step: None,
    stage: Callable[[str], None] = lambda name: None,
    tell: Tell = tell_nobody,
    **fields: Any,
) -> TrainReport | DenseTrainReport:
    """Tune ``method`` on the images in ``data`` and write ``output`` (``TASK.pet``) and ``TASK.work`` beside it.

    Args:
        data: a folder with train/, val/ and perhaps test/, each of class folders; one folder of class folders; or one
            of images with masks, boxes or several labels, of a kind that ``images.mask_folders``,
            ``images.box_folders`` or ``images.labels`` names.
        backbone: a timm name, ``NAME@FILE`` or ``demo:NAME``; or a network of your own, ``Backbone.from_module``.
        method: a method, or the name of one, whose settings are then ``options.settings``.
        options: how to train.
        codec: "fp16" or "fp32", in which the pack stores its numbers.
        say: told of every step; stage: told the name of what begins; tell: told what is used of ``data`` and what is
            passed over, a line and what stands below it where everything is asked for.
        fields: fields of ``TrainOptions`` by name, in place of those of ``options``: ``train(..., epochs=4)``.

    Raises:
        InputError: data, backbone or options at fault, or the checkpoint of another training is in the way.
        CheckError: the merged network is not the tuned one.
        MissingError: torch or timm is not installed.
        KeyboardInterrupt: SIGINT or SIGTERM arrived, and a checkpoint was written.
    """
    require("torch", extra="train", purpose="train")
    output = Path(output)
    require_task_name(output)
    require_pack_place(output)
    from edgepet.tuning.training import Training

    training = Training(
        data=Path(data), backbone=backbone, method=method, output=output, options=replace(options, **fields), say=say,
        stage=stage, tell=tell,
    )  # fmt: skip
    training.options.check()
    task = task_of(Path(data), training.options.task)
    if task != "class":
        return _train_dense(training, task, codec)
    from edgepet.tuning.training import run

    judged = _Judged()
    made, seconds = run_training(training, lambda made: _write(output, made, codec, judged), run)
    return _report(training, made, judged, seconds)


def _train_dense(training: Training, task: str, codec: Rounding) -> DenseTrainReport:
    """A training of heads that read maps."""
    from edgepet.tuning.dense_training import run_dense

    output, judged = training.output, Judged()
    made, seconds = run_training(
        training, lambda made: write_dense(output, made, codec, judged), partial(run_dense, tasks=dense_tasks(task))
    )
    return report_dense(output, made, judged, seconds, log_dir(training))


def run_training(
    training: Training, write: Callable[[AnyMade], None], run: Callable[[Training, Processes], AnyMade]
) -> tuple[AnyMade, float]:
    """Train by ``run`` in every process that was launched, and ``write`` what was made in the one that leads.

    Returns:
        What was made, and the seconds that it took.
    """
    from edgepet.tuning.processes import processes as launched

    began, processes = time.perf_counter(), launched()
    training.options.check()
    with logged(training.options.log if processes.leads else (), _place(training)) as log:

        def say(step: Step) -> None:
            log(step)
            training.say(step)

        made = run(replace(training, say=say), processes)
    if processes.leads:
        write(made)
        made.keeper.remove()
        for kept in (pixels_folder, features_folder):
            forget(kept(training.output))
    processes.wait()
    return made, time.perf_counter() - began


def log_dir(training: Training) -> Path | None:
    """Where a training's steps are logged to, if anywhere."""
    options = training.options
    return Path(options.log_dir or training.output.parent / "logs") if options.log else None


def _place(training: Training) -> Place:
    options, backbone, method = training.options, training.backbone, training.method
    asked = {name: value for name, value in asdict(options).items() if name not in _UNTOLD and value is not None}
    named = {
        "data": training.data,
        "backbone": backbone if isinstance(backbone, str) else backbone.label,
        "method": method if isinstance(method, str) else method.name,
    }
    settings = {
        name: value if isinstance(value, int | float) else str(value) for name, value in (named | asked).items()
    }
    return Place(folder=log_dir(training) or Path(), task=training.output.stem, settings=settings)


def keep_work(folder: Path, made: Made) -> None:
    """Write a training's work folder, and its backbone where graphs lie: a pack finds it there again."""
    from edgepet.exporters.trace import keep_weights

    spread = np.random.default_rng(0).permutation(len(made.val))  # folders come class by class
    keep_weights(made.backbone)
    kept = spread[:HELD_OUT]
    write_work(folder, made.delta, made.model.arrays(), made.val.pixels[kept], made.val.labels[kept])


def val_accuracy(made: Made, delta: Delta) -> Accuracy:
    """Accuracy of ``delta`` on a training's val images, folded and run in float32."""
    from edgepet.networks.merged import merged_answers

    logits = merged_answers(made.backbone, delta, batches(made.val.pixels, made.backbone.preprocess, JUDGED))
    return accuracy(logits.argmax(1), made.val.labels, len(delta.labels))


class _Judged:
    """What a training's pack comes to on its val images, as stored; judged once, as ``train_dense.Judged``."""

    def __init__(self) -> None:
        self._found: Accuracy | None = None

    def accuracy(self, made: Made, delta: Delta) -> Accuracy:
        if self._found is None:
            self._found = val_accuracy(made, delta)
        return self._found


def _write(output: Path, made: Made, codec: Rounding, judged: _Judged) -> None:
    """The pack, with the val accuracy of what it stores and not of what was trained, and its work folder."""
    stored = read_pack(encode_pack(made.delta, codec=codec))
    found, delta = judged.accuracy(made, stored.delta), probed(made.backbone, stored.delta)
    write_pack(output, replace(delta, val=Score(top1=found.top1, n=found.n)), kept=stored.planes)
    keep_work(work_folder(output), made)


def _report(training: Training, made: Made, judged: _Judged, seconds: float) -> TrainReport:
    output, backbone, model, fitted = training.output, made.backbone, made.model, made.fitted
    counts = np.bincount(made.train.labels, minlength=len(made.delta.labels))
    return TrainReport(
        pack=output,
        work=work_folder(output),
        method=model.method.name,
        trainable_params=count(model.method, backbone.layers, backbone.tensors),
        head_params=sum(p.numel() for p in model.linear.parameters()),
        pack_bytes=output.stat().st_size,
        epochs=made.plan.epochs,
        epochs_run=fitted.epochs,
        best_epoch=fitted.best_epoch,
        seconds=seconds,
        images_per_second=fitted.images_per_second,
        precision="bf16" if made.plan.autocast else "fp32",
        backbone_precision=model.backbone_precision,
        images_per_class=(int(counts.min()), int(counts.max())),
        val=judged.accuracy(made, read_pack(output).delta),
        val_rounded=None if model.fake_quant is None else _rounded(model, backbone, made.val),
        probe=fitted.probe,
        algebra_max_abs=made.proof[0],
        algebra_limit=made.proof[1],
        backbone=BackboneFacts(
            name=backbone.label,
            fingerprint=backbone.fingerprint,
            bytes=backbone.native_bytes,
            description=backbone.description,
            fused=backbone.fused,
        ),
        log_dir=log_dir(training),
    )


def _rounded(model: TunedModel, backbone: Backbone, val: LabelledPixels) -> Accuracy:
    from edgepet.tuning.model import logits_of

    parts = [logits_of(model, images) for images in batches(val.pixels, backbone.preprocess, JUDGED)]
    logits = np.concatenate(parts)
    return accuracy(logits.argmax(1), val.labels, logits.shape[1])


# -------------------------------------------------------------------------------------------------- the command line


def speaks() -> bool:
    """Whether this is the process of a training that speaks."""
    from edgepet.tuning.processes import processes

    return processes().leads


def _options(parser: Parser) -> None:
    training_options(parser)
    told = "what the pack stores its numbers in (default: %(default)s)"
    parser.add_argument("--codec", default="fp16", choices=["fp16", "fp32"], help=told)
    output_option(parser, "TASK.pet", "the pack to write, with TASK.work beside it")


def _run(options: Options, progress: Progress) -> AnyReport:
    label = f"{options.method} on {options.data}"
    with progress.stages() as stage, progress.training(label) as say:
        return train(
            Path(options.data), options.backbone, options.method, Path(options.output),
            options=asked_options(options), codec=options.codec, say=say, stage=stage,
            tell=progress.tell,
        )  # fmt: skip


def _screen(report: AnyReport) -> Screen:
    if isinstance(report, DenseTrainReport):
        yield from dense_screen(report)
        return
    yield lines(
        f"{report.pack}  {format_bytes(report.pack_bytes)}",
        f"  {report.method} on {report.backbone.name}: {format_number(report.trainable_params)} parameters"
        f" and a head of {format_number(report.head_params)}",
        f"  {report.backbone.description}",
        f"  val {format_percent(report.val.top1)} of {report.val.n} images, as stored;"
        f" epoch {report.best_epoch} of {report.epochs}{ended_early(report.epochs_run, report.epochs)}",
        f"  95 % interval {format_percent(report.val.low)} to {format_percent(report.val.high)}",
        None
        if report.val_rounded is None
        else f"  val {format_percent(report.val_rounded.top1)} with the backbone"
        f" rounded to {report.backbone_precision}, as it was tuned",
        None
        if report.probe is None
        else f"  val {format_percent(report.probe.top1)} of a linear probe, its head alone",
        *_warnings(report),
        f"  {format_number(report.images_per_second)} images/s in {report.precision},"
        f" {format_seconds(report.seconds)} in all",
        f"  merged equals tuned in float64: {report.algebra_max_abs:.1e}, limit {report.algebra_limit:.1e}",
        None if report.log_dir is None else f"  logged to {report.log_dir}",
        f"next: {program()} export {report.pack} --to onnx,openvino -o exported",
    )


def ended_early(run: int, asked: int) -> str:
    """What is said of a training that went without all of its epochs."""
    return f", ended after {run}" if run < asked else ""


def _warnings(report: TrainReport) -> list[str]:
    """What makes the accuracy above say less than it seems to."""
    told, (fewest, most) = [], report.images_per_class
    told += no_better(report.method, report.val, report.probe)
    if report.val.n < FEW_IMAGES:
        told.append(f"  {report.val.n} val images tell epochs apart poorly: the best one is partly luck")
    if most > IMBALANCE * fewest:
        told.append(
            f"  classes are uneven, {fewest} to {most} training images:"
            f" the mean over classes is {format_percent(report.val.balanced)}"
        )
    return told


def no_better(method: str, val: Accuracy, probe: Score | None) -> list[str]:
    """What to do where tuning has not helped, in a line: nothing where it has, or nothing can."""
    if probe is None or val.top1 > probe.top1 or val.top1 == 1:
        return []
    ends = "below" if val.top1 < probe.top1 else "at"
    return [f"  {method} ends {ends} the linear probe's val: try a smaller --lr, more --epochs, or linear-probe itself"]


VERB = Verb(options=_options, run=_run, screen=_screen, speaks=speaks)
