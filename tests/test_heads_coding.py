"""``pack --codec`` of boxes, masks and labels: judged by each head's metric, held for the head that loses most."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepet
from edgepet.calibration.budget import Drop
from edgepet.deltas.detection import Detect
from edgepet.deltas.joined import answer_shapes, apart
from edgepet.device.serving import Device
from edgepet.device.store import Store
from edgepet.errors import CheckError
from edgepet.exporters.trace import base_graph
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.coding import Recoding, moved
from edgepet.proving.subject import Subject, one_head
from edgepet.tuning.dense import Said
from edgepet.verbs.dense_answers import ANSWERED
from tests.flow import edgepet as command
from tests.flow import refused
from tests.mask_packs import mask_backbone, mask_pack
from tests.scene_packs import HEADS, scene_delta, true_folder

pytest.importorskip("faster_coco_eval", reason="the package faster-coco-eval is not installed")

METRICS = {"boxes": "map", "mask": "miou", "labels": "map"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return mask_backbone(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def place(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scene.pet, a pack of each of its heads alone, and data/ in which all is true that they say."""
    folder, delta = tmp_path_factory.mktemp("scene"), scene_delta(backbone)
    true_folder(folder / "data", backbone, delta)
    mask_pack(folder / "scene.pet", backbone, delta, codec="fp32")
    for number, name in enumerate(HEADS):
        mask_pack(folder / f"{name}.pet", backbone, replace(one_head(delta, number), task=name), codec="fp32")
    return folder


def values(pack: Path, data: Path, backbone: Backbone) -> dict[str, float]:
    """What ``eval`` says of each head in torch, on val."""
    said: Any = edgepet.evaluate(pack, data, split="val", runtime="torch", backbone=backbone)
    return {name: each.value for name, each in getattr(said, "heads", {pack.stem: said}).items()}


@pytest.mark.parametrize("codec", ["int8", "auto"])
@pytest.mark.parametrize("name", HEADS)
def test_one_head_in_codes_loses_what_eval_says(
    name: str, codec: Any, place: Path, backbone: Backbone, tmp_path: Path
) -> None:
    source, small = place / f"{name}.pet", tmp_path / f"{name}.pet"

    report = edgepet.pack(source, small, codec=codec, data=place / "data", max_drop=30, backbone=backbone)

    assert report.drop is not None
    assert values(source, place / "data", backbone) == {name: 1.0}  # or codes would have nothing to lose
    assert report.drop.points == pytest.approx(100 * (1 - values(small, place / "data", backbone)[name]), abs=1e-6)
    assert report.drop.low <= report.drop.points <= 30
    assert (report.drop.n, report.metric, report.top1_drop) == (6, METRICS[name], None)
    assert 0 < report.max_abs_diff < 2
    assert report.bytes == small.stat().st_size < 0.6 * source.stat().st_size
    large = {each.format for each in report.planes if each.values >= 64}
    assert large == {"int8"} if codec == "int8" else large <= {"int2", "int4", "int8", "fp16"}


def test_the_wider_the_budget_the_fewer_the_bytes(place: Path, backbone: Backbone, tmp_path: Path) -> None:
    made = [
        edgepet.pack(
            place / "scene.pet", tmp_path / f"{budget}.pet", codec="auto", data=place / "data", max_drop=budget,
            backbone=backbone,
        )
        for budget in (3.0, 100.0)
    ]  # fmt: skip

    for report, budget in zip(made, (3.0, 100.0), strict=True):
        assert report.drop is not None
        assert report.drop.points == max(each.points for each in report.heads.values()) <= budget
    assert made[0].bytes > made[1].bytes


