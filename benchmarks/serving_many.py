"""Many tasks at once: cells of ``serving.py`` for one image, a batch, and the memory of several tasks.

Not a benchmark by itself. Tasks on the int8 backbone have ranges that are made up: how long a task takes does not
depend on them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepet.deltas.delta import Delta, Int8Ranges
from edgepet.device.fitting import Fitted, fit, fit_int8, opened, own_slots
from edgepet.device.mixed import Mixed, mix
from edgepet.device.runtime import SharedInt8, open_task
from edgepet.device.runtimes import shared_runtime
from edgepet.device.together import Together
from edgepet.graphs.base import BaseGraph, graph_folder, open_graph
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.parts import part_of
from edgepet.measuring.latency import Candidate, measure, ratio
from edgepet.methods import SSF, LinearProbe, LoRA, Method
from edgepet.reports.tables import Column, Table, format_bytes, markdown
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone

BATCH, INT8 = 8, ", int8"
MIXED: dict[str, Sequence[Method]] = {
    "SSF": [SSF()],
    "LoRA": [LoRA(rank=8, on=("qkv",))],
    "SSF and LoRA": [SSF(), LoRA(rank=8, on=("qkv",))],
    "SSF, int8": [SSF()],
}


class Each:
    """A batch of which each image has its own task, as a network."""

    def __init__(self, mixed: Mixed) -> None:
        self._mixed = mixed

    def __call__(self, images: NpArray) -> NpArray:
        return np.stack(self._mixed(images, self._mixed.tasks))

    def close(self) -> None:
        """Give it back."""
        self._mixed.close()


class All:
    """Several tasks on one image, as a network."""

    runtime, executed, evidence = "several", "several", dict[str, object]()

    def __init__(self, together: Together) -> None:
        self._together = together

    def __call__(self, images: NpArray) -> NpArray:
        return np.concatenate(list(self._together(images).values()), axis=1)

    def close(self) -> None:
        """Give it back."""
        self._together.close()


def on_one_image(
    backbone: Backbone, graph: BaseGraph, drawn: Callable[[Backbone, Method, int], Delta],
    methods: Mapping[str, Method], runtime: str, *, threads: int, rounds: int, tasks: int,
) -> dict[str, float]:  # fmt: skip
    """Tasks of each method on one image over as many passes of the plain backbone, in slots, in fp32 and in int8."""
    image, found = np.random.default_rng(0).standard_normal((1, *graph.preprocess.input_shape), np.float32), {}
    for precision, beside in (("", nothing), (INT8, int8_beside)):
        with beside(graph) as on:
            plain = with_ranges(on, drawn(backbone, LinearProbe(), 0))
            for name, method in methods.items():
                deltas = {str(k): with_ranges(on, drawn(backbone, method, k)) for k in range(tasks)}
                over = over_plain(on, plain, deltas, image, runtime, threads=threads, rounds=rounds)
                found[name + precision] = over / tasks
    return found


def over_plain(
    graph: BaseGraph | Int8Graph, plain: Delta, deltas: Mapping[str, Delta], image: NpArray, runtime: str, *,
    threads: int, rounds: int,
) -> float:  # fmt: skip
    """All of ``deltas`` on an image over ``plain``."""

    def together() -> Any:
        own = own_slots(graph, runtime) if isinstance(graph, Int8Graph) else {}
        fitted = {name: fit_any(graph, delta, runtime) for name, delta in deltas.items()}
        return All(Together(part_of(graph, runtime), own, fitted, runtime=runtime, threads=threads))

    def alone() -> Any:
        if isinstance(graph, Int8Graph):
            return SharedInt8(graph, runtime=runtime, threads=threads).bind(plain, alone=True)
        return open_task(graph, plain, runtime=runtime, threads=threads)

    return in_turns(together, alone, image, runtime, threads=threads, rounds=rounds)


def in_turns(
    first: Callable[[], Any], second: Callable[[], Any], images: NpArray, runtime: str, *, threads: int, rounds: int
) -> float:
    """Milliseconds of one over those of another."""
    candidates = [
        Candidate(model=name, runtime=runtime, precision="fp32", mode="slots", open=opener)
        for name, opener in (("first", first), ("second", second))
    ]
    report = measure(candidates, images, threads=threads, rounds=rounds)
    return ratio(report, *report.rows).median


def batch_of_eight(
    backbone: Backbone, graph: BaseGraph, drawn: Callable[[Backbone, Method, int], Delta], runtime: str, *,
    threads: int, rounds: int,
) -> dict[str, float]:  # fmt: skip
    """Eight tasks in a batch of eight over a batch of eight of one of them in slots, by what the tasks are."""
    images, found = np.random.default_rng(0).standard_normal((BATCH, *graph.preprocess.input_shape), np.float32), {}
    for name, methods in MIXED.items():
        deltas = {str(k): drawn(backbone, methods[k % len(methods)], k) for k in range(BATCH)}
        with int8_beside(graph) if name.endswith(INT8) else nothing(graph) as on:
            deltas = {key: with_ranges(on, delta) for key, delta in deltas.items()}
            found[name] = over_one(on, deltas, images, runtime, threads=threads, rounds=rounds)
    return found


def many_in_memory(
    backbone: Backbone, graph: BaseGraph, drawn: Callable[[Backbone, Method, int], Delta], runtime: str, *,
    threads: int, tasks: int, resident: Callable[[], int],
) -> dict[str, float]:  # fmt: skip
    """Bytes that the process gains when many SSF tasks of a store are open and all have been asked.

    In slots beyond the first one, and merged, which may take 256 MB together, beyond none.
    """
    from edgepet import Device, write_pack
    from edgepet.device.store import Store

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        store.add_graph(graph)
        for k in range(tasks):
            write_pack(Path(folder) / "task.pet", drawn(backbone, SSF(), k))
            store.install(Path(folder) / "task.pet")
        image, gained = np.zeros((1, *graph.preprocess.input_shape), np.float32), dict[str, float]()
        for form, memory_bytes in (("merged", 256_000_000), ("slots", None)):
            with Device(store.root) as device:
                before, opened = resident(), []
                for name in device.tasks():
                    settings: dict[str, Any] = {"mode": form, "memory_bytes": memory_bytes, "threads": threads}
                    opened.append(device.open(name, runtime=runtime, **settings))
                    for _ in range(2):
                        opened[-1](image)
                    if form == "slots" and len(opened) == 1:
                        before = resident()
                gained[form] = resident() - before
        return gained


def over_one(
    graph: BaseGraph | Int8Graph, deltas: Mapping[str, Delta], images: NpArray, runtime: str, *, threads: int,
    rounds: int,
) -> float:  # fmt: skip
    """All of ``deltas`` in one call over a call of the last one alone."""
    row, last = shared_runtime(runtime, purpose="a benchmark"), list(deltas.values())[-1]

    def each() -> Any:
        network = mix(graph, deltas, runtime=runtime, threads=threads).network
        if network is None:
            raise ValueError(f"tasks of {graph.backbone} share no call")
        return Each(network)

    def one() -> Any:
        fitted = fit_any(graph, last, runtime)
        return opened(row, fitted.part, {}, threads).bind(fitted.slots)

    return in_turns(each, one, images, runtime, threads=threads, rounds=rounds)


def fit_any(graph: BaseGraph | Int8Graph, delta: Delta, runtime: str) -> Fitted:
    """A task in slots."""
    return fit_int8(graph, delta, runtime) if isinstance(graph, Int8Graph) else fit(graph, delta, "slots")


@contextmanager
def nothing(graph: BaseGraph) -> Iterator[BaseGraph]:
    """``graph`` itself."""
    yield graph


@contextmanager
def int8_beside(graph: BaseGraph) -> Iterator[Int8Graph]:
    """The int8 backbone of ``graph`` with ranges of noise, in a folder of its own: the user's cache is left alone."""
    from edgepet.calibration.images import CalibrationImages
    from edgepet.calibration.slot_graphs import int8_graph
    from edgepet.images.sets import ImageSet

    class Noise(CalibrationImages):
        images = held_out_images = np.random.default_rng(1).standard_normal(
            (8, *graph.preprocess.input_shape), np.float32
        )

    with tempfile.TemporaryDirectory() as root:
        folder, none = graph_folder(graph.fingerprint, Path(root)), ImageSet(tuple("ab"), (), ())
        shutil.copytree(graph.folder, folder, ignore=shutil.ignore_patterns("*int8*"))
        own = open_graph(graph.fingerprint, graph.preprocess, root=Path(root))
        noise = Noise(
            folder=Path(), preprocess=graph.preprocess, measured=none, held_out=none, judged=none, digests={}, seed=0
        )
        yield int8_graph(own, lambda: noise, root=Path(root))


