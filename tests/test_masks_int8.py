"""Tasks of masks in int8: exported for each runtime, judged by mIoU, the head in float."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm

import edgepet
from edgepet.calibration.budget import divergence, drop_between
from edgepet.calibration.head_drops import mask_drop
from edgepet.calibration.head_images import head_calibration_images
from edgepet.canonical import canonical_json
from edgepet.deltas.heads import Meaning, mask_of
from edgepet.device.artifact import open_artifact, read_artifact
from edgepet.device.runtime import SharedInt8
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.exporters.exporter import ExportOptions
from edgepet.exporters.trace import base_graph
from edgepet.graphs.int8 import int8_at, open_int8
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import squashed
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_set
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.packs.pack import EVERY, read_pack
from edgepet.spec import Preprocess
from edgepet.tuning.dense import MergedHead
from tests.flow import RUNTIMES, has_openvino, refused
from tests.flow import edgepet as command
from tests.mask_folders import index_folder
from tests.mask_packs import LABELS, mask_backbone, mask_delta, mask_pack
from tests.tiny import seeded

MASKS = Meaning(name="mask", answer="mask", labels=LABELS)
FORMATS = ("onnx", *(["openvino"] if has_openvino else []))


def convnet(folder: Path) -> Backbone:
    module = seeded(timm.create_model("test_efficientnet", pretrained=False, num_classes=0), 5).eval()
    return Backbone.from_module(
        module, name="efficientnet", preprocess=squashed(Preprocess(image_size=(64, 64), orientation="exif"))
    )


MAKERS: dict[str, Callable[[Path], Backbone]] = {"vit": mask_backbone, "convnet": convnet}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return index_folder(tmp_path_factory.mktemp("calib"), train=36, val=6, test=4, size=(40, 48))


MLP, SEPARATING, LINEAR = (
    Form(width=8, maps=(2, 3)), Form(width=8, maps=(2, 3), separation=True), Form(name="linear", maps=(3,)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("network", "form"),
    [
        ("convnet", MLP),
        *(
            pytest.param(network, form, marks=pytest.mark.slow)
            for network, form in (
                ("vit", MLP), ("vit", SEPARATING), ("vit", LINEAR), ("convnet", SEPARATING), ("convnet", LINEAR)
            )
        ),
    ],
)  # fmt: skip
def test_int8_of_masks_is_judged_by_pixels_and_by_miou(network: str, form: Form, data: Path, tmp_path: Path) -> None:
    """All layers of the backbone multiply codes, and none of the head."""
    backbone = MAKERS[network](tmp_path)
    base_graph(backbone)
    mask_pack(tmp_path / "ssf.pet", backbone, mask_delta(backbone, "ssf", form=form))
    options = ExportOptions(to=FORMATS, precision="int8", calib=data)  # type: ignore[arg-type]

    report = edgepet.export([tmp_path / "ssf.pet"], tmp_path / "out", backbone=backbone, data=data, options=options)

    images = np.stack([np.full((3, 64, 64), level, np.float32) for level in (-1, 0, 1)])
    images += np.random.default_rng(3).normal(0, 0.3, images.shape).astype(np.float32)
    expected = MergedHead(backbone, read_pack(tmp_path / "ssf.pet", answers=EVERY).delta)(images)
    for made in report.artifacts:
        assert made.verified
        assert made.drop is not None
        assert (made.drop.n, made.drop.low <= made.drop.points <= made.drop.high) == (42, True)
        assert made.parity is not None
        assert made.parity.top1_agreement >= 0.9
        runner = open_artifact(made.path, read_artifact(made.path), threads=1)
        logits, mask = runner.outputs(images)
        runner.close()
        assert (mask == mask_of(logits, (64, 64))).mean() >= 0.999
        assert (mask == mask_of(expected, (64, 64))).mean() >= 0.85
    model = onnx.load(str(tmp_path / "out/ssf-onnx-int8/model.onnx"))
    coded = [tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert len([name for name in coded if name.endswith(".codes")]) > 10
    assert not [name for name in coded if name.startswith("head.")]


def test_what_masks_lose_is_the_difference_of_their_miou() -> None:
    rng = np.random.default_rng(3)
    truths = rng.integers(0, 3, (6, 8, 8)).astype(np.uint8)
    truths[0, 0] = 255
    exact = np.stack([(truths == label) * 9.0 for label in range(3)], axis=1)
    worse = exact.copy()
    worse[:3, :, :, :4] = rng.standard_normal((3, 3, 8, 4))

    drop = mask_drop(exact, worse, truths)

    assert mask_drop(exact, exact, truths) == replace(drop, points=0.0, low=0.0, high=0.0, kl=0.0)
    ious = []
    answers = worse.argmax(1)
    for label in range(3):
        counted = truths != 255
        hit = ((answers == label) & (truths == label) & counted).sum()
        ious.append(hit / ((((answers == label) | (truths == label)) & counted).sum()))
    assert drop.points == pytest.approx(100 * (1 - np.mean(ious)))
    assert 0 < drop.low < drop.points < drop.high
    flat = [np.moveaxis(each, 1, -1).reshape(-1, 3) for each in (exact, worse)]
    assert drop.kl == pytest.approx(divergence(*flat))
    assert drop_between(*flat, np.zeros(len(flat[0]), int)).kl == pytest.approx(drop.kl)


def test_calibration_images_of_masks_are_drawn_and_written_down(data: Path) -> None:
    made = head_calibration_images(data, [MASKS], Preprocess(image_size=(32, 32)), count=34)
    facts: Any = made.facts

    assert (len(made.measured), len(made.held_out), len(made.judged)) == (26, 8, 42)
    assert (facts["images"], facts["per_class"]) == (34, {})
    assert set(made.digests) <= {f"images/train/{n:03}.png" for n in range(36)}
    assert {path.name for path in made.held_out.paths}.isdisjoint(path.name for path in made.measured.paths)
    assert made.heads[0].held_out.paths == made.held_out.paths
    assert (
        made.heads[0].judged.paths
        == made.judged.paths
        == (*open_masks(data, "train").paths, *open_masks(data, "val").paths)
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "classes.txt").write_text("a\nb\nc\n"), "needs the 3 classes of mask in their order, red, green, blue, got a, b, c"),
        (lambda folder: [path.unlink() for path in sorted(folder.glob("*/train/*"))[::2]], "needs at least 32 different images to calibrate on, got 18 in 18 files"),
        (
            lambda folder: (folder / "images/test/000.png").write_bytes((folder / "images/train/001.png").read_bytes()),
            "must not overlap the test split of {folder}, got 1 of its images: 001.png is 000.png\n  fix: calibrate on train, so that test can still judge",
        ),
    ],
)  # fmt: skip
def test_calibration_images_of_masks_that_cannot_be_used_are_refused(
    change: Callable[[Path], object], told: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    change(folder)

    with pytest.raises(InputError) as error:
        head_calibration_images(folder, [MASKS], Preprocess(image_size=(32, 32)))
    assert told.format(folder=folder) in str(error.value)


def test_int8_of_masks_needs_images_with_masks(tmp_path: Path, data: Path) -> None:
    backbone = mask_backbone(tmp_path)
    base_graph(backbone)
    mask_pack(tmp_path / "ssf.pet", backbone, mask_delta(backbone, "ssf"))

    told = refused(3, "export", tmp_path / "ssf.pet", "--precision", "int8", "-o", tmp_path / "out")

    assert "needs calibration images: they are given, never invented" in told


# ------------------------------------------------------------------------------------- on the backbone that tasks share


@pytest.fixture(scope="module")
def shared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs with ranges for the int8 backbone: scales alone, codes of its own, and a head on an early map; their store."""
    folder = tmp_path_factory.mktemp("shared")
    backbone = mask_backbone(folder)
    base_graph(backbone)
    device = edgepet.Device(folder / "store")
    forms = {"ssf": Form(width=8), "lora": Form(width=8), "early": Form(name="linear", maps=(1,))}
    for task, form in forms.items():
        delta = mask_delta(backbone, "lora" if task == "lora" else "ssf", form=form, task=task)
        mask_pack(folder / f"{task}.pet", backbone, delta)
        edgepet.share(folder / f"{task}.pet", data, folder / f"{task}8.pet")
        Store(folder / "store").add_graph(open_int8(backbone.fingerprint, backbone.preprocess))
        device.install(folder / f"{task}8.pet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("task", ["ssf", "lora", "early"])
def test_a_task_of_masks_runs_on_the_codes_that_all_share(task: str, runtime: str, shared: Path, data: Path) -> None:
    delta = read_pack(shared / f"{task}8.pet", answers=EVERY).delta
    images = normalize(load_set(open_masks(data, "test").images, delta.preprocess)[0], delta.preprocess)
    expected = MergedHead(mask_backbone(shared), delta)(images)

    with edgepet.Device(shared / "store").open(task, runtime=runtime, precision="int8", threads=1) as opened:
        got = opened(images)

    assert set(delta.probes) == {"fp32", "int8"}
    assert np.abs(got - expected).max() <= 0.15 * np.abs(expected).max()
    assert np.abs(got - expected).max() > 1e-4 * np.abs(expected).max()  # or it would be no int8
    assert (mask_of(got, (64, 64)) == mask_of(expected, (64, 64))).mean() >= 0.9


@pytest.mark.slow
def test_tasks_of_masks_share_one_network_of_codes(shared: Path) -> None:
    graph = open_int8(mask_backbone(shared).fingerprint, mask_backbone(shared).preprocess)
    deltas = {task: read_pack(shared / f"{task}8.pet", answers=EVERY).delta for task in ("ssf", "early")}
    codes = SharedInt8(graph)
    images = np.zeros((2, 3, 64, 64), np.float32)

    first, early, again = codes.bind(deltas["ssf"]), codes.bind(deltas["early"]), codes.bind(deltas["ssf"])
    answers = [network(images) for network in (first, early, again)]
    layers: Any = first.evidence["layers"]
    codes.close()

    assert np.array_equal(answers[0], answers[2])
    assert answers[1].shape == (2, 3, 4, 4)
    assert layers["int8"] >= 24
    assert [each.map.name for each in graph.maps] == ["map.0", "map.1", "map.2", "map.3"]


@pytest.mark.slow
def test_a_task_of_masks_with_branches_runs_on_the_same_codes(data: Path, tmp_path: Path) -> None:
    backbone = mask_backbone(tmp_path)
    base_graph(backbone)  # whose weights are found again
    pack = mask_pack(tmp_path / "adapted.pet", backbone, mask_delta(backbone, "adaptformer"))
    edgepet.share(pack, data, tmp_path / "adapted8.pet")
    delta = read_pack(tmp_path / "adapted8.pet", answers=EVERY).delta
    store = Store(tmp_path / "store")
    store.add_graph(open_int8(delta.fingerprint, delta.preprocess, delta.structure))
    store.install(tmp_path / "adapted8.pet")
    images = normalize(load_set(open_masks(data, "test").images, delta.preprocess)[0], delta.preprocess)
    expected = MergedHead(backbone, delta)(images)

    for runtime in ("onnxruntime", *(["openvino"] if has_openvino else [])):
        with edgepet.Device(store.root).open(delta.task, runtime=runtime, precision="int8", threads=1) as opened:
            got = opened(images)
        assert 1e-4 < np.abs(got - expected).max() / np.abs(expected).max() <= 0.15
        assert (mask_of(got, (64, 64)) == mask_of(expected, (64, 64))).mean() >= 0.9


@pytest.mark.slow
def test_a_store_whose_int8_backbone_has_no_maps_takes_them(shared: Path, tmp_path: Path) -> None:
    whole = open_int8(mask_backbone(shared).fingerprint, mask_backbone(shared).preprocess)
    folder = tmp_path / "source/backbones" / whole.folder.name
    folder.mkdir(parents=True)
    for name in (*whole.files, f"{whole.stem}.json"):
        shutil.copy(whole.folder / name, folder / name)
    told = json.loads((folder / f"{whole.stem}.json").read_text())
    del told["maps"]
    (folder / f"{whole.stem}.json").write_bytes(canonical_json(told))
    store = Store(tmp_path / "device")
    store.add_graph(int8_at(folder / f"{whole.stem}.json"))

    with pytest.raises(
        InputError, match=r"^task 'ssf': needs a graph that lists maps, got one of before there were any"
    ):
        edgepet.Device(store.root).install(shared / "ssf8.pet", runtime="onnxruntime")
    store.add_graph(whole)
    edgepet.Device(store.root).install(shared / "ssf8.pet", runtime="onnxruntime")

    assert int8_at(store.root / "backbones" / whole.folder.name / f"{whole.stem}.json").maps == whole.maps
    assert edgepet.Device(store.root).check() == ()


@pytest.mark.slow
def test_the_command_line_calibrates_and_runs_masks_in_int8(shared: Path, data: Path, tmp_path: Path) -> None:
    said: Any = command("calibrate", shared / "ssf.pet", "--calib", data, "--json", "--quiet").json
    answered: Any = command(
        "device", "run", "--store", shared / "store", "ssf", data / "images/test", "--precision", "int8", "--masks", tmp_path,
        "--json", "--quiet",
    ).json  # fmt: skip

    assert said["metric"] == "miou"
    assert len(said["layers"]) > 20
    assert [each["mask"] for each in answered["results"]] == [str(tmp_path / f"{n:03}.png") for n in range(4)]
