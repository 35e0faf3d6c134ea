"""Calibrate a model: measure ranges, choose the recipe on held-out images, and hold the accuracy budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgepet.calibration.budget import (
    BATCH,
    Answers,
    Drop,
    LayerDrop,
    answers,
    answers_of,
    require_resolution,
    within_budget,
)
from edgepet.calibration.coded_maps import MAP_FORMS, MapForm, find_maps, has_maps, quantize_maps
from edgepet.calibration.images import CalibrationImages
from edgepet.calibration.layers import Graph, Layer, find_layers
from edgepet.calibration.observe import observe
from edgepet.calibration.qdq import Int8, Int8Recipe, moved_by, quantize
from edgepet.calibration.ranges import ESTIMATORS
from edgepet.calibration.rewriting import folded
from edgepet.calibration.shared_maps import SHARED_FORMS, shared_ranges
from edgepet.deltas.codes import Range
from edgepet.device.runtimes import DEFAULT, Format
from edgepet.errors import InputError
from edgepet.graphs.int8 import CodedMap
from edgepet.reports.as_json import to_json
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto

# Where the search starts, and what it tries from there, one setting after the other.
TRANSFORMER = Int8Recipe(smooth=0.5)
CONVNET = Int8Recipe(estimator="mse", bias_correction=True)
SMOOTH = (None, 0.25, 0.5, 0.75, 0.9)
_Search: TypeAlias = "Callable[[Int8Recipe], Iterator[Int8Recipe]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A recipe and the mean divergence from float, in nats, that it left on the held-out images."""

    recipe: Int8Recipe
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibrated:
    """An int8 model, the recipe that made it, what was tried, and what it costs.

    ``layers`` are costs of single layers, the worst first, where they had to be looked at.
    """

    int8: Int8
    recipe: Int8Recipe
    tried: tuple[Tried, ...]
    drop: Drop
    layers: tuple[LayerDrop, ...]

    @property
    def facts(self) -> dict[str, object]:
        """What a manifest keeps of it."""
        return {
            "recipe": {**asdict(self.recipe), "keep": list(self.recipe.keep)},
            "tried": [{"recipe": {**asdict(t.recipe), "keep": []}, "kl": t.kl} for t in self.tried],
            "drop": to_json(self.drop),
        }