def with_ranges(graph: BaseGraph | Int8Graph, delta: Delta) -> Delta:
    """A task that, on the int8 backbone, brings the backbone's ranges behind its cut as its own."""
    if not isinstance(graph, Int8Graph):
        return delta
    ranges, before = graph.ranges or (), graph.trunk_reads(delta)
    trunk = graph.ranges_sha256 if before else None
    return replace(delta, int8=Int8Ranges(codes=graph.codes_sha256, ranges=tuple(ranges[before:]), trunk=trunk))


def memory_table(cells: Sequence[Mapping[str, Any]], tasks: int) -> str:
    """Of cells that have it."""
    rows = [
        (
            f"{cell['runtime']}, {cell['image_size']} px",
            *(format_bytes(round(cell["many"][form])) for form in ("slots", "merged")),
        )
        for cell in cells
        if "many" in cell
    ]
    if not rows:
        return ""
    columns = (Column("where"), Column("in slots", right=True), Column("merged", right=True))
    told = (
        f"What a process gains for {tasks} SSF tasks of a store, all open and asked: in slots beyond the first one,"
        " merged with `--memory 256MB`."
    )
    return f"{markdown(Table('Many tasks in memory', columns, rows))}\n{told}\n\n"


def batch_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Of cells that have it."""
    rows = [
        (f"{cell['runtime']}, {cell['image_size']} px", *(f"{cell['eight'][name]['median']:.2f}" for name in MIXED))
        for cell in cells
        if "eight" in cell
    ]
    if not rows:
        return ""
    columns = (Column("where"), *(Column(name, right=True) for name in MIXED))
    told = "Eight tasks in a batch of eight, each of one image, over a batch of eight of one of them in slots."
    return f"{markdown(Table('One batch, eight tasks', columns, rows))}\n{told}\n\n"


def one_image_table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """A row for each cell, and one in int8 where that was measured; memory stands beside fp32."""
    rows = list[tuple[str, ...]]()
    for cell in result["cells"]:
        where, more = f"{cell['runtime']}, {cell['image_size']} px", cell["memory"]
        memory = format_bytes(more["first_bytes"]), format_bytes(round(more["further_bytes"]))
        for precision, beside in (("", memory), (INT8, ("", ""))):
            if all(name + precision in cell["ten"] for name in names):
                over = (f"{cell['ten'][name + precision]['median']:.2f}" for name in names)
                rows.append((where + precision, *over, *beside))
    slots = max(cell["memory"]["slots_bytes"] for cell in result["cells"])
    columns = (Column("where"), *(Column(each, right=True) for each in (*names, "memory, first task", "each one more")))
    told = (
        f"{result['tasks']} SSF tasks in slots, over as many passes of the plain backbone in the same precision; memory"
        " is of SSF tasks on all blocks, in slots; ONNX Runtime reads the slots where they lie,"
        f" {format_bytes(slots)} a task more."
    )
    return f"{markdown(Table('Ten tasks on one image', columns, rows))}\n{told}"
