"""A task that is tuned from some block on brings ranges from there on; before it the int8 backbone's own hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgepet import Device, write_pack
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.deltas.codes import Range
from edgepet.deltas.delta import Delta
from edgepet.device import store as store_module
from edgepet.device.fitting import fit_int8, own_slots
from edgepet.device.graph_states import GraphState
from edgepet.device.runtime import SharedInt8
from edgepet.device.store import Store
from edgepet.device.together import Together
from edgepet.errors import InputError
from edgepet.graphs.base import graph_folder, open_graph
from edgepet.graphs.int8 import CODE, Int8Graph, open_int8, ranges_digest
from edgepet.graphs.map_slots import in_form
from edgepet.graphs.parts import part_of
from edgepet.graphs.slots import Slots, task_ranges, task_slots
from edgepet.measuring.parity import SAME_CODES
from edgepet.methods import SSF, BitFit, LinearProbe, LoRA, Method
from edgepet.methods.depth import in_blocks
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.proving.precision import Expressed, express
from edgepet.spec import NpArray
from tests.flow import RUNTIMES, Network
from tests.on_codes import CALIBRATION, IMAGES, Noise, Others, Task, apart, noise

LATE: dict[str, str] = {"test_vit": "3-5", "test_efficientnet": "2-4", "test_resnet": "2-3"}
METHODS: dict[str, Method] = {"ssf": SSF(), "lora": LoRA(rank=2), "bitfit": BitFit()}
FIX = "\n  fix: bring the int8 backbone of the host that calibrated it, or calibrate it again where this one is from"
CALIBRATE = "\n  fix: run `edgepet calibrate TASK.pet --calib DIR -o OUT.pet`"


@dataclass(frozen=True, eq=False)
class Backbone:
    """A tiny network in a folder of its own, without an int8 backbone, and its int8 backbone with ranges of its own."""

    network: Network
    root: Path
    graph: Int8Graph

    def task(self, method: Method, *, seed: int = 3, kind: type[Noise] = Noise) -> Expressed:
        delta = self.network.task(method, name=f"{method.name}{seed}", seed=seed)
        return express(delta, self.network.graph, self.graph, noise(self.graph.preprocess, kind), recipe=Int8Recipe())

    def late(self, method: str = "ssf", *, seed: int = 3, kind: type[Noise] = Noise) -> Expressed:
        """Of the later blocks."""
        blocks = LATE[self.network.backbone.name]
        return self.task(in_blocks(METHODS[method], blocks), seed=seed, kind=kind)


@pytest.fixture(scope="module")
def backbone_of(
    networks: Callable[[str], Network], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Backbone]:
    @cache
    def backbone(architecture: str) -> Backbone:
        network, root = networks(architecture), tmp_path_factory.mktemp("cache")
        folder = graph_folder(network.graph.fingerprint, root)
        shutil.copytree(network.graph.folder, folder, ignore=shutil.ignore_patterns("*int8*"))
        graph = open_graph(network.graph.fingerprint, network.graph.preprocess, root=root)
        return Backbone(network, root, int8_graph(graph, lambda: noise(graph.preprocess), root=root))

    return backbone


@pytest.fixture(scope="module", params=list(LATE))
def backbone(request: pytest.FixtureRequest, backbone_of: Callable[[str], Backbone]) -> Backbone:
    return backbone_of(request.param)


@pytest.fixture(scope="module")
def vit(backbone_of: Callable[[str], Backbone]) -> Backbone:
    return backbone_of("test_vit")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert refused.value.exit_code == 3
    return str(refused.value)


# --------------------------------------------------------------------------------------------------- where a trunk ends


def test_a_vit_has_a_cut_behind_each_attention_and_each_block(vit: Backbone) -> None:
    first, second, *_, last = vit.graph.cuts

    assert [cut.reads for cut in vit.graph.cuts] == [*range(3, 26, 2), 25]
    behind = {name for name in first.tensors if name.startswith("blocks.")}
    assert behind == {
        f"blocks.0.{name}" for name in ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias",
                                        "attn.proj.weight", "attn.proj.bias")}  # fmt: skip
    assert set(first.tensors) - behind >= {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    assert {name.partition(".")[2].partition(".")[2].split(".")[0] for name in second.tensors} == {"norm2", "mlp"}
    assert (last.at, set(last.tensors)) == ("features", {"norm.weight", "norm.bias"})


def test_every_tensor_of_the_backbone_is_first_read_before_one_cut(backbone: Backbone) -> None:
    listed = [name for cut in backbone.graph.cuts for name in cut.tensors]

    assert sorted(listed) == sorted(set(listed))
    read = {name for layer in backbone.graph.layers for name in (layer.weight, layer.bias, *(layer.norm or ()))}
    assert read - {None} | set(backbone.graph.vectors) <= set(listed)


def test_a_cut_is_what_both_graphs_put_out_under_its_name(backbone: Backbone) -> None:
    for runtime in ("onnxruntime", "openvino"):
        model = onnx.load(str(backbone.graph.model_path(runtime)), load_external_data=False)
        made = {name for node in model.graph.node for name in node.output}

        assert {cut.at for cut in backbone.graph.cuts} <= made
        assert not {cut.at for cut in backbone.graph.cuts} & {
            layer.reads for layer in backbone.graph.layers if layer.norm}  # fmt: skip


def test_the_first_tensor_that_a_task_changes_ends_its_trunk(vit: Backbone) -> None:
    """It is the data that say it: not which blocks its method was kept to."""
    late = vit.late().delta
    found = {
        name: vit.graph.trunk_reads(replace(late, updates=tuple(u for u in late.updates if name in u.target.tensor)))
        for name in ("blocks.3.attn", "blocks.3.mlp", "blocks.5.mlp.fc2", "norm.weight", "none of them")
    }

    assert found == {
        "blocks.3.attn": 13, "blocks.3.mlp": 15, "blocks.5.mlp.fc2": 23, "norm.weight": 25, "none of them": 25,
    }  # fmt: skip
    assert vit.graph.trunk(vit.task(SSF()).delta) is None


# ---------------------------------------------------------------------------------------------------- whose ranges hold


@pytest.mark.parametrize(
    ("architecture", "own"), [("test_vit", 12), ("test_efficientnet", 35), ("test_resnet", 11)]
)  # fmt: skip
def test_a_task_of_later_blocks_brings_ranges_from_there_on(
    architecture: str, own: int, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone = backbone_of(architecture)
    made, graph = backbone.late(kind=Others), backbone.graph

    assert made.delta.int8 is not None
    assert graph.ranges is not None
    assert made.trunk == graph.trunk(made.delta)
    assert (len(made.delta.int8.ranges), made.delta.int8.trunk) == (own, graph.ranges_sha256)
    ranges = task_ranges(graph, made.delta)
    assert tuple(ranges) == graph.reads
    assert tuple(ranges.values()) == (*graph.ranges[:-own], *made.delta.int8.ranges)
    assert set(made.delta.int8.ranges).isdisjoint(graph.ranges)  # they were measured on other images


def test_ranges_come_out_of_a_pack_as_they_went_in(vit: Backbone) -> None:
    whole, late = vit.task(SSF()).delta, vit.late().delta

    read = read_pack(encode_pack(late, codec="fp32")).delta

    assert read.int8 == late.int8
    assert task_ranges(vit.graph, read) == task_ranges(vit.graph, late)
    assert whole.int8 is not None
    assert len(whole.int8.ranges) == 25


def test_a_probe_of_the_backbones_features_brings_no_ranges(vit: Backbone) -> None:
    made = vit.task(LinearProbe())
    read = read_pack(encode_pack(made.delta)).delta

    assert read.int8 is not None
    assert (read.int8.ranges, read.int8.trunk) == ((), vit.graph.ranges_sha256)
    assert made.trunk is not None
    assert (made.trunk.at, made.trunk.reads) == ("features", 25)
    answered = SharedInt8(vit.graph).bind(read)(IMAGES)
    assert apart(answered, Task.of(made).expected()).max() <= (SAME_CODES.relative or 0)


@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_a_task_of_all_blocks_is_stored_as_it_was_before_backbones_had_ranges(vit: Backbone, method: str) -> None:
    delta = vit.network.task(METHODS[method], seed=3)
    plain = replace(vit.graph, ranges=None, cuts=())

    before, now = (
        encode_pack(express(delta, vit.network.graph, graph, noise(graph.preprocess), recipe=Int8Recipe()).delta)
        for graph in (plain, vit.graph)
    )

    assert now == before
    assert b"trunk" not in now


def test_without_ranges_of_its_own_a_backbone_leaves_a_task_all_of_them(vit: Backbone) -> None:
    plain = replace(vit.graph, ranges=None)

    delta = vit.late().delta
    made = express(delta, vit.network.graph, plain, noise(delta.preprocess), recipe=Int8Recipe())

    assert made.delta.int8 is not None
    assert (len(made.delta.int8.ranges), made.delta.int8.trunk, made.trunk) == (25, None, None)
    assert len(task_ranges(vit.graph, made.delta)) == 25  # a backbone with ranges takes it too


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_a_task_with_a_trunk_answers_as_the_graph_of_the_same_numbers(
    backbone: Backbone, method: str, runtime: str
) -> None:
    made = backbone.late(method, kind=Others)
    expected = Task.of(made).expected(runtime=runtime)

    got = SharedInt8(backbone.graph, runtime=runtime).bind(made.delta)(IMAGES)

    differences = apart(got, expected)  # limits as of tasks that bring all ranges
    assert (differences < 1e-5).mean() >= 0.5
    assert differences.max() <= (SAME_CODES.relative or 0)


def test_two_tasks_compute_the_same_codes_in_their_trunk(backbone: Backbone) -> None:
    first, second = backbone.late("ssf"), backbone.late("bitfit", seed=4, kind=Others)
    assert first.trunk is not None
    assert first.trunk == second.trunk
    names = [*(f"{name}.codes" for name in backbone.graph.reads[: first.trunk.reads]), first.trunk.at]

    seen = [inside(backbone.graph, task_slots(backbone.graph, made.delta), names) for made in (first, second)]

    assert [value.tobytes() for value in seen[0]] == [value.tobytes() for value in seen[1]]
    behind = [f"{backbone.graph.reads[-1]}.codes"]
    ends = [inside(backbone.graph, task_slots(backbone.graph, made.delta), behind) for made in (first, second)]
    assert not np.array_equal(ends[0][0], ends[1][0])


def inside(graph: Int8Graph, slots: Slots, names: list[str]) -> list[NpArray]:
    """What tensors of ONNX Runtime's graph hold, where each node is computed as it stands."""
    model = onnx.load(str(graph.model_path("onnxruntime")), load_external_data=False)
    del model.graph.output[:]
    for name in names:
        model.graph.output.add(name=name)
    path = graph.folder / "inside.onnx"
    path.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.unlink()
    values = in_form(graph, slots, "onnxruntime")
    feeds = {each.name: values[each.name].reshape(each.shape) for each in session.get_inputs() if each.name in values}
    answers: list[NpArray] = session.run(names, {"images": IMAGES[:4], **feeds})
    return answers


