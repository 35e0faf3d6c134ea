"""What int8 costs: top-1 of packs in fp32, fp16 and int8, beside what NNCF and ONNX Runtime do by default.

    python benchmarks/int8.py --dir DIR            # an hour on 2 cores, less where DIR holds packs already

Four tasks, two backbones, SSF and LoRA. One Q/DQ file a pack runs on ONNX Runtime and OpenVINO and is built by
TensorRT-RTX; the same pack also runs on the int8 backbone that all tasks share. NNCF and ONNX Runtime quantise the same
fp32 model with the same images. Needs the extra ``bench`` and the Debian package dataset-fashion-mnist. Rows of an
interrupted run are kept beside the packs. Writes ``results/int8.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgepet import read_pack, train
from edgepet.calibration.fp16 import to_half
from edgepet.calibration.images import calibration_images
from edgepet.calibration.qdq import Int8Recipe
from edgepet.calibration.rewriting import folded
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.deltas.delta import Delta
from edgepet.deltas.merge import task_tensors
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.openvino import OpenVino
from edgepet.device.runtime import SharedInt8
from edgepet.exporters.onnx import build_model, serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.slots import task_slots
from edgepet.images.preprocess import normalize
from edgepet.images.sets import ImageSet, load_set, open_split
from edgepet.measuring.machine import environment
from edgepet.packs.pack import write_pack
from edgepet.proving.precision import calibration_of, express
from edgepet.proving.subject import Subject
from edgepet.reports.as_json import to_json
from edgepet.reports.progress import Progress
from edgepet.samples.tasks import build_task
from edgepet.spec import NpArray

TASKS = ("digits", "landcover", "elpv", "fashion")
METHODS = ("ssf", "lora")
IMAGE_SIZES = {"vit-small": 112, "efficientnet-lite0": 224}
EPOCHS = {"vit-small": 4, "efficientnet-lite0": 2}  # packs that are there already may have had more
TEST_IMAGES, CALIB_IMAGES, BATCH = 500, 128, 16
RUNTIMES = ("onnxruntime", "openvino")
RESULT = Path(__file__).parent / "results" / "int8.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where images, packs and finished rows are")
    folder = parser.parse_args().dir
    for task in TASKS:
        build_task(task, folder / task)
    cells = [(method, backbone, task) for method in METHODS for backbone in IMAGE_SIZES for task in TASKS]
    result = {
        "command": "python benchmarks/int8.py --dir DIR",
        "rows": [row(folder, *cell) for cell in cells],
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def row(folder: Path, method: str, backbone: str, task: str) -> dict[str, Any]:
    pack = folder / backbone / f"{task}-{method}.pet"
    kept = pack.with_suffix(".int8.json")
    if not kept.exists():
        pack.parent.mkdir(parents=True, exist_ok=True)
        with Progress() as progress:
            if not pack.exists():
                with progress.training(f"{task} {method}") as say:
                    train(folder / task, f"demo:{backbone}", method, pack, image_size=IMAGE_SIZES[backbone],
                          epochs=EPOCHS[backbone], say=say, resume=True)  # fmt: skip
            with progress.stage(f"{backbone} {task} {method}"):
                kept.write_text(json.dumps(measured(pack, folder / task), sort_keys=True))
    return {"backbone": backbone, "task": task, "method": method, **json.loads(kept.read_text())}


def measured(pack: Path, data: Path) -> dict[str, Any]:
    images, labels = test_images(pack, data)
    subject = Subject(pack, None, None)
    delta, graph = subject.delta, subject.graph
    fp32 = build_model(graph, task_tensors(graph.base, delta), delta)
    chosen = calibration_images(data, delta.labels, delta.preprocess, evaluation=data, count=CALIB_IMAGES)
    calibration = calibration_of(subject, chosen, fp32)
    tried = calibration.choose()
    top1: dict[str, float] = {}

    def judge(name: str, network: Any) -> None:
        answers = np.concatenate([network(images[i : i + BATCH]).argmax(axis=1) for i in range(0, len(images), BATCH)])
        top1[f"{name} {network.runtime}"] = float((answers == labels).mean())
        network.close()

    with tempfile.TemporaryDirectory() as scratch:
        folder, layers = Path(scratch), dict[str, Any]()
        made = {
            "fp32": fp32,
            "fp16": to_half(fp32, chosen.held_out_images, where=delta.task).model,
            "int8": calibration.made(tried[0].recipe).model,
        }
        for precision, model in made.items():
            path = folder / f"{precision}.onnx"
            path.write_bytes(serialize(model))
            for network in (OnnxRuntime.of_model(path), OpenVino.of_model(path)):
                if precision == "int8":
                    layers[network.runtime] = network.evidence["layers"]
                judge(precision, network)
        for name, network in defaults(fp32, chosen.images, folder, static=delta.method == "ssf"):
            judge(name, network)
        (folder / "engine").mkdir()
        engine = build_engines(serialize(made["int8"]), folder / "engine", precision="int8")
        int8, expressed = written_with_ranges(pack, data, folder / pack.name)
        for runtime in RUNTIMES:
            judge("shared int8", SharedInt8(int8, runtime=runtime).bind(expressed))
        slots = task_slots(int8, expressed)
        return {
            "n": len(labels),
            "epochs": delta.training["epochs"],
            "top1": top1,
            "size_bytes": {name: (folder / f"{name}.onnx").stat().st_size for name in made},
            "recipe": asdict(tried[0].recipe),
            "held_out_kl": tried[0].kl,
            "layers": layers,
            "tensorrt": {"layers_by_output_type": engine.layers, "version": engine.version},
            "pack_bytes": (folder / pack.name).stat().st_size,
            "own_memory_bytes": slots.own_bytes,
            "own_codes_bytes": sum(codes.nbytes for codes in slots.codes.values()),
        }


def written_with_ranges(pack: Path, data: Path, output: Path) -> tuple[Int8Graph, Delta]:
    """Write the pack with its ranges for the int8 backbone, as ``calibrate -o`` does, without judging it."""
    subject = Subject(pack, None, None)
    graph = int8_graph(subject.graph)
    delta = subject.delta
    chosen = calibration_images(data, delta.labels, delta.preprocess, evaluation=data, count=CALIB_IMAGES)
    expressed = express(delta, subject.graph, graph, chosen, recipe=Int8Recipe()).delta
    write_pack(output, expressed, codec=subject.pack.codec)
    return graph, expressed


def test_images(pack: Path, data: Path) -> tuple[NpArray, NpArray]:
    """The test split, thinned evenly to ``TEST_IMAGES``, and its labels in the pack's order."""
    delta, test = read_pack(pack).delta, open_split(data, "test")
    index = np.unique(np.linspace(0, len(test) - 1, TEST_IMAGES).round().astype(int))
    thin = ImageSet(test.classes, tuple(test.paths[i] for i in index), tuple(test.labels[i] for i in index))
    pixels, labels = load_set(thin, delta.preprocess)
    order = np.array([delta.labels.index(name) for name in test.classes])
    return normalize(pixels, delta.preprocess), order[labels]


