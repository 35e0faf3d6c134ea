"""The ``.pet`` file, format version 1: one delta as strict safetensors with one canonical manifest.

The format is docs/spec/pack-v1.md; this file, ``planes`` and ``layout`` are that page in code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from edgepet.canonical import canonical_json, parse_json
from edgepet.deltas.codes import Range
from edgepet.deltas.delta import Delta, Head, Int8Ranges, Score
from edgepet.errors import InputError, PackError
from edgepet.files import read_file, write_file
from edgepet.packs.layout import Reader
from edgepet.packs.planes import Planes, write_branches, write_updates
from edgepet.spec import FilePath, NpArray, read_preprocess
from edgepet.strict import ObjectReader

Codec: TypeAlias = Literal["fp32", "fp16"]
CODECS: dict[Codec, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}
FORMAT, VERSION = "edgepet-pack", 1
MAX_HEADER_BYTES = 1 << 20
LEAST_SCALE, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # runtimes take float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A delta as it was read: ``delta`` holds the stored precision, ``bytes_by_kind`` the bytes of every plane."""

    delta: Delta
    codec: Codec
    size_bytes: int
    sha256: str
    bytes_by_kind: Mapping[str, int]


def encode_pack(delta: Delta, *, codec: Codec = "fp16") -> bytes:
    """The pack of ``delta``; the same delta gives the same bytes.

    Raises:
        InputError: a value is not finite in ``codec``.
    """
    planes = Planes(delta.task, CODECS[codec])
    updates, branches = write_updates(delta.updates, planes), write_branches(delta.branches, planes)
    tensors = planes.tensors()
    tensors["head.weight"] = planes.cast(delta.head.weight, "head.weight")
    tensors["head.bias"] = planes.cast(delta.head.bias, "head.bias")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "task": delta.task,
        "codec": codec,
        "backbone": {"name": delta.backbone, "fingerprint": delta.fingerprint},
        "updates": updates,
        "branches": branches,
        "labels": list(delta.labels),
        "preprocess": delta.preprocess.as_json(),
        "method": {"name": delta.method, "settings": dict(delta.settings)},
        "training": dict(delta.training),
        "val": {"top1": delta.val.top1, "n": delta.val.n},
        "licences": list(delta.licences),
    }
    if delta.int8 is not None:
        manifest["int8"] = {"codes": delta.int8.codes, "ranges": [[r.scale, r.shift] for r in delta.int8.ranges]}
    return _container(tensors, canonical_json(manifest).decode("utf-8"))


def write_pack(path: FilePath, delta: Delta, *, codec: Codec = "fp16") -> int:
    """Write ``delta`` to ``path`` and return the file's size in bytes.

    Raises:
        InputError: a value is not finite in ``codec``, or the file cannot be written.
        PackError: readers would refuse it; nothing is written.
    """
    data = encode_pack(delta, codec=codec)
    read_pack(data)  # what a device would refuse is not written
    write_file(Path(path), data)
    return len(data)


def read_pack(source: Path | str | bytes) -> Pack:
    """Read a pack without any knowledge of its backbone, and refuse whatever version 1 does not know.

    Raises:
        PackError: it is not a pack of version 1 in the one canonical spelling of its tensors and manifest.
        InputError: the file cannot be read.
    """
    where = "pack" if isinstance(source, bytes) else Path(source).name
    data = source if isinstance(source, bytes) else read_file(Path(source))
    tensors, manifest = _open_container(data, where)
    try:
        delta, codec = _read_manifest(manifest, tensors, where)
    except InputError as error:
        raise error if isinstance(error, PackError) else PackError(where, str(error)) from error
    return Pack(
        delta=delta,
        codec=codec,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        bytes_by_kind={name: int(tensor.nbytes) for name, tensor in sorted(tensors.items())},
    )


# ---------------------------------------------------------------------------------------------------- the container


def _container(tensors: Mapping[str, NpArray], manifest: str) -> bytes:
    data: bytes = safetensors.numpy.save(dict(tensors), metadata={"edgepet": manifest})
    return data


