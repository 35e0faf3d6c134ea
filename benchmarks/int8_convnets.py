"""How fast int8 is on four ConvNets, a task's own model over its fp32 one, and how often both answer alike.

    python benchmarks/int8_convnets.py --dir DIR    # a quarter of an hour on 2 cores that do nothing else

A linear probe of each network is made in both precisions, unchecked: ``export`` refuses the int8 of seeded networks
whose answers change too often. Latency is of both, interleaved, one runtime at a time, in processes one after another.
EfficientNet-Lite0 has real weights; no package carries any for the others, which are seeded, so only speed and
agreement say something of them. Writes ``int8-convnets.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import alone, asked, earlier, parser_of, source, write_result
from judging import tested_images
from methods import Network, spec_of
from trainings import draw

from edgepet import ExportOptions, read_pack, train
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.openvino import OpenVino
from edgepet.device.runner import Runner
from edgepet.device.runtimes import Format
from edgepet.exporters.onnx import serialize
from edgepet.images.batches import batched
from edgepet.measuring.latency import Candidate, measure, ratio, ratio_of_runs
from edgepet.networks.loading import load_backbone
from edgepet.proving.precision import in_precision
from edgepet.proving.subject import Subject
from edgepet.reports.tables import Column, Table, format_ms, format_number, format_percent, markdown
from edgepet.spec import NpArray, StoredPrecision

TASK, THREADS = "digits", (1, 2)
RUNTIMES: dict[str, Format] = {"onnxruntime": "onnx", "openvino": "openvino"}
NETWORKS = {
    "EfficientNet-Lite0": Network("demo:efficientnet-lite0", 224, "real"),
    "MobileNetV4 small": Network("mobilenetv4_conv_small", 224, "seeded"),
    "ResNet-18": Network("resnet18", 224, "seeded"),
    "ConvNeXt-Atto": Network("convnext_atto", 224, "seeded"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much of everything."""

    networks: tuple[str, ...]
    epochs: int
    calib_images: int
    test_images: int
    runs: int
    rounds: int


