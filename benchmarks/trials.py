"""What methods are worth by test top-1: with and without PACE, on some blocks, on few images, begun on other tasks.

    python benchmarks/trials.py --dir DIR                   # all tables; many hours on 2 cores
    python benchmarks/trials.py --dir DIR --only few-shots  # one of them
    python benchmarks/trials.py --dir DIR --only speed      # images per second, on a machine that does nothing else

Tables are lists of trainings, all of them jobs below DIR: what is there is not trained again, and what an interrupted
run found is in its file, ``trials-TABLE.json``. Images per second are measured by themselves, in turns, by short
trainings: the long ones may share the machine. ``report.py`` makes the tables in docs/guide/methods.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    FEW,
    IMAGE_SIZES,
    SMALLER,
    Asked,
    Pretraining,
    Trained,
    Training,
    asked,
    draw,
    parser_of,
    source,
    trained,
    write_result,
)

from edgepet import TrainOptions, train
from edgepet.networks.loading import load_backbone
from edgepet.reports.tables import Column, Table, format_bytes, format_percent, markdown

VIT, CONVNET = "vit-small", "efficientnet-lite0"
TASKS = ("landcover", "digits", "cards", "fashion")
METHODS = (
    "linear-probe", "ssf", "lora", "consolidator", "rlrr", "hta", "arc", "glora", "vera", "uni-lora", "full",
)  # fmt: skip
PACE, PACED = {"consistency": "full"}, ("ssf", "lora", "hta")
SEVERAL, SEVERAL_TASKS, SEEDS = ("linear-probe", "ssf", "lora"), ("landcover", "digits"), (0, 1, 2)
DEPTHS = ("", "6-11", "9-11")
SHOTS, DRAWS, FEW_TASKS = (5, 20, 80), (0, 1, 2), ("landcover", "digits")
BROAD, NARROW = ("materials", "emoji", "fashion"), ("landcover", "digits")
FEWEST, NARROW_DRAWS, PRETRAINED = (1, 2, 4, 8), (0, 1, 2, 3, 4), ("vpt-deep", "ssf")
FEW_TEST = 500  # test images where many draws are trained
SPEED_SHOTS, SPEED_EPOCHS, ROUNDS = 16, 3, 5


# ---------------------------------------------------------------------------------------------------------- the tables


def methods() -> Iterator[Training]:
    """Methods on four tasks, three of them with PACE; some with three seeds on two tasks."""
    for task in TASKS:
        for method in METHODS:
            yield _on_vit(task, method)
            if method in PACED:
                yield replace(_on_vit(task, method), options=PACE)
    for seed, task, method in itertools.product(SEEDS[1:], SEVERAL_TASKS, SEVERAL):
        yield _on_vit(task, method, seed=seed)
        if method in PACED:
            yield replace(_on_vit(task, method, seed=seed), options=PACE)


def depth() -> Iterator[Training]:
    """SSF and LoRA on all blocks, on half of them, and on a quarter."""
    for task, method, blocks in itertools.product(TASKS, ("ssf", "lora"), DEPTHS):
        yield replace(_on_vit(task, method), settings={"blocks": blocks} if blocks else {})


def few_shots() -> Iterator[Training]:
    """A ConvNet on few images: what a method's start is worth, beside the linear probe."""
    for task, shots, method, draw_number in itertools.product(
        FEW_TASKS, SHOTS, ("linear-probe", "ssf", "conv-adapter"), DRAWS
    ):
        yield Training(
            task=task, backbone=CONVNET, method=method, image_size=SMALLER[CONVNET], shots=shots, seed=draw_number,
            test_cap=FEW_TEST, scored=True,
        )  # fmt: skip


def pretrained() -> Iterator[Training]:
    """PVP's claim: modules that other tasks have tuned, then very few images, beside the method's own start."""
    for task, shots, method, draw_number in itertools.product(NARROW, FEWEST, PRETRAINED, NARROW_DRAWS):
        own = replace(_on_vit(task, method, seed=draw_number), shots=shots, test_cap=FEW_TEST)
        yield own
        yield replace(own, init=Pretraining(tasks=BROAD, backbone=VIT, method=method, image_size=IMAGE_SIZES[VIT]))


def _on_vit(task: str, method: str, *, seed: int = 0) -> Training:
    return Training(task=task, backbone=VIT, method=method, image_size=IMAGE_SIZES[VIT], seed=seed, scored=True)


TABLES: dict[str, Callable[[], Iterator[Training]]] = {
    "methods": methods,
    "depth": depth,
    "few-shots": few_shots,
    "pretrained": pretrained,
}
SPEED = "speed"


# -------------------------------------------------------------------------------------------------------------- running


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--only", choices=(*TABLES, SPEED), help="one table")
    return made


def main() -> None:
    """Make what is asked for, a row at a time."""
    options = parser().parse_args()
    run = asked(options)
    if options.only in (None, SPEED):
        write_result(run, "trials-speed", speed(run))
    for table in TABLES if options.only is None else {options.only} - {SPEED}:
        trainings = list(TABLES[table]())
        if run.quick:
            trainings = [_smallest(trainings[-1])]
        rows = list[dict[str, object]]()
        for each in trainings:
            rows.append(row(*trained(run, [each])))
            write_result(run, f"trials-{table}", {"trainings": len(trainings), "rows": rows})


