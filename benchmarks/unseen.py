"""A class that training has no pixel of, given to a head of score maps by its words. A part of ``words.py``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from trainings import images_of, pack_of

from edgepet import evaluate
from edgepet.packs.pack import EVERY, read_pack
from edgepet.packs.text_file import read_text, write_text

WORDS = "tests/golden/text/landcover.safetensors"  # of all classes


def by_class(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """``judged``, as a job."""
    return judged(pack_of(specification, folder), images_of(specification, folder))


def judged(path: Path, data: Path) -> dict[str, object]:
    """A pack on the test images of ``data``: mIoU, and the IoU of every class."""
    test: Any = evaluate(path, data, split="test")
    return {"miou": test.value, "ious": {each.name: each.value for each in test.scores}}


def without_pixels(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """The training of a pack of score maps without a class, which is then given its words: ``judged``."""
    import torch

    from edgepet import pack, train
    from edgepet.networks.loading import load_backbone

    torch.set_num_threads(specification["threads"])
    left_out, drawn = specification["class"], images_of(specification, folder)
    words = Path(__file__).parents[1] / WORDS
    delta = read_pack(pack_of(specification, folder), answers=EVERY).delta
    backbone = load_backbone(delta.backbone, image_size=delta.preprocess.image_size)
    known = without(drawn, left_out, folder / "data")
    table, kept = read_text(words).only(_classes(known)), folder / "known.safetensors"
    write_text(kept, table.classes, table.vectors, table.source)
    options: dict[str, Any] = {
        "task": "mask", "head": "score", "epochs": delta.training["epochs"], "text": kept,
        "precision": delta.training["precision"],
    }  # fmt: skip
    train(known, backbone, "linear-probe", folder / "known.pet", **options)
    shutil.rmtree(known)
    pack(folder / "known.pet", folder / "given.pet", backbone=backbone, text=words)
    return {"share": share(drawn, left_out), **judged(folder / "given.pet", drawn)}


def _classes(data: Path) -> list[str]:
    return (data / "classes.txt").read_text().split()


def share(data: Path, name: str) -> float:
    """The part of the counted test pixels that a class has: its IoU where it is always answered."""
    number, hits, counted = _classes(data).index(name), 0, 0
    for path in sorted((data / "masks" / "test").iterdir()):
        mask = np.asarray(Image.open(path))
        hits, counted = hits + int((mask == number).sum()), counted + int((mask != 255).sum())
    return hits / counted


def without(drawn: Path, name: str, data: Path) -> Path:
    """The train and val images in the folder ``data``, in whose masks a class is not counted, and is no class."""
    classes = _classes(drawn)
    number = classes.index(name)
    numbers = np.arange(256)
    numbers[number + 1 : len(classes)] -= 1
    numbers[number] = 255
    for split in ("train", "val"):
        shutil.copytree(drawn / "images" / split, data / "images" / split, copy_function=os.link)
        (data / "masks" / split).mkdir(parents=True)
        for path in sorted((drawn / "masks" / split).iterdir()):
            mask = numbers[np.asarray(Image.open(path))].astype(np.uint8)
            Image.fromarray(mask).save(data / "masks" / split / path.name)
    (data / "classes.txt").write_text("".join(f"{each}\n" for each in classes if each != name))
    return data
