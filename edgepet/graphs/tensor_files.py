"""Tensors where they lie: places in safetensors files, views of them that are mapped, not read, and what of an ONNX
graph points there.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.canonical import parse_json
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import TensorProto

_VALUES = ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")
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


def point_into(tensor: TensorProto, file: str, offset: int, length: int) -> None:
    """Let an ``onnx.TensorProto`` have its value in ``file``, beside its model, and none of its own."""
    for field in _VALUES:
        tensor.ClearField(field)
    del tensor.external_data[:]
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def put_inside(tensor: TensorProto, value: NpArray) -> None:
    """Let an ``onnx.TensorProto`` hold ``value``, of its own type and shape, and point into no file."""
    del tensor.external_data[:]
    tensor.data_location = tensor.DEFAULT
    tensor.raw_data = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()


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
