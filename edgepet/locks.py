"""Locks that go with the process that holds them, however that ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from edgepet.errors import InputError, refusing

with contextlib.suppress(ImportError):  # Windows has no such locks: there leftovers stay
    import fcntl

_PAUSE_S = 0.01


@contextlib.contextmanager
def held_alone(path: Path, otherwise: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the empty file ``path``, made where it is not there; the lock goes with the process, however that ends.

    Where a file system or Windows has no such locks, everybody holds it. ``wait_s``: how long it may take to get it.

    Raises:
        InputError: another process holds it: then its folder ``otherwise``. Or it cannot be made.
    """
    with refusing(path, "could not be written"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        last = time.monotonic() + wait_s
        while not (ours := lock(descriptor)) and time.monotonic() < last:
            time.sleep(_PAUSE_S)
        if not ours:
            fix = "wait until it has ended, or give another folder"
            raise InputError(str(path.parent), otherwise, fix=fix)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock a file while it is open; False where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, NameError):  # a file system without locks, or Windows
        return True
    return True


def is_locked(path: Path) -> bool:
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
