"""Boxes, a mask and labels of one pack from one run of the network, in every verb."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgepet
from edgepet.deltas.joined import apart, as_rows
from edgepet.device.answers import BoxesAnswer, LabelsAnswer, MaskAnswer, SeveralAnswers
from edgepet.device.artifact import open_artifact, read_artifact
from edgepet.device.serving import Device
from edgepet.errors import CheckError, InputError
from edgepet.packs.pack import EVERY, encode_pack, read_pack, write_pack
from edgepet.proving.subject import one_head
from edgepet.tuning.dense import MergedHead
from edgepet.tuning.work_folder import read_work
from tests.box_folders import CATEGORIES
from tests.box_packs import require_same_boxes
from tests.flow import RUNTIMES, has_openvino, refused
from tests.flow import edgepet as command
from tests.mask_folders import save
from tests.mask_packs import mask_backbone
from tests.scene_folders import MASKED, scene_folder
from tests.tiny import tiny_vit

pytest.importorskip("faster_coco_eval", reason="the package faster-coco-eval is not installed")

FORMATS = ["onnx", *(["openvino"] if has_openvino else [])]
HEADS = ("boxes", "mask", "labels")
OUTPUTS = [
    "boxes.found",
    "boxes.boxes",
    "boxes.scores",
    "boxes.labels",
    "mask.logits",
    "mask.mask",
    "labels.logits",
    "labels.scores",
]
SPEC = "test_vit@{}/test_vit-5.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ of boxes, masks and labels and the weights of a tiny transformer."""
    folder = tmp_path_factory.mktemp("scene")
    scene_folder(folder / "data", size=(48, 64))
    tiny_vit(folder, 5)
    return folder


def arguments(place: Path, output: str, **more: object) -> list[object]:
    given = {
        "task": ",".join(HEADS), "head": "fcos,width=8,depth=1+mlp,width=8", "epochs": 2, "batch-size": 4, "img-size": 64, "lr": 0.01,
        "train-precision": "fp32", "device": "cpu", **more,
    }  # fmt: skip
    told = [text for key, value in given.items() for text in (f"--{key}", value)]
    return ["train", place / "data", "--backbone", SPEC.format(place), "--method", "ssf", *told, "-o", place / output]


@pytest.fixture(scope="module")
def trained(place: Path) -> Any:
    """The JSON of a training; ``scene.pet`` lies in ``place``, and its exports below ``out``."""
    said = command(*arguments(place, "scene.pet"), "--json", "--quiet")
    assert said.code == 0, said.err
    for precision in ("fp32", "fp16"):
        made = command(
            "export", place / "scene.pet", "--backbone", SPEC.format(place), "--to", ",".join(FORMATS), "--precision", precision,
            "--data", place / "data", "-o", place / "out", "--json", "--quiet",
        )  # fmt: skip
        assert made.code == 0, made.err
    return said.json


def images(count: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).standard_normal((count, 3, 64, 64), dtype=np.float32)


def require_same(got: tuple[Any, ...], expected: tuple[Any, ...], *, limit: float = 1e-4) -> None:
    """Boxes match, and logits are near."""
    for one, other in zip(got[0], expected[0], strict=True):
        require_same_boxes(one, other)
    for one, other in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=limit * np.abs(other).max())


def test_a_training_tells_each_head(trained: Any, place: Path) -> None:
    delta = read_pack(place / "scene.pet", answers=EVERY).delta

    assert delta.answers == HEADS
    assert [each["name"] for each in trained["heads"]] == list(HEADS)
    assert [each["val"]["metric"] for each in trained["heads"]] == ["map", "miou", "map"]
    assert trained["head"] == "fcos,width=8,depth=1,norm=false+mlp,width=8,depthwise=false,norm=false+pooled"
    values = [each["val"]["value"] for each in trained["heads"]]
    assert [each.value for each in delta.heads] == values
    assert trained["val"] == {"metric": "mean", "value": pytest.approx(np.mean(values)), "n": 6}
    assert trained["head_params"] == sum(each.head.stored_values for each in delta.heads)
    assert [each["name"] for each in trained["heads"][1]["classes"]] == list(MASKED)
    assert [each["name"] for each in trained["heads"][0]["classes"]] == list(CATEGORIES)
    assert trained["algebra_max_abs"] <= trained["algebra_limit"]
    assert delta.probes["fp32"].logits.shape == (4, 2 + 3 + 3)


