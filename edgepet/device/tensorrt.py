"""Run a TensorRT engine, and read the side-car that says what the engine is.

The engine file is what the builder serialised: a header of ours would break trtexec and Triton (ultralytics #15025,
#22910). The GPU is driven through libcuda, which every CUDA driver brings: no cuda-python, no libcudart.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from edgepet.canonical import parse_json
from edgepet.device.runner import check_images
from edgepet.errors import InputError, MissingError, require
from edgepet.files import read_file
from edgepet.spec import NpArray, Precision, StoredPrecision
from edgepet.strict import ObjectReader

Engine: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]  # also the names of the extras
Trt: TypeAlias = Any  # one of these modules, or an object of it: they say no types
MODULES: dict[Engine, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
SCHEMA = 1
_ANY = (2, 3, 4)  # axes of what a head gives


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or output of the engine; -1 in ``shape`` is the free batch axis, always the first."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """All that ``model.engine.json`` says; docs/spec/artifact-v1.md is its format.

    ``version`` is the library's. ``sms`` are the compute capabilities built for (86 is 8.6). ``size_bytes`` and
    ``sha256`` are the engine's, ``source_sha256`` is of the ONNX model that it was built from. ``max_batch`` counts
    images. ``others`` are what it puts out beside ``output``: the mask, or boxes, scores and labels.
    """

    engine: Engine
    version: str
    sms: tuple[int, ...]
    file: str
    size_bytes: int
    sha256: str
    source_sha256: str
    input: TensorSpec
    output: TensorSpec
    max_batch: int
    precision: StoredPrecision
    others: tuple[TensorSpec, ...] = ()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All that it puts out."""
        return (self.output, *self.others)


def read_sidecar(folder: Path, *, stem: str = "model") -> Sidecar:
    """Read ``STEM.engine.json`` strictly and compare the engine's size and sha256 with it; no library, no GPU.

    Raises:
        InputError: a file cannot be read, a key is missing, unknown or of a wrong type, or the engine is not the file
            that it describes.
    """
    path = folder / f"{stem}.engine.json"
    try:
        value = parse_json(read_file(path))
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), "needs to be JSON", got=str(error)) from error
    table = ObjectReader(value, str(path), error=InputError)
    if (schema := table.integer("schema")) != SCHEMA:
        raise InputError(table.where + ".schema", f"needs {SCHEMA}", got=schema, fix="export the task again")
    sidecar = Sidecar(
        engine=cast(Engine, table.text("engine", choices=tuple(MODULES))),
        version=table.text("version"),
        sms=table.integers("sms", least=1),
        file=table.text("file", choices=(f"{stem}.engine",)),
        size_bytes=table.integer("size_bytes", least=1),
        sha256=table.text("sha256"),
        source_sha256=table.text("source_sha256"),
        input=_read_tensor(table.nested("input"), ranks=(4, 5), dtypes=("float32", "uint8")),
        output=_read_tensor(table.nested("output"), ranks=_output_ranks(table)),
        max_batch=table.integer("max_batch", least=1),
        precision=cast(StoredPrecision, table.text("precision", choices=("fp32", "fp16", "int8"))),
        others=_read_others(table),
    )
    table.end()
    if not sidecar.sms:
        raise InputError(table.where + ".sms", "needs one compute capability at least")
    data = read_file(folder / sidecar.file)
    wanted = f"{sidecar.size_bytes} bytes, sha256 {sidecar.sha256}"
    found = f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"
    if found != wanted:
        raise InputError(str(folder / sidecar.file), f"needs {wanted}", got=found, fix="copy the exported engine again")
    return sidecar


def gpu_problem() -> str | None:
    """None where a CUDA driver and a device answer, else what is here instead, in words."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver"
    if code := cuda.cuInit(0):
        return f"a CUDA driver that does not start (cuInit: error {code})"
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "a CUDA driver without a GPU"
    return None


@cache  # while any TensorRT object lives, the library ignores every logger but the first
def message_log(trt: Trt) -> Trt:
    """The process's one logger for ``trt``: prints nothing, keeps errors as texts in its list ``errors``."""

    def log(self: Trt, severity: object, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)

    return type("MessageLog", (trt.ILogger,), {"log": log, "errors": []})()


