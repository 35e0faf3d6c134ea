"""Heads that read text, from a training to a device: their packs, exported files, and other classes without training."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgepet
from edgepet import Device
from edgepet.device.artifact import open_artifact, read_artifact
from edgepet.device.store import Store
from edgepet.exporters.exporter import ExportOptions
from edgepet.exporters.trace import base_graph
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.packs.pack import EVERY, read_pack
from edgepet.tuning.dense import MergedHead
from tests.box_folders import CATEGORIES, coco_folder
from tests.box_packs import LABELS as BOX_LABELS
from tests.box_packs import box_delta
from tests.flow import RUNTIMES, has_openvino, needs_tensorrt_rtx, refused
from tests.flow import edgepet as command
from tests.mask_folders import NAMES, index_folder
from tests.mask_packs import LABELS, mask_backbone, mask_delta, mask_pack
from tests.tiny import random_images
from tests.words import WIDTH, table, table_file

FORMATS = ("onnx", *(["openvino"] if has_openvino else []))
WORDS = table(LABELS)
FORMS = {
    "score": Form(name="score", text=WORDS),
    "context": Form(name="score", context=1, inner=8, text=WORDS),
    "published": Form(name="score", context=3, inner=16, mlp=True, width=12, depthwise=True, text=WORDS),
    "language": Form(width=12, language=2, text=WORDS),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of each form, their artefacts in ``out``, a store that has them, data/, and tables of its classes."""
    folder = tmp_path_factory.mktemp("text")
    backbone = mask_backbone(folder)
    base_graph(backbone)
    Store(folder / "store").add_graph(base_graph(backbone))
    for task, form in FORMS.items():
        mask_pack(folder / f"{task}.pet", backbone, mask_delta(backbone, "ssf", form=form, task=task))
        Device(folder / "store").install(folder / f"{task}.pet")
    for precision in ("fp32", "fp16"):
        packs = [folder / f"{task}.pet" for task in FORMS]
        edgepet.export(packs, folder / "out", options=ExportOptions(to=FORMATS, precision=precision))  # type: ignore[arg-type]
    index_folder(folder / "data", train=24, val=6, test=4, size=(40, 48))
    table_file(folder / "words.safetensors", NAMES)
    table_file(folder / "others.safetensors", ("sand", "ice"))
    return folder


@pytest.fixture(scope="module")
def backbone(place: Path) -> Backbone:
    return mask_backbone(place)


def in_torch(place: Path, backbone: Backbone, task: str, images: Any) -> Any:
    return MergedHead(backbone, read_pack(place / f"{task}.pet", answers=EVERY).delta)(images)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("task", FORMS)
def test_an_exported_head_answers_as_torch_does(task: str, name: str, precision: str, place: Path, backbone: Backbone) -> None:  # fmt: skip
    folder, images = place / f"out/{task}-{name}-{precision}", random_images(4, 5, 64)
    artifact = read_artifact(folder)
    expected = in_torch(place, backbone, task, images)

    runner = open_artifact(folder, artifact, threads=1)
    logits = runner(images)
    runner.close()

    assert artifact.verified
    limit = {"fp32": 1e-4, "fp16": 2e-2}[precision]
    assert np.abs(logits - expected).max() <= limit * np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 1e-2  # of images that differ


@pytest.mark.parametrize("task", FORMS)
def test_an_exported_file_has_no_tower_and_no_more_of_a_table_than_it_computes_with(task: str, place: Path) -> None:
    model = onnx.load(str(place / f"out/{task}-onnx-fp32/model.onnx"))
    head = read_pack(place / f"{task}.pet", answers=EVERY).delta.heads[0].head

    own = [x for x in model.graph.initializer if x.name.startswith("head.") and x.data_type == onnx.TensorProto.FLOAT]
    sizes = {x.name: int(np.prod(x.dims, dtype=int)) for x in own}
    beside = [name for name in sizes if name.endswith((".eps", ".scale", "scales"))]
    every = sum(array.size for array in head.arrays())  # a product of a map and of features is two tensors
    held = sum(sizes.values()) - sum(sizes[name] for name in beside)
    assert head.stored_values <= held <= every < 1.2 * head.stored_values
    of_text = [x.name for x in own if list(x.dims[:2]) == [len(LABELS), WIDTH]]
    assert of_text == (["head.logits.weight"] if task == "score" else [])


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("mode", ["merged", "slots"])
@pytest.mark.parametrize("task", FORMS)
def test_a_device_answers_as_torch_does(task: str, mode: str, runtime: str, place: Path, backbone: Backbone) -> None:
    images = random_images(3, 3, 64)
    expected = in_torch(place, backbone, task, images)

    with Device(place / "store").open(task, runtime=runtime, mode=mode, threads=1) as opened:
        got = opened(images)

    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()  # float32, summed in another order


