"""What a head for several labels is fitted to: binary cross entropy, and mean average precision. Needs ``train``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgepet.deltas.heads import Answer
from edgepet.images.labels import Truth
from edgepet.measuring.several_labels import label_fit
from edgepet.spec import NpArray
from edgepet.tuning.dense import DenseModel
from edgepet.tuning.dense_fit import Objective, Taken


class LabelObjective(Objective[Tensor]):
    """Which labels an image has; truths are uint8 (labels,)."""

    answer: ClassVar[Answer] = "labels"

    def given(self, model: DenseModel, maps: Mapping[str, Tensor]) -> Tensor:
        """As of ``Objective``."""
        given: Tensor = self.form(maps)
        return given

    def loss(self, given: Tensor, taken: Taken) -> Tensor:
        """As of ``Objective``: the mean over labels and images of the binary cross entropy of σ(logit)."""
        truth = torch.from_numpy(np.stack([taken.truths[place] for place in taken.part])).to(given.device)
        summed = functional.binary_cross_entropy_with_logits(given.float(), truth.float(), reduction="sum")
        return summed / (len(taken.truths) * given.shape[1])

    def meter(self, truths: Sequence[Truth]) -> _LabelMeter:
        """As of ``Objective``."""
        return _LabelMeter(truths)


class _LabelMeter:
    """Mean average precision and mean loss."""

    def __init__(self, truths: Sequence[Truth]) -> None:
        self._truths, self._scores, self._total = np.stack(truths), list[NpArray](), 0.0

    def add(self, given: Tensor, chosen: slice) -> None:
        truth = torch.from_numpy(self._truths[chosen]).to(given.device).float()
        self._total += float(functional.binary_cross_entropy_with_logits(given, truth, reduction="sum"))
        self._scores.append(given.double().sigmoid().cpu().numpy())

    def result(self) -> tuple[float, float]:
        fit = label_fit(np.concatenate(self._scores), self._truths, interval=False)
        return fit.ap, self._total / self._truths.size
