"""What every runner is: a thing that takes preprocessed images and puts out numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from edgepet.errors import InputError
from edgepet.spec import NpArray


class Runner(Protocol):
    """An open network. ``executed`` is the precision that ran, ``evidence`` how that is known."""

    @property
    def runtime(self) -> str: ...

    @property
    def executed(self) -> str: ...

    @property
    def evidence(self) -> Mapping[str, object]: ...

    def __call__(self, images: NpArray) -> NpArray:
        """Output (n, k) for float32 images (n, 3, H, W)."""
        ...

    def close(self) -> None: ...


def check_images(images: NpArray, shape: tuple[int | None, ...], *, where: str) -> None:
    """Refuse a batch that the network would not take; None in ``shape`` is any size.

    Raises:
        InputError: another dtype or shape.
    """
    fits = images.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(images.shape, shape, strict=True)
    )
    if not fits or images.dtype != np.float32:
        wanted = ", ".join("n" if side is None else str(side) for side in shape)
        raise InputError(
            where,
            f"takes float32 images ({wanted})",
            got=f"{images.dtype.name} {tuple(images.shape)}",
            fix="preprocess the images with the artefact's own preprocessing",
        )
