"""A row for each runtime: what it brings, what runs on it, and how it is opened. To add one, add its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from edgepet.device.runner import HeadRunner, ModelRunner, PartRunner, Runner, SharedRunner
from edgepet.errors import InputError, option
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.onnx_file import OnnxFile
from edgepet.graphs.parts import Part
from edgepet.measuring.machine import TORCH, Engine
from edgepet.spec import NpArray, Precision, Tensors

Format: TypeAlias = Literal["onnx", "openvino", "tensorrt"]

DEVICES = ("cpu", "gpu", "npu", "cuda")

_ModelOpener: TypeAlias = Callable[[Path, "int | None", Precision, str], ModelRunner]
_GraphOpener: TypeAlias = Callable[[BaseGraph, Tensors, "int | None", Precision, str], Runner]
_PartOpener: TypeAlias = Callable[[Part, Tensors, "int | None", str], PartRunner]
_HeadOpener: TypeAlias = Callable[[OnnxFile, "int | None", str], HeadRunner]
_KeptOpener: TypeAlias = Callable[[BaseGraph, str, Callable[[], Tensors], Path, "int | None"], Runner]
_Int8Opener: TypeAlias = Callable[[Int8Graph, "int | None", Mapping[str, NpArray], "Path | None", str], SharedRunner]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One runtime.

    ``format`` is that of the artefacts which run on it, ``engines`` are the packages of which one must be there.
    ``computes`` are the precisions in which it can compute a model of floats, the exact one first. The openers take
    threads, None for all cores, and one of these precisions: ``open_model`` an artefact's folder; ``open_graph`` a
    traced backbone and the tensors that stand in place of its own; ``open_int8`` the int8 backbone, codes that
    stand in place of its own, and a store whose cache may hold what the runtime derives; ``open_part`` a stretch of
    either and tensors in place of its own, in fp32 or on codes; ``open_head`` the graph of a head that reads maps. The
    last four openers are None where an engine holds its own weights. Each takes last what the runtime calls the device,
    the row's own ``where``. ``open_kept`` opens a graph on the CPU with tensors of a pack, given by its digest and what
    folds them, so that a store keeps the network; it is None where that gains nothing.

    ``devices`` are what this machine has of ``DEVICES``, and how the runtime calls them. The first one is where the row
    runs unless it is ``on`` another ``device``.
    """

    name: str
    format: Format
    engines: tuple[Engine, ...]
    computes: tuple[Precision, ...]
    devices: Callable[[], Mapping[str, str]]
    where: str
    open_model: _ModelOpener
    device: str = "cpu"
    open_graph: _GraphOpener | None = None
    open_int8: _Int8Opener | None = None
    open_part: _PartOpener | None = None
    open_head: _HeadOpener | None = None
    open_kept: _KeptOpener | None = None

    @property
    def shares_backbone(self) -> bool:
        """Whether every task runs from one folder with one backbone."""
        return self.open_graph is not None

    @property
    def place(self) -> str:
        """The runtime, with the device where that is not its usual one: where a pack may be served or not."""
        usual = self.device == RUNTIMES[self.name].device
        return self.name if usual else f"{self.name} {self.device}"

    def on(self, device: str | None) -> Runtime:
        """The row for another device; None leaves it.

        Raises:
            InputError: this machine has none that the runtime could run on.
            MissingError: the runtime is not installed.
        """
        if device is None or device == self.device:
            return self
        here = self.devices()
        if device not in here:
            what = f"is none that {self.name} has on this machine"
            raise InputError(option("device"), what, got=repr(device), fix=f"use one of: {', '.join(here)}")
        return replace(self, device=device, where=here[device])


# A runtime is imported when it is first opened: each takes a part of a second, and none has to be installed.


def _onnxruntime_devices() -> Mapping[str, str]:
    from edgepet.device.onnxruntime import devices

    return devices()


def _onnxruntime_model(folder: Path, threads: int | None, precision: Precision, where: str) -> ModelRunner:
    from edgepet.device.onnxruntime import OnnxRuntime

    del precision  # it computes what the file says
    return OnnxRuntime.of_model(folder / "model.onnx", threads=threads, provider=where)


def _onnxruntime_graph(
    graph: BaseGraph, tensors: Tensors, threads: int | None, precision: Precision, where: str
) -> Runner:
    from edgepet.device.onnxruntime import OnnxRuntime

    del precision
    return OnnxRuntime.of_graph(graph, tensors, threads=threads, provider=where)


def _onnxruntime_int8(
    graph: Int8Graph, threads: int | None, codes: Mapping[str, NpArray], store: Path | None, where: str
) -> SharedRunner:
    from edgepet.device.onnxruntime_shared import SharedOnnxRuntime

    del store  # its file is what it would keep
    return SharedOnnxRuntime(graph, threads=threads, codes=codes, provider=where)


def _onnxruntime_part(part: Part, tensors: Tensors, threads: int | None, where: str) -> PartRunner:
    from edgepet.device.onnxruntime_shared import OnnxRuntimePart

    return OnnxRuntimePart(part, tensors, threads=threads, provider=where)


