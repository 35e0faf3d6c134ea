"""What cannot end well is refused before the first image is decoded, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepet.errors import InputError
from edgepet.files import cache_folder, made_cache, require_file_place, require_place, require_space
from edgepet.measuring.machine import RuntimeStatus
from edgepet.networks.backbone import Backbone
from tests.flow import CLASSES, Tasks, edgepet, refused, train_arguments

Usage = namedtuple("Usage", "total used free")
NAME = "names the task, and needs a name of letters, digits, '.', '_' and '-', at most 64, got"


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that nobody can decode: a message that is not about them came before."""
    folder = tmp_path_factory.mktemp("unreadable")
    for split in ("train", "val"):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                (folder / split / name / f"{number}.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))


def train(backbone: Backbone, data: Path, output: Path, *more: object) -> str:
    return refused(3, *train_arguments(backbone.spec, data, "ssf", output), *more)


@pytest.mark.parametrize("name", ["my flowers", "fleurs-épicéa", "-x", "x" * 65])
def test_a_name_that_is_no_tasks_is_refused_before_images(
    backbone: Backbone, unreadable: Path, tmp_path: Path, name: str
) -> None:
    assert train(backbone, unreadable, tmp_path / f"{name}.pet") == f"-o: {NAME} {name!r}\n"
    message = refused(3, "pretrain", unreadable, "--backbone", backbone.spec, "--method", "ssf", "-o",
                      tmp_path / f"{name}.work")  # fmt: skip
    assert message == f"-o: {NAME} {name!r}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_images(
    backbone: Backbone, unreadable: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.pet").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    here = os.fspath(tmp_path)
    expected = {
        "folder.pet": f"{here}/folder.pet: must be a file, or not there, got a folder\n  fix: name another place\n",
        "file/a.pet": f"{here}/file: is no folder\n  fix: name another place\n",
        "none/a.pet": f"{here}/none: is no folder\n  fix: mkdir -p {here}/none\n",
    }

    assert {name: train(backbone, unreadable, tmp_path / name) for name in expected} == expected
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder.pet"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where not even root makes files")
def test_a_file_system_that_takes_no_file_is_refused_before_images(backbone: Backbone, unreadable: Path) -> None:
    message = train(backbone, unreadable, Path("/proc/a.pet"))

    assert message.startswith("/proc/a.pet: could not be written, got ")