# --------------------------------------------------------------------------------------------------- measured, and kept


def test_ranges_are_measured_once(vit: Backbone, tmp_path: Path) -> None:
    shutil.copytree(vit.graph.folder, graph_folder(vit.graph.fingerprint, tmp_path))
    graph = open_graph(vit.graph.fingerprint, vit.graph.preprocess, root=tmp_path)

    again = int8_graph(graph, lambda: pytest.fail("nobody needs images"), root=tmp_path)

    assert again.ranges == vit.graph.ranges


def test_the_same_images_give_the_same_ranges_whenever_they_come(vit: Backbone, tmp_path: Path) -> None:
    shutil.copytree(vit.graph.folder, folder := graph_folder(vit.graph.fingerprint, tmp_path), ignore=lambda _, names: [
        name for name in names if "int8" in name])  # fmt: skip
    graph = open_graph(vit.graph.fingerprint, vit.graph.preprocess, root=tmp_path)
    path = folder / f"{vit.graph.stem}.json"

    plain = int8_graph(graph, root=tmp_path)
    made = int8_graph(graph, lambda: noise(graph.preprocess), root=tmp_path)

    assert (plain.ranges, plain.ranges_sha256, plain.cuts) == (None, None, vit.graph.cuts)
    assert (made.ranges, made.ranges_sha256) == (vit.graph.ranges, vit.graph.ranges_sha256)
    assert path.read_bytes() == (vit.graph.folder / path.name).read_bytes()
    assert json.loads(path.read_text())["measured"]["n"] == 32
    assert made.codes_sha256 == plain.codes_sha256


