"""``predict``: what packs and exported models say of images. Runs where torch does not."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.device.answers import (
    BoxesAnswer,
    LabelsAnswer,
    MaskAnswer,
    SeveralAnswers,
    all_answered,
)
from edgepet.device.artifact import MANIFEST
from edgepet.device.runtime import require_finite
from edgepet.device.runtimes import RUNTIMES
from edgepet.device.together import Shared, Together
from edgepet.errors import EdgepetError, InputError
from edgepet.images.folders import require_readable
from edgepet.images.inputs import Input, asked_for, inputs_of
from edgepet.images.preprocess import load_input, normalize, upright_size
from edgepet.measuring.machine import TORCH
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.sources import ArtifactSource, Opened, PackSource, open_source, open_together
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, left
from edgepet.spec import FilePath, NpArray, Preprocess
from edgepet.verbs.drawings import Drawings, drawing_options
from edgepet.verbs.said import AnySaid, Guess, SaidBoxes, SaidLabels, SaidMask, SaidSeveral, said_of, told_of
from edgepet.verbs.verb import (
    MOST_THREADS,
    Options,
    Parser,
    Stream,
    Verb,
    at_least_one,
    backbone_option,
    device_option,
    pack_precision_option,
    threads_option,
)

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress

BATCH = 16  # images of one call
SUFFIX = ".pet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What every task says of one image, by the task's name."""

    image: str
    tasks: Mapping[str, AnySaid]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictReport:
    """A result for each image, in the order in which they were named, the runtime of each task, and what was computed
    once for several of them.
    """

    results: tuple[Prediction, ...]
    runtimes: Mapping[str, str]
    shared: tuple[Shared, ...] = ()


def predict(
    models: Sequence[FilePath],
    inputs: Sequence[str],
    *,
    runtime: str | None = None,
    precision: str = "fp32",
    top: int = 1,
    backbone: AnyBackbone = None,
    threads: int | None = None,
    device: str | None = None,
    masks: FilePath | None = None,
    draw: FilePath | None = None,
) -> PredictReport:
    """What each of ``models`` says of ``inputs``; an image that several of them see alike is decoded once, and what
    several packs have in common of one backbone is computed once.

    Args:
        models: packs and exported models.
        inputs: image files, folders, patterns; of clips, folders of frames.
        runtime: None is an artefact's own, or ONNX Runtime for a pack; "torch" needs the ``train`` extra.
        precision: of packs, "fp32" or "int8": on the int8 backbone; an artefact has its own.
        top: how many classes to tell, the best first.
        threads: of the runtime; None is all cores.
        device: "cpu", "gpu", "npu" or "cuda"; None is the runtime's usual one.
        masks: a folder for what tasks of masks answer, index PNGs, and ``draw`` one for images under the colours of
            their masks, or under their boxes.

    Raises:
        InputError: a model or an image that cannot be read, a runtime that cannot run a model, or images of one name
            that are to be drawn.
        MissingError: the runtime is not installed.
    """
    at_least_one("top", top)
    drawings = Drawings.of(masks, draw)
    with Predictor(
        models,
        runtime=runtime,
        precision=precision,
        backbone=backbone,
        threads=threads,
        device=device,
        drawings=drawings,
    ) as predictor:
        paths = predictor.inputs(inputs)
        drawings.require_names(path.name for path in paths)
        results = [
            each
            for start in range(0, len(paths), BATCH)
            for each in predictor.answers(paths[start : start + BATCH], top)
        ]
        return PredictReport(results=tuple(results), runtimes=predictor.runtimes, shared=predictor.shared)


