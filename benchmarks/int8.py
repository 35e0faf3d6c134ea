"""What int8 costs: top-1 of packs in fp32, fp16 and int8, beside what NNCF and ONNX Runtime make of the same model.

    python benchmarks/int8.py --dir DIR            # an hour on 2 cores, less where DIR holds packs already

Four tasks, two backbones, SSF and LoRA. Each runtime gets the Q/DQ graph that ``export`` writes for it; TensorRT-RTX
only builds its own. Of a ViT all have the same. The pack also runs on the int8 backbone that all tasks share. NNCF and
ONNX Runtime quantise the same fp32 model with the same images, as their documents say (``neighbours.py``). Needs the
extra ``bench`` and, but for ``--quick``, the Debian package dataset-fashion-mnist. Every row is a job, as every pack
is: what an interrupted run finished is kept. Writes ``int8.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import IMAGE_SIZES, SMALLER, Asked, asked, parser_of, write_result
from judging import tested_images
from neighbours import SETTINGS, kind_of, neighbours
from trainings import Trained, Training, finished, images_of, measuring_job, pack_of, trained

from edgepet import read_pack
from edgepet.calibration.fp16 import to_half
from edgepet.calibration.images import calibration_images
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.search import Tried
from edgepet.deltas.delta import Delta
from edgepet.deltas.merge import task_tensors
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.openvino import OpenVino
from edgepet.device.runner import Runner
from edgepet.device.runtime import SharedInt8
from edgepet.device.runtimes import Format
from edgepet.exporters.onnx import build_model, serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.slots import task_slots
from edgepet.packs.pack import write_pack
from edgepet.proving.precision import calibration_of, express, int8_of
from edgepet.proving.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is tried, and on how many images. ``epochs`` by backbone; ``few`` as ``Training`` has it."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    image_sizes: Mapping[str, int]
    epochs: Mapping[str, int]
    shots: int | None
    few: int | None
    test_images: int
    calib_images: int

    def trainings(self, backbone: str, method: str) -> list[Training]:
        """Of all tasks."""
        return [
            Training(
                task=task,
                backbone=backbone,
                method=method,
                image_size=self.image_sizes[backbone],
                epochs=self.epochs[backbone],
                shots=self.shots,
                few=self.few,
            )
            for task in self.tasks
        ]


FULL = Plan(
    tasks=("digits", "landcover", "elpv", "fashion"), methods=("ssf", "lora"), image_sizes=IMAGE_SIZES,
    epochs={"vit-small": 4, "efficientnet-lite0": 2}, shots=None, few=None, test_images=500, calib_images=128,
)  # fmt: skip
# As many images as a pack takes whose answers int8 leaves alone: it is compared with the tuned network as ever.
QUICK = Plan(
    tasks=("digits",), methods=("ssf",), image_sizes=SMALLER, epochs={"efficientnet-lite0": 2}, shots=None, few=40,
    test_images=20, calib_images=32,
)  # fmt: skip
BATCH = 16
RUNTIMES = ("onnxruntime", "openvino")
FORMATS: dict[Format, Any] = {"onnx": OnnxRuntime, "openvino": OpenVino, "tensorrt": None}


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    return parser_of(__doc__)


def main() -> None:
    """Train, then measure every pack."""
    run = asked(parser().parse_args())
    plan = QUICK if run.quick else FULL
    cells = [each for method in plan.methods for backbone in plan.epochs for each in plan.trainings(backbone, method)]
    write_result(run, "int8", {"neighbours": SETTINGS, "rows": rows(run, plan, trained(run, cells))})


def rows(run: Asked, plan: Plan, packs: tuple[Trained, ...]) -> list[dict[str, object]]:
    """A row for each pack."""
    sizes = {"test_images": plan.test_images, "calib_images": plan.calib_images}
    jobs = [measuring_job("int8:measure_pack", each, **sizes) for each in packs]
    return [
        {"backbone": t.backbone, "task": t.task, "method": t.method, **result.report}
        for t, result in zip((each.training for each in packs), finished(run, jobs), strict=True)
    ]


def measure_pack(specification: Mapping[str, Any], scratch: Path) -> dict[str, object]:
    """Top-1 in every form, bytes, and what was executed."""
    pack, data = pack_of(specification, scratch), images_of(specification, scratch)
    with tempfile.TemporaryDirectory() as folder:
        return measured(pack, data, Path(folder), specification["test_images"], specification["calib_images"])


def measured(pack: Path, data: Path, folder: Path, test: int, calib: int) -> dict[str, object]:
    """One row, by way of files in ``folder``."""
    images, labels = tested_images(read_pack(pack).delta, data, test)
    subject = Subject(pack, None, None)
    delta, graph = subject.delta, subject.graph
    fp32 = build_model(graph, task_tensors(graph.base, delta), delta)
    chosen = calibration_images(data, delta.labels, delta.preprocess, evaluation=data, count=calib)
    calibration = calibration_of(subject, chosen, fp32)
    tried = dict[Format, Tried]()
    for name in FORMATS:
        same = [tried[other] for other in tried if calibration.same_graph(name, other)]
        tried[name] = same[0] if same else calibration.for_format(name).choose()[0]
    int8_of = {name: calibration.for_format(name).made(tried[name].recipe).model for name in FORMATS}
    top1: dict[str, float] = {}

    def judge(name: str, network: Runner) -> None:
        answers = np.concatenate([network(images[i : i + BATCH]).argmax(axis=1) for i in range(0, len(images), BATCH)])
        top1[f"{name} {network.runtime}"] = float((answers == labels).mean())
        network.close()

    layers: dict[str, object] = {}
    made = {
        "fp32": fp32,
        "fp16": to_half(fp32, chosen.held_out_images, where=delta.task).model,
        "int8": int8_of["onnx"],
    }
    for precision, model in made.items():
        for name, opened in FORMATS.items():
            path = folder / f"{precision}-{name}.onnx"
            path.write_bytes(serialize(int8_of[name] if precision == "int8" else model))
            if opened is None:
                continue
            network = opened.of_model(path)
            if precision == "int8":
                layers[network.runtime] = network.evidence["layers"]
            judge(precision, network)
    for tool, other in neighbours(fp32, chosen.images, folder):
        judge(tool, other)
    (folder / "engine").mkdir()
    engine = build_engines(serialize(int8_of["tensorrt"]), folder / "engine", precision="int8")
    int8, expressed = written_with_ranges(pack, data, folder / pack.name, calib)
    for runtime in RUNTIMES:
        judge("shared int8", SharedInt8(int8, runtime=runtime).bind(expressed))
    slots = task_slots(int8, expressed)
    return {
        "n": len(labels),
        "epochs": delta.training["epochs"],
        "top1": top1,
        "network": kind_of(fp32),
        "size_bytes": {name: (folder / f"{name}-onnx.onnx").stat().st_size for name in made},
        "recipe": {name: asdict(best.recipe) for name, best in tried.items()},
        "held_out_kl": {name: best.kl for name, best in tried.items()},
        "layers": layers,
        "tensorrt": {"layers_by_output_type": engine.layers, "version": engine.version},
        "pack_bytes": (folder / pack.name).stat().st_size,
        "own_memory_bytes": slots.own_bytes,
        "own_codes_bytes": sum(codes.nbytes for codes in slots.codes.values()),
    }


def written_with_ranges(pack: Path, data: Path, output: Path, calib: int) -> tuple[Int8Graph, Delta]:
    """Write the pack with its ranges for the int8 backbone, as ``calibrate -o`` does, without judging it."""
    subject = Subject(pack, None, None)
    delta = subject.delta
    chosen = calibration_images(data, delta.labels, delta.preprocess, evaluation=data, count=calib)
    graph = int8_of(subject, images=lambda: chosen)
    expressed = express(delta, subject.graph, graph, chosen, recipe=Int8Recipe()).delta
    write_pack(output, expressed, kept=subject.pack.planes, sequence=subject.pack.sequence)
    return graph, expressed


if __name__ == "__main__":
    main()
