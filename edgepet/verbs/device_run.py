"""``device run``: what installed tasks say of images, of some or of each as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from edgepet.device.answers import Answer, BoxesAnswer, LabelsAnswer, MaskAnswer, SeveralAnswers
from edgepet.device.opened import OpenTasks
from edgepet.device.pool import MODES
from edgepet.device.runtimes import DEFAULT, SHARED_RUNTIMES
from edgepet.device.served import AnyAnswer
from edgepet.device.serving import Device, DeviceRun
from edgepet.errors import EdgepetError
from edgepet.images.inputs import Input, asked_for, asked_pairs, pictures_of
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_percent, left
from edgepet.verbs.drawings import (
    BoxesResult,
    Drawings,
    MaskResult,
    drawing_options,
    result_of,
    told,
    told_boxes,
    told_labels,
)
from edgepet.verbs.verb import (
    Options,
    Parser,
    Stream,
    Verb,
    device_option,
    names,
    pack_precision_option,
    size_bytes,
    store_option,
    threads_option,
)

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralResult:
    """What several heads say as JSON has it, by the head's name."""

    image: str
    task: str
    heads: Mapping[str, MaskResult | BoxesResult | LabelsAnswer]


AnyResult: TypeAlias = "AnyAnswer | MaskResult | BoxesResult | SeveralResult"


def _run_options(parser: Parser) -> None:
    store_option(parser)
    told = "the name of an installed task, or of several, as in A,B: what they share is computed once"
    parser.add_argument("task", metavar="TASK[,TASK…]", type=names, help=told)
    told = "images, folders of them, or patterns; for clips, folders of frames; - for those that lines of stdin name"
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help=told,
    )
    parser.add_argument("--runtime", default=DEFAULT, choices=SHARED_RUNTIMES, help="(default: %(default)s)")
    pack_precision_option(parser)
    told = (
        "slots: beside the backbone, which all tasks share; merged: folded into weights of its own; auto: slots where"
        " they can hold it, and with --memory merged once that pays (default: %(default)s)"
    )
    parser.add_argument("--mode", default="auto", choices=MODES, help=told)
    told = "for networks of merged tasks; the one that was used longest ago goes first (default: no limit)"
    parser.add_argument("--memory", dest="memory_bytes", type=size_bytes, metavar="SIZE", help=told)
    parser.add_argument(
        "--top", type=int, default=1, metavar="K", help="classes to tell of each image (default: %(default)s)"
    )
    drawing_options(parser)
    threads_option(parser)
    device_option(parser)


def _run_run(options: Options, progress: Progress) -> DeviceRun:
    tasks: list[str] = options.task
    drawings = Drawings.of(options.masks, options.draw)
    with progress.stage(f"device run: {', '.join(tasks)}"):
        report = Device(Path(options.store)).run(
            tasks[0] if len(tasks) == 1 else tasks, options.images, runtime=options.runtime, threads=options.threads,
            precision=options.precision, mode=options.mode, memory_bytes=options.memory_bytes, top=options.top,
            device=options.device,
        )  # fmt: skip
        if not _are_drawn(report.results):
            return report
        pictures = pictures_of(options.images)
        drawings.require_names(picture.name for picture in pictures)
        results: Any = _drawn(report.results, pictures, drawings)  # what JSON says of masks are their files
        return replace(report, results=results)


def _are_drawn(answers: Sequence[AnyResult]) -> bool:
    return any(isinstance(answer, (MaskAnswer, BoxesAnswer, SeveralAnswers)) for answer in answers)


