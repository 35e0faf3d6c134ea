"""TensorRT engines as far as a machine without a GPU can take them; what needs one runs on the fakes below."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgepet.device.tensorrt import gpu_problem, open_engine, read_sidecar
from edgepet.errors import CheckError, EdgepetError, InputError, MissingError
from edgepet.exporters import tensorrt as exporter
from edgepet.exporters.tensorrt import Readback, TensorrtBuild, build_engines, read_back

rtx = pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")
onnx = pytest.importorskip("onnx", reason="needs the package onnx")

without_gpu = pytest.mark.skipif(gpu_problem() is None, reason="a GPU answers here: the engine is run, not refused")
HEADER = 'ir_version: 10, opset_import: ["" : 20, "edgepet.test" : 1]'


def tiny(last: str = "logits = Softmax <axis = -1> (scores)", kind: str = "float", batch: str = "batch") -> bytes:
    """Flatten, MatMul, LayerNorm, Gemm and ``last``, which reads ``scores`` (batch, 5) and gives ``logits``."""
    text = f"""<{HEADER}> tiny ({kind}[{batch}, 3, 8, 8] images) => ({kind}[{batch}, 5] logits) {{
        flat = Flatten (images)
        hidden = MatMul (flat, w1)
        normed = LayerNormalization <axis = -1> (hidden, gamma, beta)
        scores = Gemm (normed, w2, b2)
        {last}
    }}"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(3)
    for name, shape in {"w1": (192, 32), "gamma": (32,), "beta": (32,), "w2": (32, 5), "b2": (5,)}.items():
        value = rng.normal(size=shape).astype("float16" if kind == "float16" else "float32")
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TensorrtBuild]:
    folder = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", None)  # or a machine that has both would build the classic engine
        return folder, build_engines(tiny(), folder)


@pytest.fixture
def folder(built: tuple[Path, TensorrtBuild], tmp_path: Path) -> Path:
    """A copy of the engine and its side-car, to spoil."""
    for name in ("model.engine", "model.engine.json"):
        (tmp_path / name).write_bytes((built[0] / name).read_bytes())
    return tmp_path


def message(call: Callable[[], object], kind: type[EdgepetError] = InputError) -> str:
    with pytest.raises(EdgepetError) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def edit_sidecar(folder: Path, **changes: object) -> None:
    path = folder / "model.engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The exporter


def test_one_engine_serves_three_generations_of_gpus(built: tuple[Path, TensorrtBuild]) -> None:
    folder, build = built

    assert build == TensorrtBuild(
        engine="tensorrt-rtx",
        version=rtx.__version__,
        files=("model.engine",),
        sms=(86, 89, 120),
        seconds=build.seconds,
        layers=build.layers,
        readback=build.readback,
    )
    assert sorted(path.name for path in folder.iterdir()) == ["model.engine", "model.engine.json"]


def test_the_sidecar_says_what_the_engine_is(built: tuple[Path, TensorrtBuild]) -> None:
    folder, _ = built
    plan = (folder / "model.engine").read_bytes()

    assert json.loads((folder / "model.engine.json").read_bytes()) == {
        "schema": 1,
        "engine": "tensorrt-rtx",
        "version": rtx.__version__,
        "sms": [86, 89, 120],
        "file": "model.engine",
        "size_bytes": len(plan),
        "sha256": hashlib.sha256(plan).hexdigest(),
        "source_sha256": hashlib.sha256(tiny()).hexdigest(),
        "input": {"name": "images", "dtype": "float32", "shape": [-1, 3, 8, 8]},
        "output": {"name": "logits", "dtype": "float32", "shape": [-1, 5]},
        "max_batch": 16,
        "precision": "fp32",
    }
    assert plan.startswith(b"vtrt")  # the library's own header comes first, none of ours


