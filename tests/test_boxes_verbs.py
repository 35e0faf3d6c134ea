"""``train``, ``eval``, ``predict`` and ``device`` of images with boxes, and what other verbs say of such a pack."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgepet
from edgepet.device.answers import boxed
from edgepet.images.inputs import Input
from edgepet.images.masks import class_colours, squashed
from edgepet.packs.pack import EVERY, read_pack
from edgepet.spec import Preprocess
from edgepet.tuning.work_folder import read_work
from edgepet.verbs.drawings import Drawings
from tests.box_folders import CATEGORIES, coco_folder
from tests.flow import RUNTIMES, refused
from tests.flow import edgepet as command
from tests.tiny import tiny_vit

pytest.importorskip("faster_coco_eval", reason="the package faster-coco-eval is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ of boxes, 48 x 64 pixels, and the weights of a tiny transformer."""
    folder = tmp_path_factory.mktemp("boxes")
    coco_folder(folder / "data", train=10, val=6, test=5, size=(48, 64))
    tiny_vit(folder, 3)
    return folder


def arguments(place: Path, output: str, method: str = "ssf", **more: object) -> list[object]:
    spec = f"test_vit@{place / 'test_vit-3.safetensors'}"
    given = {
        "task": "boxes", "epochs": 2, "batch-size": 4, "img-size": 64, "train-precision": "fp32", "device": "cpu", **more,
    }  # fmt: skip
    told = [text for key, value in given.items() for text in (f"--{key}", value)]
    return ["train", place / "data", "--backbone", spec, "--method", method, *told, "-o", place / output]


@pytest.fixture(scope="module")
def trained(place: Path) -> Any:
    """The JSON of a training; ``things.pet`` lies in ``place``."""
    said = command(*arguments(place, "things.pet", head="fcos,width=8,depth=1", lr=0.01, epochs=6), "--json", "--quiet")
    assert said.code == 0, said.err
    return said.json


def test_a_training_says_what_its_boxes_are_worth(trained: Any, place: Path) -> None:
    (judged,) = read_pack(place / "things.pet", answers=EVERY).delta.heads

    val = trained["val"]
    assert (val["metric"], val["n"]) == ("map", 6)
    assert 0 <= val["low"] <= val["value"] <= val["high"] <= 1
    assert val["value"] == judged.value
    assert val["map50"] >= val["value"]
    assert [each["name"] for each in trained["classes"]] == list(CATEGORIES)
    documents = [
        json.loads((place / f"data/annotations/instances_{split}.json").read_text()) for split in ("train", "val")
    ]
    counts = [len(each["annotations"]) for each in documents]
    assert [sum(each["objects"] for each in trained["classes"]), val["objects"]] == counts
    assert trained["head_params"] == judged.head.stored_values == 2 * 64 * 8 + 8 + 2 * (64 + 88) + 7 * 9 + 3
    assert trained["head"] == "fcos,width=8,depth=1,norm=false"
    assert trained["pack_bytes"] == (place / "things.pet").stat().st_size
    assert trained["algebra_max_abs"] <= trained["algebra_limit"]
    assert not (place / "things.checkpoint").exists()


def test_the_pack_holds_what_a_device_needs(trained: Any, place: Path) -> None:
    delta = read_pack(place / "things.pet", answers=EVERY).delta

    assert delta.answers == ("boxes",)
    assert delta.heads[0].head.labels == CATEGORIES
    assert (delta.preprocess.crop, delta.preprocess.crop_fraction) == ("squash", 1.0)
    assert delta.probes["fp32"].logits.shape == (4, 2)
    assert np.abs(delta.probes["fp32"].logits).max() > 0
    assert read_work(place / "things.work").pixels.shape == (6, 64, 64, 3)


@pytest.mark.parametrize("runtime", [*RUNTIMES, "torch"])
def test_eval_on_a_runtime_is_what_it_was_in_training(runtime: str, trained: Any, place: Path) -> None:
    report: Any = edgepet.evaluate(place / "things.pet", place / "data", split="val", runtime=runtime)

    assert (report.runtime, report.metric, report.n) == (runtime, "map", 6)
    assert report.value == pytest.approx(trained["val"]["value"], abs=1e-3)
    assert report.map50 == pytest.approx(trained["val"]["map50"], abs=1e-3)