@pytest.mark.parametrize("name", [*FORMATS, pytest.param("tensorrt", marks=needs_tensorrt_rtx)])
def test_a_detector_that_reads_text_is_exported(name: str, place: Path, backbone: Backbone, tmp_path: Path) -> None:
    form = Form(name="fcos", width=8, depth=1, scores=True, language=1, text=table(BOX_LABELS))
    path = mask_pack(tmp_path / "found.pet", backbone, box_delta(backbone, "ssf", form=form, task="found"))

    edgepet.export([path], tmp_path / "out", options=ExportOptions(to=(name,), sms=(89,)))  # type: ignore[arg-type]

    assert read_artifact(tmp_path / f"out/found-{name}-fp32").verified == (name != "tensorrt")


@needs_tensorrt_rtx
@pytest.mark.parametrize("task", FORMS)
def test_tensorrt_builds_an_engine(task: str, place: Path, tmp_path: Path) -> None:
    edgepet.export([place / f"{task}.pet"], tmp_path, options=ExportOptions(to=("tensorrt",), sms=(89,)))

    assert (tmp_path / f"{task}-tensorrt-fp32").is_dir()


# -------------------------------------------------------------------------------------------------------------- training


def arguments(place: Path, output: str, **more: object) -> list[object]:
    spec = f"test_vit@{place / 'test_vit-5.safetensors'}"
    given = {"epochs": 12, "batch-size": 4, "img-size": 64, "train-precision": "fp32", "device": "cpu"}
    given |= {"method": "linear-probe", **more}
    told = [text for key, value in given.items() for text in (f"--{key}", value)]
    return ["train", place / "data", "--backbone", spec, *told, "-o", place / output]


@pytest.fixture(scope="module")
def trained(place: Path) -> Any:
    """``land.pet``: the JSON of its training."""
    said = command(*arguments(place, "land.pet", head="score", text=place / "words.safetensors"), "--json", "--quiet")
    assert said.code == 0, said.err
    return said.json


def test_a_training_by_text_learns_and_says_whose(trained: Any, place: Path) -> None:
    delta = read_pack(place / "land.pet", answers=EVERY).delta

    assert trained["val"]["value"] > 0.5  # of three colours in blocks; of chance there are 0.2
    assert trained["algebra_max_abs"] <= trained["algebra_limit"]
    assert delta.training["text"] == {"source": "seeds", "sha256": delta.training["text"]["sha256"]}  # type: ignore[index]
    assert len(delta.training["text"]["sha256"]) == 64  # type: ignore[index]
    assert delta.heads[0].head.labels == NAMES
    assert trained["head"] == delta.training["head"] == "score"


def test_score_maps_that_are_judged_change_what_is_learnt(place: Path) -> None:
    made = {}
    for aux in ("true", "false"):
        asked = arguments(
            place,
            f"aux-{aux}.pet",
            head=f"score,mlp=true,width=8,aux={aux}",
            text=place / "words.safetensors",
            epochs=2,
        )
        assert command(*asked, "--quiet").code == 0
        made[aux] = read_pack(place / f"aux-{aux}.pet", answers=EVERY).delta.heads[0].head

    assert made["true"].stored_values == made["false"].stored_values
    assert any(not np.array_equal(a, b) for a, b in zip(made["true"].arrays(), made["false"].arrays(), strict=True))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"head": "score"}, "--head: needs a vector of text for each class, got score alone\n  fix: add --text TABLE.safetensors, which `edgepet text` or docs/guide/text.md makes\n"),
        ({"head": "mlp", "text": "{place}/words.safetensors"}, "--text: is read by no head here, got --head mlp,width=64,depthwise=false,norm=false\n  fix: ask for --head score or --head mlp,language=1, or leave --text out\n"),
        ({"head": "score", "text": "{place}/others.safetensors"}, "{place}/others.safetensors: needs the 3 classes of the task, in any order, got no red, green, blue and sand, ice\n"),
    ],
)  # fmt: skip
def test_text_that_does_not_fit_is_told_before_any_work(more: dict[str, str], told: str, place: Path) -> None:
    given = {key: value.format(place=place) for key, value in more.items()}

    assert refused(3, *arguments(place, "no.pet", **given)) == told.format(place=place)


# --------------------------------------------------------------------------------------------------------- other classes


