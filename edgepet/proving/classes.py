"""What the classes of folders are to a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgepet.errors import InputError
from edgepet.images.folders import class_places
from edgepet.images.sets import ImageSet
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray


def class_order(images: ImageSet, labels: tuple[str, ...], data: Path, model: str) -> NpArray:
    """Where each class of ``images`` is among the ``labels`` of ``model``, integers (C,); some may have no image.

    Raises:
        InputError: it is not among them.
    """
    places = class_places(labels)
    if not places.keys() >= set(images.classes):
        unlike = sorted(places.keys() ^ set(images.classes))
        what = f"needs the {len(labels)} classes of {model}"
        raise InputError(str(data), what, got=f"a difference in {format_names(unlike[:5])}")
    return np.array([places[name] for name in images.classes])
