"""Test accuracy of methods on the two demo tasks, at defaults.

    python benchmarks/accuracy.py --dir DIR                               # about half an hour on 2 cores
    python benchmarks/accuracy.py --dir DIR --backbone efficientnet-lite0
    python benchmarks/accuracy.py --dir DIR --every                       # every method, on fewer images, an hour

Writes ``accuracy-BACKBONE.json``, or ``accuracy-every.json``, to which a run of some ``--methods`` adds. The numbers
compare methods on one backbone: vit-small is a saliency-tuned descendant of DINOv2-S/14 and not DINOv2-S, so they say
nothing about that network.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from harness import IMAGE_SIZES, SMALLER, asked, earlier, parser_of, write_result
from trainings import FEW, TEST_CAP, Trained, Training, trained

from edgepet.methods import METHODS
from edgepet.networks.loading import load_backbone

TASKS = ("digits", "landcover")
CHOSEN = {
    "vit-small": ("linear-probe", "ssf", "lora", "consolidator"),
    "efficientnet-lite0": ("linear-probe", "full", "ssf", "lora"),
}
EVERY = {  # a method with its linear probe, where it has a place; st-adapter takes clips
    "vit-small": tuple(name for name in METHODS if name not in ("conv-adapter", "st-adapter")),
    "efficientnet-lite0": ("linear-probe", "conv-adapter"),
}
SHOTS, TEST_IMAGES = 40, 500  # of each class, and in all, where every method is tried
QUICK = {"vit-small": ("linear-probe", "ssf"), "efficientnet-lite0": ("ssf",)}
QUICK_EVERY = {"vit-small": ("adaptformer",), "efficientnet-lite0": ("conv-adapter",)}


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--backbone", choices=CHOSEN, default="vit-small", help="a demo backbone (%(default)s)")
    made.add_argument("--every", action="store_true", help="every method, each on a backbone that it suits")
    made.add_argument("--methods", default="", help="with --every: names with commas between (default: all)")
    return made


def main() -> None:
    """Train and score what is asked for."""
    options = parser().parse_args()
    run, every = asked(options), bool(options.every)
    some = set(options.methods.split(",")) if options.methods else set(METHODS)
    plan = trainings(options.backbone, every=every, quick=run.quick)
    rows = [row(each) for each in trained(run, [each for each in plan if each.method in some])]
    if every:
        kept = [each for each in earlier(run, "accuracy-every").get("rows", ()) if each["method"] not in some]
        write_result(run, "accuracy-every", {"rows": sorted([*kept, *rows], key=place)})
        return
    backbone = load_backbone(f"demo:{options.backbone}", image_size=IMAGE_SIZES[options.backbone])
    facts = {"name": backbone.label, "fingerprint": backbone.fingerprint, "description": backbone.description}
    found = {"rows": rows, "backbone": facts, "image_size": IMAGE_SIZES[options.backbone]}
    write_result(run, f"accuracy-{options.backbone}", found)


def place(made: Mapping[str, Any]) -> tuple[bool, str, int]:
    """Where a row of every method goes: by backbone, task and method."""
    return made["backbone"] != "demo:vit-small", made["task"], list(METHODS).index(made["method"])


def trainings(backbone: str, *, every: bool, quick: bool) -> list[Training]:
    """What is trained: task by task, backbone by backbone."""
    one = {backbone: (QUICK if quick else CHOSEN)[backbone]}
    plan = one if not every else QUICK_EVERY if quick else EVERY
    sizes, tasks = SMALLER if every else IMAGE_SIZES, TASKS[:1] if quick else TASKS
    return [
        Training(
            task=task,
            backbone=name,
            method=method,
            image_size=sizes[name],
            epochs=1 if quick else None,
            shots=2 if quick else SHOTS if every else None,
            test_cap=TEST_IMAGES if every else TEST_CAP,
            few=FEW if quick else None,
            scored=True,
        )
        for task in tasks
        for name, methods in plan.items()
        for method in methods
    ]


def row(made: Trained) -> dict[str, object]:
    """One method on one task."""
    report = made.result.report
    return {
        "backbone": report["backbone"],
        "task": made.training.task,
        "method": made.training.method,
        "trainable_params": report["stored_values"],
        "pack_bytes": report["pack_bytes"],
        "shots": made.training.shots,
        "epochs": report["epochs"],
        "best_epoch": report["best_epoch"],
        "val_top1": report["val_top1"],
        "val_n": report["val_n"],
        "test_top1": report["test_top1"],
        "test_n": report["test_n"],
    }


if __name__ == "__main__":
    main()
