"""How the numbers of a plane are stored: in fp32 or fp16, or as small integers times a scale that a group shares.

docs/spec/pack-v1.md, "Codecs", in code. Decoding is one product of a code and a scale, which is exact in binary32, and
for ``scale.s`` one addition: no library's sums are in it, so that a pack means the same bits wherever it is read.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from edgepet.errors import InputError, PackError, option
from edgepet.spec import NpArray
from edgepet.strict import ObjectReader

Codec: TypeAlias = Literal["fp32", "fp16", "int8", "int4", "int2"]
Rounding: TypeAlias = Literal["fp32", "fp16"]  # without codes: what numbers are when a training or an import ends
Format: TypeAlias = Codec | Literal["int32", "bits"]  # what a plane may be stored as

CODECS: tuple[Codec, ...] = ("fp32", "fp16", "int8", "int4", "int2")
FORMATS: tuple[Format, ...] = (*CODECS, "int32", "bits")
GROUPS: dict[Format, int] = {"int8": 512, "int4": 128, "int2": 64}  # values of a scale, where nothing else is asked
HEADS, HEAD_GROUP = "head.", 64  # planes of heads, whose layers are of unlike sizes: a small one has scales of its own

_TYPES: dict[Format, np.dtype[np.generic]] = {
    "fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int32": np.dtype("<i4"), "bits": np.dtype(np.uint8),
}  # fmt: skip
_BITS: dict[Format, int] = {"int8": 8, "int4": 4, "int2": 2}
_MOST_VALUES = (1 << 31) - 1
_SMALL, _ENTRY = 64, 40  # values that are not worth codes; bytes that the manifest takes to say how a plane is packed
_CLIPS = np.geomspace(1.0, 0.02, 48)  # parts of the largest value of a group that a scale is tried for
_LEAST_SCALE, _MOST_SCALE = np.float16(2.0**-24), 65504.0  # the smallest binary16 above 0, and the largest
_AT_ONCE, _UNPACKED_AT_ONCE = 1 << 20, 1 << 14  # values that a scale is sought for together, or unpacked


@dataclass(frozen=True, slots=True)
class Coding:
    """A format, and of codes how many neighbouring values share a scale."""

    format: Format
    group: int = 0

    @classmethod
    def of(cls, codec: Codec, plane: str = "") -> Coding:
        """A codec with its usual group in ``plane``."""
        group = GROUPS.get(codec, 0)
        return cls(codec, min(group, HEAD_GROUP) if plane.startswith(HEADS) else group)

    @property
    def has_codes(self) -> bool:
        """Whether values are codes times a scale."""
        return self.format in _BITS

    @property
    def levels(self) -> int:
        """The largest code: 127 of int8, 7 of int4. The four codes of int2 stand for -3, -1, 1 and 3."""
        return 3 if self.format == "int2" else (1 << (_BITS[self.format] - 1)) - 1

    def stored_bytes(self, values: int) -> int:
        """Of ``values`` values, before entropy is removed; of bits, ``values`` is the number of bytes."""
        if not self.has_codes:
            return values * _TYPES[self.format].itemsize
        return 2 * -(-values // self.group) + -(-values * _BITS[self.format] // 8)

    def decoded_bytes(self, plane: str, values: int) -> int:
        """What they take as arrays."""
        if self.format == "bits":
            return 8 * values
        return values * (2 if self.format == "fp16" and not is_offset(plane) else 4)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file says of a plane: how it is coded, how many values it has, and whether it is a deflate stream."""

    coding: Coding
    values: int
    packed: bool

    def as_json(self) -> list[object]:
        """The manifest's entry of a plane that is ``packed``."""
        return [self.coding.format, self.values, *([self.coding.group] if self.coding.has_codes else [])]


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """A plane: what the file says of it, its tensor in the file, and the decoded values, or those to be stored."""

    stored: Stored
    tensor: NpArray
    values: NpArray


def is_offset(plane: str) -> bool:
    """Whether what is stored of a plane, in any format but fp32, is its difference from one: scales lie around it."""
    return plane == "scale.s"


# ----------------------------------------------------------------------------------------------------------- reading


def read_stored(codecs: ObjectReader, name: str, tensor: NpArray, where: str) -> Stored:
    """What the manifest's ``codecs`` say of a plane, or else the type of its tensor. Nothing is decoded yet.

    Raises:
        PackError: the entry is none, or the tensor none of a pack.
    """
    if tensor.ndim != 1:
        raise PackError(f"{where}: {name}", "needs one axis", got=tensor.ndim)
    if not codecs.has(name):
        plain = {kind: told for told, kind in _TYPES.items()}
        if tensor.dtype not in plain:
            raise PackError(f"{where}: {name}", "holds a number format that no pack has", got=tensor.dtype.name)
        return Stored(Coding(plain[tensor.dtype]), tensor.size, packed=False)
    entry = codecs.sequence(name)
    numbers = [each for each in entry[1:] if isinstance(each, int) and not isinstance(each, bool)]
    known = bool(entry) and entry[0] in FORMATS and len(entry) == (3 if entry[0] in _BITS else 2)
    if not known or len(numbers) != len(entry) - 1 or not all(0 < each <= _MOST_VALUES for each in numbers):
        what = f"needs a format of {', '.join(FORMATS)}, how many values there are, and of codes how many share a scale"
        raise PackError(f"{codecs.where}.{name}", what, got=f"{entry!r:.80}")
    if tensor.dtype != np.uint8:
        raise PackError(
            f"{where}: {name}", "needs bytes, for the manifest says how it is packed", got=tensor.dtype.name
        )
    return Stored(Coding(entry[0], *numbers[1:]), numbers[0], packed=True)


