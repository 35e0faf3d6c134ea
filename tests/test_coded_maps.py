"""int8 ConvNets: codes in every map, each runtime's form of them, and no operator where the end of a range will do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from edgepet.calibration.coded_maps import MAP_FORMS, find_maps, has_maps, zero_code
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.search import Calibration
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.runtimes import Format
from edgepet.exporters.onnx import serialize
from edgepet.spec import NpArray
from tests.flow import Network, needs_openvino
from tests.int8_graphs import (
    CALIBRATION,
    IMAGES,
    PICTURES,
    PLAIN,
    Observed,
    apart,
    made_by_hand,
    observed,
    of_type,
    producers,
    residual,
    run,
    tensors,
)

LAYERS = {"test_resnet": 15, "test_efficientnet": 17}
ORT, OPENVINO = MAP_FORMS["onnx"], MAP_FORMS["openvino"]
FORMS = pytest.mark.parametrize("form", MAP_FORMS.values(), ids=list(MAP_FORMS))


@pytest.fixture(scope="module", params=list(LAYERS))
def network(request: pytest.FixtureRequest, networks: Callable[[str], Network]) -> Observed:
    return observed(networks(request.param))


# --------------------------------------------------------------------------------------------------------- the answers


@FORMS
def test_the_answers_are_near_the_float_ones_and_not_the_same(network: Observed, form: Any) -> None:
    got = run(network.maps(form).model)

    assert 1e-3 < apart(got, run(network.model)) < 0.06  # 1 to 3 % were measured; fp32 in another order would be 1e-6


def in_floats(model: Any, images: NpArray) -> NpArray:
    """What the Q/DQ graph answers where ONNX Runtime must not make integers of it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    answers: NpArray = plain.run(None, {"images": images})[0]
    return answers


@FORMS
def test_integers_answer_as_the_same_graph_does_in_floats(network: Observed, form: Any) -> None:
    model = network.maps(form).model

    # What falls between two codes may be rounded either way, and layers of random weights add that up: 4 % at most were
    # measured, and 2 % of the graph of ``qdq``, which has half as many roundings.
    assert apart(run(model), in_floats(model, IMAGES)) < 0.08


@FORMS
def test_the_same_input_gives_the_same_bytes_and_the_source_is_left_alone(network: Observed, form: Any) -> None:
    before = serialize(network.graph.model)

    made = [serialize(network.maps(form, Int8Recipe(estimator="mse", bias_correction=True)).model) for _ in range(2)]

    assert made[0] == made[1]
    assert serialize(network.graph.model) == before


def test_onnx_runtime_multiplies_codes_in_every_layer(network: Observed, tmp_path: Path) -> None:
    (tmp_path / "int8.onnx").write_bytes(serialize(network.maps(ORT).model))

    with OnnxRuntime.of_model(tmp_path / "int8.onnx") as runner:
        evidence = runner.evidence

    assert evidence["layers"] == {"float": 1, "int8": LAYERS[network.name]}  # all but the head


@needs_openvino
def test_openvino_multiplies_codes_in_every_layer_and_answers_the_same(network: Observed, tmp_path: Path) -> None:
    from edgepet.device.openvino import OpenVino

    model = network.maps(OPENVINO).model
    (tmp_path / "int8.onnx").write_bytes(serialize(model))

    with OpenVino.of_model(tmp_path / "int8.onnx") as runner:
        got, layers = runner(IMAGES), runner.evidence["layers"]

    assert layers == {"float": 1, "int8": LAYERS[network.name]}
    assert apart(got, run(model)) < 0.05


# ----------------------------------------------------------------------------------------------------------- the graph


def test_for_onnx_runtime_what_a_convolution_puts_out_is_rounded_at_once(network: Observed) -> None:
    model = network.maps(ORT).model

    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    layers = [node for node in of_type(model, "Conv") if node.input[0].endswith(".int8")]
    assert len(layers) == LAYERS[network.name]
    assert {kind for node in layers for kind in readers[node.output[0]]} == {"QuantizeLinear"}
    assert not of_type(model, "Relu", "Clip")


