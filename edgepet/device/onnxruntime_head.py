"""A head that reads maps on ONNX Runtime: a graph of its own, opened from bytes."""

from __future__ import annotations

from collections.abc import Mapping

from edgepet.device.onnxruntime import open_session, running
from edgepet.graphs.onnx_file import OnnxFile
from edgepet.spec import NpArray


class OnnxRuntimeHead:
    """One session on a head's own graph: maps by name to what it puts out.

    Raises:
        InputError: ONNX Runtime cannot open it.
    """

    def __init__(self, file: OnnxFile, *, threads: int | None = None, provider: str) -> None:
        self._session = open_session(file.encoded(), threads=threads, provider=provider)

    def __call__(self, given: Mapping[str, NpArray]) -> list[NpArray]:
        with running("head"):
            answers: list[NpArray] = self._session.run(None, dict(given))
        return answers

    def close(self) -> None:
        """Give the session back."""
        self._session = None
