"""Write the committed results as tables between two marks: ``python benchmarks/report.py``.

README.md gets accuracy, latency, storage and speed, docs/guide/methods.md what was measured of every method,
docs/guide/int8.md what int8 costs, docs/guide/packs.md what codecs do, docs/guide/masks.md, boxes.md and text.md what
heads are worth, docs/guide/on-the-device.md what a store costs, and docs/guide/train-export-measure.md what others
reach. With ``--quick`` copies of these pages get them.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from boxes import box_tables
from fastest import fastest_table
from harness import HERE, RESULTS, TABLES, asked, parser_of, source
from int8_convnets import convnet_table
from masks import mask_table
from packs import pack_tables
from peers import peer_tables
from robustness import robustness_table
from serving import serving_tables
from storage import storage_table
from store import store_table
from trial_pages import trial_tables
from words import word_tables

from edgepet.reports.tables import Column, Table, format_bytes, format_number, format_percent, markdown

GUIDE = HERE.parent / "docs" / "guide"
README = HERE.parent / "README.md"
METHODS, INT8, PACKS, MASKS, BOXES, TEXT, DEVICE, TRAIN = (
    GUIDE / f"{name}.md"
    for name in ("methods", "int8", "packs", "masks", "boxes", "text", "on-the-device", "train-export-measure")
)
FP32_LIMIT = 1e-4  # edgepet.measuring.parity.STORED["fp32"]
HALF_LIMIT = 2e-2  # of the largest logit: edgepet.measuring.parity.STORED["fp16"]
BACKBONES = ("vit-small", "efficientnet-lite0")
LATER = {"fastest": fastest_table, "storage": storage_table}  # tables of README that may not be measured yet
BEGIN, END = TABLES.begin, TABLES.end


def parser() -> argparse.ArgumentParser:
    """The arguments of this report."""
    return parser_of(__doc__)


def main() -> None:
    """Write all pages."""
    run = asked(parser().parse_args())
    pages = {
        README: tables(),
        METHODS: method_tables(),
        INT8: int8_tables(),
        PACKS: pack_tables(committed()),
        MASKS: mask_table(committed()),
        BOXES: box_tables(committed()),
        TEXT: word_tables(committed()),
        TRAIN: peer_tables(committed()),
        DEVICE: "\n".join(filter(None, (store_table(committed()), serving_tables(committed())))),
    }
    for page, made in pages.items():
        TABLES.put(page, made, run.results if run.quick else None)


def tables() -> str:
    """All tables, each with the command that made its numbers and the machine that they hold for."""
    results = committed()
    parts = [
        *(accuracy(results[f"accuracy-{name}"]) for name in BACKBONES),
        *(latency(results[f"latency-{name}"]) for name in BACKBONES),
        half(results["half"]),
        *(made(results[name]) for name, made in LATER.items() if name in results),
        shared_int8(results["shared-int8"], results["int8"]),
        speed(results["training"], results["export"]),
    ]
    return "\n".join(parts)


def committed() -> dict[str, Any]:
    """All results, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def method_tables() -> str:
    """Every method on four networks, its accuracy, and what branches cost."""
    results = committed()
    result = results["methods"]
    parts = [network(title, result) for title in result["cells"]]
    parts.append(f"{source(result)} ConvNeXt and ResNet have seeded weights: no package carries trained ones.\n")
    parts += [every(results["accuracy-every"]), branches(results["branches"]), trial_tables(results)]
    return "\n".join([*parts, *(robustness_table(results[name]) for name in ("robustness",) if name in results)])


