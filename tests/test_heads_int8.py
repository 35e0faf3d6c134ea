"""Boxes, masks and labels in int8: each judged by its own metric, and all by what the worst of them loses."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepet
from edgepet.calibration.head_drops import box_drop, boxes_apart, label_drop, labels_apart
from edgepet.calibration.head_images import head_calibration_images
from edgepet.deltas.heads import Meaning
from edgepet.deltas.joined import as_rows
from edgepet.device.answers import meanings_of
from edgepet.device.artifact import open_artifact, read_artifact
from edgepet.device.runtime import SharedInt8
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.exporters.exporter import ExportOptions
from edgepet.graphs.int8 import open_int8
from edgepet.images.boxes import Boxes
from edgepet.measuring.average_precision import box_fit
from edgepet.measuring.parity import compare
from edgepet.measuring.several_labels import label_fit
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.subject import one_head
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.dense import MergedHead
from tests.box_folders import CATEGORIES
from tests.flow import RUNTIMES, has_openvino
from tests.flow import edgepet as command
from tests.mask_packs import mask_backbone
from tests.scene_folders import MASKED, scene_folder
from tests.tiny import tiny_vit

pytest.importorskip("faster_coco_eval", reason="the package faster-coco-eval is not installed")

FORMATS = ("onnx", *(["openvino"] if has_openvino else []))
HEADS = ("boxes", "mask", "labels")
CLASSES = {"boxes": CATEGORIES, "mask": MASKED, "labels": MASKED}
MEANINGS = [Meaning(name=each, answer=each, labels=tuple(CLASSES[each])) for each in HEADS]  # type: ignore[arg-type]
SMALL = Preprocess(image_size=(32, 32))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ of boxes, masks and labels, and ``scene.pet``, which answers all three."""
    folder = tmp_path_factory.mktemp("scene")
    scene_folder(folder / "data", size=(48, 64), train=36)
    tiny_vit(folder, 5)
    said = command(
        "train", folder / "data", "--backbone", f"test_vit@{folder / 'test_vit-5.safetensors'}", "--method", "ssf", "--task",
        ",".join(HEADS), "--head", "fcos,width=8,depth=1+mlp,width=8", "--epochs", 2, "--batch-size", 4, "--img-size", 64,
        "--lr", 0.01, "--train-precision", "fp32", "--device", "cpu", "-o", folder / "scene.pet", "--json", "--quiet",
    )  # fmt: skip
    assert said.code == 0, said.err
    return folder


def images() -> NpArray:
    made = np.stack([np.full((3, 64, 64), level, np.float32) for level in (-1, 0, 1)])
    return made + np.random.default_rng(3).normal(0, 0.3, made.shape).astype(np.float32)


def require_near(got: tuple[NpArray, ...], expected: tuple[NpArray, ...]) -> None:
    """Boxes as int8 may move them; logits within a tenth of the largest."""
    assert compare(expected[0], got[0], stored="int8", inputs="data", against="merged").ok
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert 0 < np.abs(one - other).max() <= 0.15 * np.abs(other).max()


def test_a_model_of_several_heads_is_judged_by_what_the_worst_of_them_loses(place: Path, tmp_path: Path) -> None:
    options = ExportOptions(to=FORMATS, precision="int8", calib=place / "data", max_drop=40.0)  # type: ignore[arg-type]
    backbone, delta = mask_backbone(place), read_pack(place / "scene.pet", answers=EVERY).delta
    expected = tuple(MergedHead(backbone, one_head(delta, head))(images()) for head in range(3))

    made = edgepet.export([place / "scene.pet"], tmp_path / "out", backbone=backbone, options=options).artifacts

    for each in made:
        assert each.verified
        assert each.drop is not None
        assert (each.drop.n, each.drop.metric in ("map", "miou")) == (42, True)
        assert each.drop.low <= each.drop.points <= each.drop.high
        runner = open_artifact(each.path, read_artifact(each.path), threads=1)
        outputs = dict(zip(("found", "", "", "", "mask", "", "labels", ""), runner.outputs(images()), strict=True))
        runner.close()
        require_near((outputs["found"], outputs["mask"], outputs["labels"]), expected)
        said = command(
            "verify", each.path, "--data", place / "data", "--pack", place / "scene.pet", "--backbone",
            f"test_vit@{place / 'test_vit-5.safetensors'}", "--json", "--quiet",
        )  # fmt: skip
        assert said.code == 0, said.err


@pytest.fixture(scope="module")
def store(place: Path) -> Path:
    """``scene8.pet`` with ranges, installed beside the codes that all tasks share."""
    edgepet.share(place / "scene.pet", place / "data", place / "scene8.pet", backbone=mask_backbone(place))
    delta = read_pack(place / "scene8.pet", answers=EVERY).delta
    made = Store(place / "store")
    made.add_graph(open_int8(delta.fingerprint, delta.preprocess))
    made.install(place / "scene8.pet")
    return made.root


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_heads_run_on_the_codes_that_all_tasks_share(runtime: str, place: Path, store: Path) -> None:
    delta = read_pack(place / "scene8.pet", answers=EVERY).delta
    expected = tuple(MergedHead(mask_backbone(place), one_head(delta, head))(images()) for head in range(3))

    shared = SharedInt8(open_int8(delta.fingerprint, delta.preprocess), runtime=runtime, threads=1)
    got = shared.bind(delta).each(images())
    shared.close()
    with edgepet.Device(store).open("scene", runtime=runtime, precision="int8", threads=1) as opened:
        installed = opened(images())

    assert delta.probes["int8"].logits.shape == (4, 2 + 3 + 3)
    require_near(got, expected)
    assert np.array_equal(installed, as_rows(got))


