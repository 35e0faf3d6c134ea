"""Files that are whole or not there: written under a temporary name, synced, renamed; read only where they are files.

A temporary name is hidden and ends in ``.part``. Who writes it holds a lock on it until it is renamed, so that whoever
writes the same place later can tell the leftovers of dead processes, and clears them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from edgepet.errors import InputError

with contextlib.suppress(ImportError):  # Windows has no such locks: there leftovers stay
    import fcntl

_PART, _TOKEN_BYTES = ".part", 4


@contextlib.contextmanager
def refusing(where: Path, what: str) -> Iterator[None]:
    """Tell an ``OSError`` of the block as an input error.

    Raises:
        InputError: ``where`` ``what``, and what the system says.
    """
    try:
        yield
    except OSError as error:
        raise InputError(str(where), what, got=error.strerror or str(error)) from error


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write ``parts`` as ``write_parts`` does, and raise as it does."""
    write_parts(path, parts)


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write ``parts`` one after another to ``path``, replacing it only when everything is on the disk.

    Raises:
        InputError: the folder is missing, read-only or full; an older file at ``path`` is still whole.
    """
    with refusing(path, "could not be written"):
        clear_leftovers(path)
        scratch = _scratch(path)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # what the umask leaves of it
        try:
            _lock(descriptor)
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
                os.replace(scratch, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, *, only: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary sibling that takes the place of the folder ``path`` when the block ends without an error.

    Args:
        only: what a folder may hold to be replaced; one with anything else is somebody's own.

    Raises:
        InputError: the place cannot be written or taken, or holds something else; what was there is still whole.
    """
    require_only(path, only)
    with scratch_folder(path) as scratch:
        yield scratch
        move_folder(scratch, path, only=only)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``, which is removed when the block ends.

    Raises:
        InputError: the folder that ``path`` is in cannot be written.
    """
    with refusing(path, "could not be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        scratch = _scratch(path)
        scratch.mkdir()
        held = os.open(scratch, os.O_RDONLY)
        _lock(held)
    try:
        yield scratch
    finally:
        os.close(held)
        shutil.rmtree(scratch, ignore_errors=True)


def move_folder(source: Path, path: Path, *, only: Collection[str] = ()) -> None:
    """Let the folder ``source`` of the same file system take the place of ``path``, as ``new_folder`` does.

    Raises:
        InputError: as ``new_folder``.
    """
    require_only(path, only)
    with refusing(path, "could not be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _take_place(source, path)


def move_file(source: Path, path: Path) -> None:
    """Let the file ``source``, which is whole and of the same file system, take the place of ``path``.

    Raises:
        InputError: it could not.
    """
    with refusing(path, "could not be written"):
        os.replace(source, path)
        sync_folder(path.parent)


def require_only(path: Path, names: Collection[str]) -> None:
    """Refuse to replace a folder that holds anything besides ``names``: it is somebody's own.

    Raises:
        InputError: it does, or ``path`` is no folder.
    """
    fix = "name another place, or move what is there"
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(str(path), "must be a folder of its own, or not there", got="something else", fix=fix)
    with refusing(path, "could not be read"):
        others = sorted({item.name for item in path.iterdir()} - set(names)) if path.is_dir() else []
    if others:
        got = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise InputError(str(path), "holds files that would be lost", got=got, fix=fix)


def require_other(output: Path, *inputs: Path) -> None:
    """Refuse to write over what is read.

    Raises:
        InputError: ``output`` is one of ``inputs``, by whatever name.
    """
    for given in inputs:
        with contextlib.suppress(OSError):  # one that is not there is not the other
            if output.samefile(given):
                raise InputError(str(output), f"is {given}, which is read", fix="name another output")


def made_folder(path: Path, what: str) -> Path:
    """``path``, made where it is not there; ``what`` it is for, in words.

    Raises:
        InputError: it cannot be made or written.
    """
    with refusing(path, f"cannot be made: {what}"):
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    if not writable:
        raise InputError(str(path), f"cannot be written: {what}", got="no permission")
    return path


@contextlib.contextmanager
def held_alone(path: Path, otherwise: str) -> Iterator[None]:
    """Hold the empty file ``path``, made where it is not there; the lock goes with the process, however that ends.

    Where a file system or Windows has no such locks, everybody holds it.

    Raises:
        InputError: another process holds it: then its folder ``otherwise``. Or it cannot be made.
    """
    with refusing(path, "could not be written"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(descriptor):
            fix = "wait until it has ended, or give another folder"
            raise InputError(str(path.parent), otherwise, fix=fix)
        yield
    finally:
        os.close(descriptor)


def require_place(path: Path, *, makes_parents: bool = False) -> None:
    """Refuse a place that could not be written: before the work whose result goes there, not after.

    Args:
        makes_parents: whether the folders that it is in are made then, where they are not there.

    Raises:
        InputError: a folder that it is in is none, is missing or cannot be written.
    """
    folder = path.absolute().parent
    while makes_parents and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        is_there = folder.exists()
        fix = "name another place" if is_there else f"mkdir -p {path.parent}"
        raise InputError(str(folder if is_there else path.parent), "is no folder", fix=fix)
    with refusing(path, "could not be written"):
        scratch = _scratch(folder / path.name)
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # permissions alone do not tell
        with contextlib.suppress(FileNotFoundError):  # another process may take it for a leftover
            os.unlink(scratch)


def require_file_place(path: Path) -> None:
    """Refuse a place where no file could be written, as ``require_place`` does, or where a folder is.

    Raises:
        InputError: it is such a place.
    """
    require_place(path)
    if path.is_dir():
        raise InputError(str(path), "must be a file, or not there", got="a folder", fix="name another place")


def require_space(path: Path, size_bytes: int, what: str) -> None:
    """Refuse work whose result cannot fit on the disk of ``path``, which need not be there; ``what`` it is, in words.

    Raises:
        InputError: fewer than ``size_bytes`` are free.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    with refusing(place, "could not be read"):
        free = shutil.disk_usage(place).free
    if free < size_bytes:
        needs, got = f"{-(-size_bytes // 10**6):,} MB", f"{free // 10**6:,} MB"  # whole ones, none in favour
        raise InputError(str(place), f"needs {needs} free for {what}", got=got, fix="make room, or name another place")