def test_for_onnx_runtime_silu_is_of_codes_too(networks: Callable[[str], Network]) -> None:
    found = observed(networks("test_efficientnet"))

    rounded = {node.input[0] for node in of_type(found.maps(ORT).model, "QuantizeLinear")}
    for node in of_type(found.maps(ORT).model, "Sigmoid"):
        assert node.input[0].endswith(".int8")
        assert node.output[0] in rounded
    assert len(of_type(found.maps(ORT).model, "Sigmoid")) > 5
    assert not {node.output[0] for node in of_type(found.maps(OPENVINO).model, "Sigmoid")} & {
        node.input[0] for node in of_type(found.maps(OPENVINO).model, "QuantizeLinear")
    }


def test_zero_has_a_code_of_its_own_in_every_map_of_onnx_runtime(network: Observed) -> None:
    made = network.maps(ORT)

    values = tensors(made.model)
    for node in of_type(made.model, "QuantizeLinear"):
        of, (scale, zero) = made.ranges[node.input[0]], (values[name] for name in node.input[1:])
        assert (zero.dtype, int(zero)) == (np.uint8, zero_code(of))
        assert np.abs(of.rounded(np.zeros(1))).item() <= 1e-5 * scale
    assert 128 in {zero_code(of) for of in made.ranges.values()}


def test_for_openvino_only_what_never_goes_below_zero_is_unsigned(network: Observed) -> None:
    made = network.maps(OPENVINO)

    values = tensors(made.model)
    for node in of_type(made.model, "QuantizeLinear"):
        name, zero = node.input[0].removesuffix(".shifted"), values[node.input[2]]
        assert int(zero) == 0
        assert (zero.dtype == np.uint8) == (zero_code(made.ranges[name]) == 0)
        if zero.dtype == np.uint8:
            assert network.seen[name].least.min() > -made.ranges[name].scale


def test_a_layer_that_is_kept_stays_as_it_was(network: Observed) -> None:
    name = network.layers[1].name

    made = network.maps(ORT, Int8Recipe(keep=(name,)))

    (kept,) = (node for node in of_type(made.model, "Conv") if node.input[1] == f"{name}.weight")
    assert len(made.layers) == LAYERS[network.name] - 1
    assert np.array_equal(tensors(made.model)[kept.input[1]], network.graph.value(f"{name}.weight"))
    assert apart(run(made.model), run(network.model)) < 0.06


# -------------------------------------------------------------------------------------------------------- made by hand


def bounds(found: Observed) -> Mapping[str, float]:
    return find_maps(found.graph, found.layers, outputs=True).bounds


@FORMS
def test_a_bound_is_the_end_of_a_range_and_padding_lies_in_the_convolution(form: Any) -> None:
    found = made_by_hand(residual(bound=1.5))

    made = found.maps(form)

    assert not of_type(made.model, "Clip", "Relu")
    assert "wide" not in producers(made.model)
    of = made.ranges["bounded"]
    assert (zero_code(of), 255 * of.scale) == (0, pytest.approx(1.5))
    second = producers(made.model)["second"]
    assert helper.get_attribute_value(next(a for a in second.attribute if a.name == "pads")) == [1, 1, 1, 1]
    assert apart(run(made.model, PICTURES), run(found.model, PICTURES)) < 0.02
    assert apart(run(made.model, PICTURES), in_floats(made.model, PICTURES)) < 2e-3  # a code of 255 in three layers


