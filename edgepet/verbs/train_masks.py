"""What ``train`` makes of images with masks: a pack with a head that reads maps, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edgepet.deltas.delta import Delta
from edgepet.images.masks import MaskSet
from edgepet.measuring.overlap import Overlap
from edgepet.methods.method import count
from edgepet.packs.codecs import Rounding
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.masks import judge_masks
from edgepet.reports.screen import Screen, lines, program
from edgepet.reports.tables import format_bytes, format_number, format_percent, format_seconds
from edgepet.tuning.work_folder import work_folder
from edgepet.verbs.train_dense import DenseBackbone, backbone_facts, write_dense

if TYPE_CHECKING:
    from edgepet.tuning.dense_training import MadeDense
    from edgepet.tuning.mask_fit import MaskedPixels

    MadeMasks: TypeAlias = MadeDense[MaskSet, MaskedPixels]

METRIC = "miou"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskScore:
    """``value`` of ``metric``, a fraction of 1, on ``n`` images, and its 95 % interval."""

    metric: str
    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, judged: Overlap) -> MaskScore:
        """The mIoU of ``judged``."""
        return cls(metric=METRIC, value=judged.miou, n=judged.n, low=judged.low, high=judged.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassOverlap:
    """A class, its intersection over union, None where it is neither there nor answered; ``pixels`` of train."""

    name: str
    iou: float | None
    pixels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTrainReport:
    """What ``train`` made of images with masks. ``val`` is of the pack as stored, in float32, each mask as large as its
    image; ``classes`` are what it is the mean of.

    ``trainable_params`` leaves the head out, ``head_params`` are the values that are shipped. ``algebra_max_abs`` is
    the largest difference of logits between what was tuned and what it lowers to, in float64.
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
    val: MaskScore
    classes: tuple[ClassOverlap, ...]
    algebra_max_abs: float
    algebra_limit: float
    backbone: DenseBackbone
    log_dir: Path | None


def write_masks(output: Path, made: MadeMasks, codec: Rounding) -> None:
    """The pack, with the val mIoU of what it stores and not of what was trained, and its work folder."""
    write_dense(output, made, codec, lambda delta: val_overlap(made, delta).miou)


def val_overlap(made: MadeMasks, delta: Delta) -> Overlap:
    """How well the masks of ``delta`` fit those of a training's val images, folded and run in float32."""
    from edgepet.tuning.dense import MergedHead

    network = MergedHead(made.backbone, delta)
    return judge_masks(network, made.val_set, made.backbone.preprocess, len(made.val_set.classes))


def report_masks(output: Path, made: MadeMasks, seconds: float, log_dir: Path | None) -> MaskTrainReport:
    """The report of a training whose pack was written."""
    backbone, model, fitted = made.backbone, made.model, made.fitted
    delta = read_pack(output, answers=EVERY).delta
    judged = val_overlap(made, delta)
    return MaskTrainReport(
        pack=output,
        work=work_folder(output),
        method=model.method.name,
        head=str(model.form.form),
        trainable_params=count(model.method, backbone.layers, backbone.tensors),
        head_params=delta.heads[0].head.stored_values,
        pack_bytes=output.stat().st_size,
        epochs=made.plan.epochs,
        epochs_run=fitted.epochs,
        best_epoch=fitted.best_epoch,
        seconds=seconds,
        images_per_second=fitted.images_per_second,
        precision="bf16" if made.plan.autocast else "fp32",
        val=MaskScore.of(judged),
        classes=tuple(
            ClassOverlap(name=name, iou=iou, pixels=int(pixels))
            for name, iou, pixels in zip(made.val_set.classes, judged.ious, made.counts, strict=True)
        ),
        algebra_max_abs=made.proof[0],
        algebra_limit=made.proof[1],
        backbone=backbone_facts(backbone),
        log_dir=log_dir,
    )


def mask_screen(report: MaskTrainReport) -> Screen:
    """What people see of it."""
    ended = f", ended after {report.epochs_run}" if report.epochs_run < report.epochs else ""
    yield lines(
        f"{report.pack}  {format_bytes(report.pack_bytes)}",
        f"  {report.method} on {report.backbone.name}: {format_number(report.trainable_params)} parameters"
        f" and a head {report.head} of {format_number(report.head_params)}",
        f"  val mIoU {format_percent(report.val.value)} on {report.val.n} images, as stored;"
        f" epoch {report.best_epoch} of {report.epochs}{ended}",
        f"  95 % interval {format_percent(report.val.low)} to {format_percent(report.val.high)}",
        *(f"    {each.name}: {told(each.iou)}" for each in report.classes),
        f"  {format_number(report.images_per_second)} images/s in {report.precision},"
        f" {format_seconds(report.seconds)} in all",
        f"  lowered equals tuned in float64: {report.algebra_max_abs:.1e}, limit {report.algebra_limit:.1e}",
        None if report.log_dir is None else f"  logged to {report.log_dir}",
        f"next: {program()} predict {report.pack} IMAGE --draw DIR",
    )


def told(iou: float | None) -> str:
    """The overlap of one class, as people read it."""
    return "neither there nor answered" if iou is None else format_percent(iou)