def made_cache() -> Path:
    """The cache folder, made where it is not there.

    Raises:
        InputError: it cannot be made or written.
    """
    try:
        return made_folder(cache_folder(), "backbones and graphs are kept there")
    except InputError as error:
        fix = "set EDGEPET_CACHE to a folder that can be written"
        raise InputError(error.where, error.what, got=error.got, fix=error.fix or fix) from error


def clear_leftovers(path: Path) -> None:
    """Remove what processes that are dead left of writing ``path``; one that is alive holds a lock."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{{2 * _TOKEN_BYTES}}}{re.escape(_PART)}")
    for item in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        if ours.fullmatch(item.name) and not _is_locked(item):
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink(missing_ok=True)


def _scratch(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}{_PART}"


def _lock(descriptor: int) -> bool:
    """Lock a file while it is open; False where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, NameError):  # a file system without locks, or Windows
        return True
    return True


def _is_locked(path: Path) -> bool:
    """Whether a process that is alive holds ``path``; where that cannot be told, it is."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return not path.is_symlink()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, NameError):
        return True
    finally:
        os.close(descriptor)
    return False


def _take_place(scratch: Path, path: Path) -> None:
    sync_folder(scratch)
    if not path.exists():
        os.rename(scratch, path)
    else:
        aside = _scratch(path)
        aside.mkdir()
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


def require_regular(path: Path) -> None:
    """Refuse what is no regular file: reading a pipe never ends where nobody writes, and a device has no end.

    Raises:
        InputError: there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(str(path), "could not be read", got=getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise InputError(str(path), "must be a regular file", got=kinds.get(stat.S_IFMT(mode), "a device"))


def read_file(path: Path) -> bytes:
    """All bytes of ``path``.

    Raises:
        InputError: there is no such file, it is no regular one, or it cannot be read.
    """
    require_regular(path)
    with refusing(path, "could not be read"):
        return path.read_bytes()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes.

    Raises:
        InputError: as ``read_file``.
    """
    require_regular(path)
    with refusing(path, "could not be read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(path: Path) -> str:
    """Hex sha256 of all files below ``path``: of the lines "DIGEST  NAME", sorted by name, as sha256sum prints them.

    Raises:
        InputError: as ``read_file``.
    """
    files = sorted((item.relative_to(path).as_posix(), item) for item in path.rglob("*") if not item.is_dir())
    return hashlib.sha256("".join(f"{sha256_file(item)}  {name}\n" for name, item in files).encode()).hexdigest()


def folder_bytes(path: Path) -> int:
    """Sum of the sizes of all regular files below ``path``, in bytes."""
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


def cache_folder() -> Path:
    """Where graphs and converted weights are kept: ``EDGEPET_CACHE``, else ``edgepet`` in the user's cache folder.

    That is ``XDG_CACHE_HOME``, else ``~/.cache``, as the XDG Base Directory Specification has it. It is not made here.

    Raises:
        InputError: there is no home folder, and none of the two is set.
    """
    chosen = os.environ.get("EDGEPET_CACHE")
    if chosen:
        return Path(chosen)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "edgepet"
    try:
        return Path.home() / ".cache" / "edgepet"
    except RuntimeError as error:  # a user without HOME that the system does not know, as containers have
        fix = "set EDGEPET_CACHE to a folder that can be written"
        raise InputError("cache", "needs a home folder", got=str(error).rstrip("."), fix=fix) from error
