"""ONNX Runtime, on the CPU or another provider: exported models, and a base graph with a task's tensors over it."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnxruntime

from edgepet.device.refusals import refusing_model, require_images_alone
from edgepet.device.runner import check_images
from edgepet.errors import InputError
from edgepet.graphs.base import INPUT, BaseGraph
from edgepet.graphs.tensor_files import lightened, value_of
from edgepet.spec import NpArray, Precision

if TYPE_CHECKING:
    from onnx import ModelProto

Session: TypeAlias = Any  # onnxruntime.InferenceSession: the library says no types of its own

_STATE = vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
# Each code of a status is a class of its own, below Exception.
_REFUSALS: tuple[type[Exception], ...] = (
    *(kind for kind in _STATE if isinstance(kind, type) and issubclass(kind, Exception)), RuntimeError,
)  # fmt: skip
_UNREADABLE: tuple[type[Exception], ...] = (
    *_REFUSALS,
    ValueError,
)  # words of a file that are no UTF-8 are a ValueError
_PACKAGE, CPU, _CUDA = "onnxruntime", "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDERS = {  # the first one that is there
    "cpu": (CPU,),
    "gpu": (_CUDA, "MIGraphXExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider"),
    "npu": ("QNNExecutionProvider", "VitisAIExecutionProvider"),
    "cuda": (_CUDA,),
}
_EXACT = {_CUDA: {"use_tf32": 0}}  # which would round what it multiplies to ten bits
_FOLDER = "session.model_external_initializers_file_folder_path"
# Else the threads of a session that has just run spin for milliseconds while the next one's run: of two sessions of
# EfficientNet-Lite0 that take turns on two cores the one in fp32 takes 1.6 times as long, and alone nothing is gained.
_STOP_SPINNING = "session.force_spinning_stop"
_SAVED = "session.optimized_model_external_initializers"
_DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}  # of slots
_ANY = 32  # pixels of a side of any size
_SILENT = 4  # what ONNX Runtime would log comes back as an error; that nothing reads a tensor is no news
_INT8 = frozenset(
    (
        *("ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention", "QGemm"),
        *("QLinearConv", "QLinearMatMul"),
    )
)
_FLOAT = frozenset(("Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "NhwcFusedConv"))


onnxruntime.disable_telemetry_events()  # nothing of a device's own goes anywhere


def open_session(
    model: Path | bytes,
    *,
    threads: int | None = None,
    tensors: Mapping[str, NpArray] | None = None,
    folder: Path | None = None,
    profile: Path | None = None,
    provider: str = CPU,
    ready: bool = False,
    save: Path | None = None,
) -> Session:
    """An ``onnxruntime.InferenceSession``.

    Args:
        model: an ONNX file, or the bytes of one, whose weights are then inside or in ``folder``.
        threads: None for all cores that this process may use.
        tensors: in place of initializers of the same names, little-endian and C-contiguous. The session reads them
            where they lie: the caller keeps them for as long as it runs. They go through
            ``add_external_initializers``: ``add_initializer`` is silently ignored for a weight whose consumer is folded
            when the session is made.
        profile: what the name of a file of events begins with, which ``end_profiling`` writes.
        provider: what runs all that it can; the CPU runs the rest.
        ready: it was saved by another session, and is opened as it is.
        save: a file for the graph as it is made ready, with its weights in ``save.with_suffix(".bin")``, not in the
            form that they are multiplied in: ONNX Runtime 1.32 opens those no faster, and they take twice the bytes.

    Raises:
        InputError: ONNX Runtime refuses the model, a tensor in place of one of its own, or the provider.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.add_session_config_entry(_STOP_SPINNING, "1")
    options.intra_op_num_threads = _own_cores() if threads is None else threads
    if threads is not None:
        options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if ready:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
        for key, value in (("file_name", save.with_suffix(".bin").name), ("min_size_in_bytes", "1024")):
            options.add_session_config_entry(f"{_SAVED}_{key}", value)
    if folder is not None:
        options.add_session_config_entry(_FOLDER, str(folder))
    source, where = (model, "ONNX model") if isinstance(model, bytes) else (str(model), str(model))
    if tensors:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for tensor in tensors.values()]
        options.add_external_initializers(list(tensors), values)
    what, copied = "cannot be opened by ONNX Runtime", not isinstance(model, bytes)
    with refusing_model(where, what, _UNREADABLE, package=_PACKAGE, copied=copied):
        # without the library's fallback, which prints and tries the same provider again
        providers = [CPU] if provider == CPU else [(provider, _EXACT.get(provider, {})), CPU]
        session = onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
    if provider not in session.get_providers():
        what = "does not start on this machine"
        raise InputError(provider, what, fix="install its driver and libraries, or run on the CPU")
    return session


