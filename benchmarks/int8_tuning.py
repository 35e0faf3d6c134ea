"""What tuning on the quantised backbone gives back: SSF tuned in fp32 and tuned on 4-bit codes, both then rounded.

    python benchmarks/int8_tuning.py --dir DIR     # DIR as of benchmarks/int8.py; ten minutes on 2 cores

8-bit weights lose too little on these tasks for a loss to be repaired (``results/int8.json``), so weights have 4 bits
and activations 8. Codes and divisors are the shared backbone's, ranges those of 128 training images. Writes
``results/int8-tuning.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from int8 import CALIB_IMAGES, IMAGE_SIZES, TEST_IMAGES, test_images

from edgepet import train
from edgepet.calibration.budget import answers
from edgepet.calibration.images import calibration_images
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.slot_graphs import coded_backbone, int8_graph
from edgepet.deltas.merge import task_tensors
from edgepet.exporters.onnx import build_model
from edgepet.measuring.machine import environment
from edgepet.proving.precision import calibration_of
from edgepet.proving.subject import Subject
from edgepet.reports.as_json import to_json
from edgepet.reports.progress import Progress

BACKBONE, TASKS, BITS = "vit-small", ("landcover", "fashion"), 4
RESULT = Path(__file__).parent / "results" / "int8-tuning.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where images and packs are")
    folder = parser.parse_args().dir
    result = {
        "command": "python benchmarks/int8_tuning.py --dir DIR",
        "n": TEST_IMAGES,
        "rows": [row(folder, task) for task in TASKS],
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def row(folder: Path, task: str) -> dict[str, Any]:
    plain, tuned = (folder / BACKBONE / f"{task}-ssf{kind}.pet" for kind in ("", f"-int{BITS}"))
    if not tuned.exists():
        with Progress() as progress, progress.training(f"{task} on int{BITS} codes") as say:
            train(folder / task, f"demo:{BACKBONE}", "ssf", tuned, image_size=IMAGE_SIZES[BACKBONE],
                  backbone_precision=f"int{BITS}", say=say, resume=True)  # fmt: skip
    fp32, after = top1(plain, folder / task)
    _, repaired = top1(tuned, folder / task)
    return {
        "backbone": BACKBONE,
        "task": task,
        "bits": f"int{BITS}",
        "fp32": fp32,
        "after": after,
        "tuned": repaired,
        "recovered": (repaired - after) / (fp32 - after),
    }


def top1(pack: Path, data: Path) -> tuple[float, float]:
    """Test top-1 of a pack in fp32, and on the codes of the shared backbone in ``BITS`` bits."""
    subject = Subject(pack, None, None)
    delta, graph = subject.delta, subject.graph
    images, labels = test_images(pack, data)
    model = build_model(graph, task_tensors(graph.base, delta), delta)
    coded = coded_backbone(graph, BITS)
    smooth = {
        layer.reads: made.divisors
        for layer in int8_graph(graph).layers
        if (made := coded[layer.weight]).divisors is not None
    }
    chosen = calibration_images(data, delta.labels, delta.preprocess, count=CALIB_IMAGES)
    rounded = calibration_of(subject, chosen, model, smooth=smooth).made(Int8Recipe(bits=BITS)).model
    exact, coarse = (float((answers(m, images).argmax(axis=1) == labels).mean()) for m in (model, rounded))
    return exact, coarse


if __name__ == "__main__":
    main()
