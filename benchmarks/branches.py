"""What branches cost at inference, beside methods that fold: all in one interleaved run.

    python benchmarks/branches.py     # ten minutes on 2 cores, which nothing else should use

ViT-S/14 at 112 pixels, every method at its defaults. Latency does not depend on values: each pack is trained for one
epoch on two images a class. Writes ``branches.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from harness import IMAGE_SIZES, asked, parser_of, write_result
from trainings import short_packs

from edgepet import bench, read_pack
from edgepet.exporters.trace import base_graph
from edgepet.measuring.latency import ratio
from edgepet.measuring.machine import environment
from edgepet.methods import METHODS, Branching
from edgepet.networks.loading import load_backbone

BACKBONE = "vit-small"
FOLDED = ("ssf", "lora", "fact-tt", "bi-lora")
ELSEWHERE = ("conv-adapter", "st-adapter")  # the one has no place on a ViT, the other takes clips
RUNTIMES = ("onnxruntime", "openvino")


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--rounds", type=int, default=100)
    return made


def main() -> None:
    """Train hardly at all, and measure."""
    options = parser().parse_args()
    run = asked(options)
    branching = tuple(n for n, kind in METHODS.items() if issubclass(kind, Branching) and n not in ELSEWHERE)
    methods = ("ssf", "adaptformer") if run.quick else (*FOLDED, *branching)
    rounds = 2 if run.quick else int(options.rounds)
    packs = dict(zip(methods, short_packs(run, BACKBONE, methods), strict=True))
    backbone = load_backbone(f"demo:{BACKBONE}", image_size=IMAGE_SIZES[BACKBONE])
    for pack in packs.values():
        base_graph(backbone, read_pack(pack).delta.branches)
    base_graph(backbone)
    facts = {
        "backbone": backbone.label,
        "image_size": IMAGE_SIZES[BACKBONE],
        "rounds": rounds,
        "threads": environment().cores,
        "rows": measured(packs, rounds),
    }
    write_result(run, "branches", facts)


@dataclass(slots=True)
class _Cells:
    """What was found of one method, by runtime."""

    of: dict[str, dict[str, object]] = field(default_factory=dict)
    plain_p50_ms: dict[str, float] = field(default_factory=dict)


def measured(packs: dict[str, Path], rounds: int) -> list[dict[str, object]]:
    """A row for each method: kilobytes, and p50 and its ratio to the plain backbone, by runtime."""
    found = {method: _Cells() for method in packs}
    for runtime in RUNTIMES:
        report = bench(list(packs.values()), runtimes=[runtime], rounds=rounds, plain=True)
        plain = next(row for row in report.rows if (row.mode, row.precision) == ("plain", "fp32"))
        for method, pack in packs.items():
            (row,) = (r for r in report.rows if (r.model, r.precision) == (pack.name, "fp32") and r.mode != "plain")
            over = ratio(report, row, plain)
            found[method].of[runtime] = {"p50_ms": row.p50_ms, "ratio": over, "noisy": row.noisy}
            found[method].plain_p50_ms[runtime] = plain.p50_ms
    rows: list[dict[str, object]] = []
    for method, pack in packs.items():
        delta, cells = read_pack(pack).delta, found[method]
        facts = {"method": method, "foldable": not delta.branches, "values": delta.stored_values}
        rows.append(facts | {"pack_bytes": pack.stat().st_size, **cells.of, "plain_p50_ms": cells.plain_p50_ms})
    return rows


if __name__ == "__main__":
    main()
