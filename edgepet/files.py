"""Files that are whole or not there: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgepet.errors import InputError


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write ``parts`` one after another to ``path``, replacing it only when everything is on the disk.

    Raises:
        InputError: the folder is missing, read-only or full; an older file at ``path`` is still whole.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(str(path), "could not be written", got=error.strerror or str(error)) from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling that takes the place of the folder ``path`` when the block ends without an error.

    Raises:
        InputError: the place cannot be written or taken; an older folder at ``path`` is still whole.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(str(path), "could not be written", got=error.strerror or str(error)) from error
    try:
        yield scratch
        try:
            _take_place(scratch, path)
        except OSError as error:
            raise InputError(str(path), "could not be written", got=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take_place(scratch: Path, path: Path) -> None:
    os.chmod(scratch, 0o755)
    sync_folder(scratch)
    if not path.exists():
        os.rename(scratch, path)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            os.rename(path, aside / "old")
            try:
                os.rename(scratch, path)
            except OSError:
                os.rename(aside / "old", path)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """All bytes of ``path``.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(str(path), "could not be read", got=error.strerror or str(error)) from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(path: Path) -> int:
    """Sum of the sizes of all regular files below ``path``."""
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


def cache_folder() -> Path:
    """Where graphs and converted weights are kept: ``EDGEPET_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("EDGEPET_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgepet"
