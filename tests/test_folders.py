"""Data folders as people's tools write them: what is used, what is passed over and said, what is refused by name."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgepet import read_pack, write_pack
from edgepet.cli.main import main
from edgepet.errors import InputError
from edgepet.images.folders import Split, split_folders
from edgepet.images.notes import same_pictures, tell_of
from edgepet.images.sets import ImageSet, open_split
from tests.flow import Tasks, edgepet, refused


def draw(folder: Path, *names: str) -> Path:
    """Images of noise, another one for each path; JPEG where Pillow does not know the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(list(os.fsencode(name))).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        known = Path(name).suffix.lower() in Image.registered_extensions()
        Image.fromarray(pixels).save(folder / name, None if known else "JPEG")
    return folder


def classes(folder: Path, count: int = 2, *names: str) -> Path:
    for name in names or ("ant", "bee"):
        draw(folder / name, *(f"{name}{number}.png" for number in range(count)))
    return folder


def names(images: ImageSet) -> list[str]:
    return [path.name for path in images.paths]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


def told(folder: Path, *splits: Split, clips: bool = False) -> tuple[list[str], list[str]]:
    """The lines that are said of ``folder``, without its path, and what -v adds to the first."""
    said: list[tuple[str, list[str]]] = []
    sets = {split: open_split(folder, split, clips=clips) for split in splits}
    tell_of(folder, sets, lambda line, details: said.append((line, list(details))), clips=clips)
    return [line.removeprefix(f"{folder}: ") for line, _ in said], said[0][1]


# ---------------------------------------------------------------------------------------------------------- the splits


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "valid", "test"), ("training", "validation", "testing"), ("Train", "Val", "TEST")],
)
def test_splits_go_by_the_names_that_tools_give_them(tmp_path: Path, train: str, val: str, test: str) -> None:
    for count, name in ((5, train), (3, val), (2, test)):
        classes(tmp_path / name, count)

    assert [len(open_split(tmp_path, split)) for split in ("train", "val", "test")] == [10, 6, 4]
    assert {path.parent.parent.name for path in open_split(tmp_path, "val").paths} == {val}


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        classes(tmp_path / name)

    assert refusal(lambda: open_split(tmp_path, "val")) == (
        f"{tmp_path}: needs one folder for val, got val/ and valid/\n  fix: keep one of them, or join them"
    )


@pytest.mark.parametrize("name", ["train", "Training", "valid", "validation", "test"])
def test_a_class_may_be_called_as_a_split_is(tmp_path: Path, name: str) -> None:
    classes(tmp_path, 2, "bus", name)
    draw(tmp_path / name / "more", "1.png")

    assert split_folders(tmp_path) == {}
    assert open_split(tmp_path, "train").classes == tuple(sorted(("bus", name)))


def test_a_class_of_clips_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        for clip in ("a", "b"):
            draw(tmp_path / name / clip, "1.png", "2.png")

    assert open_split(tmp_path, "train", clips=True).classes == ("bus", "train")


def test_a_folder_beside_the_splits_is_said_and_what_zip_leaves_is_not(tmp_path: Path) -> None:
    for count, name in ((4, "train"), (2, "__MACOSX"), (2, "labels")):
        classes(tmp_path / name, count)
    (tmp_path / "data.yaml").touch()

    lines, listed = told(tmp_path, "train", "val")

    assert lines[0] == "6 train and 2 val images; passed over 1: 1 beside the splits (labels)"
    assert listed == [
        "  __MACOSX: left by the system, or hidden",
        "  data.yaml: no image",
        "  labels: beside the splits",
    ]


def test_a_test_set_may_lack_classes_and_training_does_not_mind(tmp_path: Path) -> None:
    classes(tmp_path / "train", 4, "ant", "bee", "cat")
    classes(tmp_path / "test", 2, "bee")
    (tmp_path / "test" / "cat").mkdir()

    assert open_split(tmp_path, "test").classes == ("bee",)
    assert open_split(tmp_path, "train").classes == ("ant", "bee", "cat")


