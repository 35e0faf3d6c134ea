"""Build a TensorRT engine: the classic one for the GPU that is here, else a portable TensorRT-RTX one without any.

TensorRT-RTX compiles ahead of time on any machine and leaves the GPU's kernels to the device; one file serves every
requested compute capability. Precision is the ONNX model's own: networks are strongly typed, fp32 is not TF32.
Images and logits are float32 whatever lies between.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgepet.canonical import canonical_json
from edgepet.device.tensorrt import (
    MODULES,
    SCHEMA,
    Cuda,
    Engine,
    Sidecar,
    TensorSpec,
    Trt,
    deserialize,
    gpu_problem,
    message_log,
    read_sidecar,
)
from edgepet.errors import CheckError, InputError, option, require
from edgepet.exporters.exporter import ExportOptions, Written
from edgepet.exporters.onnx import readable
from edgepet.files import folder_sha256, write_file
from edgepet.graphs.base import INPUT
from edgepet.graphs.head_graph import are_answers, output_type
from edgepet.spec import StoredPrecision

if TYPE_CHECKING:
    from onnx import ModelProto

_ELSEWHERE = "export it to onnx or openvino, or change the model"
_NOT_THIS_GPU = frozenset({"UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Readback:
    """What reading the written engine proved.

    ``read back``: the library opened it on this machine's GPU, with the tensors that the side-car names. ``not_run``:
    only its bytes and its container were checked, for ``reason``. ``diagnostics`` are the library's words, verbatim.
    """

    status: Literal["read back", "not_run"]
    reason: str | None = None
    diagnostics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorrtBuild:
    """``files`` are the engines in the folder, its side-car not among them; ``seconds`` parsed and built them.

    ``layers`` counts the network's layers by the type that they put out.
    """

    engine: Engine
    version: str
    files: tuple[str, ...]
    sms: tuple[int, ...]
    seconds: float
    layers: Mapping[str, int]
    readback: Readback


def build_engines(
    onnx_model: bytes | Path,
    folder: Path,
    *,
    precision: StoredPrecision = "fp32",
    sms: Sequence[int] = (86, 89, 120),
    max_batch: int = 16,
    stem: str = "model",
) -> TensorrtBuild:
    """Write ``STEM.engine`` and ``STEM.engine.json`` to the existing ``folder``.

    Args:
        onnx_model: bytes, or the path of a file with its weights beside it; in ``precision``. It takes "images"
            (batch, 3, H, W), only the batch free, and puts out one (batch, C).
        sms: compute capabilities, 86 for 8.6. Classic TensorRT builds for the GPU that is here and ignores them.
        max_batch: the largest batch of the engine's one profile, which is tuned for batch 1.

    Raises:
        InputError: TensorRT knows no such compute capability or operator, cannot build it, the model is not in
            ``precision`` or takes or gives other tensors, ``max_batch`` is below 1, or ``folder`` cannot be written.
        CheckError: the written engine is not one that the library reads.
        MissingError: no TensorRT is installed.
    """
    if max_batch < 1:
        raise InputError("max_batch", "needs an integer of at least 1", got=max_batch)
    kind, trt = _library()
    targets = _targets(trt, sms) if kind == "tensorrt-rtx" else (_compute_capability(),)
    start = time.perf_counter()
    plan, takes, (gives, *others), layers = _build(
        trt, onnx_model, precision, max_batch, targets, portable=kind == "tensorrt-rtx"
    )
    seconds = time.perf_counter() - start
    sidecar = Sidecar(
        engine=kind,
        version=trt.__version__,
        sms=targets,
        file=f"{stem}.engine",
        size_bytes=plan.nbytes,
        sha256=hashlib.sha256(plan).hexdigest(),
        source_sha256=_digest(onnx_model),
        input=takes,
        output=gives,
        max_batch=max_batch,
        precision=precision,
        others=tuple(others),
    )
    return _write(trt, plan, sidecar, folder, stem=stem, seconds=seconds, layers=layers)


def export(model: ModelProto, precision: StoredPrecision, folder: Path, options: ExportOptions, task: str) -> Written:
    """Build and write an engine and its side-car; see ``Exporter``, and ``build_engines`` for what it raises."""
    del task
    with readable(model, folder) as source:
        built = build_engines(source, folder, precision=precision, sms=options.sms)
    layers = {"layers_by_output_type": built.layers, "source": "the strongly typed network that was built"}
    return Written([*built.files, "model.engine.json"], built.engine, built.readback.reason, layers)


def _digest(onnx_model: bytes | Path) -> str:
    """Of the model's bytes, or of its file and of those beside it."""
    if isinstance(onnx_model, Path):
        return folder_sha256(onnx_model.parent)
    return hashlib.sha256(onnx_model).hexdigest()


