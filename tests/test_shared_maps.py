"""The int8 backbone of a ConvNet: codes in every map, and a task that is constants of a session or inputs of one."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepet import write_pack
from edgepet.calibration.qdq import Int8Recipe, moved_by
from edgepet.calibration.shared_maps import coded_maps
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.deltas.codes import MOST_BIAS, Range
from edgepet.deltas.delta import Delta
from edgepet.device.mixed import mix
from edgepet.device.pool import Pool
from edgepet.device.runtime import SharedInt8
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.graphs.base import graph_folder, open_graph
from edgepet.graphs.int8 import OTHER_RANGES, CodedMap, Int8Graph, open_int8
from edgepet.graphs.map_slots import in_form
from edgepet.graphs.onnx_file import port, read_onnx, shape_of_port, tensor_of
from edgepet.graphs.parts import part_of
from edgepet.graphs.slots import task_slots
from edgepet.methods import SSF
from edgepet.proving.precision import Expressed, express
from edgepet.spec import NpArray
from tests.flow import Network, needs_openvino
from tests.int8_graphs import made_by_hand, residual
from tests.on_codes import IMAGES, apart, noise

GOLDEN = Path(__file__).parent / "golden" / "tasks"
CONVOLUTIONS, POOLINGS = 15, 4
FIX = "\n  fix: run `edgepet calibrate TASK.pet --calib DIR -o OUT.pet`"


@dataclass(frozen=True, eq=False)
class Shared:
    """A tiny ResNet, its int8 backbone, and two tasks on it."""

    network: Network
    root: Path
    graph: Int8Graph

    def made(self, seed: int) -> Expressed:
        delta = self.network.task(SSF(), name=f"ssf{seed}", seed=seed)
        return express(delta, self.network.graph, self.graph, noise(delta.preprocess), recipe=Int8Recipe())

    @cached_property
    def first(self) -> Delta:
        return self.made(3).delta

    @cached_property
    def second(self) -> Delta:
        return self.made(4).delta


@pytest.fixture(scope="module")
def shared(networks: Callable[[str], Network], tmp_path_factory: pytest.TempPathFactory) -> Shared:
    network, root = networks("test_resnet"), tmp_path_factory.mktemp("cache")
    folder = graph_folder(network.graph.fingerprint, root)
    shutil.copytree(network.graph.folder, folder, ignore=shutil.ignore_patterns("*int8*"))
    graph = open_graph(network.graph.fingerprint, network.graph.preprocess, root=root)
    return Shared(network, root, int8_graph(graph, lambda: noise(graph.preprocess), root=root))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert refused.value.exit_code == 3
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------------- which codes


def kinds(model: Any) -> list[tuple[str, str]]:
    found = made_by_hand(model)
    return [(each.name, each.codes) for each in coded_maps(found.graph, found.layers)]


def test_the_graph_alone_says_which_codes_a_map_has() -> None:
    assert kinds(residual()) == [
        ("images", "signed"), ("bounded", "unsigned"), ("second", "signed"), ("positive", "unsigned"),
        ("other", "signed"),
    ]  # fmt: skip
    assert kinds(residual(twice=True)) == [
        ("images", "signed"), ("bounded", "unsigned"), ("second", "signed"), ("sum", "signed"),
        ("positive", "unsigned"), ("other", "signed"), ("end", "signed"),
    ]  # fmt: skip


def test_codes_fit_ranges_that_begin_where_theirs_do() -> None:
    assert [
        [CodedMap(name="x", codes=codes).fits(Range(scale=0.5, shift=shift)) for shift in (0.0, 64.0, 1.0)]
        for codes in ("signed", "unsigned", "shifted")
    ] == [[True, False, False], [False, True, False], [True, True, True]]


def test_what_a_pooling_reads_decides_the_codes_of_what_it_puts_out(shared: Shared) -> None:
    codes = {each.name: each.codes for each in shared.graph.coded_maps}

    assert (codes["images"], codes["max_pool2d"]) == ("signed", "unsigned")
    assert {codes[name] for name in codes if name.startswith("relu")} == {"unsigned"}
    assert "shifted" not in codes.values()


# ---------------------------------------------------------------------------------------------------------- the graphs


def test_between_convolutions_onnx_runtimes_graph_has_codes_alone(shared: Shared) -> None:
    model = onnx.load(str(shared.graph.model_path("onnxruntime")), load_external_data=False)
    read = {name for node in model.graph.node for name in node.input}

    operators = [node.op_type for node in model.graph.node if {*node.output} & read or node.op_type == "ReduceMean"]

    assert operators.count("QLinearConv") == CONVOLUTIONS
    assert operators.count("QuantizeLinear") == 1 + POOLINGS  # the images
    assert operators.count("DequantizeLinear") == POOLINGS + 1  # what the features are means of
    assert not {"Conv", "Add", "Relu", "Clip"} & {*operators}
    types = {each.name: each.type.tensor_type.elem_type for each in model.graph.input}
    assert {name.rpartition(".")[2] for name, kind in types.items() if kind == onnx.TensorProto.INT32} == {"bias"}


def test_nothing_computes_in_floats_on_onnx_runtime(shared: Shared) -> None:
    network = SharedInt8(shared.graph).bind(shared.first)

    assert network.evidence["layers"] == {"int8": CONVOLUTIONS}


@needs_openvino
def test_openvino_rounds_what_a_convolution_puts_out_in_the_pass_that_scales_it(shared: Shared) -> None:
    network = SharedInt8(shared.graph, runtime="openvino").bind(shared.first)
    compiled: Any = network._features._compiled  # type: ignore[attr-defined]

    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    passes = [str(fact["originalLayersNames"].astype(str)).split(",") for fact in facts]

    read = {layer.reads for layer in shared.graph.layers if layer.reads.startswith("relu")}
    assert len(read) > 8
    for name in read:
        (names,) = (names for names in passes if f"{name}.unit" in names)
        assert f"{name}.codes" in names
        assert len(names) >= 3  # the bias, or a sum, and steps
    assert network.evidence["layers"]["int8"] == CONVOLUTIONS  # type: ignore[index]


# ----------------------------------------------------------------------------------------------- constants, and inputs


def test_a_task_in_one_session_for_all_answers_bit_for_bit_as_in_its_own(shared: Shared) -> None:
    backbone = SharedInt8(shared.graph)
    first, second = (backbone.bind(delta) for delta in (shared.first, shared.second))
    light = [backbone.bind(delta, room_bytes=0) for delta in (shared.first, shared.second)]

    assert [network(IMAGES).tobytes() for network in light] == [first(IMAGES).tobytes(), second(IMAGES).tobytes()]
    assert apart(first(IMAGES), second(IMAGES)).max() > 1e-2
    assert light[0]._features._session is light[1]._features._session  # type: ignore[attr-defined]


def test_memory_that_is_left_decides_which_tasks_are_fast(shared: Shared) -> None:
    backbone = SharedInt8(shared.graph)
    size = int(1.5 * shared.graph.weights_bytes)

    fast = backbone.bind(shared.first, room_bytes=size)
    assert backbone.own_bytes == size
    slow = backbone.bind(shared.second, room_bytes=size - 1)

    assert backbone.own_bytes == size
    fast.close()
    del fast
    gc.collect()
    assert backbone.own_bytes == 0
    slow.close()


def test_a_pool_gives_its_memory_to_the_tasks_that_come_first(shared: Shared, tmp_path: Path) -> None:
    store, size = Store(tmp_path / "device"), int(1.5 * shared.graph.weights_bytes)
    store.add_int8(shared.graph)
    for delta in (shared.first, shared.second):
        write_pack(tmp_path / f"{delta.task}.pet", delta, codec="fp32")
        store.install(tmp_path / f"{delta.task}.pet")

    def inputs(memory: int | None) -> list[int]:
        """How many each task's session has."""
        pool = Pool(store, runtime="onnxruntime", precision="int8", memory_bytes=memory, threads=1)
        networks = [pool.open(store.pack(task)) for task in ("ssf3", "ssf4")]
        sessions: list[Any] = [network._features._session for network in networks]  # type: ignore[attr-defined]
        counts = [min(2, len(session.get_inputs())) for session in sessions]
        pool.close()
        return counts

    assert [inputs(memory) for memory in (None, 2 * size, size, 0)] == [[1, 1], [1, 1], [1, 2], [2, 2]]


