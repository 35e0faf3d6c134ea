"""Tasks of masks on a device: installed, asked on each runtime, merged and in slots, from Python and the command line."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgepet import Device
from edgepet.canonical import canonical_json
from edgepet.deltas.delta import JudgedHead
from edgepet.deltas.heads import mask_of
from edgepet.deltas.probe import Probe, condensed
from edgepet.device.answers import Answer, MaskAnswer
from edgepet.device.fitting import fit
from edgepet.device.map_heads import map_head_of
from edgepet.device.store import Store
from edgepet.errors import CheckError, InputError
from edgepet.exporters.trace import base_graph
from edgepet.graphs.base import graph_at
from edgepet.graphs.manifest import listing
from edgepet.images.masks import class_colours, mask_png, overlay_png, resized
from edgepet.images.preprocess import normalize, to_pixels
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.packs.pack import EVERY, encode_pack, read_pack, write_pack
from edgepet.spec import NpArray
from edgepet.tuning.dense import MergedHead
from tests.flow import RUNTIMES, refused
from tests.flow import edgepet as command
from tests.mask_folders import index_folder
from tests.mask_packs import LABELS, mask_backbone, mask_delta, mask_pack
from tests.splitmix import uniform
from tests.tiny import make_delta, random_pixels

FORMS = {"probe": Form(name="linear", maps=(1,)), "deep": Form(width=8, depthwise=True, norm=True)}
TASKS = {"ssf": "ssf", "lora": "lora", "vpt": "vpt-shallow", "probe": "linear-probe", "deep": "ssf"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with five tasks of masks on one backbone, their packs, and data/ of images."""
    folder = tmp_path_factory.mktemp("device")
    backbone = mask_backbone(folder)
    device = Device(folder / "store")
    for task, method in TASKS.items():
        delta = mask_delta(backbone, method, form=FORMS.get(task), task=task)
        Store(folder / "store").add_graph(base_graph(backbone, delta.branches))
        device.install(mask_pack(folder / f"{task}.pet", backbone, delta))
    index_folder(folder / "data", train=2, val=4, test=3, size=(40, 48))
    return folder


@pytest.fixture(scope="module")
def backbone(place: Path) -> Backbone:
    return mask_backbone(place)


def inputs(place: Path, task: str, pixels: NpArray) -> NpArray:
    preprocess = read_pack(place / f"{task}.pet", answers=EVERY).delta.preprocess
    return normalize(np.stack([to_pixels(Image.fromarray(each), preprocess) for each in pixels]), preprocess)


def in_torch(place: Path, backbone: Backbone, task: str, images: NpArray) -> NpArray:
    return MergedHead(backbone, read_pack(place / f"{task}.pet", answers=EVERY).delta)(images)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("mode", ["merged", "slots"])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_answers_as_torch_does(task: str, mode: str, runtime: str, place: Path, backbone: Backbone) -> None:
    images = inputs(place, task, random_pixels(3, 3, 48))
    expected = in_torch(place, backbone, task, images)

    with Device(place / "store").open(task, runtime=runtime, mode=mode, threads=1) as opened:
        got = opened(images)

    assert got.shape == expected.shape == (3, 3, 4, 4)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()  # float32, summed in another order
    size = backbone.preprocess.image_size
    assert (mask_of(got, size) == mask_of(expected, size)).mean() >= 0.999


def test_a_mask_is_as_large_as_its_picture(place: Path, backbone: Backbone) -> None:
    picture = np.kron(random_pixels(4, 1, 6)[0], np.ones((8, 11, 1), np.uint8)).astype(np.uint8)
    logits = in_torch(place, backbone, "ssf", inputs(place, "ssf", picture[None]))

    with Device(place / "store").open("ssf") as task:
        (answer,) = task.predict(picture)
        labels = task.labels

    assert labels == LABELS
    assert isinstance(answer, MaskAnswer)
    np.testing.assert_array_equal(answer.mask, resized(mask_of(logits, (64, 64))[0], (48, 66)))
    counts = np.bincount(answer.mask.ravel(), minlength=3)
    assert {each.label: each.pixels for each in answer.classes} == {
        LABELS[n]: counts[n] / (48 * 66) for n in range(3) if counts[n]
    }
    assert [each.pixels for each in answer.classes] == sorted((each.pixels for each in answer.classes), reverse=True)