@without_gpu
def test_reading_back_without_a_gpu_says_that_nothing_was_run(built: tuple[Path, TensorrtBuild]) -> None:
    readback = built[1].readback

    reason = f"{gpu_problem()} here: the engine's bytes and container were read, execution was not run"
    assert readback == Readback(status="not_run", reason=reason, diagnostics=readback.diagnostics)
    assert readback.diagnostics[0] == "INVALID"  # the library's word wherever there is no driver
    assert all("cudaError" in words for words in readback.diagnostics[1:])


@without_gpu
@pytest.mark.parametrize(
    ("spoil", "finds"),
    [
        (lambda plan: b"none" + plan[4:], "MALFORMED_ENGINE"),
        (lambda plan: plan[:-1], "plan.header.size == blobSize"),
        (lambda plan: plan[:64] + bytes([plan[64] ^ 0x55]) + plan[65:], "No engine found in plan"),
    ],
    ids=["magic", "one byte short", "section table"],
)
def test_the_library_refuses_a_broken_container_without_a_gpu(
    folder: Path, spoil: Callable[[bytes], bytes], finds: str
) -> None:
    plan = spoil((folder / "model.engine").read_bytes())
    (folder / "model.engine").write_bytes(plan)
    edit_sidecar(folder, size_bytes=len(plan), sha256=hashlib.sha256(plan).hexdigest())

    assert finds in message(lambda: read_back(rtx, folder), CheckError)


def test_a_weight_that_rotted_is_found_by_its_digest_alone(folder: Path) -> None:
    plan = bytearray((folder / "model.engine").read_bytes())
    good, plan[-500] = hashlib.sha256(plan).hexdigest(), plan[-500] ^ 1
    (folder / "model.engine").write_bytes(plan)

    found, size = hashlib.sha256(plan).hexdigest(), len(plan)
    assert message(lambda: read_back(rtx, folder)) == (
        f"{folder}/model.engine: needs {size} bytes, sha256 {good}, got {size} bytes, sha256 {found}\n"
        "  fix: copy the exported engine again"
    )


@pytest.mark.parametrize(("sms", "got"), [((86, 90), "86, 90"), ((), "none")])
def test_an_unknown_gpu_is_answered_with_the_known_ones(tmp_path: Path, sms: tuple[int, ...], got: str) -> None:
    offers = ", ".join(name[2:] for name in rtx.ComputeCapability.__members__ if name.startswith("SM"))

    assert message(lambda: build_engines(tiny(), tmp_path, sms=sms)) == (
        f"`sms`: TensorRT-RTX {rtx.__version__} builds for {offers}, got {got}\n  fix: pass some of these"
    )


def test_what_the_builder_cannot_compile_is_told_in_its_own_words(tmp_path: Path) -> None:
    said = message(lambda: build_engines(tiny(), tmp_path, sms=(89, 75)))

    assert said.startswith(
        f"ONNX model for SM75, SM89: tensorrt_rtx {rtx.__version__} must build an engine from it, got "
    )
    assert "for Turing (SM75): FP32 GEMM is not supported." in said
    assert said.endswith("\n  fix: leave out 75: TensorRT-RTX has no fp32 GEMM for Turing")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path: Path) -> None:
    model = tiny(last="[odd] logits = edgepet.test.NoSuchThing (scores)")

    assert message(lambda: build_engines(model, tmp_path)) == (
        f"ONNX node 'odd', operator NoSuchThing: tensorrt_rtx {rtx.__version__} must read it, "
        'got creator && "Plugin not found, are the plugin name, version, and namespace correct?"\n'
        "  fix: export it to onnx or openvino, or change the model"
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: b"not a model", f"ONNX model: tensorrt_rtx {rtx.__version__} must read it, got Assertion failed"),
        (lambda: tiny(kind="float16"), "ONNX tensor 'images': must be fp32 in an fp32 engine, got HALF"),
        (
            lambda: tiny(last="half = Cast <to = 10> (scores)\n wide = Cast <to = 1> (half)\n logits = Softmax (wide)"),
            "ONNX tensor 'half': must be fp32 in an fp32 engine, got HALF",
        ),
        (
            lambda: tiny(batch="4"),
            "ONNX model: needs one input images (batch, [frames,] 3, H, W) and one output (batch, C),"
            " only the batch free, got images (4, 3, 8, 8), logits (4, 5)",
        ),
    ],
    ids=["no model", "fp16", "fp16 inside", "fixed batch"],
)
def test_a_model_that_would_make_the_sidecar_lie_is_refused(
    tmp_path: Path, model: Callable[[], bytes], said: str
) -> None:
    assert message(lambda: build_engines(model(), tmp_path)).startswith(said)