def test_ranges_reach_as_far_as_what_was_seen(vit: Backbone) -> None:
    """Those of other tasks go through them: what no code reaches there is lost for all that comes behind it."""
    assert vit.graph.ranges is not None
    images = dict(zip(vit.graph.reads, vit.graph.ranges, strict=True))["images"]

    assert images.scale == pytest.approx(float(np.abs(CALIBRATION).max()) / 127)


def test_what_version_2_described_is_read_without_ranges_and_cuts(vit: Backbone, tmp_path: Path) -> None:
    def change(told: dict[str, object]) -> None:
        told["version"] = 2
        for key in ("cuts", "ranges", "measured"):
            del told[key]

    old = described(vit, tmp_path, change)

    assert (old.ranges, old.cuts, old.codes_sha256) == (None, (), vit.graph.codes_sha256)
    assert len(task_ranges(old, vit.task(SSF()).delta)) == 25
    assert refusal(lambda: task_ranges(old, vit.late().delta)) == (
        f"task 'ssf3': needs the int8 backbone's own ranges {digits(vit)} for its trunk, got none{FIX}"
    )


def described(vit: Backbone, root: Path, change: Callable[[dict[str, object]], object]) -> Int8Graph:
    """The int8 backbone copied, and its description changed."""
    shutil.copytree(vit.graph.folder, folder := graph_folder(vit.graph.fingerprint, root))
    path = folder / f"{vit.graph.stem}.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))
    return open_int8(vit.graph.fingerprint, vit.graph.preprocess, root=root)


