"""What methods are worth by test top-1: on many tasks, with PACE, on some blocks, on few images, begun on other tasks.

Beside it how far logits are after one epoch of few images, and where ``edgepet sites`` would tune.

    python benchmarks/trials.py --dir DIR                   # all tables; many hours on 2 cores
    python benchmarks/trials.py --dir DIR --only few-shots  # one of them; --task digits: of one task
    python benchmarks/trials.py --dir DIR --only speed      # images per second, on a machine that does nothing else

Tables are lists of trainings, all of them jobs below DIR: what is there is not trained again, nor what has a row in the
file of this table or another, ``trials-TABLE.json``, so that many short runs make a long one. Images per second are
measured by themselves, in turns, by short trainings: the long ones may share the machine. ``report.py`` makes the
tables in docs/guide/methods.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import IMAGE_SIZES, SMALLER, Asked, asked, earlier, write_result
from rows import Rows, rows_parser
from trainings import FEW, Pretraining, Trained, Training, draw, finished, images_of, measuring_job, pack_of, trained

from edgepet import TrainOptions, train
from edgepet.networks.loading import load_backbone
from edgepet.reports.progress import Progress

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
LONG: tuple[dict[str, Any], ...] = ({}, {"consistency": "cheap,sigma=2,weight=0.5"})
LONG_EPOCHS = 100  # PACE's authors train for as long
SITES_TASK, SITES_METHOD = "landcover", "lora"
FURTHER_TASKS = ("elpv", "materials", "emoji", "stamps", "clipart", "count")
GRID = (
    "linear-probe", "full", "bitfit", "ssf", "lora", "consolidator", "fact-tk", "hta", "convpass", "vpt-deep",
)  # fmt: skip
BEST = "hta"
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


def starts() -> Iterator[Training]:
    """One epoch of few images on a ConvNet: a method that begins badly has logits of hundreds then."""
    for task, shots, method in itertools.product(FEW_TASKS, SHOTS, ("ssf", "conv-adapter")):
        yield Training(
            task=task, backbone=CONVNET, method=method, image_size=SMALLER[CONVNET], shots=shots, epochs=1,
            test_cap=FEW_TEST, scored=True,
        )  # fmt: skip


def at_length() -> Iterator[Training]:
    """PACE's cheap form and its host, for as many epochs as its authors train."""
    for options in LONG:
        yield replace(_on_vit(TASKS[0], "ssf"), epochs=LONG_EPOCHS, options=options)


def sited() -> Iterator[Training]:
    """A method where it goes by itself; ``chosen`` are the same where ``edgepet sites`` says."""
    for seed in SEEDS:
        yield _on_vit(SITES_TASK, SITES_METHOD, seed=seed)


def grid() -> Iterator[Training]:
    """Methods on every task, some with three seeds on four of them; on four tasks beside a ConvNet."""
    for task in (*TASKS, *FURTHER_TASKS):
        for method in GRID:
            yield _on_vit(task, method)
        yield replace(_on_vit(task, BEST), options=PACE)
    for task, seed in itertools.product(TASKS, SEEDS[1:]):
        for method in (*SEVERAL, "full", BEST):
            yield _on_vit(task, method, seed=seed)
        yield replace(_on_vit(task, BEST, seed=seed), options=PACE)
    for task, method in itertools.product(TASKS, ("linear-probe", "full", "ssf", "lora")):
        yield replace(_on_vit(task, method), backbone=CONVNET, image_size=SMALLER[CONVNET])


def _on_vit(task: str, method: str, *, seed: int = 0) -> Training:
    return Training(task=task, backbone=VIT, method=method, image_size=IMAGE_SIZES[VIT], seed=seed, scored=True)


TABLES: dict[str, Callable[[], Iterator[Training]]] = {
    "methods": methods,
    "depth": depth,
    "few-shots": few_shots,
    "pretrained": pretrained,
    "starts": starts,
    "long": at_length,
    "grid": grid,
}
SPEED, SITES = "speed", "sites"


# -------------------------------------------------------------------------------------------------------------- running


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = rows_parser(__doc__, (*TASKS, *FURTHER_TASKS))
    made.add_argument("--only", choices=(*TABLES, SITES, SPEED), help="one table")
    return made


def main() -> None:
    """Make what is asked for, a row at a time."""
    options = parser().parse_args()
    run = asked(options)
    if options.only in (None, SPEED):
        write_result(run, "trials-speed", speed(run))
    if options.only in (None, SITES):
        sites(run)
    for table in TABLES if options.only is None else {options.only} - {SPEED, SITES}:
        trainings = list(TABLES[table]())
        if run.quick:
            trainings = [_smallest(trainings[-1])]
        rows = Rows(run, f"trials-{table}", trainings, task=None if run.quick else options.task)
        rows.adopt([f"trials-{other}" for other in TABLES if "starts" not in (other, table)])
        rows.fill(partial(started, run) if table == "starts" else row, options.most)


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


def started(run: Asked, made: Trained) -> dict[str, object]:
    """One training, and the largest logit of its pack, of the images of val."""
    (found,) = finished(run, [measuring_job("trials:largest_logit", made)])
    return {**row(made), **found.report}


def largest_logit(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """That of ``started``, as a job."""
    from edgepet import read_pack
    from edgepet.images.preprocess import normalize
    from edgepet.images.sets import load_set, open_split
    from edgepet.networks.merged import merged_logits

    delta, data = read_pack(pack_of(specification, folder)).delta, images_of(specification, folder)
    backbone = load_backbone(delta.backbone, image_size=delta.preprocess.image_size)
    pixels, _ = load_set(open_split(data, "val"), delta.preprocess)
    return {"largest_logit": float(np.abs(merged_logits(backbone, delta, normalize(pixels, delta.preprocess))).max())}


def sites(run: Asked) -> None:
    """Where ``edgepet sites`` would tune a method, and what that is worth beside its own places, of equal kilobytes."""
    own = list(sited())
    if run.quick:
        own = [replace(_smallest(own[-1]), image_size=28)]  # four patches
    found = {key: value for key, value in earlier(run, "trials-sites").items() if key in ("sites", "settings")}
    if not found:
        (first,) = trained(run, own[:1])
        job = measuring_job("trials:measured_sites", first, method=SITES_METHOD, images=4 if run.quick else None)
        found = dict(finished(run, [job])[0].report)
    chosen = [replace(each, settings=found["settings"]) for each in own]
    rows = Rows(run, "trials-sites", [*own, *chosen], found)
    rows.fill(row)


def measured_sites(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """The table of ``edgepet sites``, what it chooses within the bytes that the method takes by itself, its seconds."""
    import edgepet
    from edgepet.reports.as_json import to_json

    delta = edgepet.read_pack(pack_of(specification, folder)).delta
    few = {} if specification["images"] is None else {"images": specification["images"]}
    with Progress() as progress, progress.stages() as stage:
        report = edgepet.sites(
            images_of(specification, folder), delta.backbone, method=specification["method"],
            image_size=delta.preprocess.image_size, stage=stage, **few,
        )  # fmt: skip
    places = {"on": ",".join(report.on), "blocks": report.blocks or ""}
    return {"sites": to_json(report), "settings": {name: value for name, value in places.items() if value}}


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
        "test_right": report["test_right"],
        "seconds": round(made.result.seconds),
    }


if __name__ == "__main__":
    main()