def _own_cores() -> int:
    """The cores that this process may use, where those are not all; else 0, which has ONNX Runtime count them.

    It counts all of the machine and binds a thread to each, also to those that the process was kept from.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return own if own < (os.cpu_count() or 1) else 0


def devices() -> dict[str, str]:
    """Providers of this ONNX Runtime by our names of devices: "cpu", and those of "gpu", "npu", "cuda" that it has.

    Whether the machine has what a provider needs shows when a session is made.
    """
    here = onnxruntime.get_available_providers()
    found = {name: next((each for each in able if each in here), None) for name, able in _PROVIDERS.items()}
    return {name: provider for name, provider in found.items() if provider is not None}


def running(where: str) -> AbstractContextManager[None]:
    """What ONNX Runtime refuses while it runs becomes an ``InputError`` with this place."""
    return refusing_model(where, "cannot be run by ONNX Runtime", _REFUSALS, package=_PACKAGE)


class ModelSession:
    """A session on a model in memory, which reads the model's tensors where they lie."""

    def __init__(self, session: Session, held: object) -> None:
        self._session, self._held = session, held

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, NpArray]) -> list[NpArray]:
        """The values named ``outputs``, or all outputs of the model, for these inputs."""
        with running("ONNX model"):
            values: list[NpArray] = self._session.run(outputs, feed)
        return values


def open_model(model: ModelProto, puts_out: Iterable[str] | None = None) -> ModelSession:
    """Open an ``onnx.ModelProto`` of any size: beyond 2 GiB protobuf makes no bytes of one.

    Args:
        puts_out: names of tensors inside of it, which it puts out in place of its own outputs.

    Raises:
        InputError: as ``open_session``.
    """
    read = {name for node in model.graph.node for name in node.input}  # it knows no others by name
    light, outside = lightened(model, "memory", only=read)
    if puts_out is not None:
        del light.graph.output[:]
        for name in puts_out:
            light.graph.output.add(name=name)
    tensors = {tensor.name: value_of(tensor) for tensor in outside}
    return ModelSession(open_session(light.SerializeToString(), tensors=tensors), tensors)


class OnnxRuntime:
    """One session, images to features or logits; a context manager.

    ``executed`` is fp32 of an int8 model too: ``evidence`` counts what ran.
    """

    runtime = "onnxruntime"

    def __init__(self, session: Session, *, where: str, path: Path | None = None, held: object = None) -> None:
        # ``held``: the session reads the arrays of replaced initializers where they lie, for as long as it lives.
        self._session, self._where, self._held = session, where, held
        require_images_alone([entry.name for entry in session.get_inputs()], where=where)
        (entry,) = session.get_inputs()
        self._shape = tuple(side if isinstance(side, int) else None for side in entry.shape)
        self.executed: Precision = "fp32"
        self._entry, self._path, self._names = entry, path, [each.name for each in session.get_outputs()]
        self._dtype = "uint8" if entry.type == "tensor(uint8)" else "float32"

    @property
    def evidence(self) -> Mapping[str, object]:
        """Providers, and of an exported model, from a profile of one run, how many nodes ran on inputs of each type and
        how many layers multiplied int8 codes or floats.
        """
        asked: dict[str, object] = {"input": self._entry.type, "providers": self._session.get_providers()}
        return asked if self._path is None else {**asked, **profiled(self._path, self._shape, self._dtype)}

    @classmethod
    def of_model(cls, path: Path, *, threads: int | None = None, provider: str = CPU) -> OnnxRuntime:
        """Open an exported ONNX file.

        Raises:
            InputError: it is not a model that this ONNX Runtime reads.
        """
        return cls(open_session(path, threads=threads, provider=provider), where=str(path), path=path)

    @classmethod
    def of_graph(
        cls, graph: BaseGraph, tensors: Mapping[str, NpArray], *, threads: int | None = None, provider: str = CPU
    ) -> OnnxRuntime:
        """Open ``graph`` with ``tensors`` in place of the backbone's; all others are read from its files.

        ``tensors`` are read where they lie: they must stay as they are while it is open.

        Raises:
            InputError: ONNX Runtime cannot open the graph with them.
        """
        held = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
        session = open_session(graph.model_path, threads=threads, tensors=held, provider=provider)
        return cls(session, where=graph.backbone, held=held)

    def __call__(self, images: NpArray) -> NpArray:
        return self._run(images, self._names[:1])[0]

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that it puts out."""
        return self._run(images, self._names)

    def _run(self, images: NpArray, names: list[str]) -> list[NpArray]:
        check_images(images, self._shape, where=self._where, dtype=self._dtype)
        with running(self._where):
            values: list[NpArray] = self._session.run(names, {INPUT: images})
        return values

    def close(self) -> None:
        """Give the session back."""
        self._session = self._held = None

    def __enter__(self) -> OnnxRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def profiled(
    path: Path | bytes, shape: tuple[int | None, ...], dtype: str = "float32", *, reads: str = INPUT,
    folder: Path | None = None,
) -> dict[str, object]:  # fmt: skip
    """Nodes that ran, by the type of their first input: ONNX Runtime casts what it has no kernel for, and says so."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(path, profile=Path(scratch) / "profile", folder=folder)
        feed = {
            entry.name: np.ones([side if isinstance(side, int) else 1 for side in entry.shape], _DTYPES[entry.type])
            for entry in session.get_inputs()
            if entry.name != reads
        }
        images = np.zeros([1, *(side or _ANY for side in shape[1:])], dtype)
        session.run(None, feed | {reads: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    kinds, layers = Counter[str](), Counter[str]()
    for event in events:
        types = event.get("args", {}).get("input_type_shape")
        if types and event["name"].endswith("_kernel_time"):
            kinds[next(iter(types[0]))] += 1
            operator = event["args"]["op_name"]
            if operator in _INT8 or operator in _FLOAT:
                layers["int8" if operator in _INT8 else "float"] += 1
    return {"executed_nodes": dict(sorted(kinds.items())), "layers": dict(sorted(layers.items()))}