@needs_openvino
def test_openvino_takes_no_memory_for_a_task_but_its_slots(shared: Shared) -> None:
    backbone = SharedInt8(shared.graph, runtime="openvino")

    bound = [backbone.bind(shared.first, room_bytes=room) for room in (None, 0)]

    assert backbone.own_bytes == 0
    assert bound[0](IMAGES).tobytes() == bound[1](IMAGES).tobytes()


def test_a_bias_is_an_integer_however_little_its_channel_computes(shared: Shared) -> None:
    slots = task_slots(shared.graph, shared.first)
    values = dict(slots.values)
    layer = shared.graph.layers[1]
    steps = values[f"{layer.name}.steps"].copy()
    steps[0], steps[1] = 0, -1e-30
    values[f"{layer.name}.steps"] = steps

    made = in_form(shared.graph, replace(slots, values=values), "onnxruntime")

    scale, bias = np.float32(slots.ranges[layer.reads].scale), made[f"{layer.name}.bias"]
    now = made[f"{layer.name}.steps"]
    assert (bias.dtype, bool(np.abs(bias.astype(np.int64)).max() <= MOST_BIAS)) == (np.int32, True)
    assert np.allclose(bias * (scale * now).astype(np.float64), values[f"{layer.name}.shifted"], rtol=0.01, atol=1e-6)
    assert (np.signbit(now[:2]).tolist(), now[2:].tobytes()) == ([False, True], steps[2:].tobytes())


