"""What ``eval`` says of a task of masks: intersection over union, class by class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgepet.images.folders import Split
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import check_masks
from edgepet.images.notes import Tell, passed_over
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.masks import judge_masks, require_mask_classes
from edgepet.proving.sources import ArtifactSource, PackSource
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import format_percent
from edgepet.verbs.train_masks import METRIC, told


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """A class and its intersection over union, None where it is neither there nor answered."""

    name: str
    iou: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskEvalReport:
    """``value`` of ``metric``, a fraction of 1, on ``n`` images, and its 95 % interval.

    Each mask is judged as large as its image. ``pixels`` is the part of the counted pixels that are right.
    """

    metric: str
    value: float
    n: int
    low: float
    high: float
    pixels: float
    runtime: str
    precision: str
    classes: tuple[ClassScore, ...]


def evaluate_masks(
    source: PackSource | ArtifactSource, data: Path, split: Split, runtime: str | None, precision: str,
    backbone: AnyBackbone, threads: int | None, tell: Tell,
) -> MaskEvalReport:  # fmt: skip
    """The mIoU of a pack or an exported model that answers masks, on a split of ``data``.

    Raises:
        InputError: a runtime that cannot run it, no such split, other classes than the head's, or masks that are none.
        BackboneError: ``backbone`` is not the pack's.
        MissingError: the runtime is not installed.
    """
    images = open_masks(data, split)
    require_mask_classes(images, source.labels, data, source.path.name)
    check_masks(images, source.preprocess)
    summary = passed_over(data, images.passed_over)
    line = f"{data}: {len(images)} {split} images"
    tell(f"{line}; {summary}" if summary else line, [])
    opened = source.open(runtime, precision, backbone, threads)
    try:
        judged = judge_masks(opened.network, images, source.preprocess, len(source.labels))
    finally:
        opened.network.close()
    return MaskEvalReport(
        metric=METRIC,
        value=judged.miou,
        n=judged.n,
        low=judged.low,
        high=judged.high,
        pixels=judged.pixels,
        runtime=opened.runtime,
        precision=opened.precision,
        classes=tuple(ClassScore(name=name, iou=iou) for name, iou in zip(source.labels, judged.ious, strict=True)),
    )


def mask_eval_screen(report: MaskEvalReport) -> Screen:
    """What people see of it."""
    yield lines(
        f"mIoU {format_percent(report.value)} on {report.n} images, {len(report.classes)} classes"
        f" ({report.runtime}, {report.precision})",
        f"  95 % interval {format_percent(report.low)} to {format_percent(report.high)};"
        f" {format_percent(report.pixels)} of all pixels",
        *(f"    {each.name}: {told(each.iou)}" for each in report.classes),
    )
