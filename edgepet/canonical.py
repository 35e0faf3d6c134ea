"""One byte string for one meaning: canonical JSON, and digests of named tensors."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np

from edgepet.spec import NpArray, Tensors

_MOST_DIGITS = 20  # no reader elsewhere has longer ones


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; NaN and infinities are a ``ValueError``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON without duplicate keys, NaN, infinities or integers of more than 20 digits; all else is a ``ValueError``."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key appears twice")
        return table

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else no_constant(digits)

    def short(text: str) -> int:
        count = len(text.lstrip("-"))
        if count > _MOST_DIGITS:
            raise ValueError(f"an integer has {count} digits")
        return int(text)

    return json.loads(text, object_pairs_hook=no_twins, parse_constant=no_constant, parse_float=finite, parse_int=short)


def sha256_tensors(tensors: Tensors) -> str:
    """Hex sha256 of names, shapes and values, whatever the order of names, the file format or the memory layout.

    Floating-point tensors are hashed as little-endian float32, whatever precision they were read in.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _plain(tensors[name])
        digest.update(canonical_json([name, tensor.dtype.str, list(tensor.shape)]))
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def backbone_fingerprint(tensors: Tensors) -> str:
    """What a delta is bound to: ``sha256:`` and 64 hex digits, ``sha256_tensors`` of the backbone's.

    Args:
        tensors: the whole state dict at the native image size, classifier left out. A batch norm's
            ``num_batches_tracked`` is left out here: it counts training steps and no forward pass reads it.
    """
    return "sha256:" + sha256_tensors({n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")})


def _plain(tensor: NpArray) -> NpArray:
    dtype = np.dtype("<f4") if tensor.dtype.kind == "f" else tensor.dtype.newbyteorder("<")
    return np.asarray(tensor, dtype=dtype, order="C")  # ascontiguousarray would turn a scalar into a vector