@pytest.mark.slow
def test_the_command_line_tells_which_points_are_lost(place: Path) -> None:
    spec = f"test_vit@{place / 'test_vit-5.safetensors'}"
    said: Any = command(
        "calibrate", place / "scene.pet", "--backbone", spec, "--calib", place / "data", "--json", "--quiet"
    ).json

    assert said["metric"] in ("map", "miou")
    assert len(said["layers"]) > 20


# ------------------------------------------------------------------------------------------------------- what is lost


def test_what_boxes_lose_is_the_difference_of_their_ap() -> None:
    corners = np.array([[4, 4, 20, 20], [30, 8, 60, 40]], np.float64)
    truths = [Boxes(corners=corners, labels=np.array([0, 1]), crowds=np.zeros(2, bool)) for _ in range(4)]
    exact = np.stack([np.column_stack([corners / 2, [0.9, 0.8], [0, 1]])] * 4)  # the network's input is half as large
    worse = exact.copy()
    worse[:2, 0, :4] += 9

    drop = box_drop(exact, worse, truths, 2, (32, 32), [(64, 64)] * 4)

    found = [[np.column_stack([2 * each[:, :4], each[:, 4:]]) for each in given] for given in (exact, worse)]
    aps = [box_fit(given, truths, 2, interval=False).ap for given in found]
    assert (aps[0], drop.points) == (1.0, pytest.approx(100 * (1 - aps[1])))
    assert drop.low < drop.points < drop.high
    assert (drop.metric, drop.n, drop.kl) == ("map", 4, boxes_apart(exact, worse))
    assert box_drop(exact, exact, truths, 2, (32, 32), [(64, 64)] * 4).points == 0


def test_boxes_are_apart_by_the_scores_that_have_no_like() -> None:
    one = np.array([[[0, 0, 10, 10, 0.6, 0], [20, 20, 30, 30, 0.2, 1], [0, 0, 9, 9, 0.01, 1]]])
    other, fainter, absent = one.copy(), one.copy(), one.copy()
    other[0, 0, 5], fainter[0, 0, 4], absent[0, :, 4] = 1, 0.3, 0.0

    assert boxes_apart(one, one) == boxes_apart(absent, absent) == 0
    assert boxes_apart(one, other) == pytest.approx(1.2 / 1.6)
    assert boxes_apart(one, fainter) == pytest.approx(0.3 / 1.3)  # half of the first: the second is as sure as itself
    assert boxes_apart(one, absent) == 1
    assert boxes_apart(one, one[:, ::-1]) == 0


def test_what_labels_lose_is_the_difference_of_their_mean_ap() -> None:
    rng = np.random.default_rng(0)
    truths = rng.integers(0, 2, (30, 3))
    exact = (6.0 * truths - 3).astype(np.float32)
    worse = exact + rng.normal(0, 4, exact.shape).astype(np.float32)

    drop = label_drop(exact, worse, truths)

    fitted = label_fit(worse, truths, (0.5,) * 3, interval=False)
    assert drop.points == pytest.approx(100 * (1 - fitted.ap))
    assert 0 < drop.low < drop.points < drop.high
    p, q = (1 / (1 + np.exp(-each.astype(np.float64))) for each in (exact, worse))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert drop.kl == labels_apart(exact, worse) == pytest.approx(expected)
    assert (drop.metric, drop.n) == ("map", 30)


# ------------------------------------------------------------------------------------------------- calibration images


def test_all_heads_have_the_same_calibration_images(place: Path) -> None:
    made = head_calibration_images(place / "data", MEANINGS, SMALL, count=34)

    assert (len(made.measured), len(made.held_out), len(made.judged)) == (26, 8, 42)
    for head in made.heads:
        assert head.judged.paths == made.judged.paths
        assert head.held_out.paths == made.held_out.paths
    assert [each.answer for each in meanings_of(read_pack(place / "scene.pet", answers=EVERY).delta)] == list(HEADS)


def _one_image_without_boxes(folder: Path) -> None:
    file = folder / "annotations/instances_train.json"
    told = json.loads(file.read_text())
    told["images"] = [each for each in told["images"] if each["file_name"] != "035.png"]
    there = {each["id"] for each in told["images"]}
    told["annotations"] = [each for each in told["annotations"] if each["image_id"] in there]
    file.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_one_image_without_boxes, "needs the same images for every head of the task, mask too, got images/train/035.png for one alone\n  fix: give every image what all heads answer"),
        (lambda folder: (folder / "classes.txt").write_text("floor\nround\nsquare\n"), "classes of mask in their order, ground"),
        (lambda folder: shutil.copy(folder / "images/train/001.png", folder / "images/test/000.png"), "must not overlap the test split of {folder}, got 1 of its images: 001.png is 000.png"),
    ],
)  # fmt: skip
def test_calibration_images_that_cannot_be_used_are_refused(
    change: Callable[[Path], object], told: str, place: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(place / "data", folder)
    change(folder)

    with pytest.raises(InputError) as error:
        head_calibration_images(folder, MEANINGS, SMALL)
    assert told.format(folder=folder) in str(error.value)
