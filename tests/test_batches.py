"""Large images go through networks few at a time."""

from __future__ import annotations

import numpy as np
import pytest

from edgepet.images.batches import batched, in_batches
from edgepet.spec import NpArray


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((130, 3, 224, 224), [64, 64, 2]),
        ((5, 3, 32, 32), [5]),
        ((12, 3, 336, 336), [12]),
        ((12, 3, 384, 384), [7, 5]),
        ((3, 3, 768, 768), [1, 1, 1]),
        ((3, 3, 4000, 4000), [1, 1, 1]),
        ((20, 8, 3, 224, 224), [8, 8, 4]),  # clips of eight frames
    ],
)
def test_a_batch_takes_the_memory_of_64_ordinary_images_at_most(shape: tuple[int, ...], sizes: list[int]) -> None:
    images = np.broadcast_to(np.arange(shape[0], dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1)), shape)

    batches = in_batches(images)

    assert [len(batch) for batch in batches] == sizes
    assert [float(image.flat[0]) for batch in batches for image in batch] == list(range(shape[0]))
    assert len(in_batches(images, 4)[0]) == min(4, sizes[0])


def test_answers_of_batches_come_as_one() -> None:
    seen = list[int]()

    def network(images: NpArray) -> NpArray:
        seen.append(len(images))
        return images.reshape(len(images), -1)[:, :1]

    got = batched(network, np.arange(9 * 3 * 384 * 384, dtype=np.float32).reshape(9, 3, 384, 384))

    assert (got.shape, seen) == ((9, 1), [7, 2])
