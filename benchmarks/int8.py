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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgepet import ExportOptions, export, read_pack, train
from edgepet.artifact import open_artifact, read_artifact
from edgepet.calibrating import share
from edgepet.calibration.images import calibration_images
from edgepet.data import ImageSet, load_set, open_split
from edgepet.deploy import Exported
from edgepet.imaging import normalize
from edgepet.int8 import open_int8
from edgepet.machine import environment
from edgepet.report import Progress, to_json
from edgepet.runtime import SharedInt8
from edgepet.samples import build_task
from edgepet.spec import NpArray

TASKS = ("digits", "landcover", "elpv", "fashion")
METHODS = ("ssf", "lora")
IMAGE_SIZES = {"vit-small": 112, "efficientnet-lite0": 224}
EPOCHS = {"vit-small": None, "efficientnet-lite0": 4}  # the larger images take their time
TEST_IMAGES, CALIB_IMAGES, BATCH = 500, 128, 16
RUNTIMES = ("onnxruntime", "openvino")
RESULT = Path(__file__).parent / "results" / "int8.json"
Network = Callable[[NpArray], NpArray]


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
    top1: dict[str, float] = {}

    def judge(name: str, network: Any) -> None:
        answers = np.concatenate([network(images[i : i + BATCH]).argmax(axis=1) for i in range(0, len(images), BATCH)])
        top1[name] = float((answers == labels).mean())
        if hasattr(network, "close"):
            network.close()

    with tempfile.TemporaryDirectory() as scratch:
        made = exported(pack, data, Path(scratch))
        for artifact in made:
            if artifact.format != "tensorrt":
                opened = open_artifact(artifact.path, read_artifact(artifact.path))
                judge(f"{artifact.precision} {opened.runtime}", opened)
        fp32 = next(a.path / "model.onnx" for a in made if (a.precision, a.format) == ("fp32", "onnx"))
        for name, network in defaults(fp32, pack, data, Path(scratch)):
            judge(name, network)
        shared = share(pack, data, Path(scratch) / pack.name, images=CALIB_IMAGES)
        delta = read_pack(Path(scratch) / pack.name).delta
        for runtime in RUNTIMES:
            judge(
                f"shared int8 {runtime}",
                SharedInt8(open_int8(delta.fingerprint, delta.preprocess), runtime=runtime).bind(delta),
            )
        rows = {f"{a.precision} {a.format}": a for a in made}
        int8 = rows["int8 onnx"]
        return {
            "n": len(labels),
            "epochs": delta.training["epochs"],
            "top1": top1,
            "size_bytes": {name: a.size_bytes for name, a in rows.items()},
            "int8": to_json(int8.int8),
            "layers": {name: a.executed.get("layers") for name, a in rows.items() if a.precision == "int8"},
            "tensorrt": to_json(rows["int8 tensorrt"].executed),
            "shared": {
                "pack_bytes": shared.pack_bytes,
                "codes_bytes": shared.codes_bytes,
                "codes_sha256": shared.codes_sha256,
                "own_memory_bytes": shared.own_memory_bytes,
                "own_codes_bytes": shared.own_codes_bytes,
                "recipe": asdict(shared.recipe),
                "drop": {run.runtime: asdict(run.drop) for run in shared.runs},
            },
        }


def test_images(pack: Path, data: Path) -> tuple[NpArray, NpArray]:
    """The test split, thinned evenly to ``TEST_IMAGES``, and its labels in the pack's order."""
    delta, test = read_pack(pack).delta, open_split(data, "test")
    index = np.unique(np.linspace(0, len(test) - 1, TEST_IMAGES).round().astype(int))
    thin = ImageSet(test.classes, tuple(test.paths[i] for i in index), tuple(test.labels[i] for i in index))
    pixels, labels = load_set(thin, delta.preprocess)
    order = np.array([delta.labels.index(name) for name in test.classes])
    return normalize(pixels, delta.preprocess), order[labels]


def exported(pack: Path, data: Path, folder: Path) -> list[Exported]:
    made: list[Exported] = []
    for precision, formats in (("fp32", ("onnx", "openvino")), ("fp16", ("onnx", "openvino")),
                               ("int8", ("onnx", "openvino", "tensorrt"))):  # fmt: skip
        calib = None if precision == "fp32" else data
        options = ExportOptions(to=formats, precision=precision, calib=calib, calib_images=CALIB_IMAGES)
        made += export([pack], folder / precision, options=options).artifacts
    return made


def defaults(fp32: Path, pack: Path, data: Path, folder: Path) -> Iterator[tuple[str, Network]]:
    """The same fp32 model and images through NNCF and through ONNX Runtime, all settings left alone."""
    import nncf
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    from edgepet.runners.onnxruntime import OnnxRuntime
    from edgepet.runners.openvino import OpenVino

    delta = read_pack(pack).delta
    images = calibration_images(data, delta.labels, delta.preprocess, count=CALIB_IMAGES).images
    nncf.set_log_level("ERROR")
    dataset = nncf.Dataset([images[i : i + 1] for i in range(len(images))], lambda image: {"images": image})
    onnx.save(nncf.quantize(onnx.load(fp32), dataset), folder / "nncf.onnx")
    yield "nncf default onnxruntime", OnnxRuntime.of_model(folder / "nncf.onnx")
    yield "nncf default openvino", OpenVino.of_model(folder / "nncf.onnx")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter([{"images": images[i : i + 1]} for i in range(len(images))])

        def get_next(self) -> dict[str, NpArray] | None:
            return next(self._left, None)

    if delta.method != "ssf":  # minutes a model, in which it adds a node for every tensor
        return
    quantize_static(str(fp32), str(folder / "static.onnx"), Reader())
    yield "onnxruntime default onnxruntime", OnnxRuntime.of_model(folder / "static.onnx")


if __name__ == "__main__":
    main()
