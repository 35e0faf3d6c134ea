"""A manifest and the files that it lists: read strictly, checked by digest once, and by a stamp after that.

Whoever may write a manifest must not be able to name files outside of its folder, or to leave out the files whose
digests would be checked. A file's whole digest is compared when it enters a store or a cache, or when its stamp (size,
time of change, inode) is not the one that it had then; a stamp lies in the cache of the store, and goes with it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeAlias

from edgepet.canonical import canonical_json, parse_json
from edgepet.errors import EdgepetError, InputError
from edgepet.files import made_folder, read_file, sha256_file, write_file
from edgepet.strict import ObjectReader

Listed: TypeAlias = Mapping[str, tuple[str, int]]  # file name -> (hex sha256, size in bytes)

MOST_FILES = 64
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(path: Path, *, where: str, fix: str) -> ObjectReader:
    """The JSON object in ``path``; errors name ``where``.

    Raises:
        InputError: it cannot be read, or is no JSON object in one reading.
    """
    try:
        return ObjectReader(parse_json(read_file(path)), where, error=InputError)
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), "is not readable JSON", got=error, fix=fix) from error


def listed_files(table: ObjectReader, *, needs: Collection[str] = (), may: Collection[str] | None = None) -> Listed:
    """The files that a manifest lists under the key "files".

    Args:
        needs: names that must be among them.
        may: all other names that may; None is any.

    Raises:
        InputError: a name that leads out of the folder or is no plain one, a digest or size that is none, too many
            files, none, or a list that lacks one of ``needs``.
    """
    files = table.nested("files")
    names = files.names()
    if not 0 < len(names) <= MOST_FILES:
        raise InputError(files.where, f"needs between 1 and {MOST_FILES} files", got=len(names))
    found = {}
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise InputError(files.where, "names files of its own folder", got=repr(name[:80]))
        if may is not None and name not in (*needs, *may):
            raise InputError(files.where, f"knows {', '.join((*needs, *may))}", got=repr(name))
        entry = files.nested(name)
        digest, size = entry.text("sha256"), entry.integer("bytes")
        entry.end()
        if SHA256.fullmatch(digest) is None:
            raise InputError(f"{entry.where}.sha256", "needs a sha256 of 64 digits", got=repr(digest[:80]))
        found[name] = (digest, size)
    missing = [name for name in needs if name not in found]
    if missing:
        raise InputError(files.where, f"must list {missing[0]}")
    return found


def listing(folder: Path, names: Collection[str]) -> dict[str, tuple[str, int]]:
    """Hex sha256 and size in bytes of each file of ``folder``, as a manifest lists them.

    Raises:
        InputError: one of them is missing or cannot be read.
    """
    return {name: (sha256_file(folder / name), (folder / name).stat().st_size) for name in sorted(names)}


def damaged(folder: Path, files: Listed) -> list[str]:
    """Names of files that are missing or are not what a manifest lists; everything is read."""
    return [name for name, (digest, size) in sorted(files.items()) if not is_whole(folder / name, digest, size)]


def require_whole(folder: Path, files: Listed, *, stamped: Collection[str] = (), fix: str) -> None:
    """Refuse files that are not what a manifest lists; those that are ``stamped`` are read only where they changed.

    Raises:
        InputError: a file is missing or another one.
    """
    for name, (digest, size) in files.items():
        path = folder / name
        if name in stamped and _has_stamp(path, digest, size):
            continue
        if not is_whole(path, digest, size):
            raise InputError(str(path), "is damaged or missing", fix=fix)
        if name in stamped:
            put_stamp(path, digest)


def put_stamp(path: Path, digest: str) -> None:
    """Remember that ``path`` has this digest, until it is changed; where nothing can be written nothing is kept."""
    with contextlib.suppress(EdgepetError, OSError):
        stamp = _stamp_file(path)
        made_folder(stamp.parent, "digests of large files are kept there", lasting=False)
        write_file(stamp, canonical_json({"sha256": digest, **_stamp(path)}), lasting=False)


def is_whole(path: Path, digest: str, size: int) -> bool:
    """Whether a file is there and has this size, in bytes, and this hex sha256; it is read."""
    return path.is_file() and path.stat().st_size == size and sha256_file(path) == digest


def _has_stamp(path: Path, digest: str, size: int) -> bool:
    try:
        seen = parse_json(read_file(_stamp_file(path)))
        return bool(seen == {"sha256": digest, **_stamp(path)}) and path.stat().st_size == size
    except (EdgepetError, OSError, ValueError, RecursionError):
        return False


def _stamp(path: Path) -> dict[str, int]:
    facts = path.stat()
    return {"bytes": facts.st_size, "changed_ns": facts.st_mtime_ns, "inode": facts.st_ino}


def _stamp_file(path: Path) -> Path:
    """<root>/cache/stamps/<folder>-<file>.json of <root>/backbones/<folder>/<file>, or <root>/cache/merged/…/<file>."""
    root = path.parent.parent.parent
    cache = root if path.parent.parent.name == "merged" else root / "cache"
    return cache / "stamps" / f"{path.parent.name}-{path.name}.json"