def test_tasks_on_integers_share_no_batch(shared: Shared) -> None:
    found = mix(shared.graph, {"a": shared.first, "b": shared.second}, runtime="onnxruntime", threads=1)

    assert found.network is None
    assert set(found.unmixed) == {"a", "b"}
    assert all(why.endswith(": is read by QLinearConv, which has one for all images") for why in found.unmixed.values())


# --------------------------------------------------------------------------------------------------- what is refused


def test_a_pack_brings_what_rounding_takes_off_each_output(shared: Shared) -> None:
    made = shared.made(3)
    assert made.delta.int8 is not None
    bare = replace(made.delta, int8=replace(made.delta.int8, corrections=()))
    slot = f"{shared.graph.layers[0].name}.shifted"

    found = made.calibration.corrections(made.ranges)
    mended, before = (task_slots(shared.graph, delta).values[slot] for delta in (made.delta, bare))

    wanted = np.concatenate([found[layer.name] for layer in shared.graph.layers])
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(made.delta.int8.corrections, wanted, atol=np.abs(wanted).max() / 127)  # of 8 bits
    np.testing.assert_allclose(mended - before, made.delta.int8.corrections[: len(before)], atol=1e-6)


def test_corrected_outputs_have_the_means_of_exact_ones() -> None:
    rng = np.random.default_rng(0)
    exact, rows = rng.standard_normal((5, 8)), rng.standard_normal((200, 8))
    rounded, of = np.round(4 * exact) / 4, Range(scale=0.1, shift=0.5)

    lost = moved_by(exact, rounded, rows, of)

    np.testing.assert_allclose((of.rounded(rows) @ rounded.T).mean(axis=0) + lost, (rows @ exact.T).mean(axis=0))
    assert np.abs(lost).min() > 1e-4


def test_another_number_of_corrections_is_refused(shared: Shared) -> None:
    assert shared.first.int8 is not None
    fewer = replace(shared.first.int8, corrections=shared.first.int8.corrections[:-1])
    count = len(fewer.corrections)

    assert refusal(lambda: task_slots(shared.graph, replace(shared.first, int8=fewer))) == (
        f"task 'ssf3': needs {count + 1} corrections of biases for the int8 backbone, or none, got {count}\n"
        f"  fix: {OTHER_RANGES}"
    )


