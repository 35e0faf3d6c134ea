"""The int8 backbone that tasks share: latency, switching, memory and codes, beside an int8 model of each task's own.

    python benchmarks/shared_int8.py --dir DIR     # DIR as of benchmarks/int8.py; ten minutes on 2 cores

SSF tasks of one backbone, and those of a method with branches, which are float beside the same codes. Latency is of one
task in three forms, interleaved, one runtime at a time, since ONNX Runtime's idle threads slow whatever else is timed;
the median over processes of each process's ratio. Memory is what a process gains, proportional set size, for each
further task that is bound and run. Writes ``shared-int8.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Asked, alone, asked, parser_of, write_result
from int8 import FULL, QUICK, Plan, written_with_ranges
from trainings import Trained, trained

from edgepet import ExportOptions, export, read_pack
from edgepet.deltas.codes import coded
from edgepet.deltas.merge import fold_all
from edgepet.device.artifact import open_artifact, read_artifact
from edgepet.device.runner import Runner
from edgepet.device.runtime import SharedInt8, open_task
from edgepet.files import sha256_file
from edgepet.graphs.int8 import Int8Graph, open_int8
from edgepet.graphs.slots import task_slots
from edgepet.measuring.latency import Candidate, measure, ratio, ratio_of_runs, switching_ms
from edgepet.measuring.machine import resident_bytes
from edgepet.proving.subject import Subject

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Of packs, of rounds in a process, of processes, and of tasks that are bound behind the first one.

    ``branches`` are methods that stay in the graph, by backbone.
    """

    plan: Plan
    branches: Mapping[str, str]
    rounds: int
    runs: int
    further: int


LONG = Amount(plan=FULL, branches={"vit-small": "convpass"}, rounds=100, runs=3, further=20)
SHORT = Amount(plan=QUICK, branches={"efficientnet-lite0": "conv-adapter"}, rounds=4, runs=2, further=2)


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--only", nargs=3, metavar=("WHAT", "RUNTIME", "FOLDER"), help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure every backbone, or in this process one thing of one."""
    options = parser().parse_args()
    amount = SHORT if options.quick else LONG
    if options.only:
        what, runtime, folder = options.only
        json.dump({"latency": latency, "memory": memory}[what](Path(folder), runtime, amount), sys.stdout)
        return
    run = asked(options)
    facts = {
        "backbones": {name: backbone(run, amount, name, "ssf") for name in amount.plan.epochs},
        "branches": {name: {"method": m, **backbone(run, amount, name, m)} for name, m in amount.branches.items()},
        "threads": THREADS,
        "rounds": amount.rounds,
        "runs": amount.runs,
    }
    write_result(run, "shared-int8", facts)


def backbone(run: Asked, amount: Amount, name: str, method: str) -> dict[str, object]:
    """One backbone's tasks of a method, expressed one after the other against the same file of codes."""
    made = trained(run, amount.plan.trainings(name, method))
    with tempfile.TemporaryDirectory() as folder:
        return measured(made, Path(folder), amount)


def measured(made: tuple[Trained, ...], scratch: Path, amount: Amount) -> dict[str, object]:
    """What is found of the packs of one backbone, by way of files in ``scratch``."""
    calib, slots, digests = amount.plan.calib_images, dict[str, int](), list[str]()
    for each in made:
        expressed = scratch / f"{each.training.task}.pet"
        slots[expressed.stem] = task_slots(*written_with_ranges(each.pack, each.data, expressed, calib)).own_bytes
        digests.append(sha256_file(graph_of(expressed).codes_path))
    first, tasks = made[0], [each.training.task for each in made]
    options = ExportOptions(to=("onnx", "openvino"), precision="int8", calib=first.data, calib_images=calib)
    export([first.pack], scratch / "own", options=options)
    graph = graph_of(scratch / f"{tasks[0]}.pet")
    return {
        "codes_sha256": digests,
        "codes_bytes": graph.weights_bytes,
        "graph_bytes": graph.graph_bytes,
        "fp32_bytes": Subject(first.pack, None, None).graph.weights_bytes,
        "pack_bytes": {task: (scratch / f"{task}.pet").stat().st_size for task in tasks},
        "slots_bytes": slots,
        "codes": {each.pack.stem: code_differences(each.pack, graph) for each in made},
        "latency": {runtime: runs(scratch, runtime, amount) for runtime in RUNTIMES},
        "memory": {runtime: process("memory", runtime, scratch, amount) for runtime in RUNTIMES},
    }


