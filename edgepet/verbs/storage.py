"""``storage``: bytes of one folder with one backbone and every task in it, against a full model for every task."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.deltas.branches import named_tensors
from edgepet.device.caches import derived_bytes
from edgepet.device.runtimes import DEFAULT, RUNTIMES, SHARED_RUNTIMES
from edgepet.device.served import open_pack
from edgepet.device.store import Store
from edgepet.errors import InputError, MissingError, option
from edgepet.files import disk_use
from edgepet.graphs.base import WEIGHTS, BaseGraph
from edgepet.graphs.int8 import CODES, Int8Graph
from edgepet.graphs.slots import task_slots
from edgepet.packs.pack import EVERY, Pack, read_pack
from edgepet.proving.sources import graph_of, int8_graph_of
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, format_ratio, left, right
from edgepet.spec import FilePath
from edgepet.verbs.verb import Options, Parser, Verb, pack_precision_option, path

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


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
    """What all tasks take on one runtime; ``tasks_run`` of them answered from the folder when it was measured.

    ``total_bytes`` are those of files, without what other runtimes derived; ``apparent_bytes`` with the folders that
    they lie in, as ``du --apparent-size`` counts.
    """

    runtime: str
    shares_backbone: bool
    total_bytes: int
    ratio: float
    tasks_run: int
    note: str
    apparent_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageReport:
    """Bytes on disk. ``ratio`` is ``full_total_bytes / shared_total_bytes``; totals are for one device.

    ``other_bytes`` are of the store's own: what it says of itself, packs before the active ones, keys, other graphs.
    ``apparent_bytes`` are what ``du --apparent-size`` counts of the folder, ``disk_bytes`` what ``du`` does. Of these
    ``linked_bytes`` are in files that have a name outside of it too, in the cache that they came from say: the disk has
    them once.
    """

    precision: str
    backbone_bytes: int
    graph_bytes: int
    cache_bytes: int
    other_bytes: int
    tasks: tuple[TaskBytes, ...]
    shared_total_bytes: int
    full_total_bytes: int
    ratio: float
    per_runtime: tuple[RuntimeBytes, ...]
    devices: int
    fleet_shared_bytes: int
    fleet_full_bytes: int
    apparent_bytes: int
    disk_bytes: int
    linked_bytes: int


def storage(
    packs: Sequence[FilePath] = (), *, store: FilePath | None = None, devices: int = 1, precision: str = "fp32"
) -> StorageReport:
    """Bytes of a device's folder from which every task was run: ``store``, or a temporary one made for ``packs``.

    Raises:
        InputError: neither or both, one task twice, or a pack whose graph was never made.
    """
    if devices < 1:
        raise InputError(option("devices"), "must be at least 1", got=devices)
    if (store is None) == (not packs):
        raise InputError("storage", f"needs packs, or {option('store')} with a device's folder")
    if store is not None:
        return account(Store(Path(store)), devices=devices, precision=precision)
    with tempfile.TemporaryDirectory(prefix="edgepet-") as folder:
        scratch = Store(Path(folder))
        for path in map(Path, packs):
            delta = read_pack(path, answers=EVERY).delta
            if delta.task in scratch.tasks():
                raise InputError("storage", "needs packs of different tasks", got=f"{delta.task!r} twice")
            if precision == "int8":
                scratch.add_int8(int8_graph_of(path, delta))
            else:
                scratch.add_graph(graph_of(path, delta))
            scratch.install(path)
        return account(scratch, devices=devices, precision=precision)


def account(store: Store, *, devices: int = 1, precision: str = "fp32") -> StorageReport:
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
    graph_bytes = _beside_weights(graphs.values())
    use, derived = disk_use(store.root), {name: derived_bytes(store.root, name) for name in SHARED_RUNTIMES}
    shared = use.files
    told = backbone + graph_bytes + store.cache_bytes + sum(task.pack_bytes for task in tasks)
    full = sum(task.full_copy_bytes for task in tasks)
    return StorageReport(
        precision=precision,
        backbone_bytes=backbone,
        graph_bytes=graph_bytes,
        cache_bytes=store.cache_bytes,
        other_bytes=shared - told,
        tasks=tasks,
        shared_total_bytes=shared,
        full_total_bytes=full,
        ratio=full / shared,
        per_runtime=tuple(
            _shared(name, ran[name], shared - sum(derived.values()) + derived[name], full, folders=use.folders)
            if name in ran
            else _engines(name, full)
            for name in RUNTIMES
        ),
        devices=devices,
        fleet_shared_bytes=devices * shared,
        fleet_full_bytes=devices * full,
        apparent_bytes=use.files + use.folders,
        disk_bytes=use.blocks,
        linked_bytes=use.linked,
    )


def _beside_weights(graphs: Iterable[BaseGraph | Int8Graph]) -> int:
    """Bytes that graphs add to their weights; what several of a backbone read, a table of positions, counts once."""
    files = dict[Path, int]()
    for graph in graphs:
        described = graph.folder / f"{graph.stem}.json"
        files |= {graph.folder / name: size for name, (_, size) in graph.files.items() if name not in (WEIGHTS, CODES)}
        files[described] = described.stat().st_size
    return sum(files.values())


def _run_all(store: Store, packs: list[Pack], runtime: str, precision: str) -> int | str:
    """How many tasks gave finite answers on ``runtime``, or why none could be tried."""
    for pack in packs:
        image = np.zeros((1, *pack.delta.preprocess.input_shape), np.float32)
        try:
            with open_pack(store, pack, runtime=runtime, precision=precision) as network:
                if not np.isfinite(network(image)).all():
                    raise InputError(pack.delta.task, f"gave answers on {runtime} that are not finite")
        except MissingError as error:
            return error.what
    return len(packs)


def _task_bytes(graph: BaseGraph | Int8Graph, pack: Pack) -> TaskBytes:
    if isinstance(graph, Int8Graph):
        branches = sum(4 * math.prod(tensor.shape) for tensor in named_tensors(pack.delta.branches).values())
        values, model = graph.weights_bytes + branches, graph.model_path(DEFAULT)
        own: int | None = task_slots(graph, pack.delta).own_bytes
    else:
        values, model, own = sum(place.length for place in graph.places.values()), graph.model_path, None
    values_of_heads = sum(each.head.stored_values for each in pack.delta.heads)
    head = 4 * (pack.delta.head.weight.size + pack.delta.head.bias.size + values_of_heads)
    return TaskBytes(
        task=pack.delta.task,
        method=pack.delta.method,
        pack_bytes=pack.size_bytes,
        full_copy_bytes=values + head + model.stat().st_size,
        own_memory_bytes=own,
    )


def _shared(runtime: str, ran: int | str, shared: int, full: int, *, folders: int) -> RuntimeBytes:
    count = ran if isinstance(ran, int) else 0
    note = "every task was run from this folder" if isinstance(ran, int) else f"not run: {ran}"
    return RuntimeBytes(
        runtime=runtime, shares_backbone=True, total_bytes=shared, ratio=full / shared, tasks_run=count, note=note,
        apparent_bytes=shared + folders,
    )  # fmt: skip


def _engines(runtime: str, full: int) -> RuntimeBytes:
    return RuntimeBytes(
        runtime=runtime,
        shares_backbone=False,
        total_bytes=full,
        ratio=1.0,
        tasks_run=0,
        note="an engine holds its own weights: one full artefact per task (weights counted, engine overhead not)",
    )


def _options(parser: Parser) -> None:
    add = parser.add_argument
    add("packs", nargs="*", metavar="TASK.pet", help="tasks, put into a folder that is made for counting")
    add("--store", metavar="DIR", help="a device's folder, in place of packs (default: one that is made for them)")
    add("--devices", type=int, default=1, metavar="N", help="devices of a fleet to count for (default: %(default)s)")
    pack_precision_option(parser)


def _run(options: Options, progress: Progress) -> StorageReport:
    with progress.stage("storage: run every task from one folder"):
        return storage(
            [Path(pack) for pack in options.packs],
            store=path(options.store),
            devices=options.devices,
            precision=options.precision,
        )


def screen(report: StorageReport) -> Screen:
    """A row for each task, a row for each runtime, and the fleet where there is one."""
    rows = [
        (
            t.task,
            t.method,
            format_bytes(t.pack_bytes),
            format_bytes(t.full_copy_bytes),
            format_ratio(t.full_copy_bytes / t.pack_bytes),
        )
        for t in report.tasks
    ]
    yield Table("storage", (*left("task", "method"), *right("pack", "own model", "")), rows)
    yield lines(
        f"  backbone {format_bytes(report.backbone_bytes)}, graph {format_bytes(report.graph_bytes)},"
        f" caches {format_bytes(report.cache_bytes)}, the store's own"
        f" {format_bytes(report.other_bytes)}: once for all tasks",
        f"  on disk {format_bytes(report.disk_bytes)}"
        + (f", {format_bytes(report.linked_bytes)} of them shared with other folders" if report.linked_bytes else ""),
    )
    rows = [
        (
            r.runtime,
            "one backbone" if r.shares_backbone else "a model a task",
            format_bytes(r.total_bytes),
            format_ratio(r.ratio),
            r.note,
        )
        for r in report.per_runtime
    ]
    tasks = "1 task" if len(report.tasks) == 1 else f"{len(report.tasks)} tasks"
    title = f"{tasks} on one device, against {format_bytes(report.full_total_bytes)} of models"
    yield Table(title, (*left("runtime", "keeps"), *right("total", "saves"), *left("")), rows)
    if report.devices > 1:
        yield lines(
            f"  {report.devices} devices: {format_bytes(report.fleet_shared_bytes)} instead of"
            f" {format_bytes(report.fleet_full_bytes)}"
        )


VERB = Verb(options=_options, run=_run, screen=screen)
