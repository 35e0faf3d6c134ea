"""``pack``: a task in fewer bytes that answers as it did, within a budget, and packs of before written anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepet import pack, read_pack
from edgepet.errors import CheckError, InputError
from edgepet.methods import METHODS, Branching
from edgepet.packs.codecs import CODECS, Codec, Coding
from edgepet.packs.manifest import EXACT
from edgepet.packs.old import read_old
from edgepet.packs.pack import encode_pack
from edgepet.proving.coding import Tried, choices
from edgepet.verbs import judged_images
from tests.flow import Tasks, edgepet, refused
from tests.packs import header_bytes
from tests.tiny import make_delta, ones, sites_of

BEFORE = sorted((Path(__file__).parent / "golden" / "packs" / "before").glob("*.pet"))


@pytest.mark.parametrize("codec", CODECS)
def test_a_task_in_each_codec_answers_nearly_as_it_did(codec: Codec, tasks: Tasks, tmp_path: Path) -> None:
    report = pack(tasks.shapes, tmp_path / "out.pet", codec=codec, data=tasks.data)

    assert report.bytes == (tmp_path / "out.pet").stat().st_size
    assert report.n == 12
    assert report.max_abs_diff <= {"fp32": 1e-6, "fp16": 1e-6, "int8": 0.02, "int4": 0.3, "int2": 1.5}[codec]
    assert report.drop is not None
    assert report.top1_drop == report.drop.points / 100
    assert read_pack(tmp_path / "out.pet").delta.stored_values == read_pack(tasks.shapes).delta.stored_values
    if codec in ("int8", "int4", "int2"):
        assert report.bytes < report.source_bytes * {"int8": 0.85, "int4": 0.65, "int2": 0.55}[codec]


def test_a_coded_pack_is_exported_and_compared_with_what_it_stores(tasks: Tasks, tmp_path: Path) -> None:
    pack(tasks.shapes, tmp_path / "small.pet", codec="int4")

    made = edgepet("export", tmp_path / "small.pet", "-o", tmp_path / "out", "--json").json

    (artifact,) = made["artifacts"]
    assert artifact["verified"]
    assert artifact["parity"]["against"] == "merged"
    assert artifact["parity"]["max_abs"] <= artifact["parity"]["limit"]


def test_auto_takes_the_smallest_that_holds_the_budget(tasks: Tasks, tmp_path: Path) -> None:
    wide = pack(tasks.shapes, tmp_path / "wide.pet", codec="auto", data=tasks.data, max_drop=99)
    narrow = pack(tasks.shapes, tmp_path / "narrow.pet", codec="auto", data=tasks.data, max_drop=9)

    assert wide.drop is not None
    assert narrow.drop is not None
    assert {plane.format for plane in wide.planes if plane.name not in EXACT} == {"int2", "fp16"}
    assert narrow.drop.points <= 9
    assert wide.bytes <= narrow.bytes < narrow.source_bytes


def test_of_allchoices_those_on_the_hull_are_tried() -> None:
    def tried(plane: str, *pairs: tuple[int, float]) -> list[Tried]:
        return [Tried(plane, Coding("int8", size), size, error) for size, error in pairs]

    made = choices([tried("a", (10, 9.0), (20, 1.0), (40, 0.0)), tried("b", (5, 4.0), (9, 3.9), (15, 0.5))])

    assert [[each.bytes for each in choice] for choice in made] == [[10, 5], [20, 5], [20, 15], [40, 15]]


def test_without_a_codec_every_number_stays(tasks: Tasks, tmp_path: Path) -> None:
    report = pack(tasks.tints, tmp_path / "again.pet")

    assert (tmp_path / "again.pet").read_bytes() == tasks.tints.read_bytes()
    assert (report.max_abs_diff, report.n, report.drop, report.signed) == (0.0, 0, None, False)


@pytest.mark.parametrize(("given", "said"), [
    ({"codec": "auto"}, "`codec=auto`: needs a budget\n  fix: add `max_drop` and `data`"),
    ({"max_drop": 1.0}, "`codec`: is needed: without it nothing is stored otherwise, and nothing compared"),
    ({"codec": "int4", "max_drop": 1.0}, "`max_drop`: needs images with labels\n  fix: add `data`"),
    ({"sequence": -1}, f"`sequence`: must be from 0 to {2**53 - 1}, got -1"),
])  # fmt: skip
def test_options_that_do_not_go_together(given: dict[str, object], said: str, tasks: Tasks, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        pack(tasks.shapes, tmp_path / "out.pet", **given)  # type: ignore[arg-type]

    assert str(refusal.value) == said


def test_a_budget_that_does_not_hold_leaves_nothing(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = judged_images.drop_between
    monkeypatch.setattr(judged_images, "drop_between", lambda before, after, labels: real(before, -before, labels))

    for codec, what in (
        ("int4", "must lose at most 9 points in int4"),
        ("auto", "must lose at most 9 points, and does not in fp16"),
    ):
        with pytest.raises(CheckError, match=what):
            pack(tasks.shapes, tmp_path / "out.pet", codec=codec, data=tasks.data, max_drop=9)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_budget_finer_than_the_images_show(tasks: Tasks, tmp_path: Path) -> None:
    message = refused(
        3, "pack", tasks.shapes, "--codec", "auto", "--data", tasks.data, "--max-drop", 1, "-o", tmp_path / "o.pet"
    )

    assert message.startswith("--max-drop: must be at least 8.3 points: 12 images show no less, got 1.0")


def test_classes_without_an_image_are_still_the_tasks_own(tasks: Tasks, tmp_path: Path) -> None:
    delta, data = read_pack(tasks.shapes).delta, tmp_path / "data"
    shutil.copytree(tasks.data, data)
    for split in ("train", "val", "test"):
        shutil.rmtree(data / split / delta.labels[0])

    images, judge = judged_images.judged_images(data, delta)

    right = np.eye(3, dtype=np.float32)[[1] * 4 + [2] * 4]
    assert images.shape == (8, 3, 32, 32)
    assert judge((right,), (-right,))["class"].points == 100


# ---------------------------------------------------------------------------------------------- packs of before


@pytest.mark.parametrize("path", BEFORE, ids=lambda path: path.stem)
def test_a_pack_of_before_is_written_anew_with_its_numbers(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "old.pet")
    message = refused(3, "inspect", tmp_path / "old.pet")
    assert message == "old.pet: was written before version 1 was final\n  fix: edgepet pack old.pet -o NEW.pet\n"

    said = edgepet("pack", tmp_path / "old.pet", "-o", tmp_path / "new.pet")

    assert said.code == 0, said.err
    old, _ = read_old(path.read_bytes(), "old.pet")
    new = read_pack(tmp_path / "new.pet").delta
    exact = read_pack(encode_pack(old, codec="fp32")).delta
    for first, second in zip(new.arrays(), exact.arrays(), strict=True):
        assert np.array_equal(first, second)
    assert (new.labels, new.task, new.int8) == (old.labels, old.task, old.int8)
    assert np.array_equal(new.head.weight, old.head.weight)


def test_a_pack_of_before_is_not_recoded_at_once(tmp_path: Path) -> None:
    shutil.copy(BEFORE[0], tmp_path / "old.pet")

    message = refused(3, "pack", tmp_path / "old.pet", "--codec", "int4", "-o", tmp_path / "new.pet")

    assert message == (
        "old.pet: was written before version 1 was final\n"
        "  fix: edgepet pack old.pet -o NEW.pet, then this with NEW.pet\n"
    )


def test_what_was_no_pack_before_either(tmp_path: Path) -> None:
    (tmp_path / "old.pet").write_bytes(BEFORE[0].read_bytes()[:600])

    message = refused(3, "pack", tmp_path / "old.pet", "-o", tmp_path / "new.pet")

    assert message.startswith("old.pet: is no pack of any version, got ")
    assert not (tmp_path / "new.pet").exists()


# ------------------------------------------------------------------------------------------------ small by its form


@pytest.mark.parametrize(("architecture", "most"), [("vit_small_patch14_dinov2", 400), ("tf_efficientnet_lite0", 1500)])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_a_pack_says_is_two_kilobytes_whatever_the_method(name: str, architecture: str, most: int) -> None:
    """Its JSON, and ``most`` for the layout; labels, licences, provenance and the probe are not counted."""
    method, layers = METHODS[name](), sites_of(architecture)
    sites, weights = method.sites(layers), ones(layers)
    tuned = method.start(sites, weights, np.random.default_rng(0))
    branches = method.branches(sites, tuned) if isinstance(method, Branching) else ()
    delta = make_delta(
        method.lower(weights, sites, tuned), branches=branches, classes=2, width=384, labels=("a", "b"), settings={},
        training={}, licences=(),
    )  # fmt: skip

    data = encode_pack(delta, codec="int4")

    assert header_bytes(data) <= 2000
    assert read_pack(data).bytes_by_kind["layout"] <= most