def deserialize(trt: Trt, path: Path, sidecar: Sidecar) -> tuple[Trt, str]:
    """The engine and no complaint, or None and the library's first complaint: those behind it are its echo.

    Raises:
        InputError: its tensors are not what the side-car says, and device buffers are sized from the side-car.
    """
    log = message_log(trt)
    log.errors.clear()
    engine = trt.Runtime(log).deserialize_cuda_engine(read_file(path))
    if engine is None:
        return None, next(iter(log.errors), "no message")
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    kinds = {trt.float32: "float32", trt.uint8: "uint8"}
    found = {n: (tuple(engine.get_tensor_shape(n)), kinds.get(engine.get_tensor_dtype(n), "other")) for n in names}
    wanted = {tensor.name: (tensor.shape, tensor.dtype) for tensor in (sidecar.input, *sidecar.outputs)}
    if found != wanted:
        raise InputError(str(path), f"needs (shape, type) to be {wanted}", got=found)
    return engine, ""


class Cuda:
    """GPU 0, once ``gpu_problem`` has found none; in the primary context, as the CUDA runtime inside TensorRT is."""

    def __init__(self) -> None:
        self._library, self._memory = ctypes.CDLL("libcuda.so.1"), list[ctypes.c_uint64]()
        self.device, context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(self.device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)
        # Flag 0: the stream waits for the legacy stream, in which cuMemcpy may still be moving a pageable array.
        self.call("cuStreamCreate", ctypes.byref(self.stream), 0)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of libcuda.

        Raises:
            InputError: it did not succeed.
        """
        if code := getattr(self._library, name)(*arguments):
            raise InputError("GPU 0", f"{name} must succeed", got=f"CUDA error {code}")

    def allocate(self, size_bytes: int) -> ctypes.c_uint64:
        """The address of so much memory on the device, which ``close`` gives back.

        Raises:
            InputError: the device has not so much left.
        """
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        self._memory.append(address)
        return address

    def close(self) -> None:
        """Give memory, stream and context back."""
        while self._memory:
            self.call("cuMemFree_v2", self._memory.pop())
        self.call("cuStreamDestroy_v2", self.stream)
        self.call("cuDevicePrimaryCtxRelease_v2", self.device)


class TensorrtRunner:
    """An engine on GPU 0. The first call of a TensorRT-RTX engine compiles its kernels for this GPU: up to 30 s.

    Raises:
        InputError: the GPU has too little memory for it.
    """

    runtime = "tensorrt"

    def __init__(self, sidecar: Sidecar, engine: Trt, cuda: Cuda, *, where: str) -> None:
        self._sidecar, self._cuda, self._where = sidecar, cuda, where
        # By construction, not by measurement: edgepet builds typed networks only, and with TF32 off.
        self.executed: Precision = sidecar.precision
        self.evidence: Mapping[str, object] = {"network": "strongly typed, TF32 off", "built_by": sidecar.version}
        self._context: Trt = engine.create_execution_context()
        if self._context is None:
            raise InputError(where, "TensorRT must make an execution context", fix="free some GPU memory")
        self._places = dict[str, ctypes.c_uint64]()
        for tensor in (sidecar.input, *sidecar.outputs):
            image_bytes = np.dtype(tensor.dtype).itemsize * math.prod(tensor.shape[1:])
            self._places[tensor.name] = cuda.allocate(sidecar.max_batch * image_bytes)
            self._context.set_tensor_address(tensor.name, self._places[tensor.name].value)

    def __call__(self, images: NpArray) -> NpArray:
        """Logits (n, C) of float32 ``images`` (n, 3, H, W), in as many runs of at most ``max_batch`` as it takes.

        Clips are (n, frames, 3, H, W), pictures uint8 (n, H, W, 3) where the engine takes those, and logits of masks
        (n, C, h, w).

        Raises:
            InputError: another dtype or image size, or a run that TensorRT or CUDA did not finish.
        """
        return self.outputs(images)[0]

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that it puts out: beside logits the mask, uint8 (n, H, W), or what is found; else as for calling it."""
        takes, gives, step = self._sidecar.input, self._sidecar.outputs, self._sidecar.max_batch
        check_images(images, (None, *takes.shape[1:]), where=self._where, dtype=takes.dtype)
        cuda, context, pointer = self._cuda, self._context, ctypes.c_void_p
        made = [np.empty((len(images), *tensor.shape[1:]), tensor.dtype) for tensor in gives]
        for start in range(0, len(images), step):
            batch, place = np.ascontiguousarray(images[start : start + step]), self._places[takes.name]
            cuda.call("cuMemcpyHtoD_v2", place, batch.ctypes.data_as(pointer), ctypes.c_size_t(batch.nbytes))
            if not (context.set_input_shape(takes.name, batch.shape) and context.execute_async_v3(cuda.stream.value)):
                raise InputError(self._where, "TensorRT must run the batch", got=f"a refusal of {batch.shape}")
            cuda.call("cuStreamSynchronize", cuda.stream)
            for tensor, whole in zip(gives, made, strict=True):
                part, place = whole[start : start + step], self._places[tensor.name]
                cuda.call("cuMemcpyDtoH_v2", part.ctypes.data_as(pointer), place, ctypes.c_size_t(part.nbytes))
        return made

    def close(self) -> None:
        """Give the device memory back; a second call does nothing."""
        if self._context is not None:
            self._context = None  # before the memory that it reads and writes
            self._cuda.close()


