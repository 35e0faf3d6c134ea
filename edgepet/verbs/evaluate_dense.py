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
from edgepet.verbs.dense_answers import ANSWERED, ClassScore, DenseScore, mean_of


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralEvalReport:
    """What each of several heads comes to, by its name; ``value`` is the mean of theirs, which has no interval."""

    metric: str
    value: float
    n: int
    runtime: str
    precision: str
    heads: Mapping[str, DenseEvalReport]


def evaluate_heads(
    source: PackSource | ArtifactSource, data: Path, split: Split, runtime: str | None, precision: str,
    backbone: AnyBackbone, threads: int | None, tell: Tell,
) -> DenseEvalReport | SeveralEvalReport:  # fmt: skip
    """As ``evaluate_dense``; of several heads one after another, each on the images that have its truths."""
    if len(source.meanings) == 1:
        return evaluate_dense(source, data, split, runtime, precision, backbone, threads, tell)
    heads = {
        meaning.name: evaluate_dense(
            source.of_head(place), data, split, runtime, precision, backbone, threads, tell
        )
        for place, meaning in enumerate(source.meanings)
    }  # fmt: skip
    first, mean = next(iter(heads.values())), mean_of(list(heads.values()))
    return SeveralEvalReport(metric=mean.metric, value=mean.value, n=mean.n, runtime=first.runtime,
                             precision=first.precision, heads=heads)  # fmt: skip


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


def dense_eval_screen(report: DenseEvalReport | SeveralEvalReport) -> Screen:
    """What people see of it."""
    if isinstance(report, SeveralEvalReport):
        for name, each in report.heads.items():
            yield lines(f"{name}:")
            yield from dense_eval_screen(each)
        return
    row, count = ANSWERED[report.answer], len(report.scores)
    told, more = row.told(report)
    yield lines(
        f"{row.title} {format_percent(report.value)}{told}, {count} {'class' if count == 1 else 'classes'}"
        f" ({report.runtime}, {report.precision})",
        f"  95 % interval {format_percent(report.low)} to {format_percent(report.high)}{more}",
        *row.lines(report.scores),
    )
