"""The bytes of a ``.pet`` file: strict safetensors with one canonical manifest, and the place of its signature.

docs/spec/pack-v1.md, "Container", in code. What the planes mean is ``codecs`` and ``layout``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.numpy
from safetensors import SafetensorError

from edgepet.canonical import canonical_json, parse_json
from edgepet.errors import PackError
from edgepet.spec import NpArray
from edgepet.strict import ObjectReader

MAX_HEADER_BYTES = 1 << 20
UNSIGNED = "0" * 128  # the digits of a pack that nobody has signed

_START = b'{"__metadata__":{"edgepet":"{\\"auth\\":\\"'  # of every header; the digits of the signature follow
_DIGITS = slice(8 + len(_START), 8 + len(_START) + len(UNSIGNED))
_AGAIN, _WHOLE = "write it again with edgepet", "copy the file again, whole"


@dataclass(frozen=True, slots=True)
class Container:
    """A file taken apart: its tensors, the manifest, how long its header is, and the digits of its signature."""

    tensors: Mapping[str, NpArray]
    manifest: object
    header_bytes: int
    signature: str


def assembled(tensors: Mapping[str, NpArray], manifest: Mapping[str, object]) -> bytes:
    """The file of these tensors and this manifest, which nobody has signed.

    Raises:
        PackError: its header would be longer than a reader takes.
    """
    text = canonical_json({**manifest, "auth": UNSIGNED}).decode("utf-8")
    data = _container(tensors, text)
    _require_header(data, str(manifest.get("task", "pack")))
    return data


def signature_of(data: bytes, where: str = "pack") -> str:
    """The digits of the signature, from the bytes alone: no JSON is parsed.

    Raises:
        PackError: the file does not begin as a pack of version 1 does, or the digits are no 128 lower-case hex digits.
    """
    digits = data[_DIGITS].decode("latin-1")
    if data[8 : _DIGITS.start] != _START:
        if is_old(data):
            raise PackError(where, "was written before version 1 was final", fix=f"edgepet pack {where} -o NEW.pet")
        raise PackError(where, "is not a pack or is cut short", got=f"{len(data)} bytes", fix=_WHOLE)
    if re.fullmatch("[0-9a-f]{128}", digits) is None or data[_DIGITS.stop : _DIGITS.stop + 2] != b'\\"':
        raise PackError(f"{where}.auth", "needs a signature of 128 digits from 0 to f", got=repr(digits[:80]))
    return digits


def signed_bytes(data: bytes) -> bytes:
    """What a signature is of: the file with its own digits zeroed."""
    return data[: _DIGITS.start] + UNSIGNED.encode() + data[_DIGITS.stop :]


def with_signature(data: bytes, digits: str) -> bytes:
    """The file with ``digits`` in the place of its signature."""
    return data[: _DIGITS.start] + digits.encode() + data[_DIGITS.stop :]


def taken_apart(data: bytes, where: str) -> Container:
    """Tensors and manifest of a file, in the one spelling that they have.

    Raises:
        PackError: it is no pack, or not in the canonical form.
    """
    length = _require_header(data, where)
    signature = signature_of(data, where)
    try:
        header = ObjectReader(parse_json(data[8 : 8 + length]), where)
        tensors: dict[str, NpArray] = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise PackError(where, "is not a pack or is cut short", got=error, fix=_WHOLE) from error
    except KeyError as error:  # safetensors knows number formats that NumPy has no name for
        raise PackError(where, "holds a number format that no pack has", got=error) from error
    except (ValueError, RecursionError) as error:
        raise PackError(where, "has no readable header", got=error, fix=_WHOLE) from error
    text = header.nested("__metadata__").text("edgepet")
    # Safetensors readers accept duplicate names, leading spaces and unknown fields; two readings of one signed file
    # must not differ, so only the one canonical spelling is a pack.
    if _container(tensors, text) != data:
        raise PackError(where, "is not written in the canonical form", fix=_AGAIN)
    return Container(tensors, canonical_value(text, where, "manifest"), length, signature)


def canonical_value(text: str | bytes, where: str, what: str) -> object:
    """The JSON value of ``text``, which must be its canonical spelling; ``what`` it is, for the message.

    Raises:
        PackError: it is no JSON, or spelled otherwise.
    """
    try:
        value = parse_json(text)
        canonical = canonical_json(value) == (text if isinstance(text, bytes) else text.encode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PackError(where, f"has no readable {what}", got=error) from error
    if not canonical:
        raise PackError(where, f"has a {what} that is not canonical JSON", fix=_AGAIN)
    return value


def is_old(data: bytes) -> bool:
    """Whether a file begins as packs did before version 1 was final: without a signature."""
    return data[8:].startswith(b'{"__metadata__":{"edgepet":"{\\"backbone')


def _container(tensors: Mapping[str, NpArray], manifest: str) -> bytes:
    data: bytes = safetensors.numpy.save(dict(tensors), metadata={"edgepet": manifest})
    return data


def _require_header(data: bytes, where: str) -> int:
    start = data[:8]
    length = int.from_bytes(start, "little")
    if len(start) == 8 and MAX_HEADER_BYTES < length <= len(data) - 8:
        raise PackError(where, f"must have a header of at most {MAX_HEADER_BYTES} bytes", got=length)
    if len(start) < 8 or length > len(data) - 8:
        raise PackError(where, "is not a pack or is cut short", got=f"{len(data)} bytes", fix=_WHOLE)
    return length
