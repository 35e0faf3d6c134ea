"""The second task costs no trace: seconds to fold and write fp32 ONNX once the base graph is in the cache.

    python benchmarks/export.py [--pack FIRST.pet --pack SECOND.pet]

Without packs it trains two for one epoch: what they cost does not depend on how well they are trained. Writes
``export.json``. ``seconds`` is folding and writing, ``verify_seconds`` the comparison with torch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median_low

from harness import IMAGE_SIZES, asked, parser_of, write_result
from trainings import short_packs

from edgepet import ExportOptions, export
from edgepet.exporters.trace import base_graph
from edgepet.networks.loading import load_backbone

BACKBONE = "vit-small"
REPEATS = 5


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--pack", type=Path, action="append", default=[], help="two packs of vit-small at 112 pixels")
    return made


def main() -> None:
    """Trace once, then export as often as is asked for."""
    options = parser().parse_args()
    run = asked(options)
    packs: list[Path] = options.pack or short_packs(run, BACKBONE, ("ssf", "lora"))
    backbone = load_backbone(f"demo:{BACKBONE}", image_size=IMAGE_SIZES[BACKBONE])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        base_graph(backbone, root=folder / "fresh")  # a folder of its own, so that it traces now
        trace_seconds = time.perf_counter() - began
        base_graph(backbone)
        seconds = [
            export(packs, folder / f"out{number}", options=ExportOptions(to=("onnx",))).artifacts[1]
            for number in range(1 if run.quick else REPEATS)
        ]
    facts = {
        "what": "the second pack to fp32 ONNX with the base graph in the cache; tracing it once took trace_seconds",
        "trace_seconds": trace_seconds,
        "size_bytes": seconds[-1].size_bytes,
        "rows": [{"seconds": each.seconds, "verify_seconds": each.verify_seconds} for each in seconds],
        "median_seconds": median_low(each.seconds for each in seconds),
    }
    write_result(run, "export", facts)


if __name__ == "__main__":
    main()
