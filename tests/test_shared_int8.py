"""One int8 backbone and many tasks: its codes never change, and each task answers as its own Q/DQ graph would."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from edgepet import Device, write_pack
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.slot_graphs import coded_backbone, int8_graph
from edgepet.deltas.codes import Range, coded
from edgepet.deltas.delta import Delta, Int8Ranges
from edgepet.deltas.merge import merge
from edgepet.deltas.updates import keeps_codes
from edgepet.device.openvino import SharedOpenVino
from edgepet.device.runtime import SharedInt8, TaskNetwork
from edgepet.device.store import Store
from edgepet.errors import BackboneError, InputError
from edgepet.exporters.onnx import build_model
from edgepet.files import sha256_file
from edgepet.graphs.base import graph_folder, open_graph
from edgepet.graphs.int8 import CODE, CODES, Int8Graph, open_int8
from edgepet.graphs.slots import task_slots
from edgepet.measuring.parity import SAME_CODES
from edgepet.methods import IA3, SSF, BitFit, GLoRA, LoRA, Method, NormTuning
from edgepet.proving.precision import express
from edgepet.spec import NpArray
from tests.flow import RUNTIMES, Artifacts, Network, needs_openvino
from tests.interpreters import DEVICE, block, python, verb
from tests.on_codes import IMAGES, Task, apart, noise

ARCHITECTURES = ["test_vit", "test_efficientnet", "test_resnet"]
METHODS: dict[str, Method] = {m.name: m for m in (SSF(), BitFit(), NormTuning(), GLoRA(), IA3(), LoRA())}
FIX = "\n  fix: run `edgepet calibrate TASK.pet --calib DIR -o OUT.pet`"


@dataclass(frozen=True, eq=False)
class Shared:
    """A tiny network, its int8 backbone, and tasks on it."""

    network: Network
    graph: Int8Graph

    tasks: dict[str, Task] = field(default_factory=dict)

    def task(self, method: str) -> Task:
        """Called as its method with a 3 behind it, which is its seed."""
        if method not in self.tasks:
            delta = self.network.task(METHODS[method], name=f"{method}3", seed=3)
            self.tasks[method] = self.calibrated(turned(delta) if method == "ssf" else delta)
        return self.tasks[method]

    def calibrated(self, delta: Delta) -> Task:
        made = express(delta, self.network.graph, self.graph, noise(delta.preprocess), recipe=Int8Recipe())
        return Task.of(made)


def turned(delta: Delta) -> Delta:
    """``delta`` with a third of its factors of weights below zero, and one of each exactly zero."""
    updates = []
    for targeted in delta.updates:
        if targeted.update.kind == "scale" and targeted.target.tensor.endswith("weight"):
            factor = np.array(targeted.update.s)
            factor[::3] *= -1
            factor[1] = 0
            targeted = replace(targeted, update=replace(targeted.update, s=factor))
        updates.append(targeted)
    return replace(delta, updates=tuple(updates))


@pytest.fixture(scope="module")
def shared_of(networks: Callable[[str], Network]) -> Callable[[str], Shared]:
    @cache
    def shared(architecture: str) -> Shared:
        network = networks(architecture)
        return Shared(network, int8_graph(network.graph, root=network.graph.folder.parents[1]))

    return shared


@pytest.fixture(scope="module", params=ARCHITECTURES)
def shared(request: pytest.FixtureRequest, shared_of: Callable[[str], Shared]) -> Shared:
    return shared_of(request.param)


@pytest.fixture(scope="module")
def vit(shared_of: Callable[[str], Shared]) -> Shared:
    return shared_of("test_vit")


# ----------------------------------------------------------------------------------------------------------- the codes


def test_the_file_of_codes_is_the_same_whatever_tasks_are_expressed(shared: Shared) -> None:
    before = sha256_file(shared.graph.codes_path)

    for name in METHODS:
        task_slots(shared.graph, shared.task(name).delta)

    assert sha256_file(shared.graph.codes_path) == before == shared.graph.codes_sha256
    assert not any(tensor.flags.writeable for tensor in shared.graph.tensors.values())


def test_the_backbones_weights_alone_decide_the_codes(shared: Shared, tmp_path: Path) -> None:
    source = shared.network.graph.folder
    shutil.copytree(source, graph_folder(shared.graph.fingerprint, tmp_path), ignore=lambda _, names: [
        name for name in names if "int8" in name])  # fmt: skip
    again = int8_graph(open_graph(shared.graph.fingerprint, shared.graph.preprocess, root=tmp_path), root=tmp_path)

    assert again.codes_sha256 == shared.graph.codes_sha256
    assert again.folder != shared.graph.folder
    assert dict(again.files) == dict(shared.graph.files)


def test_what_an_earlier_edgepet_made_is_made_again(vit: Shared, tmp_path: Path) -> None:
    shutil.copytree(vit.graph.folder, folder := graph_folder(vit.graph.fingerprint, tmp_path))
    path = folder / f"{vit.graph.stem}.json"
    path.write_text(path.read_text().replace('"version":3', '"version":1'))
    (folder / CODES).write_bytes(b"codes by another recipe")
    graph = open_graph(vit.graph.fingerprint, vit.graph.preprocess, root=tmp_path)
    assert refusal(lambda: open_int8(graph.fingerprint, graph.preprocess, root=tmp_path)) == (
        f"{path}: this edgepet reads graphs of versions 2 to 4\n  fix: delete it and run again"
    )

    again = int8_graph(graph, root=tmp_path)

    assert dict(again.files) == dict(vit.graph.files)
    assert sha256_file(again.codes_path) == vit.graph.codes_sha256


def test_codes_are_those_of_the_weights_by_the_one_recipe(shared: Shared) -> None:
    made = coded_backbone(shared.network.graph)

    assert set(made) == {layer.weight for layer in shared.graph.layers}
    for layer in shared.graph.layers:
        stored = shared.graph.coded(layer)
        assert np.array_equal(stored.codes, made[layer.weight].codes)
        assert np.array_equal(stored.scales, made[layer.weight].scales)
        behind_norm = layer.norm is not None and layer.kind == "linear"
        assert (stored.divisors is not None) == behind_norm
        weight = shared.network.graph.base.tensors[layer.weight]
        error = np.abs(stored.dense - weight) * (1 if stored.divisors is None else stored.divisors)
        assert (error.reshape(len(weight), -1).max(axis=1) <= 0.501 * stored.scales).all()  # half a step


@pytest.mark.parametrize("method", ["ssf", "bitfit", "norm-tuning", "glora"])
def test_tasks_that_scale_and_shift_have_no_codes_of_their_own(shared: Shared, method: str) -> None:
    delta = shared.task(method).delta
    assert all(map(keeps_codes, delta.updates))
    assert any(targeted.update.kind == "push" for targeted in delta.updates) is (method == "glora")

    slots = task_slots(shared.graph, delta)

    assert dict(slots.codes) == {}
    assert slots.own_bytes < 0.2 * shared.graph.weights_bytes  # vectors, of a backbone of width 64


def test_lora_has_codes_of_its_own_for_the_weights_that_it_changes(shared: Shared) -> None:
    delta = shared.task("lora").delta

    slots = task_slots(shared.graph, delta)

    assert set(slots.codes) == {name + CODE for name in delta.targets}
    assert not any(map(keeps_codes, delta.updates))
    assert len(slots.codes) == {"test_vit": 6}.get(shared.network.backbone.name, 15)
    for name, codes in slots.codes.items():
        assert (codes.dtype, codes.shape) == (np.int8, shared.graph.tensors[name].shape)
        assert not np.array_equal(codes, shared.graph.tensors[name])


def test_ia3_has_codes_of_its_own_only_where_it_scales_what_a_layer_reads(shared: Shared) -> None:
    slots = task_slots(shared.graph, shared.task("ia3").delta)

    second = {f"blocks.{i}.mlp.fc2.weight{CODE}" for i in range(6)}
    assert set(slots.codes) == (second if shared.network.backbone.name == "test_vit" else set())


def test_merged_weights_have_the_shared_codes_up_to_the_factors_sign(shared: Shared) -> None:
    """What lets every task share them: quantising a merged SSF network on its own gives these codes again."""
    delta = shared.task("ssf").delta
    factors = {u.target.tensor: u.update.s for u in delta.updates if u.update.kind == "scale"}
    merged = merge(shared.network.graph.base, delta)

    different = total = negative = 0
    for layer in shared.graph.layers:
        stored = shared.graph.coded(layer)
        own = coded(merged[layer.weight], stored.divisors).codes.astype(int)
        signs = np.sign(factors[layer.weight]).astype(int)
        negative += int((signs < 0).sum())
        expected = stored.codes * signs.reshape(-1, *[1] * (own.ndim - 1))
        assert np.abs(own - expected).max() <= 1
        different, total = different + int((own != expected).sum()), total + own.size
    assert negative > 100
    assert different <= 1e-5 * total + 1  # float32 that falls on the other side of a half


# --------------------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_task_answers_as_the_graph_of_the_same_numbers(shared: Shared, method: str, runtime: str) -> None:
    task = shared.task(method)
    expected = task.expected(runtime=runtime)

    got = SharedInt8(shared.graph, runtime=runtime).bind(task.delta)(IMAGES)

    # An image of which no number falls between two codes gets the same answer but for float32's rounding; one of
    # which some does moves by a code there, and what comes behind it by more.
    differences = apart(got, expected)
    assert (differences < 1e-5).mean() >= 0.5
    assert differences.max() <= (SAME_CODES.relative or 0)


@needs_openvino
def test_openvino_scales_and_shifts_what_a_layer_puts_out_in_one_pass(shared: Shared) -> None:
    """What a ViT's latency rests on: element-wise operations on slots are one node, and convolutions' are not laid out
    anew on their way.
    """
    network = SharedOpenVino(shared.graph)
    nodes = [(node, node.get_rt_info()) for node in network._compiled.get_runtime_model().get_ordered_ops()]
    facts = [(n, {key: str(f[key].astype(str)) for key in ("originalLayersNames", "outputLayouts")}) for n, f in nodes]
    passes = {name: (n, fact) for n, fact in facts for name in fact["originalLayersNames"].split(",")}

    for layer in shared.graph.layers:
        node, fact = passes[f"{layer.name}.scaled"]
        assert fact["originalLayersNames"].count(",") >= 1  # the bias, and what follows
        alone = ".se." not in layer.name  # what squeeze-and-excite multiplies lies as its one pixel does
        if layer.kind == "conv" and alone and node.get_output_partial_shape(0)[3].get_length() > 1:
            assert fact["outputLayouts"] == "acdb", layer.name  # channels last
    network.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_task_answers_near_its_float_network_and_not_as_another_task(shared: Shared, method: str) -> None:
    task = shared.task(method)
    delta, graph = task.delta, shared.network.graph
    exact = Task(delta, build_model(graph, merge(graph.base, delta), delta)).expected()
    other = shared.task("bitfit" if method != "bitfit" else "lora").expected()

    got = SharedInt8(shared.graph).bind(delta)(IMAGES)

    assert 1e-3 < apart(got, exact).max() < 0.1  # 4 % were measured, of codes
    assert apart(got, other).max() > 2 * apart(got, exact).max()


def test_factors_that_are_zero_or_negative_are_in_the_steps(vit: Shared) -> None:
    slots = task_slots(vit.graph, vit.task("ssf").delta)

    for layer in vit.graph.layers:
        steps = slots.values[f"{layer.name}.steps"]
        assert (steps[1], (steps[::3] < 0).all(), (steps[2::3] > 0).all()) == (0, True, True)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_task_answers_bit_for_bit_as_before_another_one_ran(shared: Shared, runtime: str) -> None:
    backbone = SharedInt8(shared.graph, runtime=runtime)
    first, second, own = (backbone.bind(shared.task(name).delta) for name in ("ssf", "bitfit", "lora"))
    alone = SharedInt8(shared.graph, runtime=runtime).bind(shared.task("ssf").delta)(IMAGES)

    answers = [first(IMAGES), second(IMAGES), own(IMAGES), first(IMAGES), second(IMAGES), first(IMAGES)]

    assert apart(answers[1], answers[0]).max() > 1e-2  # or a switch that does nothing would pass
    assert all(answers[i].tobytes() == alone.tobytes() for i in (0, 3, 5))
    assert answers[4].tobytes() == answers[1].tobytes()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_batches_of_one_and_five_alternate(vit: Shared, runtime: str) -> None:
    backbone = SharedInt8(vit.graph, runtime=runtime)
    first, second = (backbone.bind(vit.task(name).delta) for name in ("ssf", "bitfit"))

    one, five, other = first(IMAGES[:1]), first(IMAGES[:5]), second(IMAGES[:1])

    assert (one.shape, five.shape) == ((1, 5), (5, 5))
    assert first(IMAGES[:1]).tobytes() == one.tobytes()
    assert second(IMAGES[:1]).tobytes() == other.tobytes()
    assert first(IMAGES[:5]).tobytes() == five.tobytes()
    assert np.abs(five[:1] - one).max() <= (SAME_CODES.relative or 0) * np.abs(one).max()  # other kernels by the batch


@pytest.mark.parametrize(("runtime", "linear"), [("onnxruntime", 24), pytest.param("openvino", 25)])
def test_layers_multiply_codes(vit: Shared, runtime: str, linear: int) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="needs the package openvino")

    network = SharedInt8(vit.graph, runtime=runtime).bind(vit.task("ssf").delta)

    layers = network.evidence["layers"]
    assert isinstance(layers, dict)
    assert (network.executed, layers["int8"]) == ("int8", linear)  # ONNX Runtime has no int8 patch embedding
    network.close()


# ---------------------------------------------------------------------------------------------------- what is refused


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert refused.value.exit_code == 3
    return str(refused.value)


def test_a_task_without_ranges_is_refused(vit: Shared) -> None:
    delta = replace(vit.task("ssf").delta, int8=None)

    assert refusal(lambda: SharedInt8(vit.graph).bind(delta)) == (
        f"task 'ssf3': has no activation ranges for the int8 backbone{FIX}"
    )


def test_ranges_for_other_codes_are_refused(vit: Shared) -> None:
    delta = vit.task("ssf").delta
    assert delta.int8 is not None
    other = replace(delta, int8=replace(delta.int8, codes="ab" * 32))

    assert refusal(lambda: task_slots(vit.graph, other)) == (
        f"task 'ssf3': has ranges for the int8 codes abababababab, got {vit.graph.codes_sha256[:12]}{FIX}"
    )


def test_another_number_of_ranges_is_refused(vit: Shared) -> None:
    delta = vit.task("ssf").delta
    assert delta.int8 is not None
    fewer = replace(delta, int8=replace(delta.int8, ranges=delta.int8.ranges[1:]))

    assert refusal(lambda: task_slots(vit.graph, fewer)) == (
        f"task 'ssf3': needs 25 activation ranges for the int8 backbone, got 24{FIX}"
    )


def test_a_task_of_another_backbone_is_refused(vit: Shared, shared_of: Callable[[str], Shared]) -> None:
    stranger = shared_of("test_resnet").task("bitfit").delta

    with pytest.raises(BackboneError, match=r"^task 'bitfit3'.*test_resnet"):
        task_slots(vit.graph, stranger)


def test_a_vector_that_is_no_number_is_refused(vit: Shared) -> None:
    delta = vit.task("bitfit").delta
    first = next(u for u in delta.updates if u.target.tensor == "blocks.0.mlp.fc1.bias")
    broken = replace(first, update=replace(first.update, d=np.full_like(first.update.d, np.inf)))
    others = tuple(u for u in delta.updates if u is not first)

    assert refusal(lambda: task_slots(vit.graph, replace(delta, updates=(broken, *others)))) == (
        "task 'bitfit3': blocks.0.mlp.fc1.shifted: must be finite, got NaN or infinity"
    )


def test_a_runtime_that_shares_no_backbone_is_refused(vit: Shared) -> None:
    assert refusal(lambda: SharedInt8(vit.graph, runtime="tensorrt")) == (
        "`runtime`: is one of onnxruntime, openvino for an int8 backbone, got 'tensorrt'"
    )


@pytest.fixture
def copied(vit: Shared, tmp_path: Path) -> Int8Graph:
    shutil.copytree(vit.graph.folder, graph_folder(vit.graph.fingerprint, tmp_path))
    return open_int8(vit.graph.fingerprint, vit.graph.preprocess, root=tmp_path)


def test_a_file_of_codes_with_one_bit_changed_is_refused_when_it_is_opened(copied: Int8Graph) -> None:
    data = bytearray(copied.codes_path.read_bytes())
    data[-7] ^= 1
    copied.codes_path.write_bytes(data)

    assert refusal(lambda: SharedInt8(copied)) == (
        f"{copied.codes_path}: must have sha256 {copied.codes_sha256[:12]}, got {sha256_file(copied.codes_path)[:12]}\n"
        "  fix: delete it and make the int8 backbone again"
    )


@pytest.mark.parametrize("name", [CODES, "graph-32-int8.onnx", "graph-32-int8-openvino.onnx"])
def test_a_file_that_was_cut_short_is_refused(copied: Int8Graph, name: str) -> None:
    path = copied.folder / name
    path.write_bytes(path.read_bytes()[:-1])

    message = refusal(lambda: open_int8(copied.fingerprint, copied.preprocess, root=copied.folder.parents[1]))

    assert message.startswith(f"{path}: ")


def test_a_backbone_that_was_never_made_is_refused(vit: Shared, tmp_path: Path) -> None:
    folder = graph_folder(vit.graph.fingerprint, tmp_path)

    assert refusal(lambda: open_int8(vit.graph.fingerprint, vit.graph.preprocess, root=tmp_path)) == (
        f"{folder}: holds no int8 backbone at 32 pixels\n"
        "  fix: run `edgepet calibrate TASK.pet --calib DIR -o OUT.pet` where torch is installed"
    )


# ---------------------------------------------------------------------------------------------------------- on a device


@pytest.fixture
def device(vit: Shared, tmp_path: Path) -> Device:
    """A folder with the int8 backbone and no other; two tasks, and an image beside it."""
    store = Store(tmp_path / "device")
    store.add_int8(vit.graph)
    for method in ("ssf", "lora"):
        write_pack(tmp_path / f"{method}3.pet", vit.task(method).delta, codec="fp32")
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return Device(store.root)


def test_a_device_with_only_the_int8_backbone_installs_runs_and_counts_without_torch(
    device: Device, vit: Shared, tmp_path: Path
) -> None:
    code = block(DEVICE) + (
        "import json; from pathlib import Path; from edgepet import Device;"
        "root, image, *packs = map(Path, sys.argv[1:]);"
        "device = Device(root); [device.install(pack) for pack in packs];"
        "runs = [device.run(task, [image], precision='int8').results[0] for task in device.tasks()];"
        "opened = sorted(device.open_int8());"
        "print(json.dumps([device.tasks(), [r.label for r in runs], [r.score for r in runs], opened]))"
    )

    done = python(code, device.store, tmp_path / "image.png", tmp_path / "ssf3.pet", tmp_path / "lora3.pet")

    assert (done.returncode, done.stderr) == (0, "")
    tasks, labels, scores, opened = json.loads(done.stdout)
    assert tasks == opened == ["lora3", "ssf3"]
    here = [device.run(task, [tmp_path / "image.png"], precision="int8").results[0] for task in tasks]
    assert ([r.label for r in here], [r.score for r in here]) == (labels, pytest.approx(scores, abs=1e-6))
    assert not list(Path(device.store).glob("backbones/*/backbone.safetensors"))

    counted = verb("storage", "--store", device.store, "--precision", "int8")

    size = (graph_folder(vit.graph.fingerprint, Path(device.store)) / CODES).stat().st_size
    assert (counted["precision"], counted["backbone_bytes"]) == ("int8", size)
    whole = (vit.network.graph.folder / "backbone.safetensors").stat().st_size
    assert 0.25 < size / whole < 0.35  # a quarter, and tables and vectors of a small network in fp32
    assert counted["per_runtime"][0]["tasks_run"] == 2
    own = {row["task"]: row["own_memory_bytes"] for row in counted["tasks"]}
    assert own["lora3"] == own["ssf3"] + 6 * 64 * 192  # the codes of six qkv


def test_open_int8_gives_every_task_on_one_backbone(device: Device, vit: Shared, tmp_path: Path) -> None:
    for method in ("ssf", "lora"):
        device.install(tmp_path / f"{method}3.pet")

    networks = device.open_int8()

    assert sorted(networks) == ["lora3", "ssf3"]
    for method in ("ssf", "lora"):
        alone = SharedInt8(vit.graph).bind(vit.task(method).delta)(IMAGES)
        assert networks[f"{method}3"](IMAGES).tobytes() == alone.tobytes()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tasks_on_int8_are_closed_together(device: Device, tmp_path: Path, runtime: str) -> None:
    for method in ("ssf", "lora"):  # LoRA has codes, and so a network, of its own
        device.install(tmp_path / f"{method}3.pet")

    with device.open_int8(runtime=runtime) as networks:
        ssf = networks["ssf3"]
        assert (len(networks), "lora3" in networks, networks.get("other")) == (2, True, None)
        assert ssf(IMAGES[:1]).shape == (1, 5)
        sessions = [weakref.ref(held) for held in sessions_in(networks.values())]
        assert len(sessions) == 2

    gc.collect()
    assert [session() for session in sessions] == [None, None]


def sessions_in(networks: Iterable[TaskNetwork]) -> list[object]:
    """What of ONNX Runtime or OpenVINO holds the weights of each network."""
    bound = [network._features for network in networks]
    held = [getattr(each, "_session", None) or each._compiled for each in bound]
    return list({id(each): each for each in held}.values())


@needs_openvino
def test_what_openvino_compiled_is_kept_and_made_again_where_it_is_damaged(device: Device, tmp_path: Path) -> None:
    device.install(tmp_path / "ssf3.pet")
    folder = Path(device.store) / "cache" / "derived"

    def answers() -> NpArray:
        with device.open_int8(runtime="openvino") as networks:
            assert cast(dict[str, int], networks["ssf3"].evidence["layers"])["int8"] == 25
            return networks["ssf3"](IMAGES)

    (kept,) = folder.iterdir()
    stamp, first = kept.stat().st_mtime_ns, answers()
    assert [(path, path.stat().st_mtime_ns) for path in folder.iterdir()] == [(kept, stamp)]
    kept.chmod(0o644)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")

    again = answers()

    assert np.array_equal(first, again)
    (fresh,) = folder.iterdir()
    assert fresh.stem.endswith(hashlib.sha256(fresh.read_bytes()).hexdigest())


def test_a_runtime_that_shares_no_backbone_opens_no_tasks(device: Device, tmp_path: Path) -> None:
    device.install(tmp_path / "ssf3.pet")

    assert refusal(lambda: device.open_int8(runtime="tensorrt")) == (
        "`runtime`: is one of onnxruntime, openvino for a pack on a shared backbone, got 'tensorrt'"
    )


def test_tasks_without_ranges_cannot_open_on_int8(device: Device, vit: Shared, tmp_path: Path) -> None:
    assert refusal(device.open_int8) == (
        f"{device.store}: has no task with ranges for the int8 backbone\n"
        "  fix: install packs that `edgepet calibrate TASK.pet --calib DIR -o OUT.pet` wrote"
    )
    write_pack(tmp_path / "plain.pet", replace(vit.task("ssf").delta, int8=None))
    digits = graph_folder(vit.graph.fingerprint).name

    assert refusal(lambda: device.install(tmp_path / "plain.pet")) == (
        f"task 'ssf3': needs test_vit as {digits}/graph-32.json, which is not in this store\n"
        "  fix: edgepet device init --store STORE --for TASK.pet on a host, then bring that folder"
    )


def test_a_pack_with_ranges_that_do_not_fit_leaves_nothing(device: Device, vit: Shared, tmp_path: Path) -> None:
    delta = vit.task("ssf").delta
    write_pack(tmp_path / "odd.pet", replace(delta, int8=Int8Ranges(codes="ab" * 32, ranges=(Range(scale=1.0),) * 25)))

    message = refusal(lambda: device.install(tmp_path / "odd.pet"))

    assert message.startswith("task 'ssf3': has ranges for the int8 codes abababababab")
    assert device.tasks() == ()


def test_another_precision_than_fp32_and_int8_is_refused(device: Device, tmp_path: Path) -> None:
    device.install(tmp_path / "ssf3.pet")

    assert refusal(lambda: device.run("ssf3", [], precision="fp16")) == (
        "`precision`: is fp32 or int8 for a pack, got 'fp16'"
    )


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from edgepet.device.openvino import OpenVino

first, second = OpenVino.of_model(Path(sys.argv[1])), OpenVino.of_model(Path(sys.argv[1]))
del first  # in another order than last come, first gone
del second
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@needs_openvino
def test_a_signal_after_networks_were_closed_in_any_order_is_handled(artifacts: Artifacts) -> None:
    """OpenVINO's cores give their stacks for signals back in the wrong order: a process must have one core only."""
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-c",
        SIGNALLED,
        str(artifacts.of("shapes", "openvino") / "model.xml"),
    ]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
