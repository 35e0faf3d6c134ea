"""What tuning on the quantised backbone gives back: SSF tuned in fp32 and tuned on 4-bit codes, both then rounded.

    python benchmarks/int8_tuning.py --dir DIR     # DIR as of benchmarks/int8.py; ten minutes on 2 cores

8-bit weights lose too little on these tasks for a loss to be repaired (``int8.json``), so weights have 4 bits
and activations 8. Codes and divisors are the shared backbone's, ranges those of 128 training images. Writes
``int8-tuning.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from harness import asked, parser_of, write_result
from int8 import FULL, QUICK, Plan
from judging import tested_images
from trainings import Trained, trained

from edgepet.calibration.budget import answers
from edgepet.calibration.images import calibration_images
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.slot_graphs import coded_backbone, int8_graph
from edgepet.deltas.merge import task_tensors
from edgepet.exporters.onnx import build_model
from edgepet.proving.precision import calibration_of
from edgepet.proving.subject import Subject

BITS = 4
PLAN = replace(FULL, tasks=("landcover", "fashion"), epochs={"vit-small": FULL.epochs["vit-small"]})


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    return parser_of(__doc__)


def main() -> None:
    """Train every task twice, and judge both."""
    run = asked(parser().parse_args())
    plan = QUICK if run.quick else PLAN
    (backbone,) = plan.epochs
    plain = plan.trainings(backbone, "ssf")
    epochs = 1 if run.quick else None  # the method's own: the codes take longer to repair than a delta to fit
    shots = 2 if run.quick else None
    on_codes = [replace(each, epochs=epochs, shots=shots, backbone_precision=f"int{BITS}") for each in plain]
    packs = trained(run, [*plain, *on_codes])
    rows = [row(plan, *pair) for pair in zip(packs[: len(plain)], packs[len(plain) :], strict=True)]
    write_result(run, "int8-tuning", {"n": plan.test_images, "rows": rows})


def row(plan: Plan, plain: Trained, on_codes: Trained) -> dict[str, object]:
    """One task. What is recovered of a loss that is none has no number."""
    fp32, after = top1(plain.pack, plain.data, plan)
    _, repaired = top1(on_codes.pack, on_codes.data, plan)
    return {
        "backbone": plain.training.backbone,
        "task": plain.training.task,
        "bits": f"int{BITS}",
        "fp32": fp32,
        "after": after,
        "tuned": repaired,
        "recovered": (repaired - after) / (fp32 - after) if fp32 != after else None,
    }


def top1(pack: Path, data: Path, plan: Plan) -> tuple[float, float]:
    """Test top-1 of a pack in fp32, and on the codes of the shared backbone in ``BITS`` bits."""
    subject = Subject(pack, None, None)
    delta, graph = subject.delta, subject.graph
    images, labels = tested_images(delta, data, plan.test_images)
    model = build_model(graph, task_tensors(graph.base, delta), delta)
    coded = coded_backbone(graph, BITS)
    smooth = {
        layer.reads: made.divisors
        for layer in int8_graph(graph).layers
        if (made := coded[layer.weight]).divisors is not None
    }
    chosen = calibration_images(data, delta.labels, delta.preprocess, count=plan.calib_images)
    rounded = calibration_of(subject, chosen, model, smooth=smooth).made(Int8Recipe(bits=BITS)).model
    exact, coarse = (float((answers(m, images)[0].argmax(axis=1) == labels).mean()) for m in (model, rounded))
    return exact, coarse


if __name__ == "__main__":
    main()
