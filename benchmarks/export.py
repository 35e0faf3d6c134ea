"""The second task costs no trace: seconds to fold and write fp32 ONNX once the base graph is in the cache.

    python benchmarks/export.py [--pack FIRST.pet --pack SECOND.pet]

Writes ``results/export.json``. ``seconds`` is folding and writing, ``verify_seconds`` the comparison with torch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from latency import BACKBONE, IMAGE_SIZE, quick_packs

from edgepet import ExportOptions, export
from edgepet.exporters import trace
from edgepet.measuring.machine import environment
from edgepet.networks.backbone import load_backbone
from edgepet.reports.as_json import to_json

RESULT = Path(__file__).parent / "results" / "export.json"
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", type=Path, action="append", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        packs = options.pack or quick_packs(folder)
        backbone = load_backbone(BACKBONE, image_size=IMAGE_SIZE)
        began = time.perf_counter()
        trace.base_graph(backbone, root=folder / "fresh")  # a folder of its own, so that it traces now
        trace_seconds = time.perf_counter() - began
        trace.base_graph(backbone)
        rows = []
        for number in range(REPEATS):
            report = export(packs, folder / f"out{number}", options=ExportOptions(to=("onnx",)))
            second = report.artifacts[1]
            rows.append({"seconds": second.seconds, "verify_seconds": second.verify_seconds})
    result = {
        "command": "python benchmarks/export.py --pack digits-ssf.pet --pack landcover-lora.pet",
        "what": "the second pack to fp32 ONNX with the base graph in the cache; tracing it once took trace_seconds",
        "trace_seconds": trace_seconds,
        "size_bytes": second.size_bytes,
        "rows": rows,
        "median_seconds": sorted(row["seconds"] for row in rows)[REPEATS // 2],
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
