"""What a training of masks has of its own: pixels of classes, losses and mean overlap. Needs the ``train`` extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, cast

import numpy as np

from edgepet.deltas.heads import Answer
from edgepet.images.folders import Split
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import Masked, MaskSet, check_masks, require_classes
from edgepet.networks.head_forms import MapForm
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.fit import Plan
from edgepet.tuning.mask_fit import Losses, MaskObjective
from edgepet.tuning.options import TrainOptions
from edgepet.tuning.training import Training


class MaskTask:
    """A class for every pixel, as ``dense_training.DenseTask``."""

    answer: ClassVar[Answer] = "mask"
    usual_head: ClassVar[str] = "mlp"
    options: ClassVar[frozenset[str]] = frozenset(("balance", "dice"))
    thing: ClassVar[str] = "pixel"
    truths_are: ClassVar[str] = "masks"

    def listed(self, training: Training, split: Split) -> MaskSet:
        """As of ``DenseTask``."""
        options = training.options
        return open_masks(training.data, split, val_fraction=options.val_fraction, seed=options.seed)

    def checked(
        self, training: Training, preprocess: Preprocess, train: MaskSet, val: MaskSet
    ) -> tuple[MaskSet, MaskSet, NpArray]:
        """As of ``DenseTask``: every mask is read."""
        counts = check_masks(train, preprocess)
        check_masks(val, preprocess)
        require_classes(counts, train.classes, training.data)
        return train, val, counts

    def truths(self, images: MaskSet, preprocess: Preprocess) -> Sequence[Masked]:
        """As of ``DenseTask``; masks are read when they are asked for."""
        del preprocess
        return images.masks

    def arrays(self, truths: Sequence[Masked]) -> Iterator[NpArray]:
        """As of ``DenseTask``."""
        return (mask.read() for mask in truths)

    def losses(self, options: TrainOptions, counts: NpArray) -> Mapping[str, object]:
        """As of ``DenseTask``."""
        return {"weights": _weights(counts) if options.balance else [], "dice": options.dice}

    def objective(
        self, form: MapForm, preprocess: Preprocess, plan: Plan, losses: Mapping[str, object]
    ) -> MaskObjective:
        """As of ``DenseTask``."""
        weights = cast(list[float], losses["weights"])
        asked = Losses(weights=tuple(weights) or None, dice=cast(float, losses["dice"]))
        return MaskObjective(form, preprocess, plan, losses=asked)


def _weights(counts: NpArray) -> list[float]:
    """n / (classes · the class's pixels), whose mean over the pixels is 1; 1 for a class that has none."""
    there = np.maximum(counts, 1)
    return [float(w) for w in np.where(counts > 0, counts.sum() / (np.count_nonzero(counts) * there), 1.0)]
