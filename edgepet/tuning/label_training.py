"""What a training of several labels an image has of its own. Needs the ``train`` extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from edgepet.deltas.heads import Answer
from edgepet.errors import InputError
from edgepet.images.folders import Split
from edgepet.images.labels import LabelSet, Truth, open_labels, require_labels
from edgepet.networks.head_forms import MapForm
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.fit import Plan
from edgepet.tuning.label_fit import LabelObjective
from edgepet.tuning.options import TrainOptions
from edgepet.tuning.training import Training


class LabelTask:
    """Which labels an image has, as ``dense_training.DenseTask``."""

    answer: ClassVar[Answer] = "labels"
    usual_head: ClassVar[str] = "pooled"
    options: ClassVar[frozenset[str]] = frozenset()
    thing: ClassVar[str] = "image"
    truths_are: ClassVar[str] = "labels"

    def listed(self, training: Training, split: Split) -> LabelSet:
        """As of ``DenseTask``."""
        options = training.options
        return open_labels(training.data, split, val_fraction=options.val_fraction, seed=options.seed)

    def checked(
        self, training: Training, preprocess: Preprocess, train: LabelSet, val: LabelSet
    ) -> tuple[LabelSet, LabelSet, NpArray]:
        """As of ``DenseTask``."""
        del preprocess
        if val.classes != train.classes:
            what = f"needs the labels of train in val, {format_names(train.classes[:5])}"
            raise InputError(str(training.data), what, got=format_names(val.classes[:5]))
        require_labels(train, training.data)
        return train, val, train.counts()

    def truths(self, images: LabelSet, preprocess: Preprocess) -> Sequence[Truth]:
        """As of ``DenseTask``."""
        del preprocess
        return list(images.labels)

    def arrays(self, truths: Sequence[Truth]) -> Iterator[NpArray]:
        """As of ``DenseTask``."""
        return iter(truths)

    def losses(self, options: TrainOptions, counts: NpArray) -> Mapping[str, object]:
        """As of ``DenseTask``: nothing is to be chosen."""
        del options, counts
        return {}

    def objective(
        self, form: MapForm, preprocess: Preprocess, plan: Plan, losses: Mapping[str, object]
    ) -> LabelObjective:
        """As of ``DenseTask``."""
        del losses
        return LabelObjective(form, preprocess, plan)