@pytest.mark.parametrize("runtime", [*RUNTIMES, "torch"])
def test_eval_judges_each_head(runtime: str, trained: Any, place: Path) -> None:
    report: Any = edgepet.evaluate(place / "scene.pet", place / "data", split="val", runtime=runtime)

    assert list(report.heads) == list(HEADS)
    for each in trained["heads"]:
        assert report.heads[each["name"]].value == pytest.approx(each["val"]["value"], abs=1e-3)
    assert (report.metric, report.n) == ("mean", 6)
    assert report.value == pytest.approx(trained["val"]["value"], abs=1e-3)


def test_people_see_each_head(trained: Any, place: Path) -> None:
    lines = command("eval", place / "scene.pet", place / "data").out.splitlines()

    assert [line for line in lines if line.rstrip(":") in HEADS] == ["boxes:", "mask:", "labels:"]
    assert sum(line.startswith(("AP ", "mIoU ", "mean AP ")) for line in lines) == 3


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("mode", ["merged", "slots"])
def test_a_device_runs_all_heads_behind_one_network(
    mode: str, runtime: str, trained: Any, place: Path, tmp_path: Path
) -> None:
    store = ["--store", tmp_path / "store"]
    assert command("device", "init", *store, "--for", place / "scene.pet").code == 0
    assert command("device", "install", *store, place / "scene.pet").code == 0
    pictures = sorted((place / "data/images/test").iterdir())
    expected = MergedHead(mask_backbone(place), read_pack(place / "scene.pet", answers=EVERY).delta)

    said = command(
        "device", "run", *store, "scene", *pictures, "--mode", mode, "--runtime", runtime, "--json", "--quiet"
    )
    with Device(tmp_path / "store").open("scene", runtime=runtime, mode=mode) as task:
        answers, rows = task.predict(pictures), task(images())
        names = [meaning.name for meaning in task.meanings]

    assert said.code == 0, said.err
    assert names == list(HEADS)
    require_same(apart(rows, expected.shapes), expected.each(images()))
    for result, answer in zip(said.json["results"], answers, strict=True):
        assert isinstance(answer, SeveralAnswers)
        assert [type(answer.heads[name]) for name in HEADS] == [BoxesAnswer, MaskAnswer, LabelsAnswer]
        assert list(result["heads"]) == list(HEADS)
        assert result["heads"]["labels"]["task"] == "scene.labels"
        assert sum(each["pixels"] for each in result["heads"]["mask"]["classes"]) == pytest.approx(1)


def test_predict_names_each_head_and_draws_them(trained: Any, place: Path, tmp_path: Path) -> None:
    picture = place / "data/images/test/000.png"
    said = command(
        "predict", place / "scene.pet", place / "out/scene-onnx-fp32", picture, "--draw", tmp_path / "seen", "--masks", tmp_path / "masks",
        "--json", "--quiet",
    )  # fmt: skip

    assert said.code == 0, said.err
    ((one, other),) = [result["tasks"].values() for result in said.json["results"]]
    assert list(one["heads"]) == list(HEADS)
    for name in ("boxes", "labels"):
        assert [each["label"] for each in one["heads"][name][name]] == [
            each["label"] for each in other["heads"][name][name]
        ]
    assert Path(one["heads"]["mask"]["mask"]).is_file()
    assert Path(one["heads"]["boxes"]["drawn"]).is_file()
    assert len({one["heads"]["mask"]["drawn"], one["heads"]["boxes"]["drawn"]}) == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", FORMATS)
def test_one_file_has_named_outputs_and_is_verified_head_by_head(
    name: str, precision: str, trained: Any, place: Path
) -> None:
    folder = place / f"out/scene-{name}-{precision}"
    network = MergedHead(mask_backbone(place), read_pack(place / "scene.pet", answers=EVERY).delta)

    artifact = read_artifact(folder)
    given = open_artifact(folder, artifact, threads=1).outputs(images())
    said = command("verify", folder, "--data", place / "data", "--backbone", SPEC.format(place), "--json", "--quiet")

    assert [each.meaning.name for each in artifact.heads] == list(HEADS)
    assert artifact.answer_places == (0, 4, 6)
    if precision == "fp32":
        require_same(tuple(given[place] for place in artifact.answer_places), network.each(images()))
    np.testing.assert_array_equal(given[1], given[0][:, :, :4])
    assert given[5].dtype == np.uint8
    assert said.code == 0, said.err
    names = [each["name"] for each in said.json["checks"]]
    assert [each.split(":")[0] for each in names] == ["files", *(head for head in HEADS for _ in range(2))]
    assert all(each.parity is not None for each in artifact.heads)
    if name == "onnx":
        model = onnx.load(str(folder / "model.onnx"))
        assert [each.name for each in model.graph.output] == OUTPUTS
        onnx.checker.check_model(model, full_check=True)