def _open_container(data: bytes, where: str) -> tuple[dict[str, NpArray], object]:
    start = data[:8]
    length = int.from_bytes(start, "little")
    if len(start) == 8 and MAX_HEADER_BYTES < length <= len(data) - 8:
        raise PackError(where, f"must have a header of at most {MAX_HEADER_BYTES} bytes", got=length)
    if len(start) < 8 or length > len(data) - 8:
        raise PackError(
            where, "is not a pack or is cut short", got=f"{len(data)} bytes", fix="copy the file again, whole"
        )
    try:
        header = ObjectReader(parse_json(data[8 : 8 + length]), where)
        tensors: dict[str, NpArray] = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise PackError(where, "is not a pack or is cut short", got=error, fix="copy the file again, whole") from error
    except KeyError as error:  # safetensors knows number formats that NumPy has no name for
        raise PackError(where, "holds a number format that no pack has", got=error) from error
    except (ValueError, RecursionError) as error:
        raise PackError(where, "has no readable header", got=error, fix="copy the file again, whole") from error
    text = header.nested("__metadata__").text("edgepet")
    # Safetensors readers accept duplicate names, leading spaces and unknown fields; two readings of one signed file
    # must not differ, so only the one canonical spelling is a pack.
    if _container(tensors, text) != data:
        raise PackError(where, "is not written in the canonical form", fix="write it again with edgepet")
    try:
        manifest = parse_json(text)
        canonical = canonical_json(manifest).decode("utf-8") == text
    except (ValueError, RecursionError) as error:
        raise PackError(where, "has no readable manifest", got=error) from error
    if not canonical:
        raise PackError(where, "has a manifest that is not canonical JSON", fix="write it again with edgepet")
    return tensors, manifest


# --------------------------------------------------------------------------------------------------------- reading


def _read_manifest(value: object, tensors: dict[str, NpArray], where: str) -> tuple[Delta, Codec]:
    table = ObjectReader(value, where)
    table.text("format", choices=[FORMAT])
    if table.integer("version") != VERSION:
        raise PackError(
            f"{where}.version",
            f"this edgepet reads version {VERSION}",
            got=table.integer("version"),
            fix="update edgepet",
        )
    codec = cast(Codec, table.text("codec", choices=list(CODECS)))
    reader = Reader(tensors, np.dtype(CODECS[codec]), where)
    updates = tuple(itertools.chain.from_iterable(map(reader.updates, table.nested_list("updates"))))
    branches = tuple(itertools.chain.from_iterable(map(reader.branches, table.nested_list("branches"))))
    head = Head(weight=reader.whole("head.weight", axes=2), bias=reader.whole("head.bias", axes=1))
    reader.end()
    backbone, method, val = table.nested("backbone"), table.nested("method"), table.nested("val")
    delta = Delta(
        task=table.text("task"),
        backbone=backbone.text("name"),
        fingerprint=backbone.text("fingerprint"),
        updates=updates,
        branches=branches,
        head=head,
        labels=table.texts("labels"),
        preprocess=read_preprocess(table.nested("preprocess")),
        method=method.text("name"),
        settings=_provenance(method, "settings"),
        training=_provenance(table, "training"),
        val=Score(top1=val.number("top1"), n=val.integer("n")),
        licences=table.texts("licences"),
        int8=_int8(table.nested("int8")) if "int8" in table.names() else None,
    )
    for part in (backbone, method, val, table):
        part.end()
    return delta, codec


def _int8(table: ObjectReader) -> Int8Ranges:
    ranges = []
    for index, pair in enumerate(table.sequence("ranges")):
        numbers = isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, float) and isfinite(n) for n in pair)
        if not numbers or not LEAST_SCALE <= pair[0] <= MOST or abs(pair[1]) > MOST:
            what = "needs a scale above 0 and a shift, both finite float32 numbers with a decimal point"
            raise PackError(f"{table.where}.ranges[{index}]", what, got=json.dumps(pair)[:80])
        ranges.append(Range(scale=pair[0], shift=pair[1]))
    codes = table.text("codes")
    if re.fullmatch("[0-9a-f]{64}", codes) is None:
        raise PackError(f"{table.where}.codes", "needs a sha256 of 64 digits", got=repr(codes[:80]))
    table.end()
    return Int8Ranges(codes=codes, ranges=tuple(ranges))


def _provenance(table: ObjectReader, key: str) -> dict[str, object]:
    value = table.raw(key)
    if not isinstance(value, dict):
        raise PackError(f"{table.where}.{key}", "needs an object", got=json.dumps(value))
    return value
