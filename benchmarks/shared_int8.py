"""The int8 backbone that tasks share: latency, switching, memory and codes, beside an int8 model of each task's own.

    python benchmarks/shared_int8.py --dir DIR     # DIR as of benchmarks/int8.py; ten minutes on 2 cores

SSF tasks of one backbone. Latency is of one task in three forms, interleaved, one runtime at a time, since ONNX
Runtime's idle threads slow whatever else is timed; the median over processes of each process's ratio. Memory is what a
process gains, proportional set size, for each further task that is bound and run. Writes ``results/shared-int8.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from int8 import CALIB_IMAGES, TASKS, written_with_ranges

from edgepet import ExportOptions, export, read_pack
from edgepet.deltas.codes import coded
from edgepet.deltas.merge import fold_all
from edgepet.device.artifact import open_artifact, read_artifact
from edgepet.device.runtime import SharedInt8, open_task
from edgepet.files import sha256_file
from edgepet.graphs.int8 import Int8Graph, open_int8
from edgepet.graphs.slots import task_slots
from edgepet.measuring.latency import Candidate, measure, ratio, ratio_of_runs
from edgepet.measuring.machine import environment
from edgepet.proving.subject import Subject
from edgepet.reports.as_json import to_json

BACKBONES = ("vit-small", "efficientnet-lite0")
RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
THREADS, ROUNDS, RUNS, FURTHER = 2, 100, 3, 20
RESULT = Path(__file__).parent / "results" / "shared-int8.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where images and packs are")
    parser.add_argument("--only", nargs=3, metavar=("WHAT", "RUNTIME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        what, runtime, folder = options.only
        json.dump({"latency": latency, "memory": memory}[what](Path(folder), runtime), sys.stdout)
        return
    result = {
        "command": "python benchmarks/shared_int8.py --dir DIR",
        "backbones": {name: backbone(options.dir, name) for name in BACKBONES},
        "threads": THREADS,
        "rounds": ROUNDS,
        "runs": RUNS,
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def backbone(folder: Path, name: str) -> dict[str, Any]:
    """One backbone's tasks, expressed one after the other against the same file of codes."""
    packs = [folder / name / f"{task}-ssf.pet" for task in TASKS]
    with tempfile.TemporaryDirectory() as scratch:
        digests, slots = [], {}
        for pack, task in zip(packs, TASKS, strict=True):
            written = written_with_ranges(pack, folder / task, Path(scratch) / f"{task}.pet")
            slots[task] = task_slots(*written).own_bytes
            digests.append(sha256_file(graph_of(Path(scratch) / f"{task}.pet").codes_path))
        options = ExportOptions(
            to=("onnx", "openvino"), precision="int8", calib=folder / TASKS[0], calib_images=CALIB_IMAGES
        )
        export([packs[0]], Path(scratch) / "own", options=options)
        graph = graph_of(Path(scratch) / f"{TASKS[0]}.pet")
        return {
            "codes_sha256": digests,
            "codes_bytes": graph.weights_bytes,
            "graph_bytes": graph.graph_bytes,
            "fp32_bytes": Subject(packs[0], None, None).graph.weights_bytes,
            "pack_bytes": {task: (Path(scratch) / f"{task}.pet").stat().st_size for task in TASKS},
            "slots_bytes": slots,
            "codes": {pack.stem: code_differences(pack, graph) for pack in packs},
            "latency": {runtime: runs(scratch, runtime) for runtime in RUNTIMES},
            "memory": {runtime: process("memory", runtime, scratch) for runtime in RUNTIMES},
        }


def graph_of(pack: Path) -> Int8Graph:
    delta = read_pack(pack).delta
    return open_int8(delta.fingerprint, delta.preprocess)


def process(what: str, runtime: str, folder: str) -> Any:
    command = [sys.executable, __file__, "--dir", folder, "--only", what, runtime, folder]
    return json.loads(subprocess.check_output(command))


def runs(folder: str, runtime: str) -> dict[str, Any]:
    every = [process("latency", runtime, folder) for _ in range(RUNS)]
    names = every[0]["ratios"]
    return {
        "ratios": {name: to_json(ratio_of_runs([run["ratios"][name] for run in every])) for name in names},
        "ratios_of_runs": {name: [run["ratios"][name] for run in every] for name in names},
        "p50_ms": {name: float(np.median([run["p50_ms"][name] for run in every])) for name in every[0]["p50_ms"]},
        "bind_ms": float(np.median([run["bind_ms"] for run in every])),
        "switch_ms": float(np.median([run["switch_ms"] for run in every])),
    }


