"""Boxes on a device: a detector behind the backbone on each runtime, merged and in slots, with boxes on the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgepet.deltas.detection import boxes_in, suppressed
from edgepet.deltas.probe import condensed_boxes
from edgepet.device.answers import Answer, BoxesAnswer, MaskAnswer
from edgepet.device.serving import Device
from edgepet.device.store import Store
from edgepet.errors import CheckError, InputError
from edgepet.exporters.trace import base_graph
from edgepet.images.preprocess import normalize, to_pixels
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import EVERY, encode_pack, read_pack, write_pack
from edgepet.spec import NpArray
from edgepet.tuning.dense import MergedHead
from tests.box_packs import LABELS, box_delta, require_same_boxes
from tests.flow import RUNTIMES
from tests.mask_packs import mask_backbone, mask_delta, mask_pack
from tests.tiny import make_delta, random_pixels

TASKS = {"ssf": "ssf", "lora": "lora"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tasks of boxes on one backbone, and their packs."""
    folder = tmp_path_factory.mktemp("device")
    backbone = mask_backbone(folder)
    device = Device(folder / "store")
    for task, method in TASKS.items():
        delta = box_delta(backbone, method, task=task)
        Store(folder / "store").add_graph(base_graph(backbone, delta.branches))
        device.install(mask_pack(folder / f"{task}.pet", backbone, delta))
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
def test_a_task_finds_what_torch_finds(task: str, mode: str, runtime: str, place: Path, backbone: Backbone) -> None:
    images = inputs(place, task, random_pixels(3, 3, 48))
    expected = in_torch(place, backbone, task, images)

    with Device(place / "store").open(task, runtime=runtime, mode=mode, threads=1) as opened:
        got = opened(images)

    assert expected.shape == (3, 84, 6)
    assert np.ptp(expected[:, :, 4]) > 0.1  # or boxes of one score would match by chance
    for one, other in zip(got, expected, strict=True):
        require_same_boxes(one, other)


def test_boxes_are_told_on_the_picture(place: Path, backbone: Backbone) -> None:
    picture = np.kron(random_pixels(4, 1, 6)[0], np.ones((8, 11, 1), np.uint8)).astype(np.uint8)
    (found,) = in_torch(place, backbone, "ssf", inputs(place, "ssf", picture[None]))
    kept = boxes_in(suppressed(found[found[:, 4] >= 0.05]), (64, 64), (48, 66))

    with Device(place / "store").open("ssf") as task:
        (answer,) = task.predict(picture)
        labels = task.labels

    assert labels == LABELS
    assert isinstance(answer, BoxesAnswer)
    assert len(answer.boxes) == len(kept) > 3
    for each, (x1, y1, x2, y2, score, label) in zip(answer.boxes, kept.tolist(), strict=True):
        assert each.label == LABELS[int(label)]
        assert each.score == pytest.approx(score, abs=1e-4)
        np.testing.assert_allclose(each.box, [x1, y1, x2 - x1, y2 - y1], atol=1e-2)


def test_tasks_of_boxes_masks_and_classes_look_at_one_picture(place: Path, backbone: Backbone) -> None:
    classes = make_delta(
        width=backbone.width, task="kinds", backbone="test_vit", fingerprint=backbone.fingerprint,
        preprocess=backbone.preprocess,
    )  # fmt: skip
    device = Device(place / "store")
    device.install(encode_pack(classes))
    device.install(encode_pack(mask_delta(backbone, "ssf", task="land")))

    with device.open_all(["ssf", "kinds", "land"]) as several:
        (said,) = several.predict(random_pixels(4, 1, 48)[0])

    assert [type(answer) for answer in said.values()] == [BoxesAnswer, Answer, MaskAnswer]
    device.remove("kinds")
    device.remove("land")


def test_a_probe_knows_boxes_and_no_order() -> None:
    rng = np.random.default_rng(3)
    found = np.concatenate(
        [rng.uniform(0, 64, (2, 9, 4)), rng.random((2, 9, 1)), rng.integers(0, 2, (2, 9, 1))], axis=2
    )
    told = condensed_boxes(found, 2)

    assert told.shape == (2, 2)
    np.testing.assert_allclose(condensed_boxes(found[:, ::-1], 2), told, rtol=1e-6)
    for change in ([8, 0, 0, 0, 0, 0], [0, 0, 0, 8, 0, 0], [0, 0, 0, 0, 0.5, 0]):
        wrong = found.copy()
        wrong[:, 2:4] += change
        assert np.abs(condensed_boxes(wrong, 2) - told).max() > 1e-3
    # Written out, of one class of one image.
    least = min(found[0, :, 4])
    expected = sum((x1 + 2 * y1 + 3 * x2 + 4 * y2) / 1000 * (s - least) for x1, y1, x2, y2, s, k in found[0] if k == 1)
    assert told[0, 1] == pytest.approx(expected, rel=1e-6)


def test_a_pack_that_answers_otherwise_is_not_installed(place: Path, tmp_path: Path) -> None:
    pack = read_pack(place / "ssf.pet", answers=EVERY)
    probe = pack.delta.probes["fp32"]
    assert probe.logits.shape == (4, 2)
    assert np.abs(probe.logits).max() > 100 * probe.tolerance
    other = replace(probe, logits=probe.logits + 0.5)
    write_pack(tmp_path / "wrong.pet", replace(pack.delta, task="wrong", probes={"fp32": other}), kept=pack.planes)

    with pytest.raises(CheckError) as error:
        Device(place / "store").install(tmp_path / "wrong.pet", runtime="onnxruntime")

    assert "task 'wrong' on onnxruntime, fp32: must answer its own probe within" in str(error.value)


def test_a_task_that_cannot_see_all_of_an_image_is_refused(place: Path) -> None:
    delta = read_pack(place / "ssf.pet", answers=EVERY).delta
    cut = replace(delta, preprocess=replace(delta.preprocess, crop="center", crop_fraction=0.875), probes={})

    with pytest.raises(InputError) as error:
        Device(place / "store").install(encode_pack(cut))

    assert str(error.value) == "task 'ssf': must see all of an image to find every object, got crop 'center' of 0.875"
