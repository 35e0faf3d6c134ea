"""``train`` and ``eval`` of images with masks, from the command line, and what other verbs say of such a pack."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgepet
from edgepet.errors import InputError
from edgepet.images.mask_folders import open_masks
from edgepet.packs.pack import EVERY, read_pack
from edgepet.proving.masks import judge_masks
from edgepet.reports.as_json import to_json
from edgepet.tuning.recipes import head_form
from edgepet.tuning.work_folder import read_work
from edgepet.verbs.dense_answers import ClassScore, DenseScore
from edgepet.verbs.train_dense import HeadReport, head_lines
from tests.flow import RUNTIMES, refused
from tests.flow import edgepet as command
from tests.mask_folders import NAMES, index_folder, scene
from tests.tiny import tiny_vit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ of masks, 40 x 48 pixels, and the weights of a tiny transformer."""
    folder = tmp_path_factory.mktemp("dense")
    index_folder(folder / "data", train=10, val=6, test=5, size=(40, 48))
    tiny_vit(folder, 3)
    return folder


def arguments(place: Path, output: str, method: str = "ssf", **more: object) -> list[object]:
    spec = f"test_vit@{place / 'test_vit-3.safetensors'}"
    given = {"epochs": 2, "batch-size": 4, "img-size": 64, "train-precision": "fp32", "device": "cpu", **more}
    told = [text for key, value in given.items() for text in (f"--{key}", value)]
    return ["train", place / "data", "--backbone", spec, "--method", method, *told, "-o", place / output]


@pytest.fixture(scope="module")
def trained(place: Path) -> Any:
    """The JSON of a training; ``scene.pet`` lies in ``place``."""
    said = command(*arguments(place, "scene.pet", head="mlp,width=8"), "--json", "--quiet")
    assert said.code == 0, said.err
    return said.json


def test_a_training_says_what_its_masks_are_worth(trained: Any, place: Path) -> None:
    pack = read_pack(place / "scene.pet", answers=EVERY)
    (judged,) = pack.delta.heads

    assert trained["val"]["metric"] == "miou"
    assert trained["val"]["n"] == 6
    assert 0 <= trained["val"]["low"] <= trained["val"]["value"] <= trained["val"]["high"] <= 1
    assert trained["val"]["value"] == judged.value
    assert [each["name"] for each in trained["classes"]] == list(NAMES)
    assert sum(each["pixels"] for each in trained["classes"]) == 10 * 40 * 48
    assert trained["head_params"] == judged.head.stored_values == 8 * 4 * 64 + 8 + 8 * 3 + 3
    assert trained["head"] == "mlp,width=8,depthwise=false,norm=false"
    assert trained["pack_bytes"] == (place / "scene.pet").stat().st_size
    assert trained["algebra_max_abs"] <= trained["algebra_limit"]
    assert trained["backbone"]["name"] == "test_vit"
    needed = {
        "pack",
        "work",
        "method",
        "trainable_params",
        "head_params",
        "pack_bytes",
        "epochs",
        "seconds",
        "images_per_second",
        "val",
        "backbone",
    }
    assert needed <= trained.keys()
    assert not (place / "scene.checkpoint").exists()


def test_the_pack_holds_what_a_device_needs(trained: Any, place: Path) -> None:
    delta = read_pack(place / "scene.pet", answers=EVERY).delta

    assert delta.answers == ("mask",)
    assert delta.heads[0].head.labels == NAMES
    assert (delta.preprocess.crop, delta.preprocess.crop_fraction, delta.preprocess.image_size) == (
        "squash",
        1.0,
        (64, 64),
    )
    assert delta.training["head"] == trained["head"]
    assert read_work(place / "scene.work").pixels.shape == (6, 64, 64, 3)


def test_eval_judges_each_mask_as_large_as_its_image(trained: Any, place: Path) -> None:
    said = command(
        "eval",
        place / "scene.pet",
        place / "data",
        "--backbone",
        f"test_vit@{place / 'test_vit-3.safetensors'}",
        "--json",
        "--quiet",
    )

    assert said.code == 0, said.err
    assert said.json["metric"] == "miou"
    assert said.json["n"] == 5
    assert [each["name"] for each in said.json["classes"]] == list(NAMES)
    known = [each["iou"] for each in said.json["classes"] if each["iou"] is not None]
    assert said.json["value"] == pytest.approx(sum(known) / len(known))
    assert (said.json["runtime"], said.json["precision"]) == ("onnxruntime", "fp32")


