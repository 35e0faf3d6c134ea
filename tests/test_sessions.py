"""ONNX models that are opened, or refused by name; and tensors inside a model, beside it, and written anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgepet.device.onnxruntime import OnnxRuntime, open_model, open_session
from edgepet.errors import InputError
from edgepet.graphs.tensor_files import lightened, padding, point_into, put_inside, stored_bytes
from edgepet.measuring.machine import environment
from edgepet.spec import NpArray
from tests.flow import needs_openvino

onnx = pytest.importorskip("onnx", reason="needs the package onnx")

from edgepet.calibration.writer import GraphWriter, settings_of  # noqa: E402  once onnx is known to be here

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
        cores = environment().cores
        own = 0 if cores == os.cpu_count() else cores  # 0: ONNX Runtime counts them
        assert session.get_session_options().intra_op_num_threads == (threads or own)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux, where a process has cores of its own")
def test_a_process_that_is_kept_to_some_cores_is_left_on_them(tmp_path: Path) -> None:
    """ONNX Runtime by itself binds a thread to every core of the machine."""
    (tmp_path / "model.onnx").write_bytes(model().SerializeToString())
    script = (
        "import os, sys, time; from edgepet.device.onnxruntime import open_session;"
        "os.sched_setaffinity(0, {0}); before = set(os.listdir('/proc/self/task'));"
        "session = open_session(sys.argv[1]); time.sleep(0.5); threads = set(os.listdir('/proc/self/task')) - before;"
        "print([each for each in threads if not os.sched_getaffinity(int(each)) <= {0}])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=True
    )

    assert ended.stdout.strip() == "[]", ended.stdout


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


AGAIN = "copy all files of the model again, or export it again"
BESIDE = "copy all files of the model again: its weights lie in one beside it"
ABSENT = "name the folder of an exported model, with all of its files"
LATER = "update onnxruntime here, or export the model again with an older `opset`"

# And a part of what ONNX Runtime says of it, or, with a bar between, of what each Python makes of that; and the cure.
MALFORMED: dict[Callable[[Path], None], tuple[str, str]] = {
    no_file: ("NO_SUCHFILE", ABSENT),
    empty: ("No graph was found in the protobuf.", AGAIN),
    half: ("Protobuf parsing failed.", AGAIN),
    another_file: ("Protobuf parsing failed.", AGAIN),
    an_operator_that_is_no_text: ("'utf-8' codec can't decode byte 0xff|InvalidGraph", AGAIN),
    unknown_operator: ("No Op registered for Nonsense", LATER),
    newer_opset: ("999", LATER),
    no_weights_file: ("gone.bin", BESIDE),
    short_weights_file: ("weight offset: 0 size to read: 24 given file_length: 23", BESIDE),
}


@pytest.mark.parametrize("spoil", MALFORMED, ids=lambda spoil: spoil.__name__)
def test_a_model_that_onnx_runtime_does_not_read_is_refused(
    spoil: Callable[[Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    spoil(path)

    with pytest.raises(InputError) as refused:
        OnnxRuntime.of_model(path)

    said, cure = MALFORMED[spoil]
    told = f"{path}: cannot be opened by ONNX Runtime, got {refused.value.got}\n  fix: {cure}"
    assert str(refused.value) == told
    assert any(part in str(refused.value.got) for part in said.split("|"))
    assert len(told.splitlines()) == 2
    assert capfd.readouterr() == ("", "")  # the library would print and log the same


def test_a_model_that_takes_no_images_is_refused(tmp_path: Path) -> None:
    made = model()
    made.graph.input[0].name = made.graph.node[0].input[0] = "pixels"
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())

    with pytest.raises(InputError) as refused:
        OnnxRuntime.of_model(tmp_path / "model.onnx")

    assert str(refused.value) == (f"{tmp_path / 'model.onnx'}: must take one input, images, got pixels\n  fix: {AGAIN}")


def test_a_model_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    made = model()
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3, 3]), "sides"))  # for three rows alone
    made.graph.node[0].output[0] = "product"
    made.graph.node.append(onnx.helper.make_node("Reshape", ["product", "sides"], ["features"]))
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())

    with OnnxRuntime.of_model(tmp_path / "model.onnx") as runner:
        assert runner(np.ones((3, 2), np.float32)).shape == (3, 3)
        with pytest.raises(InputError, match=r"model\.onnx: cannot be run by ONNX Runtime, got .*Reshape") as refused:
            runner(ROWS)

    assert refused.value.fix == AGAIN


# ------------------------------------------------------------------------------------------------------------ OpenVINO


def no_weights(folder: Path) -> None:
    (folder / "model.bin").unlink()


def weights_cut(folder: Path) -> None:
    (folder / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:-1])


def no_graph(folder: Path) -> None:
    (folder / "model.xml").unlink()


def graph_cut(folder: Path) -> None:
    (folder / "model.xml").write_bytes((folder / "model.xml").read_bytes()[:-200])


def graph_of_words(folder: Path) -> None:
    (folder / "model.xml").write_text("I am no model, but a text of several words.\n" * 9)


def no_such_operator(folder: Path) -> None:
    text = (folder / "model.xml").read_text()
    (folder / "model.xml").write_text(text.replace('type="MatMul"', 'type="Nonsense"'))


def other_input(folder: Path) -> None:
    text = (folder / "model.xml").read_text()
    (folder / "model.xml").write_text(text.replace("images", "pixels"))


OPENVINO_LATER = "update openvino here, or export the model again with this version"
MALFORMED_IR: dict[Callable[[Path], None], tuple[str, str]] = {
    no_weights: ("cannot be opened by OpenVINO, got Empty weights data in bin file", BESIDE),
    weights_cut: ("cannot be opened by OpenVINO, got Incorrect weights in bin file!", BESIDE),
    no_graph: ("cannot be opened by OpenVINO, got ir: Could not open the file", ABSENT),
    graph_cut: ("cannot be opened by OpenVINO, got ", AGAIN),
    graph_of_words: ("cannot be opened by OpenVINO, got Unable to read the model", AGAIN),
    no_such_operator: ("cannot be opened by OpenVINO, got Opset opset1 doesn't contain the operation", OPENVINO_LATER),
    other_input: ("must take one input, images, got pixels", AGAIN),
}


@needs_openvino
@pytest.mark.parametrize("spoil", MALFORMED_IR, ids=lambda spoil: spoil.__name__)
def test_a_model_that_openvino_does_not_read_is_refused(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    from edgepet.device.openvino import OpenVino
    from edgepet.exporters.openvino import write_openvino

    write_openvino(model().SerializeToString(), tmp_path, where="tiny")
    with OpenVino.of_model(tmp_path / "model.xml") as runner:
        assert np.array_equal(runner(ROWS), ROWS @ WEIGHT)
    spoil(tmp_path)

    with pytest.raises(InputError) as refused:
        OpenVino.of_model(tmp_path / "model.xml")

    said, cure = MALFORMED_IR[spoil]
    assert str(refused.value).startswith(f"{tmp_path / 'model.xml'}: {said}")
    assert refused.value.fix == cure
    assert len(str(refused.value).splitlines()) == 2


# ---------------------------------------------------------------------------------------------------------- in memory


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


def wide(*, unread: bool = False) -> onnx.ModelProto:
    """``model`` behind a product that no small file holds, in tensors of several types."""
    made = model()
    rng = np.random.default_rng(0)
    tensors = {"square": rng.normal(size=(2, 512)), "back": rng.normal(size=(512, 2)), "unread": np.ones(300)}
    nodes = [
        onnx.helper.make_node("MatMul", ["images", "square"], ["wide"]),
        onnx.helper.make_node("Cast", ["back.fp16"], ["back"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("MatMul", ["wide", "back"], ["narrow"]),
    ]
    made.graph.node[0].input[0] = "narrow"
    nodes.append(made.graph.node[0])
    made.graph.ClearField("node")
    made.graph.node.extend(nodes)
    halved = onnx.numpy_helper.from_array(tensors["back"].astype(np.float16), "back.fp16")
    made.graph.initializer.extend(
        [onnx.numpy_helper.from_array(tensors["square"].astype(np.float32), "square"), halved]
    )
    if unread:
        made.graph.initializer.append(onnx.numpy_helper.from_array(tensors["unread"].astype(np.float32), "unread"))
    return made


@pytest.mark.parametrize("unread", [False, True])
def test_a_model_in_memory_is_opened_without_bytes_of_its_weights(unread: bool) -> None:
    """Beyond 2 GiB protobuf makes no bytes of it; a tensor that nothing reads is unknown to ONNX Runtime."""
    source = wide(unread=unread)
    before = source.SerializeToString(deterministic=True)

    light, outside = lightened(source, "weights")

    assert [tensor.name for tensor in outside] == ["square", "back.fp16", "unread"][: 3 if unread else 2]
    assert len(light.SerializeToString()) < 1500 < sum(map(stored_bytes, outside))
    assert np.array_equal(open_model(source).run(None, {"images": ROWS})[0], answers(before))
    assert source.SerializeToString(deterministic=True) == before


def test_light_tensors_lie_page_by_page() -> None:
    light, outside = lightened(wide(), "weights")

    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in light.graph.initializer]
    sizes = [tensor.ByteSize() for tensor in outside]
    assert places == [
        {},
        {"location": "weights", "offset": "0", "length": "4096"},
        {"location": "weights", "offset": "4096", "length": "2048"},
    ]
    assert min(sizes) > 2048
    assert [padding(offset) for offset in (0, 1, 4095, 4096, 6144)] == [0, 4095, 1, 0, 2048]


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

    (features,) = open_model(source, ["features"]).run(None, {"images": ROWS})

    assert np.array_equal(features, ROWS @ WEIGHT)
    assert [value.name for value in source.graph.output] == ["positive"]
