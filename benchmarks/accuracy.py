"""Test accuracy of every method of the first issue on the two demo tasks, at defaults.

    python benchmarks/accuracy.py --dir accuracy      # about half an hour on 2 cores

Writes ``results/accuracy.json``. The numbers compare methods on one backbone: it is a saliency-tuned descendant of
DINOv2-S/14 and not DINOv2-S, so they say nothing about that network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgepet import evaluate, read_pack, train
from edgepet.backbones import load_backbone
from edgepet.exporters.trace import base_graph
from edgepet.machine import environment
from edgepet.ondevice import EvalReport
from edgepet.report import Progress, to_json
from edgepet.samples import build_task

BACKBONE, IMAGE_SIZE = "demo:vit-small", 112
TASKS = ("digits", "landcover")
METHODS = ("linear-probe", "ssf", "lora", "consolidator")
RESULT = Path(__file__).parent / "results" / "accuracy.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where images and packs go")
    folder = parser.parse_args().dir
    backbone = load_backbone(BACKBONE, image_size=IMAGE_SIZE)
    base_graph(backbone)
    rows = []
    with Progress() as progress:
        for task in TASKS:
            build_task(task, folder / task)
            for method in METHODS:
                pack = folder / f"{task}-{method}.pet"
                if not pack.exists():  # packs of an interrupted run are kept
                    with progress.training(f"{task} {method}") as say:
                        train(folder / task, BACKBONE, method, pack, image_size=IMAGE_SIZE, say=say)
                with progress.stage(f"{task} {method}: test"):
                    rows.append(row(task, method, pack, evaluate(pack, folder / task)))
    result = {
        "command": "python benchmarks/accuracy.py --dir DIR",
        "backbone": {
            "name": BACKBONE,
            "fingerprint": backbone.fingerprint,
            "description": backbone.description,
        },
        "image_size": IMAGE_SIZE,
        "rows": rows,
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def row(task: str, method: str, path: Path, test: EvalReport) -> dict[str, object]:
    pack = read_pack(path)
    return {
        "task": task,
        "method": method,
        "trainable_params": pack.delta.stored_values,
        "pack_bytes": pack.size_bytes,
        "epochs": pack.delta.training["epochs"],
        "best_epoch": pack.delta.training["best_epoch"],
        "val_top1": pack.delta.val.top1,
        "val_n": pack.delta.val.n,
        "test_top1": test.top1,
        "test_n": test.n,
    }


if __name__ == "__main__":
    main()