def test_a_head_that_reads_an_early_map_runs_half_of_the_network(place: Path, backbone: Backbone) -> None:
    pack = read_pack(place / "probe.pet", answers=EVERY)
    graph = Store(place / "store").graph_of(pack)
    early, whole = fit(graph, pack.delta, "merged").part, fit(graph, replace(pack.delta, heads=(), labels=("a",), head=make_delta(classes=1, width=graph.width).head), "merged").part  # fmt: skip

    assert map_head_of(pack.delta) is pack.delta.heads[0].head
    assert len(early.file.nodes) < 0.7 * len(whole.file.nodes)
    assert not {name for name in early.outside if name.startswith("blocks.4")}


def test_tasks_of_masks_and_of_classes_look_at_one_picture(place: Path, backbone: Backbone) -> None:
    classes = make_delta(
        width=backbone.width, task="kinds", backbone="test_vit", fingerprint=backbone.fingerprint,
        preprocess=backbone.preprocess,
    )  # fmt: skip
    device = Device(place / "store")
    device.install(encode_pack(classes))

    with device.open_all(["ssf", "kinds", "lora"]) as several:
        (said,) = several.predict(random_pixels(4, 1, 48)[0])
        found = several.logits(inputs(place, "ssf", random_pixels(4, 1, 48)))

    assert [type(answer) for answer in said.values()] == [MaskAnswer, Answer, MaskAnswer]
    assert {name: each.shape for name, each in found.items()} == {
        "ssf": (1, 3, 4, 4),
        "kinds": (1, 3),
        "lora": (1, 3, 4, 4),
    }
    device.remove("kinds")


