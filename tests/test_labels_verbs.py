"""``train``, ``eval``, ``predict``, ``device``, ``export`` and ``verify`` of several labels an image."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgepet
from edgepet.deltas.layer import sigmoid
from edgepet.device.answers import LabelsAnswer
from edgepet.device.artifact import open_artifact, read_artifact
from edgepet.device.serving import Device
from edgepet.images.labels import open_labels
from edgepet.measuring.several_labels import best_thresholds, label_fit
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.labels import judge_labels
from edgepet.tuning.dense import MergedHead
from tests.box_folders import coco_folder
from tests.flow import RUNTIMES, has_openvino, refused
from tests.flow import edgepet as command
from tests.label_folders import LABELS, csv_folder
from tests.mask_packs import mask_backbone
from tests.tiny import tiny_vit

FORMATS = ["onnx", *(["openvino"] if has_openvino else [])]
SPEC = "test_vit@{}/test_vit-5.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ of labels and the weights of a tiny transformer."""
    folder = tmp_path_factory.mktemp("labels")
    csv_folder(folder / "data", train=12, val=8, test=6, size=(48, 64))
    tiny_vit(folder, 5)
    return folder


def arguments(place: Path, output: str, data: str = "data", **more: object) -> list[object]:
    given = {"epochs": 3, "batch-size": 4, "img-size": 64, "train-precision": "fp32", "device": "cpu", **more}
    told = [text for key, value in given.items() for text in (f"--{key}", value)]
    spec = SPEC.format(place)
    return ["train", place / data, "--backbone", spec, "--method", "ssf", *told, "-o", place / output]


@pytest.fixture(scope="module")
def trained(place: Path) -> Any:
    """The JSON of a training; ``things.pet`` lies in ``place``, and its exports below ``out``."""
    said = command(*arguments(place, "things.pet", lr=0.01), "--json", "--quiet")
    assert said.code == 0, said.err
    for precision in ("fp32", "fp16"):
        made = command(
            "export", place / "things.pet", "--backbone", SPEC.format(place), "--to", ",".join(FORMATS), "--precision", precision,
            "--data", place / "data", "-o", place / "out", "--json", "--quiet",
        )  # fmt: skip
        assert made.code == 0, made.err
    return said.json


def test_a_training_says_what_its_labels_are_worth(trained: Any, place: Path) -> None:
    (judged,) = read_pack(place / "things.pet", answers=EVERY).delta.heads

    val = trained["val"]
    assert (val["metric"], val["n"]) == ("map", 8)
    assert 0 <= val["low"] <= val["value"] <= val["high"] <= 1
    assert val["value"] == judged.value
    assert sorted(val) == ["f1", "high", "low", "metric", "n", "value"]
    assert [each["name"] for each in trained["classes"]] == list(LABELS)
    counts = open_labels(place / "data", "train").counts().tolist()
    assert [each["images"] for each in trained["classes"]] == counts
    assert trained["head"] == "pooled"
    assert trained["head_params"] == judged.head.stored_values == 2 * 64 + 2
    assert trained["algebra_max_abs"] <= trained["algebra_limit"]


def test_thresholds_are_those_that_are_best_on_val_of_what_is_stored(trained: Any, place: Path) -> None:
    delta = read_pack(place / "things.pet", answers=EVERY).delta
    images = open_labels(place / "data", "val")

    fit = judge_labels(MergedHead(mask_backbone(place), delta), images, delta.preprocess, ())

    assert delta.heads[0].head.thresholds == fit.thresholds
    assert trained["val"]["f1"] == fit.f1
    assert (delta.preprocess.crop, delta.preprocess.crop_fraction) == ("squash", 1.0)


@pytest.mark.parametrize("runtime", [*RUNTIMES, "torch"])
def test_eval_on_a_runtime_is_what_it_was_in_training(runtime: str, trained: Any, place: Path) -> None:
    report: Any = edgepet.evaluate(place / "things.pet", place / "data", split="val", runtime=runtime)

    assert (report.runtime, report.metric, report.n) == (runtime, "map", 8)
    assert report.value == pytest.approx(trained["val"]["value"], abs=1e-6)
    assert report.f1 == pytest.approx(trained["val"]["f1"], abs=1e-6)


def test_people_see_every_label(trained: Any, place: Path) -> None:
    lines = command("eval", place / "things.pet", place / "data").out.splitlines()

    assert lines[0].startswith("mean AP ")
    assert ", micro-F1 " in lines[0]
    assert lines[0].endswith("on 6 images, 2 classes (onnxruntime, fp32)")
    assert [line.split(":")[0].strip() for line in lines[-2:]] == list(LABELS)


def test_predict_tells_labels_at_their_thresholds(trained: Any, place: Path) -> None:
    delta = read_pack(place / "things.pet", answers=EVERY).delta
    images = place / "data/images/test"
    said = command("predict", place / "things.pet", place / "out/things-onnx-fp32", images, "--json", "--quiet")

    assert said.code == 0, said.err
    for result in said.json["results"]:
        one, other = result["tasks"].values()
        assert [each["label"] for each in one["labels"]] == [each["label"] for each in other["labels"]]
        scores = [each["score"] for each in one["labels"]]
        assert scores == sorted(scores, reverse=True)
        for each in one["labels"]:
            assert each["score"] >= delta.heads[0].head.thresholds[LABELS.index(each["label"])]
    assert any(result["tasks"]["things.pet"]["labels"] for result in said.json["results"])


