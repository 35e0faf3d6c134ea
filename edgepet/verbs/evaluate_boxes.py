"""What ``eval`` says of a task of boxes: average precision, class by class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgepet.images.box_folders import open_boxes
from edgepet.images.boxes import check_boxes
from edgepet.images.folders import Split
from edgepet.images.notes import Tell, passed_over
from edgepet.measuring.average_precision import require_evaluator
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.boxes import judge_boxes, require_box_classes
from edgepet.proving.sources import ArtifactSource, PackSource
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import format_percent
from edgepet.verbs.train_boxes import METRIC, told


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFound:
    """A class and its average precision, None where there is no object of it."""

    name: str
    ap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxEvalReport:
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
    runtime: str
    precision: str
    classes: tuple[ClassFound, ...]


def evaluate_boxes(
    source: PackSource | ArtifactSource, data: Path, split: Split, runtime: str | None, precision: str,
    backbone: AnyBackbone, threads: int | None, tell: Tell,
) -> BoxEvalReport:  # fmt: skip
    """The average precision of a pack or an exported model that answers boxes, on a split of ``data``.

    Raises:
        InputError: a runtime that cannot run it, no such split, a class that the head has not, or boxes that are none.
        BackboneError: ``backbone`` is not the pack's.
        MissingError: the runtime, or what computes average precision, is not installed.
    """
    require_evaluator()
    images = require_box_classes(open_boxes(data, split), source.labels, data, source.path.name)
    images = check_boxes(images, source.preprocess)
    summary = passed_over(data, images.passed_over)
    line = f"{data}: {len(images)} {split} images"
    tell(f"{line}; {summary}" if summary else line, [])
    opened = source.open(runtime, precision, backbone, threads)
    try:
        judged = judge_boxes(opened.network, images, source.preprocess, len(source.labels))
    finally:
        opened.network.close()
    return BoxEvalReport(
        metric=METRIC,
        value=judged.ap,
        n=judged.n,
        low=judged.low,
        high=judged.high,
        map50=judged.ap50,
        recall=judged.recall,
        objects=judged.objects,
        runtime=opened.runtime,
        precision=opened.precision,
        classes=tuple(ClassFound(name=name, ap=ap) for name, ap in zip(source.labels, judged.aps, strict=True)),
    )


def box_eval_screen(report: BoxEvalReport) -> Screen:
    """What people see of it."""
    count = len(report.classes)
    yield lines(
        f"AP {format_percent(report.value)}, AP50 {format_percent(report.map50)} on {report.n} images with"
        f" {report.objects} objects, {count} {'class' if count == 1 else 'classes'}"
        f" ({report.runtime}, {report.precision})",
        f"  95 % interval {format_percent(report.low)} to {format_percent(report.high)};"
        f" recall {format_percent(report.recall)}",
        *(f"    {each.name}: {told(each.ap)}" for each in report.classes),
    )
