"""Standalone models that other tools read: constants as tensors, older opsets, ONNX Runtime's own preparations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepet.device.onnxruntime import open_model, open_session
from edgepet.errors import InputError
from edgepet.exporters.onnx import serialize, write_onnx
from edgepet.exporters.portable import OLDEST, REWRITINGS, in_opset, make_plain
from edgepet.graphs.onnx_file import OPSET
from edgepet.spec import NpArray
from tests.flow import Tasks, edgepet, needs_openvino, refused

SHAPE = (2, 4, 6)
IMAGES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
CONSTANTS = {
    "axes": np.array([-1]),
    "flat": np.array([2, -1]),
    "weight": np.linspace(0.5, 1.5, 6, dtype=np.float32),
    "bias": np.linspace(-1, 1, 6, dtype=np.float32),
    "half": np.array(0, np.float16),
    "grid": np.random.default_rng(1).uniform(-1, 1, (2, 5, 5, 2)).astype(np.float32),
    "square": np.array([2, 1, 4, 6]),
    "zero": np.array([0, 24]),
}


def made(*nodes: tuple[str, list[str], list[str], dict[str, Any]], opset: int = OPSET) -> Any:
    """A model of ``nodes`` from "images" to "logits", with the ``CONSTANTS`` that they read."""
    listed = [helper.make_node(operator, takes, gives, **settings) for operator, takes, gives, settings in nodes]
    read = {name for node in listed for name in node.input}
    tensors = [numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in read]
    ports = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SHAPE[1:]]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(listed, "tiny", ports[:1], ports[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def alone(operator: str, *more: str, **settings: Any) -> Any:
    """A model of one operator, which reads images and ``more``."""
    return made((operator, ["images", *more], ["logits"], settings))


def run(model: Any) -> NpArray:
    return open_model(model).run(None, {"images": IMAGES})[0]


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


# ---------------------------------------------------------------------------------------------------- the same, plainly


def test_constants_become_tensors_and_what_nothing_reads_goes() -> None:
    model = made(
        ("Constant", [], ["sides"], {"value_ints": [2, 24]}),
        ("Constant", [], ["two"], {"value_float": 2.0}),
        ("Reshape", ["images", "sides"], ["rows"], {}),
        ("Mul", ["rows", "two"], ["logits"], {}),
    )
    model.graph.initializer.append(numpy_helper.from_array(CONSTANTS["weight"], "unread"))
    expected = run(model)

    make_plain(model)

    constants = [node.attribute[0] for node in model.graph.node if node.op_type == "Constant"]
    assert [(told.name, numpy_helper.to_array(told.t).tolist()) for told in constants] == [
        ("value", [2, 24]),
        ("value", 2.0),
    ]
    assert len(model.graph.initializer) == 0
    assert np.array_equal(run(model), expected)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_length_is_the_root_of_a_sum_of_squares(keepdims: int) -> None:
    model = alone("ReduceL2", "axes", keepdims=keepdims)
    expected = run(model)

    make_plain(model)

    assert operators(model) == ["Mul", "ReduceSum", "Sqrt"]
    assert np.allclose(run(model), expected, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------- older opsets


def shape_of_two() -> Any:
    return made(("Shape", ["images"], ["sides"], {"start": 1, "end": 2}), ("Cast", ["sides"], ["logits"], {"to": 1}))


def grid_sample(mode: str) -> Any:
    return made(
        ("Reshape", ["images", "square"], ["maps"], {}),
        ("GridSample", ["maps", "grid"], ["logits"], {"mode": mode}),
    )


def pieces() -> Any:
    return made(
        ("Split", ["images"], ["first", "second"], {"axis": 1, "num_outputs": 2}),
        ("Sub", ["first", "second"], ["logits"], {}),
    )


def rounded() -> Any:
    return made(("CastLike", ["images", "half"], ["short"], {}), ("Cast", ["short"], ["logits"], {"to": 1}))


EXAMPLES: list[tuple[str, Callable[[], Any], int]] = [  # operator, a model with it, an opset that says it otherwise
    ("LayerNormalization", lambda: alone("LayerNormalization", "weight", "bias", epsilon=1e-3), 16),
    ("LayerNormalization", lambda: alone("LayerNormalization", "weight"), 13),
    ("LayerNormalization", lambda: alone("LayerNormalization", "weight", "bias", axis=2), 16),
    ("Gelu", lambda: alone("Gelu"), 19),
    ("Gelu", lambda: alone("Gelu", approximate="tanh"), 13),
    ("HardSwish", lambda: alone("HardSwish"), 13),
    ("Mish", lambda: alone("Mish"), 17),
    *(
        (name, lambda name=name: alone(name, "axes", keepdims=0), 17)
        for name in REWRITINGS
        if name.startswith("Reduce")
    ),
    ("ReduceMean", lambda: alone("ReduceMean"), 13),
    ("Reshape", lambda: alone("Reshape", "flat", allowzero=1), 13),
    ("Shape", shape_of_two, 14),
    ("Shape", lambda: made(("Shape", ["images"], ["s"], {}), ("Cast", ["s"], ["logits"], {"to": 1})), 13),
    ("Split", pieces, 17),
    ("GridSample", lambda: grid_sample("linear"), 16),
    ("GridSample", lambda: grid_sample("cubic"), 19),
    ("GridSample", lambda: grid_sample("nearest"), 17),
    ("CastLike", rounded, 14),
]


def test_every_rewriting_has_an_example() -> None:
    assert {name for name, _, _ in EXAMPLES} == REWRITINGS.keys()


@pytest.mark.parametrize(("name", "example", "opset"), EXAMPLES, ids=lambda value: str(value)[:20])
def test_an_older_opset_answers_alike(name: str, example: Callable[[], Any], opset: int) -> None:
    model = example()
    before = serialize(model)

    older = in_opset(model, opset, where="tiny")

    onnx.checker.check_model(older, full_check=True)
    assert [entry.version for entry in older.opset_import] == [opset]
    assert older.ir_version == helper.find_min_ir_version_for(older.opset_import)
    assert np.allclose(run(older), run(model), atol=2e-6, equal_nan=True)  # a logarithm of a sum below zero
    assert serialize(model) == before
    assert opset < REWRITINGS[name][0]


@pytest.mark.parametrize("opset", range(OLDEST, OPSET + 1))
def test_a_model_of_one_opset_has_only_operators_that_it_knows(opset: int) -> None:
    model = made(
        ("LayerNormalization", ["images", "weight", "bias"], ["normal"], {}),
        ("Gelu", ["normal"], ["bent"], {}),
        ("ReduceMean", ["bent", "axes"], ["logits"], {"keepdims": 0}),
    )

    older = in_opset(model, opset, where="tiny")

    since = [onnx.defs.get_schema(operator, OPSET).since_version for operator in set(operators(older))]
    assert max(since) <= opset or "ReduceMean" in operators(older)  # it is known in two forms
    assert ("LayerNormalization" in operators(older), "Gelu" in operators(older)) == (opset >= 17, opset >= 20)
    assert np.allclose(run(older), run(model), atol=2e-6)


def computed_axes() -> Any:
    return made(
        ("Shape", ["images"], ["count"], {"start": 0, "end": 1}), ("ReduceMax", ["images", "count"], ["logits"], {})
    )


NO_WORDS: list[tuple[Callable[[], Any], int, str]] = [
    (lambda: alone("Trilu"), 13, "Trilu"),
    (lambda: grid_sample("linear"), 15, "GridSample"),
    (lambda: made(("Split", ["images"], ["logits", "b", "c"], {"axis": 1, "num_outputs": 3})), 17,
     "Split with pieces of several sizes"),
    (computed_axes, 17, "ReduceMax with axes that are computed"),
    (lambda: alone("Reshape", "zero", allowzero=1), 13, "Reshape with allowzero"),
]  # fmt: skip


@pytest.mark.parametrize(("example", "opset", "what"), NO_WORDS)
def test_what_an_opset_has_no_words_for_is_refused(example: Callable[[], Any], opset: int, what: str) -> None:
    with pytest.raises(InputError) as refusal:
        in_opset(example(), opset, where="tiny")

    assert str(refusal.value) == (
        f"tiny: opset {opset} must have {what}, got none: it came later (node logits)\n"
        "  fix: a higher `opset`, up to 20"
    )


# -------------------------------------------------------------------------------------------------------- whole exports


def prepared(path: Path) -> NpArray:
    """What ``path`` answers once ONNX Runtime has prepared it for quantisation, all of it on.

    Folding its constants moves fp16's answers by some of its own steps, of 1e-3.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(path), str(path.parent / "prepared.onnx"))
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    first, second = (
        open_session(each).run(None, {"images": images})[0] for each in (path, path.with_name("prepared.onnx"))
    )
    limit = 1e-3 if "fp16" in str(path) else 1e-5
    assert np.abs(first - second).max() <= limit * np.abs(first).max()
    return first


