"""OpenVINO on the CPU. The precision that runs is set here and read back: on AMX its own default is bf16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from edgepet.errors import InputError, require
from edgepet.graph import INPUT, BaseGraph
from edgepet.runners.runner import check_images
from edgepet.spec import NpArray

Executed = Literal["f32", "bf16"]
_LAYERS = frozenset(("Convolution", "FullyConnected", "MatMul"))


class OpenVino:
    """One compiled model and one request; a context manager."""

    runtime = "openvino"

    def __init__(self, model: Any, *, where: str, threads: int | None, executed: Executed) -> None:
        openvino = _openvino()
        config: dict[str, object] = {"INFERENCE_PRECISION_HINT": executed, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        compiled = openvino.Core().compile_model(model, "CPU", config)
        self._request, self._where = compiled.create_infer_request(), where
        self._shape = tuple(None if side.is_dynamic else side.get_length() for side in compiled.input(0).partial_shape)
        self.executed = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self._compiled = compiled

    @property
    def evidence(self) -> Mapping[str, object]:
        """How many nodes of the executed graph ran in each precision, and how many layers on int8 codes or floats."""
        kinds, layers = Counter[str](), Counter[str]()
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            facts = node.get_rt_info()
            if "runtimePrecision" in facts:
                precision = str(facts["runtimePrecision"].astype(str))
                kinds[precision] += 1
                if str(facts["layerType"].astype(str)) in _LAYERS:
                    layers["int8" if precision in ("i8", "u8") else "float"] += 1
        return {
            "hint": self.executed,
            "executed_nodes": dict(sorted(kinds.items())),
            "layers": dict(sorted(layers.items())),
        }

    @classmethod
    def of_model(cls, path: Path, *, threads: int | None = None, executed: Executed = "f32") -> OpenVino:
        """Open an exported IR (``.xml``) or ONNX file.

        Raises:
            InputError: it is not a model that this OpenVINO reads.
            MissingError: OpenVINO is not installed.
        """
        return cls(_read(path), where=path.name, threads=threads, executed=executed)

    @classmethod
    def of_graph(cls, graph: BaseGraph, tensors: Mapping[str, NpArray], *, threads: int | None = None,
                 executed: Executed = "f32") -> OpenVino:  # fmt: skip
        """Open ``graph`` with ``tensors`` in place of the backbone's constants of the same names."""
        openvino = _openvino()
        model = _read(graph.model_path)
        constants = {op.get_friendly_name(): op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"}
        for name, tensor in tensors.items():
            if name not in constants:
                raise InputError(str(graph.model_path), f"holds no constant {name!r}")
            fresh = openvino.op.Constant(np.asarray(tensor, order="C"))
            constants[name].output(0).replace(fresh.output(0))
        return cls(model, where=graph.backbone, threads=threads, executed=executed)

    def __call__(self, images: NpArray) -> NpArray:
        check_images(images, self._shape, where=self._where)
        output: NpArray = self._request.infer({INPUT: images})[0].copy()
        return output

    def close(self) -> None:
        self._request = self._compiled = None

    def __enter__(self) -> OpenVino:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _openvino() -> Any:
    return require("openvino", extra="openvino", purpose="OpenVINO")


def _read(path: Path) -> Any:
    try:
        return _openvino().Core().read_model(path)
    except RuntimeError as error:
        raise InputError(str(path), "cannot be opened by OpenVINO", got=str(error).splitlines()[0]) from error
