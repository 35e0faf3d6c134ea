"""A model that preprocesses by itself, asked as all others are: with preprocessed images."""

from __future__ import annotations

from collections.abc import Mapping

from edgepet.device.runner import ModelRunner, check_images
from edgepet.images.pixels import pixels_of, uncropped
from edgepet.spec import NpArray, Preprocess


class FromPixels:
    """A runner of a model that takes uint8 pictures: images are made pictures again, so that all of it is run.

    Of images that were pictures, nothing is lost; others become the nearest. Where it resizes too, pictures are of the
    size that resizing leaves as it is.
    """

    def __init__(self, runner: ModelRunner, preprocess: Preprocess, *, resizes: bool) -> None:
        self.runner, self._preprocess, self._resizes = runner, preprocess, resizes
        self.runtime, self.executed = runner.runtime, runner.executed

    @property
    def evidence(self) -> Mapping[str, object]:
        """The model's."""
        return self.runner.evidence

    def __call__(self, images: NpArray) -> NpArray:
        """Logits, float32 (n, C), of preprocessed float32 images (n, 3, H, W), or clips.

        Raises:
            InputError: another dtype or shape.
        """
        return self.outputs(images)[0]

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that the model puts out; else as for calling it."""
        check_images(images, (None, *self._preprocess.input_shape), where=self.runtime)
        pixels = pixels_of(images, self._preprocess)
        return self.runner.outputs(uncropped(pixels, self._preprocess) if self._resizes else pixels)

    def around(self, runner: ModelRunner) -> FromPixels:
        """The same of another model that takes such pictures."""
        return FromPixels(runner, self._preprocess, resizes=self._resizes)

    def close(self) -> None:
        """Give the model back."""
        self.runner.close()