def graph_of(pack: Path) -> Int8Graph:
    """The int8 backbone of an expressed pack."""
    delta = read_pack(pack).delta
    return open_int8(delta.fingerprint, delta.preprocess, delta.structure)


def process(what: str, runtime: str, folder: Path, amount: Amount) -> dict[str, Any]:
    """``latency`` or ``memory`` in a process of its own."""
    found: dict[str, Any] = alone(__file__, "--only", what, runtime, folder, quick=amount is SHORT)
    return found


def runs(folder: Path, runtime: str, amount: Amount) -> dict[str, object]:
    """Latency in several processes, one after another."""
    every = [process("latency", runtime, folder, amount) for _ in range(amount.runs)]
    names = every[0]["ratios"]
    return {
        "ratios": {name: ratio_of_runs([run["ratios"][name] for run in every]) for name in names},
        "ratios_of_runs": {name: [run["ratios"][name] for run in every] for name in names},
        "p50_ms": {name: float(np.median([run["p50_ms"][name] for run in every])) for name in every[0]["p50_ms"]},
        "bind_ms": float(np.median([run["bind_ms"] for run in every])),
        "switch_ms": float(np.median([run["switch_ms"] for run in every])),
    }


def latency(folder: Path, runtime: str, amount: Amount) -> dict[str, object]:
    """One process: a task on the shared codes, as an int8 model of its own, and in fp32; and changing tasks."""
    packs = [folder / f"{task}.pet" for task in amount.plan.tasks]
    delta, graph = read_pack(packs[0]).delta, graph_of(packs[0])
    own = next((folder / "own").glob(f"*-{RUNTIMES[runtime]}-int8"))
    fp32 = Subject(packs[0], None, None).graph
    shared = SharedInt8(graph, runtime=runtime, threads=THREADS)
    opened: dict[str, Callable[[], Runner]] = {
        "shared": lambda: shared.bind(delta),
        "own": lambda: open_artifact(own, read_artifact(own), threads=THREADS),
        "fp32": lambda: open_task(fp32, delta, runtime=runtime, threads=THREADS),
    }
    candidates = [Candidate(model=n, runtime=runtime, precision=n, mode=n, open=o) for n, o in opened.items()]
    images = np.random.default_rng(0).standard_normal((1, *delta.preprocess.input_shape), dtype=np.float32)
    report = measure(candidates, images, threads=THREADS, rounds=amount.rounds)
    rows = {row.model: row for row in report.rows}
    pairs = (("shared", "own"), ("shared", "fp32"), ("own", "fp32"))
    began = time.perf_counter()
    bound = [shared.bind(read_pack(pack).delta) for pack in packs]
    bind_ms = 1e3 * (time.perf_counter() - began) / len(bound)
    return {
        "ratios": {f"{a} / {b}": ratio(report, rows[a], rows[b]).median for a, b in pairs},
        "p50_ms": {name: row.p50_ms for name, row in rows.items()},
        "bind_ms": bind_ms,
        "switch_ms": switching_ms(bound, images, 4 * amount.rounds),
    }


def memory(folder: Path, runtime: str, amount: Amount) -> dict[str, object]:
    """Bytes that the process gains for the first task and for each of ``amount.further`` more."""
    packs = [folder / f"{task}.pet" for task in amount.plan.tasks]
    deltas = [read_pack(pack).delta for pack in packs]
    images = np.zeros((1, *deltas[0].preprocess.input_shape), np.float32)
    before = resident()
    shared = SharedInt8(graph_of(packs[0]), runtime=runtime, threads=THREADS)
    bound = [shared.bind(deltas[0])]
    for _ in range(2):  # ONNX Runtime takes its memory for good in a session's second call
        bound[0](images)
    first = resident()
    for turn in range(amount.further):
        bound.append(shared.bind(deltas[turn % len(deltas)]))
        bound[-1](images)
    further = (resident() - first) / amount.further
    return {"first_bytes": first - before, "further_bytes": further, "further_tasks": amount.further}


def resident() -> int:
    """Proportional set size of this process."""
    return resident_bytes() or 0


def code_differences(pack: Path, graph: Int8Graph) -> dict[str, int]:
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
