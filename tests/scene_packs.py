"""A pack of three heads that nobody trained, and a folder in which all is true that it says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from edgepet.deltas.delta import Delta
from edgepet.deltas.detection import boxes_in, suppressed
from edgepet.deltas.heads import mask_of
from edgepet.images.preprocess import normalize
from edgepet.methods import METHODS
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.tuning.dense import DenseModel, MergedHead, extract_dense
from tests.box_folders import CATEGORIES, annotation, picture, write_coco
from tests.box_packs import FCOS
from tests.mask_folders import save
from tests.mask_packs import moved_model
from tests.scene_folders import MASKED

HEADS = {"boxes": (FCOS, CATEGORIES), "mask": (Form(width=8), MASKED), "labels": (Form(name="pooled"), MASKED)}
CERTAIN = 4  # boxes of an image, on the mean, that are objects


def scene_delta(backbone: Backbone, *, task: str = "scene", seed: int = 3) -> Delta:
    """Boxes, a mask and labels behind one network, its method and its heads away from where they start."""
    (first, labels), *others = HEADS.values()
    further = [(form, len(names)) for form, names in others]
    model = DenseModel(backbone, METHODS["ssf"](), first, len(labels), further=further, seed=1)
    names = [each for _, each in others]
    return extract_dense(moved_model(model, seed), backbone, task=task, labels=labels, further=names)


def true_folder(folder: Path, backbone: Backbone, delta: Delta, *, count: int = 6) -> Path:
    """train/ and val/ images of 64 x 64 pixels, with the boxes, masks and labels that ``scene_delta`` finds there.

    An object is each box whose score is among the largest of all images, a label one that half of the images have.
    """
    network = MergedHead(backbone, delta)
    for number, split in enumerate(("train", "val")):
        pixels = np.stack([picture(1000 * number + index)[0] for index in range(count)])
        boxes, masks, logits = network.each(normalize(pixels, backbone.preprocess))
        found = [boxes_in(suppressed(each), (64, 64), (64, 64)) for each in boxes]
        least = np.sort(np.concatenate(found)[:, 4])[-CERTAIN * count]
        images, objects = list[dict[str, Any]](), list[dict[str, Any]]()
        for index, each in enumerate(found):
            name = f"{index:03}.png"
            save(folder / "images" / split / name, pixels[index])
            images.append({"id": index + 1, "file_name": name, "height": 64, "width": 64})
            for x1, y1, x2, y2, score, label in each.tolist():
                if score >= least and min(x2 - x1, y2 - y1) >= 1:
                    box = (x1, y1, x2 - x1, y2 - y1)
                    objects.append(annotation(len(objects) + 1, index + 1, box, (3, 7)[int(label)]))
        write_coco(folder, images, objects, split=split)
        for index, mask in enumerate(mask_of(masks, (64, 64))):
            save(folder / "masks" / split / f"{index:03}.png", mask)
        (folder / "labels").mkdir(exist_ok=True)
        with (folder / f"labels/{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", *MASKED])
            for index, there in enumerate(logits > np.median(logits, axis=0)):
                rows.writerow([f"{index:03}.png", *there.astype(int)])
    (folder / "classes.txt").write_text("\n".join(MASKED) + "\n")
    return folder
