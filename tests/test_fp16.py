"""fp16 as a pass on the graph: half the bytes, the same answers, and what does not fit stays fp32 by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgepet.calibration.fp16 import LARGEST, Kept, stored_types, to_half
from edgepet.errors import CheckError, InputError
from edgepet.exporters.onnx import serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.spec import NpArray
from tests.flow import Network, Tasks, edgepet, needs_openvino, needs_tensorrt_rtx, refused
from tests.tiny import mlp, random_images

IMAGES = random_images(4, 8)


def run(model: Any, images: NpArray = IMAGES) -> NpArray:
    session = onnxruntime.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def close(got: NpArray, expected: NpArray) -> bool:
    return bool(np.abs(got - expected).max() <= 2e-2 * np.abs(expected).max())  # the house's limit for fp16


def weight_bytes(model: Any) -> int:
    return sum(entry["bytes"] for name, entry in stored_types(model).items() if name.startswith("float"))


SLOWER = pytest.param("convnextv2_atto", marks=pytest.mark.slow)  # twenty seconds


@pytest.fixture(scope="module", params=["test_vit", "test_resnet", "test_efficientnet", SLOWER])
def model(request: pytest.FixtureRequest, networks: Callable[[str], Network]) -> Any:
    """A task's fp32 model on a tiny network: a transformer, and ConvNets with batch norm and with layer norm."""
    return networks(request.param).model


def test_the_answers_stay_and_the_weights_take_half_the_bytes(model: Any) -> None:
    before = serialize(model)

    half = to_half(model, IMAGES, where="flowers")

    assert close(run(half.model), run(model))
    assert 0.47 < weight_bytes(half.model) / weight_bytes(model) < 0.53  # batch norms are gone, other norms stay fp32
    assert serialize(model) == before
    assert {node.op_type for node in half.model.graph.node} & {"BatchNormalization"} == set()
    assert not any(kept.forced for kept in half.kept)


def test_images_and_logits_stay_fp32_and_the_batch_stays_free(model: Any) -> None:
    half = to_half(model, IMAGES, where="flowers").model

    types = [value.type.tensor_type for value in (*half.graph.input, *half.graph.output)]
    assert [t.elem_type for t in types] == [TensorProto.FLOAT, TensorProto.FLOAT]
    assert run(half, IMAGES[:1]).shape == (1, 5)
    assert run(half, IMAGES[:5]).shape == (5, 5)


def test_no_value_is_cast_there_and_back(model: Any) -> None:
    half = to_half(model, IMAGES, where="flowers").model

    casts = {node.output[0]: node for node in half.graph.node if node.op_type == "Cast"}
    assert [node.name for node in casts.values() if node.input[0] in casts] == []
    assert len({(node.input[0], node.attribute[0].i) for node in casts.values()}) == len(casts)


@needs_openvino
def test_openvino_reads_the_same_graph(model: Any) -> None:
    import openvino

    half = serialize(to_half(model, IMAGES, where="flowers").model)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(half), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    assert close(compiled(IMAGES)[0], run(model))


@needs_tensorrt_rtx
def test_tensorrt_rtx_builds_an_fp16_engine_from_the_same_graph(model: Any, tmp_path: Path) -> None:
    half = serialize(to_half(model, IMAGES, where="flowers").model)

    built = build_engines(half, tmp_path, precision="fp16")

    assert built.layers["half"] > 0
    assert json.loads((tmp_path / "model.engine.json").read_text())["precision"] == "fp16"