def test_an_exported_model_is_judged_as_its_pack(trained: Any, place: Path) -> None:
    judged: list[Any] = [
        edgepet.evaluate(model, place / "data") for model in (place / "out/scene-onnx-fp32", place / "scene.pet")
    ]

    for name in HEADS:
        assert judged[0].heads[name].value == pytest.approx(judged[1].heads[name].value, abs=1e-3)


def test_heads_of_one_pack_answer_as_they_do_alone(trained: Any, place: Path) -> None:
    delta, backbone = read_pack(place / "scene.pet", answers=EVERY).delta, mask_backbone(place)

    together = MergedHead(backbone, delta).each(images())

    for number, each in enumerate(together):
        np.testing.assert_array_equal(MergedHead(backbone, one_head(delta, number))(images()), each)


def test_rows_are_taken_apart_as_they_were_joined() -> None:
    parts = [np.arange(24.0).reshape(2, 3, 4), np.arange(4.0).reshape(2, 2), np.arange(36.0).reshape(2, 2, 3, 3)]

    rows = as_rows(parts)

    assert rows.shape == (2, 12 + 2 + 18)
    for part, again in zip(parts, apart(rows, [(3, 4), (2,), (2, 3, 3)]), strict=True):
        np.testing.assert_array_equal(again, part)
    assert as_rows(parts[:1]) is parts[0]


def test_weights_of_losses_and_the_start_of_another_training_take_part(trained: Any, place: Path) -> None:
    plain, heavy, begun = (
        command(*arguments(place, f"{name}.pet", epochs=1, **more), "--json", "--quiet")
        for name, more in (("plain", {}), ("heavy", {"task-weights": "mask=20,boxes=0.1"}), ("begun", {"init": place / "scene.work"}))
    )  # fmt: skip
    for said in (plain, heavy, begun):
        assert said.code == 0, said.err

    deltas = {name: read_pack(place / f"{name}.pet", answers=EVERY).delta for name in ("plain", "heavy", "begun")}
    assert deltas["heavy"].training["task weights"] == {"boxes": 0.1, "mask": 20.0}
    assert re.fullmatch("sha256:[0-9a-f]{64}", str(deltas["begun"].training["init"]))
    arrays = {name: np.concatenate([x.ravel() for x in delta.arrays()]) for name, delta in deltas.items()}
    assert np.abs(arrays["heavy"] - arrays["plain"]).max() > 1e-3
    assert np.abs(arrays["begun"] - arrays["plain"]).max() > 1e-3


def test_pretrain_on_all_and_train_on_each_from_there(place: Path) -> None:
    given = arguments(place, "broad.work", epochs=1)
    broad = command("pretrain", *given[1:], "--json", "--quiet")
    assert broad.code == 0, broad.err

    work = read_work(place / "broad.work")
    assert [each["name"] for each in broad.json["heads"]] == list(HEADS)
    assert broad.json["val"]["metric"] == "mean"
    assert work.method == "ssf"
    assert not (place / "broad.checkpoint").exists()
    for task, head in (("boxes", "fcos,width=8,depth=1"), ("mask", "linear"), ("labels", "pooled")):
        begun = command(
            *arguments(place, f"on-{task}.pet", task=task, head=head, epochs=1, lr=1e-6, init=place / "broad.work"),
            "--json",
            "--quiet",
        )
        assert begun.code == 0, begun.err
        started = read_work(place / f"on-{task}.work").tensors
        assert max(float(np.abs(started[name] - x).max()) for name, x in work.tensors.items()) < 1e-4


