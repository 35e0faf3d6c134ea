"""What tasks cost that are kept open on one backbone: alone in slots and merged, and ten of them on one image.

    pip install 'edgepet[train,onnx,openvino,peft]'
    python benchmarks/serving.py --dir DIR    # a quarter of an hour, on a machine that does nothing else

Deltas are drawn: how long they take does not depend on what they were trained for. Every cell is a process of its own.
Beside edgepet stands what people do otherwise: a file for each task, PEFT's hot swapping in torch, and ONNX
Runtime's own adapters on the same graph. Writes ``serving.json``; ``report.py`` makes the tables in
docs/guide/on-the-device.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from adapters import OrtAdapters, hotswapped
from harness import Asked, alone, asked, earlier, parser_of, source, write_result
from serving_many import batch_of_eight, batch_table, many_in_memory, memory_table, on_one_image, one_image_table
from shared_int8 import resident

from edgepet.deltas.delta import Delta
from edgepet.device.fitting import Fitted, fit, opened
from edgepet.device.runner import BoundPart, Runner
from edgepet.device.runtime import open_task
from edgepet.device.runtimes import RUNTIMES, SHARED_RUNTIMES, shared_runtime
from edgepet.graphs.base import BaseGraph
from edgepet.measuring.latency import Candidate, measure, ratio, ratio_of_runs, switching_ms
from edgepet.methods import SSF, LinearProbe, LoRA, Method
from edgepet.methods.depth import in_blocks
from edgepet.reports.tables import Column, Table, markdown
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone

THREADS = 1
LORA = LoRA(rank=8, on=("qkv",))  # what PEFT can name on timm's fused layer
FORMS: dict[str, tuple[Method, Any]] = {
    "merged SSF": (SSF(), "merged"),
    "SSF in slots": (SSF(), "slots"),
    "LoRA in slots": (LORA, "slots"),
}
TEN: dict[str, Method] = {"from block 6": in_blocks(SSF(), "6-11"), "from block 9": in_blocks(SSF(), "9-11"),
                          "linear probes": LinearProbe()}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Amount:
    """How much of everything: image sizes, processes, rounds in each, and tasks more than one."""

    sizes: tuple[int, ...]
    runs: int
    rounds: int
    further: int
    together: int
    many: int

    def costly(self, size: int) -> int:
        """Rounds of what runs many tasks: at twice the size, of four times the pixels, a quarter."""
        return max(2, self.rounds * self.sizes[0] ** 2 // size**2)


LONG = Amount(sizes=(112, 224), runs=2, rounds=40, further=8, together=10, many=50)
SHORT = Amount(sizes=(112,), runs=2, rounds=2, further=2, together=3, many=3)


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--again", choices=("latency",), help="add processes to these cells, and keep all others")
    made.add_argument("--only", nargs=3, metavar=("WHAT", "SIZE", "RUNTIME"), help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure every cell, or in this process one of them."""
    options = parser().parse_args()
    amount = SHORT if options.quick else LONG
    if options.only:
        what, size, runtime = options.only
        json.dump(CELLS[what](int(size), runtime, amount), sys.stdout)
        return
    run = asked(options)
    if options.again:
        again(run, amount)
        return
    cells = []
    for size in amount.sizes:
        for runtime in SHARED_RUNTIMES:
            forms, ten = (several(what, size, runtime, run, amount) for what in ("latency", "ten"))
            eight = several("eight", size, runtime, run, amount)
            cells.append(
                {
                    "image_size": size,
                    "runtime": runtime,
                    "forms": over_runs(forms),
                    "memory": process("memory", size, runtime, options.quick),
                    "ten": {name: ratio_of_runs([each[name] for each in ten]) for name in ten[0]},
                    "many": process("many", size, runtime, options.quick),
                    "eight": {name: ratio_of_runs([each[name] for each in eight]) for name in eight[0]},
                }
            )
            print(f"{size} px {runtime}", flush=True)
    size = amount.sizes[0]
    adapters = over_runs([process("adapters", size, "onnxruntime", options.quick) for _ in range(amount.runs)])
    facts = {"threads": THREADS, "rounds": amount.rounds, "runs": amount.runs, "tasks": amount.together,
             "many": amount.many, "cells": cells, "adapters": adapters}  # fmt: skip
    write_result(run, "serving", facts)


