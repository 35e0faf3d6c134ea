"""What ``train`` makes of images with masks or boxes: a pack with a head that reads maps, and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepet.deltas.delta import Delta, JudgedHead
from edgepet.deltas.heads import Answer
from edgepet.images.box_folders import is_box_folder
from edgepet.images.labels import is_label_folder
from edgepet.images.mask_folders import is_mask_folder
from edgepet.methods.method import count
from edgepet.packs.codecs import Rounding
from edgepet.packs.pack import EVERY, encode_pack, read_pack, write_pack
from edgepet.proving.probing import probed
from edgepet.reports.screen import Screen, lines, program
from edgepet.reports.tables import format_bytes, format_number, format_percent, format_seconds
from edgepet.tuning.recipes import BETWEEN
from edgepet.tuning.work_folder import HELD_OUT, work_folder, write_work
from edgepet.verbs.dense_answers import ANSWERED, ClassScore, DenseScore, mean_of

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone
    from edgepet.tuning.dense_tasks import DenseTask
    from edgepet.tuning.dense_training import MadeDense


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseBackbone:
    """The backbone of a training; ``bytes`` are those of its tensors at the native image size."""

    name: str
    fingerprint: str
    bytes: int
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadReport:
    """One head: its form, the values that are shipped, and what it comes to on val; ``scores`` are of the classes that
    ``val`` is the mean of.
    """

    name: str
    answer: Answer
    head: str
    head_params: int
    val: DenseScore
    scores: tuple[ClassScore, ...]

    @property
    def classes(self) -> tuple[Mapping[str, object], ...]:
        """``scores`` as JSON has them."""
        return tuple(each.as_json for each in self.scores)

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has."""
        return ["classes" if field.name == "scores" else field.name for field in fields(self)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTrainReport:
    """What ``train`` made of images with masks, boxes or several labels, or with several of these.

    ``val`` is of the pack as stored, in float32, on images as they are; of several ``heads`` their mean, which has no
    interval. ``trainable_params`` leaves heads out, ``head_params`` are the values that are shipped.
    ``algebra_max_abs`` is the largest difference between what was tuned and what it lowers to, in float64; of boxes
    before the best are chosen.
    """

    pack: Path
    work: Path
    method: str
    trainable_params: int
    pack_bytes: int
    epochs: int
    epochs_run: int
    best_epoch: int
    seconds: float
    images_per_second: float
    precision: str
    heads: tuple[HeadReport, ...]
    algebra_max_abs: float
    algebra_limit: float
    backbone: DenseBackbone
    log_dir: Path | None

    @property
    def head(self) -> str:
        """The form of the head, or of all, as the option asks for them."""
        return BETWEEN.join(each.head for each in self.heads)

    @property
    def head_params(self) -> int:
        """Values of all heads."""
        return sum(each.head_params for each in self.heads)

    @property
    def val(self) -> DenseScore:
        """That of the one head, or the mean of all."""
        return mean_of([each.val for each in self.heads])

    @property
    def classes(self) -> tuple[Mapping[str, object], ...]:
        """Those of the one head."""
        return self.heads[0].classes

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has: of one head what it came to, beside all else."""
        names = [field.name for field in fields(self) if field.name != "heads"]
        return [*names, "head", "head_params", "val", "classes" if len(self.heads) == 1 else "heads"]


def backbone_facts(backbone: Backbone) -> DenseBackbone:
    """What a report says of it."""
    return DenseBackbone(
        name=backbone.label, fingerprint=backbone.fingerprint, bytes=backbone.native_bytes,
        description=backbone.description,
    )  # fmt: skip


def task_of(data: Path, asked: str | None) -> str:
    """What is trained for: what is asked, or where nothing is, what lies in ``data``.

    COCO's objects may be either: they are masks, where nothing is asked.
    """
    if asked is not None or not data.is_dir():
        return asked or "class"
    if is_label_folder(data):
        return "labels"
    if is_box_folder(data):
        return "boxes"
    return "mask" if is_mask_folder(data) else "class"


class Judged:
    """What the heads of a training's pack come to on its val images, folded and run in float32; judged once.

    It is the pack as stored: where this process writes it, what it is going to hold.
    """

    def __init__(self) -> None:
        self._fits = list[Any]()

    def fits(self, made: MadeDense, delta: Delta) -> Sequence[Any]:
        """One for each head of ``delta``."""
        from edgepet.tuning.dense import MergedHead

        if not self._fits:
            for place, each in enumerate(made.learnt):
                one = replace(delta, heads=(delta.heads[place],))
                network, row = MergedHead(made.backbone, one), ANSWERED[each.task.answer]
                meaning = replace(one.heads[0].head.meaning, thresholds=())  # they are chosen on these images
                self._fits.append(row.judge(network, each.val, made.backbone.preprocess, meaning))
        return self._fits


def write_dense(output: Path, made: MadeDense, codec: Rounding, judged: Judged) -> None:
    """The pack, with what ``judged`` says of what it stores and not of what was trained, and its work folder."""
    stored = read_pack(encode_pack(made.delta, codec=codec), answers=EVERY)
    heads = tuple(
        JudgedHead(head=row.settled(head.head, fit), value=row.score(fit).value, n=len(made.val))
        for head, fit in zip(stored.delta.heads, judged.fits(made, stored.delta), strict=True)
        for row in [ANSWERED[head.head.answer]]
    )
    write_pack(output, probed(made.backbone, replace(stored.delta, heads=heads)), kept=stored.planes)
    keep_dense_work(work_folder(output), made)


def keep_dense_work(folder: Path, made: MadeDense) -> None:
    """Write a training's work folder, and its backbone where graphs lie: a pack finds it there again."""
    from edgepet.exporters.trace import keep_weights

    keep_weights(made.backbone)
    spread = np.random.default_rng(0).permutation(len(made.val))[:HELD_OUT]
    pixels, labels = np.asarray(made.val.pixels[spread]), made.val.labels[spread]
    write_work(folder, made.delta, made.model.arrays(), pixels, labels)


def report_dense(
    output: Path, made: MadeDense, judged: Judged, seconds: float, log_dir: Path | None
) -> DenseTrainReport:
    """The report of a training whose pack was written."""
    backbone, model, fitted = made.backbone, made.model, made.fitted
    delta = read_pack(output, answers=EVERY).delta
    return DenseTrainReport(
        pack=output,
        work=work_folder(output),
        method=model.method.name,
        trainable_params=count(model.method, backbone.layers, backbone.tensors),
        pack_bytes=output.stat().st_size,
        epochs=made.plan.epochs,
        epochs_run=fitted.epochs,
        best_epoch=fitted.best_epoch,
        seconds=seconds,
        images_per_second=fitted.images_per_second,
        precision="bf16" if made.plan.autocast else "fp32",
        heads=head_reports(made, delta, judged),
        algebra_max_abs=made.proof[0],
        algebra_limit=made.proof[1],
        backbone=backbone_facts(backbone),
        log_dir=log_dir,
    )


def head_reports(made: MadeDense, delta: Delta, judged: Judged) -> tuple[HeadReport, ...]:
    """What each head of ``delta`` has come to."""
    rows = zip(made.learnt, made.model.forms, delta.heads, judged.fits(made, delta), strict=True)
    return tuple(
        HeadReport(
            name=each.head.name,
            answer=learnt.task.answer,
            head=str(form.form),
            head_params=each.head.stored_values,
            val=ANSWERED[learnt.task.answer].score(fit),
            scores=ANSWERED[learnt.task.answer].classes(fit, learnt.train.classes, learnt.counts.tolist()),
        )
        for learnt, form, each, fit in rows
    )


def dense_tasks(asked: str) -> list[DenseTask[Any]]:
    """What is trained for, of names with a comma between."""
    from edgepet.tuning.box_training import BoxTask
    from edgepet.tuning.label_training import LabelTask
    from edgepet.tuning.mask_training import MaskTask

    known: Mapping[str, DenseTask[Any]] = {"mask": MaskTask(), "boxes": BoxTask(), "labels": LabelTask()}
    return [known[name] for name in asked.split(",")]


def head_lines(heads: Sequence[HeadReport], epoch: str, stored: str = ", as stored") -> list[str]:
    """What people see of heads; ``epoch`` is what is said of the one that was kept."""
    told = list[str]()
    for each in heads:
        row, val = ANSWERED[each.answer], each.val
        name = f"{each.name}: " if len(heads) > 1 else ""
        told += [
            f"  {name}val {row.title} {format_percent(val.value)}{row.told(val)[0]}{stored}; {epoch}",
            *([] if val.low is None or val.high is None else
              [f"  95 % interval {format_percent(val.low)} to {format_percent(val.high)}"]),
            *row.lines(each.scores),
            *_one_for_all(each),
        ]  # fmt: skip
    return told


def _one_for_all(head: HeadReport) -> list[str]:
    """What to do where a mask has one class everywhere: the others are too rare for their part of the loss."""
    judged = [each for each in head.scores if each.value is not None]
    found = [each.name for each in judged if each.value]
    if head.answer != "mask" or len(found) != 1 or len(judged) < 2:
        return []
    return [f"  every pixel is answered as {found[0]}: try --balance weights, or --dice 1, for classes that are rare"]


def dense_screen(report: DenseTrainReport) -> Screen:
    """What people see of it."""
    ended = f", ended after {report.epochs_run}" if report.epochs_run < report.epochs else ""
    shows = next((row.shows for row in (ANSWERED[each.answer] for each in report.heads) if row.shows), "")
    count, forms = len(report.heads), f"head{'s' if len(report.heads) > 1 else ''} {report.head}"
    yield lines(
        f"{report.pack}  {format_bytes(report.pack_bytes)}",
        f"  {report.method} on {report.backbone.name}: {format_number(report.trainable_params)} parameters"
        f" and {'a ' if count == 1 else ''}{forms} of {format_number(report.head_params)}",
        *head_lines(report.heads, f"epoch {report.best_epoch} of {report.epochs}{ended}"),
        f"  {format_number(report.images_per_second)} images/s in {report.precision},"
        f" {format_seconds(report.seconds)} in all",
        f"  lowered equals tuned in float64: {report.algebra_max_abs:.1e}, limit {report.algebra_limit:.1e}",
        None if report.log_dir is None else f"  logged to {report.log_dir}",
        f"next: {program()} predict {report.pack} IMAGE {shows}".rstrip(),
    )