def read_plane(name: str, tensor: NpArray, stored: Stored, where: str) -> Plane:
    """The plane of a tensor, decoded.

    Raises:
        PackError: it does not hold what ``stored`` says.
    """
    place, coding, values = f"{where}: {name}", stored.coding, stored.values
    if not stored.packed:
        return Plane(stored, tensor, decode(name, tensor.tobytes(), coding, values, place))
    stream = inflated(tensor.tobytes(), coding.stored_bytes(values), place)
    return Plane(stored, tensor, decode(name, stream, coding, values, place))


def decode(plane: str, stream: bytes, coding: Coding, values: int, where: str) -> NpArray:
    """The values of a plane, (values,): float16 or float32, int32 or, of bits, bytes.

    Args:
        stream: ``coding.stored_bytes(values)`` bytes.

    Raises:
        PackError: a code or a scale that the format does not have.
    """
    if coding.has_codes:
        made = _decode_codes(stream, coding, values, where)
    else:
        stored = np.frombuffer(stream, _TYPES[coding.format])
        made = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    if is_offset(plane) and coding.format != "fp32" and made.dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # what is not finite is refused by who reads the layout
            made = made.astype(np.float32) + np.float32(1)
    return made


def _decode_codes(stream: bytes, coding: Coding, values: int, where: str) -> NpArray:
    groups = -(-values // coding.group)
    scales = np.frombuffer(stream, "<f2", groups)
    if not np.isfinite(scales).all() or np.signbit(scales).any():
        raise PackError(where, "needs scales that are finite and not below 0")
    packed, bits = np.frombuffer(stream, np.uint8, offset=2 * groups), _BITS[coding.format]
    each, made = 8 // bits, np.empty(values, np.float32)
    for start in range(0, values, _UNPACKED_AT_ONCE):
        end = min(start + _UNPACKED_AT_ONCE, values)
        codes = _unpacked(packed[start // each : -(-end // each)], bits)
        if codes[end - start :].any():
            raise PackError(where, "needs zeros behind the last of its codes")
        codes = codes[: end - start]
        if bits > 2 and (codes == -(1 << (bits - 1))).any():
            raise PackError(where, f"needs codes of {-coding.levels} to {coding.levels}")
        steps = 2 * codes + 1 if coding.format == "int2" else codes
        made[start:end] = steps * scales[np.arange(start, end) // coding.group].astype(np.float32)
    return made


def _unpacked(packed: NpArray, bits: int) -> NpArray:
    """Two's complement codes, int8, the lowest bits of a byte first."""
    if bits == 8:
        return packed.view(np.int8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[:, None] >> shifts) & ((1 << bits) - 1)
    unsigned = parts.reshape(-1).astype(np.int8)
    half = 1 << (bits - 1)
    made: NpArray = (unsigned ^ half) - half
    return made


# ----------------------------------------------------------------------------------------------------------- writing


def write_plane(name: str, values: NpArray, asked: Codec | Coding, task: str, weights: NpArray | None = None) -> Plane:
    """The plane of ``values`` (n,), packed where that makes the file smaller.

    Permutations, bits and their two levels, and what is too small to be worth codes are not coded, whatever is
    ``asked``. ``weights`` as ``encode`` takes them.

    Raises:
        InputError: a value that is not finite, or that the codec cannot hold.
    """
    coding = _coding(name, values, asked)
    stream = encode(name, values, coding, task, weights)
    packed = deflated(stream)
    if not coding.has_codes and len(stream) <= len(packed) + _ENTRY:
        plain = np.frombuffer(stream, _TYPES[coding.format])
        return Plane(Stored(coding, values.size, packed=False), plain, values)
    return Plane(Stored(coding, values.size, packed=True), np.frombuffer(packed, np.uint8), values)


def as_stored(name: str, values: NpArray, asked: Codec, task: str) -> NpArray:
    """What a reader makes of ``values`` (n,), float32; arguments and errors as of ``write_plane``."""
    plane = write_plane(name, values, asked, task)
    return read_plane(name, plane.tensor, plane.stored, task).values


def _coding(name: str, values: NpArray, asked: Codec | Coding) -> Coding:
    if values.dtype.kind != "f":
        return Coding("bits" if values.dtype == np.uint8 else "int32")
    coding = asked if isinstance(asked, Coding) else Coding.of(asked, name)
    exact = values.size < _SMALL or name.endswith(".levels")
    return Coding("fp16") if coding.has_codes and exact else coding


def encode(plane: str, values: NpArray, coding: Coding, task: str, weights: NpArray | None = None) -> bytes:
    """``values`` (n,) as ``decode`` reads them.

    Args:
        task: for the message.
        weights: how much the square of each value's error counts, of its shape; all the same where it is None.

    Raises:
        InputError: a value that is not finite, or that the format cannot hold.
    """
    if coding.format in ("int32", "bits"):
        return values.astype(_TYPES[coding.format]).tobytes()
    precise = values.astype(np.float64)
    if is_offset(plane) and coding.format != "fp32":
        precise = precise - 1
    with np.errstate(over="ignore", invalid="ignore"):
        if not coding.has_codes:
            stored = precise.astype(_TYPES[coding.format])
            if np.isfinite(stored).all():
                return stored.tobytes()
        elif np.abs(precise).max(initial=0) <= coding.levels * _MOST_SCALE:  # no NaN is
            scales, codes = _codes(precise, coding, weights)
            return scales.tobytes() + _packed(codes, _BITS[coding.format])
    raise InputError(
        f"{task}: {plane}",
        f"holds a value that {coding.format} cannot",
        got=f"largest magnitude {np.abs(values).max():.3g}",
        fix=f"store it with {option('codec', 'fp32')}, or train with a smaller learning rate if it is not finite",
    )


def _codes(values: NpArray, coding: Coding, weights: NpArray | None) -> tuple[NpArray, NpArray]:
    """A scale for each group, float16, and the codes, int8, of the smallest weighted square of errors."""
    groups = -(-values.size // coding.group)
    scales, codes = np.empty(groups, "<f2"), np.empty(groups * coding.group, np.int8)
    at_once = max(1, _AT_ONCE // coding.group)
    for first in range(0, groups, at_once):
        here = slice(first * coding.group, (first + at_once) * coding.group)
        given = _rows(values[here], coding.group)
        counts = _rows(np.ones(values[here].size) if weights is None else weights[here], coding.group)
        found = _best(given, counts, coding)
        scales[first : first + at_once], codes[here] = found[0], found[1].reshape(-1)
    return scales, codes[: values.size]


def _rows(values: NpArray, group: int) -> NpArray:
    whole = np.zeros(-(-values.size // group) * group)
    whole[: values.size] = values.reshape(-1)
    return whole.reshape(-1, group)


def _best(values: NpArray, weights: NpArray, coding: Coding) -> tuple[NpArray, NpArray]:
    largest = np.abs(values).max(1)
    least = np.inf * np.ones(len(values))
    scales, codes = np.zeros(len(values), "<f2"), np.zeros(values.shape, np.int8)
    for part in _CLIPS:
        scale = np.maximum((largest * part / coding.levels).astype("<f2"), _LEAST_SCALE * (largest > 0)).astype("<f2")
        step = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
        if coding.format == "int2":
            code = np.clip(np.floor(values / (2 * step)), -2, 1)
            steps = 2 * code + 1
        else:
            code = steps = np.clip(np.rint(values / step), -coding.levels, coding.levels)
        error = (weights * (steps * scale.astype(np.float64)[:, None] - values) ** 2).sum(1)
        better = error < least
        least[better], scales[better], codes[better] = error[better], scale[better], code[better]
    return scales, codes


def _packed(codes: NpArray, bits: int) -> bytes:
    if bits == 8:
        return codes.tobytes()
    each = 8 // bits
    whole = np.zeros(-(-codes.size // each) * each, np.uint8)
    whole[: codes.size] = codes.view(np.uint8) & ((1 << bits) - 1)
    made = np.zeros(whole.size // each, np.uint8)
    for place in range(each):
        made |= whole[place::each] << (bits * place)
    return made.tobytes()


# ---------------------------------------------------------------------------------------------------------- entropy


def deflated(stream: bytes) -> bytes:
    """``stream`` as raw deflate (RFC 1951), without a header or a checksum."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    return packer.compress(stream) + packer.flush()


def inflated(data: bytes | memoryview, size: int, where: str) -> bytes:
    """What ``deflated`` was given, which must be ``size`` bytes; never more than one byte beyond them is made.

    Raises:
        PackError: it is not raw deflate of so many bytes, and of nothing behind them.
    """
    reader = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        made = reader.decompress(data, size + 1)
    except zlib.error as error:
        raise PackError(where, "is no deflate stream", got=error) from error
    if len(made) != size or not reader.eof or reader.unused_data:
        behind = f", and {len(reader.unused_data)} behind them" if reader.unused_data else ""
        got = f"more than {size}" if len(made) > size else f"{len(made)}{behind}"
        raise PackError(where, f"must hold {size} bytes", got=got)
    return made
