"""Data that a runtime derives and that can be made again: kept in a store by what it was made of and for.

<root>/cache/derived/<maker>-<subject>-<key>-<sha256>.bin     ``key`` is of everything that decides the bytes: the
                                                              content that they are of, the runtime's version, the
                                                              processor; ``maker`` is the runtime

A file is opened only where its bytes have the digest in its name; one with another key, of another processor say, is
thrown away when its subject is made again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from edgepet.bringing import clear_folder
from edgepet.canonical import canonical_json
from edgepet.device.costs import NAME as COST_NAME
from edgepet.device.kept import clear_merged
from edgepet.errors import EdgepetError
from edgepet.files import folder_bytes, made_folder, read_file, write_file

_NAME = re.compile(r"(?:[a-z0-9]{1,32}-)?([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{64})\.bin")  # once without a maker
_STAMP = re.compile(r".+\.json")


def derived(
    root: Path, maker: str, subject: str, made_of: Mapping[str, object], make: Callable[[], bytes]
) -> tuple[bytes, bool]:
    """The bytes that ``make`` gives for ``made_of``: from the cache of the store ``root`` where they are whole there.

    Where nothing can be written they are made each time.

    Args:
        maker: whose they are, a runtime's name.
        subject: what they are for; only its newest are kept.
        made_of: everything that decides them.

    Returns:
        The bytes, and whether they were there.
    """
    folder, digits, key = root / "cache" / "derived", f"{maker}-{_digits(subject)}", _digits(made_of)
    found = sorted(folder.glob(f"{digits}-{key}-*.bin")) if folder.is_dir() else []
    for path in found:
        match = _NAME.fullmatch(path.name)
        try:
            data = read_file(path)
        except EdgepetError:
            continue
        if match is not None and hashlib.sha256(data).hexdigest() == match[3]:
            return data, True
    data = make()
    ours = re.compile(rf"{digits}-[0-9a-f]{{16}}-[0-9a-f]{{64}}\.bin")
    try:
        name = f"{digits}-{key}-{hashlib.sha256(data).hexdigest()}.bin"
        write_file(
            made_folder(folder, "derived data are kept there", lasting=False) / name,
            data,
            read_only=True,
            lasting=False,
        )
        clear_folder(folder, ours, keep={name})
    except EdgepetError:
        pass
    return data, False


def derived_bytes(root: Path, maker: str) -> int:
    """Bytes on disk of what ``maker`` derived in the store ``root``."""
    folder, merged = root / "cache" / "derived", root / "cache" / "merged"
    found = sum(path.stat().st_size for path in folder.glob(f"{maker}-*.bin")) if folder.is_dir() else 0
    return found + (folder_bytes(merged) if maker == "onnxruntime" else 0)


def clear_cache(root: Path) -> int:
    """Throw away all derived data of the store ``root``, and the stamps of files. Returns the bytes that were freed."""
    before = folder_bytes(root / "cache")
    clear_folder(root / "cache" / "derived", _NAME)
    clear_merged(root)
    clear_folder(root / "cache" / "costs", COST_NAME)
    clear_folder(root / "cache" / "stamps", _STAMP)
    return before - folder_bytes(root / "cache")


def _digits(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]