def test_people_see_every_class(trained: Any, place: Path) -> None:
    said = command("eval", place / "things.pet", place / "data")

    lines = said.out.splitlines()
    assert lines[0].startswith("AP ")
    assert "on 5 images with" in lines[0]
    assert "2 classes (onnxruntime, fp32)" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[-2:]] == list(CATEGORIES)


def test_eval_takes_classes_in_any_order_and_no_other_one(trained: Any, place: Path, tmp_path: Path) -> None:
    before: Any = edgepet.evaluate(place / "things.pet", place / "data")
    shutil.copytree(place / "data", tmp_path / "data")
    file = tmp_path / "data/annotations/instances_test.json"
    document = json.loads(file.read_text())
    for each in document["annotations"]:
        each["category_id"] = {3: 8, 7: 2}[each["category_id"]]
    document["categories"] = [{"id": 8, "name": "round"}, {"id": 2, "name": "square"}]
    file.write_text(json.dumps(document))

    after: Any = edgepet.evaluate(place / "things.pet", tmp_path / "data")
    document["categories"][0]["name"] = "oval"
    file.write_text(json.dumps(document))
    told = refused(3, "eval", place / "things.pet", tmp_path / "data")

    assert after.value == before.value
    assert after.classes == before.classes
    assert f"{tmp_path / 'data'}: needs classes of things.pet, round, square, got oval" in told


def test_predict_tells_boxes_in_pixels_of_the_image_and_draws_them(trained: Any, place: Path, tmp_path: Path) -> None:
    images = place / "data/images/test"
    said = command("predict", place / "things.pet", images, "--draw", tmp_path / "seen", "--json", "--quiet")

    assert said.code == 0, said.err
    assert len(said.json["results"]) == 5
    for result in said.json["results"]:
        told = result["tasks"]["things"]
        scores = [each["score"] for each in told["boxes"]]
        assert scores == sorted(scores, reverse=True)
        assert all(0.05 <= score <= 1 for score in scores)
        for each in told["boxes"]:
            x, y, width, height = each["box"]
            assert each["label"] in CATEGORIES
            assert x >= 0
            assert y >= 0
            assert x + width <= 64 + 1e-6
            assert y + height <= 48 + 1e-6
        with Image.open(told["drawn"]) as drawn:
            assert drawn.size == (64, 48)


def test_a_class_is_drawn_in_one_colour_whatever_else_is_on_an_image(tmp_path: Path) -> None:
    preprocess, picture = squashed(Preprocess(image_size=(16, 16))), np.zeros((16, 16, 3), np.uint8)
    square, round_one = [4, 4, 12, 12, 0.9, 1], [0, 0, 3, 3, 0.8, 0]
    colours = []
    for name, found in (("alone", [square]), ("both", [square, round_one])):
        answer = boxed(name, "things", ("round", "square"), np.array(found, np.float32), preprocess, (16, 16))
        _, drawn = Drawings(draw=tmp_path).write(answer, Input(name, picture))
        assert drawn is not None
        with Image.open(drawn) as shown:
            colours.append(shown.convert("RGB").getpixel((8, 11)))  # the lower edge of the square

    assert colours == [class_colours(2)[1]] * 2


def test_a_device_answers_as_predict_does(trained: Any, place: Path, tmp_path: Path) -> None:
    store, image = tmp_path / "store", place / "data/images/test/000.png"
    assert command("device", "init", "--store", store, "--for", place / "things.pet").code == 0
    assert command("device", "install", "--store", store, place / "things.pet").code == 0
    predicted = command("predict", place / "things.pet", image, "--json", "--quiet").json["results"][0]["tasks"][
        "things"
    ]

    for mode in ("merged", "slots"):
        said = command(
            "device",
            "run",
            "--store",
            store,
            "things",
            image,
            "--mode",
            mode,
            "--draw",
            tmp_path / mode,
            "--json",
            "--quiet",
        )
        assert said.code == 0, said.err
        (result,) = said.json["results"]
        assert (result["image"], result["task"]) == ("000.png", "things")
        assert (tmp_path / mode / "000.png").is_file()
        assert [each["label"] for each in result["boxes"]] == [each["label"] for each in predicted["boxes"]]
        for got, expected in zip(result["boxes"], predicted["boxes"], strict=True):
            assert got["score"] == pytest.approx(expected["score"], abs=1e-4)
            np.testing.assert_allclose(got["box"], expected["box"], atol=1e-2)
    seen = command("device", "run", "--store", store, "things", image)
    assert seen.code == 0, seen.err


