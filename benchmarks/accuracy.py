"""Test accuracy of methods on the two demo tasks, at defaults.

    python benchmarks/accuracy.py --dir accuracy                          # about half an hour on 2 cores
    python benchmarks/accuracy.py --dir lite0 --backbone efficientnet-lite0
    python benchmarks/accuracy.py --dir every --every                     # every method, on fewer images, an hour

Writes ``results/accuracy-BACKBONE.json``, or ``results/accuracy-every.json``. The numbers compare
methods on one backbone: vit-small is a saliency-tuned descendant of DINOv2-S/14 and not DINOv2-S, so they say nothing
about that network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from edgepet import evaluate, read_pack, train
from edgepet.exporters.trace import base_graph
from edgepet.measuring.machine import environment
from edgepet.methods import METHODS
from edgepet.networks.backbone import Backbone, load_backbone
from edgepet.reports.as_json import to_json
from edgepet.reports.progress import Progress
from edgepet.samples.tasks import build_task
from edgepet.verbs.evaluate import EvalReport

TASKS = ("digits", "landcover")
IMAGE_SIZES = {"vit-small": 112, "efficientnet-lite0": 224}
SMALLER = {"vit-small": 112, "efficientnet-lite0": 128}  # where every method is tried
CHOSEN = {
    "vit-small": ("linear-probe", "ssf", "lora", "consolidator"),
    "efficientnet-lite0": ("linear-probe", "full", "ssf", "lora"),
}
EVERY = {  # a method with its linear probe, where it has a place; st-adapter takes clips
    "vit-small": tuple(name for name in METHODS if name not in ("conv-adapter", "st-adapter")),
    "efficientnet-lite0": ("linear-probe", "conv-adapter"),
}
SHOTS, TEST_IMAGES = 40, 500  # of each class, and in all, where every method is tried
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where images and packs go")
    parser.add_argument("--backbone", choices=CHOSEN, default="vit-small", help="a demo backbone (%(default)s)")
    parser.add_argument("--every", action="store_true", help="every method, each on a backbone that it suits")
    options = parser.parse_args()
    plan = EVERY if options.every else {options.backbone: CHOSEN[options.backbone]}
    told = "--every" if options.every else f"--backbone {options.backbone}"
    sizes = SMALLER if options.every else IMAGE_SIZES
    backbones = {name: load_backbone(f"demo:{name}", image_size=sizes[name]) for name in plan}
    rows: list[dict[str, object]] = []
    for task in TASKS:
        build_task(task, options.dir / task, test_cap=TEST_IMAGES if options.every else 2000)
        for name, methods in plan.items():
            rows += scores(task, backbones[name], methods, options.dir, SHOTS if options.every else None)
    result: dict[str, object] = {
        "command": f"python benchmarks/accuracy.py --dir DIR {told}",
        "rows": rows,
        "environment": to_json(environment()),
    }
    if not options.every:
        backbone = backbones[options.backbone]
        facts = {"name": backbone.label, "fingerprint": backbone.fingerprint, "description": backbone.description}
        result |= {"backbone": facts, "image_size": sizes[options.backbone]}
    name = "every" if options.every else options.backbone
    (RESULTS / f"accuracy-{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def scores(
    task: str, backbone: Backbone, methods: tuple[str, ...], folder: Path, shots: int | None
) -> Iterator[dict[str, object]]:
    packs = folder / backbone.label.removeprefix("demo:")
    packs.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        for method in methods:
            pack, score = packs / f"{task}-{method}.pet", packs / f"{task}-{method}.json"
            if not pack.exists():  # packs and scores of an interrupted run are kept
                with progress.training(f"{task} {method}") as say:
                    train(folder / task, backbone, method, pack, shots=shots, say=say, resume=True)
            if not score.exists():
                with progress.stage(f"{task} {method}: test"):
                    base_graph(backbone, read_pack(pack).delta.branches)
                    judged = row(task, method, backbone, pack, evaluate(pack, folder / task))
                score.write_text(json.dumps(judged))
            yield json.loads(score.read_text())


def row(task: str, method: str, backbone: Backbone, path: Path, test: EvalReport) -> dict[str, object]:
    pack = read_pack(path)
    return {
        "backbone": backbone.label,
        "task": task,
        "method": method,
        "trainable_params": pack.delta.stored_values,
        "pack_bytes": pack.size_bytes,
        "shots": pack.delta.training["shots"],
        "epochs": pack.delta.training["epochs"],
        "best_epoch": pack.delta.training["best_epoch"],
        "val_top1": pack.delta.val.top1,
        "val_n": pack.delta.val.n,
        "test_top1": test.top1,
        "test_n": test.n,
    }


if __name__ == "__main__":
    main()