def latency(folder: Path, runtime: str) -> dict[str, Any]:
    """One process: a task on the shared codes, as an int8 model of its own, and in fp32; and changing tasks."""
    delta, graph = read_pack(folder / f"{TASKS[0]}.pet").delta, graph_of(folder / f"{TASKS[0]}.pet")
    own = next((folder / "own").glob(f"*-{RUNTIMES[runtime]}-int8"))
    fp32 = Subject(folder / f"{TASKS[0]}.pet", None, None).graph
    shared = SharedInt8(graph, runtime=runtime, threads=THREADS)
    opened = {
        "shared": lambda: shared.bind(delta),
        "own": lambda: open_artifact(own, read_artifact(own), threads=THREADS),
        "fp32": lambda: open_task(fp32, delta, runtime=runtime, threads=THREADS),
    }
    candidates = [Candidate(model=n, runtime=runtime, precision=n, mode=n, open=o) for n, o in opened.items()]
    images = np.random.default_rng(0).standard_normal((1, *delta.preprocess.input_shape), dtype=np.float32)
    report = measure(
        candidates, images, threads=THREADS, rounds=ROUNDS, settle_s=0.05 if runtime == "onnxruntime" else 0.002
    )
    rows = {row.model: row for row in report.rows}
    pairs = (("shared", "own"), ("shared", "fp32"), ("own", "fp32"))
    began = time.perf_counter()
    bound = [shared.bind(read_pack(folder / f"{task}.pet").delta) for task in TASKS]
    bind_ms = 1e3 * (time.perf_counter() - began) / len(bound)
    return {
        "ratios": {f"{a} / {b}": ratio(report, rows[a], rows[b]).median for a, b in pairs},
        "p50_ms": {name: row.p50_ms for name, row in rows.items()},
        "bind_ms": bind_ms,
        "switch_ms": switching(bound, images),
    }


def switching(bound: list[Any], images: Any) -> float:
    """What a call costs more where every call is another task's than the last: medians of many."""
    for network in bound:
        network(images)
    times: dict[str, list[float]] = {"same": [], "other": []}
    for turn in range(4 * ROUNDS):
        network = bound[turn // 2 % len(bound)]  # each task twice: the first call of a pair has changed it
        began = time.perf_counter()
        network(images)
        times["same" if turn % 2 else "other"].append(1e3 * (time.perf_counter() - began))
    return float(np.median(times["other"]) - np.median(times["same"]))


def memory(folder: Path, runtime: str) -> dict[str, float]:
    """Bytes that the process gains for the first task and for each of ``FURTHER`` more."""
    deltas = [read_pack(folder / f"{task}.pet").delta for task in TASKS]
    images = np.zeros((1, *deltas[0].preprocess.input_shape), np.float32)
    before = resident()
    shared = SharedInt8(graph_of(folder / f"{TASKS[0]}.pet"), runtime=runtime, threads=THREADS)
    bound = [shared.bind(deltas[0])]
    for _ in range(2):  # ONNX Runtime takes its memory for good in a session's second call
        bound[0](images)
    first = resident()
    for turn in range(FURTHER):
        bound.append(shared.bind(deltas[turn % len(deltas)]))
        bound[-1](images)
    return {"first_bytes": first - before, "further_bytes": (resident() - first) / FURTHER, "further_tasks": FURTHER}


def resident() -> int:
    """Proportional set size of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def code_differences(pack: Path, graph: Int8Graph) -> dict[str, Any]:
    """Merged weights coded anew by the same recipe, against the codes times the sign of what scales each row."""
    subject = Subject(pack, None, None)
    base, delta = subject.graph.base.tensors, subject.delta
    differ, apart, exact, total = 0, 0, 0, 0
    for layer in graph.layers:
        updates = [targeted for targeted in delta.updates if targeted.target.tensor == layer.weight]
        made, weight = graph.coded(layer), np.array(base[layer.weight])
        signs = np.sign(fold_all({layer.weight: np.ones(len(weight))}, updates)[layer.weight]).reshape(
            -1, *[1] * (weight.ndim - 1)
        )
        again = coded(fold_all({layer.weight: weight}, updates)[layer.weight], made.divisors).codes
        gap = np.abs(again.astype(int) - signs * made.codes)
        differ, apart, total = differ + int((gap > 0).sum()), max(apart, int(gap.max())), total + gap.size
        double = weight.astype(np.float64)
        wide = coded(fold_all({layer.weight: double}, updates)[layer.weight], made.divisors).codes
        exact += int((wide != signs * made.codes).sum())
    return {"weights": total, "differ_fp32": differ, "most_codes_apart": apart, "differ_fp64": exact}


if __name__ == "__main__":
    main()
