"""``eval``: top-1 of a pack or an exported model on a split, of masks their mIoU, of boxes their AP. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgepet.device.runtimes import RUNTIMES
from edgepet.errors import InputError, option
from edgepet.images.folders import SPLITS
from edgepet.images.notes import Tell, tell_nobody, tell_of
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_batches, open_split
from edgepet.measuring.machine import TORCH
from edgepet.measuring.parity import accuracy
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.classes import class_order
from edgepet.proving.sources import open_source
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import format_percent
from edgepet.spec import FilePath
from edgepet.verbs.evaluate_dense import DenseEvalReport, SeveralEvalReport, dense_eval_screen, evaluate_heads
from edgepet.verbs.verb import (
    MOST_THREADS,
    Options,
    Parser,
    Verb,
    at_least_one,
    backbone_option,
    pack_precision_option,
    threads_option,
)

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress

EVAL_BATCH = 16  # images of one call
MOST_NAMED = 5  # classes without an image, on the screen


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Top-1 as a fraction of 1 on ``n`` images, its 95 % interval and the mean over classes: ``parity.Accuracy``.

    ``without_images`` are those of the model's ``classes`` that the images have none of; JSON has it where there are.
    """

    top1: float
    n: int
    low: float
    high: float
    balanced_accuracy: float
    runtime: str
    precision: str
    classes: tuple[str, ...]
    without_images: tuple[str, ...]

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has."""
        names = [field.name for field in fields(self)]
        return names if self.without_images else [name for name in names if name != "without_images"]


AnyReport: TypeAlias = "EvalReport | DenseEvalReport | SeveralEvalReport"


def evaluate(
    model: FilePath,
    data: FilePath,
    *,
    split: str = "test",
    runtime: str | None = None,
    precision: str = "fp32",
    backbone: AnyBackbone = None,
    threads: int | None = None,
    tell: Tell = tell_nobody,
) -> EvalReport | DenseEvalReport | SeveralEvalReport:
    """Top-1 of a pack or an artefact on a split of ``data``, which may lack classes of the model; of masks their mIoU,
    of boxes their AP.

    Args:
        runtime: None is the artefact's own, or ONNX Runtime for a pack; "torch" needs the ``train`` extra.
        precision: of a pack, "fp32" or "int8": on the int8 backbone; an artefact has its own.
        threads: of the runtime; None is all cores.
        tell: told what is used of ``data`` and what is passed over, as ``train`` tells it.

    Raises:
        InputError: other classes than the model's, or a runtime that cannot run it.
        MissingError: the runtime is not installed.
    """
    if split not in SPLITS:
        raise InputError(option("split"), "is train, val or test", got=repr(split))
    at_least_one("threads", threads, MOST_THREADS)
    source = open_source(model)
    if source.meanings[0].answer != "class":
        return evaluate_heads(source, Path(data), split, runtime, precision, backbone, threads, tell)
    clips = source.preprocess.frames > 1
    images = open_split(Path(data), split, clips=clips)
    order = class_order(images, source.labels, Path(data), Path(model).name)
    tell_of(Path(data), {split: images}, tell, clips=clips)
    opened = source.open(runtime, precision, backbone, threads)
    try:
        parts = [
            opened.network(normalize(pixels, source.preprocess)).argmax(1)
            for pixels in load_batches(images, source.preprocess, EVAL_BATCH)
        ]
    finally:
        opened.network.close()
    truth = order[np.array(images.labels)]
    judged = accuracy(np.concatenate(parts), truth, len(source.labels))
    return EvalReport(
        top1=judged.top1,
        n=judged.n,
        low=judged.low,
        high=judged.high,
        balanced_accuracy=judged.balanced,
        runtime=opened.runtime,
        precision=opened.precision,
        classes=source.labels,
        without_images=tuple(name for index, name in enumerate(source.labels) if index not in truth),
    )


def _options(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="TASK.pet or an exported folder")
    parser.add_argument("data", metavar="DATA", help="a folder of images, as for train, with the model's classes")
    told = "which of the folder's images (default: %(default)s)"
    parser.add_argument("--split", default="test", choices=SPLITS, help=told)
    told = "what runs it (default: onnxruntime for a pack, an exported model's own)"
    parser.add_argument("--runtime", choices=[TORCH.name, *RUNTIMES], help=told)
    pack_precision_option(parser)
    threads_option(parser)
    backbone_option(parser)


def _run(options: Options, progress: Progress) -> AnyReport:
    with progress.stage(f"eval {options.model}"):
        return evaluate(
            Path(options.model), Path(options.data), split=options.split, runtime=options.runtime,
            precision=options.precision, backbone=options.backbone, threads=options.threads, tell=progress.tell,
        )  # fmt: skip


def _screen(report: AnyReport) -> Screen:
    if isinstance(report, DenseEvalReport | SeveralEvalReport):
        yield from dense_eval_screen(report)
        return
    yield lines(
        f"top-1 {format_percent(report.top1)} of {report.n} images, {len(report.classes)} classes"
        f" ({report.runtime}, {report.precision})",
        f"  95 % interval {format_percent(report.low)} to {format_percent(report.high)};"
        f" mean over classes {format_percent(report.balanced_accuracy)}",
        _absent(report),
    )


def _absent(report: EvalReport) -> str | None:
    absent, named = report.without_images, ", ".join(map(repr, report.without_images[:MOST_NAMED]))
    more = f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
    told = f"  of {len(report.classes) - len(absent)} classes: there is no image of {named}{more}"
    return told if absent else None


VERB = Verb(options=_options, run=_run, screen=_screen)