class Predictor:
    """Packs and exported models, kept open, that look at the same images. A context manager; raises as ``predict``."""

    def __init__(
        self, models: Sequence[FilePath], *, runtime: str | None, precision: str, backbone: AnyBackbone,
        threads: int | None, device: str | None, drawings: Drawings,
    ) -> None:  # fmt: skip
        at_least_one("threads", threads, MOST_THREADS)
        sources = [open_source(model) for model in models]
        frames = {source.preprocess.frames > 1 for source in sources}
        if len(frames) != 1:
            raise InputError("models", "take images and clips", fix="ask for them one after the other")
        self._clips, self._closing = frames.pop(), contextlib.ExitStack()
        self._named = dict(zip(_names(sources, models), sources, strict=True))
        self._given, self._drawings = (runtime, precision, backbone, threads, device), drawings
        self._alone = [len(source.meanings) for source in sources if source.answer != "class"] == [1]
        self._together, self._opened = list[Together](), dict[str, Opened]()

    def __enter__(self) -> Predictor:
        with contextlib.ExitStack() as stack:
            self._together = open_together(self._named, *self._given)
            for each in self._together:
                stack.callback(each.close)
            for name in self._named.keys() - {name for each in self._together for name in each.tasks}:
                self._opened[name] = self._named[name].open(*self._given)
                stack.callback(self._opened[name].network.close)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    @property
    def runtimes(self) -> dict[str, str]:
        """That of each task."""
        runs = {name: each.runtime for each in self._together for name in each.tasks}
        runs |= {name: each.runtime for name, each in self._opened.items()}
        return {name: runs[name] for name in self._named}

    @property
    def shared(self) -> tuple[Shared, ...]:
        """What is computed once for several tasks."""
        return tuple(stretch for each in self._together for stretch in each.shared)

    def inputs(self, given: Sequence[str]) -> tuple[Path, ...]:
        """The images, or clips, that ``given`` names, each of which is there."""
        paths = inputs_of(given, clips=self._clips)
        if not self._clips:
            require_readable(paths)
        return paths

    def answers(self, paths: Sequence[Path], top: int) -> list[Prediction]:
        """What every task says of some images, at once."""
        given = _given(paths, self._named, self._opened, self._together)
        return [
            Prediction(
                image=str(path),
                tasks={name: self._said(path, name, [each[k] for each in given[name]], top) for name in self._named},
            )
            for k, path in enumerate(paths)
        ]

    def _said(self, path: Path, name: str, given: Sequence[NpArray], top: int) -> AnySaid:
        source = self._named[name]
        if source.answer == "class":
            return said_of(given[0], source.labels, top)
        size = upright_size(path, source.preprocess, decode=True)
        answer = all_answered(path.name, name, source.meanings, given, source.preprocess, size)
        if isinstance(answer, SeveralAnswers):
            return SaidSeveral(heads={head: self._told(path, each) for head, each in answer.heads.items()})
        return self._told(path, answer)

    def _told(
        self, path: Path, answer: MaskAnswer | BoxesAnswer | LabelsAnswer
    ) -> SaidMask | SaidBoxes | SaidLabels:  # fmt: skip
        if isinstance(answer, LabelsAnswer):
            return SaidLabels(labels=tuple(Guess(label=each.label, score=each.score) for each in answer.labels))
        mask, drawn = self._drawings.write(answer, Input(path.name, path), alone=self._alone)
        if isinstance(answer, BoxesAnswer):
            return SaidBoxes(boxes=answer.boxes, drawn=drawn)
        return SaidMask(classes=answer.classes, mask=mask, drawn=drawn)


def _names(sources: Sequence[PackSource | ArtifactSource], models: Sequence[FilePath]) -> list[str]:
    """The tasks' names; the models' own, or where they lie, where two are of one task."""
    tasks = [source.pack.delta.task if isinstance(source, PackSource) else source.artifact.task for source in sources]
    files, places = [Path(model).name for model in models], [str(model) for model in models]
    names = [
        next((name[k] for name in (tasks, files, places) if name.count(name[k]) == 1), places[k])
        for k in range(len(sources))
    ]
    if len(set(names)) < len(names):
        raise InputError("models", "must be different ones", got=next(name for name in names if names.count(name) > 1))
    return names


