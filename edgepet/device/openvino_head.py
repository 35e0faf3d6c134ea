"""A head that reads maps on OpenVINO: a graph of its own, compiled from bytes."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from edgepet.device.openvino import compile_model, core, refusing_openvino
from edgepet.graphs.onnx_file import OnnxFile
from edgepet.spec import NpArray


class OpenVinoHead:
    """One compiled head and one request: maps by name to what it puts out.

    Raises:
        InputError: OpenVINO cannot read or compile it.
        MissingError: OpenVINO is not installed.
    """

    def __init__(self, file: OnnxFile, *, threads: int | None = None, device: str) -> None:
        with refusing_openvino("head", "cannot be opened by OpenVINO"):
            model = core().read_model(file.encoded())
        self._request = compile_model(model, threads, "fp32", device, where="head").create_infer_request()
        self._lock = threading.Lock()  # a request runs one call

    def __call__(self, given: Mapping[str, NpArray]) -> list[NpArray]:
        with self._lock, refusing_openvino("head", "cannot be run by OpenVINO"):
            answers = self._request.infer(dict(given), share_inputs=True)
            return [answers[place].copy() for place in range(len(answers))]

    def close(self) -> None:
        """Give the request back."""
        self._request = None
