"""What branches cost at inference, beside methods that fold: all in one interleaved run.

    python benchmarks/branches.py     # ten minutes on 2 cores, which nothing else should use

ViT-S/14 at 112 pixels, every method at its defaults. Latency does not depend on values: each pack is trained for one
epoch on two images a class. Writes ``results/branches.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from edgepet import bench, read_pack, train
from edgepet.exporters.trace import base_graph
from edgepet.measuring.latency import ratio
from edgepet.measuring.machine import environment
from edgepet.methods import METHODS, Branching
from edgepet.networks.backbone import load_backbone
from edgepet.reports.as_json import to_json
from edgepet.samples.tasks import build_task

RESULT = Path(__file__).parent / "results" / "branches.json"
IMAGE_SIZE = 112
FOLDED = ("ssf", "lora", "fact-tt", "bi-lora")
ELSEWHERE = ("conv-adapter", "st-adapter")  # the one has no place on a ViT, the other takes clips
SETTLE_S = {"onnxruntime": 0.05, "openvino": 0.002}  # idle threads of the one spin longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    branching = tuple(n for n, kind in METHODS.items() if issubclass(kind, Branching) and n not in ELSEWHERE)
    with tempfile.TemporaryDirectory() as folder:
        packs = trained(Path(folder), (*FOLDED, *branching))
        rows = measured(packs, options.rounds)
    result = {
        "command": "python benchmarks/branches.py",
        "backbone": "demo:vit-small",
        "image_size": IMAGE_SIZE,
        "rounds": options.rounds,
        "threads": environment().cores,
        "rows": rows,
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def trained(folder: Path, methods: tuple[str, ...]) -> dict[str, Path]:
    backbone, packs = load_backbone("demo:vit-small", image_size=IMAGE_SIZE), {}
    build_task("digits", folder / "digits")
    for method in methods:
        packs[method] = folder / f"{method}.pet"
        train(folder / "digits", backbone, method, packs[method], epochs=1, shots=2)
        base_graph(backbone, read_pack(packs[method]).delta.branches)
    base_graph(backbone)
    return packs


def measured(packs: dict[str, Path], rounds: int) -> list[dict[str, object]]:
    """A row for each method: kilobytes, and p50 and its ratio to the plain backbone, by runtime."""
    rows: dict[str, dict[str, object]] = {}
    for runtime, settle_s in SETTLE_S.items():
        first, *others = packs.values()
        report = bench([first, *others], runtimes=[runtime], rounds=rounds, plain=True, settle_s=settle_s)
        plain = next(row for row in report.rows if (row.mode, row.precision) == ("plain", "fp32"))
        for method, pack in packs.items():
            delta = read_pack(pack).delta
            (row,) = (r for r in report.rows if (r.model, r.precision) == (pack.name, "fp32") and r.mode != "plain")
            cell = rows.setdefault(
                method,
                {
                    "method": method,
                    "foldable": not delta.branches,
                    "values": delta.stored_values,
                    "pack_bytes": pack.stat().st_size,
                },
            )
            cell[runtime] = {"p50_ms": row.p50_ms, "ratio": to_json(ratio(report, row, plain)), "noisy": row.noisy}
            cell.setdefault("plain_p50_ms", {})[runtime] = plain.p50_ms  # type: ignore[attr-defined]
    return list(rows.values())


if __name__ == "__main__":
    main()
