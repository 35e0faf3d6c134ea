"""Packs taken apart, changed and put together again in the canonical form, so that only the change is wrong."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from edgepet.canonical import canonical_json
from edgepet.packs.codecs import Coding
from edgepet.spec import NpArray

Change = Callable[[dict[str, Any], dict[str, NpArray]], object]
WIDTHS = {"float32": 4, "float16": 2, "int32": 4, "uint8": 8}  # bytes that a stored number is read as


def header_bytes(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + header_bytes(data)])


def manifest_of(data: bytes) -> Any:
    return json.loads(header_of(data)["__metadata__"]["edgepet"])


def tensors_of(data: bytes) -> dict[str, NpArray]:
    return {name: tensor.copy() for name, tensor in safetensors.numpy.load(data).items()}


def layout_of(data: bytes) -> Any:
    return json.loads(zlib.decompress(tensors_of(data)["layout"].tobytes(), -15))


def deflate(text: bytes) -> NpArray:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return np.frombuffer(packer.compress(text) + packer.flush(), np.uint8)


def planes_bytes(manifest: dict[str, Any], tensors: dict[str, NpArray]) -> int:
    """What the planes say that they become."""
    size = 0
    for name, tensor in tensors.items():
        if name in manifest["codecs"]:
            kind, values, *group = manifest["codecs"][name]
            size += Coding(kind, *group).decoded_bytes(name, values)
        elif name != "layout":
            size += WIDTHS.get(tensor.dtype.name, 8) * tensor.size
    return size


def changed(
    data: bytes,
    change: Change = lambda manifest, tensors: None,
    spell: Callable[[Any], str] = lambda value: canonical_json(value).decode(),
    lay: Callable[[Any], str] = lambda value: canonical_json(value).decode(),
) -> bytes:
    """A pack whose manifest and tensors ``change`` has changed; updates and branches are the manifest's meanwhile.

    What it says of the bytes that it becomes is true of the change, unless that says otherwise.
    """
    manifest, tensors = manifest_of(data) | layout_of(data), tensors_of(data)
    before, told = planes_bytes(manifest, tensors), dict(manifest["decoded"])
    change(manifest, tensors)
    text = lay({key: manifest.pop(key) for key in ("branches", "updates") if key in manifest}).encode()
    if manifest.get("decoded") == told:
        told["bytes"] += planes_bytes(manifest, tensors) - before
        manifest["decoded"] = told | {"layout": len(text)}
    return safetensors.numpy.save({**tensors, "layout": deflate(text)}, metadata={"edgepet": spell(manifest)})
