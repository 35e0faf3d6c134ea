"""OpenVINO, by default on the CPU. The precision that runs is set here and read back: on AMX its own is bf16."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from edgepet.canonical import canonical_json, parse_json
from edgepet.device.caches import derived
from edgepet.device.openvino_slots import Order, stateful
from edgepet.device.refusals import refusing_model, require_images_alone
from edgepet.device.runner import check_images, require_slots
from edgepet.errors import InputError, require
from edgepet.graphs.base import INPUT, BaseGraph
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.map_slots import in_form
from edgepet.graphs.onnx_file import port
from edgepet.graphs.parts import Part
from edgepet.graphs.slots import Slots
from edgepet.measuring.machine import environment
from edgepet.spec import NpArray, Precision, Tensors

_OpenVino: TypeAlias = Any  # the module, or an object of it: it says no types
_TYPES: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's own words
_PRECISIONS: dict[str, Precision] = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
_CPU = "CPU"
_NOT_RUN = "cannot be run by OpenVINO"
_LAYERS = frozenset(("Convolution", "FullyConnected", "MatMul"))


class OpenVino:
    """One compiled model and one request, images to features or logits; a context manager."""

    runtime = "openvino"

    def __init__(
        self, model: _OpenVino, *, where: str, threads: int | None, precision: Precision, device: str = _CPU
    ) -> None:
        takes = [INPUT if INPUT in port.names else min(port.names, default="a nameless one") for port in model.inputs]
        require_images_alone(takes, where=where)
        compiled = compile_model(model, threads, precision, device, where=where)
        self._request, self._where = compiled.create_infer_request(), where
        self._shape = tuple(None if side.is_dynamic else side.get_length() for side in compiled.input(0).partial_shape)
        self._dtype = "uint8" if compiled.input(0).element_type.get_type_name() == "u8" else "float32"
        self._hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.executed = _PRECISIONS[self._hint]
        self._compiled = compiled

    @property
    def evidence(self) -> Mapping[str, object]:
        """How many nodes of the executed graph ran in each precision, and how many layers on int8 codes or floats."""
        return {"hint": self._hint, **_executed(self._compiled)}

    @classmethod
    def of_model(
        cls, path: Path, *, threads: int | None = None, precision: Precision = "fp32", device: str = _CPU
    ) -> OpenVino:
        """Open an exported IR (``.xml``) or ONNX file, to compute what is float in it in "fp32" or "bf16".

        Raises:
            InputError: it is not a model that this OpenVINO reads.
            MissingError: OpenVINO is not installed.
        """
        return cls(_read(path), where=str(path), threads=threads, precision=precision, device=device)

    @classmethod
    def of_graph(cls, graph: BaseGraph, tensors: Mapping[str, NpArray], *, threads: int | None = None,
                 precision: Precision = "fp32", device: str = _CPU) -> OpenVino:  # fmt: skip
        """Open ``graph`` with ``tensors`` in place of the backbone's constants of the same names.

        Raises:
            InputError: it is not a graph that this OpenVINO reads, or has no constant of such a name.
            MissingError: OpenVINO is not installed.
        """
        model = _with_constants(_read(graph.model_path), tensors, graph.model_path)
        return cls(model, where=graph.backbone, threads=threads, precision=precision, device=device)

    def __call__(self, images: NpArray) -> NpArray:
        return self.outputs(images)[0]

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that it puts out."""
        check_images(images, self._shape, where=self._where, dtype=self._dtype)
        with refusing_openvino(self._where, _NOT_RUN):
            result = self._request.infer({INPUT: images}, share_inputs=True)
            return [result[place].copy() for place in range(len(result))]

    def close(self) -> None:
        """Give the compiled model back."""
        self._request = self._compiled = None

    def __enter__(self) -> OpenVino:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SharedOpenVino:
    """One compiled int8 backbone whose slots are a state variable; every task is a request with its own state.

    ``codes`` are one task's own in place of the file's, as ``Slots.codes``: a network compiled with them is that
    task's alone. ``store``: its cache keeps what was compiled without such codes.

    Raises:
        InputError: it is not a graph that this OpenVINO reads, or has no constant of such a name.
        MissingError: OpenVINO is not installed.
    """

    runtime = "openvino"

    def __init__(
        self,
        graph: Int8Graph,
        *,
        threads: int | None = None,
        codes: Mapping[str, NpArray] | None = None,
        store: Path | None = None,
        device: str = _CPU,
    ) -> None:
        if store is None or codes:
            self._compiled, self._order = _compiled_int8(graph, threads, codes or {}, device)
        else:
            self._compiled, self._order = _kept_int8(graph, threads, store, device)
        self._graph, self._shape = graph, graph.preprocess.input_shape

    @property
    def own_bytes(self) -> int:
        """None beside its slots."""
        return 0

    def bind(self, slots: Slots, *, light: bool = False) -> BoundOpenVino:
        """A task, ready to run: a request of its own, whose state is its slots. It is ``light`` as it is."""
        del light
        return BoundOpenVino(
            self._compiled,
            in_form(self._graph, slots, self.runtime),
            self._order,
            reads=INPUT,
            shape=self._shape,
            executed="int8",
        )

    def close(self) -> None:
        """Give the compiled network back, once no bound task runs any more."""
        self._compiled = None


