"""``TASK.work/``: what training leaves beside a pack, so that later verbs can compare with the tuned network.

work.json             the backbone's fingerprint, the method and its settings
method.safetensors    the method's tensors and the head in float32, as trained
images.safetensors    held-out images as pixels, uint8 (n, H, W, 3), of clips (n, frames, H, W, 3), and their labels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta, Head
from edgepet.errors import InputError
from edgepet.files import new_folder, write_file
from edgepet.graphs.manifest import read_manifest
from edgepet.graphs.tensor_files import read_tensors
from edgepet.spec import NpArray

HELD_OUT = 32  # images
FILES = ("work.json", "method.safetensors", "images.safetensors")
_AGAIN = "train again, or delete the folder"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """A folder as it was read; ``tensors`` are ``site/name`` -> float32.

    ``head`` is float32 (C, d), ``pixels`` are uint8 (n, H, W, 3), of clips (n, frames, H, W, 3), ``labels`` int64 (n,).
    """

    fingerprint: str
    method: str
    settings: Mapping[str, object]
    tensors: Mapping[str, NpArray]
    head: Head
    pixels: NpArray
    labels: NpArray


def work_folder(pack: Path) -> Path:
    """``flowers.work`` beside ``flowers.pet``."""
    return pack.with_suffix(".work")


def write_work(folder: Path, delta: Delta, tensors: Mapping[str, NpArray], pixels: NpArray, labels: NpArray) -> None:
    """Write the folder in one step; ``pixels`` beyond the first ``HELD_OUT`` are left out, and nothing is modified.

    Raises:
        InputError: it cannot be written, or holds something else.
    """
    held = {"pixels": np.ascontiguousarray(pixels[:HELD_OUT]), "labels": np.ascontiguousarray(labels[:HELD_OUT])}
    facts = {"fingerprint": delta.fingerprint, "method": delta.method, "settings": dict(delta.settings)}
    head = {"head.weight": delta.head.weight, "head.bias": delta.head.bias}
    with new_folder(folder, only=FILES) as scratch:
        trained = {name: np.asarray(tensor, order="C") for name, tensor in {**tensors, **head}.items()}
        write_file(scratch / "method.safetensors", safetensors.numpy.save(trained))
        write_file(scratch / "images.safetensors", safetensors.numpy.save(held))
        write_file(scratch / "work.json", canonical_json(facts))


def read_work(folder: Path) -> Work:
    """Read the folder.

    Raises:
        InputError: a file of it is missing or damaged.
    """
    try:
        table = read_manifest(folder / "work.json", where=str(folder / "work.json"), fix=_AGAIN)
        tensors, held = (read_tensors(folder / f"{name}.safetensors") for name in ("method", "images"))
        settings = table.nested("settings")
        work = Work(
            fingerprint=table.text("fingerprint"),
            method=table.text("method"),
            settings={key: settings.raw(key) for key in settings.names()},
            head=Head(weight=tensors.pop("head.weight"), bias=tensors.pop("head.bias")),
            tensors=tensors,
            pixels=held["pixels"],
            labels=held["labels"],
        )
        table.end()
    except KeyError as error:
        raise InputError(str(folder), "is damaged", got=f"no tensor {error}", fix=_AGAIN) from error
    wrong = _wrong(work)
    if wrong is not None:
        raise InputError(str(folder), "is damaged", got=wrong, fix=_AGAIN)
    return work


def _wrong(work: Work) -> str | None:
    """What of the head and the held-out images has another shape or type than training writes."""
    head, pixels, labels = work.head, work.pixels, work.labels
    if head.weight.ndim != 2 or head.bias.shape != head.weight.shape[:1]:
        return f"a head of shapes {head.weight.shape} and {head.bias.shape}"
    if pixels.dtype != np.uint8 or pixels.ndim not in (4, 5) or labels.shape != pixels.shape[:1]:
        return f"images {pixels.dtype.name} {pixels.shape} and labels {labels.shape}"
    return None