@needs_tensorrt_rtx
def test_an_engine_is_of_the_precision_that_was_asked_for(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have fp16 layers for an fp16 engine, got none"):
        build_engines(serialize(model), tmp_path, precision="fp16")
    with pytest.raises(InputError, match="must be fp32 in an fp32 engine, got HALF"):
        build_engines(serialize(to_half(model, IMAGES, where="flowers").model), tmp_path)


# ---------------------------------------------------------------------------------------------------- what does not fit


PICTURES = random_images(1, 6, 4)


def test_a_layer_that_overflows_is_named_and_stays_fp32() -> None:
    planted, plain = deep(up=2.0**12), deep(up=1.0)
    assert np.array_equal(run(planted, PICTURES), run(plain, PICTURES))  # powers of two: the same function
    largest = float(np.abs(PICTURES.reshape(6, -1) @ _weight(planted, "fc1.weight").T).max())
    assert largest > 65504  # else nothing is planted

    half = to_half(planted, PICTURES, where="planted")

    reason = f"overflow: {largest:.3g} on 6 images, beyond 32752"
    assert {kept.name: kept.op for kept in half.kept} == {"fc1": "MatMul", "node_relu": "Relu", "fc2": "Gemm"}
    assert half.kept[0] == Kept(name="fc1", op="MatMul", reason=reason)
    assert half.kept[0].forced


def _weight(model: Any, name: str) -> NpArray:
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


def test_without_the_scan_the_planted_overflow_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = deep(up=2.0**12)
    expected = run(planted, PICTURES)

    kept = to_half(planted, PICTURES, where="planted")
    monkeypatch.setattr("edgepet.calibration.fp16.LARGEST", np.inf)
    blind = to_half(planted, PICTURES, where="planted")

    assert close(run(kept.model, PICTURES), expected)
    with np.errstate(all="ignore"):  # each node in its own type; ONNX Runtime on a CPU would not round between two
        answers = ReferenceEvaluator(blind.model).run(None, {"images": PICTURES})[0]
    assert not np.isfinite(answers).all()
    assert {node.name for node in kept.kept} == {"fc1", "node_relu", "fc2"}
    assert LARGEST == 32752


def deep(up: float) -> Any:
    """``mlp`` in front of two layers that carry most of the weights and overflow nowhere."""
    model = mlp(up=up, down=1 / up)
    rng = np.random.default_rng(3)
    model.graph.node[-1].output[0] = "five"
    more = [("fc3.weight", "five", "many", (2048, 5)), ("fc4.weight", "many", "logits", (5, 2048))]
    for name, source, sink, shape in more:
        value = (rng.standard_normal(shape) / 32).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
        model.graph.node.append(helper.make_node("Gemm", [source, name], [sink], name=f"node_{name}", transB=1))
    return model


def test_a_model_that_fp16_cannot_hold_is_refused_and_not_written_in_fp32() -> None:
    with pytest.raises(CheckError) as refusal:
        to_half(mlp(up=2.0**30, down=2.0**-30), PICTURES, where="planted")

    assert str(refusal.value) == (
        "planted: must store most of its weights in fp16, got 0 of 13568 bytes; "
        "most in fp32 has fc1 (Transpose), overflow: 3.94e+09 on 6 images, beyond 32752\n"
        "  fix: export it in fp32"
    )


def test_a_border_of_minus_infinity_before_a_maximum_is_no_overflow() -> None:
    model = mlp(up=1.0, down=1.0)
    border = [np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.array(-np.inf, np.float32)]
    model.graph.initializer.extend(map(numpy_helper.from_array, border, ["sides", "border"]))
    model.graph.node[0].input[0] = "largest"
    model.graph.node.insert(0, helper.make_node("Pad", ["images", "sides", "border"], ["padded"]))
    model.graph.node.insert(1, helper.make_node("MaxPool", ["padded"], ["largest"], kernel_shape=[3, 3]))
    model.graph.node[1].attribute.append(helper.make_attribute("strides", [1, 1]))

    half = to_half(model, PICTURES, where="planted")

    assert half.kept == ()
    assert close(run(half.model, PICTURES), run(model, PICTURES))


def test_weights_that_would_become_zero_stay_fp32() -> None:
    model = deep(up=2.0**-30)  # fc1 near 1e-9

    kept = to_half(model, PICTURES, where="planted").kept

    assert {node.name for node in kept} >= {"fc1", "fc2"}  # what is small there is made large again behind it
    assert kept[0].reason == "underflow: 3072 of 3072 weights would become zero"


def test_a_network_that_is_not_finite_in_fp32_is_refused() -> None:
    with pytest.raises(InputError) as refusal:
        to_half(mlp(up=3e37, down=1.0), PICTURES, where="planted")

    assert str(refusal.value).startswith("planted: must stay finite in fp32 on the calibration images: ")


# ------------------------------------------------------------------------------------------------------- the command


def test_an_fp16_export_says_what_is_stored_what_ran_and_what_stayed_fp32(tasks: Tasks, tmp_path: Path) -> None:
    said = edgepet("export", tasks.shapes, "--precision", "fp16", "-o", tmp_path, "--json")

    assert said.code == 0, said.err
    (row,) = said.json["artifacts"]
    assert (row["precision"], row["verified"], row["calibration"]) == ("fp16", True, {"inputs": "work", "n": 12})
    assert row["path"].endswith("shapes-onnx-fp16")
    assert row["stored"]["float16"]["bytes"] > 50 * row["stored"]["float32"]["bytes"]
    assert row["executed"]["input"] == "tensor(float)"
    assert row["executed"]["executed_nodes"]["float"] > 0  # ONNX Runtime has few fp16 kernels for this CPU
    assert {node["op"] for node in row["kept_fp32"]} == {"LayerNormalization", "Softmax"}
    assert row["parity"]["limit"] == pytest.approx(2e-2 / 1e-4 * fp32_limit(tasks, tmp_path))
    manifest = json.loads((Path(row["path"]) / "artifact.json").read_text())
    assert manifest["evidence"] == {key: row[key] for key in ("stored", "executed", "kept_fp32", "calibration")}
    assert edgepet("verify", row["path"]).code == 0
    assert edgepet("eval", row["path"], tasks.data, "--json").json["precision"] == "fp32"  # what ran


def fp32_limit(tasks: Tasks, folder: Path) -> float:
    """The limit of an fp32 comparison with the merged network on the same images."""
    said = edgepet("merge", tasks.shapes, "--backbone", tasks.spec, "-o", folder / "m.safetensors", "--json")
    return float(said.json["limit"]) / 2e-2 * 1e-4


def test_ranges_are_measured_on_the_images_that_were_given(tasks: Tasks, tmp_path: Path) -> None:
    told = edgepet("export", tasks.shapes, "--precision", "fp16", "--calib", tasks.data / "train", "-o", tmp_path)

    assert told.code == 0, told.err
    assert "shapes fp16, ranges on 6 images (calib): fp32 in 13 LayerNormalization, 6 Softmax" in told.out


def test_calibration_images_are_not_for_fp32(tasks: Tasks, tmp_path: Path) -> None:
    message = refused(3, "export", tasks.shapes, "--calib", tasks.data, "-o", tmp_path)

    assert message == "--calib: is for --precision fp16, int8 and auto: fp32 needs no images to measure ranges on\n"