def network(title: str, result: dict[str, Any]) -> str:
    """One network: a row for each method that has a place there, and the reasons of all others."""
    facts, cells = result["networks"][title], result["cells"][title]
    rows = [
        (
            name,
            "folds" if cell["foldable"] else "branch",
            format_number(cell["parameters"]),
            format_number(cell["stored_values"]),
            format_bytes(cell["pack_bytes_fp16"]),
            *(_difference(cell[kind], limit) for kind, limit in
              (("float64", 1e-9), ("onnxruntime", FP32_LIMIT), ("openvino", FP32_LIMIT))),
            "built" if cell["tensorrt-rtx"] is True else cell["tensorrt-rtx"],
        )
        for name, cell in cells.items()
        if "reason" not in cell
    ]  # fmt: skip
    numbers = ("parameters", "values stored", "pack, fp16", "float64", "ONNX Runtime", "OpenVINO")
    columns = (Column("method"), Column(""), *(Column(name, right=True) for name in numbers), Column("TensorRT-RTX"))
    reasons: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if "reason" in cell:
            reasons.setdefault(cell["reason"], []).append(name)
    missing = "".join(f"- no {', '.join(names)}: {reason}\n" for reason, names in reasons.items())
    shown = Table(f"{title}: {facts['name']} at {facts['image_size']} px", columns, rows)
    return f"{markdown(shown)}\n{missing}"


def _difference(found: float, limit: float) -> str:
    return f"{found:.0e}" + ("" if found <= limit else ", beyond the limit") if found else "0"


def every(result: dict[str, Any]) -> str:
    """Top-1 of every method beside the linear probe on the same backbone and task."""
    by = {(row["backbone"], row["method"], row["task"]): row for row in result["rows"]}
    tasks = sorted({row["task"] for row in result["rows"]})
    rows = []
    for backbone, method in dict.fromkeys((row["backbone"], row["method"]) for row in result["rows"]):
        top1 = {task: by[backbone, method, task]["test_top1"] for task in tasks}
        gains = (100 * (top1[task] - by[backbone, "linear-probe", task]["test_top1"]) for task in tasks)
        shown = [f"{format_percent(top1[task])} ({gain:+.1f})" for task, gain in zip(tasks, gains, strict=True)]
        rows.append((backbone, method, *shown))
    n = {row["test_n"] for row in result["rows"]}.pop()
    columns = (Column("backbone"), Column("method"), *(Column(task, right=True) for task in tasks))
    shots = {row["shots"] for row in result["rows"]}.pop()
    told = f"Test top-1 of {n} images after training on {shots} of each class, and points above the linear probe."
    return f"{markdown(Table('Accuracy at defaults', columns, rows))}\n{told} One seed. {source(result)}\n"


def branches(result: dict[str, Any]) -> str:
    """Milliseconds and kilobytes of methods that fold and of methods that do not, from one run."""
    rows = [
        (
            row["method"],
            "folds" if row["foldable"] else "branch",
            format_bytes(row["pack_bytes"]),
            *(part for runtime in ("onnxruntime", "openvino") for part in _over_plain(row[runtime])),
        )
        for row in result["rows"]
    ]
    numbers = ("pack", "ONNX Runtime ms", "over plain", "OpenVINO ms", "over plain")
    columns = (Column("method"), Column(""), *(Column(name, right=True) for name in numbers))
    title = f"What branches cost, {result['backbone']} at {result['image_size']} px, fp32"
    told = f"One run of {result['rounds']} interleaved rounds, {result['threads']} threads, batch 1; p50."
    return f"{markdown(Table(title, columns, rows))}\n{told} {source(result)}\n"


def _over_plain(cell: dict[str, Any]) -> tuple[str, str]:
    ratio = cell["ratio"]
    return f"{cell['p50_ms']:.1f}", f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def accuracy(result: dict[str, Any]) -> str:
    rows = [
        (
            row["task"],
            row["method"],
            format_number(row["trainable_params"]),
            format_bytes(row["pack_bytes"]),
            format_percent(row["test_top1"]),
            format_number(row["test_n"]),
        )
        for row in result["rows"]
    ]
    numbers = (Column(name, right=True) for name in ("parameters", "pack", "test top-1", "n"))
    title = f"Accuracy at defaults, {result['backbone']['name']} at {result['image_size']} px"
    table = markdown(Table(title, (Column("task"), Column("method"), *numbers), rows))
    return f"{table}\n{source(result)} {result['backbone']['description']} One seed; compare rows of one task.\n"