def _write(
    trt: Trt,
    plan: memoryview,
    sidecar: Sidecar,
    folder: Path,
    *,
    stem: str,
    seconds: float,
    layers: Mapping[str, int],
) -> TensorrtBuild:
    """The engine first: a side-car must never name an engine that is not on the disk yet."""
    write_file(folder / sidecar.file, plan)
    told = {name: value for name, value in asdict(sidecar).items() if name != "others"}
    if "." in sidecar.output.name:  # of several heads: names are none that this file may have keys of
        told["others"] = [asdict(each) for each in sidecar.others]
    else:
        told |= {each.name: asdict(each) for each in sidecar.others}
    write_file(folder / f"{stem}.engine.json", canonical_json({"schema": SCHEMA, **told}))
    return TensorrtBuild(
        engine=sidecar.engine,
        version=sidecar.version,
        files=(sidecar.file,),
        sms=sidecar.sms,
        seconds=seconds,
        layers=layers,
        readback=read_back(trt, folder, stem=stem),
    )


def read_back(trt: Trt, folder: Path, *, stem: str = "model") -> Readback:
    """Check the files from the disk: side-car, size, sha256, the plan's container; and open it where a GPU answers.

    Without a driver TensorRT-RTX reads the plan's magic number, its length and its table of sections, then stops at
    the first CUDA call: neither weights, target GPUs nor the release's number in the header are looked at, and
    ``get_engine_validity`` checks only the magic number.

    Raises:
        CheckError: the library refuses the file for another reason than a missing or unsuitable GPU.
        InputError: the files are not what the side-car says.
    """
    sidecar = read_sidecar(folder, stem=stem)
    path = folder / sidecar.file
    verdict = _ask_validity(trt, path) if sidecar.engine == "tensorrt-rtx" else ()
    engine, complaint = deserialize(trt, path, sidecar)
    diagnostics = tuple(dict.fromkeys((*verdict, complaint)))
    if engine is not None:
        return Readback(status="read back", diagnostics=tuple(filter(None, diagnostics)))
    problem = gpu_problem()
    if problem is None:
        problem = ", ".join(sorted(_NOT_THIS_GPU.intersection(verdict))) or None
    elif "cudaError" not in complaint:  # it did not even get as far as looking for a GPU
        problem = None
    if problem is not None:
        reason = f"{problem} here: the engine's bytes and container were read, execution was not run"
        return Readback(status="not_run", reason=reason, diagnostics=diagnostics)
    raise CheckError(str(path), "the library must read the engine that it built", got="; ".join(diagnostics))


def _library() -> tuple[Engine, Trt]:
    """Classic TensorRT where it imports and a GPU answers, else TensorRT-RTX."""
    if gpu_problem() is None:
        try:
            trt: Trt = importlib.import_module(MODULES["tensorrt"])
            trt.Builder(message_log(trt))
        except (
            ImportError,
            OSError,
            TypeError,
        ):  # not here; its libraries are not; a null Builder, as pybind11 says it
            pass
        else:
            return "tensorrt", trt
    return "tensorrt-rtx", require(MODULES["tensorrt-rtx"], extra="tensorrt-rtx", purpose="TensorRT engines")