@pytest.mark.parametrize("mode", ["merged", "slots"])
def test_a_device_says_what_predict_says(mode: str, trained: Any, place: Path, tmp_path: Path) -> None:
    images = sorted((place / "data/images/test").iterdir())
    asked = command("predict", place / "things.pet", *images, "--json", "--quiet").json["results"]
    store = ["--store", tmp_path / "store"]
    assert command("device", "init", *store, "--for", place / "things.pet").code == 0
    assert command("device", "install", *store, place / "things.pet").code == 0

    said = command("device", "run", *store, "things", *images, "--mode", mode, "--json", "--quiet")
    with Device(tmp_path / "store").open("things") as task:
        answers = task.predict(images)

    assert said.code == 0, said.err
    for result, expected, answer in zip(said.json["results"], asked, answers, strict=True):
        told = expected["tasks"]["things"]["labels"]
        assert [each["label"] for each in result["labels"]] == [each["label"] for each in told]
        np.testing.assert_allclose([e["score"] for e in result["labels"]], [e["score"] for e in told], atol=1e-5)
        assert isinstance(answer, LabelsAnswer)
        assert [each.label for each in answer.labels] == [each["label"] for each in told]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_exported_model_puts_out_scores_and_is_verified_again(
    name: str, precision: str, trained: Any, place: Path
) -> None:
    folder = place / f"out/things-{name}-{precision}"
    delta = read_pack(place / "things.pet", answers=EVERY).delta
    images = np.random.default_rng(7).standard_normal((3, 3, 64, 64), dtype=np.float32)
    expected = MergedHead(mask_backbone(place), delta)(images)

    artifact = read_artifact(folder)
    logits, scores = open_artifact(folder, artifact, threads=1).outputs(images)
    said = command("verify", folder, "--data", place / "data", "--backbone", SPEC.format(place), "--json", "--quiet")

    assert (artifact.answer, artifact.labels, artifact.thresholds) == ("labels", LABELS, delta.heads[0].head.thresholds)
    apart = (1e-4 if precision == "fp32" else 2e-2) * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=apart)
    np.testing.assert_allclose(scores, sigmoid(logits), atol=2e-3)
    assert said.code == 0, said.err
    assert artifact.parity is not None
    assert (artifact.parity.labels, artifact.parity.n) == (True, 2 * 8)
    if name == "onnx":
        model = onnx.load(str(folder / "model.onnx"))
        assert [each.name for each in model.graph.output] == ["logits", "scores"]
        onnx.checker.check_model(model, full_check=True)


def test_eval_of_an_exported_model_is_that_of_its_pack(trained: Any, place: Path) -> None:
    judged: list[Any] = [
        edgepet.evaluate(model, place / "data") for model in (place / "out/things-onnx-fp32", place / "things.pet")
    ]

    assert judged[0].value == pytest.approx(judged[1].value, abs=1e-6)
    assert judged[0].f1 == judged[1].f1


def test_a_pack_of_labels_says_so(trained: Any, place: Path, tmp_path: Path) -> None:
    said = command("inspect", place / "things.pet", "--card", tmp_path / "card.md", "--json", "--quiet")

    assert said.code == 0, said.err
    assert said.json["answer"] == "labels"
    assert said.json["heads"][0]["reads"] == ["features"]
    assert "The labels that every image has, of 2 classes" in (tmp_path / "card.md").read_text()


def test_boxes_stand_in_for_labels(trained: Any, place: Path) -> None:
    coco_folder(place / "boxes", train=6, val=4, test=0, size=(48, 64))

    said = command(*arguments(place, "stand.pet", "boxes", task="labels", epochs=1), "--json", "--quiet")

    assert said.code == 0, said.err
    assert [each["name"] for each in said.json["classes"]] == ["round", "square"]


def test_eval_takes_labels_in_any_order_and_no_other_one(trained: Any, place: Path, tmp_path: Path) -> None:
    csv_folder(tmp_path, train=0, val=0, test=6, size=(48, 64))
    file, lines = tmp_path / "labels.csv", (tmp_path / "labels.csv").read_text().splitlines()
    marked = [
        f"{image},{int('red' in labels)},{int('blue' in labels)}"
        for image, labels in (line.split(",") for line in lines[1:])
    ]
    file.write_text("\n".join(["image,red,blue", *marked]))
    before, after = (edgepet.evaluate(place / "things.pet", data) for data in (place / "data", tmp_path))

    assert after == before
    file.write_text(file.read_text().replace("image,red", "image,green"))
    told = refused(3, "eval", place / "things.pet", tmp_path)
    assert f"{tmp_path}: needs labels of things.pet, blue, red, got green" in told


def test_thresholds_are_chosen_and_not_given() -> None:
    scores, truth = np.array([[0.9], [0.6], [0.2]]), np.array([[1], [0], [0]])

    assert best_thresholds(scores, truth) == (0.75,)
    assert label_fit(scores, truth).f1 == 1
