"""What methods are worth on boxes, by the AP of a test split, and what heads lose that share one run of the network.

    python benchmarks/boxes.py --dir DIR                # all rows; many hours on 2 cores
    python benchmarks/boxes.py --dir DIR --task trees   # those of one task
    python benchmarks/boxes.py --dir DIR --most 3       # three rows that are missing
    python benchmarks/boxes.py --dir DIR --only speed   # milliseconds of heads alone and together, on an idle machine

One detector on EfficientNet-Lite0 behind each method; and on ViT-S with SSF boxes, a mask and labels, each alone and
all three at once. The trainings are jobs below DIR, without augmentation, and what has a row in ``boxes.json`` already
is not trained again. A pack is trained in fp16; what it is in the smallest codes that hold a budget on val is a job as
well. The images are of packages that CONTRIBUTING.md names. ``report.py`` makes the tables in
docs/guide/boxes.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Asked, asked, source, spread, write_result
from rows import Rows, rows_parser, tuned
from trainings import BALANCED, Trained, Training, finished, in_turns, measuring_job, recoded, trained

from edgepet.reports.tables import Column, Table, format_bytes, format_ms, format_number, format_percent, markdown

CONVNET, VIT = "efficientnet-lite0", "vit-small"
SIZES = {CONVNET: 256, VIT: 224}
SEEDS = {"trees": (0, 1, 2), "stamps_scene": (0,)}
METHODS = ("linear-probe", "ssf", "lora", "conv-adapter", "full")
SCENE, HEADS = "stamps_scene", ("boxes", "mask", "labels")
EPOCHS, TEST_IMAGES = 20, 1000
MAX_DROP = 1.0  # points on val that codes may lose: on a few dozen images AP moves by half a point for nothing
QUICK_SIZE, QUICK_DROP = 64, 99.0
ROUNDS = 100


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
    options = {"task": answers, **(BALANCED if "mask" in answers else {})}
    return Training(
        task=task, backbone=backbone, method=method, image_size=SIZES[backbone], epochs=EPOCHS, seed=seed,
        test_cap=TEST_IMAGES, scored=True, options=options,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = rows_parser(__doc__, SEEDS)
    made.add_argument("--only", choices=("worth", "speed"), help="one part")
    return made


def main() -> None:
    """A row at a time, those that are missing; then the milliseconds."""
    options = parser().parse_args()
    run, every = asked(options), [*detectors(), *together()]
    if run.quick:
        every = [replace(every[0], method="ssf", epochs=1, image_size=QUICK_SIZE)]
    if options.only in (None, "worth"):
        asked_row = partial(row, run, max_drop=QUICK_DROP if run.quick else MAX_DROP)
        Rows(run, "boxes", every, task=None if run.quick else options.task).fill(asked_row, options.most)
    if options.only in (None, "speed"):
        write_result(run, "boxes-speed", speed(run, every if run.quick else list(together())))


def speed(run: Asked, trainings: list[Training]) -> dict[str, object]:
    """Milliseconds of each training's network with its heads on ONNX Runtime, interleaved."""
    made, rounds = trained(run, trainings), 2 if run.quick else ROUNDS
    rows = [
        {"answers": each.training.options["task"], "p50_ms": p50_ms}
        for each, p50_ms in zip(made, in_turns(made, rounds), strict=True)
    ]
    return {"threads": 1, "rounds": rounds, "rows": rows}


def row(run: Asked, made: Trained, max_drop: float) -> dict[str, object]:
    """One training, with its codes; that of all weights is not coded, for it is no pack of kilobytes."""
    if made.training.method == "full":
        return uncoded(made)
    (found,) = finished(run, [measuring_job("boxes:recode", made, max_drop=max_drop)])
    return {**uncoded(made), **found.report}


def recode(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """A pack in the smallest codes of which no head loses more than so many points on val: its bytes, and what each
    head comes to on test.
    """
    made, test = recoded(specification, folder)
    return {**made, "coded_test": test, "max_drop": specification["max_drop"]}


def uncoded(made: Trained) -> dict[str, object]:
    """One training, with what each of its heads comes to."""
    training, report = made.training, made.result.report
    return {
        "task": training.task,
        "backbone": report["backbone"],
        "image_size": training.image_size,
        "method": training.method,
        "answers": training.options["task"],
        "seed": training.seed,
        **tuned(made),
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
    told = (
        f"Of the test split, {EPOCHS} epochs without augmentation; of several seeds the mean, and the lowest and"
        f" highest. Intervals are of images drawn anew. Codes are the smallest of which no head loses more than"
        f" {MAX_DROP:.1f} points on val."
    )
    tables = [_detectors(alone)] if alone else []
    tables += [_together(scene, results.get("boxes-speed"))] if scene else []
    return "\n".join([*tables, f"{told} {source(result)}\n"])


def _detectors(rows: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in rows:
        groups.setdefault((each["task"], each["method"]), []).append(each)
    shown = [(*named, *_numbers(of)) for named, of in groups.items()]
    numbers = (
        "values trained", "head", "pack, fp16", "coded", "AP", "AP50", "95 % interval of AP", "coded AP", "seeds",
    )  # fmt: skip
    columns = (*map(Column, ("task", "method")), *(Column(name, right=True) for name in numbers))
    return markdown(Table(f"Boxes, demo:{CONVNET} at {SIZES[CONVNET]} px", columns, shown))


def _numbers(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    first, tests = rows[0], [each["test"]["boxes"] for each in rows]
    low, high = (float(np.mean([each[name] for each in tests])) for name in ("low", "high"))
    coded = [each for each in rows if "coded_bytes" in each]
    return (
        format_number(first["trainable_params"]),
        format_number(first["head_params"]),
        format_bytes(max(each["pack_bytes"] for each in rows)),
        format_bytes(max(each["coded_bytes"] for each in coded)) if coded else "",
        spread([each["value"] for each in tests]),
        spread([each["map50"] for each in tests]),
        f"{format_percent(low)} to {format_percent(high)}",
        spread([each["coded_test"]["boxes"]["value"] for each in coded]) if coded else "",
        str(len(rows)),
    )


def _together(rows: list[dict[str, Any]], timed: Mapping[str, Any] | None) -> str:
    times = {each["answers"]: format_ms(each["p50_ms"]) for each in timed["rows"]} if timed else {}
    shown = [
        (
            each["answers"].replace(",", ", "), format_bytes(each["pack_bytes"]), times.get(each["answers"], ""),
            *_values(each["test"]),
            format_bytes(each["coded_bytes"]) if "coded_bytes" in each else "",
            *_values(each.get("coded_test", {})),
        )
        for each in rows
    ]  # fmt: skip
    numbers = (
        "pack, fp16", "p50 ms", "boxes, AP", "mask, mIoU", "labels, mean AP", "coded", "its AP", "its mIoU",
        "its mean AP",
    )  # fmt: skip
    columns = (Column("heads"), *(Column(name, right=True) for name in numbers))
    title = f"Heads of {SCENE} on one run, SSF, demo:{VIT} at {SIZES[VIT]} px"
    table = markdown(Table(title, columns, shown))
    if timed is None:
        return table
    return f"{table}\nMilliseconds on ONNX Runtime, fp32, one thread: {source(timed)}\n"


def _values(test: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What each head has come to, nothing where there is none."""
    return (format_percent(test[head]["value"]) if head in test else "" for head in HEADS)


if __name__ == "__main__":
    main()
