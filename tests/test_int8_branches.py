"""Branches on the int8 backbone: over the codes of all tasks, in float, and each task of a structure with its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from edgepet import Device, write_pack
from edgepet.calibration import search
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.deltas.branches import named_tensors
from edgepet.device.fitting import fit_int8, own_slots
from edgepet.device.mixed import mix
from edgepet.device.runtime import SharedInt8, open_task
from edgepet.device.store import Store
from edgepet.device.together import Together
from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.files import sha256_file
from edgepet.graphs.base import BaseGraph, graph_folder
from edgepet.graphs.int8 import CODES, SLOT_FORMS, Int8Graph, int8_at, open_int8
from edgepet.graphs.map_slots import in_form
from edgepet.graphs.parts import part_of
from edgepet.graphs.slots import task_ranges, task_slots
from edgepet.measuring.parity import SAME_CODES
from edgepet.methods import (
    MAM,
    SSF,
    Adapter,
    AdaptFormer,
    ConvAdapter,
    Convpass,
    Houlsby,
    Method,
    ParallelAdapter,
    Prefix,
    ProTuning,
    STAdapter,
    VPTDeep,
    VPTShallow,
)
from edgepet.methods.depth import in_blocks
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.proving.precision import Expressed, express
from edgepet.verbs.storage import account
from tests.flow import (
    RUNTIMES,
    Network,
    draw_shapes,
    edgepet,
    has_openvino,
    needs_openvino,
    task_on,
    train_arguments,
)
from tests.on_codes import IMAGES, Noise, Others, Task, apart, noise
from tests.tiny import tiny_vit

# Every kind of branch, where a layer norm's output has two readers, and where a convolution is apart from its norm.
EXAMPLES: dict[str, tuple[Method, str]] = {
    "convpass in later blocks": (in_blocks(Convpass(rank=4), "3-5"), "test_vit"),
    "conv-adapter, ConvNeXt": (ConvAdapter(reduction=4), "test_convnext"),
    "convpass": (Convpass(rank=4), "test_vit"),
    "adapter": (Adapter(rank=4), "test_vit"),
    "houlsby": (Houlsby(rank=4), "test_vit"),
    "adaptformer": (AdaptFormer(rank=4), "test_vit"),
    "parallel-adapter": (ParallelAdapter(rank=4), "test_vit"),
    "prefix": (Prefix(length=3), "test_vit"),
    "mam": (MAM(length=3, rank=4), "test_vit"),
    "vpt-shallow": (VPTShallow(length=5), "test_vit"),
    "pro-tuning": (ProTuning(reduction=2), "test_vit"),
    "pro-tuning, ConvNeXt": (ProTuning(reduction=2), "test_convnext"),
    "conv-adapter, ResNet": (ConvAdapter(reduction=4), "test_resnet"),
    "conv-adapter, sequential": (ConvAdapter(reduction=2, scheme="conv-sequential"), "test_efficientnet"),
}
FAST = ("convpass in later blocks", "conv-adapter, ConvNeXt")  # the others take seconds to trace
CASES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in EXAMPLES]
FIX = "\n  fix: edgepet device init --store STORE --for TASK.pet on a host, or --from a folder that has it whole"


@dataclass(frozen=True, eq=False)
class Branched:
    """A tiny network with branches of one structure, and its int8 backbone with them, in a folder of its own."""

    network: Network
    root: Path
    method: Method
    float: BaseGraph
    graph: Int8Graph
    tasks: dict[tuple[int, type[Noise]], Expressed] = field(default_factory=dict)

    @property
    def plain(self) -> Int8Graph:
        """The int8 backbone without branches."""
        return open_int8(self.graph.fingerprint, self.graph.preprocess, root=self.root)

    def task(self, seed: int = 3, kind: type[Noise] = Noise) -> Expressed:
        key = seed, kind
        if key not in self.tasks:
            delta = self.network.task(self.method, name=f"task{seed}", seed=seed, by=0.1)
            images = noise(delta.preprocess, kind)
            self.tasks[key] = express(delta, self.float, self.graph, images, recipe=Int8Recipe())
        return self.tasks[key]


@pytest.fixture(scope="module")
def branched(networks: Callable[[str], Network], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Branched]:
    @cache
    def folder(architecture: str) -> Path:
        network, root = networks(architecture), tmp_path_factory.mktemp("cache")
        place = graph_folder(network.graph.fingerprint, root)
        shutil.copytree(network.graph.folder, place, ignore=shutil.ignore_patterns("*int8*"))
        return root

    @cache
    def made(name: str) -> Branched:
        method, architecture = EXAMPLES[name]
        network, root = networks(architecture), folder(architecture)
        delta = network.task(method)
        graph = base_graph(network.backbone, delta.branches, root=root)
        return Branched(network, root, method, graph, int8_graph(graph, lambda: noise(graph.preprocess), root=root))

    return made


@pytest.fixture(scope="module", params=CASES)
def example(request: pytest.FixtureRequest, branched: Callable[[str], Branched]) -> Branched:
    return branched(request.param)


@pytest.fixture(scope="module")
def late(branched: Callable[[str], Branched]) -> Branched:
    return branched("convpass in later blocks")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert refused.value.exit_code == 3
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------------- the graph


def test_a_graph_with_branches_is_over_the_same_file_of_codes(example: Branched) -> None:
    plain, graph = example.plain, example.graph

    assert graph.stem == f"{plain.stem.removesuffix('-int8')}-{example.task().delta.structure}-int8"
    assert (graph.codes_path, graph.codes_sha256) == (plain.codes_path, plain.codes_sha256)
    assert {name for name in graph.files if name.endswith(".safetensors")} == {
        name for name in plain.files if name.endswith(".safetensors")
    }
    assert [layer.weight for layer in graph.layers] == [layer.weight for layer in plain.layers]
    for seed in (3, 4):
        task_slots(graph, example.task(seed).delta)
    assert sha256_file(graph.codes_path) == plain.codes_sha256


def test_a_branch_is_float_and_its_tensors_are_slots(example: Branched) -> None:
    named = named_tensors(example.task().delta.branches)

    for runtime in SLOT_FORMS:
        model = onnx.load(str(example.graph.model_path(runtime)), load_external_data=False)
        asked = {
            each.name: tuple(side.dim_value for side in each.type.tensor_type.shape.dim) for each in model.graph.input
        }
        assert {name: asked[name] for name in named} == {name: tensor.shape for name, tensor in named.items()}
        coded = {node.input[0] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        assert coded.isdisjoint(named)
    slots = task_slots(example.graph, example.task().delta)
    for values in (in_form(example.graph, slots, runtime) for runtime in SLOT_FORMS):
        assert all(np.array_equal(values[name], tensor.astype(np.float32)) for name, tensor in named.items())


def test_a_divisor_is_in_front_of_the_layer_where_a_branch_reads_what_the_norm_puts_out(late: Branched) -> None:
    divided = {layer.weight for layer in late.graph.layers if layer.divided}

    assert divided == {f"blocks.{i}.{name}.weight" for i in (3, 4, 5) for name in ("attn.qkv", "mlp.fc1")}
    norms = {layer.weight for layer in late.graph.layers if layer.norm is not None}
    assert norms | divided == {layer.weight for layer in late.plain.layers if layer.norm is not None}
    assert not any(layer.divided for layer in late.plain.layers)
    shapes = {
        runtime: {
            each.name: len(each.type.tensor_type.shape.dim)
            for each in onnx.load(str(late.graph.model_path(runtime)), load_external_data=False).graph.input
        }
        for runtime in SLOT_FORMS
    }
    reads = [layer.reads for layer in late.graph.layers if layer.divided]
    assert {shapes["onnxruntime"][f"{name}.scale"] for name in reads} == {0}
    assert {shapes["openvino"][f"{name}.scale"] for name in reads} == {1}  # a number for each channel


def test_what_is_said_of_a_backbone_without_branches_is_what_it_was(late: Branched) -> None:
    told = json.loads((late.plain.folder / f"{late.plain.stem}.json").read_text())
    with_branches = json.loads((late.graph.folder / f"{late.graph.stem}.json").read_text())

    assert with_branches.keys() - told.keys() == {"branches"}
    assert not any("divided" in layer for layer in told["layers"])
    assert with_branches["branches"] == json.loads((late.float.folder / f"{late.float.stem}.json").read_text())[
        "branches"]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_task_answers_as_the_graph_of_the_same_numbers(example: Branched, runtime: str) -> None:
    made = example.task()
    expected = Task.of(made).expected(runtime=runtime)

    got = SharedInt8(example.graph, runtime=runtime).bind(made.delta)(IMAGES)

    differences = apart(got, expected)  # limits as of tasks without branches
    assert (differences < 1e-5).mean() >= 0.5
    assert differences.max() <= (SAME_CODES.relative or 0)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_task_answers_near_its_float_network_and_not_as_without_its_branches(example: Branched, runtime: str) -> None:
    delta = example.task().delta
    exact = open_task(example.float, delta)(IMAGES)
    none = tuple(
        branch.with_tensors({n: 0 * np.array(t) for n, t in branch.named.items()}) for branch in delta.branches
    )
    backbone = SharedInt8(example.graph, runtime=runtime)

    got, without = (backbone.bind(each)(IMAGES) for each in (delta, replace(delta, branches=none)))

    assert 1e-4 < apart(got, exact).max() < 0.15  # of codes
    assert apart(without, exact).max() > 1.5 * apart(got, exact).max()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_task_answers_bit_for_bit_as_before_another_one_ran(example: Branched, runtime: str) -> None:
    backbone, deltas = SharedInt8(example.graph, runtime=runtime), [example.task(seed).delta for seed in (3, 4)]
    first, second = map(backbone.bind, deltas)
    alone = SharedInt8(example.graph, runtime=runtime).bind(deltas[0])(IMAGES)

    answers = [first(IMAGES), second(IMAGES), first(IMAGES), second(IMAGES)]

    assert apart(answers[1], answers[0]).max() > 1e-2  # or a switch that does nothing would pass
    assert answers[0].tobytes() == answers[2].tobytes() == alone.tobytes()
    assert answers[1].tobytes() == answers[3].tobytes()


@pytest.mark.parametrize(
    ("runtime", "linear"), [("onnxruntime", 24), pytest.param("openvino", 25, marks=needs_openvino)]
)
def test_layers_multiply_codes_and_branches_do_not(late: Branched, runtime: str, linear: int) -> None:
    network = SharedInt8(late.graph, runtime=runtime).bind(late.task().delta)

    layers = network.evidence["layers"]
    assert isinstance(layers, dict)
    assert (network.executed, layers["int8"]) == ("int8", linear)  # as many as without branches
    assert layers["float"] >= 4 * 6  # down, two for the kernel, up
    network.close()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_branches_of_a_batch_are_products_of_each_image_with_its_own(
    branched: Callable[[str], Branched], runtime: str
) -> None:
    made = branched("parallel-adapter")
    deltas = {f"task{seed}": made.task(seed).delta for seed in (3, 4)}
    network = mix(made.graph, deltas, runtime=runtime, threads=1).network
    assert network is not None

    with network:
        got = network(IMAGES[:4], ["task3", "task4", "task4", "task3"])
        single = network(IMAGES[1:2], ["task4"])[0]

    assert got[1].tobytes() == single.tobytes()
    for k, task in enumerate(["task3", "task4", "task4", "task3"]):
        alone = SharedInt8(made.graph, runtime=runtime, threads=1).bind(deltas[task])(IMAGES[k : k + 1])
        assert apart(got[k][None], alone).max() <= (SAME_CODES.relative or 0)


# ------------------------------------------------------------------------------------------------------------ a trunk


def test_cuts_lie_before_the_first_branch_and_ranges_are_those_of_the_backbone_without(late: Branched) -> None:
    graph, plain = late.graph, late.plain

    assert [cut.reads for cut in graph.cuts] == [3, 5, 7, 9, 11, 13]  # the last in front of block 3
    assert [(cut.reads, cut.tensors) for cut in graph.cuts] == [
        (cut.reads, cut.tensors) for cut in plain.cuts[: len(graph.cuts)]
    ]
    assert (graph.ranges, graph.ranges_sha256) == (plain.ranges, plain.ranges_sha256)
    assert list(graph.own_ranges.values()) == list(plain.own_ranges.values())[:13]
    assert list(graph.own_ranges) == list(graph.reads[:13])


@pytest.mark.slow
def test_a_structure_whose_first_branch_is_in_front_of_everything_has_no_cut(
    branched: Callable[[str], Branched],
) -> None:
    made = branched("convpass")

    assert (made.graph.cuts, made.graph.ranges, made.task().trunk) == ((), None, None)
    ranges = made.task().delta.int8
    assert ranges is not None
    assert (len(ranges.ranges), ranges.trunk) == (25, None)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tasks_share_the_trunk_in_front_of_their_branches(late: Branched, runtime: str) -> None:
    made = {f"task{seed}": late.task(seed, Others) for seed in (3, 4)}
    graph = late.graph
    assert graph.ranges is not None
    for each in made.values():
        assert each.delta.int8 is not None
        assert (len(each.delta.int8.ranges), each.delta.int8.trunk) == (12, graph.ranges_sha256)
        assert tuple(task_ranges(graph, each.delta).values()) == (*graph.ranges[:13], *each.delta.int8.ranges)
    fitted = {name: fit_int8(graph, each.delta, runtime) for name, each in made.items()}

    with Together(part_of(graph, runtime), own_slots(graph, runtime), fitted, runtime=runtime, threads=1) as together:
        got, shared = together(IMAGES), together.shared

    assert [each.tasks for each in shared] == [("task3", "task4")]
    for name, each in made.items():
        alone = SharedInt8(graph, runtime=runtime, threads=1).bind(each.delta)(IMAGES)
        assert (apart(got[name], alone) <= 1e-5).mean() >= 0.75  # else a number lay between two codes
        assert (got[name].argmax(1) == alone.argmax(1)).mean() >= 0.9
        expected = Task.of(each).expected(runtime=runtime)
        assert apart(alone, expected).max() <= (SAME_CODES.relative or 0)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_task_of_another_structure_is_refused(late: Branched) -> None:
    delta, other = late.task().delta, replace(late.graph, structure="ab" * 6)

    assert refusal(lambda: task_slots(other, delta)) == (
        f"task 'task3': needs a graph with branches {delta.structure}, got branches abababababab"
    )
    assert refusal(lambda: SharedInt8(late.plain).bind(delta)) == (
        f"task 'task3': needs a graph with branches {delta.structure}, got no branches"
    )
    assert refusal(lambda: task_slots(late.graph, replace(delta, branches=()))) == (
        f"task 'task3': needs a graph with no branches, got branches {delta.structure}"
    )


def test_a_branch_that_is_no_number_is_refused(late: Branched) -> None:
    delta = late.task().delta
    first, *others = delta.branches
    broken = first.with_tensors({**first.named, (name := f"{first.into}/patch-conv.up.bias"): np.full(64, np.nan)})

    assert refusal(lambda: task_slots(late.graph, replace(delta, branches=(broken, *others)))) == (
        f"task 'task3': {name}: must be finite, got NaN or infinity"
    )


def test_a_graph_with_branches_that_was_never_made_is_refused(late: Branched) -> None:
    graph = late.graph

    assert refusal(lambda: open_int8(graph.fingerprint, graph.preprocess, "ab" * 6, root=late.root)) == (
        f"{graph.folder}: holds no int8 backbone at 32 pixels with branches abababababab\n"
        "  fix: run `edgepet calibrate TASK.pet --calib DIR -o OUT.pet` where torch is installed"
    )


@pytest.mark.slow
def test_prompts_that_go_through_a_blocks_own_projection_are_refused(late: Branched) -> None:
    delta = late.network.task(VPTDeep(length=3))
    graph = base_graph(late.network.backbone, delta.branches, root=late.root)

    assert refusal(lambda: int8_graph(graph, root=late.root)) == (
        f"{graph.backbone}: has branches that are computed with blocks.0.attn.qkv.weight as well, of which the int8 "
        "backbone has codes alone\n"
        "  fix: run such a task in fp32, or export it: a model of its own has them computed already"
    )


MALFORMED: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "another structure": (
        lambda told: told.update(branches=[["tokens", "a:in", "b:out", {"prefix": 1}, {"prompt": [1, 64]}]]),
        "{path}: describes another graph than its name says\n  fix: delete {path} and run again"),
    "a divisor that is not there": (
        lambda told: [layer.update(divided=True) for layer in told["layers"] if layer["name"] == "patch_embed.proj"],  # type: ignore[attr-defined]
        "{name}: patch_embed.proj: speaks of a tensor that is not there, got patch_embed.proj.weight.divisor"),
    "an odd number of ranges": (
        lambda told: told["ranges"].pop(), "{name}.ranges: needs 48 numbers, got {ranges}"),  # type: ignore[attr-defined]
    "ranges that end in the trunk": (
        lambda told: told.update(ranges=[1.0, 0.0] * 12),
        "{name}: ranges: needs those before its last cut, 13, got 12"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_description_of_other_branches_is_refused(late: Branched, tmp_path: Path, case: str) -> None:
    change, message = MALFORMED[case]
    shutil.copytree(late.graph.folder, folder := graph_folder(late.graph.fingerprint, tmp_path))
    path = folder / f"{late.graph.stem}.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))

    found = f"{told['ranges']!r}"
    expected = message.format(path=path, name=path.name, ranges=f"{found[:77]}...")
    assert refusal(lambda: int8_at(path)) == expected


# ---------------------------------------------------------------------------------------------------------- on a device


@pytest.fixture
def packs(late: Branched, tmp_path: Path) -> dict[str, Path]:
    """Two tasks with branches and one without, all with ranges for the same codes, and a picture beside them."""
    plain = late.network.task(SSF(), name="plain", seed=5)
    images = noise(plain.preprocess)
    deltas = [late.task(3).delta, late.task(4).delta]
    deltas.append(express(plain, late.network.graph, late.plain, images, recipe=Int8Recipe()).delta)
    for delta in deltas:
        write_pack(tmp_path / f"{delta.task}.pet", delta, codec="fp32")
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return {delta.task: tmp_path / f"{delta.task}.pet" for delta in deltas}


@pytest.fixture
def device(late: Branched, packs: dict[str, Path], tmp_path: Path) -> Device:
    """A folder with both graphs of the int8 backbone and all packs."""
    store = Store(tmp_path / "device")
    for graph in (late.graph, late.plain):
        store.add_int8(graph)
    for pack in packs.values():
        store.install(pack)
    return Device(store.root)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_device_runs_tasks_with_and_without_branches(
    device: Device, late: Branched, tmp_path: Path, runtime: str
) -> None:
    with device.open_int8(runtime=runtime) as networks:
        answers = {seed: networks[f"task{seed}"](IMAGES) for seed in (3, 4)}
    shared = SharedInt8(late.graph, runtime=runtime)
    for seed, got in answers.items():
        assert got.tobytes() == shared.bind(late.task(seed).delta)(IMAGES).tobytes()

    run = device.run(["task3", "plain", "task4"], [tmp_path / "image.png"], precision="int8", runtime=runtime)
    alone = device.run("task4", [tmp_path / "image.png"], precision="int8", runtime=runtime)

    assert [answer.task for answer in run.results] == ["task3", "plain", "task4"]
    (own,), shared_answer = alone.results, run.results[2]
    assert (own.label, own.score) == (shared_answer.label, pytest.approx(shared_answer.score, abs=0.02))  # by a code


def test_a_store_keeps_the_codes_once_for_tasks_with_and_without_branches(device: Device, late: Branched) -> None:
    store, plain = Store(Path(device.store)), late.plain

    counted = account(store, precision="int8")

    assert [path.name for path in store.root.glob("backbones/*/*.safetensors")].count(CODES) == 1
    assert not list(store.root.glob("backbones/*/backbone.safetensors"))
    assert device.check() == ()
    assert counted.backbone_bytes == plain.weights_bytes
    tables = plain.files["graph-32.safetensors"][1]  # of positions, which both graphs read
    assert counted.graph_bytes == late.graph.graph_bytes + plain.graph_bytes - tables
    assert counted.other_bytes == sum(path.stat().st_size for path in store.root.glob("generations/*"))
    branches = sum(4 * tensor.size for tensor in named_tensors(late.task().delta.branches).values())
    own_bytes = {each.task: each.own_memory_bytes or 0 for each in counted.tasks}
    assert own_bytes["task3"] == own_bytes["task4"] > branches
    assert own_bytes["task3"] - own_bytes["plain"] == branches
    copies = {each.task: each.full_copy_bytes for each in counted.tasks}
    assert copies["task3"] == copies["task4"] > copies["plain"] + branches
    assert counted.per_runtime[0].tasks_run == 3


def test_a_store_without_the_graph_of_the_structure_says_which_it_lacks(
    late: Branched, packs: dict[str, Path], tmp_path: Path
) -> None:
    store = Store(tmp_path / "device")
    store.add_int8(late.plain)
    digits, stem = late.graph.folder.name, late.float.stem

    assert refusal(lambda: Device(store.root).install(packs["task3"])) == (
        f"task 'task3': needs test_vit as {digits}/{stem}.json or {digits}/{stem}-int8.json, which is not in this "
        "store\n  fix: edgepet device init --store STORE --for TASK.pet on a host, then bring that folder"
    )
    store.add_graph(late.float)
    Device(store.root).install(packs["task3"])
    image = [tmp_path / "image.png"]
    assert refusal(lambda: Device(store.root).run("task3", image, precision="int8")) == (
        f"{store.root}: holds no {digits}/{stem}-int8.json of test_vit{FIX}"
    )


class Clips(Noise):
    """Noise of two frames."""

    images = held_out_images = np.random.default_rng(4).standard_normal((16, 2, 3, 32, 32), dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_branch_over_the_frames_of_a_clip_is_one_too(tmp_path: Path, runtime: str) -> None:
    backbone = load_backbone(tiny_vit(tmp_path, seed=7).spec, image_size=32, frames=2)
    deltas = [task_on(backbone, STAdapter(rank=4), name="clips", seed=seed, by=0.1) for seed in (3, 4)]
    base_graph(backbone, root=tmp_path)
    graph = base_graph(backbone, deltas[0].branches, root=tmp_path)
    int8 = int8_graph(graph, root=tmp_path)
    images = noise(graph.preprocess, Clips)
    made = [express(delta, graph, int8, images, recipe=Int8Recipe()) for delta in deltas]
    shared = SharedInt8(int8, runtime=runtime)

    first, second, again = (shared.bind(made[k].delta)(Clips.images) for k in (0, 1, 0))

    assert first.tobytes() == again.tobytes()
    assert apart(first, second).max() > 1e-2
    expected = Task(made[0].delta, made[0].model).expected(Clips.images)
    assert apart(first, expected).max() <= (SAME_CODES.relative or 0)


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_the_commands_of_the_guide_take_a_task_with_branches(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "ESTIMATORS", ("min-max",))
    draw_shapes(tmp_path / "data", {"train": 16, "val": 4, "test": 4})
    data, pack, shared, store = (tmp_path / name for name in ("data", "a.pet", "b.pet", "device"))
    picture = next((data / "test").glob("*/*.png"))

    said = edgepet(*train_arguments(backbone.spec, data, "convpass", pack), "--set", "rank=4", "--json")
    assert said.code == 0, said.err
    told = edgepet("calibrate", pack, "--calib", data, "-o", shared, "--json")
    assert told.code == 0, told.err
    assert all(run["parity"]["max_abs"] <= run["parity"]["limit"] for run in told.json["runs"])
    assert edgepet("inspect", shared, "--json").json["int8_codes"] == told.json["codes_sha256"]
    ask = ("--precision", "int8", "--json")
    evaluated = edgepet("eval", shared, data, *ask).json
    assert (evaluated["precision"], evaluated["n"]) == ("int8", 12)
    predicted = edgepet("predict", shared, picture, *ask).json["results"][0]["tasks"]["a"]
    counted = edgepet("storage", shared, *ask).json
    assert counted["backbone_bytes"] == told.json["codes_bytes"]
    assert counted["tasks"][0]["own_memory_bytes"] == told.json["own_memory_bytes"]

    assert edgepet("device", "init", "--store", store, "--for", shared, "--precision", "int8").code == 0
    assert edgepet("device", "install", "--store", store, shared).code == 0  # its probe in int8 is asked
    for runtime in ("onnxruntime", *(["openvino"] if has_openvino else [])):
        run = edgepet("device", "run", "--store", store, "a", picture, "--runtime", runtime, *ask)
        assert run.code == 0, run.err
        assert run.json["results"][0]["label"] == predicted["label"]
    tensors = sorted(path.name for path in store.glob("backbones/*/*.safetensors"))
    assert tensors == [CODES, "graph-32.safetensors"]
