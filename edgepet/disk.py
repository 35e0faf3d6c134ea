"""The calls that change a disk: all that a store writes goes through them, and can be recorded or refused there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NO_SUCH_CALL = frozenset((errno.EINVAL, errno.ENOTSUP, errno.ENOSYS))


class Disk:
    """The system's own calls; they raise the ``OSError`` that it gives. Tests put recorders and faults in its place."""

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file, with the permissions that the umask leaves of 0666."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        """All of ``data`` at the end of the file."""
        left = memoryview(data).cast("B")
        while left:
            left = left[os.write(descriptor, left) :]

    def sync(self, descriptor: int) -> None:
        """The file's bytes, from the system's memory to the disk."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """In one step, also where ``target`` is a file."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Take a name away, and the file where that was its last one."""
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        """A folder, where it is not there."""
        try:
            os.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise

    def set_mode(self, path: Path, mode: int) -> None:
        """Permissions."""
        os.chmod(path, mode)

    def sync_folder(self, path: Path) -> None:
        """The names in a folder, to the disk; where a system has no such call it needs none, or has no other."""
        if os.name == "nt":
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SUCH_CALL:
                raise
        finally:
            os.close(descriptor)


DISK = Disk()
