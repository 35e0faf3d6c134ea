"""One batch whose images belong to different tasks: each answers as it does by itself."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepet import Device, read_pack, write_pack
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.deltas.delta import Delta
from edgepet.deltas.kinds import Add
from edgepet.deltas.updates import Targeted
from edgepet.device.fitting import fit, opened
from edgepet.device.mixed import mix
from edgepet.device.runtime import SharedInt8
from edgepet.device.runtimes import shared_runtime
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.graphs.base import BaseGraph, graph_folder, open_graph
from edgepet.graphs.dense_slots import alike, dense_slots
from edgepet.graphs.onnx_file import read_onnx
from edgepet.measuring.parity import SAME_CODES
from edgepet.methods import SSF, Adapter, BitFit, Full, LinearProbe, LoRA, Method
from edgepet.proving.precision import express
from edgepet.spec import NpArray, Target
from tests.flow import RUNTIMES, Network, Tasks
from tests.flow import edgepet as command
from tests.on_codes import noise
from tests.tiny import random_images

VIT, CONVNET, WINDOWS = "test_vit", "test_efficientnet", "test_swin"
IMAGES = random_images(5, 6)
ROUNDING = 1e-5  # of the largest logit: a layer norm's affine part behind it, fp32 in another order of additions
METHODS: dict[str, Method] = {
    "ssf": SSF(), "ssf-too": SSF(), "lora": LoRA(rank=2, on=("q", "v")), "lora-of-4": LoRA(rank=4, on=("fc1", "qkv")),
    "bitfit": BitFit(), "probe": LinearProbe(),
}  # fmt: skip


@pytest.fixture(scope="module")
def vit(networks: Callable[[str], Network]) -> Network:
    return networks(VIT)


@pytest.fixture(scope="module")
def deltas(vit: Network) -> dict[str, Delta]:
    return {name: vit.task(method, name=name, seed=k) for k, (name, method) in enumerate(METHODS.items())}


def alone(graph: BaseGraph, delta: Delta, images: NpArray, runtime: str) -> NpArray:
    """Merged, one image after the other."""
    fitted = fit(graph, delta, "merged")
    network = opened(shared_runtime(runtime, purpose="a test"), fitted.part, fitted.tensors, 1).bind({})
    return np.concatenate([fitted.head(network(images[k : k + 1])) for k in range(len(images))])


def apart(got: NpArray, expected: NpArray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------------- in fp32


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_image_of_a_batch_has_the_bits_of_its_single_call(
    vit: Network, deltas: dict[str, Delta], runtime: str
) -> None:
    found = mix(vit.graph, deltas, runtime=runtime, threads=1)
    assert (found.unmixed, found.network is not None) == ({}, True)
    assert found.network is not None

    with found.network as network:
        together = network(IMAGES, list(deltas))
        singles = [network(IMAGES[k : k + 1], [task])[0] for k, task in enumerate(deltas)]
        turned = network(IMAGES[::-1].copy(), list(deltas)[::-1])

    for k, (task, delta) in enumerate(deltas.items()):
        assert together[k].tobytes() == singles[k].tobytes() == turned[-1 - k].tobytes(), task
        assert apart(together[k], alone(vit.graph, delta, IMAGES[k : k + 1], runtime)[0]) <= ROUNDING


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_one_task_may_have_several_images_of_a_batch(vit: Network, deltas: dict[str, Delta], runtime: str) -> None:
    network = mix(vit.graph, deltas, runtime=runtime, threads=1).network
    assert network is not None

    with network:
        got = network(IMAGES, ["lora", "ssf", "lora", "lora", "probe", "ssf"])

    for task in ("lora", "ssf", "probe"):
        places = [k for k, name in enumerate(["lora", "ssf", "lora", "lora", "probe", "ssf"]) if name == task]
        expected = alone(vit.graph, deltas[task], IMAGES[places], runtime)
        assert apart(np.stack([got[k] for k in places]), expected) <= ROUNDING


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_branches_are_products_of_each_image_with_its_own(vit: Network, runtime: str) -> None:
    tasks = {name: vit.task(Adapter(), name=name, seed=k) for k, name in enumerate("abc")}
    graph = base_graph(vit.backbone, tasks["a"].branches, root=vit.graph.folder.parents[1])
    network = mix(graph, tasks, runtime=runtime, threads=1).network
    assert network is not None

    with network:
        got = network(IMAGES[:4], ["a", "b", "c", "a"])

    for k, task in enumerate(["a", "b", "c", "a"]):
        assert apart(got[k], alone(graph, tasks[task], IMAGES[k : k + 1], runtime)[0]) <= ROUNDING


def test_what_a_task_leaves_as_it_is_does_nothing_in_the_slots_of_others(
    vit: Network, deltas: dict[str, Delta]
) -> None:
    file = read_onnx(vit.graph.model_path)
    own = [dense_slots(vit.graph, file, delta) for delta in deltas.values()]

    same = alike(vit.graph, file, own)

    assert len({tuple((name, slot.shape) for name, slot in slots.items()) for slots in same}) == 1
    probe, weight = same[-1], "blocks.0.attn.qkv.weight"
    assert (probe[f"{weight}.steps"] == 1).all()
    assert (probe[f"{weight}.left"] == 0).all()
    assert probe[f"{weight}.right"].shape == (64, 4)  # the larger of both ranks
    assert np.array_equal(
        probe["patch_embed.proj.weight.bias"].ravel(), vit.graph.base.tensors["patch_embed.proj.bias"]
    )
    assert own[-1] == {}


def test_a_task_that_has_to_be_folded_shares_no_call(vit: Network, deltas: dict[str, Delta]) -> None:
    tasks = {**deltas, "full": vit.task(Full(), name="full")}

    found = mix(vit.graph, tasks, runtime="onnxruntime", threads=1)

    assert list(found.unmixed) == ["full"]
    assert found.unmixed["full"].endswith(", which no slot can hold")
    assert found.network is not None
    assert found.network.tasks == tuple(deltas)


def test_what_has_one_slot_for_all_images_is_named(networks: Callable[[str], Network]) -> None:
    network = networks(CONVNET)
    tasks = {"ssf": network.task(SSF(), name="ssf"), "ssf-too": network.task(SSF(), name="ssf-too", seed=5)}

    found = mix(network.graph, tasks, runtime="onnxruntime", threads=1)

    assert found.network is None
    assert set(found.unmixed) == {"ssf", "ssf-too"}
    assert found.unmixed["ssf"].endswith("is read by BatchNormalization, which has one for all images")


# ------------------------------------------------------------------------------------------------------------- in int8


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_on_the_int8_backbone_each_image_keeps_the_ranges_of_its_task(
    vit: Network, runtime: str, tmp_path: Path
) -> None:
    shutil.copytree(
        vit.graph.folder, graph_folder(vit.graph.fingerprint, tmp_path), ignore=shutil.ignore_patterns("*int8*")
    )
    own = open_graph(vit.graph.fingerprint, vit.graph.preprocess, root=tmp_path)
    graph = int8_graph(own, lambda: noise(own.preprocess), root=tmp_path)
    tasks = {
        name: express(
            vit.task(method, name=name, seed=k), vit.graph, graph, noise(graph.preprocess), recipe=Int8Recipe()
        ).delta
        for k, (name, method) in enumerate(METHODS.items())
        if name != "lora-of-4"
    }

    found = mix(graph, tasks, runtime=runtime, threads=1)

    assert found.unmixed == {
        "lora": "blocks.0.attn.qkv.weight.codes: is its own, and a product in int8 has one for all images"
    }
    assert found.network is not None
    with found.network as network:
        names = [name for name in tasks if name != "lora"]
        together = network(IMAGES[: len(names)], names)
        singles = [network(IMAGES[k : k + 1], [task])[0] for k, task in enumerate(names)]
    for k, task in enumerate(names):
        assert together[k].tobytes() == singles[k].tobytes(), task
        expected = SharedInt8(graph, runtime=runtime, threads=1).bind(tasks[task])(IMAGES[k : k + 1])[0]
        assert apart(together[k], expected) <= (SAME_CODES.relative or 0)


# ---------------------------------------------------------------------------------------------------------- on a device


@pytest.fixture
def device(store: Store, tasks: Tasks, tmp_path: Path) -> Device:
    """SSF, LoRA and a linear probe of the same backbone."""
    made = Device(store.root)
    made.install(tasks.shapes)
    made.install(tasks.tints)
    delta = replace(read_pack(tasks.shapes).delta, task="probe", updates=(), probes={})
    write_pack(tmp_path / "probe.pet", delta)
    made.install(tmp_path / "probe.pet")
    return made


@pytest.fixture
def paths(tasks: Tasks) -> list[Path]:
    return sorted((tasks.data / "test").glob("*/*.png"))[:5]


ASKED = ("tints", "shapes", "probe", "shapes", "tints")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_image_is_asked_by_its_own_task(device: Device, paths: list[Path], runtime: str) -> None:
    with device.open_all(runtime=runtime, threads=1) as opened:
        answers = opened.predict_each(paths, ASKED, top=3)
        every = opened.predict(paths, top=3)
        assert opened.unmixed == {}

    assert [(answer.image, answer.task) for answer in answers] == [
        (path.name, task) for path, task in zip(paths, ASKED, strict=True)
    ]
    for answer, all_of_it in zip(answers, every, strict=True):
        expected = all_of_it[answer.task]
        assert [guess.label for guess in answer.top] == [guess.label for guess in expected.top]
        scores = [guess.score for guess in expected.top]
        assert [guess.score for guess in answer.top] == pytest.approx(scores, abs=1e-5)


def test_one_image_may_be_asked_twice_and_by_a_task_that_has_to_be_folded(
    device: Device, tasks: Tasks, paths: list[Path], tmp_path: Path
) -> None:
    delta = read_pack(tasks.shapes).delta
    weight = "blocks.0.attn.proj.weight"
    base = Store(Path(device.store)).graph_of(read_pack(tasks.shapes)).base.tensors[weight]
    whole = Targeted(Target(weight), Add(np.full(base.shape, 1e-3, np.float32)))
    write_pack(tmp_path / "whole.pet", replace(delta, task="whole", updates=(whole,), probes={}))
    device.install(tmp_path / "whole.pet")

    with device.open_all(threads=1) as opened:
        answers = opened.predict_each([paths[0], paths[0], paths[0]], ["whole", "tints", "shapes"])
        alone = opened.predict(paths[0])[0]
        told = opened.unmixed

    assert told == {"whole": f"task 'whole': {weight}: is changed by Add, which no slot can hold"}
    assert [answer.score for answer in answers] == pytest.approx(
        [alone[task].score for task in ("whole", "tints", "shapes")], abs=1e-5
    )


def test_a_large_batch_goes_through_in_several_calls(
    device: Device, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with device.open_all(threads=1) as opened:
        expected = opened.predict_each(paths, ASKED)
        monkeypatch.setattr("edgepet.device.opened.IMAGES_OF_A_CALL", 2)
        assert opened.predict_each(paths, ASKED) == expected


@pytest.mark.parametrize(
    ("images", "asked", "told"),
    [
        (2, ("shapes",), "tasks: needs one for each of 2 images, got 1"),
        (
            1,
            ("nobody",),
            "tasks: names a task that is not open here, got 'nobody'\n"
            "  fix: open it with the others: probe, shapes, tints",
        ),
    ],
)
def test_pairs_that_are_none_are_refused(
    device: Device, paths: list[Path], images: int, asked: tuple[str, ...], told: str
) -> None:
    with device.open_all(threads=1) as opened, pytest.raises(InputError) as refused:
        opened.predict_each(paths[:images], asked)
    assert str(refused.value) == told


def test_a_folder_is_no_image_of_a_pair(device: Device, tasks: Tasks) -> None:
    with device.open_all(threads=1) as opened, pytest.raises(InputError) as refused:
        opened.predict_each([tasks.data / "test"], ["shapes"])
    assert str(refused.value) == "image 0: must be one image, for one task, got 12 images"


def test_lines_of_stdin_may_name_the_task_and_be_a_batch(
    device: Device, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"image": str(path), "task": task} for path, task in zip(paths, ASKED, strict=True)]
    lines = [json.dumps(pairs), json.dumps(pairs[1]), '[{"image": "a.png"}]', "[]", "[1"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))

    done = command("device", "run", "--store", device.store, "shapes,tints,probe", "-", "--json")

    said = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 3
    assert [(each["image"], each["task"]) for each in said[0]["results"]] == [
        (path.name, task) for path, task in zip(paths, ASKED, strict=True)
    ]
    assert said[0]["image"] == ", ".join(map(str, paths))
    assert said[1]["results"] == said[0]["results"][1:2]
    assert said[2]["error"] == 'line: needs objects with "image" and "task", got \'[{"image": "a.png"}]\''
    assert said[3]["error"] == 'line: needs objects with "image" and "task", got \'[]\''
    assert said[4]["error"].startswith("line: is no JSON, got ")