def test_a_batch_of_none_is_refused(tmp_path: Path) -> None:
    assert message(lambda: build_engines(tiny(), tmp_path, max_batch=0)) == (
        "max_batch: needs an integer of at least 1, got 0"
    )


def test_without_any_tensorrt_the_extra_is_named(
    built: tuple[Path, TensorrtBuild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)

    for call in (lambda: build_engines(tiny(), tmp_path), lambda: open_engine(built[0])):
        said = message(call, MissingError)
        assert said.startswith("TensorRT engines: needs the package 'tensorrt_rtx', got ")
        assert said.endswith("\n  fix: pip install 'edgepet[tensorrt-rtx]'")


# The runner, as far as it goes without a GPU


@without_gpu
def test_without_a_gpu_the_runner_says_which_one_it_needs(built: tuple[Path, TensorrtBuild]) -> None:
    assert message(lambda: open_engine(built[0]), MissingError) == (
        f"{built[0]}/model.engine: needs an NVIDIA GPU with compute capability 8.6, 8.9 or 12.0, got {gpu_problem()}\n"
        "  fix: run it on the device; ONNX and OpenVINO artefacts run on a CPU"
    )


def test_another_release_of_the_library_is_refused_before_the_gpu_is_asked(folder: Path) -> None:
    edit_sidecar(folder, version="1.6.0")

    assert message(lambda: open_engine(folder)) == (
        f"{folder}/model.engine: opens in tensorrt-rtx 1.6.0 only, got {rtx.__version__}\n"
        "  fix: pip install 'tensorrt-rtx==1.6.0', or export the task again with the release installed here"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, ".schema: needs 1, got 2\n  fix: export the task again"),
        ({"engine": "onnx"}, ".engine: needs one of tensorrt, tensorrt-rtx, got 'onnx'"),
        ({"file": "../model.engine"}, ".file: needs one of model.engine, got '../model.engine'"),
        ({"size_bytes": True}, ".size_bytes: needs an integer of at least 1, got True"),
        ({"sms": []}, ".sms: needs one compute capability at least"),
        ({"precision": "int4"}, ".precision: needs one of fp32, fp16, int8, got 'int4'"),
        (
            {"input": {"name": "images", "dtype": "float32", "shape": [1, 3, 8, 8]}},
            ".input.shape: needs -1 and 3 or 4 sizes, got [1, 3, 8, 8]",
        ),
        ({"gpu": "mine"}, ": knows no key 'gpu'\n  fix: update edgepet if a newer version wrote this file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_sidecar_with_a_wrong_value_is_refused_at_its_place(
    folder: Path, changes: dict[str, object], said: str
) -> None:
    edit_sidecar(folder, **changes)

    assert message(lambda: open_engine(folder)) == f"{folder}/model.engine.json{said}"


def test_a_sidecar_that_is_not_json_or_not_there_is_refused(folder: Path) -> None:
    (folder / "model.engine.json").write_text("{")
    assert message(lambda: open_engine(folder)).startswith(f"{folder}/model.engine.json: needs to be JSON, got ")

    (folder / "model.engine.json").unlink()
    assert message(lambda: open_engine(folder)) == (
        f"{folder}/model.engine.json: could not be read, got No such file or directory"
    )


# What needs a GPU, on fakes: they show which calls are made with what, not that a GPU would answer them


class FakeCuda:
    """libcuda with this machine's memory for a device's; ``held`` is what was not given back."""

    def __init__(self, *, init: int = 0, count: int = 1, fails: str = "") -> None:
        self.init, self.count, self.fails, self.held = init, count, fails, dict[int, Any]()
        self.cuMemcpyHtoD_v2 = self.cuMemcpyDtoH_v2 = self.copy

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: int(name == self.fails)

    def cuInit(self, _: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, _: object) -> int:
        number._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> int:
        memory = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(memory)
        self.held[address._obj.value] = memory
        return 0

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        del self.held[address.value]
        return 0

    def copy(self, target: Any, source: Any, size: ctypes.c_size_t) -> int:
        ctypes.memmove(target.value, source.value, size.value)
        return 0


class FakeEngine:
    """An engine and its own execution context: every logit is the sum of its image."""

    num_io_tensors = 2

    def __init__(self, *, classes: int = 5, runs: bool = True) -> None:
        self.shapes, self.runs = {"images": (-1, 3, 8, 8), "logits": (-1, classes)}, runs
        self.batches, self.address = list[tuple[int, ...]](), dict[str, int]()
        self.get_tensor_name, self.get_tensor_shape = list(self.shapes).__getitem__, self.shapes.__getitem__
        self.get_tensor_dtype, self.create_execution_context = lambda name: rtx.float32, lambda: self
        self.set_tensor_address = self.address.__setitem__

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batches.append(shape)
        return True

    def execute_async_v3(self, stream: object) -> bool:
        n = self.batches[-1][0]
        images = np.ctypeslib.as_array((ctypes.c_float * (n * 192)).from_address(self.address["images"]))
        logits = np.ctypeslib.as_array((ctypes.c_float * (n * 5)).from_address(self.address["logits"]))
        logits.reshape(n, 5)[:] = images.reshape(n, 192).sum(axis=1, keepdims=True)
        return self.runs


Fakes = Callable[..., FakeCuda]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Fakes:
    """Put in a fake libcuda, and a classic ``tensorrt``: TensorRT-RTX's real builder, a runtime that opens ``engine``.

    The engine in ``folder`` then claims to be a classic one of that release.
    """

    def put(engine: FakeEngine | None = None, *, builder: object = rtx.Builder, **cuda: Any) -> FakeCuda:
        module, library = ModuleType("tensorrt"), FakeCuda(**cuda)
        vars(module).update({name: value for name, value in vars(rtx).items() if not name.startswith("_")})
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
        vars(module).update(__version__="11.4.0", Runtime=lambda log: runtime, Builder=builder)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
        edit_sidecar(folder, engine="tensorrt", version="11.4.0", max_batch=2)
        return library

    return put


def test_a_gpu_problem_is_a_phrase(fakes: Fakes) -> None:
    """On a fake libcuda."""
    fakes()
    assert gpu_problem() is None
    fakes(init=100)
    assert gpu_problem() == "a CUDA driver that does not start (cuInit: error 100)"
    fakes(count=0)
    assert gpu_problem() == "a CUDA driver without a GPU"


def test_classic_tensorrt_is_chosen_where_a_gpu_answers(fakes: Fakes, tmp_path: Path) -> None:
    """On a fake libcuda of compute capability 8.9 and a fake ``tensorrt``: the engine it writes is TensorRT-RTX's."""
    fakes(FakeEngine())

    build = build_engines(tiny(), tmp_path, sms=(86, 120))

    assert (build.engine, build.version, build.sms) == ("tensorrt", "11.4.0", (89,))
    assert build.readback == Readback(status="read back")
    assert read_sidecar(tmp_path).engine == "tensorrt"


def test_an_engine_that_its_own_gpu_does_not_open_fails_the_build(fakes: Fakes, tmp_path: Path) -> None:
    """On fakes, as above."""
    fakes(None)

    assert message(lambda: build_engines(tiny(), tmp_path), CheckError) == (
        f"{tmp_path}/model.engine: the library must read the engine that it built, got no message"
    )


def test_tensorrt_rtx_is_chosen_where_the_classic_builder_does_not_start(fakes: Fakes) -> None:
    """On fakes: the builder fails as pybind11 does for a null object."""

    def no_builder(log: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    fakes(builder=no_builder)

    assert exporter._library() == ("tensorrt-rtx", rtx)


def test_a_gpu_of_another_kind_leaves_the_engine_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake runtime: what TensorRT-RTX should answer beside a GPU that the engine was not built for."""
    answer = (rtx.EngineValidity.INVALID, int(rtx.EngineInvalidityDiagnostics.UNSUPPORTED_CC))
    opened = SimpleNamespace(get_engine_validity=lambda data: answer, deserialize_cuda_engine=lambda data: None)
    monkeypatch.setattr(rtx, "Runtime", lambda log: opened)
    monkeypatch.setattr(exporter, "gpu_problem", lambda: None)

    assert read_back(rtx, folder) == Readback(
        status="not_run",
        reason="UNSUPPORTED_CC here: the engine's bytes and container were read, execution was not run",
        diagnostics=("INVALID", "UNSUPPORTED_CC", "no message"),
    )


def test_images_go_to_the_gpu_in_batches_and_logits_come_back_in_order(fakes: Fakes, folder: Path) -> None:
    """On a fake libcuda and a fake engine: the memory traffic is real, the network is a sum."""
    engine = FakeEngine()
    cuda = fakes(engine)
    images = np.random.default_rng(5).normal(size=(5, 3, 8, 8)).astype(np.float32)[:, :, ::-1]  # not contiguous

    network = open_engine(folder)
    logits = network(images)

    assert engine.batches == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert (logits.dtype, logits.shape) == (np.dtype("float32"), (5, 5))
    # float32 rounding of 192 summands in another order
    np.testing.assert_allclose(logits, np.repeat(images.sum((1, 2, 3))[:, None], 5, axis=1), rtol=0, atol=1e-4)
    assert (network.runtime, network.executed) == ("tensorrt", "fp32")
    assert len(cuda.held) == 2
    network.close()
    network.close()
    assert cuda.held == {}


@pytest.mark.parametrize(
    ("engine", "fails", "said", "kind"),
    [
        (None, "", "needs an NVIDIA GPU with compute capability 8.6, 8.9 or 12.0, got no message", MissingError),
        (FakeEngine(classes=9), "", "needs (shape, type) to be", InputError),
        (FakeEngine(), "cuCtxSetCurrent", "GPU 0: cuCtxSetCurrent must succeed, got CUDA error 1", InputError),
    ],
    ids=["not opened", "other tensors", "CUDA says no"],
)
def test_what_the_gpu_does_not_take_is_refused(
    fakes: Fakes, folder: Path, engine: FakeEngine | None, fails: str, said: str, kind: type[EdgepetError]
) -> None:
    """On fakes, as above."""
    cuda = fakes(engine, fails=fails)

    assert said in message(lambda: open_engine(folder), kind)
    assert cuda.held == {}


def test_a_batch_of_another_size_and_a_run_that_fails_are_refused(fakes: Fakes, folder: Path) -> None:
    """On fakes, as above."""
    fakes(FakeEngine(runs=False))
    network, path = open_engine(folder), folder / "model.engine"

    assert message(lambda: network(np.zeros((1, 3, 8, 9), np.float32))).startswith(
        f"{path}: takes float32 images (n, 3, 8, 8), got float32 (1, 3, 8, 9)"
    )
    assert message(lambda: network(np.zeros((1, 3, 8, 8), np.float32))) == (
        f"{path}: TensorRT must run the batch, got a refusal of (1, 3, 8, 8)"
    )
    network.close()