def latency(result: dict[str, Any]) -> str:
    rows = [
        (
            case["method"],
            name,
            f"{r['median']:.3f}",
            f"{r['low']:.3f} to {r['high']:.3f}",
            f"{case['p50_ms'][name]:.1f}",
        )
        for case in result["cases"]
        for name, r in case["ratios"].items()
    ]
    columns = (
        Column("method"),
        Column("runtime, precision, form"),
        *(Column(name, right=True) for name in ("over the plain backbone", "95 % interval", "p50 ms")),
    )
    title = f"Latency of a task over its backbone, {result['backbone']} at {result['image_size']} px"
    rounds = f"{result['runs']} runs of {result['rounds']} interleaved rounds"
    told = f"Median of {rounds}, {result['threads']} threads, batch 1."
    return f"{markdown(Table(title, columns, rows))}\n{told} {source(result)}\n"


def half(result: dict[str, Any]) -> str:
    by = {(row["task"], row["format"], row["precision"]): row for row in result["rows"]}
    rows = [
        (
            result["backbones"][task],
            task,
            kind,
            format_bytes(by[task, kind, "fp32"]["size_bytes"]),
            format_bytes(row["size_bytes"]),
            f"{row['parity']['max_abs'] / row['parity']['limit'] * HALF_LIMIT:.1e}" if row["parity"] else "not run",
            format_percent(row["parity"]["top1_agreement"]) if row["parity"] else "not run",
        )
        for (task, kind, precision), row in by.items()
        if precision == "fp16"
    ]
    numbers = ("fp32", "fp16", "max difference / max logit", "same top-1")
    columns = (
        *(Column(name) for name in ("backbone", "task", "format")),
        *(Column(name, right=True) for name in numbers),
    )
    told = "Beside the tuned network in fp32, on held-out images; the limit is 2e-2."
    return f"{markdown(Table('fp16', columns, rows))}\n{told} {source(result)}\n"


FORMS = (  # a column of the int8 tables, and what it is called in the results
    ("fp32", "fp32 onnxruntime"),
    ("fp16", "fp16 openvino"),
    ("int8, ONNX Runtime", "int8 onnxruntime"),
    ("int8, OpenVINO", "int8 openvino"),
    ("shared, ONNX Runtime", "shared int8 onnxruntime"),
    ("shared, OpenVINO", "shared int8 openvino"),
    ("NNCF, ONNX Runtime", "nncf onnxruntime"),
    ("NNCF, OpenVINO", "nncf openvino"),
    ("quantize_static", "quantize_static onnxruntime"),
)


def int8_tables() -> str:
    """Every cell of int8, what the shared backbone costs, and what tuning on it repairs."""
    results = committed()
    result = results["int8"]
    parts = [int8_accuracy(result, backbone) for backbone in BACKBONES]
    n = " or ".join(str(n) for n in sorted({row["n"] for row in result["rows"]}))
    parts.append(
        f"Test top-1 on {n} images. Of a ViT one Q/DQ file runs on ONNX Runtime and OpenVINO, of a ConvNet each has its"
        " own; TensorRT-RTX built its file in every cell. `shared` is the same pack on the int8 backbone of all tasks."
        f" {source(result)} NNCF and `quantize_static` had the same fp32 model, batch norms folded, and the same"
        f" calibration images:\n\n{settings_of(result['neighbours'])}\n"
    )
    parts += [shared_int8(results["shared-int8"], result), repaired(results["int8-tuning"])]
    parts += [convnet_table(results[name]) for name in ("int8-convnets",) if name in results]
    return "\n".join(parts)


