"""Merging is free: latency of merged tasks over the plain backbone's, in each runtime, and what an unmerged task costs.

    python benchmarks/latency.py [--backbone efficientnet-lite0] [--pack TASK.pet ...]

Five processes one after another, each with interleaved rounds; the ratio of a run is the median over its rounds, the
result the median over runs with its 95 % interval. Without packs it trains an SSF and a LoRA pack for one epoch:
latency does not depend on how well they are trained. Writes ``results/latency-BACKBONE.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from edgepet import bench, train
from edgepet.exporters.trace import base_graph
from edgepet.measuring.latency import ratio, ratio_of_runs
from edgepet.measuring.machine import environment
from edgepet.networks.backbone import Backbone, load_backbone
from edgepet.reports.as_json import to_json
from edgepet.samples.tasks import build_task

IMAGE_SIZES, RUNS = {"vit-small": 112, "efficientnet-lite0": 224}, 5
# One runtime at a time, since idle threads spin: those of ONNX Runtime so long that its own next session waits.
SETTLE_S = {"torch": 0.002, "onnxruntime": 0.05, "openvino": 0.002}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=IMAGE_SIZES, default="vit-small", help="a demo backbone (%(default)s)")
    parser.add_argument("--pack", type=Path, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=environment().cores)
    parser.add_argument("--one-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_run:
        json.dump([one_run(pack, options.rounds, options.threads) for pack in options.pack], sys.stdout)
        return
    with tempfile.TemporaryDirectory() as folder:
        backbone = load_backbone(f"demo:{options.backbone}", image_size=IMAGE_SIZES[options.backbone])
        packs = options.pack or quick_packs(backbone, Path(folder))
        base_graph(backbone)
        arguments = ["--one-run", "--rounds", str(options.rounds), "--threads", str(options.threads)]
        arguments += [part for pack in packs for part in ("--pack", str(pack))]
        runs = [json.loads(subprocess.check_output([sys.executable, __file__, *arguments])) for _ in range(RUNS)]
    result = {
        "command": f"python benchmarks/latency.py --backbone {options.backbone}"
        + "".join(f" --pack {pack.name}" for pack in packs),
        "backbone": backbone.label,
        "what": "p50 of the merged (or tuned) task over the plain backbone's, same runtime, batch 1",
        "runs": RUNS,
        "rounds": options.rounds,
        "threads": options.threads,
        "image_size": backbone.preprocess.image_size[0],
        "cases": [summary([run[i] for run in runs]) for i in range(len(packs))],
        "environment": to_json(environment()),
    }
    (RESULTS / f"latency-{options.backbone}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def one_run(pack: Path, rounds: int, threads: int) -> dict[str, object]:
    """Ratios to the plain backbone of one interleaved run, and every row's p50 in milliseconds."""
    ratios, p50 = {}, {}
    for runtime in SETTLE_S:
        report = bench(
            [pack], runtimes=[runtime], rounds=rounds, threads=threads, plain=True, settle_s=SETTLE_S[runtime]
        )
        plain = {row.precision: row for row in report.rows if row.mode == "plain"}
        for row in report.rows:
            name = f"{row.runtime} {row.precision} {row.mode}"
            p50[name] = row.p50_ms
            if row.mode != "plain":
                ratios[name] = ratio(report, row, plain[row.precision]).median
    return {"pack": pack.name, "method": pack.stem.rpartition("-")[2], "ratios": ratios, "p50_ms": p50}


def summary(runs: list[dict[str, object]]) -> dict[str, object]:
    """Median and interval over runs for every ratio."""
    names = list(runs[0]["ratios"])
    ratios = {name: to_json(ratio_of_runs([run["ratios"][name] for run in runs])) for name in names}
    p50 = {name: sorted(run["p50_ms"][name] for run in runs)[len(runs) // 2] for name in runs[0]["p50_ms"]}
    every = {name: [run["ratios"][name] for run in runs] for name in names}
    return {"method": runs[0]["method"], "ratios": ratios, "ratios_of_runs": every, "p50_ms": p50}


def quick_packs(backbone: Backbone, folder: Path) -> list[Path]:
    build_task("digits", folder / "digits")
    packs = []
    for method in ("ssf", "lora"):
        pack = folder / f"digits-{method}.pet"
        train(folder / "digits", backbone, method, pack, epochs=1, shots=8)
        packs.append(pack)
    return packs


if __name__ == "__main__":
    main()