def digits(backbone: Backbone) -> str:
    return (backbone.graph.ranges_sha256 or "")[:12]


MALFORMED: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "a range too few": (
        lambda told: told.update(ranges=[1.0, 0.0]), "graph-32-int8.json.ranges: needs 50 numbers, got [1.0, 0.0]"),
    "a scale of nothing": (
        lambda told: told.update(ranges=[0.0] * 50), "graph-32-int8.json.ranges: needs scales above 0, got 0.0"),
    "no word of cuts": (lambda told: told.pop("cuts"), "graph-32-int8.json: needs the key 'cuts'"),
    "cuts in another order": (
        lambda told: told.update(cuts=[{"at": "a", "reads": 5, "tensors": []}, {"at": "b", "reads": 3, "tensors": []}]),
        "graph-32-int8.json: cuts: needs cuts in order, behind 1 to 25 of what layers read, got [5, 3]"),
    "a cut behind the end": (
        lambda told: told.update(cuts=[{"at": "a", "reads": 26, "tensors": []}]),
        "graph-32-int8.json: cuts: needs cuts in order, behind 1 to 25 of what layers read, got [26]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_description_of_other_trunks_is_refused(vit: Backbone, tmp_path: Path, name: str) -> None:
    change, message = MALFORMED[name]

    assert refusal(lambda: described(vit, tmp_path, change)) == message


# ------------------------------------------------------------------------------------------------------ what is refused


def other_ranges(graph: Int8Graph) -> Int8Graph:
    """The same backbone as another host has it: measured on other images."""
    return replace(graph, ranges=tuple(Range(scale=2 * each.scale) for each in graph.ranges or ()))


def test_a_trunk_of_other_ranges_is_refused(vit: Backbone) -> None:
    delta, other = vit.late().delta, other_ranges(vit.graph)

    assert refusal(lambda: task_slots(other, delta)) == (
        f"task 'ssf3': needs the int8 backbone's own ranges {digits(vit)} for its trunk, "
        f"got {ranges_digest(other.ranges or ())[:12]}{FIX}"
    )


def test_another_number_of_ranges_behind_a_trunk_is_refused(vit: Backbone) -> None:
    delta = vit.late().delta
    assert delta.int8 is not None
    more = replace(delta, int8=replace(delta.int8, ranges=(*delta.int8.ranges, Range(scale=1.0))))

    assert refusal(lambda: task_slots(vit.graph, more)) == (
        f"task 'ssf3': needs 12 activation ranges for the int8 backbone, behind a trunk of 13, got 13{CALIBRATE}"
    )


@pytest.fixture
def device(vit: Backbone, tmp_path: Path) -> Store:
    """A folder with the int8 backbone and no task."""
    store = Store(tmp_path / "device")
    store.add_int8(vit.graph)
    return store


def pack_of(delta: Delta, folder: Path) -> Path:
    write_pack(path := folder / f"{delta.task}.pet", delta, codec="fp32")
    return path


def test_a_store_installs_and_runs_a_pack_with_a_trunk(device: Store, vit: Backbone, tmp_path: Path) -> None:
    made = vit.late()

    Device(device.root).install(pack_of(made.delta, tmp_path))

    with Device(device.root).open_int8() as networks:
        assert networks["ssf3"](IMAGES).tobytes() == SharedInt8(vit.graph).bind(made.delta)(IMAGES).tobytes()
    graph = device.int8_of(device.pack("ssf3"))
    assert graph.trunk(made.delta) == made.trunk


def test_a_store_refuses_a_pack_of_another_trunk(device: Store, vit: Backbone, tmp_path: Path) -> None:
    delta = vit.late().delta
    assert delta.int8 is not None
    other = replace(delta, int8=replace(delta.int8, trunk="ab" * 32))

    assert refusal(lambda: Device(device.root).install(pack_of(other, tmp_path))) == (
        f"task 'ssf3': needs the int8 backbone's own ranges abababababab for its trunk, got {digits(vit)} in this store"
        + FIX
    )
    assert device.tasks() == ()


def test_a_store_takes_ranges_that_it_lacks_and_keeps_those_that_it_has(vit: Backbone, tmp_path: Path) -> None:
    plain = described(vit, tmp_path / "cache", without_ranges)
    store, name = Store(tmp_path / "device"), f"{vit.graph.folder.name}/{vit.graph.stem}.json"
    store.add_int8(plain)
    delta = vit.late().delta
    assert store.now().graphs[name].ranges is None
    assert refusal(lambda: store.install(pack_of(delta, tmp_path))) == (
        f"task 'ssf3': needs the int8 backbone's own ranges {digits(vit)} for its trunk, got none in this store{FIX}"
    )

    store.add_int8(vit.graph)

    kept = store.now().graphs[name]
    assert kept == GraphState(sha256=kept.sha256, codes=plain.codes_sha256, ranges=vit.graph.ranges_sha256)
    store.install(pack_of(delta, tmp_path))
    graph = open_graph(plain.fingerprint, plain.preprocess, root=tmp_path / "cache")
    others = int8_graph(graph, lambda: noise(graph.preprocess, Others), root=tmp_path / "cache")
    store.add_int8(others)
    assert others.ranges_sha256 != kept.ranges
    assert store.now().graphs[name] == kept
    assert task_ranges(store.int8_of(store.pack("ssf3")), delta) == task_ranges(vit.graph, delta)


def test_whatever_stops_ranges_from_coming_the_backbone_is_whole(
    vit: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description is replaced: before and after that one step a generation names what is there."""
    store, plain = Store(tmp_path / "device"), described(vit, tmp_path / "cache", without_ranges)
    store.add_int8(plain)
    store.install(pack_of(vit.task(SSF()).delta, tmp_path))
    bring, whole = store_module.bring_file, vit.graph.stem + ".json"

    for stops in ("before", "after"):

        def stopped(source: Path, target: Path, sha256: str, again: str, stops: str = stops) -> None:
            if stops == "after":
                bring(source, target, sha256, again)
            raise KeyboardInterrupt(target.name)

        with monkeypatch.context() as patch:
            patch.setattr(store_module, "bring_file", stopped)
            with pytest.raises(KeyboardInterrupt, match=whole):
                store.add_int8(vit.graph)

        found = store.int8_of(store.pack("ssf3"))
        assert found.ranges == (None if stops == "before" else vit.graph.ranges)
        assert Device(store.root).check() == ()
    store.add_int8(vit.graph)
    store.install(pack_of(vit.late(seed=4).delta, tmp_path))


def without_ranges(told: dict[str, object]) -> None:
    told.update(ranges=None, measured=None)


def test_codes_of_a_trunk_are_the_backbones(vit: Backbone) -> None:
    slots = task_slots(vit.graph, vit.late("lora").delta)

    assert set(slots.codes) == {f"blocks.{i}.attn.qkv.weight{CODE}" for i in (3, 4, 5)}


# ----------------------------------------------------------------------------------------------------- run once for all


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tasks_on_one_trunk_of_codes_answer_as_each_by_itself(backbone: Backbone, runtime: str) -> None:
    deltas = {
        "late": backbone.late().delta,
        "late-too": backbone.late(seed=4).delta,
        "codes": backbone.late("lora", seed=5).delta,
        "probe": backbone.task(LinearProbe(), seed=6).delta,
        "whole": backbone.task(SSF(), seed=7).delta,
    }
    graph = backbone.graph
    fitted = {name: fit_int8(graph, delta, runtime) for name, delta in deltas.items()}

    with Together(part_of(graph, runtime), own_slots(graph, runtime), fitted, runtime=runtime, threads=1) as together:
        got, shared = together(IMAGES), together.shared

    late = [each for each in shared if "whole" not in each.tasks]  # OpenVINO's first product is of codes alone
    assert {"late", "late-too", "probe"} <= set(late[0].tasks)
    for name, delta in deltas.items():
        alone = SharedInt8(graph, runtime=runtime, threads=1).bind(delta)(IMAGES)
        close = apart(got[name], alone) <= 1e-5
        assert close.mean() >= 0.75  # where a number lies between two codes, the last bit decides which of them it has
        assert (got[name].argmax(1) == alone.argmax(1)).mean() >= 0.9