def _targets(trt: Trt, sms: Sequence[int]) -> tuple[int, ...]:
    offered = {int(member): name for name, member in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if not sms or not set(sms) <= set(offered):
        what = f"TensorRT-RTX {trt.__version__} builds for {', '.join(str(sm) for sm in sorted(offered))}"
        raise InputError(option("sms"), what, got=", ".join(map(str, sms)) or "none", fix="pass some of these")
    return tuple(sorted(set(sms)))


def _compute_capability() -> int:
    """Of GPU 0, 86 for 8.6."""
    cuda, major, minor = Cuda(), ctypes.c_int(), ctypes.c_int()
    try:
        for number, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_* in cuda.h
            cuda.call("cuDeviceGetAttribute", ctypes.byref(number), attribute, cuda.device)
    finally:
        cuda.close()
    return 10 * major.value + minor.value


def _build(
    trt: Trt,
    onnx_model: bytes | Path,
    precision: StoredPrecision,
    max_batch: int,
    targets: Sequence[int],
    *,
    portable: bool,
) -> tuple[memoryview, TensorSpec, tuple[TensorSpec, ...], Mapping[str, int]]:
    """The serialised engine, its input, outputs and layers; ``portable`` is what classic TensorRT cannot be."""
    log = message_log(trt)
    builder = trt.Builder(log)
    log.errors.clear()
    network, parser = _parse(trt, builder, onnx_model)
    takes, gives = _tensors(trt, network, precision)
    layers = _layers(trt, network, precision)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    least, most = (1, *takes.shape[1:]), (max_batch, *takes.shape[1:])
    profile.set_shape(takes.name, least, least, most)
    config.add_optimization_profile(profile)
    config.clear_flag(trt.BuilderFlag.TF32)  # set by default: its 10-bit mantissa is no fp32
    if portable:
        config.num_compute_capabilities = len(targets)
        for index, sm in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    plan = builder.build_serialized_network(network, config)
    del parser  # not before: the network's weights are the parser's memory
    if plan is None:
        what = f"{trt.__name__} {trt.__version__} must build an engine from it"
        fix = "leave out 75: TensorRT-RTX has no fp32 GEMM for Turing" if 75 in targets else _ELSEWHERE
        names = ", ".join(f"SM{sm}" for sm in targets)
        raise InputError("ONNX model for " + names, what, got=(log.errors or ["no message"])[-1], fix=fix)
    return memoryview(plan), takes, gives, layers


def _parse(trt: Trt, builder: Trt, onnx_model: bytes | Path) -> tuple[Trt, Trt]:
    """The network and the parser that owns its weights."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # where it is gone, nothing else is left
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, message_log(trt))
    read = parser.parse if isinstance(onnx_model, bytes) else parser.parse_from_file
    if not read(onnx_model if isinstance(onnx_model, bytes) else str(onnx_model)):
        error = parser.get_error(0)
        operator, node = error.node_operator(), error.node_name()
        where = f"ONNX node {node!r}, operator {operator}" if operator else "ONNX model"
        raise InputError(where, f"{trt.__name__} {trt.__version__} must read it", got=error.desc(), fix=_ELSEWHERE)
    return network, parser


def _tensors(trt: Trt, network: Trt, precision: StoredPrecision) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
    """Input and outputs: fp32, but for pictures and a mask, which are uint8, and the labels of boxes, int32."""
    ports = [network.get_input(index) for index in range(network.num_inputs)]
    ports += [network.get_output(index) for index in range(network.num_outputs)]
    found = [(port.name, tuple(port.shape)) for port in ports]
    takes, gives = found[: network.num_inputs], found[network.num_inputs :]
    free = all(shape[:1] == (-1,) and min(shape[1:], default=0) > 0 for _, shape in found)
    images = [name for name, shape in takes if len(shape) in (4, 5)] == [INPUT]  # or clips with an axis of frames
    one = len(gives) == 1 and len(gives[0][1]) == 2
    if not (free and len(takes) == 1 and images and (one or are_answers([name for name, _ in gives]))):
        needs = "needs one input images (batch, [frames,] 3, H, W) and one output (batch, C), only the batch free"
        raise InputError("ONNX model", needs, got=", ".join(f"{name} {shape}" for name, shape in found))
    made = list[TensorSpec]()
    for port, (name, shape) in zip(ports, found, strict=True):
        takes_pictures = port is ports[0] and port.dtype == trt.uint8
        kind = "uint8" if takes_pictures else output_type(name)
        if port.dtype != getattr(trt, kind):
            told = "fp32" if kind == "float32" else kind
            raise InputError(f"ONNX tensor {name!r}", f"must be {told} in an {precision} engine", got=port.dtype.name)
        made.append(TensorSpec(name=name, dtype=kind, shape=shape))
    return made[0], tuple(made[1:])


def _layers(trt: Trt, network: Trt, precision: StoredPrecision) -> Mapping[str, int]:
    """Layers by the type of their first output, which is what they compute in: the side-car must not lie about it.

    Raises:
        InputError: a layer is of another type than ``precision`` allows, or none has the one that was asked for.
    """
    narrow = {"fp16": {trt.float16}, "int8": {trt.int8}}.get(precision, set())
    allowed = {trt.float32, trt.int32, trt.int64, trt.bool, trt.uint8} | narrow
    counts = Counter[str]()
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        puts_out = [layer.get_output(index) for index in range(layer.num_outputs)]
        for tensor in filter(None, puts_out):  # a loop's layers may leave one out
            if tensor.dtype not in allowed:
                what = f"must be {precision} in an {precision} engine"
                raise InputError(f"ONNX tensor {tensor.name!r}", what, got=tensor.dtype.name, fix="export in fp32")
        counts.update(tensor.dtype.name.lower() for tensor in filter(None, puts_out[:1]))
    if narrow and not any(counts[kind.name.lower()] for kind in narrow):
        raise InputError("ONNX model", f"must have {precision} layers for an {precision} engine", got="none")
    return dict(sorted(counts.items()))


def _ask_validity(trt: Trt, path: Path) -> tuple[str, ...]:
    """TensorRT-RTX's word on the header, VALID, SUBOPTIMAL or INVALID, then its reasons."""
    log = message_log(trt)
    log.errors.clear()
    validity, bits = trt.Runtime(log).get_engine_validity(path.read_bytes())
    names = (name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if bits & int(bit))
    return (validity.name, *names, *log.errors)
