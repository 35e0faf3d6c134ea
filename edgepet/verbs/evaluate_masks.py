"""What ``eval`` says of a task of masks: intersection over union, class by class. In torch so far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgepet.errors import InputError, option, require
from edgepet.images.folders import Split
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import MaskSet, check_masks
from edgepet.images.notes import Tell, passed_over
from edgepet.measuring.machine import TORCH
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.masks import judge_masks
from edgepet.proving.subject import Subject
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import format_names, format_percent
from edgepet.spec import FilePath
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


def answers_masks(model: FilePath) -> bool:
    """Whether ``model`` is a pack whose first head answers masks.

    Raises:
        PackError, InputError: it is a file and no pack.
    """
    path = Path(model)
    return path.is_file() and read_pack(path, answers=EVERY).delta.answers[0] == "mask"


def evaluate_masks(
    model: Path, data: Path, split: Split, runtime: str | None, precision: str, backbone: AnyBackbone, tell: Tell
) -> MaskEvalReport:
    """The mIoU of a pack's first head for masks on a split of ``data``.

    Raises:
        InputError: another runtime than torch or another precision than fp32, no such split, other classes than the
            head's, or masks that are none.
        BackboneError: ``backbone`` is not the pack's.
        MissingError: torch is not installed.
    """
    for field, value, usual in (("runtime", runtime or TORCH.name, TORCH.name), ("precision", precision, "fp32")):
        if value != usual:
            fix = f"leave {option(field)} out"
            raise InputError(option(field), f"is {usual} for a task of masks so far", got=repr(value), fix=fix)
    require(TORCH.module, extra=str(TORCH.extra), purpose=f"evaluating {model.name}")
    from edgepet.tuning.dense import MergedMasks

    subject = Subject(model, backbone, None, answers=EVERY)
    head = subject.delta.heads[0].head
    images = open_masks(data, split)
    _require_classes(images, head.labels, data, model)
    check_masks(images, subject.delta.preprocess)
    summary = passed_over(data, images.passed_over)
    line = f"{data}: {len(images)} {split} images"
    tell(f"{line}; {summary}" if summary else line, [])
    network = MergedMasks(subject.backbone, subject.delta)
    judged = judge_masks(network, images, subject.delta.preprocess, len(head.labels))
    return MaskEvalReport(
        metric=METRIC,
        value=judged.miou,
        n=judged.n,
        low=judged.low,
        high=judged.high,
        pixels=judged.pixels,
        runtime=TORCH.name,
        precision="fp32",
        classes=tuple(ClassScore(name=name, iou=iou) for name, iou in zip(head.labels, judged.ious, strict=True)),
    )


def _require_classes(images: MaskSet, labels: tuple[str, ...], data: Path, model: Path) -> None:
    if images.classes != labels:
        what = f"needs the {len(labels)} classes of {model.name} in their order, {format_names(labels[:5])}"
        raise InputError(str(data), what, got=format_names(images.classes[:5]))


def mask_eval_screen(report: MaskEvalReport) -> Screen:
    """What people see of it."""
    yield lines(
        f"mIoU {format_percent(report.value)} on {report.n} images, {len(report.classes)} classes"
        f" ({report.runtime}, {report.precision})",
        f"  95 % interval {format_percent(report.low)} to {format_percent(report.high)};"
        f" {format_percent(report.pixels)} of all pixels",
        *(f"    {each.name}: {told(each.iou)}" for each in report.classes),
    )