def test_pretraining_is_told_to_people(place: Path) -> None:
    said = command("pretrain", *arguments(place, "told.work", epochs=1)[1:])

    assert said.code == 0, said.err
    assert [line.split(":")[0].strip() for line in said.out.splitlines() if ": val " in line] == list(HEADS)
    assert "--init" in said.out


def test_inspect_tells_the_classes_of_each_head(trained: Any, place: Path) -> None:
    for model in (place / "scene.pet", place / "out/scene-onnx-fp32"):
        said = command("inspect", model, "--json", "--quiet").json
        lines = command("inspect", model).out.splitlines()

        assert [(each["name"], each["answer"], each["classes"]) for each in said["heads"]] == [
            ("boxes", "boxes", list(CATEGORIES)), ("mask", "mask", list(MASKED)), ("labels", "labels", list(MASKED)),
        ]  # fmt: skip
        assert "  labels: 3 classes: ground, round, square" in lines


def test_a_pack_whose_second_head_answers_otherwise_is_not_installed(trained: Any, place: Path, tmp_path: Path) -> None:
    pack = read_pack(place / "scene.pet", answers=EVERY)
    probe = pack.delta.probes["fp32"]
    wrong = probe.logits.copy()
    wrong[:, 3] += 100 * probe.tolerance
    write_pack(
        tmp_path / "wrong.pet", replace(pack.delta, probes={"fp32": replace(probe, logits=wrong)}), kept=pack.planes
    )
    assert command("device", "init", "--store", tmp_path / "store", "--for", place / "scene.pet").code == 0

    with pytest.raises(CheckError) as error:
        Device(tmp_path / "store").install(tmp_path / "wrong.pet", runtime="onnxruntime")

    assert "task 'scene' on onnxruntime, fp32: must answer its own probe within" in str(error.value)


def test_a_classifier_beside_other_heads_is_not_run(trained: Any, place: Path, tmp_path: Path) -> None:
    delta = read_pack(place / "scene.pet", answers=EVERY).delta
    twice = replace(
        delta,
        heads=(delta.heads[0], replace(delta.heads[0], head=replace(delta.heads[0].head, name="other"))),
        probes={},
    )
    assert command("device", "init", "--store", tmp_path / "store", "--for", place / "scene.pet").code == 0

    with pytest.raises(InputError) as error:
        Device(tmp_path / "store").install(encode_pack(twice))

    what = "must be a classifier, or have one head for each answer, to be run here"
    assert str(error.value) == f"task 'scene': {what}, got boxes, other"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"task": "boxes,class"}, "--task: is class or mask or boxes or labels, or several of the last three, got 'boxes,class'"),
        ({"task": "boxes,boxes"}, "--task: is class or mask or boxes or labels, or several of the last three, got 'boxes,boxes'"),
        ({"task": "boxes,labels"}, "--task boxes,labels: needs a head of fcos, pooled, got --head mlp"),
        ({"head": "mlp+linear"}, "--task boxes,mask,labels: needs a head of linear, mlp, fcos, pooled, score, got --head linear"),
        ({"task-weights": "mask=0"}, "--task-weights: needs weights above 0 of mask, boxes, labels, as boxes=1,mask=0.5, got 'mask=0'"),
        ({"task": "boxes,mask", "task-weights": "labels=2"}, "--task boxes,mask: has no weight of what it is not asked for, got --task-weights labels"),
        ({"shots": 3}, "--task boxes,mask,labels: does not go with --shots, got 3\n  fix: leave --shots out"),
    ],
)  # fmt: skip
def test_what_several_heads_do_not_do_is_refused(more: dict[str, object], told: str, place: Path) -> None:
    assert told in refused(3, *arguments(place, "refused.pet", **more))


def test_heads_need_the_same_images(place: Path, tmp_path: Path) -> None:
    scene_folder(tmp_path / "data", size=(48, 64))
    for kind, pixels in (("images", np.zeros((48, 64, 3), np.uint8)), ("masks", np.zeros((48, 64), np.uint8))):
        save(tmp_path / f"data/{kind}/train/more.png", pixels)
    given = [
        str(each).replace(str(place / "data"), str(tmp_path / "data"))
        for each in arguments(place, "none.pet", task="boxes,mask")
    ]

    told = refused(3, *given)

    what = "needs the same images with boxes and with masks, got images/train/more.png with one alone"
    assert f"{tmp_path / 'data'}: {what}\n  fix: give every image both, or train one head a time" in told