def test_json_tells_each_of_several_heads(place: Path, backbone: Backbone, tmp_path: Path) -> None:
    asked = ["--codec", "int4", "--data", place / "data", "--backbone", backbone.spec]

    several = command("pack", place / "scene.pet", *asked, "-o", tmp_path / "scene.pet", "--json", "--quiet").json
    alone = command("pack", place / "boxes.pet", *asked, "-o", tmp_path / "boxes.pet", "--json", "--quiet").json
    seen = command("pack", place / "scene.pet", *asked, "-o", tmp_path / "seen.pet").out.splitlines()

    assert {name: drop["metric"] for name, drop in several["heads"].items()} == METRICS
    assert several["drop"] == max(several["heads"].values(), key=lambda drop: drop["points"])
    assert several["metric"] == several["drop"]["metric"]
    assert "heads" not in alone
    assert set(several) == {*alone, "heads"}
    assert (alone["metric"], alone["drop"]["metric"], alone["top1_drop"]) == ("map", "map", None)
    told = [f"  {name}: {drop['points']:+.2f} points of" for name, drop in several["heads"].items()]
    assert [line[: len(start)] for line, start in zip(seen[1:4], told, strict=True)] == told
    assert seen[4] == f"  logits and distances differ by at most {several['max_abs_diff']:.2g} on 6 images"


def test_without_labels_answers_are_compared(place: Path, backbone: Backbone, tmp_path: Path) -> None:
    for name in ("scene", "boxes", "labels"):
        report = edgepet.pack(place / f"{name}.pet", tmp_path / f"{name}.pet", codec="int8", backbone=backbone)

        assert (report.drop, report.heads, report.n, report.metric) == (None, {}, 8, "map")  # 8 images of noise
        assert 0 < report.max_abs_diff < 1


@pytest.mark.parametrize(("name", "of"), [("scene", " of boxes"), ("labels", "")])
def test_a_budget_that_does_not_hold_is_told_of_the_head_that_loses_most(
    name: str, of: str, place: Path, backbone: Backbone, tmp_path: Path
) -> None:
    lost = edgepet.pack(place / f"{name}.pet", tmp_path / "a.pet", codec="int2", data=place / "data", backbone=backbone)
    assert lost.drop is not None

    with pytest.raises(CheckError) as error:
        edgepet.pack(place / f"{name}.pet", tmp_path / "b.pet", codec="int2", data=place / "data", max_drop=2.5, backbone=backbone)  # fmt: skip

    assert str(error.value) == (
        f"{place / f'{name}.pet'}: must lose at most 2.5 points in int2, got {lost.drop.points:.2f}{of} on 6 images\n"
        "  fix: `codec=auto`, or a wider `max_drop`"
    )
    assert not (tmp_path / "b.pet").exists()


def test_a_budget_that_fp16_does_not_hold_either(place: Path, backbone: Backbone) -> None:
    subject = Subject(place / "scene.pet", backbone, None, answers=EVERY)
    lost = Drop(points=0.2, low=0.0, high=1.0, kl=0.0, n=2, metric="map")
    recoding = Recoding(subject, subject.images[0][:2], lambda before, after: {"boxes": lost}, 0)

    with pytest.raises(CheckError) as error:
        recoding.smallest(0.1, lambda name: None)

    assert str(error.value) == (
        "scene: must lose at most 0.1 points, and does not in fp16 either\n  fix: a wider `max_drop`"
    )


def _without_boxes_of_one(data: Path) -> None:
    file = data / "annotations/instances_val.json"
    told = json.loads(file.read_text())
    told["images"] = told["images"][1:]
    told["annotations"] = [each for each in told["annotations"] if each["image_id"] != 1]
    file.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without_boxes_of_one, "needs the same images for every head of the task, mask too, got images/val/000.png for one alone\n  fix: give every image what all heads answer\n"),
        (lambda data: (data / "classes.txt").write_text("floor\nround\nsquare\n"), "needs the 3 classes of scene.pet in their order, ground, round, square, got floor, round, square\n"),
    ],
)  # fmt: skip
def test_images_that_cannot_judge_are_refused(
    change: Callable[[Path], object], told: str, place: Path, backbone: Backbone, tmp_path: Path
) -> None:
    true_folder(tmp_path / "data", backbone, scene_delta(backbone))
    change(tmp_path / "data")

    message = refused(
        3, "pack", place / "scene.pet", "--codec", "int8", "--data", tmp_path / "data", "--backbone", backbone.spec,
        "-o", tmp_path / "out.pet",
    )  # fmt: skip

    assert message == f"{tmp_path / 'data'}: {told}"