def test_val_is_judged_as_eval_judges_it(trained: Any, place: Path) -> None:
    report: Any = edgepet.evaluate(place / "scene.pet", place / "data", split="val")  # the cache has the backbone

    assert report.value == pytest.approx(trained["val"]["value"], abs=1e-6)
    assert to_json(report)["classes"][0]["iou"] == pytest.approx(trained["classes"][0]["iou"], abs=1e-6)


def test_people_see_every_class(trained: Any, place: Path) -> None:
    said = command("eval", place / "scene.pet", place / "data")

    lines = said.out.splitlines()
    assert lines[0].startswith("mIoU ")
    assert "on 5 images, 3 classes (onnxruntime, fp32)" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[-3:]] == list(NAMES)


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("merge", ["-o", "dense.safetensors"]),
        ("export-peft", ["-o", "peft"]),
    ],
)
def test_verbs_that_cannot_answer_masks_say_so(verb: str, more: list[str], trained: Any, place: Path) -> None:
    told = refused(3, verb, place / "scene.pet", *more)

    assert "scene.pet.heads: must answer class here, got mask" in told
    assert "`edgepet predict`, `edgepet device` and `edgepet eval` take it" in told


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_eval_on_a_runtime_is_what_it_is_in_torch(runtime: str, trained: Any, place: Path) -> None:
    here: Any = edgepet.evaluate(place / "scene.pet", place / "data", runtime=runtime)
    in_torch: Any = edgepet.evaluate(place / "scene.pet", place / "data", runtime="torch")

    assert here.runtime == runtime
    assert here.value == pytest.approx(in_torch.value, abs=1e-4)
    assert here.pixels == pytest.approx(in_torch.pixels, abs=1e-3)


def test_a_pack_of_masks_takes_its_own_probe_along(trained: Any, place: Path) -> None:
    delta = read_pack(place / "scene.pet", answers=EVERY).delta

    assert delta.probes["fp32"].logits.shape == (4, 3)
    assert np.abs(delta.probes["fp32"].logits).max() > 0


def test_eval_needs_the_classes_of_the_head(trained: Any, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "data/classes.txt").write_text("green\nred\nblue\n")

    told = refused(3, "eval", place / "scene.pet", tmp_path / "data")

    assert (
        f"{tmp_path / 'data'}: needs the 3 classes of scene.pet in their order, red, green, blue, got green, red, blue"
        in told
    )


def test_a_frozen_network_is_run_once_and_its_maps_are_remembered(place: Path) -> None:
    """With no room in memory they lie in files, which go when the pack is there."""
    said = command(*arguments(place, "frozen.pet", "linear-probe", head="linear", memory=0), "-v")

    assert said.code == 0, said.err
    assert "compute once the maps of 16 images" in said.err
    assert not list(place.glob("frozen.features")) + list(place.glob("frozen.pixels"))
    assert read_pack(place / "frozen.pet", answers=EVERY).delta.updates == ()


