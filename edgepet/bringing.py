"""A folder whose files are brought from elsewhere, never written in place, and cleared by their names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from edgepet import disk
from edgepet.errors import InputError, refusing
from edgepet.files import (
    clear_leftovers,
    for_reading,
    is_leftover,
    require_regular,
    scratch_name,
    sha256_file,
    write_parts,
)

_PART_BYTES = 1 << 20


def bring_file(source: Path, target: Path, sha256: str, fix: str) -> None:
    """Let ``target`` be the file ``source``, for reading only: by a second name, or by a copy.

    A copy it is where others may write into ``source``, or the file system has no second names: whoever maps ``target``
    must not see it change.

    Raises:
        InputError: ``source`` cannot be read or has another digest, or ``target`` cannot be written.
    """
    require_regular(source)
    source = source.resolve()  # a second name of a link would be a link
    with refusing(target, "could not be written"):
        clear_leftovers(target)
        if _is_ours(source):
            scratch = scratch_name(target)
            try:
                with contextlib.suppress(OSError):
                    disk.DISK.link(source, scratch)
                if scratch.exists():
                    _require_digest(source, sha256_file(scratch), sha256, fix)
                    _sync_file(scratch)
                    for_reading(scratch)
                    disk.DISK.rename(scratch, target)
                    disk.DISK.sync_folder(target.parent)
                    return
            except BaseException:
                with contextlib.suppress(OSError):
                    disk.DISK.unlink(scratch)
                raise
    write_parts(target, _checked(source, sha256, fix), read_only=True)


def _checked(source: Path, sha256: str, fix: str) -> Iterator[bytes]:
    """The bytes of ``source``, then a refusal where their digest is another."""
    digest = hashlib.sha256()
    with refusing(source, "could not be read"), source.open("rb") as file:
        while part := file.read(_PART_BYTES):
            digest.update(part)
            yield part
    _require_digest(source, digest.hexdigest(), sha256, fix)


def _require_digest(path: Path, found: str, sha256: str, fix: str) -> None:
    if found != sha256:
        raise InputError(str(path), "is damaged or missing", fix=fix)


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user may write into ``path``."""
    facts = path.stat()
    return facts.st_uid == os.geteuid() and not facts.st_mode & 0o022 if hasattr(os, "geteuid") else False


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        disk.DISK.sync(descriptor)
    finally:
        os.close(descriptor)


def clear_folder(folder: Path, ours: re.Pattern[str], *, keep: Collection[str] = ()) -> int:
    """Remove the files of ``folder`` whose whole names ``ours`` matches, but for ``keep``, and what writing left.

    What cannot be removed stays: it is tried again when somebody clears the folder again.

    Returns:
        Bytes that were freed.
    """
    freed = 0
    for name in sorted({*os.listdir(folder)} - {*keep}) if folder.is_dir() and not folder.is_symlink() else ():
        item = folder / name
        if is_leftover(item, ours) or (ours.fullmatch(name) is not None and item.is_file()):
            with contextlib.suppress(OSError):
                size = item.stat().st_size
                disk.DISK.unlink(item)
                freed += size
    return freed
