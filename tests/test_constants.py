"""Kernels that a network computes from its parameters: a standalone model stores what they come to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepet.calibration.fp16 import stored_types, to_half
from edgepet.calibration.layers import Graph, find_layers
from edgepet.device.onnxruntime import open_model
from edgepet.errors import CheckError
from edgepet.exporters.constants import compute_constants
from edgepet.exporters.onnx import serialize
from edgepet.spec import NpArray
from tests.tiny import random_images

IMAGES = random_images(3, 4, 8)
RNG = np.random.default_rng(5)
TENSORS = {
    "conv.weight": RNG.normal(3, 1, (16, 3, 3, 3)).astype(np.float32),
    "conv.gain": RNG.normal(1, 0.1, (16, 1, 1, 1)).astype(np.float32),
    "fc.weight": RNG.normal(0, 1, (5, 16)).astype(np.float32),
    "fc.length": RNG.normal(1, 0.1, (5, 1)).astype(np.float32),
    "all": np.array([1, 2, 3]),
    "last": np.array([1]),
    "maps": np.array([2, 3]),
}


def standardised() -> Any:
    """images -> a convolution of a standardised kernel -> mean -> a linear layer of a normalised weight -> logits."""
    made = helper.make_node
    nodes = [
        made("ReduceMean", ["conv.weight", "all"], ["mean"]),
        made("Sub", ["conv.weight", "mean"], ["centred"]),
        made("ReduceL2", ["centred", "all"], ["deviation"]),
        made("Div", ["centred", "deviation"], ["normal"]),
        made("Mul", ["normal", "conv.gain"], ["kernel"]),
        made("Conv", ["images", "kernel"], ["found"]),
        made("ReduceMean", ["found", "maps"], ["features"], keepdims=0),
        made("ReduceL2", ["fc.weight", "last"], ["norm"]),
        made("Div", ["fc.weight", "norm"], ["direction"]),
        made("Mul", ["direction", "fc.length"], ["matrix"]),
        made("Transpose", ["matrix"], ["turned"], perm=[1, 0]),
        made("MatMul", ["features", "turned"], ["logits"]),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["batch", 3, 8, 8]), ("logits", ["batch", 5]))
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in TENSORS.items()]
    graph = helper.make_graph(nodes, "standardised", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: Any) -> NpArray:
    return open_model(model).run(None, {"images": IMAGES})[0]


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def values(model: Any) -> dict[str, NpArray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_a_kernel_that_is_computed_becomes_a_tensor_of_its_parameters_name() -> None:
    model = standardised()
    expected = run(model)

    compute_constants(model)

    assert operators(model) == ["Conv", "ReduceMean", "Transpose", "MatMul"]
    assert values(model).keys() == {"conv.weight", "fc.weight", "maps"}
    weight = TENSORS["conv.weight"] - TENSORS["conv.weight"].mean(axis=(1, 2, 3), keepdims=True)
    weight *= TENSORS["conv.gain"] / np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True))
    assert np.allclose(values(model)["conv.weight"], weight, atol=1e-6)
    assert np.allclose(run(model), expected, atol=1e-6)


def test_fp16_stores_it_and_int8_finds_its_layer() -> None:
    model, plain = standardised(), standardised()

    compute_constants(model)

    assert stored_types(to_half(model, IMAGES, where="tiny").model).keys() == {"float16", "int64"}
    layers = [find_layers(Graph(each), frozenset(TENSORS)) for each in (model, plain)]
    assert [[layer.name for layer in found] for found in layers] == [["conv", "fc"], []]


def test_a_parameter_that_something_else_reads_too_stays_beside_its_kernel() -> None:
    model = standardised()
    model.graph.node[5].output[0] = "first"
    again = helper.make_node("Conv", ["images", "conv.weight"], ["second"])
    model.graph.node.insert(6, again)
    model.graph.node.insert(7, helper.make_node("Add", ["first", "second"], ["found"]))
    expected = run(model)

    compute_constants(model)

    assert {"conv.weight", "kernel"} < values(model).keys()
    assert np.array_equal(values(model)["conv.weight"], TENSORS["conv.weight"])
    assert np.allclose(run(model), expected, atol=1e-5)


def convolved(*nodes: Any) -> Any:
    """Two convolutions one behind the other, of the kernels k1 and k2 that ``nodes`` compute from the parameter w."""
    made = helper.make_node
    model = standardised()
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.node.extend(
        [
            made("Conv", ["images", "k1"], ["first"], kernel_shape=[1, 1]),
            made("Conv", ["first", "k2"], ["second"], kernel_shape=[1, 1]),
            made("ReduceMean", ["second", "maps"], ["logits"], keepdims=0),
        ]
    )
    maps = next(tensor for tensor in model.graph.initializer if tensor.name == "maps")
    tensors = [maps, numpy_helper.from_array(RNG.normal(1, 1, (3, 3, 1, 1)).astype(np.float32), "w")]
    kept = [type(tensor).FromString(tensor.SerializeToString()) for tensor in tensors]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
    return model


@pytest.mark.parametrize(
    ("nodes", "tensors"),
    [
        ([("Tanh", "w", "m"), ("Sin", "m", "k1"), ("Cos", "m", "k2")], {"maps", "k1", "k2"}),
        ([("Tanh", "w", "k1"), ("Sin", "k1", "k2")], {"maps", "w", "k2"}),
        ([("Tanh", "w", "m"), ("Sin", "m", "k1"), ("Cos", "w", "k2")], {"maps", "k1", "k2"}),
    ],
    ids=["of one sum", "of one another", "of one parameter"],
)
def test_two_kernels_that_are_computed_from_one_parameter_are_two_tensors(
    nodes: list[tuple[str, str, str]], tensors: set[str]
) -> None:
    model = convolved(*(helper.make_node(kind, [reads], [gives]) for kind, reads, gives in nodes))
    expected = run(model)

    compute_constants(model)

    assert operators(model) == ["Conv", "Conv", "ReduceMean"]
    assert values(model).keys() == tensors
    assert np.allclose(run(model), expected, atol=1e-5)


def test_what_an_image_meets_on_the_way_to_a_kernel_stays_beside_it() -> None:
    made = helper.make_node
    nodes = [made("Tanh", ["w"], ["m"]), made("Sin", ["m"], ["k1"]), made("Cos", ["m"], ["k2"])]
    model = convolved(*nodes)
    model.graph.node.insert(5, made("ReduceSum", ["m"], ["total"], keepdims=0))
    model.graph.node[-1].input[0] = "scaled"
    model.graph.node.insert(6, made("Mul", ["second", "total"], ["scaled"]))
    expected = run(model)

    compute_constants(model)

    assert values(model).keys() == {"maps", "w", "k1", "k2"}
    assert np.allclose(run(model), expected, atol=1e-4)


def test_what_is_no_layers_weight_stays_as_it_is() -> None:
    """A position table that is put together from parameters may be far larger than they are."""
    model = standardised()
    model.graph.node[5].op_type = "Mul"
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((1, 3, 8, 8), np.float32), "conv.weight"))
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((1, 3, 8, 8), np.float32), "conv.gain"))
    del model.graph.node[7:]
    model.graph.node[6].output[0] = "logits"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
    before = serialize(model)

    compute_constants(model)

    assert serialize(model) == before


def test_a_weight_that_is_only_turned_stays_the_parameter() -> None:
    model = standardised()
    compute_constants(model)
    before = serialize(model)

    compute_constants(model)

    assert serialize(model) == before


def test_a_model_with_control_flow_stays_as_it_is() -> None:
    model = standardised()
    inside = helper.make_graph(
        [helper.make_node("Identity", ["kernel"], ["inner"])], "inside", [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.insert(5, helper.make_node("If", ["yes"], ["chosen"], then_branch=inside, else_branch=inside))
    before = serialize(model)

    compute_constants(model)

    assert serialize(model) == before


def test_a_model_that_stays_fp32_for_its_sums_is_refused_with_that_reason() -> None:
    with pytest.raises(CheckError) as refused:
        to_half(standardised(), IMAGES, where="tiny")  # its kernels are computed behind sums

    assert str(refused.value) == (
        "tiny: must store most of its weights in fp16, got 202 of 2250 bytes; "
        "most in fp32 has conv (ReduceMean), its sums need fp32\n  fix: export it in fp32"
    )
