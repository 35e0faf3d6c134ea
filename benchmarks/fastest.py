"""How much faster a task answers than the network that was tuned, in eager torch: every runtime, precision and form.

    python benchmarks/fastest.py --dir DIR    # on a machine that does nothing else

For each backbone and number of threads some processes one after another, each with the rounds of one runtime and of
torch interleaved; a ratio is of p50 in one process, the result the median over processes with its 95 % interval. What
int8 costs in accuracy is in ``int8.json``. Writes ``fastest.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import IMAGE_SIZES, alone, asked, parser_of, source, write_result
from trainings import draw, short_packs

from edgepet import bench, export
from edgepet.device.runtimes import RUNTIMES, SHARED_RUNTIMES
from edgepet.exporters.exporter import ExportOptions
from edgepet.exporters.trace import base_graph
from edgepet.measuring.latency import LatencyRow, ratio, ratio_of_runs
from edgepet.networks.loading import load_backbone
from edgepet.reports.tables import Column, Table, format_ms, markdown

REFERENCE = "torch fp32 tuned"


@dataclass(frozen=True, slots=True)
class Amount:
    """How much of everything."""

    backbones: tuple[str, ...]
    threads: tuple[int, ...]
    runs: int
    rounds: int
    calib: int


LONG = Amount(backbones=tuple(IMAGE_SIZES), threads=(1, 2), runs=3, rounds=100, calib=128)
SHORT = Amount(backbones=("vit-small",), threads=(1,), runs=2, rounds=2, calib=32)


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--only", nargs=4, metavar=("PACK", "ARTEFACT", "RUNTIME", "THREADS"), help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Time every backbone, or in this process one runtime."""
    options = parser().parse_args()
    amount = SHORT if options.quick else LONG
    if options.only:
        pack, artefact, runtime, threads = options.only
        json.dump(one_run(Path(pack), Path(artefact), runtime, int(threads), amount.rounds), sys.stdout)
        return
    run, rows = asked(options), list[dict[str, object]]()
    for name in amount.backbones:
        (pack,) = short_packs(run, name, ("ssf",))
        base_graph(load_backbone(f"demo:{name}", image_size=IMAGE_SIZES[name]))
        for runtime in SHARED_RUNTIMES:
            with tempfile.TemporaryDirectory() as folder:
                kind: Any = RUNTIMES[runtime].format
                coded = ExportOptions(
                    to=(kind,), precision="int8", calib=draw(run, "digits"), calib_images=amount.calib
                )
                artefact = export([pack], Path(folder) / "out", options=coded).artifacts[0].path
                for threads in amount.threads:
                    given = ("--only", pack, artefact, runtime, threads)
                    every = [alone(__file__, *given, quick=run.quick) for _ in range(amount.runs)]
                    rows += over_runs(every, name, threads)
                    print(f"{name} {runtime} {threads}", flush=True)
    write_result(run, "fastest", {"method": "ssf", "runs": amount.runs, "rounds": amount.rounds, "rows": rows})


def one_run(pack: Path, artefact: Path, runtime: str, threads: int, rounds: int) -> dict[str, Any]:
    """By form its p50 in milliseconds, and how often it fits into that of the tuned network."""
    report = bench([pack, artefact], runtimes=["torch", runtime], rounds=rounds, threads=threads)
    named = {form(row): row for row in report.rows}
    return {
        name: {"p50_ms": row.p50_ms, "faster": ratio(report, named[REFERENCE], row).median}
        for name, row in named.items()
    }


def form(row: LatencyRow) -> str:
    """``openvino int8 merged``."""
    return f"{row.runtime} {row.precision} {row.mode}"


def over_runs(runs: list[dict[str, Any]], backbone: str, threads: int) -> list[dict[str, object]]:
    """A row for each form."""
    return [
        {
            "backbone": backbone,
            "threads": threads,
            "form": name,
            "p50_ms": float(np.median([run[name]["p50_ms"] for run in runs])),
            "faster": ratio_of_runs([run[name]["faster"] for run in runs]),
        }
        for name in runs[0]
        if name != REFERENCE
    ]


def fastest_table(result: Mapping[str, Any]) -> str:
    """A row for each form of each backbone, the fastest first."""
    rows = [
        (
            row["backbone"], str(row["threads"]), row["form"], format_ms(row["p50_ms"]),
            f"{row['faster']['median']:.2f}", f"{row['faster']['low']:.2f} to {row['faster']['high']:.2f}",
        )
        for row in sorted(result["rows"], key=lambda row: (row["backbone"], row["threads"], row["p50_ms"]))
    ]  # fmt: skip
    columns = (
        Column("backbone"), Column("threads", right=True), Column("runtime, precision, form"),
        *(Column(name, right=True) for name in ("p50 ms", "faster", "95 % interval")),
    )  # fmt: skip
    told = (
        f"Over the tuned network in eager torch, fp32, of the same process; medians of {result['runs']} processes of"
        f" {result['rounds']} interleaved rounds, batch 1, {result['method']}."
    )
    return f"{markdown(Table('How much faster than where it was tuned', columns, rows))}\n{told} {source(result)}\n"


if __name__ == "__main__":
    main()
