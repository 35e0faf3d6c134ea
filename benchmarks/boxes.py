"""What methods are worth on boxes, by the AP of a test split, and what heads lose that share one run of the network.

    python benchmarks/boxes.py --dir DIR                # all rows; many hours on 2 cores
    python benchmarks/boxes.py --dir DIR --task trees   # those of one task
    python benchmarks/boxes.py --dir DIR --most 3       # three rows that are missing

One detector on EfficientNet-Lite0 behind each method; and on ViT-S with SSF boxes, a mask and labels, each alone and
all three at once. The trainings are jobs below DIR, without augmentation, and what has a row in ``boxes.json`` already
is not trained again. The images are of packages that CONTRIBUTING.md names. ``report.py`` makes the tables in
docs/guide/boxes.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from harness import asked, source, spread
from rows import Rows, rows_parser
from trainings import Trained, Training

from edgepet.reports.tables import Column, Table, format_bytes, format_number, format_percent, markdown

CONVNET, VIT = "efficientnet-lite0", "vit-small"
SIZES = {CONVNET: 256, VIT: 224}
SEEDS = {"trees": (0, 1, 2), "stamps_scene": (0,)}
METHODS = ("linear-probe", "ssf", "lora", "conv-adapter", "full")
SCENE, HEADS = "stamps_scene", ("boxes", "mask", "labels")
EPOCHS, TEST_IMAGES = 20, 1000
QUICK_SIZE = 64


def detectors() -> Iterator[Training]:
    """Every method behind one detector."""
    for task, seeds in SEEDS.items():
        for method in METHODS:
            for seed in seeds:
                yield _training(task, CONVNET, method, "boxes", seed)


def together() -> Iterator[Training]:
    """Heads of one task, each by itself and all on one run."""
    for answers in (*HEADS, ",".join(HEADS)):
        yield _training(SCENE, VIT, "ssf", answers, 0)


def _training(task: str, backbone: str, method: str, answers: str, seed: int) -> Training:
    return Training(
        task=task, backbone=backbone, method=method, image_size=SIZES[backbone], epochs=EPOCHS, seed=seed,
        test_cap=TEST_IMAGES, scored=True, options={"task": answers},
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    return rows_parser(__doc__, SEEDS)


def main() -> None:
    """A row at a time, those that are missing."""
    options = parser().parse_args()
    run, every = asked(options), [*detectors(), *together()]
    if run.quick:
        every = [replace(every[0], method="ssf", epochs=1, image_size=QUICK_SIZE)]
    Rows(run, "boxes", every, task=None if run.quick else options.task).fill(row, options.most)


def row(made: Trained) -> dict[str, object]:
    """One training, with what each of its heads comes to."""
    training, report = made.training, made.result.report
    return {
        "task": training.task,
        "backbone": report["backbone"],
        "image_size": training.image_size,
        "method": training.method,
        "answers": training.options["task"],
        "seed": training.seed,
        "epochs": report["epochs"],
        "best_epoch": report["best_epoch"],
        "precision": report["precision"],
        "trainable_params": report["trainable_params"],
        "head_params": report["head_params"],
        "pack_bytes": report["pack_bytes"],
        "val": report["val"],
        "test": report["test"],
        "seconds": round(made.result.seconds),
    }


# ---------------------------------------------------------------------------------------------------------------- pages


def box_tables(results: Mapping[str, Any]) -> str:
    """Detectors of each method, and heads alone and together, as far as they are measured."""
    if "boxes" not in results:
        return "Not measured yet.\n"
    result = results["boxes"]
    alone = [each for each in result["rows"] if each["backbone"] == f"demo:{CONVNET}"]
    scene = [each for each in result["rows"] if each["backbone"] == f"demo:{VIT}"]
    left = result["trainings"] - len(result["rows"])
    told = (
        f"Of the test split, {EPOCHS} epochs without augmentation; of several seeds the mean, and the lowest and"
        f" highest. Intervals are of images drawn anew.{f' {left} trainings are still to be made.' if left else ''}"
    )
    tables = [_detectors(alone)] if alone else []
    tables += [_together(scene)] if scene else []
    return "\n".join([*tables, f"{told} {source(result)}\n"])


def _detectors(rows: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in rows:
        groups.setdefault((each["task"], each["method"]), []).append(each)
    shown = [(*named, *_numbers(of)) for named, of in groups.items()]
    numbers = ("values trained", "head", "pack, fp16", "AP", "AP50", "95 % interval of AP", "seeds")
    columns = (*map(Column, ("task", "method")), *(Column(name, right=True) for name in numbers))
    return markdown(Table(f"Boxes, demo:{CONVNET} at {SIZES[CONVNET]} px", columns, shown))


def _numbers(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    first, tests = rows[0], [each["test"]["boxes"] for each in rows]
    low, high = (float(np.mean([each[name] for each in tests])) for name in ("low", "high"))
    return (
        format_number(first["trainable_params"]),
        format_number(first["head_params"]),
        format_bytes(max(each["pack_bytes"] for each in rows)),
        spread([each["value"] for each in tests]),
        spread([each["map50"] for each in tests]),
        f"{format_percent(low)} to {format_percent(high)}",
        str(len(rows)),
    )


def _together(rows: list[dict[str, Any]]) -> str:
    shown = [
        (
            each["answers"].replace(",", ", "), format_bytes(each["pack_bytes"]),
            *(format_percent(each["test"][head]["value"]) if head in each["test"] else "" for head in HEADS),
        )
        for each in rows
    ]  # fmt: skip
    numbers = ("pack, fp16", "boxes, AP", "mask, mIoU", "labels, mean AP")
    columns = (Column("heads"), *(Column(name, right=True) for name in numbers))
    return markdown(Table(f"Heads of {SCENE} on one run, SSF, demo:{VIT} at {SIZES[VIT]} px", columns, shown))


if __name__ == "__main__":
    main()
