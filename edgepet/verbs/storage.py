"""Count bytes: one folder with one backbone and every task in it, against a full artefact for every task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepet.device.runtime import SHARED_RUNTIMES, open_installed
from edgepet.device.store import Store
from edgepet.errors import InputError, MissingError
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph, task_slots
from edgepet.packs.pack import Pack


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBytes:
    """``full_copy_bytes``: the task as a model of its own in that precision, weights and graph and head.

    ``own_memory_bytes``: what an int8 task keeps in memory beside the shared codes, its slots and codes of its own.
    """

    task: str
    method: str
    pack_bytes: int
    full_copy_bytes: int
    own_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeBytes:
    """What all tasks take on one runtime; ``tasks_run`` of them answered from the folder when it was measured."""

    runtime: str
    shares_backbone: bool
    total_bytes: int
    ratio: float
    tasks_run: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageReport:
    """Bytes on disk. ``ratio`` is ``full_total_bytes / shared_total_bytes``; totals are for one device."""

    precision: str
    backbone_bytes: int
    graph_bytes: int
    cache_bytes: int
    tasks: tuple[TaskBytes, ...]
    shared_total_bytes: int
    full_total_bytes: int
    ratio: float
    per_runtime: tuple[RuntimeBytes, ...]
    devices: int
    fleet_shared_bytes: int
    fleet_full_bytes: int


def storage(store: Store, *, devices: int = 1, precision: str = "fp32") -> StorageReport:
    """Run every task of ``store`` once on every runtime that shares the backbone, then count the folder's files.

    Args:
        precision: "fp32", or "int8" for a folder with an int8 backbone.

    Raises:
        InputError: nothing is installed.
    """
    packs = [store.pack(task) for task in store.tasks()]
    if not packs:
        raise InputError(str(store.root), "has no task installed", fix="install a pack first")
    found: list[BaseGraph | Int8Graph] = [
        store.int8_of(pack) if precision == "int8" else store.graph_of(pack) for pack in packs
    ]
    graphs = {(graph.folder, graph.stem): graph for graph in found}
    ran = {runtime: _run_all(store, packs, runtime, precision) for runtime in SHARED_RUNTIMES}
    tasks = tuple(_task_bytes(graph, pack) for graph, pack in zip(found, packs, strict=True))
    backbone = sum({graph.folder: graph.weights_bytes for graph in graphs.values()}.values())
    graph_bytes = sum(graph.graph_bytes for graph in graphs.values())
    shared = backbone + graph_bytes + store.cache_bytes + sum(task.pack_bytes for task in tasks)
    full = sum(task.full_copy_bytes for task in tasks)
    return StorageReport(
        precision=precision,
        backbone_bytes=backbone,
        graph_bytes=graph_bytes,
        cache_bytes=store.cache_bytes,
        tasks=tasks,
        shared_total_bytes=shared,
        full_total_bytes=full,
        ratio=full / shared,
        per_runtime=(*(_shared(name, count, shared, full) for name, count in ran.items()), _engines(full)),
        devices=devices,
        fleet_shared_bytes=devices * shared,
        fleet_full_bytes=devices * full,
    )


def _run_all(store: Store, packs: list[Pack], runtime: str, precision: str) -> int | str:
    """How many tasks gave finite answers on ``runtime``, or why none could be tried."""
    for pack in packs:
        image = np.zeros((1, *pack.delta.preprocess.input_shape), np.float32)
        try:
            with open_installed(store, pack, runtime=runtime, precision=precision) as network:
                if not np.isfinite(network(image)).all():
                    raise InputError(pack.delta.task, f"gave answers on {runtime} that are not finite")
        except MissingError as error:
            return error.what
    return len(packs)


def _task_bytes(graph: BaseGraph | Int8Graph, pack: Pack) -> TaskBytes:
    if isinstance(graph, Int8Graph):
        values, model = graph.weights_bytes, graph.model_path(SHARED_RUNTIMES[0])
        own: int | None = task_slots(graph, pack.delta).own_bytes
    else:
        values, model, own = sum(place.length for place in graph.places.values()), graph.model_path, None
    head = 4 * (pack.delta.head.weight.size + pack.delta.head.bias.size)
    return TaskBytes(
        task=pack.delta.task,
        method=pack.delta.method,
        pack_bytes=pack.size_bytes,
        full_copy_bytes=values + head + model.stat().st_size,
        own_memory_bytes=own,
    )


def _shared(runtime: str, ran: int | str, shared: int, full: int) -> RuntimeBytes:
    count = ran if isinstance(ran, int) else 0
    note = "every task was run from this folder" if isinstance(ran, int) else f"not run: {ran}"
    return RuntimeBytes(
        runtime=runtime, shares_backbone=True, total_bytes=shared, ratio=full / shared, tasks_run=count, note=note
    )


def _engines(full: int) -> RuntimeBytes:
    return RuntimeBytes(
        runtime="tensorrt",
        shares_backbone=False,
        total_bytes=full,
        ratio=1.0,
        tasks_run=0,
        note="an engine holds its own weights: one full artefact per task (weights counted, engine overhead not)",
    )