def _given(
    paths: Sequence[Path], sources: Mapping[str, PackSource | ArtifactSource], opened: Mapping[str, Opened],
    together: Sequence[Together],
) -> dict[str, tuple[NpArray, ...]]:  # fmt: skip
    """What each head of each task gives."""
    seen, found = list[tuple[Preprocess, NpArray]](), dict[str, tuple[NpArray, ...]]()

    def images_for(preprocess: Preprocess) -> NpArray:
        images = next((images for given, images in seen if given == preprocess), None)
        if images is None:
            images = normalize(np.stack([load_input(path, preprocess) for path in paths]), preprocess)
            seen.append((preprocess, images))
        return images

    for each in together:
        answers = each(images_for(sources[each.tasks[0]].preprocess))
        found |= {
            name: (require_finite(logits, f"{each.runtime}, {each.executed}"),) for name, logits in answers.items()
        }
    return found | {name: network.each(images_for(sources[name].preprocess)) for name, network in opened.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedPrediction:
    """What every task says of the image that a line of stdin asks for, or why they do not."""

    image: str
    results: tuple[Prediction, ...]
    error: str | None = None


def _is_streamed(options: Options) -> bool:
    return [text for text in options.given if not _is_model(text)] == ["-"]


def _stream(options: Options, progress: Progress) -> Iterator[StreamedPrediction]:
    models = [text for text in options.given if _is_model(text)]
    if not models:
        raise InputError("predict", "needs a model, TASK.pet or an exported folder, and images", got="no model")
    at_least_one("top", options.top)
    predictor = Predictor(
        models, runtime=options.runtime, precision=options.precision, backbone=options.backbone,
        threads=options.threads, device=options.device, drawings=Drawings.of(options.masks, options.draw),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        with progress.stage(f"open {', '.join(models)}"):
            stack.enter_context(predictor)
        for line in filter(None, map(str.strip, sys.stdin)):
            yield _answered(predictor, line, options.top)


def _answered(predictor: Predictor, line: str, top: int) -> StreamedPrediction:
    image = line[:200]
    try:
        image = asked_for(line)
        return StreamedPrediction(image=image, results=tuple(predictor.answers(predictor.inputs([image]), top)))
    except EdgepetError as error:
        return StreamedPrediction(image=image, results=(), error=str(error))


def _streamed_screen(report: StreamedPrediction) -> Screen:
    said = [f"{name} {told_of(each)}" for result in report.results for name, each in result.tasks.items()]
    yield lines(f"{report.image}  {', '.join(said)}" if report.error is None else report.error)


def _has_error(report: StreamedPrediction) -> bool:
    return report.error is not None


def _options(parser: Parser) -> None:
    add = parser.add_argument
    told = "packs and exported models, then images, folders or patterns, or - for those that lines of stdin name"
    add("given", nargs="+", metavar="MODEL|INPUT", help=told)
    told = "what runs them (default: onnxruntime for a pack, an exported model's own)"
    add("--runtime", choices=[TORCH.name, *RUNTIMES], help=told)
    add("--top", type=int, default=1, metavar="K", help="classes to tell of each image (default: %(default)s)")
    pack_precision_option(parser)
    drawing_options(parser)
    threads_option(parser)
    device_option(parser)
    backbone_option(parser)


def _run(options: Options, progress: Progress) -> PredictReport:
    models = [text for text in options.given if _is_model(text)]
    inputs = [text for text in options.given if not _is_model(text)]
    if not models or not inputs:
        what = "needs a model, TASK.pet or an exported folder, and images"
        raise InputError("predict", what, got="no model" if not models else "no image")
    with progress.stage(f"predict: {', '.join(models)}"):
        return predict(
            models, inputs, runtime=options.runtime, precision=options.precision, top=options.top,
            backbone=options.backbone, threads=options.threads, device=options.device, masks=options.masks,
            draw=options.draw,
        )  # fmt: skip


def _is_model(text: str) -> bool:
    return text.endswith(SUFFIX) or (Path(text) / MANIFEST).is_file()


def _screen(report: PredictReport) -> Screen:
    names = list(report.runtimes)
    rows = [(each.image, *(told_of(each.tasks[name]) for name in names)) for each in report.results]
    yield Table("", left("image", *names), rows)
    told = dict.fromkeys(report.runtimes.values())
    yield lines(
        f"  {len(report.results)} {'image' if len(report.results) == 1 else 'images'}, on {', '.join(told)}",
        *(f"  up to {each.after} computed once for {', '.join(each.tasks)}" for each in report.shared),
    )


VERB = Verb(
    options=_options,
    run=_run,
    screen=_screen,
    stream=Stream(asked=_is_streamed, run=_stream, screen=_streamed_screen, failed=_has_error),
)
