"""What methods and heads are worth on masks: land cover of every pixel, by the mIoU of a test split.

    python benchmarks/masks.py --dir DIR                                # all rows; many hours on 2 cores
    python benchmarks/masks.py --dir DIR --backbone efficientnet-lite0  # those of one backbone
    python benchmarks/masks.py --dir DIR --most 3                       # three rows that are missing

Rows differ from one another in one thing: the method under one head, or the head over one method; heads that read text
are in ``words.py``. The trainings are jobs below DIR, without augmentation, and what has a row in ``masks.json``
already is not trained again. A pack is trained in fp16; what it is under one product in the smallest codes that hold a
budget on val is a job as well. ``report.py`` makes the table in docs/guide/masks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Asked, asked, source, spread
from rows import Rows, rows_parser, tuned
from trainings import FEW, Trained, Training, finished, measuring_job, recoded

from edgepet.reports.tables import Column, Table, format_bytes, format_number, format_percent, markdown

TASK, TEST_IMAGES, EPOCHS = "landcover_seg", 1000, 12
VIT, CONVNET, SIZE = "vit-small", "efficientnet-lite0", 224
HEADS = {VIT: "mlp", CONVNET: "mlp,maps=1/2/3"}  # of 64 channels on strides of 14, or of 8, 16 and 32
METHODS = {
    VIT: ("linear-probe", "ssf", "lora", "semantic-prompt", "full"),
    CONVNET: ("linear-probe", "ssf", "lora", "semantic-prompt", "conv-adapter", "full"),
}
LINEAR, OTHERS = "linear", ("linear-probe", "ssf")  # the head that is coded; methods under other heads
SEEDS = {VIT: (0,), CONVNET: (0, 1, 2)}
MAX_DROP = 0.3  # points of mIoU on val that codes may lose


def trainings() -> Iterator[Training]:
    """Every method under the backbone's head, and some under a head that separates, and under one product."""
    for backbone, head in HEADS.items():
        for seed in SEEDS[backbone]:
            heads = {
                head: METHODS[backbone],
                f"{head},separation=true": OTHERS,
                LINEAR: OTHERS,
            }
            for asked_head, methods in heads.items():
                for method in methods:
                    yield Training(
                        task=TASK, backbone=backbone, method=method, image_size=SIZE, epochs=EPOCHS, seed=seed,
                        test_cap=TEST_IMAGES, scored=True, options={"task": "mask", "head": asked_head},
                    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = rows_parser(__doc__)
    made.add_argument("--backbone", choices=tuple(HEADS), help="only the rows of one backbone")
    return made


def main() -> None:
    """A row at a time, those that are missing."""
    options = parser().parse_args()
    run, every, facts = asked(options), list(trainings()), {"max_drop": MAX_DROP}
    if run.quick:
        every = [replace(each, epochs=1, few=FEW, test_cap=10) for each in every[-1:]]
        facts = {"max_drop": 99}
    asked_row = partial(row, run, max_drop=facts["max_drop"])
    Rows(run, "masks", every, facts).fill(asked_row, options.most, None if run.quick else options.backbone)


def row(run: Asked, made: Trained, max_drop: float) -> dict[str, object]:
    """One training, with its codes where its head is one product."""
    if made.training.options["head"] != LINEAR:
        return uncoded(made)
    (found,) = finished(run, [measuring_job("masks:recode", made, max_drop=max_drop)])
    return {**uncoded(made), **found.report}


def uncoded(made: Trained) -> dict[str, object]:
    """One training."""
    training, report = made.training, made.result.report
    test = report["test"]["mask"]
    return {
        "task": training.task,
        "backbone": report["backbone"],
        "image_size": training.image_size,
        "method": training.method,
        "head": training.options["head"],
        "seed": training.seed,
        **tuned(made),
        "val_miou": report["val"]["mask"],
        "test_miou": test["value"],
        "test_low": test["low"],
        "test_high": test["high"],
        "test_pixels": test["pixels"],
        "test_n": test["n"],
        "seconds": round(made.result.seconds),
    }


def recode(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """A pack in the smallest codes that lose at most so many points on val: its bytes, and its mIoU on test."""
    made, test = recoded(specification, folder)
    return {**made, "coded_test_miou": test["mask"]["value"]}


def mask_table(results: Mapping[str, Any]) -> str:
    """A row for each method and head of each backbone, as far as they are measured."""
    if "masks" not in results:
        return "Not measured yet.\n"
    result = results["masks"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for each in result["rows"]:
        groups.setdefault((each["backbone"], each["method"], each["head"]), []).append(each)
    shown = [(*named, *_numbers(rows)) for named, rows in groups.items()]
    numbers = ("values trained", "head", "pack, fp16", "coded", "mIoU", "95 % interval", "coded mIoU", "seeds")
    columns = (*map(Column, ("backbone", "method", "head")), *(Column(name, right=True) for name in numbers))
    first, left = result["rows"][0], result["trainings"] - len(result["rows"])
    told = (
        f"Test mIoU of {first['test_n']} images at {first['image_size']} px, {first['epochs']} epochs of 800 images"
        " without augmentation; of several seeds the mean, and the lowest and highest. Intervals are of images drawn"
        f" anew. Codes are the smallest that lose at most {result['max_drop']} points on val. No package carries"
        f" weights of a Swin.{f' {left} trainings are still to be made.' if left else ''}"
    )
    return f"{markdown(Table('Land cover of every pixel', columns, shown))}\n{told} {source(result)}\n"


def _numbers(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """What the seeds of one training come to."""
    first = rows[0]
    low, high = (float(np.mean([each[name] for each in rows])) for name in ("test_low", "test_high"))
    coded = [each for each in rows if "coded_bytes" in each]
    return (
        format_number(first["trainable_params"]),
        format_number(first["head_params"]),
        format_bytes(max(each["pack_bytes"] for each in rows)),
        format_bytes(max(each["coded_bytes"] for each in coded)) if coded else "",
        spread([each["test_miou"] for each in rows]),
        f"{format_percent(low)} to {format_percent(high)}",
        spread([each["coded_test_miou"] for each in coded]) if coded else "",
        str(len(rows)),
    )


if __name__ == "__main__":
    main()