def test_a_task_in_slots_is_merged_where_that_pays_and_closed_for_another(place: Path, backbone: Backbone) -> None:
    size = Store(place / "store").graph_of(read_pack(place / "ssf.pet", answers=EVERY)).weights_bytes
    images = inputs(place, "ssf", random_pixels(3, 1, 48))
    with Device(place / "store") as device:
        first = device.open("ssf", mode="merged", memory_bytes=round(2.2 * size))
        second = device.open("lora", mode="merged", memory_bytes=round(2.2 * size))
        answers = [task(images) for task in (first, second, first)]
        events = [(event.task, event.what) for event in first.events]

    assert np.array_equal(answers[0], answers[2])
    assert events == [
        ("ssf", "merged"), ("ssf", "evicted"), ("lora", "merged"), ("lora", "evicted"), ("ssf", "merged"),
        ("ssf", "evicted"), ("lora", "merged"), ("lora", "evicted"), ("ssf", "merged"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- probes


def test_a_probe_notices_a_map_that_is_turned_or_moved() -> None:
    logits = np.random.default_rng(3).standard_normal((2, 3, 5, 5)).astype(np.float32)
    told = condensed(logits, 7)

    assert told.shape == (2, 3)
    for wrong in (np.swapaxes(logits, 2, 3), np.roll(logits, 1, axis=3), logits[:, :, ::-1], logits[:, ::-1]):
        assert np.abs(condensed(wrong, 7) - told).max() > 1e-2
    # Written out, of one image: place p counts 1 + u(2^32 + p).
    weights = [1 + uniform(7, (1 << 32) + p) for p in range(25)]
    expected = [sum(w * float(x) for w, x in zip(weights, logits[0, c].ravel(), strict=True)) / 25 for c in range(3)]
    np.testing.assert_allclose(told[0], expected, atol=1e-6)


def test_a_pack_that_answers_otherwise_is_not_installed(place: Path, tmp_path: Path) -> None:
    pack = read_pack(place / "ssf.pet", answers=EVERY)
    probe = pack.delta.probes["fp32"]
    other = Probe(probe.seed, probe.logits + 0.5, probe.tolerance)
    write_pack(tmp_path / "wrong.pet", replace(pack.delta, task="wrong", probes={"fp32": other}), kept=pack.planes)

    with pytest.raises(CheckError) as error:
        Device(place / "store").install(tmp_path / "wrong.pet", runtime="onnxruntime")
    assert str(error.value).startswith(
        f"task 'wrong' on onnxruntime, fp32: must answer its own probe within {probe.tolerance:.2g} on logits, got 0.5"
    )
    assert "wrong" not in Device(place / "store").tasks()


def test_a_probe_lies_in_a_plane_of_its_own_and_is_small(place: Path) -> None:
    pack = read_pack(place / "ssf.pet", answers=EVERY)

    assert pack.bytes_by_kind["probe.mask"] == 4 * 4 * 3
    again = encode_pack(pack.delta, kept=pack.planes, sequence=pack.sequence)
    assert again == (place / "ssf.pet").read_bytes()


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_store_without_maps_takes_them_and_says_so_before(place: Path, tmp_path: Path) -> None:
    whole = Store(place / "store").graph_of(read_pack(place / "ssf.pet", answers=EVERY))
    store, folder = Store(tmp_path / "device"), tmp_path / "source/backbones" / whole.folder.name
    folder.mkdir(parents=True)
    for path in (*(whole.folder / name for name in whole.files), whole.folder / f"{whole.stem}.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    description = folder / f"{whole.stem}.json"
    told = json.loads(description.read_text())
    del told["maps"]
    description.write_bytes(canonical_json(told))
    store.add_graph(graph_at(description))

    with pytest.raises(InputError) as error:
        Device(store.root).install(place / "ssf.pet", runtime="onnxruntime")
    assert str(error.value) == (
        "task 'ssf': needs a graph that lists maps, got one of before there were any\n"
        "  fix: bring it again from a host: edgepet device init --for TASK.pet"
    )
    store.add_graph(whole)
    Device(store.root).install(place / "ssf.pet", runtime="onnxruntime")

    assert graph_at(store.root / "backbones" / whole.folder.name / description.name).maps == whole.maps
    assert Device(store.root).check() == ()
    assert listing(folder, [f"{whole.stem}.onnx"]).items() <= dict(whole.files).items()


def test_a_task_that_cannot_have_a_label_for_every_pixel_is_refused(place: Path) -> None:
    delta = read_pack(place / "ssf.pet", answers=EVERY).delta
    two = (*delta.heads, JudgedHead(head=replace(delta.heads[0].head, name="other"), value=0.0, n=0))

    with pytest.raises(InputError) as error:
        Device(place / "store").install(encode_pack(replace(delta, heads=two, probes={})))
    assert (
        str(error.value)
        == "task 'ssf': must be a classifier, or have one head for each answer, to be run here, got mask, other"
    )
    cut = replace(delta, preprocess=replace(delta.preprocess, crop="center", crop_fraction=0.875), probes={})
    with pytest.raises(InputError) as error:
        Device(place / "store").install(encode_pack(cut))
    assert (
        str(error.value)
        == "task 'ssf': must see all of an image to have a label for every pixel, got crop 'center' of 0.875"
    )


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_line_writes_masks_and_pictures_under_them(place: Path, tmp_path: Path) -> None:
    images = place / "data/images/test"
    said = command(
        "device", "run", "--store", place / "store", "ssf", images, "--masks", tmp_path / "m", "--draw", tmp_path / "d",
        "--json", "--quiet",
    )  # fmt: skip

    assert said.code == 0, said.err
    assert [each["image"] for each in said.json["results"]] == ["000.png", "001.png", "002.png"]
    first = said.json["results"][0]
    assert first["mask"] == str(tmp_path / "m/000.png")
    assert first["drawn"] == str(tmp_path / "d/000.png")
    with Device(place / "store").open("ssf") as task:
        answers = task.predict(images)
    for answer in answers:
        with Image.open(tmp_path / "m" / answer.image) as written:
            assert written.mode == "P"
            np.testing.assert_array_equal(np.asarray(written), answer.mask)
        with Image.open(tmp_path / "d" / answer.image) as drawn, Image.open(images / answer.image) as picture:
            assert drawn.size == picture.size
            half = np.asarray(picture.convert("RGB"), float) / 2 + np.array(class_colours(3), float)[answer.mask] / 2
            assert np.abs(np.asarray(drawn, float) - half).max() <= 0.5
    assert first["classes"] == [{"label": each.label, "pixels": each.pixels} for each in answers[0].classes]
    shown = command("device", "run", "--store", place / "store", "ssf", images / "000.png")
    assert f"{first['classes'][0]['label']} {100 * first['classes'][0]['pixels']:.1f} %" in shown.out


def test_predict_says_of_packs_what_the_device_says(place: Path, tmp_path: Path) -> None:
    image = place / "data/images/test/000.png"
    said = command("predict", place / "ssf.pet", place / "lora.pet", image, "--masks", tmp_path, "--json", "--quiet")

    assert said.code == 0, said.err
    (result,) = said.json["results"]
    with Device(place / "store").open("lora") as task:
        (answer,) = task.predict(image)
    assert result["tasks"]["lora"]["mask"] == str(tmp_path / "lora/000.png")
    assert result["tasks"]["lora"]["drawn"] is None
    with Image.open(tmp_path / "lora/000.png") as written:
        np.testing.assert_array_equal(np.asarray(written), answer.mask)
    assert (tmp_path / "ssf/000.png").is_file()


def test_images_of_one_name_are_not_drawn_over_one_another(place: Path, tmp_path: Path) -> None:
    images = [place / "data/images/test/000.png", place / "data/images/val/000.png"]
    told = "images: must have names of their own to be drawn, got two called 000"

    assert told in refused(3, "predict", place / "ssf.pet", *images, "--draw", tmp_path)
    assert told in refused(3, "device", "run", "--store", place / "store", "ssf", *images, "--draw", tmp_path)
    same = f"--masks: needs another folder than --draw, got {tmp_path}"
    assert same in refused(3, "predict", place / "ssf.pet", images[0], "--masks", tmp_path, "--draw", tmp_path)
    assert not list(tmp_path.iterdir())


def test_lines_of_stdin_are_answered_with_masks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"{place / 'data/images/test/000.png'}\n{place / 'nothing.png'}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    said = command("device", "run", "--store", place / "store", "ssf", "-", "--masks", tmp_path, "--json", "--quiet")

    answers = [json.loads(line) for line in said.out.splitlines()]
    assert answers[0]["results"][0]["mask"] == str(tmp_path / "000.png")
    assert answers[1]["results"] == []
    assert "nothing.png" in answers[1]["error"]


def test_inspect_says_what_a_head_is(place: Path) -> None:
    said: Any = command("inspect", place / "deep.pet", "--json", "--quiet").json

    (head,) = said["heads"]
    assert (said["answer"], said["classes"]) == ("mask", list(LABELS))
    assert head["reads"] == ["map.0", "map.1", "map.2", "map.3"]
    assert head["layers"][:2] == ["norm", "point"]
    assert head["layers"][-5:] == ["depthwise", "activation", "point", "activation", "point"]
    assert (head["metric"], head["value"], head["n"]) == ("miou", None, 0)
    assert head["values"] == 8 * 4 * 64 + 8 + 8 * 9 + 8 + 64 + 8 + 3 * 8 + 3
    assert "heads" in command("inspect", place / "deep.pet").out


def test_a_task_of_masks_has_a_card(place: Path, tmp_path: Path) -> None:
    assert command("inspect", place / "deep.pet", "--card", tmp_path / "card.md").code == 0

    said = (tmp_path / "card.md").read_text().splitlines()
    assert "- Task: `deep`, semantic segmentation" in said
    assert "- mIoU on val: not scored" in said


def test_storage_counts_heads_and_bench_times_them(place: Path) -> None:
    stored: Any = command("storage", place / "ssf.pet", place / "lora.pet", "--json", "--quiet").json
    timed: Any = command("bench", place / "ssf.pet", "--rounds", "3", "--threads", "1", "--runtime", "onnxruntime", "--json", "--quiet").json  # fmt: skip

    values = read_pack(place / "ssf.pet", answers=EVERY).delta.heads[0].head.stored_values
    plain = stored["tasks"][1]["full_copy_bytes"]
    assert [each["task"] for each in stored["tasks"]] == ["lora", "ssf"]
    assert plain > stored["backbone_bytes"] + 4 * values
    assert stored["per_runtime"][0]["tasks_run"] == 2
    assert {(row["runtime"], row["precision"], row["mode"]) for row in timed["rows"]} == {
        ("onnxruntime", "fp32", "merged")
    }


def test_colours_of_classes_differ() -> None:
    colours = class_colours(255)

    assert len(set(colours)) > 230
    assert len(set(colours[:30])) == 30
    assert colours[:5] == class_colours(5)
    mask = np.array([[0, 1], [255, 2]], np.uint8)
    with Image.open(io.BytesIO(mask_png(mask, colours))) as image:
        np.testing.assert_array_equal(np.asarray(image), mask)
        assert np.asarray(image.convert("RGB"))[0, 1].tolist() == list(colours[1])
    with Image.open(io.BytesIO(overlay_png(np.zeros((2, 2, 3), np.uint8), mask, colours))) as image:
        assert np.asarray(image)[1, 0].tolist() == [128, 0, 128]