def settings_of(neighbours: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What others' libraries were told, by network: lines of a list."""
    return "\n".join(
        f"- {name}, {network}: " + ", ".join(f"`{key}={value}`" for key, value in settings.items())
        for network, tools in neighbours.items()
        for name, settings in tools.items()
    )


def int8_accuracy(result: dict[str, Any], backbone: str) -> str:
    found = [row for row in result["rows"] if row["backbone"] == backbone]
    rows = [(row["task"], row["method"], *(format_percent(row["top1"].get(key)) for _, key in FORMS)) for row in found]
    lost = ("mean loss, points", "", *(f"{mean_loss(found, key):.2f}" for _, key in FORMS))
    columns = (Column("task"), Column("method"), *(Column(name, right=True) for name, _ in FORMS))
    return markdown(Table(f"int8, demo:{backbone}", columns, [*rows, lost]))


def mean_loss(rows: list[dict[str, Any]], key: str) -> float:
    """Points of top-1 below fp32 of the same runtime, the mean over rows."""
    runtime = key.rpartition(" ")[2]
    lost = [row["top1"][f"fp32 {runtime}"] - row["top1"][key] for row in rows if key in row["top1"]]
    return 100 * float(sum(lost)) / len(lost)


def shared_int8(result: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """What a further task on the int8 backbone costs."""
    rows, told_of = [], {**result["backbones"]}
    for name, found in result.get("branches", {}).items():  # not in results of before there were any
        told_of[f"{name}, {found['method']}"] = found
    for name, found in told_of.items():
        of = [row for row in accuracy["rows"] if (row["backbone"], row["method"]) == (name, "ssf")]
        for runtime, cell in found["latency"].items():
            ratios = cell["ratios"]
            lost = mean_loss(of, f"shared int8 {runtime}") - mean_loss(of, f"int8 {runtime}") if of else None
            rows.append(
                (
                    f"{name}, {runtime}",
                    f"{cell['p50_ms']['fp32']:.1f}",
                    f"{cell['p50_ms']['own']:.1f}",
                    f"{cell['p50_ms']['shared']:.1f}",
                    f"{ratios['shared / own']['median']:.2f}",
                    f"{ratios['shared / fp32']['median']:.2f}",
                    f"{1000 * max(0.0, cell['switch_ms']):.0f} µs",
                    format_bytes(round(found["memory"][runtime]["further_bytes"])),
                    "–" if lost is None else f"{lost:+.2f}",
                )
            )
    numbers = (
        "fp32 ms",
        "own int8 ms",
        "shared ms",
        "shared / own",
        "shared / fp32",
        "switch",
        "memory a task",
        "points below own",
    )
    columns = (Column("backbone, runtime"), *(Column(name, right=True) for name in numbers))
    shown = markdown(Table("One int8 backbone for all tasks, SSF", columns, rows))
    told = [
        f"{name}: codes {format_bytes(found['codes_bytes'])} for {format_bytes(found['fp32_bytes'])} in fp32,"
        f" packs up to {format_bytes(max(found['pack_bytes'].values()))}."
        for name, found in result["backbones"].items()
    ]
    rounds = f"Median of {result['runs']} runs of {result['rounds']} interleaved rounds"
    told.append(f"{rounds}, {result['threads']} threads, batch 1. {source(result)}")
    return f"{shown}\n{' '.join(told)}\n"


def repaired(result: dict[str, Any]) -> str:
    """What tuning on the quantised backbone gives back."""
    rows = [
        (
            row["backbone"], row["task"], row["bits"], format_percent(row["fp32"]), format_percent(row["after"]),
            format_percent(row["tuned"]), f"{100 * row['recovered']:.0f} %",
        )
        for row in result["rows"]
    ]  # fmt: skip
    numbers = ("fp32", "tuned in fp32, then rounded", "tuned on the codes", "of the loss recovered")
    columns = (Column("backbone"), Column("task"), Column("weights"), *(Column(name, right=True) for name in numbers))
    told = f"Test top-1 of SSF on {result['n']} images, weights and activations rounded, by ONNX Runtime."
    return f"{markdown(Table('Tuning on the quantised backbone', columns, rows))}\n{told} {source(result)}\n"


def speed(training: dict[str, Any], export: dict[str, Any]) -> str:
    lines = [
        f"- LoRA training, {name.replace('over', '÷')}: {r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
        for name, r in training["ratios"].items()
    ]
    lines.append(
        f"- exporting the second task to fp32 ONNX: {export['median_seconds']:.2f} s to fold and write"
        f" {format_bytes(export['size_bytes'])}; tracing the backbone took {export['trace_seconds']:.1f} s, once"
    )
    return "\n".join(["**Speed**", "", *lines, "", f"{source(training)} {source(export)}", ""])


if __name__ == "__main__":
    main()
