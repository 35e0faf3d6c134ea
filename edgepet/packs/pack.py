"""The ``.pet`` file, format version 1: one delta, bound to its backbone, as data of a few kilobytes.

The format is docs/spec/pack-v1.md; this file and its siblings are that page in code: ``container`` the bytes,
``codecs`` the numbers, ``planes`` and ``layout`` where each of them belongs, ``manifest`` all the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import ANSWERS
from edgepet.deltas.updates import generated_bytes
from edgepet.errors import InputError, PackError
from edgepet.files import read_file, write_file
from edgepet.packs.codecs import CODECS, Codec, Coding, Format, Plane, deflated, write_plane
from edgepet.packs.container import UNSIGNED, assembled, taken_apart
from edgepet.packs.manifest import (
    CORRECTED,
    CORRECTIONS,
    EXACT,
    HEAD,
    LAYOUT,
    PROBES,
    RANGES,
    Decoded,
    planes_bytes,
    read_manifest,
    write_manifest,
)
from edgepet.packs.map_heads import write_map_head
from edgepet.packs.planes import Planes, write_branches, write_updates
from edgepet.spec import FilePath, NpArray, StoredPrecision

EVERY = ("class", *ANSWERS)  # what heads of version 1 answer

PackCodec: TypeAlias = Codec | Literal["mixed"]

_UNROUNDED: frozenset[Format] = frozenset(("fp32", "int32", "bits"))
_NOTHING: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A delta as it was read.

    ``delta`` holds what the stored numbers stand for, ``planes`` both of them, ``bytes_by_kind`` what each takes in the
    file. ``codec`` is the one of all floating-point planes, or "mixed". ``signature`` are its digits, None unsigned.
    """

    delta: Delta
    codec: PackCodec
    planes: Mapping[str, Plane]
    size_bytes: int
    sha256: str
    bytes_by_kind: Mapping[str, int]
    sequence: int = 0
    signature: str | None = None

    @property
    def rounding(self) -> StoredPrecision:
        """The coarsest that its numbers were rounded to: "int8" stands for codes of any size."""
        formats = {plane.stored.coding.format for plane in self.planes.values()}
        return "fp32" if formats <= _UNROUNDED else "fp16" if formats <= _UNROUNDED | {"fp16"} else "int8"


def encode_pack(
    delta: Delta,
    *,
    codec: Codec = "fp16",
    codings: Mapping[str, Coding] = _NOTHING,
    weights: Mapping[int, NpArray] = _NOTHING,
    kept: Mapping[str, Plane] = _NOTHING,
    sequence: int = 0,
) -> bytes:
    """The pack of ``delta``, which nobody has signed; the same delta gives the same bytes with one version of zlib.

    Args:
        codec: of every plane of floating-point numbers that ``codings`` does not name.
        weights: for an array, by its ``id``, how much the square of each value's error counts; all the same by default.
        kept: planes of a pack that was read: where ``delta`` still has their values, they are stored as they were.
        sequence: of two packs of a task the later one has the larger number.

    Raises:
        InputError: a value that its codec cannot hold.
        PackError: the header would be longer than a reader takes.
    """
    planes = Planes()
    layout = {"branches": write_branches(delta.branches, planes), "updates": write_updates(delta.updates, planes)}
    point: dict[str, object] = {
        name: [planes.place(f"{HEAD}.{name}", array), 0, *array.shape]
        for name, array in (("bias", delta.head.bias), ("weight", delta.head.weight))
        if delta.labels
    }
    maps = [write_map_head(each, planes) for each in delta.heads]
    flat, counts = planes.flat(), planes.spread(weights)
    if delta.int8 is not None:
        flat[RANGES] = np.array([(each.scale, each.shift) for each in delta.int8.ranges], np.float32).reshape(-1)
        flat |= {CORRECTIONS: np.array(delta.int8.corrections, np.float32)} if delta.int8.corrections else {}
    for precision, probe in delta.probes.items():
        flat[PROBES[delta.answers[0]][precision]] = probe.logits.astype(np.float32).reshape(-1)
    codings = {**codings, **dict.fromkeys(EXACT, Coding.of("fp32")), CORRECTIONS: Coding.of(CORRECTED)}
    made = {
        name: kept[name]
        if name in kept and np.array_equal(kept[name].values, values)
        else write_plane(name, values, codings.get(name, codec), delta.task, counts.get(name))
        for name, values in flat.items()
    }
    text = canonical_json(layout)
    told = Decoded(
        bytes=planes_bytes({name: plane.stored for name, plane in made.items()}) + generated_bytes(delta.updates),
        layout=len(text),
        tensors=planes.tensors,
        updates=len(delta.updates) + len(delta.branches),
    )
    packed = {LAYOUT: np.frombuffer(deflated(text), np.uint8)}
    tensors = packed | {name: plane.tensor for name, plane in made.items()}
    return assembled(tensors, write_manifest(delta, sequence, made, told, point, maps))


def write_pack(path: FilePath, delta: Delta, *, codec: Codec = "fp16", **given: Any) -> int:
    """Write ``delta`` to ``path`` and return the file's size in bytes; ``given`` as ``encode_pack`` takes it.

    Raises:
        InputError: a value that its codec cannot hold, or the file cannot be written.
        PackError: readers would refuse it; nothing is written.
    """
    data = encode_pack(delta, codec=codec, **given)
    read_pack(data, answers=EVERY)  # what a device would refuse is not written
    write_file(Path(path), data)
    return len(data)


def read_pack(source: Path | str | bytes, *, where: str | None = None, answers: Collection[str] = ("class",)) -> Pack:
    """Read a pack without any knowledge of its backbone, and refuse whatever version 1 does not know.

    Who signed it is not asked here: ``signatures.signer`` does. Messages name ``where``, by default the file. A task
    with a head whose answer is not among ``answers`` is refused: what asks for classes would run half of it.

    Raises:
        PackError: it is not a pack of version 1 in the one canonical spelling of its tensors and manifest, or asks for
            more memory than a pack of its length may; or a head of it answers otherwise.
        InputError: the file cannot be read.
    """
    where = where or ("pack" if isinstance(source, bytes) else Path(source).name)
    data = source if isinstance(source, bytes) else read_file(Path(source))
    parts = taken_apart(data, where)
    try:
        delta, planes, sequence = read_manifest(parts, where, len(data))
    except InputError as error:
        if isinstance(error, PackError):
            raise
        raise PackError(where, f"{error.where}: {error.what}", got=error.got, fix=error.fix) from error
    others = [answer for answer in delta.answers if answer not in answers]
    if others:
        fix = "`edgepet predict`, `edgepet device` and `edgepet eval` take it"
        raise PackError(f"{where}.heads", f"must answer {' or '.join(answers)} here", got=others[0], fix=fix)
    codecs = {plane.stored.coding.format for name, plane in planes.items() if name not in EXACT} & set(CODECS)
    return Pack(
        delta=delta,
        codec=cast(Codec, codecs.pop()) if len(codecs) == 1 else "mixed",
        planes=planes,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        bytes_by_kind={name: int(tensor.nbytes) for name, tensor in sorted(parts.tensors.items())},
        sequence=sequence,
        signature=None if parts.signature == UNSIGNED else parts.signature,
    )