@pytest.fixture(scope="module")
def exported(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task in opset 16, and in ours."""
    folder = tmp_path_factory.mktemp("exported")
    for precision in ("fp32", "fp16"):
        told = ("--precision", precision, "--opset", 16, "-o", folder / "older", "--json")
        said = edgepet("export", tasks.shapes, *told)
        assert said.code == 0, said.err
        assert said.json["artifacts"][0]["verified"]
    assert edgepet("export", tasks.shapes, "-o", folder / "ours").code == 0
    return folder


@pytest.mark.parametrize("place", ["ours/{}-fp32", "older/{}-fp32", "older/{}-fp16"])
def test_an_exported_file_passes_onnx_runtimes_own_preparation(place: str, exported: Path) -> None:
    path = exported / place.format("shapes-onnx") / "model.onnx"

    answers = prepared(path)

    assert answers.shape == (2, 3)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def test_an_exported_file_is_in_the_opset_that_was_asked_for(exported: Path) -> None:
    versions = {}
    for path in sorted(exported.glob("*/*/model.onnx")):
        model = onnx.load(path)
        versions[f"{path.parent.parent.name}/{path.parent.name}"] = model.opset_import[0].version, model.ir_version
        assert ("LayerNormalization" in operators(model)) == ("ours" in str(path))

    assert versions == {
        "older/shapes-onnx-fp16": (16, 8),
        "older/shapes-onnx-fp32": (16, 8),
        "ours/shapes-onnx-fp32": (20, 10),
    }


def test_external_weights_may_be_of_an_older_opset_too(tasks: Tasks, tmp_path: Path) -> None:
    assert edgepet("export", tasks.shapes, "--opset", 13, "--external-data", "-o", tmp_path).code == 0

    folder = tmp_path / "shapes-onnx-fp32"
    assert sorted(path.name for path in folder.iterdir()) == ["artifact.json", "model.onnx", "model.onnx.data"]
    assert onnx.load(folder / "model.onnx").opset_import[0].version == 13


BETWEEN = "is between 13, where weights have a step for each output, and 20, that of traced graphs"
REFUSED = {
    ("--opset", "12"): f"--opset: {BETWEEN}, got 12",
    ("--opset", "21"): f"--opset: {BETWEEN}, got 21",
    ("--opset", "17", "--to", "openvino"): "--opset: is for ONNX files, got --to openvino",
}


@pytest.mark.parametrize("options", REFUSED)
def test_an_opset_that_cannot_be_is_refused(options: tuple[str, ...], tasks: Tasks, tmp_path: Path) -> None:
    assert refused(3, "export", tasks.shapes, *options, "-o", tmp_path / "out") == REFUSED[options] + "\n"
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ beyond one file


@needs_openvino
def test_what_one_file_cannot_hold_lies_beside_it_and_openvino_reads_it(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepet.exporters.onnx.MAX_SINGLE_FILE_BYTES", 100_000)
    said = edgepet("export", tasks.shapes, "--to", "onnx,openvino", "-o", tmp_path, "--json")

    assert said.code == 0, said.err
    assert [row["verified"] for row in said.json["artifacts"]] == [True, True]
    files = {path.name for path in tmp_path.glob("*/*")}
    assert files == {"artifact.json", "model.onnx", "model.onnx.data", "model.xml", "model.bin"}
    for row in said.json["artifacts"]:
        assert edgepet("verify", row["path"]).code == 0


def test_a_file_of_weights_holds_every_tensor_where_the_model_says(tmp_path: Path) -> None:
    weights = {f"w{i}": np.arange(size, dtype=np.float32) + i for i, size in enumerate((300, 10, 1024, 2000))}
    model = made(
        *(("ReduceSum", [name], [f"{name}.sum"], {"keepdims": 0}) for name in weights),
        ("Sum", ["images", *(f"{name}.sum" for name in weights)], ["logits"], {}),
    )
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())

    assert write_onnx(model, tmp_path, external=True) == ["model.onnx", "model.onnx.data"]

    assert (tmp_path / "model.onnx.data").stat().st_size == 4096 + 4096 + 8000
    read = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    assert all(np.array_equal(read[name], value) for name, value in weights.items())
    assert np.array_equal(open_session(tmp_path / "model.onnx").run(None, {"images": IMAGES})[0], run(model))


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.exporters.onnx import readable, write_onnx
from edgepet.exporters.openvino import write_openvino

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

names, count, before = ["w0", "w1", "w2"], 180_000_000, peak()
value = helper.make_tensor_value_info
nodes = [helper.make_node("ReduceMax", [name], [f"{name}.most"], keepdims=0) for name in names]
nodes.append(helper.make_node("Sum", ["images", *(f"{name}.most" for name in names)], ["logits"]))
ports = [value(name, TensorProto.FLOAT, ["batch"]) for name in ("images", "logits")]
graph = helper.make_graph(nodes, "large", ports[:1], ports[1:])
for name in names:
    graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=[count], raw_data=bytes(4 * count))
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
del graph
folder, most = Path(sys.argv[1]), 4 * count * len(names)
made = peak()
assert write_onnx(model, folder) == ["model.onnx", "model.onnx.data"]
assert peak() - made < 1.5 * 4 * count, "one tensor at a time is copied"
if sys.argv[2] == "openvino":
    with readable(model, folder) as source:
        write_openvino(source, folder, where="large")
    assert not list(folder.glob(".*"))
del model
runner = OnnxRuntime.of_model(folder / "model.onnx")
assert runner(np.ones(2, np.float32)).tolist() == [1, 1]
runner.close()
print(round((peak() - before) / most, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_two_gigabytes_are_written_and_opened_in_twice_their_memory(runtime: str, tmp_path: Path) -> None:
    """The weights are in memory once when it begins."""
    run = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path), runtime], capture_output=True, text=True, check=False
    )

    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 2.2  # times the weights; what is mapped from the file counts too
