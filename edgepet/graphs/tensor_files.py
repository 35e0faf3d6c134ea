"""Tensors where they lie: places in safetensors files, and views of them that are mapped, not read."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepet.canonical import parse_json
from edgepet.spec import NpArray

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie: a file of the folder, an offset and a length."""

    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def safetensors_places(path: Path) -> dict[str, Place]:
    """Offsets of every tensor in a safetensors file, counted from the start of the file."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(start - 8))
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            shape = tuple(int(side) for side in entry["shape"])
            places[name] = Place(path.name, start + first, last - first, _DTYPES[entry["dtype"]], shape)
    return places


def mapped_tensors(folder: Path, files: list[str]) -> dict[str, NpArray]:
    """Read-only views of all tensors in safetensors files; those of a later file hide those of an earlier one."""
    places: dict[str, Place] = {}
    for name in files:
        places |= safetensors_places(folder / name)
    return _views(folder, places)


def _views(folder: Path, places: Mapping[str, Place]) -> dict[str, NpArray]:
    maps = {name: _mapped(folder / name) for name in {place.file for place in places.values()}}
    return {
        name: np.frombuffer(maps[p.file], p.dtype, int(np.prod(p.shape)), p.offset).reshape(p.shape)
        for name, p in places.items()
    }


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
