"""``TASK.work/``: what training leaves beside a pack, so that later verbs can compare with the tuned network.

work.json             the backbone's fingerprint, the method and its settings
method.safetensors    the method's tensors and the head in float32, as trained
images.safetensors    held-out images as pixels, uint8 (n, H, W, 3), and their labels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from edgepet.canonical import canonical_json, parse_json
from edgepet.deltas.delta import Delta, Head
from edgepet.errors import InputError
from edgepet.files import new_folder, read_file, write_file
from edgepet.spec import NpArray
from edgepet.strict import ObjectReader

HELD_OUT = 32  # images


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """A folder as it was read; ``tensors`` are ``site/name`` -> float32."""

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
    """Write the folder in one step; ``pixels`` beyond the first ``HELD_OUT`` are left out."""
    held = {"pixels": np.ascontiguousarray(pixels[:HELD_OUT]), "labels": np.ascontiguousarray(labels[:HELD_OUT])}
    facts = {"fingerprint": delta.fingerprint, "method": delta.method, "settings": dict(delta.settings)}
    head = {"head.weight": delta.head.weight, "head.bias": delta.head.bias}
    with new_folder(folder) as scratch:
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
        table = ObjectReader(parse_json(read_file(folder / "work.json")), str(folder / "work.json"), error=InputError)
        tensors = safetensors.numpy.load(read_file(folder / "method.safetensors"))
        held = safetensors.numpy.load(read_file(folder / "images.safetensors"))
        head = Head(weight=tensors.pop("head.weight"), bias=tensors.pop("head.bias"))
        settings = table.nested("settings")
        work = Work(
            fingerprint=table.text("fingerprint"),
            method=table.text("method"),
            settings={key: settings.raw(key) for key in settings.names()},
            tensors=tensors,
            head=head,
            pixels=held["pixels"],
            labels=held["labels"],
        )
        table.end()
        return work
    except (ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise InputError(str(folder), "is damaged", got=error, fix="train again, or delete the folder") from error
