"""Merged networks that a store's cache keeps: weights folded, and the graph as the runtime has made it ready.

<root>/cache/merged/<key>/model.onnx      what ONNX Runtime made of the graph with the task's tensors
                          model.bin       its weights
                          kept.json       the digests of both; its time of change is when it was last opened

``key`` is of everything that decides the bytes: the pack, the graph's files, the runtime's version, the processor.
Files are compared with their digests as a backbone is, the large one where its stamp is another; whatever is wrong
with them, the network is folded and opened anew. They may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from edgepet.canonical import canonical_json
from edgepet.errors import EdgepetError
from edgepet.files import new_folder, write_file
from edgepet.graphs.manifest import listed_files, listing, read_manifest, require_whole

MOST, UNUSED_S = 4, 86_400.0  # networks of a store, and after how long without being opened one makes room
MODEL, WEIGHTS, MANIFEST = "model.onnx", "model.bin", "kept.json"
_FILES = (MODEL, WEIGHTS, MANIFEST)
_KEY = re.compile(r"[0-9a-f]{16}")


def kept_model(root: Path, made_of: Mapping[str, object], write: Callable[[Path], None]) -> Path | None:
    """The model file of a network, from the cache of the store ``root``, or as ``write`` writes it there.

    Args:
        made_of: everything that decides it.
        write: puts ``MODEL`` and ``WEIGHTS`` into a folder.

    Returns:
        None where nothing can be kept: no room beside networks that are used, or a disk that cannot be written.
    """
    place = root / "cache" / "merged" / hashlib.sha256(canonical_json(made_of)).hexdigest()[:16]
    if _is_whole(place):
        with contextlib.suppress(OSError):
            os.utime(place / MANIFEST)
        return place / MODEL
    if not _has_room(place):
        return None
    try:
        with new_folder(place, only=_FILES) as scratch:
            write(scratch)
            found = listing(scratch, (MODEL, WEIGHTS))
            entries = {name: {"sha256": digest, "bytes": size} for name, (digest, size) in found.items()}
            write_file(scratch / MANIFEST, canonical_json({"files": entries}), lasting=False)
    except (EdgepetError, OSError):
        return None
    return place / MODEL if _is_whole(place) else None


def clear_merged(root: Path) -> None:
    """Throw all of them away."""
    for place in _places(root / "cache" / "merged"):
        shutil.rmtree(place, ignore_errors=True)


def _is_whole(place: Path) -> bool:
    try:
        files = listed_files(read_manifest(place / MANIFEST, where=MANIFEST, fix=""), needs=(MODEL, WEIGHTS), may=())
        require_whole(place, files, stamped=(WEIGHTS,), fix="")
    except EdgepetError:
        return False
    return True


def _has_room(place: Path) -> bool:
    """Whether another one may be kept; one that nobody has opened for long makes room."""
    others = [each for each in _places(place.parent) if each != place]
    if len(others) < MOST:
        return True
    oldest, used = min(((each, _used(each)) for each in others), key=lambda pair: pair[1])
    if time.time() - used < UNUSED_S:
        return False
    shutil.rmtree(oldest, ignore_errors=True)
    return True


def _places(folder: Path) -> list[Path]:
    if not folder.is_dir() or folder.is_symlink():
        return []
    return [each for each in folder.iterdir() if _KEY.fullmatch(each.name) and each.is_dir() and not each.is_symlink()]


def _used(place: Path) -> float:
    try:
        return (place / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0