def test_for_onnx_runtime_a_kernel_reads_four_channels_where_there_are_three() -> None:
    found = made_by_hand(residual())

    three, four = found.maps(replace(ORT, fours=False)).model, found.maps(ORT).model

    (pad,) = of_type(four, "Pad")
    assert list(pad.input) == [
        "images.codes",
        "a.fours.pads",
        f"edgepet.uint8.{zero_code(found.maps(ORT).ranges['images'])}",
    ]
    assert [tensors(made)["a.weight.codes"].shape for made in (three, four)] == [(4, 3, 3, 3), (4, 4, 3, 3)]
    assert not tensors(four)["a.weight.codes"][:, 3].any()
    assert np.array_equal(run(four, PICTURES), run(three, PICTURES))
    assert not of_type(found.maps(OPENVINO).model, "Pad")


def test_both_terms_of_a_sum_have_codes_and_so_has_the_sum() -> None:
    found = made_by_hand(residual(pad=False))

    model = found.maps(ORT).model

    (added,) = of_type(model, "Add")
    assert list(added.input) == ["second.int8", "bounded.int8"]
    assert list(added.output) == ["positive"]  # what its ReLU put out: the range begins at zero
    assert "positive.codes" in producers(model)
    assert bounds(found) == {"bounded": 6.0, "positive": np.inf}


def test_a_relu_stays_where_something_else_reads_what_is_in_front_of_it() -> None:
    found = made_by_hand(residual(pad=False, twice=True))

    model = found.maps(ORT).model

    assert [node.input[0] for node in of_type(model, "Relu")] == ["sum.int8"]
    assert bounds(found) == {"bounded": 6.0}
    assert apart(run(model, PICTURES), run(found.model, PICTURES)) < 0.02


@pytest.mark.parametrize("change", ["low", "no constant"])
def test_a_clip_stays_where_it_does_not_begin_at_zero_or_is_computed(change: str) -> None:
    model = residual(pad=False)
    if change == "low":
        (low,) = (tensor for tensor in model.graph.initializer if tensor.name == "low")
        low.CopyFrom(numpy_helper.from_array(np.float32(-1), "low"))
    else:
        model.graph.node.insert(0, helper.make_node("Neg", ["high"], ["below"]))
        model.graph.node[2].input[1] = "below"

    found = made_by_hand(model)

    assert "bounded" not in bounds(found)
    assert [node.output[0] for node in of_type(found.maps(ORT).model, "Clip")] == ["bounded"]


# ------------------------------------------------------------------------------------------------------- which network


def test_a_transformer_is_left_as_it_is_for_every_format(networks: Callable[[str], Network]) -> None:
    vit, resnet = calibrated(networks("test_vit")), calibrated(networks("test_resnet"))

    formats: tuple[Format, ...] = ("onnx", "openvino", "tensorrt")
    assert (has_maps(vit.layers), has_maps(resnet.layers)) == (False, True)
    assert len({serialize(vit.for_format(name).made(PLAIN).model) for name in formats}) == 1
    assert vit.same_graph("onnx", "tensorrt")
    assert len({serialize(resnet.for_format(name).made(PLAIN).model) for name in formats}) == 3
    assert not resnet.same_graph("onnx", "openvino")


def test_what_tensorrt_reads_does_not_depend_on_the_other_forms(networks: Callable[[str], Network]) -> None:
    made = calibrated(networks("test_resnet"))

    got = made.for_format("onnx").for_format("tensorrt").made(PLAIN)

    assert serialize(got.model) == serialize(observed(networks("test_resnet")).int8().model)
    assert {node.op_type for node in got.model.graph.node} >= {"Relu", "Add", "QuantizeLinear"}
    zeros = {tensors(got.model)[node.input[2]].dtype for node in of_type(got.model, "QuantizeLinear")}
    assert zeros == {np.dtype(np.int8)}


def calibrated(made: Network) -> Calibration:
    images: NpArray = CALIBRATION
    drawn = SimpleNamespace(images=images, held_out_images=IMAGES)
    weights = frozenset(made.graph.base.tensors)
    return Calibration(made.model, weights, drawn, np.arange(5), where="task 'x'")  # type: ignore[arg-type]