def test_a_range_that_begins_elsewhere_is_refused(shared: Shared) -> None:
    assert shared.first.int8 is not None
    (place, name) = next((k, e.name) for k, e in enumerate(shared.graph.coded_maps) if e.codes == "unsigned")
    ranges = list(shared.first.int8.ranges)
    ranges[place] = replace(ranges[place], shift=0.25)
    odd = replace(shared.first, int8=replace(shared.first.int8, ranges=tuple(ranges)))

    assert refusal(lambda: task_slots(shared.graph, odd)) == (
        f"task 'ssf3': {name} has codes that begin where the int8 backbone says, and no range can move them, got 0.25"
        + FIX
    )


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "codes of another kind": (
        lambda told: told["coded"][0].update(codes="odd"),
        "graph-32-int8.json.coded[0].codes: needs one of signed, unsigned, shifted, got 'odd'"),
    "no codes for what a layer reads": (
        lambda told: told["coded"][0].update(name="other"),
        "graph-32-int8.json: coded: needs what every layer reads, got none of images"),
    "no word of codes": (lambda told: told.pop("coded"), "graph-32-int8.json: needs the key 'coded'"),
    "codes in an older description": (
        lambda told: told.update(version=3, ranges=None),
        "graph-32-int8.json: knows no key 'coded'\n  fix: update edgepet if a newer version wrote this file"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_description_of_other_codes_is_refused(shared: Shared, tmp_path: Path, name: str) -> None:
    change, message = MALFORMED[name]
    shutil.copytree(shared.graph.folder, folder := graph_folder(shared.graph.fingerprint, tmp_path))
    path = folder / f"{shared.graph.stem}.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))

    assert refusal(lambda: open_int8(shared.graph.fingerprint, shared.graph.preprocess, root=tmp_path)) == message


def test_a_host_makes_older_graphs_again_and_their_tasks_are_to_be_calibrated(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "device", tmp_path, dirs_exist_ok=True)
    delta = Store(tmp_path).pack("shapes").delta
    older = open_int8(delta.fingerprint, delta.preprocess, root=tmp_path)
    before = task_slots(older, delta)

    made = int8_graph(open_graph(delta.fingerprint, delta.preprocess, root=tmp_path), root=tmp_path)

    assert (older.coded_maps, len(older.reads), len(before.ranges)) == ((), 4, 4)
    assert (made.codes_sha256, len(made.coded_maps)) == (older.codes_sha256, 5)
    assert refusal(lambda: task_slots(made, delta)) == (
        f"task 'shapes': needs 5 activation ranges for the int8 backbone, got 4{FIX}"
    )
    assert delta.int8
    newer = replace(delta, int8=replace(delta.int8, ranges=(*delta.int8.ranges, delta.int8.ranges[0])))
    assert refusal(lambda: task_slots(older, newer)) == (
        f"task 'shapes': needs 4 activation ranges for the int8 backbone, got 5\n  fix: {OTHER_RANGES}"
    )


# --------------------------------------------------------------------------------------------------------- as constants


def test_inputs_become_constants_of_the_same_file(shared: Shared) -> None:
    part = part_of(shared.graph)
    values: dict[str, NpArray] = {"images.scale": np.array(0.5, np.float32), "any.bias": np.arange(3, dtype=np.int32)}

    made = part.file.with_constants(values)

    model = onnx.load_model_from_string(made.encoded())
    stored = {each.name: each for each in model.graph.initializer}
    for name, value in values.items():
        assert name not in {each.name for each in model.graph.input}
        assert onnx.numpy_helper.to_array(stored[name]).tobytes() == value.tobytes()
    assert made.tensors["images.scale"] == tensor_of("images.scale", values["images.scale"])
    assert made.nodes == part.file.nodes


@pytest.mark.parametrize("shape", [(), (3,), ("batch", 3, None, 5), (1, 2, 3)])
def test_the_shape_of_a_port_is_read_as_it_was_written(shape: tuple[int | str | None, ...]) -> None:
    told = tuple(side if isinstance(side, int) else None for side in shape)

    assert shape_of_port(port("x", shape)) == told


def test_nodes_that_nobody_reads_are_pruned(shared: Shared) -> None:
    part = part_of(shared.graph)
    read = {name for node in part.pruned.file.nodes for name in node.reads} | part.file.outputs.keys()

    assert all(read & {*node.puts_out} for node in part.pruned.file.nodes)
    assert len(part.pruned.file.nodes) < len(read_onnx(shared.graph.model_path("onnxruntime")).nodes)
    onnx.load_model_from_string(part.pruned.file.encoded())
