"""What methods and heads are worth on masks: land cover of every pixel, by the mIoU of a test split.

    python benchmarks/masks.py --dir DIR                                # all rows; many hours on 2 cores
    python benchmarks/masks.py --dir DIR --backbone efficientnet-lite0  # those of one backbone
    python benchmarks/masks.py --dir DIR --most 3                       # three rows that are missing
    python benchmarks/masks.py --dir DIR --only memory                  # what an epoch of large images takes, alone

Rows differ from one another in one thing: the method under one head, or the head over one method; heads that read text
are in ``words.py``. The trainings are jobs below DIR, without augmentation, and what has a row in ``masks.json``
already is not trained again. A pack is trained in fp16; what it is under one product in the smallest codes that hold a
budget on val is a job as well. ``masks-memory.json`` is of an epoch at 512 px: its seconds, and the most memory that it
had. ``report.py`` makes the tables in docs/guide/masks.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Asked, asked, earlier, source, spread, write_result
from rows import Rows, rows_parser, tuned
from trainings import FEW, Trained, Training, draw, finished, measuring_job, recoded

from edgepet.reports.tables import Column, Table, format_bytes, format_number, format_percent, format_seconds, markdown

TASK, TEST_IMAGES, EPOCHS = "landcover_seg", 1000, 12
VIT, CONVNET, SIZE = "vit-small", "efficientnet-lite0", 224
HEADS = {VIT: "mlp", CONVNET: "mlp,maps=1/2/3"}  # of 64 channels on strides of 14, or of 8, 16 and 32
METHODS = {
    VIT: ("linear-probe", "ssf", "lora", "semantic-prompt", "full"),
    CONVNET: ("linear-probe", "ssf", "lora", "semantic-prompt", "conv-adapter", "full"),
}
LINEAR, OTHERS = "linear", ("linear-probe", "ssf")  # the head that is coded; methods under other heads, and in large
SEEDS = {VIT: (0,), CONVNET: (0, 1, 2)}
LARGE, QUICK_LARGE = {VIT: 518, CONVNET: 512}, {CONVNET: 64}  # px; the ViT has patches of 14
EACH_S = 0.05  # between two looks at what a process has
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
    made.add_argument("--only", choices=("worth", "memory"), help="one part")
    return made


def main() -> None:
    """A row at a time, those that are missing; then what large images take."""
    options = parser().parse_args()
    run, every, facts = asked(options), list(trainings()), {"max_drop": MAX_DROP}
    if run.quick:
        every = [replace(each, epochs=1, few=FEW, test_cap=10) for each in every[-1:]]
        facts = {"max_drop": 99}
    asked_row = partial(row, run, max_drop=facts["max_drop"])
    if options.only in (None, "worth"):
        Rows(run, "masks", every, facts).fill(asked_row, options.most, None if run.quick else options.backbone)
    if options.only in (None, "memory"):
        write_result(run, "masks-memory", memory(run, options.backbone))


def memory(run: Asked, only: str | None) -> dict[str, object]:
    """What one epoch of images at ``LARGE`` px takes: seconds, and the most memory that its process had; with ``only``
    rows of one backbone are made, and those of the other kept.
    """
    data, sizes = draw(run, TASK), QUICK_LARGE if run.quick else LARGE
    rows = [
        {"backbone": f"demo:{backbone}", "image_size": size, "method": method, "head": HEADS[backbone]}
        | one_epoch(data, backbone, method, size)
        for backbone, size in sizes.items()
        for method in (OTHERS[-1:] if run.quick else OTHERS)
        if only in (None, backbone)
    ]
    rows += [row for row in earlier(run, "masks-memory").get("rows", ()) if only not in (None, row["backbone"][5:])]
    images = {split: len(list((data / "images" / split).iterdir())) for split in ("train", "val")}
    return {"task": TASK, "images": images, "rows": rows}


def one_epoch(data: Path, backbone: str, method: str, size: int) -> dict[str, object]:
    """``edgepet train`` at its defaults for one epoch, in a process of its own.

    ``anonymous_bytes`` is the most that it had besides mapped files, which the system drops when others want memory.
    """
    asked_of = ("--task", "mask", "--head", HEADS[backbone], "--backbone", f"demo:{backbone}", "--method", method)
    with tempfile.TemporaryDirectory(prefix="edgepet-bench-") as scratch, (Path(scratch) / "said").open("w+") as said:
        line = [sys.executable, "-m", "edgepet", "train", str(data), *asked_of, "--img-size", str(size)]
        began, most = time.perf_counter(), {"RssAnon": 0, "VmHWM": 0}
        with subprocess.Popen(
            [*line, "--epochs", "1", "-o", f"{scratch}/land.pet"], stdout=said, stderr=said
        ) as training:
            while training.poll() is None:
                status = Path(f"/proc/{training.pid}/status").read_text()
                for name, kilobytes in re.findall(r"^(RssAnon|VmHWM):\s+(\d+) kB", status, re.MULTILINE):
                    most[name] = max(most[name], 1024 * int(kilobytes))
                time.sleep(EACH_S)
        if training.returncode:
            said.seek(0)
            raise SystemExit(f"{method} on {backbone} failed:\n{said.read()}")
    return {
        "seconds": round(time.perf_counter() - began),
        "anonymous_bytes": most["RssAnon"],
        "resident_bytes": most["VmHWM"],
    }


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
    first = result["rows"][0]
    told = (
        f"Test mIoU of {first['test_n']} images at {first['image_size']} px, {first['epochs']} epochs of 800 images"
        " without augmentation; of several seeds the mean, and the lowest and highest. Intervals are of images drawn"
        f" anew. Codes are the smallest that lose at most {result['max_drop']} points on val. No package carries"
        " weights of a Swin."
    )
    table = f"{markdown(Table('Land cover of every pixel', columns, shown))}\n{told} {source(result)}\n"
    return f"{table}\n{_memory_table(results['masks-memory'])}" if "masks-memory" in results else table


def _memory_table(result: Mapping[str, Any]) -> str:
    shown = [
        (
            row["backbone"],
            f"{row['image_size']} px",
            row["method"],
            row["head"],
            format_bytes(row["anonymous_bytes"]),
            format_bytes(row["resident_bytes"]),
            format_seconds(row["seconds"]),
        )
        for row in result["rows"]
    ]
    numbers = (Column(name, right=True) for name in ("memory", "with mapped files", "time"))
    title = f"An epoch of {sum(result['images'].values())} large images"
    table = markdown(Table(title, (*map(Column, ("backbone", "images", "method", "head")), *numbers), shown))
    told = (
        "`train` at its defaults, from its first line to its last: the most memory that its process had, without and"
        " with files that are mapped, which the system drops when others want memory."
    )
    return f"{table}\n{told} {source(result)}\n"


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