def test_a_cache_that_cannot_be_made_is_refused_before_images(
    backbone: Backbone, unreadable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPET_CACHE", os.devnull + "/cache")

    message = train(backbone, unreadable, tmp_path / "a.pet")

    assert message == (
        "/dev/null/cache: cannot be made: backbones and graphs are kept there, got Not a directory\n"
        "  fix: set EDGEPET_CACHE to a folder that can be written\n"
    )


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: object = None) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("EDGEPET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)

    with pytest.raises(InputError) as refusal:
        made_cache()

    assert str(refusal.value) == (
        "cache: needs a home folder, got Could not determine home directory\n"
        "  fix: set EDGEPET_CACHE to a folder that can be written"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/edgepet")  # who has named a place needs no home


@pytest.mark.usefixtures("full_disk")
def test_a_disk_without_room_is_refused_before_images(backbone: Backbone, unreadable: Path, tmp_path: Path) -> None:
    message = train(backbone, unreadable, tmp_path / "a.pet")

    assert message == (
        f"{tmp_path}: needs 1 MB free for its checkpoints, the pack and the work folder, got 0 MB\n"
        "  fix: make room, or name another place\n"
    )


def test_a_class_whose_name_has_no_encoding_is_refused_before_images(backbone: Backbone, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name in (b"bee", b"caf\xe9"):  # Latin-1, as an old archive unpacks it
            folder = data / split / os.fsdecode(name)
            folder.mkdir(parents=True)
            for number in range(2):
                (folder / f"{number}.png").write_bytes(b"no image")

    message = train(backbone, data, tmp_path / "a.pet")

    where, got = f"{data / 'train'}/caf\N{REPLACEMENT CHARACTER}", r"'caf\udce9'"
    assert message == f"{where}: needs a class name in UTF-8, got {got}\n  fix: rename the folder\n"


def test_a_method_that_finds_no_layer_is_refused_before_images(
    backbone: Backbone, unreadable: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(backbone.spec, unreadable, "lora", tmp_path / "a.pet")

    message = refused(3, *arguments, "--set", "on=nowhere")

    assert "no image" not in message
    assert "nowhere" in message or "finds no layer" in message


def test_images_that_cannot_be_decoded_are_refused_last(backbone: Backbone, unreadable: Path, tmp_path: Path) -> None:
    assert "needs readable images" in train(backbone, unreadable, tmp_path / "a.pet")


# Other verbs


@pytest.mark.parametrize("verb", ["merge", "export", "calibrate", pytest.param("export-peft", marks=pytest.mark.slow)])
def test_every_verb_looks_at_its_place_first(tasks: Tasks, tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    more = ["--calib", tasks.data] if verb == "calibrate" else []
    name = {"merge": "m.safetensors", "calibrate": "c.pet"}.get(verb, "out")

    message = refused(3, verb, tasks.tints, *more, "-o", tmp_path / "file" / name)

    assert message.splitlines()[0] == f"{tmp_path}/file: is no folder"


def test_import_peft_looks_at_its_name_first(tmp_path: Path) -> None:
    message = refused(3, "import-peft", tmp_path, "--backbone", "none", "-o", tmp_path / "my task.pet")

    assert message == f"-o: {NAME} 'my task'\n"


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("verb", ["merge", pytest.param("export", marks=pytest.mark.slow)])
def test_no_model_is_made_for_a_disk_without_room(tasks: Tasks, tmp_path: Path, verb: str) -> None:
    message = refused(3, verb, tasks.shapes, "-o", tmp_path / "out")

    assert message.startswith(f"{tmp_path}: needs ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "where", "module"),
    [(("--to", "openvino"), "--to openvino", "openvino"), (("--simplify",), "--simplify", "onnxsim")],
)
def test_a_missing_package_is_told_before_the_pack_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], where: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    message = refused(5, "export", tmp_path / "none.pet", *asked, "-o", tmp_path / "out")

    assert message == (
        f"{where}: needs the package '{module}', got import of {module} halted; None in sys.modules\n"
        f"  fix: pip install 'edgepet[{module}]'\n"
    )


def test_a_runtime_that_is_broken_is_told_before_the_pack_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = RuntimeStatus(name="onnxruntime", version="1.0", available=False, fix="install it again")
    monkeypatch.setattr("edgepet.verbs.export.runtimes", lambda engines: (broken,))

    message = refused(5, "export", tmp_path / "none.pet", "-o", tmp_path / "out")

    assert message == "--to onnx: needs a runtime that can be imported, got none\n  fix: install it again\n"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--jobs", 0), "--jobs: must be at least 1, got 0\n"),
        (
            ("--precision", "int8", "--calib", "none", "--calib-images", 0),
            "--calib-images: must be at least 1, got 0\n",
        ),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_the_pack_is_read(
    tmp_path: Path, asked: tuple[object, ...], told: str
) -> None:
    assert refused(3, "export", tmp_path / "none.pet", *asked, "-o", tmp_path / "out") == told


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--val-fraction", 2), "--val-fraction: must be between 0 and 1, without them, got 2.0\n"),  # val/ or not
        (("--shots", 0), "--shots: must be at least 1, got 0\n"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_images(
    backbone: Backbone, unreadable: Path, tmp_path: Path, asked: tuple[object, ...], told: str
) -> None:
    assert train(backbone, unreadable, tmp_path / "a.pet", *asked) == told


# The checks themselves


@pytest.mark.parametrize("check", [require_place, require_file_place])
def test_a_place_that_can_be_written_is_left_as_it_was(check: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine", encoding="utf-8")

    check(tmp_path / "a")

    assert [(item.name, item.read_text(encoding="utf-8")) for item in tmp_path.iterdir()] == [("a", "mine")]


def test_folders_that_are_made_later_are_not_made_now(tmp_path: Path) -> None:
    require_place(tmp_path / "a" / "b" / "c", makes_parents=True)

    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_told_by_the_system(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r": could not be written, got File name too long$"):
        require_place(tmp_path / ("x" * 300))


def test_room_is_looked_for_where_the_place_will_be(tmp_path: Path) -> None:
    require_space(tmp_path / "a" / "b", 1, "one byte")

    with pytest.raises(InputError) as refusal:
        require_space(tmp_path / "a" / "b", 10**18, "an exabyte")

    assert str(refusal.value).startswith(f"{tmp_path}: needs 1,000,000,000,000 MB free for an exabyte, got ")


def test_help_is_shown_to_the_narrowest_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")

    assert edgepet("train", "--help").code == 0