def test_inspect_tells_of_a_detector(trained: Any, place: Path) -> None:
    said = command("inspect", place / "things.pet")

    assert said.code == 0
    assert "val AP " in said.out
    assert "2 classes: round, square" in said.out


def test_a_training_of_boxes_goes_on_where_it_stopped(place: Path, tmp_path: Path) -> None:
    """The same bytes come out as of one that was not interrupted."""
    spec = f"test_vit@{place / 'test_vit-3.safetensors'}"
    given: dict[str, Any] = {
        "task": "boxes", "epochs": 3, "batch_size": 4, "image_size": 64, "precision": "fp32", "device": "cpu",
        "augment": ("flip", "crop"), "head": "fcos,width=8,depth=1",
    }  # fmt: skip
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    def stop(step: Any) -> None:
        if step.epoch == 2 and step.val_top1 is not None:
            raise RuntimeError

    edgepet.train(place / "data", spec, "ssf", tmp_path / "a/things.pet", **given)
    with pytest.raises(RuntimeError):
        edgepet.train(place / "data", spec, "ssf", tmp_path / "b/things.pet", say=stop, **given)
    edgepet.train(place / "data", spec, "ssf", tmp_path / "b/things.pet", resume=True, **given)

    assert (tmp_path / "a/things.pet").read_bytes() == (tmp_path / "b/things.pet").read_bytes()


def test_a_frozen_network_is_run_once_and_its_maps_are_remembered(place: Path) -> None:
    said = command(*arguments(place, "frozen.pet", "linear-probe", head="fcos,width=4,depth=1"), "-v")

    assert said.code == 0, said.err
    assert "compute once the maps of 16 images" in said.err
    assert "10 train and 6 val images with boxes of 2 classes" in said.err
    assert read_pack(place / "frozen.pet", answers=EVERY).delta.updates == ()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"augment": "mixup"}, "--augment: moves masks and boxes by flip and crop alone, got 'mixup'\n  fix: train with --augment flip,crop"),
        ({"shots": 4}, "--task boxes: does not go with --shots, got 4\n  fix: leave --shots out"),
        ({"balance": "weights"}, "--task boxes: does not go with --balance, got weights\n  fix: leave --balance out"),
        ({"dice": 1}, "--task boxes: does not go with --dice, got 1.0\n  fix: leave --dice out"),
        ({"head": "mlp"}, "--task boxes: needs a head of fcos, got --head mlp"),
    ],
)  # fmt: skip
def test_what_boxes_do_not_do_is_refused(more: dict[str, object], told: str, place: Path) -> None:
    assert told in refused(3, *arguments(place, "refused.pet", **more))


def test_boxes_are_checked_before_anything_is_tuned(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    file = tmp_path / "data/annotations/instances_train.json"
    document = json.loads(file.read_text())
    for number in (1, 2):
        document["annotations"][number]["bbox"] = [60, 40, 9, 9]
    file.write_text(json.dumps(document))
    given = arguments(place, "bad.pet")
    given[1] = tmp_path / "data"

    told = refused(3, *given)

    assert "needs boxes that fit their images, got 2 of" in told
    assert "instances_train.json.annotations[1].bbox: must lie within its image, 64 x 48, got 60, 40 to 69, 49" in told
    assert not (place / "bad.pet").exists()


@pytest.mark.parametrize(
    ("verb", "more"), [("merge", ["-o", "dense.safetensors"]), ("export-peft", ["-o", "peft"])]
)  # fmt: skip
def test_verbs_that_cannot_answer_boxes_say_so(verb: str, more: list[str], trained: Any, place: Path) -> None:
    told = refused(3, verb, place / "things.pet", *more)

    assert "things.pet.heads: must answer class here, got boxes" in told
