"""Merging is free: latency of merged tasks over the plain backbone's, in each runtime, and what an unmerged task costs.

    python benchmarks/latency.py [--backbone efficientnet-lite0] [--pack TASK.pet ...]

Five processes one after another, each with interleaved rounds; the ratio of a run is the median over its rounds, the
result the median over runs with its 95 % interval. Without packs it trains an SSF and a LoRA pack for one epoch:
latency does not depend on how well they are trained. Writes ``latency-BACKBONE.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median_high
from typing import TypedDict

from harness import IMAGE_SIZES, alone, asked, parser_of, write_result
from trainings import short_packs

from edgepet import bench
from edgepet.exporters.trace import base_graph
from edgepet.measuring.latency import ratio, ratio_of_runs
from edgepet.measuring.machine import environment
from edgepet.networks.loading import load_backbone

RUNTIMES = ("torch", "onnxruntime", "openvino")  # one at a time
RUNS = 5
QUICK_RUNS, QUICK_ROUNDS = 2, 2


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--backbone", choices=IMAGE_SIZES, default="vit-small", help="a demo backbone (%(default)s)")
    made.add_argument("--pack", type=Path, action="append", default=[], help="packs of this backbone")
    made.add_argument("--rounds", type=int, default=200)
    made.add_argument("--threads", type=int, default=environment().cores)
    made.add_argument("--one-run", action="store_true", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Time every pack in processes of their own, or in this one as one of those."""
    options = parser().parse_args()
    if options.one_run:
        json.dump([one_run(pack, options.rounds, options.threads) for pack in options.pack], sys.stdout)
        return
    run, name = asked(options), str(options.backbone)
    runs, rounds = (QUICK_RUNS, QUICK_ROUNDS) if run.quick else (RUNS, int(options.rounds))
    packs: list[Path] = options.pack or short_packs(run, name, ("ssf",) if run.quick else ("ssf", "lora"))
    backbone = load_backbone(f"demo:{name}", image_size=IMAGE_SIZES[name])
    base_graph(backbone)
    arguments = ["--one-run", "--rounds", str(rounds), "--threads", str(options.threads)]
    arguments += [part for pack in packs for part in ("--pack", str(pack))]
    every: list[list[Times]] = [alone(__file__, *arguments) for _ in range(runs)]
    facts = {
        "backbone": backbone.label,
        "what": "p50 of the merged (or tuned) task over the plain backbone's, same runtime, batch 1",
        "runs": runs,
        "rounds": rounds,
        "threads": options.threads,
        "image_size": backbone.preprocess.image_size[0],
        "cases": [summary([one[i] for one in every]) for i in range(len(packs))],
    }
    write_result(run, f"latency-{name}", facts)


class Times(TypedDict):
    """What one process found of one pack: ratios to the plain backbone, and every row's p50 in milliseconds."""

    pack: str
    method: str
    ratios: dict[str, float]
    p50_ms: dict[str, float]


def one_run(pack: Path, rounds: int, threads: int) -> Times:
    """One interleaved run, one runtime at a time."""
    found = Times(pack=pack.name, method=pack.stem.rpartition("-")[2], ratios={}, p50_ms={})
    for runtime in RUNTIMES:
        report = bench([pack], runtimes=[runtime], rounds=rounds, threads=threads, plain=True)
        plain = {row.precision: row for row in report.rows if row.mode == "plain"}
        for row in report.rows:
            name = f"{row.runtime} {row.precision} {row.mode}"
            found["p50_ms"][name] = row.p50_ms
            if row.mode != "plain":
                found["ratios"][name] = ratio(report, row, plain[row.precision]).median
    return found


def summary(runs: list[Times]) -> dict[str, object]:
    """Median and interval over runs for every ratio."""
    every = {name: [run["ratios"][name] for run in runs] for name in runs[0]["ratios"]}
    return {
        "method": runs[0]["method"],
        "ratios": {name: ratio_of_runs(ratios) for name, ratios in every.items()},
        "ratios_of_runs": every,
        "p50_ms": {name: median_high(run["p50_ms"][name] for run in runs) for name in runs[0]["p50_ms"]},
    }


if __name__ == "__main__":
    main()
