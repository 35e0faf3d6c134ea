"""The head for several labels an image, as it is trained, and what it lowers to: one product of pooled features.

Needs the ``train`` extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from edgepet.deltas.heads import FEATURES, Answer, Map, MapHead, Step
from edgepet.deltas.layers import Point
from edgepet.measuring.several_labels import USUAL
from edgepet.networks.head_forms import MapForm, array_of
from edgepet.networks.head_settings import Form


class LabelForm(MapForm):
    """Logits (n, classes) of standardised pooled features (n, d); every logit starts at zero."""

    answer: ClassVar[Answer] = "labels"

    def __init__(self, form: Form, maps: Sequence[Map], classes: int, *, seed: int = 0) -> None:
        super().__init__(form, maps, classes, seed=seed)
        self.product = nn.Linear(self.levels[0].channels, classes)
        self.reset()

    def reset(self) -> None:
        """As of ``MapForm``."""
        nn.init.zeros_(self.product.weight)
        nn.init.zeros_(self.product.bias)

    def seen(self, level: int, x: Tensor) -> Tensor:
        """As of ``MapForm``: features are a map of one place."""
        return x[:, :, None, None]

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """Logits of features."""
        logits: Tensor = self.product(self.standardized(0, given[FEATURES]).flatten(1))
        return logits

    def lower(self, name: str, labels: tuple[str, ...]) -> MapHead:
        """As of ``MapForm``. No threshold is chosen yet."""
        weight = array_of(self.product.weight) / array_of(self.get_buffer("std0"))
        bias = array_of(self.product.bias) - weight @ array_of(self.get_buffer("mean0"))
        step = Step(layer=Point(weight, bias), reads=(FEATURES,), gives="logits")
        return MapHead(name=name, answer="labels", labels=labels, steps=(step,), thresholds=(USUAL,) * len(labels))
