"""Latency: a task over its backbone in every runtime and precision, and percentiles where they were kept."""

from __future__ import annotations

from collections.abc import Iterator

from edgepet.reports.page.parts import RUNTIMES, Figure, Part, Range, Ranges, Section, Text, missing
from edgepet.reports.page.results import Result, Results
from edgepet.reports.tables import Column, Table, format_ms, left, right


def section(results: Results) -> Section:
    """Ratios of runs of latency-*.json, and p50 to p99 of whatever ``edgepet bench --json`` has printed."""
    ratios = [figure for result in results.having("cases", "image_size", "runs") for figure in _ratios(result)]
    rows = results.with_rows("model", "runtime", "precision", "mode", "threads", "p50_ms", "p90_ms", "p99_ms")
    percentiles = [_percentiles(result) for result in rows]
    lacks = [] if ratios else ["latency-*: ratios of runs"]
    parts: list[Part] = [
        Text(
            "A point is a median over runs, each a process of its own; small dots are the runs, the bar is the 95 %"
            " interval. Ratios are of one run and hold better than milliseconds do."
        ),
        *ratios,
    ]
    if not ratios:
        parts.append(missing("Latency of a task over its backbone", "benchmarks/latency.py measures it."))
    parts += percentiles
    if not percentiles:
        lacks.append("what `edgepet bench --json` prints: p50, p90 and p99")
        how = "The results of benchmarks/latency.py keep medians; `edgepet bench MODEL… --json` prints percentiles."
        parts.append(missing("p90 and p99", how))
    return Section(key="latency", title="Latency", parts=tuple(parts), lacks=tuple(lacks))


def _ratios(result: Result) -> Iterator[Figure]:
    table = result.table
    where = f"{table.text('backbone')} at {table.integer('image_size')} px, {table.integer('threads')} threads, batch 1"
    for case in table.nested_list("cases"):
        method, ratios, p50 = case.text("method"), case.nested("ratios"), case.nested("p50_ms")
        rows, cells = [], []
        for name in ratios.names():
            each = ratios.nested(name)
            value, low, high = (each.number(key) for key in ("median", "low", "high"))
            runs = case.nested("ratios_of_runs")
            dots = runs.numbers(name, count=table.integer("runs")) if case.has("ratios_of_runs") else ()
            told = f"{name}: {value:.3f} ({low:.3f} to {high:.3f}), p50 {format_ms(p50.number(name))}"
            rows.append(Range(label=name, group=name.split()[0], value=value, low=low, high=high, dots=dots, told=told))
            cells.append(
                (name, f"{value:.3f}", f"{low:.3f} to {high:.3f}", ", ".join(f"{dot:.3f}" for dot in dots),
                 format_ms(p50.number(name)))
            )  # fmt: skip
        cells += [(name, "1", "", "", format_ms(p50.number(name))) for name in p50.names() if not ratios.has(name)]
        tuned = max(rows, key=lambda row: row.value)
        merged = max((row for row in rows if "merged" in row.label), key=lambda row: row.value, default=tuned)
        columns = (Column("runtime, precision, form"), *right("over plain", "95 %", "runs", "p50"))
        yield Figure(
            title=f"{method} on {table.text('backbone')}",
            told=f"{where}. The dearest merged form is {merged.label}, {merged.value:.3f}; of all {tuned.label},"
            f" {tuned.value:.3f}.",
            chart=Ranges(x="p50 / p50 of the plain backbone", rows=tuple(rows), groups=RUNTIMES, reference=1.0),
            table=Table(f"{method}, {where}", columns, cells),
        )


def _percentiles(result: Result) -> Figure:
    rows, cells = [], []
    for row in result.rows():
        p50, p90 = row.number("p50_ms"), row.number("p90_ms")
        p99 = None if row.absent("p99_ms") else row.number("p99_ms")
        noisy = row.has("noisy") and row.boolean("noisy")
        form = f"{row.text('runtime')} {row.text('precision')} {row.text('mode')}"
        label = f"{row.text('model')}, {form}, {row.integer('threads')} threads"
        told = f"{label}: p50 {format_ms(p50)}, p90 {format_ms(p90)}, p99 {format_ms(p99)}"
        rows.append(
            Range(label=label, group=row.text("runtime"), value=p50, low=p50, high=p90 if p99 is None else p99,
                  dots=(p90,), told=told)
        )  # fmt: skip
        cells.append(
            (row.text("model"), form, str(row.integer("threads")), str(row.integer("batch")), format_ms(p50),
             format_ms(p90), format_ms(p99), str(row.integer("n")), "noisy" if noisy else "")
        )  # fmt: skip
    fastest = min(rows, key=lambda row: row.value)
    columns = (
        *left("model", "runtime, precision, mode"), *right("threads", "batch", "p50", "p90", "p99", "n"), *left("note"),
    )  # fmt: skip
    return Figure(
        title=f"Percentiles: {result.name}",
        told=f"From p50, the marker, over p90, the dot, to p99. The fastest is {fastest.told}.",
        chart=Ranges(x="milliseconds", rows=tuple(rows), groups=RUNTIMES),
        table=Table(f"{result.name}.json, milliseconds", columns, cells),
    )
