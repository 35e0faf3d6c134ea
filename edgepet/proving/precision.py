"""One task's ONNX model in the precision that was asked for: precision is decided here, once, for every runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgepet.calibration.budget import Answers, answers
from edgepet.calibration.fp16 import Kept, to_half
from edgepet.calibration.head_images import head_calibration_images
from edgepet.calibration.images import CalibrationImages, calibration_images
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.search import Calibrated, Calibration
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.deltas.codes import LOW, Range
from edgepet.deltas.delta import Delta, Int8Ranges
from edgepet.deltas.merge import task_tensors
from edgepet.device.answers import meanings_of
from edgepet.device.artifact import open_artifact, read_artifact
from edgepet.device.map_heads import map_heads_of
from edgepet.device.runtimes import Format
from edgepet.errors import InputError, option
from edgepet.exporters.exporter import ExportOptions
from edgepet.exporters.onnx import build_model, simplified
from edgepet.exporters.portable import make_plain
from edgepet.files import folder_bytes
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.head_graph import answer_names
from edgepet.graphs.int8 import CodedMap, Cut, Int8Graph
from edgepet.graphs.slots import corrected_layers
from edgepet.images.folders import class_places
from edgepet.measuring.latency import Candidate, measure
from edgepet.measuring.machine import environment
from edgepet.packs.codecs import as_stored
from edgepet.packs.manifest import CORRECTED, CORRECTIONS
from edgepet.proving.subject import Subject, sample_images
from edgepet.spec import FilePath, NpArray, StoredPrecision

if TYPE_CHECKING:
    from onnx import ModelProto

Stage = Callable[[str], None]
UNREAD = {  # the range of what a head that reads an early map does not need, by its codes
    "signed": Range(scale=1.0),
    "shifted": Range(scale=1.0),
    "unsigned": Range(scale=1.0, shift=-LOW),
}
AUTO_ROUNDS = 60  # enough to tell precisions apart, which differ by tenths
AUTO_TIE = 1.05  # of the fastest


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Model:
    """A model (``onnx.ModelProto``), the seconds that it took, and how it came to be.

    ``kept`` stays fp32. ``calibration`` are the images that were looked at, as a manifest keeps them. ``int8`` is the
    recipe and what it costs, ``drop`` the cost itself.
    """

    proto: ModelProto
    precision: StoredPrecision
    seconds: float = 0.0
    kept: tuple[Kept, ...] = ()
    calibration: Mapping[str, object] | None = None
    int8: Mapping[str, object] | None = None
    warning: str | None = None

    def answers(self, images: NpArray, outputs: Sequence[str]) -> Answers:
        """What ONNX Runtime makes of preprocessed float32 ``images`` (n, 3, H, W), or clips."""
        return answers(self.proto, images, outputs)


def in_precision(
    subject: Subject, precision: StoredPrecision, options: ExportOptions, stage: Stage
) -> dict[Format, Model]:
    """Fold the task, and bring its model into ``precision``, for each format of ``options`` as its runtime reads it.

    Only int8 differs between formats, and only that of a ConvNet; the others share one model.

    Raises:
        BackboneError: the backbone that was given is not the pack's.
        InputError: int8 without calibration images, images that cannot be used, or numbers that are not finite.
        CheckError: the model does not fit fp16, int8 costs more than ``options.max_drop``, or simplifying changed it.
        MissingError: onnx, or what simplifies, is not installed.
    """
    began = time.perf_counter()
    proto = build_model(subject.graph, task_tensors(subject.graph.base, subject.delta), subject.delta)
    seconds = time.perf_counter() - began
    if options.simplify:
        proto = simplified(proto, subject.images[0][:2], where=subject.delta.task)
    began = time.perf_counter()
    if precision == "int8":
        made = _in_int8(subject, proto, options, stage)
    else:
        one = Model(proto=proto, precision=precision) if precision == "fp32" else _in_half(subject, proto, options)
        made = dict.fromkeys(options.to, one)
    for model in set(made.values()):
        make_plain(model.proto)
    seconds += time.perf_counter() - began
    return {name: replace(model, seconds=seconds) for name, model in made.items()}


def _in_half(subject: Subject, proto: ModelProto, options: ExportOptions) -> Model:
    if options.calib is None:
        images, source = subject.images
        looked_at: dict[str, object] = {"inputs": source, "n": len(images)}
    else:
        images = sample_images(Path(options.calib), subject.delta.preprocess, subject.delta.answers[0])
        looked_at = {"inputs": "calib", "n": len(images)}
    half = to_half(proto, images, where=subject.delta.task)
    return Model(proto=half.model, precision="fp16", kept=half.kept, calibration=looked_at)


def _in_int8(subject: Subject, proto: ModelProto, options: ExportOptions, stage: Stage) -> dict[Format, Model]:
    images = task_images(subject, options)
    calibration = calibration_of(subject, images, proto)
    models = dict[Format, Model]()
    for name in options.to:
        same = [models[other] for other in models if calibration.same_graph(name, other)]
        models[name] = same[0] if same else _coded(calibration.for_format(name), images, options, stage)
    return models


def _coded(calibration: Calibration, images: CalibrationImages, options: ExportOptions, stage: Stage) -> Model:
    made = calibration.run(max_drop=options.max_drop, stage=stage)
    return Model(
        proto=made.int8.model,
        precision="int8",
        kept=_kept(made),
        calibration={"inputs": "calib", "n": len(images.measured), **images.facts},
        int8=made.facts,
        warning=images.warning,
    )


def _kept(made: Calibrated) -> tuple[Kept, ...]:
    costs = {layer.name: layer.kl for layer in made.layers}
    reason = "int8 of it costs most: divergence {:.2g} alone"
    return tuple(Kept(name=name, op="layer", reason=reason.format(costs[name])) for name in made.recipe.keep)


def task_images(subject: Subject, options: ExportOptions) -> CalibrationImages:
    """The calibration images of a task.

    Raises:
        InputError: none are given, or they cannot be used.
    """
    delta, folder, count = subject.delta, require_images(options), options.calib_images
    if delta.heads:
        meanings = meanings_of(delta)
        return head_calibration_images(folder, meanings, delta.preprocess, evaluation=subject.data, count=count)
    return calibration_images(folder, delta.labels, delta.preprocess, evaluation=subject.data, count=count)


def require_images(options: ExportOptions) -> FilePath:
    """The folder of calibration images.

    Raises:
        InputError: none is given.
    """
    if options.calib is None:
        fix = f"pass {option('calib', 'DIR')} with labelled images of the task, its training folder say"
        what = "needs calibration images: they are given, never invented"
        raise InputError(option("precision", options.precision), what, fix=fix)
    return options.calib


def int8_of(
    subject: Subject, delta: Delta | None = None, images: Callable[[], CalibrationImages] | None = None
) -> Int8Graph:
    """The int8 backbone that a pack runs on, made where it is not there; with branches that without them is as well.

    Args:
        delta: of the pack's backbone, in place of the pack's own.
        images: as of ``int8_graph``.

    Raises:
        BackboneError, InputError, CheckError, MissingError: as ``Subject.graph_of`` and ``int8_graph``.
    """
    delta = subject.delta if delta is None else delta
    if delta.branches:
        subject.graph_of(replace(delta, branches=()))
    return int8_graph(subject.graph_of(delta), images)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Expressed:
    """A task against the int8 backbone that tasks share.

    ``delta`` has its ranges: behind ``trunk``, where there is one. ``model`` is the Q/DQ form of the same numbers, by
    ``recipe``: what ONNX Runtime must answer. ``ranges`` are those of all its tensors, ``corrections`` what its layers
    add to their biases.
    ``calibration`` judges answers by the task in float.
    """

    delta: Delta
    trunk: Cut | None
    model: ModelProto
    ranges: Mapping[str, Range]
    corrections: Mapping[str, NpArray]
    recipe: Int8Recipe
    calibration: Calibration

    def model_for(self, runtime: str) -> ModelProto:
        """``model`` as ``runtime`` computes it: of a ConvNet not all of them have codes in the same maps."""
        return self.calibration.for_runtime(runtime).made(self.recipe, self.ranges, self.corrections).model


def express(
    delta: Delta, graph: BaseGraph, codes: Int8Graph, images: CalibrationImages, *, recipe: Int8Recipe | None = None
) -> Expressed:
    """Measure the ranges that ``delta`` needs on the int8 backbone; its codes are not touched.

    In its trunk, where there is one, the backbone's own hold and are not measured again.

    Args:
        graph: what ``delta`` runs on, and ``codes`` the int8 backbone of it.
        recipe: how ranges are chosen; None for the best on the held-out images. Its smoothing is the codes' own.

    Raises:
        BackboneError, InputError: the delta does not fit the graph, or an activation is not finite.
    """
    dense = {layer.weight: codes.coded(layer) for layer in codes.layers}
    base, trunk = graph.base, None if codes.ranges is None else codes.trunk(delta)
    before = 0 if trunk is None else trunk.reads
    held = dict(zip(codes.reads[:before], (codes.ranges or ())[:before], strict=True))
    rounded_base = replace(base, tensors={**base.tensors, **{name: made.dense for name, made in dense.items()}})
    divisors = {layer.reads: dense[layer.weight].divisors for layer in codes.layers}
    calibration = _calibration(
        delta, graph, images, build_model(graph, task_tensors(rounded_base, delta), delta),
        weights=frozenset(dense),  # a kernel that the backbone computes has no codes, and is a weight in the model
        smooth={name: value for name, value in divisors.items() if value is not None},
        against=build_model(graph, task_tensors(base, delta), delta),
        held=held,
        coded=codes.coded_maps,
    )  # fmt: skip
    recipe = recipe or calibration.choose()[0].recipe
    kinds = {each.name: each.codes for each in codes.coded_maps}
    stored = {name: of.stored for name, of in calibration.made(recipe).ranges.items()}
    found = calibration.corrections(stored)
    ordered = {layer.name: found[layer.name] for layer in corrected_layers(codes, before)} if found else {}
    corrections = _as_packs_store(ordered, delta.task)
    ranges = Int8Ranges(
        codes=codes.codes_sha256,
        ranges=tuple(stored.get(name, UNREAD[kinds.get(name, "signed")]) for name in codes.reads[before:]),
        trunk=None if trunk is None else codes.ranges_sha256,
        corrections=tuple(float(each) for by in corrections.values() for each in by),
    )
    return Expressed(
        delta=replace(delta, int8=ranges),
        trunk=trunk,
        model=calibration.made(recipe, stored, corrections).model,
        ranges=stored,
        corrections=corrections,
        recipe=recipe,
        calibration=calibration,
    )


def _as_packs_store(corrections: Mapping[str, NpArray], task: str) -> dict[str, NpArray]:
    if not corrections:
        return {}
    whole = np.concatenate(list(corrections.values())).astype(np.float32)
    ends = np.cumsum([len(by) for by in corrections.values()])[:-1]
    stored = as_stored(CORRECTIONS, whole, CORRECTED, task).astype(np.float64)
    return dict(zip(corrections, np.split(stored, ends), strict=True))


def fastest(folders: Mapping[StoredPrecision, Path]) -> tuple[StoredPrecision, str]:
    """Of exported models of one task and format the precision that is fastest here, and the numbers that say so.

    They are p50 in ms of one image. Of those within 5 % of the fastest it is the smallest: an fp16 file that is
    computed in fp32 is as fast as that but for noise.

    Raises:
        InputError, MissingError: as ``open_artifact``.
    """
    threads = environment().cores
    artifacts = {precision: read_artifact(folder) for precision, folder in folders.items()}
    candidates = [
        Candidate(
            model=folders[precision].name,
            runtime=artifact.format,
            precision=precision,
            mode="merged",
            open=partial(open_artifact, folders[precision], artifact, threads=threads),
        )
        for precision, artifact in artifacts.items()
    ]
    image = np.zeros((1, *next(iter(artifacts.values())).preprocess.input_shape), np.float32)
    rows = measure(candidates, image, threads=threads, rounds=AUTO_ROUNDS, warmup=5).rows
    least = min(row.p50_ms for row in rows)
    timed = {row.precision: row for row in rows}
    near = [precision for precision in folders if timed[precision].p50_ms <= AUTO_TIE * least]
    best = min(near, key=lambda precision: folder_bytes(folders[precision]))
    others = ", ".join(f"{row.precision} {row.p50_ms:.2f}" for row in rows if row.precision != best)
    numbers = f"{best}: {timed[best].p50_ms:.2f} ms, {others} (p50 of {AUTO_ROUNDS} rounds, {threads} threads)"
    return best, numbers


def calibration_of(
    subject: Subject,
    images: CalibrationImages,
    proto: ModelProto | None = None,
    *,
    smooth: Mapping[str, NpArray] | None = None,
) -> Calibration:
    """The merged model of a task on its calibration images; ``proto`` where it is there already.

    Raises:
        InputError: as ``Calibration``.
    """
    delta, graph = subject.delta, subject.graph
    if proto is None:
        proto = build_model(graph, task_tensors(graph.base, delta), delta)
    return _calibration(delta, graph, images, proto, smooth=smooth)


def _calibration(
    delta: Delta, graph: BaseGraph, images: CalibrationImages, proto: ModelProto, *,
    weights: frozenset[str] | None = None, smooth: Mapping[str, NpArray] | None = None,
    against: ModelProto | None = None, held: Mapping[str, Range] = MappingProxyType({}),
    coded: Sequence[CodedMap] = (),
) -> Calibration:  # fmt: skip
    order = np.zeros(0, np.int64)  # heads that read maps have the classes of their images in their order
    if not delta.heads:
        places = class_places(delta.labels)
        order = np.array([places[name] for name in images.measured.classes])
    weights = frozenset(graph.base.tensors) if weights is None else weights
    where = f"task {delta.task!r}"
    return Calibration(
        proto, weights, images, order, where=where, smooth=smooth, against=against, held=held, coded=coded,
        outputs=answer_names(map_heads_of(delta)),
    )  # fmt: skip
