"""What ten tasks take on a disk, in each way of keeping them: every folder is made, run from, and counted.

    pip install 'edgepet[train,onnx,openvino]'
    python benchmarks/storage.py --dir DIR    # some minutes; 3 GB below the temporary folder for a while

Full copies are ten checkpoints, merged files ten exported models, in fp32 and int8; stores are what a device has: one
backbone, in fp32 or its codes, and ten packs in int8. Caches are what running every task in slots on each runtime
leaves in the store. Deltas are drawn: bytes do not depend on what they were
trained for. Writes ``storage.json``; ``report.py`` makes the table in README.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from harness import asked, parser_of, source, write_result
from serving import drawn, on
from serving_many import int8_beside, with_ranges

from edgepet import Device, export
from edgepet.deltas.delta import Delta
from edgepet.deltas.merge import task_tensors
from edgepet.device.runtimes import SHARED_RUNTIMES
from edgepet.device.store import Store
from edgepet.exporters.exporter import ExportOptions
from edgepet.files import disk_use, write_file
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph
from edgepet.methods import SSF
from edgepet.packs.codecs import Codec
from edgepet.packs.pack import encode_pack
from edgepet.reports.tables import Column, Table, format_bytes, format_ratio, markdown
from edgepet.samples.tasks import build_task

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone

SIZE = 112
CODEC: Codec = "int8"


@dataclass(frozen=True, slots=True)
class Amount:
    """How many tasks, and how many images int8 files are calibrated on."""

    tasks: int
    calib: int


LONG, SHORT = Amount(tasks=10, calib=32), Amount(tasks=2, calib=32)


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    return parser_of(__doc__)


def main() -> None:
    """Make, run and count every folder, one after another."""
    run = asked(parser().parse_args())
    amount = SHORT if run.quick else LONG
    backbone, graph = on(SIZE)
    deltas = [drawn(backbone, SSF(), k) for k in range(amount.tasks)]
    rows = list[dict[str, object]]()
    for name, make in ways(backbone, graph, deltas, amount).items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"kept_as": name, **make(Path(folder))})
        print(f"{name}: {format_bytes(int(str(rows[-1]['bytes'])))}", flush=True)
    facts = {"backbone": backbone.label, "image_size": SIZE, "tasks": amount.tasks, "codec": CODEC, "rows": rows}
    write_result(run, "storage", facts)


def ways(
    backbone: Backbone, graph: BaseGraph, deltas: list[Delta], amount: Amount
) -> dict[str, Callable[[Path], dict[str, object]]]:
    """By name what fills an empty folder, and says its bytes."""
    return {
        "full copies, fp32": partial(copies, graph, deltas),
        "merged files, fp32": partial(merged_files, backbone, deltas, None),
        "merged files, int8": partial(merged_files, backbone, deltas, amount.calib),
        "fp32 backbone + packs": partial(store_of, graph, deltas),
        "int8 backbone + packs": partial(int8_store, graph, deltas),
    }


def copies(graph: BaseGraph, deltas: Iterable[Delta], folder: Path) -> dict[str, object]:
    """A checkpoint of all tensors for each task."""
    for delta in deltas:
        head = delta.head.in_float32
        tensors = {**task_tensors(graph.base, delta), "head.weight": head.weight, "head.bias": head.bias}
        write_file(folder / f"{delta.task}.safetensors", safetensors.numpy.save(tensors))
    return counted(folder)


def merged_files(backbone: Backbone, deltas: Iterable[Delta], calib: int | None, folder: Path) -> dict[str, object]:
    """An exported model for each task, as ONNX; in int8 where it is calibrated on ``calib`` images."""
    packs = folder / "packs"
    packs.mkdir()
    for delta in deltas:
        write_file(packs / f"{delta.task}.pet", encode_pack(delta, codec=CODEC))
    int8: dict[str, Any] = {}
    if calib is not None:
        build_task("digits", folder / "digits", test_cap=10)
        int8 = {"precision": "int8", "calib": folder / "digits", "calib_images": calib}
    export(sorted(packs.iterdir()), folder / "out", backbone=backbone, options=ExportOptions(to=("onnx",), **int8))
    return counted(folder / "out")


def int8_store(graph: BaseGraph, deltas: Iterable[Delta], folder: Path) -> dict[str, object]:
    """A store with the codes, and packs with ranges."""
    with int8_beside(graph) as codes:
        return store_of(codes, [with_ranges(codes, delta) for delta in deltas], folder)


def store_of(graph: BaseGraph | Int8Graph, deltas: Iterable[Delta], folder: Path) -> dict[str, object]:
    """A store with a graph and packs, as it is installed and once every task has run on each runtime."""
    store = Store(folder / "store")
    store.add_graph(graph)
    for delta in deltas:
        store.install(encode_pack(delta, codec=CODEC))
    found = counted(store.root)
    image = np.zeros((1, *graph.preprocess.input_shape), np.float32)
    precision = "int8" if isinstance(graph, Int8Graph) else "fp32"
    for runtime in SHARED_RUNTIMES:
        with Device(store.root) as device:
            for task in device.tasks():
                device.open(task, runtime=runtime, precision=precision, threads=1)(image)
    packs = [path.stat().st_size for path in (store.root / "packs").glob("*.pet")]
    with_caches = disk_use(store.root).files
    return {**found, "pack_bytes": max(packs), "with_caches_bytes": with_caches}


def counted(folder: Path) -> dict[str, object]:
    """Bytes of all files, and what is allocated for them and their folders, as ``du`` says."""
    use = disk_use(folder)
    return {"bytes": use.files, "disk_bytes": use.blocks}


# --------------------------------------------------------------------------------------------------------------- pages


def storage_table(result: Mapping[str, Any]) -> str:
    """A row for each way, with how often the smallest one fits into it."""
    least = min(row["bytes"] for row in result["rows"])
    rows = [
        (
            row["kept_as"], format_bytes(row["bytes"]), format_ratio(row["bytes"] / least),
            format_bytes(row["with_caches_bytes"]) if "with_caches_bytes" in row else "",
        )
        for row in result["rows"]
    ]  # fmt: skip
    columns = (Column("kept as"), *(Column(name, right=True) for name in ("bytes", "of the smallest", "with caches")))
    pack = max(row.get("pack_bytes", 0) for row in result["rows"])
    told = (
        f"SSF, {result['image_size']} px, packs in {result['codec']} of up to {format_bytes(pack)}; every folder was"
        " made and counted. Caches are what running every task in slots on ONNX Runtime and OpenVINO leaves in a store."
    )
    title = f"{result['tasks']} tasks on a disk, {result['backbone']}"
    return f"{markdown(Table(title, columns, rows))}\n{told} {source(result)}\n"


if __name__ == "__main__":
    main()
