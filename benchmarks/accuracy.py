"""Test accuracy of every method of the first issue on the two demo tasks, at defaults.

    python benchmarks/accuracy.py --dir /tmp/accuracy      # about half an hour on 2 cores

Writes ``results/accuracy.json``. The numbers compare methods on one backbone: it is a saliency-tuned descendant of
DINOv2-S/14 and not DINOv2-S, so they say nothing about that network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgepet import evaluate, train
from edgepet.backbones import load_backbone
from edgepet.exporters.trace import base_graph
from edgepet.machine import environment
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
    base_graph(load_backbone(BACKBONE, image_size=IMAGE_SIZE))
    rows = []
    with Progress() as progress:
        for task in TASKS:
            data = folder / task
            build_task(task, data)
            for method in METHODS:
                with progress.training(f"{task} {method}") as say:
                    made = train(
                        data, BACKBONE, method, folder / f"{task}-{method}.pet", image_size=IMAGE_SIZE, say=say
                    )
                with progress.stage(f"{task} {method}: test"):
                    test = evaluate(made.pack, data)
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "trainable_params": made.trainable_params,
                        "pack_bytes": made.pack_bytes,
                        "epochs": made.epochs,
                        "val_top1": made.val.top1,
                        "val_n": made.val.n,
                        "test_top1": test.top1,
                        "test_n": test.n,
                        "algebra_max_abs": made.algebra_max_abs,
                        "algebra_limit": made.algebra_limit,
                    }
                )
    result = {
        "command": "python benchmarks/accuracy.py --dir DIR",
        "backbone": {
            "name": BACKBONE,
            "fingerprint": made.backbone.fingerprint,
            "description": made.backbone.description,
        },
        "image_size": IMAGE_SIZE,
        "rows": rows,
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
