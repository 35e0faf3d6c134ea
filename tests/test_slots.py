"""Graphs that a device derives by itself: told apart, cut, with slots, and several tasks on one picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepet.deltas.delta import Delta
from edgepet.device.fitting import fit, opened
from edgepet.device.runtimes import RUNTIMES as ROWS
from edgepet.device.runtimes import shared_runtime
from edgepet.device.together import Together
from edgepet.errors import InputError
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.cuts import Cut, cuts, last_before
from edgepet.graphs.dense_slots import UnslottedError, dense_slots
from edgepet.graphs.onnx_file import OnnxFile, parse_onnx, port, read_onnx, shape_of
from edgepet.graphs.parts import part_of
from edgepet.methods import SSF, LinearProbe, LoRA
from edgepet.methods.depth import in_blocks
from edgepet.spec import NpArray
from tests.flow import RUNTIMES, Network, needs_openvino
from tests.methods import EXAMPLES
from tests.tiny import SETTINGS, random_images

VIT, CONVNET = "test_vit", "test_efficientnet"
IMAGES = random_images(5, 3)
ROUNDING = 1e-5  # of the largest logit: fp32 in another order of additions
FOLDED = {  # what changes a weight otherwise than by scales and low rank
    *(name for name in EXAMPLES if name.startswith(("consolidator", "hira", "hta", "krona", "lokr"))),
    "full", "glora, low rank", "kadaptation", "lora-mul", "rlrr",
}  # fmt: skip


@pytest.fixture(scope="module")
def vit(networks: Callable[[str], Network]) -> Network:
    return networks(VIT)


@pytest.fixture(scope="module")
def file(vit: Network) -> OnnxFile:
    return read_onnx(vit.graph.model_path)


def answers(graph: BaseGraph, delta: Delta, runtime: str, form: Any) -> NpArray:
    fitted = fit(graph, delta, form)
    network = opened(shared_runtime(runtime, purpose="a test"), fitted.part, fitted.tensors, 1)
    return fitted.head(network.bind(fitted.slots)(IMAGES))


def ends_at(found: Sequence[Cut], layer: str) -> int:
    return next(place for place, cut in enumerate(found) if cut.after == layer)


def apart(got: NpArray, expected: NpArray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------ told apart


def test_a_file_told_apart_and_put_together_is_the_same_model(vit: Network, file: OnnxFile) -> None:
    model = onnx.load(str(vit.graph.model_path), load_external_data=False)

    again = onnx.load_model_from_string(file.encoded())

    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert [node.operator for node in file.nodes] == [node.op_type for node in model.graph.node]
    assert {name: shape_of(data) for name, data in file.tensors.items()} == {
        tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer
    }


def test_a_stretch_is_what_onnx_extracts(vit: Network, file: OnnxFile) -> None:
    model = onnx.load(str(vit.graph.model_path), load_external_data=False)
    cut = cuts(file, "images")[-4]

    part = file.between(
        {"images": file.inputs["images"]}, {cut.name: port(cut.name, None), **dict.fromkeys(cut.sizes, b"")}
    )

    wanted, reached = {cut.name, *cut.sizes}, set[str]()
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            reached.update(node.output)
            wanted.update(node.input)
    assert {name for node in part.nodes for name in node.puts_out} == reached
    assert set(part.tensors) == wanted & {tensor.name for tensor in model.graph.initializer}


def test_integers_of_nodes_are_read_and_written(file: OnnxFile) -> None:
    node = replace(file.nodes[0], other=b"").with_attributes(start=0, end=300)

    message = onnx.NodeProto.FromString(node.encoded())

    assert {a.name: (a.type, a.i) for a in message.attribute} == {"start": (2, 0), "end": (2, 300)}
    assert (node.integer("end", 7), node.integer("axis", 7)) == (300, 7)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"", "not enough values to unpack (expected 1, got 0)"),
        (b"\x3a\x00" * 2, "too many values to unpack (expected 1)"),
        (b"\x3a\x05\x0a\x01", "cut short"),
        (b"\x38\x05", "field 7 is a number"),
        (b"\x3b\x00", "a field of kind 3"),
        (b"\xff" * 11, "a number of more than 64 bits"),
        (b"\x3a\x04\x0a\x02\x12\x00", "not enough values to unpack (expected 1, got 0)"),  # a node without an operator
    ],
)
def test_what_is_no_onnx_file_is_refused(data: bytes, got: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_onnx(data, "model.onnx")
    assert str(refused.value) == (
        f"model.onnx: is not an ONNX file that can be told apart, got {got}\n  fix: delete it and make it again"
    )


def test_a_node_with_graphs_inside_is_refused() -> None:
    inside = onnx.helper.make_graph([], "then", [], [])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inside, else_branch=inside)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))

    with pytest.raises(InputError, match="got a node with graphs inside"):
        parse_onnx(model.SerializeToString(), "model.onnx")


@SETTINGS
@given(st.data())
def test_a_damaged_file_is_refused_or_told_apart_but_nothing_else(networks: Any, data: st.DataObject) -> None:
    whole = networks(VIT).graph.model_path.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))

    try:
        parse_onnx(bytes(damaged[:cut]), "model.onnx").encoded()
    except InputError as refused:
        told = str(refused)
    else:
        told = ""
    assert not told or told.startswith("model.onnx: is not an ONNX file that can be told apart")


# ------------------------------------------------------------------------------------------------------------- cuts


def test_a_vit_can_be_cut_between_all_of_its_blocks(file: OnnxFile) -> None:
    found = cuts(file, "images")

    ends = [cut.after for cut in found if re.fullmatch(r"blocks\.\d+\.mlp\.fc2", cut.after)]
    assert ends == [f"blocks.{number}.mlp.fc2" for number in range(6)]
    assert "blocks.3.attn.qkv.weight" not in found[ends_at(found, "blocks.2.mlp.fc2")].before


@pytest.mark.parametrize("architecture", [VIT, CONVNET, "test_convnext", "test_resnet"])
def test_what_lies_before_a_cut_is_all_that_it_depends_on(
    networks: Callable[[str], Network], architecture: str
) -> None:
    told = read_onnx(networks(architecture).graph.model_path)
    makers = {name: node for node in told.nodes for name in node.puts_out}

    found = cuts(told, "images")

    assert len(found) > 3
    for cut in found:
        wanted, seen = [cut.name, *cut.sizes], set[str]()
        while wanted:
            name = wanted.pop()
            if name not in seen:
                seen.add(name)
                wanted += [read for read in makers[name].reads if read] if name in makers else []
        assert cut.before == seen & told.tensors.keys()


def test_the_last_cut_before_a_change_is_chosen(file: OnnxFile) -> None:
    found = cuts(file, "images")

    chosen = last_before(found, {"blocks.3.attn.proj.bias", "norm.weight"})

    assert chosen is not None
    assert chosen.after == "blocks.2.mlp.fc2"
    assert last_before(found, {"patch_embed.proj.weight"}) is None
    assert last_before(found, ()) is found[-1]


# ------------------------------------------------------------------------------------------------------------ slots


@pytest.mark.parametrize(
    ("runtime", "example"),
    [
        *(("onnxruntime", example) for example in EXAMPLES),
        *(pytest.param("openvino", example, marks=needs_openvino) for example in ("ssf", "lora", "repadapter")),
    ],
)
def test_a_task_in_slots_answers_as_merged_or_has_to_be_folded(vit: Network, runtime: str, example: str) -> None:
    delta = vit.task(EXAMPLES[example])
    if example in FOLDED:
        with pytest.raises(UnslottedError) as refused:
            answers(vit.graph, delta, runtime, "slots")
        assert re.fullmatch(
            r"task 'flowers': \S+: is changed by \w+, which no slot can hold\n  fix: open the task with `mode=merged`",
            str(refused.value),
        )
        return

    got = answers(vit.graph, delta, runtime, "slots")

    assert apart(got, answers(vit.graph, delta, runtime, "merged")) <= ROUNDING


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("architecture", [CONVNET, "test_convnext", "test_resnet"])
@pytest.mark.parametrize("method", [SSF(), LoRA(rank=2, on=("conv1", "conv2", "fc1", "pwconv1"))], ids=["ssf", "lora"])
def test_convnets_take_slots_too(
    networks: Callable[[str], Network], runtime: str, architecture: str, method: Any
) -> None:
    network = networks(architecture)
    delta = network.task(method)

    got = answers(network.graph, delta, runtime, "slots")

    assert apart(got, answers(network.graph, delta, runtime, "merged")) <= ROUNDING


def test_a_low_rank_change_of_a_grouped_convolution_has_to_be_folded(networks: Callable[[str], Network]) -> None:
    network = networks(CONVNET)
    grouped = next(
        layer.weight
        for layer in network.backbone.layers
        if layer.kind == "conv" and network.graph.base.tensors[layer.weight].shape[1] == 1
    )
    name = grouped.removesuffix(".weight").rpartition(".")[2]
    delta = network.task(LoRA(rank=1, on=(name,)))

    with pytest.raises(UnslottedError) as refused:
        dense_slots(network.graph, read_onnx(network.graph.model_path), delta)

    assert str(refused.value).endswith(
        ": is a convolution in groups, whose inputs no slot can change\n  fix: open the task with `mode=merged`"
    )


def test_tasks_of_one_method_run_on_one_network_and_cost_its_slots(vit: Network) -> None:
    first, second = (fit(vit.graph, vit.task(SSF(), seed=seed), "slots") for seed in (3, 4))

    assert {n: v.shape for n, v in first.slots.items()} == {n: v.shape for n, v in second.slots.items()}
    weights = sum(tensor.nbytes for tensor in vit.graph.base.tensors.values())
    assert sum(value.nbytes for value in first.slots.values()) < weights / 20


def test_slots_that_are_not_finite_are_refused(vit: Network) -> None:
    delta = vit.delta
    scales = [targeted for targeted in delta.updates if targeted.update.kind == "scale"]
    broken = [replace(each, update=replace(each.update, s=each.update.s * np.nan)) for each in scales]

    with pytest.raises(InputError, match=r"^task 'flowers': \S+: must be finite, got NaN or infinity$"):
        dense_slots(vit.graph, read_onnx(vit.graph.model_path), replace(delta, updates=tuple(broken)))


# --------------------------------------------------------------------------------------------------------- together


def several(vit: Network) -> dict[str, Delta]:
    return {
        "whole": vit.task(SSF(), seed=3),
        "third": vit.task(in_blocks(SSF(), "3-5"), seed=4),
        "third-too": vit.task(in_blocks(SSF(), "3-5"), seed=5),
        "fourth": vit.task(in_blocks(LoRA(rank=2, on=("q", "v")), "4-5"), seed=6),
        "probe": vit.task(LinearProbe(), seed=7),
        "probe-too": vit.task(LinearProbe(), seed=8),
    }


@pytest.mark.parametrize("form", ["merged", "slots"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_tasks_share_is_computed_once_and_each_answers_as_alone(vit: Network, runtime: str, form: Any) -> None:
    deltas = several(vit)
    fitted = {name: fit(vit.graph, delta, form) for name, delta in deltas.items()}

    with Together(part_of(vit.graph), {}, fitted, runtime=runtime, threads=1) as together:
        got, alone = together(IMAGES), {name: together.of(name)(IMAGES) for name in deltas}
        shared = [(each.after, set(each.tasks)) for each in together.shared]

    assert shared == [
        ("blocks.2.mlp.fc2", deltas.keys() - {"whole"}),
        ("blocks.3.mlp.fc2", {"fourth", "probe", "probe-too"}),
        ("features", {"probe", "probe-too"}),
    ]
    for name, delta in deltas.items():
        assert np.array_equal(got[name], alone[name])
        assert apart(got[name], answers(vit.graph, delta, runtime, form)) <= ROUNDING


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_batch_has_an_answer_for_each_image(vit: Network, runtime: str) -> None:
    fitted = {name: fit(vit.graph, delta, "slots") for name, delta in several(vit).items()}

    with Together(part_of(vit.graph), {}, fitted, runtime=runtime, threads=1) as together:
        three = together(IMAGES)
        ones = [together(IMAGES[k : k + 1]) for k in range(3)]

    for name in fitted:
        assert apart(np.concatenate([one[name] for one in ones]), three[name]) <= ROUNDING


def test_one_task_shares_nothing(vit: Network) -> None:
    fitted = {"flowers": fit(vit.graph, vit.task(in_blocks(SSF(), "3-5")), "slots")}

    with Together(part_of(vit.graph), {}, fitted, runtime="onnxruntime", threads=1) as together:
        assert together.shared == ()
        assert together(IMAGES)["flowers"].shape == (3, 5)


def test_a_runtime_that_opens_no_stretch_is_refused(vit: Network) -> None:
    with pytest.raises(InputError, match=r"^`runtime`: opens no stretch of a graph on tensorrt$"):
        opened(ROWS["tensorrt"], part_of(vit.graph), {}, None)
