"""ONNX models that are opened, or refused by name; and tensors inside a model, beside it, and written anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgepet.device.onnxruntime import OnnxRuntime, open_session
from edgepet.errors import InputError
from edgepet.graphs.tensor_files import point_into, put_inside
from edgepet.spec import NpArray

onnx = pytest.importorskip("onnx", reason="needs the package onnx")

from edgepet.calibration.writer import GraphWriter, settings_of, watching  # noqa: E402  once onnx is known to be here

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
ROWS = np.array([[1, 2], [3, 4]], np.float32)


def model() -> onnx.ModelProto:
    """features = images @ weight."""
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["images", "weight"], ["features"], name="product")],
        "tiny",
        [onnx.helper.make_tensor_value_info("images", floats, ["batch", 2])],
        [onnx.helper.make_tensor_value_info("features", floats, ["batch", 3])],
        [onnx.numpy_helper.from_array(WEIGHT, "weight")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def answers(source: Path | bytes, **given: NpArray) -> NpArray:
    found: NpArray = open_session(source, tensors=given).run(None, {"images": ROWS})[0]
    return found


# ------------------------------------------------------------------------------------------------------------ sessions


@pytest.mark.parametrize("threads", [None, 1])
def test_a_path_and_the_bytes_of_a_model_answer_alike(threads: int | None, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model().SerializeToString())

    for source in (tmp_path / "model.onnx", model().SerializeToString()):
        session = open_session(source, threads=threads)
        assert np.array_equal(session.run(None, {"images": ROWS})[0], ROWS @ WEIGHT)
        assert session.get_providers() == ["CPUExecutionProvider"]
        assert session.get_session_options().intra_op_num_threads == (threads or 0)


def test_a_tensor_stands_in_place_of_the_models_own(tmp_path: Path) -> None:
    outside = model()
    point_into(outside.graph.initializer[0], "weights.bin", 0, WEIGHT.nbytes)
    (tmp_path / "model.onnx").write_bytes(outside.SerializeToString())
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())

    assert np.array_equal(answers(tmp_path / "model.onnx"), ROWS @ WEIGHT)
    assert np.array_equal(answers(tmp_path / "model.onnx", weight=-WEIGHT), -ROWS @ WEIGHT)


def no_file(path: Path) -> None:
    del path


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    data = model().SerializeToString()
    path.write_bytes(data[: len(data) // 2])


def another_file(path: Path) -> None:
    path.write_text("I am no model, but a text of several words.\n" * 9)


def an_operator_that_is_no_text(path: Path) -> None:
    path.write_bytes(model().SerializeToString().replace(b"MatMul", b"Mat\xfful"))


def unknown_operator(path: Path) -> None:
    made = model()
    made.graph.node[0].op_type = "Nonsense"
    path.write_bytes(made.SerializeToString())


def newer_opset(path: Path) -> None:
    made = model()
    made.opset_import[0].version = 999
    path.write_bytes(made.SerializeToString())


def no_weights_file(path: Path) -> None:
    made = model()
    point_into(made.graph.initializer[0], "gone.bin", 0, WEIGHT.nbytes)
    path.write_bytes(made.SerializeToString())


def short_weights_file(path: Path) -> None:
    made = model()
    point_into(made.graph.initializer[0], "short.bin", 0, WEIGHT.nbytes)
    path.write_bytes(made.SerializeToString())
    (path.parent / "short.bin").write_bytes(WEIGHT.tobytes()[:-1])


MALFORMED: dict[Callable[[Path], None], str] = {  # and a part of what ONNX Runtime says of it
    no_file: "NO_SUCHFILE",
    empty: "No graph was found in the protobuf.",
    half: "Protobuf parsing failed.",
    another_file: "Protobuf parsing failed.",
    an_operator_that_is_no_text: "'utf-8' codec can't decode byte 0xff",
    unknown_operator: "No Op registered for Nonsense",
    newer_opset: "999",
    no_weights_file: "gone.bin",
    short_weights_file: "weight offset: 0 size to read: 24 given file_length: 23",
}


@pytest.mark.parametrize("spoil", MALFORMED, ids=lambda spoil: spoil.__name__)
def test_a_model_that_onnx_runtime_does_not_read_is_refused(
    spoil: Callable[[Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    spoil(path)

    with pytest.raises(InputError) as refused:
        OnnxRuntime.of_model(path)

    assert str(refused.value) == f"{path}: cannot be opened by ONNX Runtime, got {refused.value.got}"
    assert MALFORMED[spoil] in str(refused.value.got)
    assert len(str(refused.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")  # the library would print and log the same


@pytest.mark.parametrize("spoil", [empty, half, another_file, unknown_operator], ids=lambda spoil: spoil.__name__)
def test_bytes_that_onnx_runtime_does_not_read_are_refused(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    spoil(tmp_path / "model.onnx")

    with pytest.raises(InputError, match=r"^ONNX model: cannot be opened by ONNX Runtime, got ."):
        open_session((tmp_path / "model.onnx").read_bytes())


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    made = model()
    point_into(made.graph.initializer[0], "weights.bin", 0, WEIGHT.nbytes)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())

    with pytest.raises(InputError, match="cannot be opened by ONNX Runtime"):
        answers(tmp_path / "model.onnx", weight=WEIGHT[:, :2].copy())


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("stored", ["raw_data", "float_data"])
def test_a_tensor_is_pointed_into_a_file_and_put_back(stored: str) -> None:
    tensor = onnx.helper.make_tensor(
        "weight", onnx.TensorProto.FLOAT, WEIGHT.shape,
        WEIGHT.tobytes() if stored == "raw_data" else WEIGHT.ravel(), raw=stored == "raw_data",
    )  # fmt: skip

    point_into(tensor, "one.bin", 8, 16)
    point_into(tensor, "other.bin", 4096, WEIGHT.nbytes)

    told = {entry.key: entry.value for entry in tensor.external_data}
    assert told == {"location": "other.bin", "offset": "4096", "length": "24"}
    assert len(tensor.external_data) == 3
    assert (tensor.data_location, tensor.raw_data, list(tensor.float_data)) == (tensor.EXTERNAL, b"", [])

    put_inside(tensor, WEIGHT.astype(">f4"))

    assert (tensor.data_location, len(tensor.external_data)) == (tensor.DEFAULT, 0)
    assert np.array_equal(onnx.numpy_helper.to_array(tensor), WEIGHT)


def test_what_is_written_takes_the_place_of_a_models_nodes_and_the_model_stays() -> None:
    source = model()
    before = source.SerializeToString(deterministic=True)
    writer = GraphWriter(source, purpose="a test")

    product = writer.node("Gemm", ["images", writer.tensor("weight.turned", WEIGHT.T)], "product", transB=1)
    writer.node("Mul", [product, writer.tensor("two", np.float32(2))], "features", name="doubled")
    made = writer.model()

    assert writer.reads == {"images", "weight.turned", "product", "two"}
    assert [(node.op_type, node.name) for node in made.graph.node] == [("Gemm", "product"), ("Mul", "doubled")]
    assert [tensor.name for tensor in made.graph.initializer] == ["weight.turned", "two"]
    assert settings_of(made.graph.node[0]) == {"transB": 1}
    assert np.array_equal(answers(made.SerializeToString()), 2 * ROWS @ WEIGHT)
    assert source.SerializeToString(deterministic=True) == before


def test_a_watched_model_puts_out_what_lies_inside_of_it() -> None:
    source = model()
    source.graph.node.append(onnx.helper.make_node("Relu", ["features"], ["positive"]))
    source.graph.output[0].name = "positive"

    watched = watching(source, ["features"])

    assert np.array_equal(answers(watched.SerializeToString()), ROWS @ WEIGHT)
    assert [value.name for value in source.graph.output] == ["positive"]
