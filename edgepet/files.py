"""Files that are whole or not there: written under a temporary name, synced, renamed; read only where they are files.

A temporary name is hidden and ends in ``.part``. Who writes it holds a lock on it until it is renamed, so that whoever
writes the same place later can tell the leftovers of dead processes, and clears them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgepet import disk
from edgepet.errors import InputError, refusing
from edgepet.locks import is_locked, lock

_PART, _TOKEN_BYTES = ".part", 4


def write_file(path: Path, *parts: bytes | memoryview, read_only: bool = False, lasting: bool = True) -> None:
    """Write ``parts`` as ``write_parts`` does, and raise as it does."""
    write_parts(path, parts, read_only=read_only, lasting=lasting)


def write_parts(
    path: Path, parts: Iterable[bytes | memoryview], *, read_only: bool = False, lasting: bool = True
) -> None:
    """Write ``parts`` one after another to ``path``, replacing it only when everything is on the disk.

    Args:
        read_only: nobody may write into it, where the file system has permissions.
        lasting: it survives a power cut. One that need not may then be gone, or empty.

    Raises:
        InputError: the folder is missing, read-only or full; an older file at ``path`` is still whole.
    """
    with refusing(path, "could not be written"):
        clear_leftovers(path)
        with _fresh_file(path) as (scratch, descriptor):
            for part in parts:
                disk.DISK.write(descriptor, part)
            if lasting:
                disk.DISK.sync(descriptor)
            if read_only:
                for_reading(scratch)
            disk.DISK.rename(scratch, path)
        if lasting:
            disk.DISK.sync_folder(path.parent)


@contextlib.contextmanager
def _fresh_file(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside ``path`` under a temporary name, and its descriptor; removed where the block raises."""
    scratch = scratch_name(path)
    descriptor = disk.DISK.create(scratch)
    try:
        lock(descriptor)
        yield scratch, descriptor
    except BaseException:
        with contextlib.suppress(OSError):
            disk.DISK.unlink(scratch)
        raise
    finally:
        os.close(descriptor)


def for_reading(path: Path) -> None:
    """Take the permission to write away, where there are permissions."""
    with contextlib.suppress(OSError):
        disk.DISK.set_mode(path, stat.S_IMODE(path.stat().st_mode) & ~0o222)


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
        scratch = scratch_name(path)
        scratch.mkdir()
        held = os.open(scratch, os.O_RDONLY)
        lock(held)
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
        disk.DISK.rename(source, path)
        disk.DISK.sync_folder(path.parent)


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


def made_folder(path: Path, what: str, *, lasting: bool = True) -> Path:
    """``path``, made where it is not there; ``what`` it is for, in words. ``lasting``: it survives a power cut.

    Raises:
        InputError: it cannot be made or written.
    """
    with refusing(path, f"cannot be made: {what}"):
        missing = list(itertools.takewhile(lambda each: not each.is_dir(), (path, *path.parents)))
        for each in (each for each in reversed(missing) if each == path or not each.exists()):
            disk.DISK.make_folder(each)
            if lasting:
                disk.DISK.sync_folder(each.parent)
        writable = os.access(path, os.W_OK)
    if not writable:
        raise InputError(str(path), f"cannot be written: {what}", got="no permission")
    return path


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
        scratch = scratch_name(folder / path.name)
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
        if ours.fullmatch(item.name) and not is_locked(item):
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    disk.DISK.unlink(item)


def is_leftover(path: Path, ours: re.Pattern[str]) -> bool:
    """Whether ``path`` is what a process that is dead left of writing a file whose whole name ``ours`` matches."""
    left = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{{2 * _TOKEN_BYTES}}}{re.escape(_PART)}", path.name)
    return left is not None and ours.fullmatch(left[1]) is not None and not is_locked(path)


def scratch_name(path: Path) -> Path:
    """A temporary name beside ``path`` that nobody has."""
    return path.parent / f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}{_PART}"


def _take_place(scratch: Path, path: Path) -> None:
    disk.DISK.sync_folder(scratch)
    if not path.exists():
        os.rename(scratch, path)
    else:
        aside = scratch_name(path)
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
    disk.DISK.sync_folder(path.parent)


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
    found = 0
    for item in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found += item.stat().st_size if item.is_file() else 0
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """What a folder takes: ``files`` and ``folders`` are the bytes that files and folders say, together what ``du
    --apparent-size`` counts; ``blocks`` what is allocated for both, ``du``'s own count. A file with several names in it
    counts once. ``linked`` are bytes of files that have a name elsewhere too: with it, they are on the disk once.
    """

    files: int
    folders: int
    blocks: int
    linked: int


def disk_use(path: Path) -> DiskUse:
    """Count ``path`` and all below it; what is removed meanwhile is left out."""
    seen, files, folders, blocks, linked = dict[tuple[int, int], int](), 0, 0, 0, 0
    for item in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            told = item.lstat()
            key = told.st_dev, told.st_ino
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > 1:
                linked -= told.st_size if seen[key] == told.st_nlink else 0
                continue
            blocks += 512 * getattr(told, "st_blocks", -(-told.st_size // 512))
            if stat.S_ISDIR(told.st_mode):
                folders += told.st_size
            else:
                files += told.st_size
                linked += told.st_size if told.st_nlink > 1 else 0
    return DiskUse(files=files, folders=folders, blocks=blocks, linked=linked)


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
