"""What ``train`` does of every head that reads maps: which kind of task a folder is, and the pack of what was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edgepet.deltas.delta import Delta
from edgepet.images.box_folders import is_box_folder
from edgepet.images.mask_folders import is_mask_folder
from edgepet.packs.codecs import Rounding
from edgepet.packs.pack import EVERY, encode_pack, read_pack, write_pack
from edgepet.proving.probing import probed
from edgepet.tuning.work_folder import HELD_OUT, work_folder, write_work

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone
    from edgepet.tuning.dense_training import MadeDense, PixelsT, SetT
else:
    SetT, PixelsT = TypeVar("SetT"), TypeVar("PixelsT")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseBackbone:
    """The backbone of a training; ``bytes`` are those of its tensors at the native image size."""

    name: str
    fingerprint: str
    bytes: int
    description: str


def backbone_facts(backbone: Backbone) -> DenseBackbone:
    """What a report says of it."""
    return DenseBackbone(
        name=backbone.label, fingerprint=backbone.fingerprint, bytes=backbone.native_bytes,
        description=backbone.description,
    )  # fmt: skip


def task_of(data: Path, asked: str | None) -> str:
    """What is trained for: what is asked, or where nothing is, what lies in ``data``.

    COCO's objects may be either: they are masks, where nothing is asked.
    """
    if asked is not None or not data.is_dir():
        return asked or "class"
    if is_box_folder(data):
        return "boxes"
    return "mask" if is_mask_folder(data) else "class"


def write_dense(
    output: Path, made: MadeDense[SetT, PixelsT], codec: Rounding, judged: Callable[[Delta], float]
) -> None:
    """The pack, with what ``judged`` says of what it stores and not of what was trained, and its work folder."""
    from edgepet.exporters.trace import keep_weights

    stored = read_pack(encode_pack(made.delta, codec=codec), answers=EVERY)
    (head,) = stored.delta.heads
    scored = replace(stored.delta, heads=(replace(head, value=judged(stored.delta), n=len(made.val)),))
    write_pack(output, probed(made.backbone, scored), kept=stored.planes)
    keep_weights(made.backbone)
    spread = np.random.default_rng(0).permutation(len(made.val))[:HELD_OUT]
    pixels, labels = np.asarray(made.val.pixels[spread]), made.val.labels[spread]
    write_work(work_folder(output), made.delta, made.model.arrays(), pixels, labels)