def test_a_coded_pack_on_a_device_gives_what_eval_says(place: Path, backbone: Backbone, tmp_path: Path) -> None:
    edgepet.pack(place / "scene.pet", tmp_path / "scene.pet", codec="int8", data=place / "data", backbone=backbone)
    delta = read_pack(tmp_path / "scene.pet", answers=EVERY).delta
    store = Store(tmp_path / "store")
    store.add_graph(base_graph(backbone))
    Device(store.root).install(tmp_path / "scene.pet")
    shapes, found = answer_shapes([each.head for each in delta.heads], backbone.maps, backbone.width), {}

    said: Any = edgepet.evaluate(tmp_path / "scene.pet", place / "data", split="val", backbone=backbone)
    with Device(store.root).open("scene") as task:
        for number, meaning in enumerate(task.meanings):
            row = ANSWERED[meaning.name]  # type: ignore[index]
            images = row.images(place / "data", "val", meaning, delta.preprocess, "scene.pet")
            fit = row.judge(lambda x, at=number: apart(task(x), shapes)[at], images, delta.preprocess, meaning)  # type: ignore[misc]
            found[meaning.name] = row.score(fit).value

    assert found == pytest.approx({name: each.value for name, each in said.heads.items()}, abs=1e-6)
    assert min(found.values()) < 1  # codes lose a little here


# ------------------------------------------------------------------------------------------------------ what is summed


def test_what_all_places_say_is_what_boxes_are_chosen_from() -> None:
    rng, layer = np.random.default_rng(3), Detect(np.array([0.5, 2.0]), stride=8, top=5)
    maps = [rng.standard_normal((2, channels, size, size)) for size in (4, 2) for channels in (3, 5)]

    classes, sides, central = layer.said(*maps)

    points, _ = layer.grid(*(x.shape[1:] for x in maps))
    strides = np.repeat([8, 16], [16, 4])
    corners = points + np.concatenate([-sides[:, :2], sides[:, 2:]], axis=1) * strides
    scores = np.sqrt(1 / (1 + np.exp(-classes.max(axis=1))) / (1 + np.exp(-central[:, 0])))
    best = np.argsort(-scores, axis=1)[:, :5]
    found = layer(*maps)
    assert (classes.shape, sides.shape, central.shape) == ((2, 3, 20), (2, 4, 20), (2, 1, 20))
    np.testing.assert_allclose(found[:, :, :4], np.take_along_axis(corners, best[:, None], axis=2).swapaxes(1, 2))
    np.testing.assert_allclose(found[:, :, 4], np.take_along_axis(scores, best, axis=1))


def test_heads_and_their_kinds_of_numbers_count_alike_whatever_their_scale() -> None:
    rng = np.random.default_rng(3)
    logits, sides = rng.standard_normal((8, 3, 40)), 50 * rng.standard_normal((8, 4, 40))
    other = 1e3 * rng.standard_normal((8, 7))

    def apart_by(a: float, b: float, c: float) -> float:
        before = [Said(answer=logits, places=(logits, sides)), Said(answer=other)]
        after = [Said(answer=logits, places=(logits + a, sides + b)), Said(answer=other[:4] + c)]
        return moved(before, after)

    assert apart_by(0.1, 0, 0) == pytest.approx(0.005, rel=0.1)
    assert apart_by(0, 5, 0) == pytest.approx(0.005, rel=0.1)
    assert apart_by(0, 0, 100) == pytest.approx(0.01, rel=0.3)
    assert apart_by(0.1, 5, 100) == pytest.approx(apart_by(0.1, 0, 0) + apart_by(0, 5, 0) + apart_by(0, 0, 100))