LONG = Amount(networks=tuple(NETWORKS), epochs=8, calib_images=128, test_images=500, runs=3, rounds=100)
SHORT = Amount(networks=("ResNet-18",), epochs=1, calib_images=32, test_images=20, runs=2, rounds=2)


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--resume", action="store_true", help="keep the networks that are measured already")
    made.add_argument("--only", nargs=3, metavar=("FOLDER", "RUNTIME", "THREADS"), help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure every network, or in this process the latency of one in one runtime."""
    options = parser().parse_args()
    amount = SHORT if options.quick else LONG
    if options.only:
        folder, runtime, threads = options.only
        json.dump(latency(Path(folder), runtime, int(threads), amount.rounds), sys.stdout)
        return
    run, facts = asked(options), {"runs": amount.runs, "rounds": amount.rounds}
    before = earlier(run, "int8-convnets") if options.resume else {}
    rows, data = list[dict[str, Any]](before.get("rows", ())), draw(run, TASK)
    networks = {t: {"name": NETWORKS[t].architecture, "weights": NETWORKS[t].weights} for t in amount.networks}
    for title in (each for each in amount.networks if each not in {row["network"] for row in rows}):
        with tempfile.TemporaryDirectory() as folder:
            rows += [{"network": title, **row} for row in measured(NETWORKS[title], data, Path(folder), amount)]
        write_result(run, "int8-convnets", {"networks": networks, **facts, "rows": rows})


def measured(network: Network, data: Path, folder: Path, amount: Amount) -> list[dict[str, object]]:
    """A row for each runtime, by way of files in ``folder``."""
    backbone, pack = load_backbone(spec_of(network, folder), image_size=network.image_size), folder / f"{TASK}.pet"
    train(data, backbone, "linear-probe", pack, epochs=amount.epochs)
    fp32 = ExportOptions(to=tuple(RUNTIMES.values()))
    int8 = replace(fp32, precision="int8", calib=data, calib_images=amount.calib_images)
    subject = Subject(pack, backbone, None)
    asked_for: dict[StoredPrecision, ExportOptions] = {"fp32": fp32, "int8": int8}
    for precision, options in asked_for.items():
        made = in_precision(subject, precision, options, lambda stage: None)
        for runtime, name in RUNTIMES.items():
            place_of(folder, runtime, precision).write_bytes(serialize(made[name].proto))
    images, labels = tested_images(read_pack(pack).delta, data, amount.test_images)
    return [
        {
            "runtime": runtime,
            **agreement(folder, runtime, images, labels),
            "threads": {str(threads): runs(folder, runtime, threads, amount) for threads in THREADS},
        }
        for runtime in RUNTIMES
    ]


def place_of(folder: Path, runtime: str, precision: str) -> Path:
    """The file of a model."""
    return folder / f"{runtime}-{precision}.onnx"


def opened(folder: Path, runtime: str, precision: str, threads: int) -> Runner:
    """One of the models."""
    path = place_of(folder, runtime, precision)
    if runtime == "onnxruntime":
        return OnnxRuntime.of_model(path, threads=threads)
    return OpenVino.of_model(path, threads=threads)


def agreement(folder: Path, runtime: str, images: NpArray, labels: NpArray) -> dict[str, Any]:
    """Top-1 of both precisions, how often they are alike, and how many products int8 makes on codes."""
    answers, evidence = dict[str, NpArray](), dict[str, object]()
    for precision in ("fp32", "int8"):
        model = opened(folder, runtime, precision, THREADS[-1])
        answers[precision] = batched(model, images).argmax(axis=1)
        evidence[precision] = model.evidence.get("layers")
        model.close()
    return {
        "test_n": len(labels),
        "top1": {name: float((found == labels).mean()) for name, found in answers.items()},
        "same_top1": float((answers["fp32"] == answers["int8"]).mean()),
        "layers": evidence["int8"],
    }


def runs(folder: Path, runtime: str, threads: int, amount: Amount) -> dict[str, object]:
    """Latency in several processes, one after another."""
    given = ("--only", folder, runtime, threads)
    every = [alone(__file__, *given, quick=amount is SHORT) for _ in range(amount.runs)]
    return {
        "ratio": ratio_of_runs([each["ratio"] for each in every]),
        "p50_ms": {name: float(np.median([each["p50_ms"][name] for each in every])) for name in every[0]["p50_ms"]},
    }


def latency(folder: Path, runtime: str, threads: int, rounds: int) -> dict[str, object]:
    """One process: int8 over fp32, interleaved."""
    precisions = ("fp32", "int8")
    candidates = [
        Candidate(
            model=p, runtime=runtime, precision=p, mode="merged", open=partial(opened, folder, runtime, p, threads)
        )
        for p in precisions
    ]
    shape = read_pack(folder / f"{TASK}.pet").delta.preprocess.input_shape
    images = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    report = measure(candidates, images, threads=threads, rounds=rounds)
    fp32, int8 = report.rows
    return {"ratio": ratio(report, int8, fp32).median, "p50_ms": {row.model: row.p50_ms for row in report.rows}}


def convnet_table(result: Mapping[str, Any]) -> str:
    """A row for each network and runtime."""
    rows = []
    for row in result["rows"]:
        cells = []
        for found in row["threads"].values():
            ratio, p50 = found["ratio"], found["p50_ms"]
            cells += [format_ms(p50["fp32"]), format_ms(p50["int8"])]
            cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        on_codes = row["layers"]["int8"]
        every = f"{format_number(on_codes)} of {format_number(sum(row['layers'].values()))}"
        agreed = (every, format_percent(row["same_top1"]), *(format_percent(row["top1"][p]) for p in ("fp32", "int8")))
        rows.append((f"{row['network']}, {row['runtime']}", *cells, *agreed))
    threads = list(result["rows"][0]["threads"])
    timed = [
        f"{name}, {n} {'thread' if n == '1' else 'threads'}"
        for n in threads
        for name in ("fp32 ms", "int8 ms", "int8 / fp32")
    ]
    numbers = (*timed, "on codes", "same answers", "fp32 top-1", "int8 top-1")
    columns = (Column("network, runtime"), *(Column(name, right=True) for name in numbers))
    seeded = ", ".join(title for title, of in result["networks"].items() if of["weights"] == "seeded")
    told = (
        f"A linear probe of {TASK} at 224 px in a task's own int8 model; answers of {result['rows'][0]['test_n']} test"
        f" images. Median of {result['runs']} processes of {result['rounds']} interleaved rounds, batch 1."
        f" {seeded} have seeded weights: their top-1 says nothing of them."
    )
    return f"{markdown(Table('int8 over fp32 on ConvNets', columns, rows))}\n{told} {source(result)}\n"


if __name__ == "__main__":
    main()
