"""What fp16 costs and saves: bytes and answers of exported tasks beside their fp32 selves.

    python benchmarks/half.py [--pack TASK.pet ...]

Without packs it takes two that ``accuracy.py`` trains. Packs need their work folders: the answers are compared with the
tuned network's. Writes ``half.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from accuracy import trainings
from harness import asked, parser_of, write_result
from trainings import trained

from edgepet import ExportOptions, export, read_pack
from edgepet.device.runtimes import Format
from edgepet.proving.exported import Exported

FORMATS: tuple[Format, ...] = ("onnx", "openvino", "tensorrt")
PACKS = (("vit-small", "landcover-ssf.pet"), ("efficientnet-lite0", "digits-ssf.pet"))
QUICK = (("vit-small", "digits-ssf.pet"),)  # ReLUs that 20 images leave dead make a pack that fp16 cannot hold


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--pack", type=Path, action="append", default=[], help="packs with their work folders")
    return made


def main() -> None:
    """Export every pack in both precisions."""
    options = parser().parse_args()
    run = asked(options)
    packs: list[Path] = options.pack
    if not packs:
        chosen = [
            each
            for backbone, name in (QUICK if run.quick else PACKS)
            for each in trainings(backbone, every=False, quick=run.quick)
            if each.pack_name == name
        ]
        packs = [each.pack for each in trained(run, chosen)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "fp16"):
            made = export(packs, folder, options=ExportOptions(to=FORMATS, precision=precision))
            rows += [row(each) for each in made.artifacts]
    backbones = {pack.stem: read_pack(pack).delta.backbone for pack in packs}
    write_result(run, "half", {"backbones": backbones, "rows": rows})


def row(exported: Exported) -> dict[str, object]:
    """One artefact."""
    return {
        "task": exported.task,
        "format": exported.format,
        "precision": exported.precision,
        "size_bytes": exported.size_bytes,
        "parity": exported.parity,
        "stored": exported.stored,
        "executed": exported.executed,
        "kept_fp32": Counter(f"{node.op}: {node.reason}" for node in exported.kept_fp32),
    }


if __name__ == "__main__":
    main()
