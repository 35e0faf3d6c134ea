"""What slots cost of a run on this machine, as it was seen where a task ran both ways: kept in a store's cache."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from edgepet.canonical import canonical_json
from edgepet.errors import EdgepetError, InputError
from edgepet.files import made_folder, write_file
from edgepet.graphs.manifest import read_manifest

LEAST, MOST = 0.001, 0.9  # of a run: less is noise, more is no cost of slots
NAME = re.compile(r"[0-9a-f]{16}\.json")


def kept_cost(root: Path, of: Mapping[str, object]) -> float | None:
    """What slots cost of a run, a fraction, as was kept for ``of``; None where nothing, or nothing sensible, was."""
    path = _path(root, of)
    if not path.is_file():
        return None
    try:
        table = read_manifest(path, where=path.name, fix="delete it")
        cost = table.number("cost")
        table.end()
    except InputError:
        return None
    return cost if LEAST <= cost <= MOST else None


def keep_cost(root: Path, of: Mapping[str, object], *, slots_s: float, merged_s: float) -> float:
    """The cost that a run in slots and one merged show; it is kept where the disk can be written."""
    cost = min(MOST, max(LEAST, 1 - merged_s / slots_s))
    with contextlib.suppress(EdgepetError):
        path = _path(root, of)
        made_folder(path.parent, "what slots cost here is kept there", lasting=False)
        write_file(path, canonical_json({"cost": cost}), lasting=False)
    return cost


def _path(root: Path, of: Mapping[str, object]) -> Path:
    return root / "cache" / "costs" / f"{hashlib.sha256(canonical_json(of)).hexdigest()[:16]}.json"
