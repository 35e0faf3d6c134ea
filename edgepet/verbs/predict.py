"""``predict``: what packs and exported models say of images. Runs where torch does not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.device.artifact import MANIFEST
from edgepet.device.runtime import require_finite, scores_of
from edgepet.device.runtimes import RUNTIMES
from edgepet.device.together import Shared, Together
from edgepet.errors import InputError
from edgepet.images.folders import require_readable
from edgepet.images.inputs import inputs_of
from edgepet.images.preprocess import load_input, normalize
from edgepet.measuring.machine import TORCH
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.sources import ArtifactSource, Opened, PackSource, open_source, open_together
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_percent, left
from edgepet.spec import FilePath, NpArray, Preprocess
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

BATCH = 16  # images of one call
SUFFIX = ".pet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A class and its softmax score, 0..1."""

    label: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one task says of an image: the best class, and the best ``top`` of them."""

    label: str
    score: float
    top: tuple[Guess, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What every task says of one image, by the task's name."""

    image: str
    tasks: Mapping[str, Said]


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

    Raises:
        InputError: a model or an image that cannot be read, or a runtime that cannot run a model.
        MissingError: the runtime is not installed.
    """
    at_least_one("top", top)
    at_least_one("threads", threads, MOST_THREADS)
    sources = [open_source(model) for model in models]
    frames = {source.preprocess.frames > 1 for source in sources}
    if len(frames) != 1:
        raise InputError("models", "take images and clips", fix="ask for them one after the other")
    clips = frames.pop()
    paths = inputs_of(inputs, clips=clips)
    if not clips:
        require_readable(paths)
    named = dict(zip(_names(sources, models), sources, strict=True))
    with contextlib.ExitStack() as stack:
        together = open_together(named, runtime, precision, backbone, threads)
        for each in together:
            stack.callback(each.close)
        opened = dict[str, Opened]()
        for name in named.keys() - {name for each in together for name in each.tasks}:
            opened[name] = named[name].open(runtime, precision, backbone, threads)
            stack.callback(opened[name].network.close)
        results = list[Prediction]()
        for start in range(0, len(paths), BATCH):
            some = paths[start : start + BATCH]
            logits = _logits(some, named, opened, together)
            results += [
                Prediction(
                    image=str(path),
                    tasks={name: _said(logits[name][k], source.labels, top) for name, source in named.items()},
                )
                for k, path in enumerate(some)
            ]
        shared = tuple(stretch for each in together for stretch in each.shared)
    runs = {name: each.runtime for each in together for name in each.tasks} | {n: o.runtime for n, o in opened.items()}
    return PredictReport(results=tuple(results), runtimes={name: runs[name] for name in named}, shared=shared)


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


def _logits(
    paths: Sequence[Path], sources: Mapping[str, PackSource | ArtifactSource], opened: Mapping[str, Opened],
    together: Sequence[Together],
) -> dict[str, NpArray]:  # fmt: skip
    seen, found = list[tuple[Preprocess, NpArray]](), dict[str, NpArray]()

    def images_for(preprocess: Preprocess) -> NpArray:
        images = next((images for given, images in seen if given == preprocess), None)
        if images is None:
            images = normalize(np.stack([load_input(path, preprocess) for path in paths]), preprocess)
            seen.append((preprocess, images))
        return images

    for each in together:
        answers = each(images_for(sources[each.tasks[0]].preprocess))
        found |= {name: require_finite(logits, f"{each.runtime}, {each.executed}") for name, logits in answers.items()}
    return found | {name: network.network(images_for(sources[name].preprocess)) for name, network in opened.items()}


def _said(logits: NpArray, labels: Sequence[str], top: int) -> Said:
    scores = scores_of(logits)
    best = np.argsort(-scores, kind="stable")[:top]
    guesses = tuple(Guess(label=labels[k], score=float(scores[k])) for k in best)
    return Said(label=guesses[0].label, score=guesses[0].score, top=guesses)


def _options(parser: Parser) -> None:
    add = parser.add_argument
    add("given", nargs="+", metavar="MODEL|INPUT", help="packs and exported models, then images, folders or patterns")
    told = "what runs them (default: onnxruntime for a pack, an exported model's own)"
    add("--runtime", choices=[TORCH.name, *RUNTIMES], help=told)
    add("--top", type=int, default=1, metavar="K", help="classes to tell of each image (default: %(default)s)")
    pack_precision_option(parser)
    threads_option(parser)
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
            backbone=options.backbone, threads=options.threads,
        )  # fmt: skip


def _is_model(text: str) -> bool:
    return text.endswith(SUFFIX) or (Path(text) / MANIFEST).is_file()


def _screen(report: PredictReport) -> Screen:
    names = list(report.runtimes)
    rows = [(each.image, *(_cell(each.tasks[name]) for name in names)) for each in report.results]
    yield Table("", left("image", *names), rows)
    told = dict.fromkeys(report.runtimes.values())
    yield lines(
        f"  {len(report.results)} {'image' if len(report.results) == 1 else 'images'}, on {', '.join(told)}",
        *(f"  up to {each.after} computed once for {', '.join(each.tasks)}" for each in report.shared),
    )


def _cell(said: Said) -> str:
    return ", ".join(f"{guess.label} {format_percent(guess.score)}" for guess in said.top)


VERB = Verb(options=_options, run=_run, screen=_screen)
