"""Merged networks of ONNX Runtime that a store's cache keeps: opening one again folds and makes ready nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from edgepet.device.kept import MODEL, kept_model
from edgepet.device.onnxruntime import OnnxRuntime, open_session
from edgepet.errors import InputError
from edgepet.graphs.base import BaseGraph
from edgepet.measuring.machine import environment
from edgepet.spec import Tensors


def open_kept(
    graph: BaseGraph, pack_sha256: str, fold: Callable[[], Tensors], root: Path, *, threads: int | None = None
) -> OnnxRuntime:
    """Open ``graph`` with the tensors that ``fold`` makes of a pack; the cache of the store ``root`` keeps the network.

    The kept one has the bits of the other, and its weights are mapped from its file.

    Raises:
        InputError: as ``OnnxRuntime.of_graph``, or of ``fold``.
    """
    here = environment()
    made_of = {
        "form": 1, "onnxruntime": onnxruntime.__version__, "cpu": [here.cpu, *here.cpu_features],
        "pack": pack_sha256, "graph": graph.stem, "files": {name: sha for name, (sha, _) in graph.files.items()},
    }  # fmt: skip
    path = kept_model(root, made_of, lambda folder: _save(graph, fold(), folder / MODEL))
    if path is not None:
        with contextlib.suppress(InputError):  # of a build of the runtime that calls itself the same
            return OnnxRuntime(open_session(path, threads=threads, ready=True), where=graph.backbone)
    return OnnxRuntime.of_graph(graph, fold(), threads=threads)


def _save(graph: BaseGraph, tensors: Tensors, path: Path) -> None:
    held = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    open_session(graph.model_path, threads=1, tensors=held, save=path)
