"""Files and folders are whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgepet import files
from edgepet.errors import InputError
from edgepet.files import (
    cache_folder,
    clear_leftovers,
    folder_bytes,
    new_folder,
    read_file,
    require_other,
    sha256_file,
    write_file,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(*args: object) -> None:
    raise OSError(28, "No space left on device")


class PowerCut(BaseException):
    """Ends the process where it is: no handler for ordinary errors sees it."""


def cut(*args: object) -> None:
    raise PowerCut


def test_parts_are_written_one_after_another(tmp_path: Path) -> None:
    write_file(tmp_path / "a.pet", b"one", memoryview(b" two"), b"")

    assert (tmp_path / "a.pet").read_bytes() == b"one two"
    assert names(tmp_path) == ["a.pet"]


def test_a_file_that_others_may_read_replaces_the_old_one(tmp_path: Path) -> None:
    write_file(tmp_path / "a.pet", b"old")
    write_file(tmp_path / "a.pet", b"new")

    assert read_file(tmp_path / "a.pet") == b"new"


@pytest.fixture
def masked() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("masked")
def test_files_and_folders_are_for_those_that_the_umask_leaves(tmp_path: Path) -> None:
    write_file(tmp_path / "a.pet", b"mine")
    with new_folder(tmp_path / "a.work") as scratch:
        write_file(scratch / "x", b"mine")

    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a.pet": 0o600, "a.work": 0o700, "x": 0o600}


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_full_disk_at_any_step_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_file(tmp_path / "a.pet", b"old")
    monkeypatch.setattr(files.os, step, failing)

    with pytest.raises(InputError) as refused:
        write_file(tmp_path / "a.pet", b"new")

    monkeypatch.undo()
    assert str(refused.value) == f"{tmp_path / 'a.pet'}: could not be written, got No space left on device"
    assert (tmp_path / "a.pet").read_bytes() == b"old"
    assert names(tmp_path) == ["a.pet"]


def test_an_interrupt_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "a.pet", b"old")
    monkeypatch.setattr(files.os, "fsync", cut)

    with pytest.raises(PowerCut):
        write_file(tmp_path / "a.pet", b"new")

    assert read_file(tmp_path / "a.pet") == b"old"
    assert names(tmp_path) == ["a.pet"]


def test_writing_into_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        write_file(tmp_path / "no" / "a.pet", b"")

    assert str(refused.value) == f"{tmp_path / 'no' / 'a.pet'}: could not be written, got No such file or directory"


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file": (lambda path: None, "could not be read, got No such file or directory"),
    "a folder": (Path.mkdir, "must be a regular file, got a folder"),
    "a pipe": (os.mkfifo, "must be a regular file, got a pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "must be a regular file, got a device"),
}


@pytest.mark.parametrize(("make", "told"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_refused(tmp_path: Path, make: Callable[[Path], object], told: str) -> None:
    make(tmp_path / "a.pet")

    for read in (read_file, sha256_file):
        with pytest.raises(InputError) as refused:
            read(tmp_path / "a.pet")
        assert str(refused.value) == f"{tmp_path / 'a.pet'}: {told}"


def test_a_new_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "a.work") as scratch:
        (scratch / "x").write_bytes(b"1")
        assert not (tmp_path / "deep" / "a.work").exists()

    assert names(tmp_path / "deep") == ["a.work"]
    assert names(tmp_path / "deep" / "a.work") == ["x"]
    assert (tmp_path / "deep" / "a.work").stat().st_mode & 0o777 == 0o755


def test_a_new_folder_takes_the_place_of_the_old_one_and_of_all_its_files(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with new_folder(tmp_path / "a.work", only=["old"]) as scratch:
            (scratch / name).touch()

    assert names(tmp_path) == ["a.work"]
    assert names(tmp_path / "a.work") == ["new"]


@pytest.mark.parametrize("error", [ValueError, OSError, PowerCut])
def test_an_error_in_the_block_passes_and_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with new_folder(tmp_path / "a.work") as scratch:
        (scratch / "old").touch()

    def write() -> None:
        with new_folder(tmp_path / "a.work", only=["old"]) as scratch:
            (scratch / "new").touch()
            raise error

    with pytest.raises(error):
        write()

    assert names(tmp_path) == ["a.work"]
    assert names(tmp_path / "a.work") == ["old"]


@pytest.mark.parametrize("nth", [1, 2], ids=["the old folder cannot be moved", "the new folder cannot be moved"])
def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    with new_folder(tmp_path / "a.work") as scratch:
        (scratch / "old").touch()
    calls: list[object] = []

    def rename(source: Path, to: Path, real: Callable[[Path, Path], None] = os.rename) -> None:
        calls.append(source)
        failing() if len(calls) == nth else real(source, to)

    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(InputError) as refused, new_folder(tmp_path / "a.work", only=["old"]) as scratch:
        (scratch / "new").touch()

    monkeypatch.undo()
    assert str(refused.value) == f"{tmp_path / 'a.work'}: could not be written, got No space left on device"
    assert names(tmp_path) == ["a.work"]
    assert names(tmp_path / "a.work") == ["old"]


def test_a_folder_that_another_process_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "a.work") as scratch:
            (scratch / "ours").touch()
            (tmp_path / "a.work").mkdir()
            (tmp_path / "a.work" / "theirs").touch()

    with pytest.raises(InputError) as refused:
        write()

    assert str(refused.value) == (
        f"{tmp_path / 'a.work'}: holds files that would be lost, got theirs\n"
        "  fix: name another place, or move what is there"
    )
    assert names(tmp_path) == ["a.work"]
    assert names(tmp_path / "a.work") == ["theirs"]


OWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder of the user's": (
        lambda path: [(path / f"{name}.txt").write_text("mine") for name in "abcde"],
        "holds files that would be lost, got a.txt, b.txt, c.txt and 2 more",
    ),
    "a file": (lambda path: [path.rmdir(), path.touch()], "must be a folder of its own, or not there, got something"),
    "a link": (
        lambda path: [path.rmdir(), path.symlink_to(path.parent)],
        "must be a folder of its own, or not there, got something else",
    ),
}


@pytest.mark.parametrize(("make", "told"), OWN.values(), ids=OWN)
def test_what_is_somebodys_own_is_not_replaced(tmp_path: Path, make: Callable[[Path], object], told: str) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    make(place)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(InputError) as refused, new_folder(place, only=["model.onnx"]):
        raise AssertionError

    assert str(refused.value).startswith(f"{place}: {told}")
    assert sorted(tmp_path.rglob("*")) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from edgepet.files import new_folder
with new_folder(Path(sys.argv[1])) as scratch:
    (scratch / "half").write_bytes(bytes(1000))
    print("open", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_cleared_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    place = tmp_path / "a.work"
    args = [sys.executable, "-c", KILLED, str(place)]
    dead, live = (subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2))
    for process in (dead, live):
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    dead.kill()
    dead.communicate()
    assert len(names(tmp_path)) == 2

    write_file(tmp_path / "a.work2", b"")  # another place: it clears its own leftovers only
    assert len(names(tmp_path)) == 3
    clear_leftovers(place)
    assert len(names(tmp_path)) == 2

    live.communicate()
    assert live.returncode == 0
    assert names(tmp_path) == ["a.work", "a.work2"]
    assert names(place) == ["half"]


def test_files_of_others_whose_names_are_alike_are_no_leftovers(tmp_path: Path) -> None:
    theirs = [".a.work.mine.part", ".a.work.part", ".a.work.0123abcd.part.txt", ".a.work.0123ABCD.part"]
    for name in [*theirs, ".a.work.0123abcd.part"]:
        (tmp_path / name).write_bytes(b"")

    clear_leftovers(tmp_path / "a.work")

    assert names(tmp_path) == sorted(theirs)


def test_an_output_that_is_an_input_is_refused_by_whatever_name(tmp_path: Path) -> None:
    write_file(tmp_path / "a.pet", b"pack")
    (tmp_path / "link").symlink_to(tmp_path / "a.pet")
    require_other(tmp_path / "new", tmp_path / "a.pet", tmp_path / "not there")

    with pytest.raises(InputError) as refused:
        require_other(tmp_path / "link", tmp_path / "a.pet")

    assert str(refused.value) == (
        f"{tmp_path / 'link'}: is {tmp_path / 'a.pet'}, which is read\n  fix: name another output"
    )


def test_a_new_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(InputError) as refused, new_folder(tmp_path / "file" / "a.work"):
        raise AssertionError

    assert str(refused.value) == f"{tmp_path / 'file' / 'a.work'}: could not be written, got File exists"


def test_sizes_and_digests_are_of_all_bytes(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"abc")
    (tmp_path / "deep").mkdir()
    write_file(tmp_path / "deep" / "b", b"12345")

    assert folder_bytes(tmp_path) == 8
    # FIPS 180-4, appendix B.1
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("EDGEPET_CACHE", "/e")
    assert cache_folder() == Path("/e")
    monkeypatch.setenv("EDGEPET_CACHE", "")
    assert cache_folder() == Path("/x/edgepet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "edgepet"


def test_the_suite_has_a_cache_of_its_own(own_cache: Path) -> None:
    assert cache_folder() == own_cache
