"""On the device: one backbone, many tasks, and each answers as if it were alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgepet import Device, read_pack, write_pack
from edgepet.deltas.delta import Delta
from edgepet.deltas.merge import merge
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.openvino import OpenVino
from edgepet.device.runtime import open_features, open_task
from edgepet.device.store import Store
from edgepet.errors import InputError, MissingError, PackError
from edgepet.graphs.base import BaseGraph
from edgepet.images.preprocess import load_pixels, normalize
from edgepet.measuring.machine import environment
from edgepet.proving.subject import Subject
from edgepet.spec import NpArray
from tests.flow import CLASSES, RUNTIMES, Artifacts, Tasks, needs_openvino
from tests.tiny import random_images

# fp32 in another order of additions: of logits around 1, after six blocks
ROUNDING = 1e-4


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def delta_of(pack: Path) -> Delta:
    return read_pack(pack).delta


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


@pytest.fixture
def device(store: Store, tasks: Tasks) -> Device:
    """Both tasks installed."""
    device = Device(store.root)
    device.install(tasks.shapes)
    device.install(tasks.tints)
    return device


# Installing


def test_installed_tasks_are_listed_and_are_the_packs(store: Store, tasks: Tasks) -> None:
    device = Device(store.root)

    assert device.tasks() == ()
    assert device.install(tasks.tints).task == "tints"
    installed = device.install(tasks.shapes.read_bytes())
    assert (installed.task, installed.bytes, installed.refused) == ("shapes", tasks.shapes.stat().st_size, {})
    assert device.tasks() == ("shapes", "tints")
    assert (store.root / "packs" / f"{installed.sha256}.pet").read_bytes() == tasks.shapes.read_bytes()


def test_a_second_graph_of_the_backbone_costs_no_second_backbone(store: Store, graph: BaseGraph) -> None:
    before = files_below(store.root)

    store.add_graph(graph)

    assert files_below(store.root) == before


def test_a_pack_of_another_backbone_is_refused_and_leaves_nothing(store: Store, tasks: Tasks, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.pet"
    write_pack(stranger, replace(delta_of(tasks.shapes), task="stranger", fingerprint="sha256:" + "ab" * 32))
    before = files_below(store.root)

    with pytest.raises(InputError) as refused:
        Device(store.root).install(stranger)

    assert message(refused) == (
        f"task 'stranger': needs test_vit as {'ab' * 8}/graph-32.json, which is not in this store\n"
        "  fix: edgepet device init --store STORE --for TASK.pet on a host, then bring that folder"
    )
    assert files_below(store.root) == before


def test_a_pack_that_does_not_fit_its_backbone_is_refused_and_leaves_nothing(
    store: Store, tasks: Tasks, tmp_path: Path
) -> None:
    delta = delta_of(tasks.tints)
    first = delta.updates[0]
    moved = replace(first, target=replace(first.target, tensor="blocks.99.attn.qkv.weight"))
    write_pack(tmp_path / "odd.pet", replace(delta, updates=(moved, *delta.updates[1:])))
    before = files_below(store.root)

    with pytest.raises(InputError) as refused:
        Device(store.root).install(tmp_path / "odd.pet")

    assert message(refused) == f"tints: {moved.target}: is no tensor of test_vit"
    assert files_below(store.root) == before


def test_a_truncated_pack_is_refused_and_the_installed_one_stays(device: Device, tasks: Tasks) -> None:
    before = files_below(device.store)

    with pytest.raises(PackError):
        device.install(tasks.shapes.read_bytes()[:-1])

    assert files_below(device.store) == before


def test_a_newer_pack_takes_the_place_of_the_older_one(device: Device, tasks: Tasks, tmp_path: Path) -> None:
    delta = delta_of(tasks.shapes)
    write_pack(tmp_path / "shapes.pet", replace(delta, labels=("ring", "box", "wedge")))
    image = tasks.data / "test" / "square" / "0.png"
    (older,) = device.run("shapes", [image]).results

    device.install(tmp_path / "shapes.pet")
    (newer,) = device.run("shapes", [image]).results

    assert device.tasks() == ("shapes", "tints")
    assert newer.label == ("ring", "box", "wedge")[CLASSES.index(older.label)]
    assert newer.score == older.score


def test_an_install_that_breaks_off_leaves_the_older_pack_whole(
    device: Device, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pack(tmp_path / "shapes.pet", replace(delta_of(tasks.shapes), labels=("ring", "box", "wedge")))
    before = files_below(device.store)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(InputError) as refused:
            device.install(tmp_path / "shapes.pet")

    (fresh,) = {read_pack(tmp_path / "shapes.pet").sha256}
    path = f"{device.store}/packs/{fresh}.pet"
    assert message(refused) == f"{path}: could not be written, got No space left on device"
    assert files_below(device.store) == before


# Running


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("task", ["shapes", "tints"])
def test_image_files_get_the_answers_of_the_network_merged_in_torch(
    device: Device, tasks: Tasks, task: str, runtime: str
) -> None:
    subject = Subject(tasks.folder / f"{task}.pet", tasks.spec, None)
    paths = sorted((tasks.data / "test").glob("*/*.png"))
    pixels = np.stack([load_pixels(path, subject.delta.preprocess) for path in paths])
    logits = subject.merged(normalize(pixels, subject.delta.preprocess)).astype(np.float64)
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    run = device.run(task, paths, runtime=runtime)

    assert [answer.image for answer in run.results] == [path.name for path in paths]
    assert [answer.label for answer in run.results] == [CLASSES[i] for i in logits.argmax(1)]
    assert [answer.score for answer in run.results] == pytest.approx(scores.max(1).tolist(), abs=ROUNDING)
    assert run.open_ms > 0
    assert run.latency_ms > 0


def test_a_photograph_is_turned_upright_as_in_training(device: Device, tasks: Tasks, tmp_path: Path) -> None:
    upright, lying, exif = tasks.data / "test" / "circle" / "0.png", tmp_path / "0.png", Image.Exif()
    exif[0x0112] = 6
    with Image.open(upright) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(lying, exif=exif)

    first, second = device.run("shapes", [upright, lying]).results

    assert read_pack(tasks.shapes).delta.preprocess.orientation == "exif"
    assert first == second


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_task_answers_bit_for_bit_as_before_another_one_ran(graph: BaseGraph, tasks: Tasks, runtime: str) -> None:
    images = random_images(3, 4)

    def answers(pack: Path) -> NpArray:
        with open_task(graph, delta_of(pack), runtime=runtime) as network:
            return network(images)

    first, other, again = answers(tasks.shapes), answers(tasks.tints), answers(tasks.shapes)

    assert np.abs(first - other).max() > 1e-2  # or a switch that does nothing would pass
    assert again.tobytes() == first.tobytes()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_two_tasks_may_be_open_at_once(graph: BaseGraph, tasks: Tasks, runtime: str) -> None:
    images = random_images(3, 4)
    shapes, tints = delta_of(tasks.shapes), delta_of(tasks.tints)
    with open_task(graph, shapes, runtime=runtime) as network:
        alone = network(images)

    with open_task(graph, shapes, runtime=runtime) as one, open_task(graph, tints, runtime=runtime) as two:
        between = [two(images), one(images), two(images)]

    assert between[1].tobytes() == alone.tobytes()
    assert between[0].tobytes() == between[2].tobytes()


def test_a_task_that_is_not_installed_is_refused(device: Device) -> None:
    with pytest.raises(InputError) as refused:
        device.run("birds", [])
    assert message(refused) == f"{device.store}: has no task 'birds'\n  fix: installed are: shapes, tints"


def test_a_runtime_that_shares_no_backbone_is_refused(device: Device) -> None:
    with pytest.raises(InputError) as refused:
        device.run("shapes", [], runtime="tensorrt")
    assert message(refused) == (
        "`runtime`: is one of onnxruntime, openvino for a pack on a shared backbone, got 'tensorrt'"
    )


def test_a_pack_of_another_image_size_is_refused(graph: BaseGraph, tasks: Tasks) -> None:
    delta = delta_of(tasks.shapes)
    with pytest.raises(InputError) as refused:
        open_task(graph, replace(delta, preprocess=replace(delta.preprocess, image_size=(48, 48))))
    assert message(refused) == "task 'shapes': was trained at 48x48 pixels, got a graph of 32x32 pixels"


def test_openvino_that_is_not_installed_names_its_extra(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingError) as refused:
        device.run("shapes", [], runtime="openvino")
    assert message(refused) == (
        "OpenVINO: needs the package 'openvino', got import of openvino halted; None in sys.modules\n"
        "  fix: pip install 'edgepet[openvino]'"
    )


# What ran, and how that is known


def test_onnx_runtime_runs_fp32_on_the_cpu(graph: BaseGraph) -> None:
    with OnnxRuntime.of_graph(graph, {}) as runner:
        assert (runner.runtime, runner.executed) == ("onnxruntime", "fp32")
        assert runner.evidence == {"input": "tensor(float)", "providers": ["CPUExecutionProvider"]}


@needs_openvino
def test_openvino_runs_f32_where_f32_was_asked_for(graph: BaseGraph) -> None:
    with OpenVino.of_graph(graph, {}) as runner:
        evidence = runner.evidence

    assert (runner.executed, evidence["hint"]) == ("fp32", "f32")
    counts = evidence["executed_nodes"]
    assert counts["f32"] >= 6 * 4  # four products in each of six blocks
    assert not {"bf16", "f16"} & set(counts)


@needs_openvino
@pytest.mark.skipif(
    not {"avx512_bf16", "amx_bf16"} & set(environment().cpu_features), reason="needs a CPU with bf16 instructions"
)
def test_openvino_runs_bf16_where_bf16_was_asked_for(graph: BaseGraph) -> None:
    images = random_images(3, 4)
    with OpenVino.of_graph(graph, {}) as full, OpenVino.of_graph(graph, {}, precision="bf16") as half:
        evidence, apart = half.evidence, np.abs(full(images) - half(images)).max()

    assert (half.executed, evidence["hint"]) == ("bf16", "bf16")
    assert evidence["executed_nodes"]["bf16"] >= 6 * 4
    assert 1e-5 < apart < 1  # other numbers than f32's, by some of bf16's 2**-8 of features around 2


# The trap: a runtime that takes a tensor and ignores it


@pytest.fixture(scope="module")
def plain_features(graph: BaseGraph) -> Iterator[tuple[NpArray, NpArray]]:
    images = random_images(5, 2)
    with OnnxRuntime.of_graph(graph, {}) as runner:
        yield images, runner(images)


def test_every_tensor_that_is_given_to_onnx_runtime_changes_its_answer(
    graph: BaseGraph, tasks: Tasks, plain_features: tuple[NpArray, NpArray]
) -> None:
    images, plain = plain_features
    base = graph.base.tensors
    names = sorted(delta_of(tasks.shapes).targets)
    rng = np.random.default_rng(1)

    ignored = []
    for name in names:
        changed = base[name] + rng.standard_normal(base[name].shape).astype(np.float32)
        with OnnxRuntime.of_graph(graph, {name: changed}) as runner:
            if np.abs(runner(images) - plain).max() < 1e-4:
                ignored.append(name)

    assert len(names) == 76  # SSF's: weight and bias of 38 layers
    assert ignored == []


@needs_openvino
def test_every_kind_of_tensor_that_is_given_to_openvino_changes_its_answer(
    graph: BaseGraph, plain_features: tuple[NpArray, NpArray]
) -> None:
    images, plain = plain_features
    base = graph.base.tensors
    layers = ("patch_embed.proj", "blocks.0.norm1", "blocks.0.attn.qkv", "blocks.5.mlp.fc2", "norm")
    rng = np.random.default_rng(1)

    for name in [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")] + ["cls_token", "pos_embed"]:
        changed = base[name] + rng.standard_normal(base[name].shape).astype(np.float32)
        with OpenVino.of_graph(graph, {name: changed}) as runner:
            assert np.abs(runner(images) - plain).max() > 1e-4, name


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("task", ["shapes", "tints"])
def test_replaced_initializers_answer_as_the_exported_model_does(
    graph: BaseGraph, tasks: Tasks, artifacts: Artifacts, task: str, runtime: str
) -> None:
    images = random_images(7, 4)
    delta = delta_of(tasks.folder / f"{task}.pet")
    with OnnxRuntime.of_model(artifacts.of(task, "onnx") / "model.onnx") as exported:
        expected = exported(images)

    with open_task(graph, delta, runtime=runtime) as network:
        got = network(images)
    with open_features(graph, {}, runtime=runtime) as features:
        plain = delta.head(features(images))

    assert np.abs(got - plain).max() > 1e-3  # the delta is in there
    assert np.abs(got - expected).max() <= ROUNDING


def test_merging_leaves_the_mapped_backbone_as_it_was(graph: BaseGraph, tasks: Tasks) -> None:
    before = {name: tensor.copy() for name, tensor in graph.base.tensors.items()}

    merged = merge(graph.base, delta_of(tasks.shapes))

    assert all(tensor.tobytes() == before[name].tobytes() for name, tensor in graph.base.tensors.items())
    assert not any(tensor.flags.writeable for tensor in graph.base.tensors.values())
    assert merged["norm.weight"].tobytes() != before["norm.weight"].tobytes()
