"""What ``train`` makes of images with boxes: a pack with a detector, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edgepet.deltas.delta import Delta
from edgepet.images.boxes import BoxSet
from edgepet.measuring.average_precision import BoxFit
from edgepet.methods.method import count
from edgepet.packs.codecs import Rounding
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.boxes import judge_boxes
from edgepet.reports.screen import Screen, lines, program
from edgepet.reports.tables import format_bytes, format_number, format_percent, format_seconds
from edgepet.tuning.work_folder import work_folder
from edgepet.verbs.train_dense import DenseBackbone, backbone_facts, write_dense

if TYPE_CHECKING:
    from edgepet.tuning.box_fit import BoxedPixels
    from edgepet.tuning.dense_training import MadeDense

    MadeBoxes: TypeAlias = MadeDense[BoxSet, BoxedPixels]

METRIC = "map"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxScore:
    """``value`` of ``metric``, a fraction of 1, on ``n`` images with ``objects`` in all, and its 95 % interval.

    ``map50`` is that at the one limit of 0.5, ``recall`` the part of the objects that is found, a mean over limits.
    """

    metric: str
    value: float
    n: int
    low: float
    high: float
    map50: float
    recall: float
    objects: int

    @classmethod
    def of(cls, judged: BoxFit) -> BoxScore:
        """The average precision of ``judged``."""
        return cls(
            metric=METRIC, value=judged.ap, n=judged.n, low=judged.low, high=judged.high, map50=judged.ap50,
            recall=judged.recall, objects=judged.objects,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPrecision:
    """A class, its average precision, None where val has no object of it, and its ``objects`` in train."""

    name: str
    ap: float | None
    objects: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxTrainReport:
    """What ``train`` made of images with boxes. ``val`` is of the pack as stored, in float32, on images as they are;
    ``classes`` are what it is the mean of.

    ``trainable_params`` leaves the head out, ``head_params`` are the values that are shipped. ``algebra_max_abs`` is
    the largest difference between what was tuned and what it lowers to, in float64, before the best boxes are chosen.
    """

    pack: Path
    work: Path
    method: str
    head: str
    trainable_params: int
    head_params: int
    pack_bytes: int
    epochs: int
    epochs_run: int
    best_epoch: int
    seconds: float
    images_per_second: float
    precision: str
    val: BoxScore
    classes: tuple[ClassPrecision, ...]
    algebra_max_abs: float
    algebra_limit: float
    backbone: DenseBackbone
    log_dir: Path | None


def write_boxes(output: Path, made: MadeBoxes, codec: Rounding) -> None:
    """The pack, with the val AP of what it stores and not of what was trained, and its work folder."""
    write_dense(output, made, codec, lambda delta: val_fit(made, delta).ap)


def val_fit(made: MadeBoxes, delta: Delta) -> BoxFit:
    """How well the boxes of ``delta`` fit those of a training's val images, folded and run in float32."""
    from edgepet.tuning.dense import MergedHead

    network = MergedHead(made.backbone, delta)
    return judge_boxes(network, made.val_set, made.backbone.preprocess, len(made.val_set.classes))


def report_boxes(output: Path, made: MadeBoxes, seconds: float, log_dir: Path | None) -> BoxTrainReport:
    """The report of a training whose pack was written."""
    model, fitted = made.model, made.fitted
    delta = read_pack(output, answers=EVERY).delta
    judged = val_fit(made, delta)
    return BoxTrainReport(
        pack=output,
        work=work_folder(output),
        method=model.method.name,
        head=str(model.form.form),
        trainable_params=count(model.method, made.backbone.layers, made.backbone.tensors),
        head_params=delta.heads[0].head.stored_values,
        pack_bytes=output.stat().st_size,
        epochs=made.plan.epochs,
        epochs_run=fitted.epochs,
        best_epoch=fitted.best_epoch,
        seconds=seconds,
        images_per_second=fitted.images_per_second,
        precision="bf16" if made.plan.autocast else "fp32",
        val=BoxScore.of(judged),
        classes=tuple(
            ClassPrecision(name=name, ap=ap, objects=int(objects))
            for name, ap, objects in zip(made.val_set.classes, judged.aps, made.counts, strict=True)
        ),
        algebra_max_abs=made.proof[0],
        algebra_limit=made.proof[1],
        backbone=backbone_facts(made.backbone),
        log_dir=log_dir,
    )


def box_screen(report: BoxTrainReport) -> Screen:
    """What people see of it."""
    ended = f", ended after {report.epochs_run}" if report.epochs_run < report.epochs else ""
    val = report.val
    yield lines(
        f"{report.pack}  {format_bytes(report.pack_bytes)}",
        f"  {report.method} on {report.backbone.name}: {format_number(report.trainable_params)} parameters"
        f" and a head {report.head} of {format_number(report.head_params)}",
        f"  val AP {format_percent(val.value)}, AP50 {format_percent(val.map50)} on {val.n} images with"
        f" {val.objects} objects, as stored; epoch {report.best_epoch} of {report.epochs}{ended}",
        f"  95 % interval of AP {format_percent(val.low)} to {format_percent(val.high)}",
        *(f"    {each.name}: {told(each.ap)}" for each in report.classes),
        f"  {format_number(report.images_per_second)} images/s in {report.precision},"
        f" {format_seconds(report.seconds)} in all",
        f"  lowered equals tuned in float64: {report.algebra_max_abs:.1e}, limit {report.algebra_limit:.1e}",
        None if report.log_dir is None else f"  logged to {report.log_dir}",
        f"next: {program()} predict {report.pack} IMAGE --draw DIR",
    )


def told(ap: float | None) -> str:
    """The average precision of one class, as people read it."""
    return "no object to be found" if ap is None else format_percent(ap)
