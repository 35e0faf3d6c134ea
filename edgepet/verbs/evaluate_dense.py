"""What ``eval`` says of a head that reads maps: its metric, class by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgepet.deltas.heads import Answer
from edgepet.images.folders import Split
from edgepet.images.notes import Tell, passed_over
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.sources import ArtifactSource, PackSource
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import format_percent
from edgepet.verbs.dense_answers import ANSWERED, ClassScore, DenseScore


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseEvalReport(DenseScore):
    """As ``DenseScore``, of a model in ``precision`` on a ``runtime``; ``scores`` are of the classes."""

    runtime: str
    precision: str
    scores: tuple[ClassScore, ...]
    answer: Answer

    @property
    def classes(self) -> tuple[Mapping[str, object], ...]:
        """``scores`` as JSON has them."""
        return tuple(each.as_json for each in self.scores)

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has."""
        told = DenseScore.shown.__get__(self)
        return [*(name for name in told if name not in ("scores", "answer")), "classes"]


def evaluate_dense(
    source: PackSource | ArtifactSource, data: Path, split: Split, runtime: str | None, precision: str,
    backbone: AnyBackbone, threads: int | None, tell: Tell,
) -> DenseEvalReport:  # fmt: skip
    """What a pack or an exported model with a head that reads maps comes to on a split of ``data``.

    Raises:
        InputError: a runtime that cannot run it, no such split, classes that are not the head's, or truths that are
            none.
        BackboneError: ``backbone`` is not the pack's.
        MissingError: the runtime, or what judges the answers, is not installed.
    """
    meaning = source.meaning
    row = ANSWERED[cast(Answer, meaning.answer)]
    row.require()
    images = row.images(data, split, meaning, source.preprocess, source.path.name)
    summary = passed_over(data, images.passed_over)
    line = f"{data}: {len(images)} {split} images"
    tell(f"{line}; {summary}" if summary else line, [])
    opened = source.open(runtime, precision, backbone, threads)
    try:
        fit = row.judge(opened.network, images, source.preprocess, meaning)
    finally:
        opened.network.close()
    score = row.score(fit)
    return DenseEvalReport(
        **{name: getattr(score, name) for name in score.shown}, runtime=opened.runtime, precision=opened.precision,
        scores=row.classes(fit, meaning.labels), answer=row.answer,
    )  # fmt: skip


def dense_eval_screen(report: DenseEvalReport) -> Screen:
    """What people see of it."""
    row, count = ANSWERED[report.answer], len(report.scores)
    told, more = row.told(report)
    yield lines(
        f"{row.title} {format_percent(report.value)}{told}, {count} {'class' if count == 1 else 'classes'}"
        f" ({report.runtime}, {report.precision})",
        f"  95 % interval {format_percent(report.low)} to {format_percent(report.high)}{more}",
        *row.lines(report.scores),
    )
