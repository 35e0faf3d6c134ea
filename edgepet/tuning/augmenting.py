"""What becomes of the images of a step: flips and crops, and timm's RandAugment, erasing, mixup and cutmix.

timm's transforms draw from the global generators of Python, NumPy and torch. These are seeded for each image, by the
training's seed, the epoch and the image's place in it, and then put back as they were. So an image becomes the same
whatever was drawn before, in however many parts a batch is gone through, and by however many processes.

Needs the ``train`` extra.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from edgepet.errors import InputError, option, require
from edgepet.images.preprocess import normalize
from edgepet.spec import Preprocess
from edgepet.tuning.recipes import Augmentations, augmentations

_POLICY, _ERASING, _MIXING = range(3)  # what a seed is for
Take: TypeAlias = Callable[[Tensor], Tensor]  # indices of images -> their pixels, uint8 (n, ..., H, W, 3)


def require_augmentations(names: Sequence[str], preprocess: Preprocess) -> None:
    """Refuse a policy that timm does not know, before images are read.

    Raises:
        InputError: it is none, or nothing that can be drawn.
    """
    policy = augmentations(names).policy
    if policy is None:
        return
    try:
        with put_back():
            sow(0)
            _timm_policy(policy, preprocess)(Image.new("RGB", (16, 16)))
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # timm's own, and NumPy's
        raise InputError(option("augment"), f"timm takes no {policy!r}", got=error) from error


class Augmenter:
    """The images and targets of each step of one training, as ``names`` ask."""

    def __init__(self, names: Sequence[str], preprocess: Preprocess, *, batch_size: int, seed: int) -> None:
        self.asked, self.preprocess, self.batch_size, self.seed = augmentations(names), preprocess, batch_size, seed
        self.policy = None if self.asked.policy is None else _timm_policy(self.asked.policy, preprocess)
        self._erase = _timm_erasing(self.asked.erasing) if self.asked.erasing else None

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another, and their labels too."""
        return self.asked.mixup > 0 or self.asked.cutmix > 0

    def images(self, take: Take, index: Tensor, part: Tensor, at: tuple[int, int]) -> Tensor:
        """The images at the places ``part`` of a step's ``index``, as the network takes them, on the CPU.

        Args:
            at: the epoch, and the step's place in it from 0.
        """
        epoch, step = at
        places = [step * self.batch_size + place for place in part.tolist()]
        pixels = take(index[part])
        if self.policy is not None:
            pixels = self._by_policy(pixels, epoch, places)
        images = flipped_and_cropped(pixels, self.preprocess, self.asked)
        if self._erase is not None:
            with put_back():
                for image, place in zip(images, places, strict=True):
                    for frame in image.reshape(-1, *image.shape[-3:]):  # the frames of a clip alike
                        sow(self.seed, epoch, place, _ERASING)
                        self._erase(frame)
        return images

    def mixed(
        self,
        take: Take,
        index: Tensor,
        part: Tensor,
        at: tuple[int, int],
        labels: Tensor,
        classes: int,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """As ``images``, each mixed with its partner from the other end of the whole batch, and what they are then.

        Returns:
            The images, and for each the probability of every class, (n, classes), smoothed by ``smoothing``.
        """
        partners = len(index) - 1 - part.flip(0)  # timm mixes the first with the last: of the two halves, each other's
        both, places = self.images(take, index, part, at), torch.cat([part, partners])
        if not torch.equal(partners, part):
            both = torch.cat([both, self.images(take, index, partners, at)])
        elif len(part) % 2 == 0:
            places = part  # a whole batch has its partners; timm takes no odd one
        else:
            both = torch.cat([both, both])
        mixup = require("timm.data.mixup", extra="train", purpose="mix images").Mixup(
            mixup_alpha=self.asked.mixup, cutmix_alpha=self.asked.cutmix, label_smoothing=smoothing, num_classes=classes
        )
        with put_back():
            sow(self.seed, *at, _MIXING)
            flat = both.reshape(len(both), -1, *both.shape[-2:])  # the frames of a clip as channels
            flat, targets = mixup(flat, labels[index[places]])
        return flat.reshape(both.shape)[: len(part)], targets[: len(part)]

    def _by_policy(self, pixels: Tensor, epoch: int, places: list[int]) -> Tensor:
        made = np.array(pixels.numpy())
        with put_back():
            for number, place in enumerate(places):
                for frame in made[number].reshape(-1, *made.shape[-3:]):  # views, and the frames of a clip alike
                    sow(self.seed, epoch, place, _POLICY)
                    frame[:] = np.asarray(self.policy(Image.fromarray(frame)))  # type: ignore[misc]
        return torch.from_numpy(made)


def flipped_and_cropped(pixels: Tensor, preprocess: Preprocess, asked: Augmentations) -> Tensor:
    """A batch of uint8 (n, ..., H, W, 3) as the network takes it, turned and moved as torch's own generator draws."""
    images = torch.from_numpy(normalize(pixels.numpy(), preprocess))
    if asked.flip:
        turned = torch.rand(len(images), *[1] * (images.ndim - 1)) < 0.5
        images = torch.where(turned, images.flip(-1), images)
    if asked.crop:
        shape, (height, width) = images.shape, images.shape[-2:]
        tall, wide = max(1, height // 8), max(1, width // 8)
        border = (wide, wide, tall, tall)
        padded = functional.pad(images.reshape(len(images), -1, height, width), border, mode="reflect")
        steps = 2 * max(tall, wide) + 1
        corners = torch.randint(0, steps, (len(images), 2)) * torch.tensor([2 * tall + 1, 2 * wide + 1]) // steps
        cut = [padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(corners.tolist())]
        images = torch.stack(cut).reshape(shape)  # the frames of a clip together
    return images


def _timm_policy(text: str, preprocess: Preprocess) -> Callable[[Image.Image], Image.Image]:
    """As ``timm.data.create_transform`` makes it: moves are part of the image's size, gaps have the mean colour."""
    timm = require("timm.data.auto_augment", extra="train", purpose="augment images")
    numbers: dict[str, Any] = {
        "translate_const": int(min(preprocess.image_size) * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in preprocess.mean),
        "interpolation": Image.Resampling[preprocess.interpolation.upper()],
    }
    if text.startswith("rand"):
        made = timm.rand_augment_transform(text, numbers)
    elif text.startswith("augmix"):
        made = timm.augment_and_mix_transform(text, numbers | {"translate_pct": 0.3})
    else:
        made = timm.auto_augment_transform(text, numbers)
    for op in _operations(made):
        if op.aug_fn is timm.posterize:
            op.aug_fn = partial(_posterized, timm.posterize)
    return made  # type: ignore[no-any-return]


def _operations(made: Any) -> Iterator[Any]:
    """timm's single operations, in whatever order a policy holds them."""
    if hasattr(made, "aug_fn"):
        yield made
    for several in (
        (made if isinstance(made, list | tuple) else ()),
        getattr(made, "ops", ()),
        getattr(made, "policy", ()),
    ):
        for each in several:
            yield from _operations(each)


def _posterized(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **others: Any) -> Image.Image:
    """As ``posterize``; black where no bit is left, which timm asks for at its strongest and Pillow refuses by now."""
    return posterize(image, bits, **others) if bits > 0 else Image.new(image.mode, image.size)


def _timm_erasing(probability: float) -> Callable[[Tensor], Tensor]:
    timm = require("timm.data.random_erasing", extra="train", purpose="erase parts of images")
    made: Callable[[Tensor], Tensor] = timm.RandomErasing(probability, mode="pixel", device="cpu")
    return made


def sow(*numbers: int) -> None:
    """Seed the generators that timm's transforms draw from."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[0]))  # not ``torch.manual_seed``: that one seeds GPUs as well


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Leave those generators as the block found them."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
