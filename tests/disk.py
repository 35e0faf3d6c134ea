"""A disk that remembers what was done to it, fails when it is told to, and can be cut off from its power."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgepet import disk

Fault = Callable[[], BaseException]


class Killed(BaseException):
    """The process is gone: nothing that it would have done afterwards is done."""


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


@dataclass(frozen=True)
class Call:
    """One call: its name, the paths that it is about, the file, and what was written."""

    name: str
    path: Path | None = None
    to: Path | None = None
    file: int = 0
    data: bytes = b""


@dataclass
class RecordingDisk(disk.Disk):
    """Does everything, and writes it down. ``fault`` happens in place of call number ``at``, counted from 0."""

    at: int | None = None
    fault: Fault = full
    calls: list[Call] = field(default_factory=list)
    dead: bool = False
    files: dict[int, int] = field(default_factory=dict)  # inode -> our number
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def note(self, call: Call) -> None:
        if self.dead:
            raise Killed
        if len(self.calls) == self.at:
            error = self.fault()
            self.at, self.dead = None, isinstance(error, Killed)
            raise error
        self.calls.append(call)

    def number(self, inode: int) -> int:
        return self.files.setdefault(inode, next(self.numbers))

    def create(self, path: Path) -> int:
        self.note(Call("create", path))
        descriptor = super().create(path)
        self.files[os.fstat(descriptor).st_ino] = number = next(self.numbers)
        self.calls[-1] = Call("create", path, file=number)
        return descriptor

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        self.note(Call("write", file=self.number(os.fstat(descriptor).st_ino), data=bytes(data)))
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self.note(Call("sync", file=self.number(os.fstat(descriptor).st_ino)))

    def rename(self, source: Path, target: Path) -> None:
        self.note(Call("rename", source, target))
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self.note(Call("link", source, target, self.number(source.stat().st_ino), source.read_bytes()))
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self.note(Call("unlink", path))
        super().unlink(path)

    def make_folder(self, path: Path) -> None:
        self.note(Call("make_folder", path))
        super().make_folder(path)

    def set_mode(self, path: Path, mode: int) -> None:
        self.note(Call("set_mode", path))
        super().set_mode(path, mode)

    def sync_folder(self, path: Path) -> None:
        self.note(Call("sync_folder", path))


class PoorDisk(RecordingDisk):
    """A memory card's file system: no second names, no permissions, and folders that cannot be synced."""

    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def set_mode(self, path: Path, mode: int) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@contextmanager
def using(made: RecordingDisk) -> Iterator[RecordingDisk]:
    """``made`` in place of the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "DISK", made)
        yield made


# ------------------------------------------------------------------------------------------------------ a power cut

Tree = dict[Path, bytes]


@dataclass
class Cut:
    """What may be on the disk when the power goes after some calls: what was synced, and any of what was not."""

    root: Path
    names: dict[Path, int] = field(default_factory=dict)  # that surely are there
    folders: set[Path] = field(default_factory=set)
    synced: dict[int, bytes] = field(default_factory=dict)
    written: dict[int, bytes] = field(default_factory=dict)
    pending: list[Call] = field(default_factory=list)  # changes of names whose folder was not synced since

    @classmethod
    def of(cls, root: Path) -> Cut:
        """A disk with what lies below ``root``, all of it synced long ago."""
        cut, number = cls(root), itertools.count(-1, -1)
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                cut.folders.add(path)
            else:
                cut.names[path] = file = next(number)
                cut.synced[file] = cut.written[file] = path.read_bytes()
        if root.is_dir():
            cut.folders.add(root)
        return cut

    def do(self, call: Call) -> None:
        """One call more."""
        if call.name == "write":
            self.written[call.file] = self.written.get(call.file, b"") + call.data
        elif call.name == "sync":
            self.synced[call.file] = self.written.get(call.file, b"")
        elif call.name == "sync_folder":
            done = [each for each in self.pending if _folder(each) == call.path]
            self.pending = [each for each in self.pending if _folder(each) != call.path]
            self._apply(done, self.names, self.folders)
        elif call.name != "set_mode":
            if call.name in ("create", "link"):
                self.written[call.file] = call.data
                if call.name == "create":
                    self.synced.pop(call.file, None)
            self.pending.append(call)

    def outcomes(self) -> Iterator[Tree]:
        """Every tree of files that may be there afterwards: names done or not, unsynced bytes lost, torn or there."""
        count = len(self.pending)
        chosen: set[tuple[int, ...]] = {tuple(range(n)) for n in range(count + 1)}
        chosen |= {tuple(k for k in range(count) if k != left) for left in range(count)} | {(k,) for k in range(count)}
        for some in sorted(chosen):
            names, folders = dict(self.names), set(self.folders)
            self._apply([self.pending[k] for k in some], names, folders)
            for lost in (lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: whole):
                found = {path: file for path, file in names.items() if _is_reached(path, folders, self.root)}
                safe = {file for file in found.values() if self.synced.get(file) == self.written[file]}
                yield {p: self.synced[f] if f in safe else lost(self.written[f]) for p, f in found.items()}

    def _apply(self, calls: list[Call], names: dict[Path, int], folders: set[Path]) -> None:
        for call in calls:
            path = call.path or Path()
            if call.name == "create":
                names[path] = call.file
            elif call.name == "make_folder":
                folders.add(path)
            elif call.name == "unlink":
                names.pop(path, None)
            elif call.name == "link" and call.to is not None:
                names[call.to] = call.file
            elif call.name == "rename" and call.to is not None and path in names:
                names[call.to] = names.pop(path)


def _folder(call: Call) -> Path:
    """The folder whose names a call changes."""
    path: Any = call.to if call.name in ("link", "rename") else call.path
    return Path(path).parent


def _is_reached(path: Path, folders: set[Path], root: Path) -> bool:
    """Whether all folders between ``path`` and ``root``, and that one, are there."""
    above = [each for each in path.parents if each == root or root in each.parents]
    return bool(above) and folders.issuperset(above)


def lay_down(tree: Tree, root: Path, target: Path) -> None:
    """Write what lay below ``root`` to ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for path, data in tree.items():
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
