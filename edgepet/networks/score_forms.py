"""The head ``score`` for masks as it is trained: DenseCLIP's, with the text as a table. Needs the ``train`` extra.

Light, the score maps are the answer. As published for segmentation they are a further map beside those that a decoder
reads, without a temperature, and judged beside its answer while it is trained; the decoder here is ``mlp`` and not a
feature pyramid. A product of the score maps, added to that of the map they were found on, is the product of both maps,
one behind another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from edgepet.deltas.heads import Map, MapHead
from edgepet.networks.head_forms import Beside, HeadForm, MaskForm
from edgepet.networks.head_settings import Form
from edgepet.networks.scores import TEMPERATURE, Scores
from edgepet.spec import NpArray

SCORES = "scores"  # what score maps are called where a decoder reads them


class ScoreForm(MaskForm):
    """A head of score maps while it is trained; maps (n, C, h, w) by name give logits (n, classes, h, w).

    All tensors start as ``seed`` draws them, and those of the last product of a decoder at zero.
    """

    def __init__(self, form: Form, maps: Sequence[Map], classes: int, *, seed: int = 0) -> None:
        super().__init__(form, maps, classes, seed=seed)
        self._seen = range(len(self.levels))[-1:] if form.mlp else range(len(self.levels))
        levels = [self.levels[number] for number in self._seen]
        self.scores = Scores(
            levels, form.table, layers=form.context, inner=form.inner, residual=form.residual
        )  # fmt: skip
        self.decoder: HeadForm | None = None
        if form.mlp:
            beside = replace(levels[0], name=SCORES, point="", channels=classes)
            plain = Form(width=form.width, depthwise=form.depthwise)
            self.decoder = HeadForm(plain, (*self.levels, beside), classes, seed=seed)
        self.reset()

    def reset(self) -> None:
        """As of ``MapForm``."""
        self.scores.begin(np.random.default_rng(self._seed))
        self._adopt()
        if self.decoder is not None:
            self.decoder.reset()

    def standardize(self, means: Sequence[NpArray], deviations: Sequence[NpArray]) -> None:
        """As of ``MapForm``; score maps are read as they are."""
        super().standardize(means, deviations)
        self._adopt()
        if self.decoder is not None:
            none = np.zeros(self.classes), np.ones(self.classes)
            self.decoder.standardize([*means, none[0]], [*deviations, none[1]])

    def _adopt(self) -> None:
        """Begin with the projection of a CLIP tower, where there is one."""
        if self.form.projection is not None:
            self.scores.adopt(self.form.projection.astype(np.float64), *self.statistics(self._seen[0]))

    def told(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Beside]:
        """As of ``MaskForm``: score maps are judged where they are not the answer."""
        scores = self.scores([self.standardized(number, given[self.levels[number].name]) for number in self._seen])
        judged = scores / TEMPERATURE
        if self.decoder is None:
            return judged, Beside()
        logits, _ = self.decoder.told({**given, SCORES: scores})
        return logits, Beside(scores=judged if self.form.aux else None)

    def lower(self, name: str, labels: tuple[str, ...]) -> MapHead:
        """As of ``MapForm``. Of the text only that is left which the image meets."""
        statistics = [self.statistics(number) for number in self._seen]
        scale, gives = (1 / TEMPERATURE, "logits") if self.decoder is None else (1.0, SCORES)
        steps = self.scores.lower(statistics, scale=scale, gives=gives)
        steps += [] if self.decoder is None else self.decoder.lowered()
        return MapHead(name=name, answer=self.answer, labels=labels, steps=tuple(steps))
