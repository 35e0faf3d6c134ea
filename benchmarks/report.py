"""Write the committed results as tables into README.md, between its two marks: `python benchmarks/report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgepet.report import Column, Table, format_bytes, format_number, format_percent, markdown

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
HALF_LIMIT = 2e-2  # of the largest logit: edgepet.parity.STORED["fp16"]
BACKBONES = ("vit-small", "efficientnet-lite0")
BEGIN, END = "<!-- results: made by benchmarks/report.py -->", "<!-- end of results -->"


def main() -> None:
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}")


def tables() -> str:
    """All tables, each with the command that made its numbers and the machine that they hold for."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}
    parts = [
        *(accuracy(results[f"accuracy-{name}"]) for name in BACKBONES),
        *(latency(results[f"latency-{name}"]) for name in BACKBONES),
        half(results["half"]),
        speed(results["training"], results["export"]),
    ]
    return "\n".join(parts)


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


def source(result: dict[str, Any]) -> str:
    here = result["environment"]
    versions = ", ".join(
        f"{name} {here['versions'][name]}" for name in ("torch", "onnxruntime", "openvino") if name in here["versions"]
    )
    return f"`{result['command']}` on {here['cpu']} ({here['cores']} cores), {versions}, {here['date']}."


if __name__ == "__main__":
    main()
