"""What a training of boxes has of its own: objects, their losses and average precision. Needs the ``train`` extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from edgepet.deltas.heads import Answer
from edgepet.errors import InputError
from edgepet.images.box_folders import open_boxes
from edgepet.images.boxes import Boxes, BoxSet, check_boxes, require_objects
from edgepet.images.folders import Split
from edgepet.measuring.average_precision import require_evaluator
from edgepet.networks.head_forms import MapForm
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.box_fit import BoxObjective
from edgepet.tuning.fit import Plan
from edgepet.tuning.options import TrainOptions
from edgepet.tuning.training import Training


class BoxTask:
    """A box around every object, as ``dense_training.DenseTask``."""

    answer: ClassVar[Answer] = "boxes"
    usual_head: ClassVar[str] = "fcos"
    options: ClassVar[frozenset[str]] = frozenset()
    thing: ClassVar[str] = "object"
    truths_are: ClassVar[str] = "boxes"

    def listed(self, training: Training, split: Split) -> BoxSet:
        """As of ``DenseTask``.

        Raises:
            MissingError: the package that judges boxes is not installed: said before any work is done.
        """
        require_evaluator()
        options = training.options
        return open_boxes(training.data, split, val_fraction=options.val_fraction, seed=options.seed)

    def checked(
        self, training: Training, preprocess: Preprocess, train: BoxSet, val: BoxSet
    ) -> tuple[BoxSet, BoxSet, NpArray]:
        """As of ``DenseTask``: every image is opened for its size."""
        if val.classes != train.classes:
            what = f"needs the classes of train in val, {format_names(train.classes[:5])}"
            raise InputError(str(training.data), what, got=format_names(val.classes[:5]))
        checked = check_boxes(train, preprocess)
        require_objects(checked, training.data)
        return checked, check_boxes(val, preprocess), checked.counts()

    def truths(self, images: BoxSet, preprocess: Preprocess) -> Sequence[Boxes]:
        """As of ``DenseTask``: boxes are told in pixels of the input."""
        height, width = preprocess.image_size
        return tuple(
            each.scaled((height / rows, width / columns))
            for each, (rows, columns) in zip(images.boxes, images.extents, strict=True)
        )

    def arrays(self, truths: Sequence[Boxes]) -> Iterator[NpArray]:
        """As of ``DenseTask``."""
        return (array for each in truths for array in (each.corners, each.labels, each.crowds))

    def losses(self, options: TrainOptions, counts: NpArray) -> Mapping[str, object]:
        """As of ``DenseTask``: nothing is to be chosen."""
        del options, counts
        return {}

    def objective(
        self, form: MapForm, preprocess: Preprocess, plan: Plan, losses: Mapping[str, object]
    ) -> BoxObjective:
        """As of ``DenseTask``."""
        del losses
        return BoxObjective(form, preprocess, plan)