def test_a_training_of_masks_goes_on_where_it_stopped(place: Path, tmp_path: Path) -> None:
    """The same bytes come out as of one that was not interrupted."""
    spec, given = (
        f"test_vit@{place / 'test_vit-3.safetensors'}",
        {"epochs": 3, "batch_size": 4, "image_size": 64, "precision": "fp32", "device": "cpu", "augment": ("flip",)},
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def stop(step: Any) -> None:
        if step.epoch == 2 and step.val_top1 is not None:
            raise RuntimeError

    edgepet.train(place / "data", spec, "ssf", tmp_path / "a/scene.pet", **given)
    with pytest.raises(RuntimeError):
        edgepet.train(place / "data", spec, "ssf", tmp_path / "b/scene.pet", say=stop, **given)
    edgepet.train(place / "data", spec, "ssf", tmp_path / "b/scene.pet", resume=True, **given)

    assert (tmp_path / "a/scene.pet").read_bytes() == (tmp_path / "b/scene.pet").read_bytes()


def test_masks_are_checked_before_anything_is_tuned(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    for number in (1, 2):
        Image.fromarray(np.full((40, 48), 7, np.uint8)).save(tmp_path / f"data/masks/train/00{number}.png")
    given = arguments(place, "bad.pet")
    given[1] = tmp_path / "data"

    told = refused(3, *given)

    assert "needs masks that fit their images, got 2 of 10 that are not" in told
    assert "001.png: must hold class numbers from 0 to 2, and 255 where nothing counts, got 7" in told
    assert not (place / "bad.pet").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"augment": "mixup"}, "--augment: moves masks and boxes by flip and crop alone, got 'mixup'\n  fix: train with --augment flip,crop"),
        ({"shots": 4}, "--task mask: does not go with --shots, got 4\n  fix: leave --shots out"),
        ({"balance": "sampling"}, "--task mask: has no images of a class, got --balance sampling\n  fix: weigh classes with --balance weights, or add --dice 1"),
        ({"head": "mlp,maps=7"}, "--head: needs maps that the backbone has, 0 of stride 16, 1 of stride 16, 2 of stride 16, 3 of stride 16, got 7"),
        ({"head": "fcos"}, "--task mask: needs a head of linear, mlp, score, got --head fcos"),
        ({"head": "unet"}, "--head: is linear, mlp, fcos, pooled, score, got 'unet'"),
        ({"dice": -1}, "--dice: must be at least 0 and finite, got -1.0"),
    ],
)  # fmt: skip
def test_what_masks_do_not_do_is_refused(more: dict[str, object], told: str, place: Path) -> None:
    assert told in refused(3, *arguments(place, "refused.pet", **more))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("linear,width=3", "`head`: linear knows the settings maps, norm, language, aux, got 'width'"),
        ("fcos,depthwise=true", "`head`: fcos knows the settings width, maps, depth, norm, language, scores, context, inner, aux, got 'depthwise'"),
        ("fcos,depth=3", "`head`: needs a depth from 1 to 2, got 3"),
        ("mlp,width=0", "`head`: needs a width from 1 to 1024, got 0"),
        ("mlp,width=2.5", "`head`: needs a width from 1 to 1024, got 2.5"),
        ("mlp,depthwise=1", "`head`: needs depthwise=true or depthwise=false, got 1"),
        ("mlp,separation=2", "`head`: needs separation=true or separation=false, got 2"),
        ("linear,separation=true", "`head`: linear knows the settings maps, norm, language, aux, got 'separation'"),
        ("mlp,maps=0/0", "`head`: needs numbers of maps, each once, as maps=0/1/2, got 0/0"),
        ("mlp,maps=-1", "`head`: needs numbers of maps, each once, as maps=0/1/2, got -1"),
    ],
)  # fmt: skip
def test_a_head_that_is_none_is_told(text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        head_form(text)
    assert str(error.value) == told


def test_a_head_reads_as_it_is_written() -> None:
    for text in (
        "mlp,width=64,depthwise=false,norm=false",
        "linear,maps=1/3,norm=true",
        "fcos,width=32,depth=1,maps=1/2/3,norm=false",
        "mlp,width=8,depthwise=true,maps=2,norm=false",
        "mlp,width=64,depthwise=false,maps=0/3,norm=false,separation=true",
    ):
        assert str(head_form(text)) == text


def test_judging_brings_masks_to_the_size_of_images(trained: Any, place: Path) -> None:
    """A network that answers the truth at a coarse stride is right but for the borders."""
    images = open_masks(place / "data", "test")
    truths = iter([scene(2000 + n, (40, 48))[1] for n in range(5)])

    def answers(batch: Any) -> Any:
        grids = [next(truths)[::5, ::6] for _ in batch]
        return np.stack([np.stack([(grid == label) * 9.0 for label in range(3)]) for grid in grids])

    judged = judge_masks(answers, images, read_pack(place / "scene.pet", answers=EVERY).delta.preprocess, 3)

    assert judged.n == 5
    assert 0.9 < judged.miou < 1


def test_a_mask_that_has_one_class_everywhere_is_told_what_to_do() -> None:
    def told(ious: tuple[float | None, ...]) -> list[str]:
        scores = tuple(
            ClassScore(name=name, value=value, count=9, value_is="iou", count_is="pixels")
            for name, value in zip(("ground", "bird", "fish"), ious, strict=True)
        )
        val = DenseScore(metric="miou", value=0.3, n=4, low=0.2, high=0.4, pixels=0.9)
        head = HeadReport(name="mask", answer="mask", head="mlp", head_params=1, val=val, scores=scores)
        return [line for line in head_lines([head], "epoch 1 of 1") if "every pixel" in line]

    assert told((0.9, 0.0, None)) == [
        "  every pixel is answered as ground: try --balance weights, or --dice 1, for classes that are rare"
    ]
    assert told((0.9, 0.1, None)) == told((0.9, None, None)) == []