def again(run: Asked, amount: Amount) -> None:
    """Add processes to the latencies of an earlier result: what differs from process to process, a layout of memory
    say, or what else the machine's owner runs on it, may be in all that was found at one time.
    """
    result = earlier(run, "serving")
    for cell in result["cells"]:
        cell["forms"] = over_runs(several("latency", cell["image_size"], cell["runtime"], run, amount), cell["forms"])
    write_result(run, "serving", {key: value for key, value in result.items() if key not in ("command", "environment")})


def several(what: str, size: int, runtime: str, run: Asked, amount: Amount) -> list[dict[str, Any]]:
    """One cell in as many processes as ``amount`` says, one after another."""
    return [process(what, size, runtime, run.quick) for _ in range(amount.runs)]


def process(what: str, size: int, runtime: str, quick: bool) -> dict[str, Any]:
    """One cell, in a process of its own."""
    found: dict[str, Any] = alone(__file__, "--only", what, size, runtime, quick=quick)
    return found


def over_runs(runs: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Of each form the ratio over these runs and those ``before``, and medians of these of what is in milliseconds."""
    made = dict[str, Any]()
    for form in runs[0]:
        ratios = [*(before or {}).get(form, {}).get("ratios_of_runs", ()), *(run[form]["over_plain"] for run in runs)]
        times = {key: float(np.median([run[form][key] for run in runs])) for key in runs[0][form]}
        made[form] = times | {"over_plain": ratio_of_runs(ratios), "ratios_of_runs": ratios}
    return made


# ---------------------------------------------------------------------------------------------------------- the cells


def latency(size: int, runtime: str, amount: Amount) -> dict[str, Any]:
    """Each form beside the plain backbone, and the exported file of a task: open, first, steady, from task to task."""
    backbone, graph = on(size)
    first = drawn(backbone, SSF(), 0)
    forms: dict[str, Callable[[], Runner]] = {
        "plain": lambda: open_task(graph, drawn(backbone, LinearProbe(), 0), runtime=runtime, threads=THREADS),
        **{
            name: partial(bound_to, fit(graph, drawn(backbone, m, 0), form), runtime)
            for name, (m, form) in FORMS.items()
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        forms["a file of its own"] = exported(backbone, first, Path(folder), runtime)
        forms |= kept_forms(graph, first, Path(folder), runtime)
        images = noise(size)
        rows = timed(forms, images, runtime, amount)
    switched = {name: changing(graph, backbone, *FORMS[name], runtime, images, amount) for name in FORMS}
    return {name: row | ({"switch_ms": switched[name]} if name in switched else {}) for name, row in rows.items()}


def kept_forms(graph: BaseGraph, delta: Delta, folder: Path, runtime: str) -> dict[str, Callable[[], Runner]]:
    """The task merged, as a store's cache has kept it; of a runtime that keeps none, none."""
    opener = RUNTIMES[runtime].open_kept
    if opener is None:
        return {}
    fitted = fit(graph, delta, "merged")
    again = partial(opener, graph, "0" * 64, lambda: fitted.tensors, folder, THREADS)
    again().close()
    return {"merged SSF, kept": again}


def memory(size: int, runtime: str, amount: Amount) -> dict[str, Any]:
    """Bytes that the process gains for the first SSF task and for each one more, in slots."""
    backbone, graph = on(size)
    fitted = [fit(graph, drawn(backbone, SSF(), seed), "slots") for seed in range(amount.further + 1)]
    images, before = noise(size), resident()
    network = opened(shared_runtime(runtime, purpose="a benchmark"), fitted[0].part, {}, THREADS)
    bound = [network.bind(fitted[0].slots)]
    for _ in range(2):  # ONNX Runtime takes its memory for good in a session's second call
        bound[0](images)
    first = resident()
    for each in fitted[1:]:
        bound.append(network.bind(each.slots))
        bound[-1](images)
    slots = sum(value.nbytes for value in fitted[0].slots.values())
    return {
        "first_bytes": first - before,
        "further_bytes": (resident() - first) / amount.further,
        "slots_bytes": slots,
    }


def ten(size: int, runtime: str, amount: Amount) -> dict[str, Any]:
    """Ten tasks on one image, by where they leave the backbone."""
    backbone, graph = on(size)
    return on_one_image(
        backbone, graph, drawn, TEN, runtime, threads=THREADS, rounds=amount.costly(size), tasks=amount.together
    )


def adapters(size: int, runtime: str, amount: Amount) -> dict[str, Any]:
    """LoRA as others switch it: ONNX Runtime's adapters on the graph with slots, and PEFT in torch."""
    backbone, graph = on(size)
    fitted = [fit(graph, drawn(backbone, LORA, seed), "slots") for seed in range(2)]
    images = noise(size)
    with tempfile.TemporaryDirectory() as folder:
        active = OrtAdapters(fitted, Path(folder), THREADS)
        torch_plain, swapped, swap = hotswapped(
            backbone, [drawn(backbone, LORA, k) for k in range(2)], Path(folder), THREADS
        )
        own: dict[str, Callable[[], Any]] = {
            "plain": lambda: open_task(graph, drawn(backbone, LinearProbe(), 0), runtime=runtime, threads=THREADS),
            "LoRA in slots": partial(bound_to, fit(graph, drawn(backbone, LORA, 0), "slots"), runtime),
            "ONNX Runtime's adapters": lambda: active,
        }
        rows = timed(own, images, runtime, amount)
        there: dict[str, Callable[[], Any]] = {"plain": lambda: torch_plain, "PEFT in torch": lambda: swapped}
        rows |= {"PEFT in torch": timed(there, images, "torch", amount)["PEFT in torch"]}
        rows["PEFT in torch"]["switch_ms"] = median_ms(swap, amount)
        rows["ONNX Runtime's adapters"]["switch_ms"] = median_ms(active.switch, amount)
    return {name: row | {"switch_ms": row.get("switch_ms", 0.0)} for name, row in rows.items() if name != "plain"}


def eight(size: int, runtime: str, amount: Amount) -> dict[str, Any]:
    """Eight tasks in one batch of eight."""
    backbone, graph = on(size)
    return batch_of_eight(backbone, graph, drawn, runtime, threads=THREADS, rounds=amount.costly(size))


def many(size: int, runtime: str, amount: Amount) -> dict[str, Any]:
    """Fifty tasks in memory."""
    backbone, graph = on(size)
    return many_in_memory(
        backbone, graph, drawn, runtime, threads=THREADS, tasks=amount.many, resident=resident
    )  # fmt: skip


CELLS: dict[str, Callable[[int, str, Amount], dict[str, Any]]] = {
    "latency": latency, "memory": memory, "ten": ten, "eight": eight, "many": many, "adapters": adapters,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- what is timed


def on(size: int) -> tuple[Backbone, BaseGraph]:
    """The ViT-S at one image size, and its graph."""
    from edgepet.exporters.trace import base_graph
    from edgepet.networks.loading import load_backbone

    backbone = load_backbone("demo:vit-small", image_size=size)
    return backbone, base_graph(backbone)


def drawn(backbone: Backbone, method: Method, seed: int) -> Delta:
    """A task of ten classes whose numbers are drawn from a normal distribution about the method's start."""
    from edgepet.deltas.delta import Score
    from edgepet.tuning.model import TunedModel, extract

    model, rng = TunedModel(backbone, method, 10), np.random.default_rng(seed)
    moved = {key: rng.normal(array, 0.02).astype(np.float32) for key, array in model.arrays().items()}
    model.load(moved, model.head())
    labels = tuple(str(number) for number in range(10))
    return extract(model, backbone, task=f"drawn{seed}", labels=labels, val=Score(top1=0.0, n=0))


def bound_to(fitted: Fitted, runtime: str) -> BoundPart:
    """A fitted task on a network of its own."""
    row = shared_runtime(runtime, purpose="a benchmark")
    return opened(row, fitted.part, fitted.tensors, THREADS).bind(fitted.slots)


def exported(backbone: Backbone, delta: Delta, folder: Path, runtime: str) -> Callable[[], Runner]:
    """What opens the exported fp32 file of a task."""
    from edgepet import export, write_pack
    from edgepet.device.artifact import open_artifact, read_artifact
    from edgepet.exporters.exporter import ExportOptions

    write_pack(folder / "task.pet", delta)
    options = ExportOptions(to=(RUNTIMES[runtime].format,))
    report = export([folder / "task.pet"], folder / "out", backbone=backbone, options=options)
    place = Path(report.artifacts[0].path)
    return lambda: open_artifact(place, read_artifact(place), threads=THREADS)


def timed(
    forms: Mapping[str, Callable[[], Any]], images: NpArray, runtime: str, amount: Amount
) -> dict[str, dict[str, float]]:
    """Milliseconds of each, in turns, and over those of "plain"."""
    candidates = [Candidate(model=n, runtime=runtime, precision="fp32", mode=n, open=o) for n, o in forms.items()]
    report = measure(candidates, images, threads=THREADS, rounds=amount.rounds)
    rows = {row.model: row for row in report.rows}
    return {
        name: {
            "over_plain": ratio(report, row, rows["plain"]).median,
            "p50_ms": row.p50_ms,
            "open_ms": row.open_ms,
            "first_ms": row.first_ms,
        }
        for name, row in rows.items()
    }


def changing(
    graph: BaseGraph, backbone: Backbone, method: Method, form: Any, runtime: str, images: NpArray, amount: Amount
) -> float:
    """Milliseconds from one task to another: in slots what a call costs more, merged folding and opening."""
    deltas = [drawn(backbone, method, seed) for seed in range(2)]
    if form == "merged":
        began = time.perf_counter()
        bound_to(fit(graph, deltas[1], form), runtime).close()
        return 1e3 * (time.perf_counter() - began)
    fitted = [fit(graph, delta, form) for delta in deltas]
    network = opened(shared_runtime(runtime, purpose="a benchmark"), fitted[0].part, {}, THREADS)
    return switching_ms([network.bind(each.slots) for each in fitted], images, 4 * amount.rounds)


def median_ms(call: Callable[[], object], amount: Amount) -> float:
    """The median of some calls."""
    times = []
    for _ in range(max(3, amount.rounds // 4)):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


def noise(size: int) -> NpArray:
    """One preprocessed image."""
    return np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)


# --------------------------------------------------------------------------------------------------------------- pages


def serving_tables(results: Mapping[str, Any]) -> str:
    """Both tables, where there is a result."""
    if "serving" not in results:
        return ""
    result, rows = results["serving"], []
    for cell in result["cells"]:
        where = f"{cell['runtime']}, {cell['image_size']} px"
        rows += [row_of(where, form, found) for form, found in cell["forms"].items()]
    smallest = min(cell["image_size"] for cell in result["cells"])
    rows += [row_of(f"{smallest} px", form, found) for form, found in result["adapters"].items()]
    numbers = ("ms", "of plain", "open ms", "first ms", "switch ms")
    forms = [found for cell in result["cells"] for found in cell["forms"].values()]
    most = max(len(found.get("ratios_of_runs", ())) for found in forms) or result["runs"]
    columns = (Column("where"), Column("form"), *(Column(name, right=True) for name in numbers))
    told = (
        f"demo:vit-small, batch 1, {result['threads']} thread; ratios are medians of {most} processes of"
        f" {result['rounds']} interleaved rounds, milliseconds of the last {result['runs']}."
        " `plain` is the backbone with a head; PEFT is over torch's own. A"
        " switch is in slots what a call costs more behind another task's, merged folding and opening."
    )
    many = memory_table(result["cells"], result.get("many", 0))
    return (
        f"{markdown(Table('One task, kept open', columns, rows))}\n{told}\n\n"
        f"{batch_table(result['cells'])}{many}{one_image_table(result, list(TEN))} {source(result)}\n"
    )


def row_of(where: str, form: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """One form's cells."""
    switch = f"{found['switch_ms']:.2f}" if "switch_ms" in found else ""
    times = (f"{found['p50_ms']:.1f}", f"{found['over_plain']['median']:.2f}", f"{found['open_ms']:.0f}")
    return (where, form, *times, f"{found['first_ms']:.0f}", switch)


if __name__ == "__main__":
    main()