class OpenVinoPart:
    """One compiled stretch of a graph, with ``tensors`` in place of its own; its slots are a state variable.

    Raises:
        InputError: it is not a graph that this OpenVINO reads.
        MissingError: OpenVINO is not installed.
    """

    runtime = "openvino"

    def __init__(
        self, part: Part, tensors: Tensors, *, threads: int | None = None, precision: Precision = "fp32",
        device: str = _CPU,
    ) -> None:  # fmt: skip
        model, order = _with_tensors(part, tensors), Order()
        if part.slots:
            model, order = stateful(model, part.reads)
        self._order = order
        self._compiled, self._part = compile_model(model, threads, precision, device, where=part.reads), part

    def bind(self, values: Mapping[str, NpArray]) -> BoundOpenVino:
        """Ready to run: a request of its own, whose state is these slots."""
        part = self._part
        return BoundOpenVino(
            self._compiled, values, self._order, reads=part.reads, shape=part.shape, executed=part.precision
        )

    def close(self) -> None:
        """Give the compiled stretch back, once nothing that is bound runs any more."""
        self._compiled = None


class BoundOpenVino:
    """One request with its slots, n images or maps to its first output; closing it leaves the compiled network open."""

    runtime = "openvino"

    def __init__(
        self, compiled: _OpenVino, slots: Mapping[str, NpArray], order: Order, *, reads: str,
        shape: tuple[int, ...], executed: Precision,
    ) -> None:  # fmt: skip
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self._reads, self._shape, self.executed = reads, (None, *shape), executed
        self._lock = threading.Lock()  # a request runs one call
        inputs = {port.get_any_name(): port.get_partial_shape() for port in compiled.inputs}
        beside = {
            name: [side.get_length() if side.is_static else None for side in shape]
            for name, shape in inputs.items()
            if name != reads
        }
        require_slots({**order, **beside}, slots)
        for state in self._request.query_state():
            state.state = _openvino().Tensor(np.concatenate([slots[name].ravel() for name in order]))
        for name in beside:
            self._request.set_tensor(name, _openvino().Tensor(np.array(slots[name])))

    @property
    def evidence(self) -> Mapping[str, object]:
        """That of the compiled network, which all tasks share."""
        return _executed(self._compiled)

    def __call__(self, images: NpArray) -> NpArray:
        return self.outputs(images)[0]

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that it puts out."""
        check_images(images, self._shape, where=self._reads)
        with self._lock, refusing_openvino(self._reads, _NOT_RUN):
            result = self._request.infer({self._reads: images}, share_inputs=True)
            return [result[place].copy() for place in range(len(result))]

    def close(self) -> None:
        """Give the request back; the compiled network stays open."""
        self._request = self._compiled = None


def _compiled_int8(
    graph: Int8Graph, threads: int | None, codes: Mapping[str, NpArray], device: str
) -> tuple[_OpenVino, Order]:
    """The int8 backbone, compiled, and the slots in its state."""
    path = graph.model_path("openvino")
    model, order = stateful(_with_constants(_read(path), codes, path), INPUT)
    return compile_model(model, threads, "fp32", device, where=str(path)), order


def _kept_int8(graph: Int8Graph, threads: int | None, store: Path, device: str) -> tuple[_OpenVino, Order]:
    """As ``_compiled_int8`` without own codes, from the store's cache where it is there.

    OpenVINO checks nothing of what it exported, so the cache has a digest; and it does not say whether it was compiled
    for this processor, so that is in the key.
    """
    made, package = list[tuple[_OpenVino, Order]](), _openvino()

    def compiled() -> bytes:
        network, order = _compiled_int8(graph, threads, {}, device)
        made.append((network, order))
        names = canonical_json([[name, list(shape)] for name, shape in order.items()])
        blob: bytes = network.export_model().getvalue()
        return len(names).to_bytes(8, "little") + names + blob

    here = environment()
    made_of = {
        "form": 2, "openvino": package.get_version(), "cpu": [here.cpu, *here.cpu_features], "threads": threads,
        "files": {name: digest for name, (digest, _) in graph.files.items()}, "device": device,
    }  # fmt: skip
    data, kept = derived(store, "openvino", f"{graph.folder.name} {graph.stem} {threads} {device}", made_of, compiled)
    if not kept:
        return made[0]
    start = 8 + int.from_bytes(data[:8], "little")
    with contextlib.suppress(RuntimeError):
        network = core().import_model(io.BytesIO(data[start:]), device, _config(threads, "fp32", device))
        return network, {name: tuple(shape) for name, shape in parse_json(data[8:start])}
    return _compiled_int8(graph, threads, {}, device)  # a build of OpenVINO that calls itself the same


def _config(threads: int | None, precision: Precision, device: str) -> dict[str, object]:
    config: dict[str, object] = {"INFERENCE_PRECISION_HINT": _TYPES[precision], "PERFORMANCE_HINT": "LATENCY"}
    return config if threads is None or device != _CPU else config | {"INFERENCE_NUM_THREADS": threads}


def compile_model(model: _OpenVino, threads: int | None, precision: Precision, device: str, *, where: str) -> _OpenVino:
    """A model that was read, ready to run on ``device``; an InputError of ``where`` where that cannot be."""
    with refusing_openvino(where, "cannot be compiled by OpenVINO"):
        return core().compile_model(model, device, _config(threads, precision, device))


def _with_tensors(part: Part, tensors: Tensors) -> _OpenVino:
    """The model of a part, whose tensors outside of its file are constants, ``tensors`` in place of its own.

    OpenVINO looks for files beside the model's own, which a part has not: those tensors go in as inputs of it.
    """
    openvino, outside = _openvino(), part.outside
    ports = {name: port(name, part.tensors[name].shape, part.tensors[name].dtype.name) for name in outside}
    file = replace(
        part.file,
        tensors={name: data for name, data in part.file.tensors.items() if name not in ports},
        inputs={**part.file.inputs, **ports},
    )
    with refusing_openvino(part.reads, "cannot be opened by OpenVINO"):
        model = core().read_model(file.encoded())
    parameters = {parameter.get_friendly_name(): parameter for parameter in model.get_parameters()}
    for name in outside:
        constant = openvino.op.Constant(np.asarray(tensors.get(name, part.tensors[name]), order="C"))
        constant.set_friendly_name(name)
        parameters.pop(name).output(0).replace(constant.output(0))
    return openvino.Model(model.get_results(), list(parameters.values()), part.puts_out)


def _with_constants(model: _OpenVino, tensors: Mapping[str, NpArray], path: Path) -> _OpenVino:
    """``model`` with ``tensors`` in place of its constants of the same names."""
    constants = {op.get_friendly_name(): op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"}
    for name, tensor in tensors.items():
        if name not in constants:
            raise InputError(str(path), f"holds no constant {name!r}")
        fresh = _openvino().op.Constant(np.asarray(tensor, order="C"))
        constants[name].output(0).replace(fresh.output(0))
    return model


def _executed(compiled: _OpenVino) -> dict[str, object]:
    kinds, layers = Counter[str](), Counter[str]()
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        if "runtimePrecision" in facts:
            precision = str(facts["runtimePrecision"].astype(str))
            kinds[precision] += 1
            if str(facts["layerType"].astype(str)) in _LAYERS:
                layers["int8" if precision in ("i8", "u8") else "float"] += 1
    return {"executed_nodes": dict(sorted(kinds.items())), "layers": dict(sorted(layers.items()))}


def devices() -> dict[str, str]:
    """What OpenVINO finds on this machine, by our names: "cpu", "gpu", "npu"; of several of a kind the first.

    Raises:
        MissingError: OpenVINO is not installed.
    """
    kinds = {name.partition(".")[0]: name for name in reversed(core().available_devices)}
    return {kind.lower(): name for kind, name in kinds.items() if kind in (_CPU, "GPU", "NPU")}


def core() -> _OpenVino:
    """The one ``openvino.Core`` of this process, for ``_core_of`` says why.

    Raises:
        MissingError: OpenVINO is not installed.
    """
    return _core_of(_openvino())


@cache
def _core_of(openvino: _OpenVino) -> _OpenVino:
    """The process's one core. Each gives its CPU plugin a stack for signals and puts the one before it back when it
    goes: of two that go in another order than last come, first gone, a freed stack stays, and the next signal is a
    segmentation fault (OpenVINO 2026.4).
    """
    return openvino.Core()


def _openvino() -> _OpenVino:
    return require("openvino", extra="openvino", purpose="OpenVINO")


def _read(path: Path) -> _OpenVino:
    with refusing_openvino(str(path), "cannot be opened by OpenVINO"):
        return core().read_model(path)


def refusing_openvino(where: str, what: str) -> AbstractContextManager[None]:
    """``refusing_model`` of OpenVINO's errors."""
    return refusing_model(where, what, RuntimeError, package="openvino")