def _onnxruntime_head(file: OnnxFile, threads: int | None, where: str) -> HeadRunner:
    from edgepet.device.onnxruntime_head import OnnxRuntimeHead

    return OnnxRuntimeHead(file, threads=threads, provider=where)


def _onnxruntime_kept(
    graph: BaseGraph, pack_sha256: str, fold: Callable[[], Tensors], root: Path, threads: int | None
) -> Runner:
    from edgepet.device.onnxruntime_kept import open_kept

    return open_kept(graph, pack_sha256, fold, root, threads=threads)


def _openvino_devices() -> Mapping[str, str]:
    from edgepet.device.openvino import devices

    return devices()


def _openvino_model(folder: Path, threads: int | None, precision: Precision, where: str) -> ModelRunner:
    from edgepet.device.openvino import OpenVino

    return OpenVino.of_model(folder / "model.xml", threads=threads, precision=precision, device=where)


def _openvino_graph(
    graph: BaseGraph, tensors: Tensors, threads: int | None, precision: Precision, where: str
) -> Runner:
    from edgepet.device.openvino import OpenVino

    return OpenVino.of_graph(graph, tensors, threads=threads, precision=precision, device=where)


def _openvino_int8(
    graph: Int8Graph, threads: int | None, codes: Mapping[str, NpArray], store: Path | None, where: str
) -> SharedRunner:
    from edgepet.device.openvino import SharedOpenVino

    return SharedOpenVino(graph, threads=threads, codes=codes, store=store, device=where)


def _openvino_part(part: Part, tensors: Tensors, threads: int | None, where: str) -> PartRunner:
    from edgepet.device.openvino import OpenVinoPart

    return OpenVinoPart(part, tensors, threads=threads, device=where)


def _openvino_head(file: OnnxFile, threads: int | None, where: str) -> HeadRunner:
    from edgepet.device.openvino_head import OpenVinoHead

    return OpenVinoHead(file, threads=threads, device=where)


def _tensorrt_devices() -> Mapping[str, str]:
    return {"gpu": "", "cuda": ""}


def _tensorrt_model(folder: Path, threads: int | None, precision: Precision, where: str) -> ModelRunner:
    from edgepet.device.tensorrt import open_engine

    del threads, precision, where  # a GPU's, and the engine's own
    return open_engine(folder)


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(
        name="onnxruntime",
        format="onnx",
        engines=(Engine(name="onnxruntime", module="onnxruntime"),),
        computes=("fp32",),
        devices=_onnxruntime_devices,
        where="CPUExecutionProvider",
        open_model=_onnxruntime_model,
        open_graph=_onnxruntime_graph,
        open_int8=_onnxruntime_int8,
        open_part=_onnxruntime_part,
        open_head=_onnxruntime_head,
        open_kept=_onnxruntime_kept,
    ),
    "openvino": Runtime(
        name="openvino",
        format="openvino",
        engines=(Engine(name="openvino", module="openvino", extra="openvino"),),
        computes=("fp32", "bf16"),
        devices=_openvino_devices,
        where="CPU",
        open_model=_openvino_model,
        open_graph=_openvino_graph,
        open_int8=_openvino_int8,
        open_part=_openvino_part,
        open_head=_openvino_head,
    ),
    "tensorrt": Runtime(
        name="tensorrt",
        format="tensorrt",
        engines=(
            # `pip install tensorrt` may end well and leave no libraries: NVIDIA/TensorRT issue #3936.
            Engine(
                name="tensorrt",
                module="tensorrt",
                extra="tensorrt",
                broken="the package is a Python face only, and NVIDIA's libraries are missing: "
                "install them as NVIDIA's TensorRT installation guide says",
            ),
            Engine(name="tensorrt-rtx", module="tensorrt_rtx", extra="tensorrt-rtx"),
        ),
        computes=("fp32",),
        devices=_tensorrt_devices,
        where="",
        device="gpu",
        open_model=_tensorrt_model,
    ),
}

DEFAULT = "onnxruntime"  # the one that every installation has
SHARED_RUNTIMES = tuple(name for name, row in RUNTIMES.items() if row.shares_backbone)
ENGINES: tuple[Engine, ...] = (*(engine for row in RUNTIMES.values() for engine in row.engines), TORCH)
FORMATS: dict[Format, Runtime] = {row.format: row for row in RUNTIMES.values()}


def shared_runtime(runtime: str | Runtime, *, purpose: str, device: str | None = None) -> Runtime:
    """The row of a runtime that can run every task on one backbone, a row itself as it is; on ``device`` if given.

    Raises:
        InputError: no runtime of this name can; the message says for what (``purpose``). Or as ``Runtime.on``.
        MissingError: a device is asked for and the runtime is not installed.
    """
    row = runtime if isinstance(runtime, Runtime) else RUNTIMES.get(runtime)
    if row is None or not row.shares_backbone:
        raise InputError(option("runtime"), f"is one of {', '.join(SHARED_RUNTIMES)} for {purpose}", got=repr(runtime))
    return row.on(device)