def speed(run: Asked) -> dict[str, object]:
    """Images per second of the steps of trainings that differ in method, settings or options, in turns."""
    data, backbone = draw(run, "digits"), load_backbone(f"demo:{VIT}", image_size=IMAGE_SIZES[VIT])
    every = [each for each in (*methods(), *depth()) if each.task == TASKS[0] and each.seed == 0]
    several = {json.dumps([each.method, each.settings, each.options]): each for each in every}
    timed = list(several.values())[1:3] if run.quick else list(several.values())
    timing = TrainOptions(shots=2, epochs=1) if run.quick else TrainOptions(shots=SPEED_SHOTS, epochs=SPEED_EPOCHS)
    found: list[list[float]] = [[] for _ in timed]
    for number, turn in itertools.product(range(1 if run.quick else ROUNDS), range(len(timed))):
        place = (number + turn) % len(timed)
        each = timed[place]
        with tempfile.TemporaryDirectory() as folder:
            report = train(
                data, backbone, each.method, Path(folder) / "timed.pet", options=timing, settings=each.settings,
                **each.options,
            )  # fmt: skip
        found[place].append(report.images_per_second)
    return {
        "what": f"images/s of steps, {IMAGE_SIZES[VIT]} px, batch 32; medians over rounds in turns",
        "rows": [
            {
                "method": each.method,
                "settings": dict(each.settings),
                "options": dict(each.options),
                "images_per_second": float(np.median(speeds)),
                "low": min(speeds),
                "high": max(speeds),
            }
            for each, speeds in zip(timed, found, strict=True)
        ],
    }


def _smallest(training: Training) -> Training:
    init = None if training.init is None else replace(training.init, tasks=("digits",), epochs=1, few=FEW)
    return replace(training, task="digits", epochs=1, shots=2, few=FEW, init=init)


def row(made: Trained) -> dict[str, object]:
    """One training."""
    training, report = made.training, made.result.report
    return {
        "task": training.task,
        "backbone": report["backbone"],
        "image_size": training.image_size,
        "method": training.method,
        "settings": dict(training.settings),
        "options": dict(training.options),
        "init": None if training.init is None else list(training.init.tasks),
        "shots": training.shots,
        "seed": training.seed,
        "epochs": report["epochs"],
        "best_epoch": report["best_epoch"],
        "precision": report["precision"],
        "stored_values": report["stored_values"],
        "pack_bytes": report["pack_bytes"],
        "val_top1": report["val_top1"],
        "test_top1": report["test_top1"],
        "test_n": report["test_n"],
    }


# --------------------------------------------------------------------------------------------------------------- pages


def trial_tables(results: Mapping[str, Any]) -> str:
    """The tables of all trials that there are results of."""
    made = {"methods": methods_table, "depth": depth_table, "few-shots": shots_table, "pretrained": shots_table}
    known = {name: results[f"trials-{name}"] for name in made if f"trials-{name}" in results}
    return "\n".join(made[name](found, results.get("trials-speed")) for name, found in known.items())


def methods_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each method, with PACE or without."""
    told = (
        "Test top-1 after 800 images at each method's defaults; of several seeds the mean, and the lowest and highest."
    )
    return _by_task("Methods on four tasks, demo:vit-small at 112 px", told, result, timed)


def depth_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each method and range of blocks."""
    told = "Test top-1 after 800 images at defaults, one seed."
    return _by_task("Only some of the blocks, demo:vit-small at 112 px", told, result, timed)


def _by_task(title: str, told: str, result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    rows, tasks = result["rows"], [task for task in TASKS if any(row["task"] == task for row in result["rows"])]
    speeds = {_name(row): row["images_per_second"] for row in timed["rows"]} if timed else {}
    shown = []
    for name in dict.fromkeys(map(_name, rows)):
        of = [row for row in rows if _name(row) == name]
        top1 = {task: [row["test_top1"] for row in of if row["task"] == task] for task in tasks}
        means = [np.mean(found) for found in top1.values() if found]
        mean = format_percent(float(np.mean(means))) if len(means) == len(tasks) else ""
        speed = f"{speeds[name]:.0f}" if name in speeds else ""
        pack = format_bytes(max(row["pack_bytes"] for row in of))
        shown.append((name, *map(_spread, top1.values()), mean, pack, speed))
    numbers = (*tasks, "mean", "largest pack", "images/s")
    columns = (Column("method"), *(Column(name, right=True) for name in numbers))
    sources = " ".join(source(each) for each in (result, timed) if each)
    return f"{markdown(Table(title, columns, shown))}\n{told}{_left(result)} {sources}\n"


def shots_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each task and method, a column for each number of images."""
    del timed
    rows, shots = result["rows"], sorted({row["shots"] for row in result["rows"]})
    shown = []
    for task, name in sorted({(row["task"], _name(row)) for row in rows}):
        of = [row for row in rows if (row["task"], _name(row)) == (task, name)]
        shown.append((task, name, *(_spread([row["test_top1"] for row in of if row["shots"] == n]) for n in shots)))
    first = rows[0]
    title = f"Images of each class, {first['backbone']} at {first['image_size']} px"
    columns = (Column("task"), Column("method"), *(Column(str(n), right=True) for n in shots))
    told = f"Test top-1 of {first['test_n']} images; mean of the draws of images, and the lowest and highest."
    return f"{markdown(Table(title, columns, shown))}\n{told}{_left(result)} {source(result)}\n"


def _name(row: Mapping[str, Any]) -> str:
    settings = "".join(f", {key} {value}" for key, value in row["settings"].items())
    begun = f", begun on {', '.join(row['init'])}" if row.get("init") else ""
    return f"{row['method']}{' + PACE' if 'consistency' in row['options'] else ''}{settings}{begun}"


def _spread(found: Sequence[float]) -> str:
    if not found:
        return ""
    mean = format_percent(float(np.mean(found)))
    return mean if len(found) == 1 else f"{mean} ({format_percent(min(found))} to {format_percent(max(found))})"


def _left(result: Mapping[str, Any]) -> str:
    left = result["trainings"] - len(result["rows"])
    return f" {left} of {result['trainings']} trainings are still to be made." if left else ""


if __name__ == "__main__":
    main()