def test_a_test_set_may_lie_alone(tmp_path: Path) -> None:
    classes(tmp_path / "test")

    assert len(open_split(tmp_path, "test")) == 4
    assert refusal(lambda: open_split(tmp_path, "train")) == (
        f"{tmp_path}: has no train/ folder, got only test\n  fix: add train/"
    )


def test_a_test_set_without_any_image_is_refused(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    draw(tmp_path / "test", "unlabelled.png")
    assert refusal(lambda: open_split(tmp_path, "test")) == (
        f"{tmp_path}/test: needs at least a class folder, got 0\n  fix: make one folder a class"
    )
    (tmp_path / "test" / "ant").mkdir()
    (tmp_path / "test" / "ant" / "1.txt").touch()
    (tmp_path / "test" / "unlabelled.png").unlink()

    assert refusal(lambda: open_split(tmp_path, "test")) == (
        f"{tmp_path}/test: holds no image, got 1 .txt\n  fix: remove the folder or add images"
    )


# ----------------------------------------------------------------------------------------------------------- the files


def test_images_go_by_suffix_in_any_case(tmp_path: Path) -> None:
    used = ("1.JPG", "2.jfif", "3.Jpe", "4.gif", "5.PNG", "6.TiFf", "7.webp", "8.bmp", "9.pgm")
    draw(tmp_path / "ant", *used)
    draw(tmp_path / "bee", "1.png", "2.png")

    train, val = open_split(tmp_path, "train"), open_split(tmp_path, "val")

    assert sorted(name for images in (train, val) for name in names(images) if name in used) == sorted(used)


def test_what_is_passed_over_is_told_in_one_line_and_listed_below_it(tmp_path: Path) -> None:
    classes(tmp_path)
    for name in (".DS_Store", "._ant0.jpg", ".hidden.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / "ant" / name).touch()
    for name in ("0.txt", "1.TXT", "2.jxl", "scan0001"):
        (tmp_path / "ant" / name).touch()
    draw(tmp_path / "ant" / "more" / "deep", "4.png", "5.png", ".no.png")
    draw(tmp_path, "loose.png")

    lines, listed = told(tmp_path, "train", "val")

    assert lines == [
        "2 train and 2 val images; passed over 7: 1 in no class folder (loose.png), 2 .txt, 1 .jxl,"
        " 2 in a folder within a class (ant/more/deep/4.png), 1 without a suffix (ant/scan0001)"
    ]
    assert listed == [
        "  loose.png: in no class folder",
        *(f"  ant/{name}: left by the system, or hidden" for name in (".DS_Store", "._ant0.jpg", ".hidden.png")),
        "  ant/0.txt: .txt",
        "  ant/1.TXT: .txt",
        "  ant/2.jxl: .jxl",
        "  ant/Thumbs.db: left by the system, or hidden",
        "  ant/desktop.ini: left by the system, or hidden",
        "  ant/more/deep/4.png: in a folder within a class",
        "  ant/more/deep/5.png: in a folder within a class",
        "  ant/scan0001: without a suffix",
    ]


def test_a_folder_with_images_only_is_told_with_their_number(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    for name in ("ant", "bee"):
        draw(tmp_path / "valid" / name, f"{name}8.png", f"{name}9.png")

    assert told(tmp_path, "train", "val") == (["4 train and 4 val (valid/) images"], [])


def test_images_that_pillow_needs_a_package_for_are_said_to_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes(tmp_path)
    for name in ("1.heic", "2.HEIC"):
        (tmp_path / "ant" / name).touch()
    from edgepet.images import formats

    monkeypatch.setattr(formats, "plugged", frozenset)

    lines, _ = told(tmp_path, "train", "val")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "3.avif").touch()

    assert lines == ["2 train and 2 val images; passed over 2: 2 .heic, which Pillow reads with pillow-heif"]
    assert refusal(lambda: open_split(tmp_path, "train")) == (
        f"{tmp_path}/cat: holds no image, got 1 .avif, which Pillow reads with Pillow 11.3\n"
        "  fix: remove the folder or add images"
    )


def test_files_beside_the_folders_of_clips_are_said(tmp_path: Path) -> None:
    for name in ("up", "down"):
        for clip in ("a", "b"):
            draw(tmp_path / name / clip, "1.png", "2.png")
    draw(tmp_path / "up", "loose.png")

    assert told(tmp_path, "train", "val", clips=True)[0] == [
        "2 train and 2 val clips; passed over 1: 1 in no clip's folder (up/loose.png)"
    ]


def test_files_that_cannot_be_read_are_named_before_anything_starts(tasks: Tasks, tmp_path: Path) -> None:
    classes(tmp_path / "data", 4)
    (tmp_path / "data" / "ant" / "link.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "data" / "bee" / "pipe.JPG")
    (tmp_path / "data" / "cat").symlink_to("gone")

    told = refused(
        3, "train", tmp_path / "data", "--backbone", "no_such_backbone", "--method", "ssf", "-o", tmp_path / "a.pet"
    )

    assert told == (
        f"{tmp_path}/data: needs readable images, got 3 of 11 images that are not\n"
        "  cat: a link that leads nowhere\n"
        "  ant/link.png: a link that leads nowhere\n"
        "  bee/pipe.JPG: a pipe or a device\n"
        "  fix: replace these files or remove them\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    file = classes(tmp_path) / "ant" / "ant0.png"
    file.chmod(0)

    assert refusal(lambda: open_split(tmp_path, "train")) == (
        f"{file}: is not a readable image, got no permission to read it\n  fix: replace the file or remove it"
    )


# ----------------------------------------------------------------------------------------------------------- the names

SCRIPTS = ("Äpfel, rot", "дуб", "樫", "بلوط", "🌳 {0} [b]", "a'b\"c")


def test_classes_have_names_of_any_script(tmp_path: Path) -> None:
    classes(tmp_path, 2, *SCRIPTS)

    assert open_split(tmp_path, "train").classes == tuple(sorted(SCRIPTS))


def test_an_accent_is_one_sign_or_two(tmp_path: Path) -> None:
    one, two = "caf\u00e9", "cafe\u0301"
    classes(tmp_path / "train", 2, "tea", one)
    classes(tmp_path / "val", 2, "tea", two)
    classes(tmp_path / "both", 2, one, two)

    assert open_split(tmp_path, "train").classes == open_split(tmp_path, "val").classes == (one, "tea")
    assert refusal(lambda: open_split(tmp_path / "both", "train")) == (
        f"{tmp_path}/both: needs one folder a class, got two called 'café'\n"
        "  fix: join the folders: their names look alike"
    )


def test_a_class_name_that_is_no_utf8_is_refused_and_a_files_is_read(tmp_path: Path) -> None:
    classes(tmp_path)
    odd = os.fsdecode(b"caf\xe9")
    draw(tmp_path / "ant", f"{odd}.png")
    assert f"{odd}.png" in names(open_split(tmp_path, "train")) + names(open_split(tmp_path, "val"))
    classes(tmp_path, 2, odd)

    assert refusal(lambda: open_split(tmp_path, "train")) == (
        f"{tmp_path / odd}: needs a class name in UTF-8, got 'caf\\udce9'\n  fix: rename the folder"
    )


# -------------------------------------------------------------------------------------------------- the same pictures


def test_pictures_that_are_in_train_and_test_are_told(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        draw(tmp_path / split / "ant", *(f"{split}{number}.png" for number in range(count)))
        draw(tmp_path / split / "bee", *(f"{split}{number}b.png" for number in range(count)))
    shutil.copy(tmp_path / "train" / "ant" / "train1.png", tmp_path / "test" / "bee" / "other.png")

    shared = (
        "1 of 5 test images are among those of train too (test/bee/other.png is train/ant/train1.png):"
        " accuracy on them says little"
    )
    assert told(tmp_path, "train", "val")[0] == ["6 train and 4 val images", shared]
    assert told(tmp_path, "test")[0] == ["5 test images", shared]
    assert told(tmp_path, "val")[0] == ["4 val images"]


def test_files_of_one_size_are_compared_by_their_bytes(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"two"), ("d", b"four")):
        (tmp_path / name).write_bytes(content)
    a, b, c, d = (tmp_path / name for name in "abcd")

    pairs = same_pictures(ImageSet(("x",), (a, b), (0, 0)), ImageSet(("x",), (c, d), (0, 0)))

    assert pairs == [(b, c)]


# -------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def data(tasks: Tasks, tmp_path: Path) -> Path:
    """A copy of the images, to spoil."""
    return Path(shutil.copytree(tasks.data, tmp_path / "data"))


def test_eval_takes_the_classes_that_are_there_and_says_which_are_not(tasks: Tasks, data: Path) -> None:
    whole = edgepet("eval", tasks.shapes, data, "--json").json
    assert "without_images" not in whole
    shutil.rmtree(data / "test" / "square")
    shutil.rmtree(data / "train")

    part, screen = edgepet("eval", tasks.shapes, data, "--json").json, edgepet("eval", tasks.shapes, data)

    assert whole["n"] == 12
    assert (part["n"], part["without_images"], part["classes"]) == (8, ["square"], whole["classes"])
    assert "  of 2 classes: there is no image of 'square'\n" in screen.out


def test_eval_takes_a_class_whose_accent_is_spelled_otherwise(tasks: Tasks, data: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (data / split / "circle").rename(data / split / "cercl\u00e9")
    pack = tmp_path / "named.pet"
    trained = edgepet(
        "train", data, "--backbone", tasks.spec, "--img-size", 32, "--method", "linear-probe", "--epochs", 1, "-o", pack
    )
    assert trained.code == 0, trained.err
    (data / "test" / "cercl\u00e9").rename(data / "test" / "cercle\u0301")

    document = edgepet("eval", pack, data, "--json").json

    assert (document["n"], document["classes"][0]) == (12, "cercl\u00e9")


def test_what_is_passed_over_is_listed_with_v_and_kept_quiet_on_demand(tasks: Tasks, data: Path) -> None:
    (data / "test" / "circle" / "notes.txt").touch()
    line = f"{data}: 12 test images; passed over 1: 1 .txt\n"

    plain, verbose, quiet = (edgepet("eval", tasks.shapes, data, *more).err for more in ((), ("-v",), ("--quiet",)))

    assert plain.startswith(line)
    assert f"{line}  test/circle/notes.txt: .txt\n" in verbose
    assert "notes.txt" not in plain
    assert quiet == ""


def test_labels_that_the_terminal_has_no_signs_for_are_escaped(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = read_pack(tasks.shapes)
    write_pack(tmp_path / "oaks.pet", replace(pack.delta, labels=("дуб", "caf\u00e9", "a\U0001f333")))
    for form, named in (
        ("--json", r'"\u0434\u0443\u0431", "caf\u00e9", "a\ud83c\udf33"'),
        ("-v", r"\u0434\u0443\u0431"),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

        assert main(["inspect", str(tmp_path / "oaks.pet"), form]) == 0
        assert named in written.getvalue().decode("ascii")


def test_a_name_that_is_no_utf8_reaches_json_as_an_escape(tasks: Tasks, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    pack = Path(shutil.copy(tasks.shapes, tmp_path / f"{odd}.pet"))

    said = edgepet("storage", pack, "--json")

    assert said.code == 0, said.err
    assert re.search(r"[\ud800-\udfff]", said.out) is None
