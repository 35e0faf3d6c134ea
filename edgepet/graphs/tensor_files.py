"""Tensors where they lie: places in safetensors files, views of them that are mapped, not read, and what of an ONNX
graph points there.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.canonical import parse_json
from edgepet.errors import InputError, refusing
from edgepet.files import read_file, require_regular
from edgepet.spec import NpArray
from edgepet.strict import ObjectReader

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

PAGE, LEAST_OUTSIDE = 4096, 1024  # in bytes: runtimes map files page by page, and what is small lies in the model
MOST_HEADER_BYTES = 100_000_000  # as safetensors' own readers have it
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
# onnx.TensorProto.data_type -> NumPy's type, of those whose values are their bytes.
_ONNX_DTYPES = {1: "<f4", 2: "|u1", 3: "|i1", 5: "<i2", 6: "<i4", 7: "<i8", 9: "|b1", 10: "<f2", 11: "<f8"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie: a file of the folder, an offset and a length in bytes; ``dtype`` is NumPy's."""

    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    def view(self, data: bytes | mmap.mmap) -> NpArray:
        """The tensor in ``data``, the whole file's bytes; nothing is copied."""
        return np.frombuffer(data, self.dtype, math.prod(self.shape), self.offset).reshape(self.shape)


def safetensors_places(path: Path) -> dict[str, Place]:
    """Offsets of every tensor in a safetensors file, counted from the start of the file.

    Raises:
        InputError: it cannot be read, or is not one whole safetensors file: a header that is cut or lies, a number
            format that is not known here, tensors that overlap, leave gaps or reach beyond the end.
    """
    require_regular(path)
    with refusing(path, "could not be read"), path.open("rb") as file:
        size = path.stat().st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > min(size, MOST_HEADER_BYTES):
            raise _not_whole(path, f"a header of {start - 8} bytes in a file of {size}")
        header = file.read(start - 8)
    try:
        table = ObjectReader(parse_json(header), str(path), error=InputError)
    except (ValueError, RecursionError) as error:
        raise _not_whole(path, error) from error
    names = [name for name in table.names() if name != "__metadata__"]
    places = {name: _place(table.nested(name), path, start) for name in names}
    end = start
    for place in sorted(places.values(), key=lambda place: (place.offset, place.length)):
        if place.offset != end:
            raise _not_whole(path, "tensors that overlap or leave gaps")
        end += place.length
    if end != size:
        raise _not_whole(path, f"{end} bytes of tensors in a file of {size}")
    return places


def _place(entry: ObjectReader, path: Path, start: int) -> Place:
    kind, shape, offsets = entry.text("dtype"), entry.integers("shape"), entry.integers("data_offsets")
    entry.end()
    if kind not in _DTYPES:
        raise InputError(entry.where, f"has a number format that is not one of {', '.join(_DTYPES)}", got=kind)
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize:
        raise InputError(entry.where, f"needs the bytes of {kind} {list(shape)}", got=f"offsets {list(offsets)}")
    return Place(path.name, start + offsets[0], offsets[1] - offsets[0], _DTYPES[kind], shape)


def _not_whole(path: Path, got: object) -> InputError:
    return InputError(str(path), "is no whole safetensors file", got=got, fix="delete it and make it again, or copy it")


def read_tensors(path: Path) -> dict[str, NpArray]:
    """All tensors of a safetensors file, in memory.

    Raises:
        InputError: as ``safetensors_places``.
    """
    places, data = safetensors_places(path), read_file(path)
    return {name: place.view(data) for name, place in places.items()}


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


def lightened(
    model: ModelProto, file: str, *, only: Collection[str] | None = None
) -> tuple[ModelProto, tuple[TensorProto, ...]]:
    """A copy of an ``onnx.ModelProto`` whose tensors point into ``file``, one behind the other, page by page.

    Small ones stay inside, and all but ``only`` these. ``model`` is not touched, and what points is not copied.

    Returns:
        The copy, and the tensors of ``model`` that point into the file, in their order there.
    """
    light = hollow(model)
    pointing, outside = [], []
    for tensor in model.graph.initializer:
        made = light.graph.initializer.add()
        if stored_bytes(tensor) < LEAST_OUTSIDE or (only is not None and tensor.name not in only):
            made.CopyFrom(tensor)
            continue
        made.name, made.data_type = tensor.name, tensor.data_type
        made.dims.extend(tensor.dims)
        pointing.append(made)
        outside.append(tensor)
    for made, (offset, tensor) in zip(pointing, laid_out(outside), strict=True):
        point_into(made, file, offset, stored_bytes(tensor))
    return light, tuple(outside)


def laid_out(tensors: Iterable[TensorProto]) -> Iterator[tuple[int, TensorProto]]:
    """Tensors with their offsets in a file of them, one behind the other, each where a page begins."""
    end = 0
    for tensor in tensors:
        offset = end + padding(end)
        yield offset, tensor
        end = offset + stored_bytes(tensor)


def hollow(model: ModelProto) -> ModelProto:
    """A copy of an ``onnx.ModelProto`` without initializers."""
    made = type(model)()
    _copy_fields(model, made, but="graph")
    _copy_fields(model.graph, made.graph, but="initializer")
    return made


def padding(offset: int) -> int:
    """Bytes between ``offset`` in a file and the tensor that lies behind it."""
    return -offset % PAGE


def stored_bytes(tensor: TensorProto) -> int:
    """Bytes that an ``onnx.TensorProto`` keeps as raw data, told without a copy of them; 0 where it keeps none so."""
    kind = _ONNX_DTYPES.get(tensor.data_type)
    return math.prod(tensor.dims) * np.dtype(kind).itemsize if kind and tensor.HasField("raw_data") else 0


def value_of(tensor: TensorProto) -> NpArray:
    """The value of an ``onnx.TensorProto`` that keeps it as raw data."""
    return np.frombuffer(tensor.raw_data, _ONNX_DTYPES[tensor.data_type]).reshape(tuple(tensor.dims))


def _copy_fields(source: ModelProto | GraphProto, made: ModelProto | GraphProto, *, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if field.is_repeated:
            getattr(made, field.name).extend(value)
        elif field.message_type is not None:
            getattr(made, field.name).CopyFrom(value)
        else:
            setattr(made, field.name, value)


def mapped_tensors(folder: Path, files: list[str]) -> dict[str, NpArray]:
    """Read-only views of all tensors in safetensors files; those of a later file hide those of an earlier one."""
    places: dict[str, Place] = {}
    for name in files:
        places |= safetensors_places(folder / name)
    return _views(folder, places)


def _views(folder: Path, places: Mapping[str, Place]) -> dict[str, NpArray]:
    maps = {name: _mapped(folder / name) for name in {place.file for place in places.values()}}
    return {name: place.view(maps[place.file]) for name, place in places.items()}


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