class Calibration:
    """One folded model on its calibration images; nothing is measured twice.

    It makes the graph that every runtime reads, unless ``for_format`` has chosen another.
    """

    def __init__(
        self, model: ModelProto, weights: Collection[str], images: CalibrationImages, order: NpArray, *, where: str,
        smooth: Mapping[str, NpArray] | None = None, against: ModelProto | None = None,
        held: Mapping[str, Range] = MappingProxyType({}), coded: Sequence[CodedMap] = (), outputs: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Fold the model, find its layers, and run both sets of images through it.

        Args:
            model: in fp32, with its weights inside.
            outputs: names of what its heads answer; of one head the first output.
            weights: names of the initializers whose layers may become int8.
            order: the model's class for each class of ``images``, integers (C,).
            smooth: fixed divisors behind layer norms, by the tensor: then no strength is tried, and biases stay.
            held: ranges of tensors that every recipe takes as they are.
            coded: what has codes, and which, where that is not for a recipe to say: the backbone's that tasks share.
            against: a model whose answers are what int8 is judged by, where ``model`` itself is already rounded. Where
                maps have codes, ranges are measured on it, and biases are corrected by its weights.

        Raises:
            InputError: a weight or an activation is not finite, no layer is one for int8, or an image is unreadable.
        """
        self._where, self._images, self._order, self._outputs = where, images, order, outputs
        _require_finite(model, where)
        self._model = folded(model)
        self._graph = Graph(self._model)
        self.layers: tuple[Layer, ...] = find_layers(self._graph, weights)
        if not self.layers:
            raise InputError(where, "has no linear layer or convolution that int8 is for", fix="export it in fp16")
        self._coded, self._maps = coded, find_maps(self._graph, self.layers, outputs=True)
        self._has_maps = bool(coded) or (smooth is None and has_maps(self.layers))
        self._form: MapForm | None = SHARED_FORMS[DEFAULT] if coded else None
        maps = self._maps.axes if self._has_maps else {}
        self._held, self._smooth, self._float = held, smooth, self._model if against is None else against
        self._exact = Graph(folded(self._float)) if coded else self._graph
        self._seen = observe(self._exact.model, self.layers, images.images, where=where, also=maps)
        self._held_out = self._answers(self._float)
        self._judged: Answers | None = None

    def for_runtime(self, name: str) -> Calibration:
        """The same, making the graph of the backbone that tasks share as this runtime computes it."""
        made = copy(self)
        made._form = SHARED_FORMS[name] if self._coded else None
        return made

    def for_format(self, name: Format) -> Calibration:
        """The same, making the graph that this format's runtime is fastest with; what was measured is shared."""
        made = copy(self)
        made._form = MAP_FORMS.get(name) if self._has_maps else None
        return made

    def same_graph(self, one: Format, other: Format) -> bool:
        """Whether both formats have one graph."""
        return not self._has_maps or MAP_FORMS.get(one) == MAP_FORMS.get(other)

    def made(
        self, recipe: Int8Recipe, ranges: Mapping[str, Range] | None = None,
        corrections: Mapping[str, NpArray] | None = None,
    ) -> Int8:  # fmt: skip
        """The model in int8, with ``ranges`` in place of those that the recipe would choose.

        Args:
            corrections: as of ``self.corrections``, which are meant without; only where tasks share codes of maps.
        """
        if self._form is not None and self._coded:
            smooth, chosen = self._smooth or {}, ranges
            if chosen is None:
                chosen = shared_ranges(self._maps, self._coded, self._seen, recipe.estimator, smooth)
                chosen = {name: self._held.get(name, of) for name, of in chosen.items()}
            mended = self.corrections(chosen) if corrections is None else corrections
            return quantize_maps(
                self._graph, self.layers, self._seen, recipe, self._form, smooth=smooth, ranges=chosen,
                corrections=mended,
            )  # fmt: skip
        if self._form is not None and ranges is None:
            return quantize_maps(self._graph, self.layers, self._seen, recipe, self._form)
        return quantize(
            self._graph, self.layers, self._seen, recipe, smooth=self._smooth, ranges=ranges, held=self._held
        )

    def corrections(self, ranges: Mapping[str, Range]) -> dict[str, NpArray]:
        """What rounding to ``ranges`` takes off each output of a layer on the mean, (out,), by the layer.

        Of what is the backbone's own, and so the same for every task, there is none.
        """
        found = dict[str, NpArray]()
        for layer in self.layers if self._coded else ():
            if layer.reads not in self._held:
                by = (self._smooth or {}).get(layer.reads, np.float64(1))
                exact, rounded = (each.value(layer.weight) * by for each in (self._exact, self._graph))
                rows = self._seen[layer.reads].rows / by
                found[layer.name] = moved_by(exact, rounded, rows, ranges[layer.reads])
        return found

    def choose(self) -> tuple[Tried, ...]:
        """Recipes by what they lose on the held-out images, the best first."""
        best = TRANSFORMER if any(layer.norm for layer in self.layers) else CONVNET
        searched: tuple[_Search, ...] = (_smoothed, _estimated, _corrected)
        if self._smooth is not None:
            best, searched = replace(best, smooth=None, bias_correction=False), (_estimated,)
        tried: dict[Int8Recipe, float] = {}
        for candidates in searched:
            for recipe in candidates(best):
                if recipe not in tried:
                    tried[recipe] = self._images.apart(self._held_out, self._answers(self.made(recipe).model))
            best = min(tried, key=lambda recipe: tried[recipe])
        return tuple(Tried(recipe=recipe, kl=kl) for recipe, kl in sorted(tried.items(), key=lambda item: item[1]))

    def judge(self, int8: Int8) -> Drop:
        """What ``int8`` loses on all of train and val."""
        return self.judged(lambda batches: answers_of(int8.model, batches, self._outputs))

    def judged(self, network: Callable[[Iterable[NpArray]], Answers]) -> Drop:
        """What ``network``, batches of images to what each head answers, loses on all of train and val."""
        images = self._images
        if self._judged is None:
            self._judged = answers_of(self._float, images.judged_batches(BATCH), self._outputs)
        return images.lost("judged", self._judged, network(images.judged_batches(BATCH)), self._order)

    def _answers(self, model: ModelProto) -> Answers:
        """To the held-out images."""
        return answers(model, self._images.held_out_images, self._outputs)

    def sensitivity(self, recipe: Int8Recipe) -> tuple[LayerDrop, ...]:
        """Every layer alone in int8, on the held-out images; that of the largest divergence first."""
        found = []
        for layer in self.layers:
            others = tuple(other.name for other in self.layers if other is not layer)
            got = self._answers(self.made(replace(recipe, keep=others)).model)
            drop = self._images.lost("held_out", self._held_out, got, self._order)
            found.append(LayerDrop(name=layer.name, drop=drop.points, kl=drop.kl))
        return tuple(sorted(found, key=lambda layer: -layer.kl))

    def run(self, *, max_drop: float | None = None, stage: Callable[[str], None] = lambda name: None) -> Calibrated:
        """Choose a recipe, and hold the budget of ``max_drop`` points, None for none; ``stage`` is told what begins.

        Raises:
            InputError: a budget finer than the images show, or not between 0 and 100.
            CheckError: half of the layers in float do not hold it.
        """
        if max_drop is not None and not self._outputs:  # of masks pixels count, not images, and of boxes objects
            require_resolution(max_drop, len(self._images.judged))
        stage("choose an int8 recipe")
        tried = self.choose()
        recipe = tried[0].recipe
        stage("judge int8")
        int8 = self.made(recipe)
        drop, layers = self.judge(int8), tuple[LayerDrop, ...]()
        if max_drop is not None:
            kept, drop, layers = within_budget(
                lambda names: self.judge(self.made(replace(recipe, keep=names))),
                lambda: self.sensitivity(recipe),
                max_drop, drop, where=self._where,
            )  # fmt: skip
            if kept:
                recipe = replace(recipe, keep=kept)
                int8 = self.made(recipe)
        return Calibrated(int8=int8, recipe=recipe, tried=tried, drop=drop, layers=layers)


def _smoothed(best: Int8Recipe) -> Iterator[Int8Recipe]:
    yield best
    if best.smooth is not None:
        yield from (replace(best, smooth=strength) for strength in SMOOTH)


def _estimated(best: Int8Recipe) -> Iterator[Int8Recipe]:
    yield from (replace(best, estimator=name) for name in ESTIMATORS)


def _corrected(best: Int8Recipe) -> Iterator[Int8Recipe]:
    yield replace(best, bias_correction=not best.bias_correction)


def _require_finite(model: ModelProto, where: str) -> None:
    from onnx import numpy_helper

    paddings = {name for node in model.graph.node if node.op_type == "Pad" for name in node.input[2:3]}
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.name in paddings:  # with -inf before a maximum
            continue
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"{where}: {tensor.name}", "must be finite", got="NaN or infinity", fix="train it again")