def test_a_table_gives_a_pack_other_classes_without_training(trained: Any, place: Path, tmp_path: Path) -> None:
    said = command("pack", place / "land.pet", "--text", place / "others.safetensors", "-o", tmp_path / "other.pet", "--json", "--quiet")  # fmt: skip

    assert said.code == 0, said.err
    before, pack = (read_pack(path, answers=EVERY).delta for path in (place / "land.pet", tmp_path / "other.pet"))
    (judged,) = pack.heads
    assert said.json["classes"] == ["sand", "ice"]
    assert (judged.head.labels, judged.value, judged.n) == (("sand", "ice"), 0.0, 0)
    assert pack.training == {**before.training, "text": {"source": "seeds", "sha256": pack.training["text"]["sha256"]}}  # type: ignore[index]
    assert pack.training["text"] != before.training["text"]
    assert pack.probes["fp32"].logits.shape == (4, 2)
    first, second = before.heads[0].head.steps[0].layer, judged.head.steps[0].layer
    assert all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("weight", "bias"))
    command("predict", tmp_path / "other.pet", place / "data/images/test/000.png", "--masks", tmp_path / "m", "--quiet")
    assert (tmp_path / "m/000.png").is_file()


def test_the_table_of_its_training_gives_a_pack_the_answers_that_it_had(trained: Any, place: Path, tmp_path: Path, backbone: Backbone) -> None:  # fmt: skip
    edgepet.pack(place / "land.pet", tmp_path / "same.pet", text=place / "words.safetensors")

    again: Any = command("eval", tmp_path / "same.pet", place / "data", "--json", "--quiet").json
    before: Any = command("eval", place / "land.pet", place / "data", "--json", "--quiet").json
    assert again["value"] == pytest.approx(before["value"], abs=2e-3)  # fp16 of another scale


def test_a_pack_that_takes_no_other_classes_says_why(place: Path, tmp_path: Path) -> None:
    output, words = tmp_path / "a.pet", place / "others.safetensors"

    assert "context decoder's constants are not made anew" in refused(
        3, "pack", place / "context.pet", "--text", words, "-o", output
    )
    assert "weights that are learnt" in refused(3, "pack", place / "language.pet", "--text", words, "-o", output)
    told = refused(3, "pack", place / "score.pet", "--text", words, "--codec", "int8", "-o", output)
    assert (
        told
        == "--text: does not go with --codec, got int8\n  fix: leave --codec out, and store what comes out in fewer bytes\n"
    )
    assert not output.exists()


# ------------------------------------------------------------------------------------------ adapt on one, finetune another


def test_a_training_of_masks_starts_from_tensors_of_another(place: Path) -> None:
    """LV-Adapter's stages: adapters that were tuned before, with language, and a head that starts anew."""
    words, more = place / "words.safetensors", {"epochs": 1, "method": "multi-scale-adapter", "set": "width=4"}
    first = [*arguments(place, "adapted.pet", head="mlp,width=8,language=1", text=words, **{**more, "lr": 0.05})]
    assert command(*first, "--quiet").code == 0

    second = [*arguments(place, "tuned.pet", head="linear", **{**more, "lr": 1e-9, "init": place / "adapted.pet"})]
    said = command(*second, "--quiet", "--json")

    assert said.code == 0, said.err
    adapted, tuned = (read_pack(place / f"{task}.pet", answers=EVERY).delta for task in ("adapted", "tuned"))
    (one,), (other,) = adapted.branches, tuned.branches
    assert one.kind == "stage-prompt"
    assert np.abs(np.asarray(one.tensors["out.weight"])).max() > 0
    for name, tensor in one.tensors.items():
        np.testing.assert_allclose(other.tensors[name], tensor, atol=1e-3)  # fp16, and a step of no length
    assert str(tuned.training["init"]).startswith("sha256:")
    told = refused(3, *arguments(place, "no.pet", init=place / "adapted.pet", method="ssf"))
    assert told == f"--init {place}/adapted.pet: needs tensors of ssf, got multi-scale-adapter\n"


def test_a_detector_learns_with_its_score_maps_judged(place: Path) -> None:
    coco_folder(place / "things", train=10, val=4, size=(48, 64))
    table_file(place / "things.safetensors", CATEGORIES)
    given = arguments(place, "things.pet", task="boxes", head="fcos,width=8,depth=1,scores=true", epochs=2, text=place / "things.safetensors")  # fmt: skip
    given[1] = place / "things"

    said = command(*given, "--json", "--quiet")

    assert said.code == 0, said.err
    assert said.json["algebra_max_abs"] <= said.json["algebra_limit"]
    delta = read_pack(place / "things.pet", answers=EVERY).delta
    assert delta.heads[0].head.answer == "boxes"
    assert delta.training["text"]["source"] == "seeds"  # type: ignore[index]
    assert "compare" not in [step.layer.kind for step in delta.heads[0].head.steps]  # a constant text is a product