def open_engine(folder: Path, *, stem: str = "model") -> TensorrtRunner:
    """Open the engine of an artefact folder on GPU 0; side-car, digest and release are checked first.

    Raises:
        InputError: side-car or engine are not what they should be, or another release of the library built them.
        MissingError: the library is not installed, or there is no GPU that this engine runs on.
    """
    sidecar = read_sidecar(folder, stem=stem)
    path, kind, version = folder / sidecar.file, sidecar.engine, sidecar.version
    trt: Trt = require(MODULES[kind], extra=kind, purpose="TensorRT engines")
    if trt.__version__ != version:  # no release of RTX opens another's engines
        fix = f"pip install '{kind}=={version}', or export the task again with the release installed here"
        raise InputError(str(path), f"opens in {kind} {version} only", got=trt.__version__, fix=fix)
    *others, last = (f"{sm // 10}.{sm % 10}" for sm in sidecar.sms)
    needs = "needs an NVIDIA GPU with compute capability " + (f"{', '.join(others)} or {last}" if others else last)
    fix = "run it on the device; ONNX and OpenVINO artefacts run on a CPU"
    if problem := gpu_problem():
        raise MissingError(str(path), needs, got=problem, fix=fix)
    with ExitStack() as undo:
        cuda = Cuda()
        undo.callback(cuda.close)
        engine, complaint = deserialize(trt, path, sidecar)
        if engine is None:  # the right bytes for this release: only the GPU or its driver is left to blame
            raise MissingError(str(path), needs, got=complaint, fix=fix)
        runner = TensorrtRunner(sidecar, engine, cuda, where=str(path))
        undo.pop_all()
    return runner


def _output_ranks(table: ObjectReader) -> tuple[int, ...]:
    """Of the first output: of several heads any, of boxes 3."""
    if table.has("others"):
        return _ANY
    return (3,) if table.has("boxes") else (2, 4)


def _read_others(table: ObjectReader) -> tuple[TensorSpec, ...]:
    """What an engine puts out beside its first output, in its order."""
    if table.has("others"):
        kinds = ("float32", "uint8", "int32")
        return tuple(_read_tensor(each, ranks=_ANY, dtypes=kinds) for each in table.nested_list("others"))
    if table.has("mask"):
        return (_read_tensor(table.nested("mask"), ranks=(3,), dtypes=("uint8",)),)
    if not table.has("boxes"):
        return (_read_tensor(table.nested("scores"), ranks=(2,)),) if table.has("scores") else ()
    boxes = _read_tensor(table.nested("boxes"), ranks=(3,))
    labels = _read_tensor(table.nested("labels"), ranks=(2,), dtypes=("int32",))
    return (boxes, _read_tensor(table.nested("scores"), ranks=(2,)), labels)


def _read_tensor(table: ObjectReader, *, ranks: tuple[int, ...], dtypes: tuple[str, ...] = ("float32",)) -> TensorSpec:
    name, shape = table.text("name"), table.integers("shape", least=-1)
    dtype = table.text("dtype", choices=dtypes)
    table.end()
    if len(shape) not in ranks or shape[0] != -1 or min(shape[1:]) < 1:
        needs = f"needs -1 and {' or '.join(str(rank - 1) for rank in ranks)} sizes"
        raise InputError(table.where + ".shape", needs, got=list(shape))
    return TensorSpec(name=name, dtype=dtype, shape=shape)
