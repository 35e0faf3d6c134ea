"""Test accuracy of methods on the two demo tasks, at defaults.

    python benchmarks/accuracy.py --dir accuracy                          # two hours on 2 cores
    python benchmarks/accuracy.py --dir lite0 --backbone efficientnet-lite0

Writes ``results/accuracy-BACKBONE.json``. The numbers compare methods on one backbone: vit-small is a saliency-tuned
descendant of DINOv2-S/14 and not DINOv2-S, so they say nothing about that network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgepet import evaluate, read_pack, train
from edgepet.backbones import load_backbone
from edgepet.exporters.trace import base_graph
from edgepet.machine import environment
from edgepet.methods import METHODS
from edgepet.ondevice import EvalReport
from edgepet.report import Progress, to_json
from edgepet.samples import build_task

TASKS = ("digits", "landcover")
# Side of the images, and the methods that are compared: on the ViT all that have a place there and take images.
BACKBONES = {
    "vit-small": (112, tuple(name for name in METHODS if name not in ("conv-adapter", "st-adapter"))),
    "efficientnet-lite0": (224, ("linear-probe", "full", "ssf", "lora", "conv-adapter")),
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where images and packs go")
    parser.add_argument("--backbone", choices=BACKBONES, default="vit-small", help="a demo backbone (%(default)s)")
    arguments = parser.parse_args()
    folder, name = arguments.dir, arguments.backbone
    image_size, methods = BACKBONES[name]
    backbone = load_backbone(f"demo:{name}", image_size=image_size)
    rows = []
    with Progress() as progress:
        for task in TASKS:
            build_task(task, folder / task)
            for method in methods:
                pack = folder / f"{task}-{method}.pet"
                if not pack.exists():  # packs of an interrupted run are kept
                    with progress.training(f"{task} {method}") as say:
                        train(folder / task, backbone, method, pack, say=say)
                with progress.stage(f"{task} {method}: test"):
                    base_graph(backbone, read_pack(pack).delta.branches)
                    rows.append(row(task, method, pack, evaluate(pack, folder / task, threads=1)))
    result = {
        "command": f"python benchmarks/accuracy.py --dir DIR --backbone {name}",
        "backbone": {
            "name": backbone.label,
            "fingerprint": backbone.fingerprint,
            "description": backbone.description,
        },
        "image_size": image_size,
        "rows": rows,
        "environment": to_json(environment()),
    }
    (RESULTS / f"accuracy-{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


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
