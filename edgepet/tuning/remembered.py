"""What lies before the first tuned block is the backbone itself: computed once for every image, and remembered.

A training without augmentation that is kept to some blocks (``--set blocks=6-11``) need not run those before them again
and again. What enters the first tuned block takes the place of the pixels, in memory or in ``flowers.features`` beside
the pack to come. Needs the ``train`` extra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgepet.errors import InputError, first_line, option
from edgepet.files import require_space
from edgepet.images.held import Shape, Turn, hold
from edgepet.images.notes import Tell
from edgepet.images.sets import batches
from edgepet.measuring.machine import free_memory_bytes
from edgepet.methods.depth import first_block
from edgepet.networks.backbone import Backbone
from edgepet.networks.sizes import REFUSALS
from edgepet.networks.split import split_at
from edgepet.reports.tables import format_bytes
from edgepet.spec import NpArray
from edgepet.tuning.computing import at_once, computing
from edgepet.tuning.fit import LabelledPixels, Plan
from edgepet.tuning.front import Front
from edgepet.tuning.model import TunedModel
from edgepet.tuning.processes import ALONE, Processes

_EACH = "every step runs what lies before"
MOST_HELD = 2 * 10**9  # bytes; training is as fast on files that are mapped
PROVED = 8  # images: of one batch, on which the network that is cut must answer bit for bit as the whole one


def most_held(processes: Processes = ALONE) -> int:
    """Bytes of images and features that this process holds in memory: half of what is free, at most ``MOST_HELD``."""
    return min(MOST_HELD, free_memory_bytes() // (2 * processes.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where what is remembered may lie, and who is told.

    ``budget_bytes`` of it are held in memory, more in files of ``folder``, which are used again under one ``identity``.
    """

    folder: Path
    budget_bytes: int
    identity: Mapping[str, object]
    turn: Turn
    tell: Tell
    stage: Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Remembered:
    """A ``front`` that was computed, and ``train`` and ``val`` with its rows in place of pixels."""

    front: Front
    train: LabelledPixels
    val: LabelledPixels


def remember(
    model: TunedModel, backbone: Backbone, train: LabelledPixels, val: LabelledPixels, plan: Plan, place: Place
) -> Remembered | None:
    """Compute once what enters the first tuned block of every image; None where each step must run the whole network.

    That is so with augmentation, where nothing lies before the tuned blocks, and, with a line that says so, where the
    backbone is rounded, where the network cannot be cut there, and where neither memory nor disk has room.

    Raises:
        InputError: files cannot be written, or the folder is somebody's own.
    """
    block = first_block(model.method, backbone.layers)
    if block is None or not model.sites or plan.augment:
        return None
    with computing(model, plan):
        front = _front(model, backbone, block, train.pixels, plan)
        if isinstance(front, str):
            place.tell(f"{_EACH} {block}: {front}", ())
            return None
        sets = {"train": train, "val": val}
        shapes = {name: Shape((len(images), *front.split.shape), front.stored) for name, images in sets.items()}
        size = sum(shape.size_bytes for shape in shapes.values())
        if place.turn.anywhere(size > place.budget_bytes) and place.turn.anywhere(no_room(place, size)):
            place.tell(f"{_EACH} {block}: there is no room for {format_bytes(size)} in memory or on the disk", ())
            return None

        def fill(arrays: list[NpArray]) -> None:
            count = sum(map(len, sets.values()))
            place.stage(f"compute once what enters {block} of {count} images, {format_bytes(size)}")
            for array, images in zip(arrays, sets.values(), strict=True):
                _fill(array, model, front, images.pixels, backbone, plan)

        made_by = {**place.identity, "block": block, "torch": torch.__version__}
        held = hold(
            shapes, fill, place.folder, made_by, budget_bytes=place.budget_bytes, turn=place.turn, what="features"
        )
    return Remembered(
        front=front,
        train=LabelledPixels(held["train"], train.labels),
        val=LabelledPixels(held["val"], val.labels),
    )


def no_room(place: Place, size: int) -> bool:
    """Whether the disk has no room for ``size`` bytes, where this process makes them and they are not there yet."""
    try:
        require_space(place.folder, size, "")
    except InputError:
        return place.turn.makes and not place.folder.is_dir()
    return False


def _front(model: TunedModel, backbone: Backbone, block: str, pixels: NpArray, plan: Plan) -> Front | str:
    """The front of ``model``, proved on one batch of ``pixels``; or why there is none."""
    if model.fake_quant is not None:
        return f"with {option('backbone_precision', model.backbone_precision)} their ranges move while tuning"
    images = next(_images(pixels[:PROVED], backbone, plan))
    try:
        front = Front(split_at(model.backbone, block, images[:2]))
        expected = model.features(images)
        rows = front.rows(front.of(model.backbone, images)).to(plan.device)
        with model.beginning(front):
            got = model.features(rows)
    except REFUSALS as error:
        return f"the network cannot be cut there ({first_line(error)})"
    except InputError as error:
        return error.what
    if not torch.equal(expected, got):
        return "the network cannot be cut there: something goes around them"
    return front


def _fill(array: NpArray, model: TunedModel, front: Front, pixels: NpArray, backbone: Backbone, plan: Plan) -> None:
    first = 0
    for images in _images(pixels, backbone, plan):
        rows = front.of(model.backbone, images)
        array[first : first + len(rows)] = rows
        first += len(rows)


def _images(pixels: NpArray, backbone: Backbone, plan: Plan) -> Iterator[Tensor]:
    """As ``fit`` goes through a set to judge it: what comes of an image may depend on its batch in the last bit."""
    parts = batches(pixels, backbone.preprocess, at_once(backbone.preprocess))
    return (torch.from_numpy(part).to(plan.device) for part in parts)
