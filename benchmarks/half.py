"""What fp16 costs and saves: bytes and answers of exported tasks beside their fp32 selves.

    python benchmarks/half.py --pack TASK.pet [--pack TASK.pet ...]

Packs need their work folders: the answers are compared with the tuned network's. Writes ``results/half.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from edgepet import ExportOptions, export, read_pack
from edgepet.device.artifact import Format
from edgepet.measuring.machine import environment
from edgepet.reports.as_json import to_json
from edgepet.verbs.export import Exported

RESULT = Path(__file__).parent / "results" / "half.json"
FORMATS: tuple[Format, ...] = ("onnx", "openvino", "tensorrt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", type=Path, action="append", required=True)
    packs = parser.parse_args().pack
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "fp16"):
            options = ExportOptions(to=FORMATS, precision=precision)
            rows += [row(each) for each in export(packs, folder, options=options).artifacts]
    result = {
        "command": f"python benchmarks/half.py{''.join(f' --pack {pack.name}' for pack in packs)}",
        "backbones": {pack.stem: read_pack(pack).delta.backbone for pack in packs},
        "rows": rows,
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def row(exported: Exported) -> dict[str, object]:
    return {
        "task": exported.task,
        "format": exported.format,
        "precision": exported.precision,
        "size_bytes": exported.size_bytes,
        "parity": to_json(exported.parity) if exported.parity else None,
        "stored": exported.stored,
        "executed": exported.executed,
        "kept_fp32": Counter(f"{node.op}: {node.reason}" for node in exported.kept_fp32),
    }


if __name__ == "__main__":
    main()