def defaults(fp32: Any, images: NpArray, folder: Path, *, static: bool) -> Iterator[tuple[str, Any]]:
    """The same fp32 model and images through NNCF and ONNX Runtime's ``quantize_static``, all settings left alone.

    Batch norms are folded into convolutions first: with them apart both lose a ConvNet altogether.
    """
    import nncf
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    nncf.set_log_level("ERROR")
    dataset = nncf.Dataset([images[i : i + 1] for i in range(len(images))], lambda image: {"images": image})
    model = folded(fp32)
    onnx.save(nncf.quantize(model, dataset), folder / "nncf.onnx")
    yield "nncf default", OnnxRuntime.of_model(folder / "nncf.onnx")
    yield "nncf default", OpenVino.of_model(folder / "nncf.onnx")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter([{"images": images[i : i + 1]} for i in range(len(images))])

        def get_next(self) -> dict[str, NpArray] | None:
            return next(self._left, None)

    if static:  # minutes a model, in which it adds nodes for every tensor
        (folder / "folded.onnx").write_bytes(serialize(model))
        quantize_static(str(folder / "folded.onnx"), str(folder / "static.onnx"), Reader())
        yield "onnxruntime default", OnnxRuntime.of_model(folder / "static.onnx")


if __name__ == "__main__":
    main()
