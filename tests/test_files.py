"""Files and folders are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepet import files
from edgepet.errors import InputError
from edgepet.files import cache_folder, folder_bytes, new_folder, read_file, sha256_file, write_file


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
    assert (tmp_path / "a.pet").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fdopen", "fsync", "chmod", "replace"])
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


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["a missing file", "a folder"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.pet")
    got = "Is a directory" if (tmp_path / "a.pet").exists() else "No such file or directory"

    with pytest.raises(InputError) as refused:
        read_file(tmp_path / "a.pet")

    assert str(refused.value) == f"{tmp_path / 'a.pet'}: could not be read, got {got}"


def test_a_new_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "a.work") as scratch:
        (scratch / "x").write_bytes(b"1")
        assert not (tmp_path / "deep" / "a.work").exists()

    assert names(tmp_path / "deep") == ["a.work"]
    assert names(tmp_path / "deep" / "a.work") == ["x"]
    assert (tmp_path / "deep" / "a.work").stat().st_mode & 0o777 == 0o755


def test_a_new_folder_takes_the_place_of_the_old_one_and_of_all_its_files(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with new_folder(tmp_path / "a.work") as scratch:
            (scratch / name).touch()

    assert names(tmp_path) == ["a.work"]
    assert names(tmp_path / "a.work") == ["new"]


@pytest.mark.parametrize("error", [ValueError, OSError, PowerCut])
def test_an_error_in_the_block_passes_and_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with new_folder(tmp_path / "a.work") as scratch:
        (scratch / "old").touch()

    def write() -> None:
        with new_folder(tmp_path / "a.work") as scratch:
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
    with pytest.raises(InputError) as refused, new_folder(tmp_path / "a.work") as scratch:
        (scratch / "new").touch()

    monkeypatch.undo()
    assert str(refused.value) == f"{tmp_path / 'a.work'}: could not be written, got No space left on device"
    assert names(tmp_path) == ["a.work"]
    assert names(tmp_path / "a.work") == ["old"]


def test_a_folder_that_another_process_wrote_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exists(path: Path) -> bool:
        path.mkdir()
        (path / "theirs").touch()
        return False

    def write() -> None:
        with new_folder(tmp_path / "a.work") as scratch:
            (scratch / "ours").touch()
            monkeypatch.setattr(files.Path, "exists", exists)

    with pytest.raises(InputError) as refused:
        write()

    monkeypatch.undo()
    assert str(refused.value) == f"{tmp_path / 'a.work'}: could not be written, got Directory not empty"
    assert names(tmp_path) == ["a.work"]
    assert names(tmp_path / "a.work") == ["theirs"]


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
