"""What a device's folder costs with ten tasks and with a thousand: listing, checking, installing one.

    pip install 'edgepet[train,onnx]'
    python benchmarks/store.py --dir DIR    # some minutes; 160 MB below DIR

Packs are of SSF on a ViT-S, in int8, with drawn numbers. Listing is a whole process of the command line; checking is
compared with hashing the same bytes, and installing a pack, without its probe, with writing and syncing its bytes. All
are asked in turns. Writes ``store.json``; ``report.py`` makes the table in docs/guide/on-the-device.md.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from harness import asked, parser_of, source, write_result
from packs import drawn_pack, in_turns, seeded

from edgepet.device.checking import check
from edgepet.device.store import Store
from edgepet.files import write_file
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.reports.tables import Column, Table, markdown

NETWORK = "vit_small_patch16_224"
COUNTS, QUICK_COUNTS = (10, 1000), (2, 4)
ROUNDS = 11


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    return parser_of(__doc__)


def main() -> None:
    """Fill a store of each size, then ask all of them in turns."""
    from edgepet.exporters.trace import base_graph

    run = asked(parser().parse_args())
    backbone = seeded(NETWORK)
    graph, pack = base_graph(backbone, root=run.folder / "host"), drawn_pack(backbone, "ssf")
    counts, calls = QUICK_COUNTS if run.quick else COUNTS, dict[str, Callable[[], object]]()
    for count in counts:
        store = Store(run.folder / f"store-{count}")
        store.add_graph(graph)
        fill(store, pack, count)
        versions = ring([named(pack, "t0000", sequence) for sequence in (1, 2)])
        calls |= {
            f"list-{count}": partial(listed, store),
            f"check-{count}": partial(check, store),
            f"sha256-{count}": partial(hashed, store),
            f"install-{count}": partial(install_next, store, versions),
            f"write-{count}": partial(write_file, run.folder / "written.pet", pack),
        }
    rounds = 1 if run.quick else ROUNDS
    medians = {name: float(np.median(found)) for name, found in in_turns(calls, rounds).items()}
    rows = [
        {
            "tasks": count,
            "list_s": medians[f"list-{count}"],
            "check_s": medians[f"check-{count}"],
            "check_over_sha256": medians[f"check-{count}"] / medians[f"sha256-{count}"],
            "install_ms": 1e3 * medians[f"install-{count}"],
            "install_over_write": medians[f"install-{count}"] / medians[f"write-{count}"],
        }
        for count in counts
    ]
    write_result(run, "store", {"rounds": rounds, "pack_bytes": len(pack), "rows": rows})


def fill(store: Store, pack: bytes, count: int) -> None:
    """Install tasks until there are ``count``."""
    there = set(store.tasks())
    for name in (f"t{number:04}" for number in range(count)):
        if name not in there:
            store.install(named(pack, name, 0), ask=lambda given, precisions: {"onnxruntime fp32": ""})


def named(pack: bytes, task: str, sequence: int) -> bytes:
    """``pack`` under another task's name."""
    read = read_pack(pack)
    return encode_pack(replace(read.delta, task=task), codec="int8", kept=read.planes, sequence=sequence)


def install_next(store: Store, versions: Iterator[bytes]) -> None:
    """The task's next version; its probe is not asked for, and so that it fits was seen."""
    store.install(next(versions), older=True, ask=lambda given, precisions: {"onnxruntime fp32": ""})


def ring(packs: list[bytes]) -> Iterator[bytes]:
    """These again and again."""
    while True:
        yield from packs


def listed(store: Store) -> None:
    """``edgepet device list``, a process of its own."""
    line = [sys.executable, "-m", "edgepet", "device", "list", "--store", str(store.root), "--json"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def hashed(store: Store) -> None:
    """The sha256 of all files but those of the cache."""
    for path in sorted(store.root.rglob("*")):
        if path.is_file() and "cache" not in path.parts:
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")


def store_table(results: Mapping[str, Any]) -> str:
    """A row for each size, where there is a result."""
    if "store" not in results:
        return ""
    result = results["store"]
    rows = [
        (
            f"{row['tasks']:,}", f"{row['list_s']:.2f}", f"{row['check_s']:.2f}", f"{row['check_over_sha256']:.2f}",
            f"{row['install_ms']:.0f}", f"{row['install_over_write']:.1f}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    numbers = ("tasks", "list s", "check s", "check/sha256", "install ms", "install/write")
    told = (
        f"Packs of {result['pack_bytes']:,} bytes; medians of {result['rounds']} rounds in turns. `list` is a whole"
        " process; sha256 is of the same bytes; installing is without the probe; write is of its bytes, synced."
    )
    columns = tuple(Column(name, right=True) for name in numbers)
    return f"{markdown(Table('A store with few and with many tasks', columns, rows))}\n{told} {source(result)}\n"


if __name__ == "__main__":
    main()