def _drawn(answers: Sequence[AnyResult], pictures: Sequence[Input], drawings: Drawings) -> tuple[AnyResult, ...]:
    """Answers of all tasks to one image after another, those that are masks or boxes written to files."""
    tasks = len(answers) // len(pictures)
    drawn = (MaskAnswer, BoxesAnswer)
    alone = len({answer.task for answer in answers if isinstance(answer, drawn)}) == 1
    alone = alone and not any(isinstance(answer, SeveralAnswers) for answer in answers)

    def written(answer: AnyResult, picture: Input) -> Any:
        if isinstance(answer, SeveralAnswers):
            heads = {head: written(each, picture) for head, each in answer.heads.items()}
            return SeveralResult(image=answer.image, task=answer.task, heads=heads)
        return result_of(answer, picture, drawings, alone=alone) if isinstance(answer, drawn) else answer

    return tuple(written(answer, pictures[place // tasks]) for place, answer in enumerate(answers))


def _run_screen(report: DeviceRun) -> Screen:
    names = list(dict.fromkeys(answer.task for answer in report.results))
    cells: dict[str, list[str]] = {}
    for place, answer in enumerate(report.results):
        cells.setdefault(f"{place // len(names)} {answer.image}", []).append(_cell(answer))
    rows = [(key.partition(" ")[2], *said) for key, said in cells.items()]
    yield Table("", left("image", *(names if len(names) > 1 else ["label"])), rows)
    yield lines(
        *(f"  up to {each.after} computed once for {', '.join(each.tasks)}" for each in report.shared),
        *(f"  {each.task} {each.what}: {each.why}" for each in report.events),
        f"  opened in {report.open_ms:.0f} ms, {report.latency_ms:.1f} ms an image, sequence {report.sequence}",
        None if report.fell_back is None else f"  the pack that was installed last is not served: {report.fell_back}",
    )


def _cell(answer: AnyResult) -> str:
    if isinstance(answer, (BoxesAnswer, BoxesResult)):
        return told_boxes(answer.boxes)
    if isinstance(answer, (MaskAnswer, MaskResult)):
        return told(answer.classes)
    if isinstance(answer, (SeveralAnswers, SeveralResult)):
        return "; ".join(f"{head}: {_cell(each)}" for head, each in answer.heads.items())
    if isinstance(answer, LabelsAnswer):
        return told_labels(answer.labels)
    return ", ".join(f"{guess.label} {format_percent(guess.score)}" for guess in answer.top)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedRun:
    """What tasks say of the image that a line of stdin asks for, or why they do not; ``ms`` from line to answers.

    A line may name the task of its image, or be a list of such lines: one batch, whose answers come in its order.
    """

    image: str
    results: tuple[AnyResult, ...]
    ms: float
    error: str | None = None


def _is_streamed(options: Options) -> bool:
    return bool(options.images == ["-"])


def _run_stream(options: Options, progress: Progress) -> Iterator[StreamedRun]:
    tasks: list[str] = options.task
    drawings = Drawings.of(options.masks, options.draw)
    with progress.stage(f"device run: open {', '.join(tasks)}"):
        opened = Device(Path(options.store)).open_all(
            tasks, runtime=options.runtime, threads=options.threads, precision=options.precision, mode=options.mode,
            memory_bytes=options.memory_bytes, device=options.device,
        )  # fmt: skip
    with opened:
        for line in map(str.strip, sys.stdin):
            if line:
                yield _answered(opened, line, options.top, drawings)


def _answered(opened: OpenTasks, line: str, top: int, drawings: Drawings) -> StreamedRun:
    began, image = time.perf_counter(), line[:200]
    try:
        pairs = asked_pairs(line)
        if pairs is not None:
            image = ", ".join(image for image, _ in pairs)
            told = opened.predict_each([image for image, _ in pairs], [task for _, task in pairs], top=top)
            return StreamedRun(image=image, results=told, ms=1e3 * (time.perf_counter() - began))
        image = asked_for(line)
        answers = opened.predict(image, top=top)
        given = tuple(answer for each in answers for answer in each.values())
        results = _drawn(given, pictures_of(image), drawings) if _are_drawn(given) else given
        return StreamedRun(image=image, results=results, ms=1e3 * (time.perf_counter() - began))
    except EdgepetError as error:
        return StreamedRun(image=image, results=(), ms=1e3 * (time.perf_counter() - began), error=str(error))


def _streamed_screen(report: StreamedRun) -> Screen:
    said = [
        f"{answer.task} {answer.label} {format_percent(answer.score)}"
        if isinstance(answer, Answer)
        else f"{answer.task} {_cell(answer)}"
        for answer in report.results
    ]
    yield lines(f"{report.image}  {', '.join(said)}" if report.error is None else report.error)


def _has_error(report: StreamedRun) -> bool:
    return report.error is not None


VERB = Verb(
    options=_run_options,
    run=_run_run,
    screen=_run_screen,
    stream=Stream(asked=_is_streamed, run=_run_stream, screen=_streamed_screen, failed=_has_error),
)
