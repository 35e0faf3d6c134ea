"""Many tasks on one image, and what a task costs that is kept open beside others."""

from __future__ import annotations

from collections.abc import Iterator

from edgepet.reports.page.parts import RUNTIMES, Figure, Part, Range, Ranges, Section, Text, missing
from edgepet.reports.page.results import Result, Results
from edgepet.reports.tables import Column, Table, format_bytes, format_ms, left, right
from edgepet.strict import ObjectReader


def section(results: Results) -> Section:
    """Of serving.json: all tasks on one image over as many calls, and every form over the plain backbone."""
    found = results.get("serving")
    if found is None:
        part = missing("Many tasks on one image", "benchmarks/serving.py measures it.")
        return Section(key="together", title="Many tasks on one image", parts=(part,), lacks=("serving",))
    return Section(key="together", title="Many tasks on one image", parts=tuple(_parts(found)))


def _parts(result: Result) -> Iterator[Part]:
    table, tasks = result.table, result.table.integer("tasks")
    cells = table.nested_list("cells")
    yield Text(
        f"{tasks} tasks that change a backbone only from some block on share what lies before it. The time of one call"
        f" for all is given over that of {tasks} calls: {1 / tasks:g} would be all for the price of one. Medians of"
        f" {table.integer('runs')} runs, one thread."
    )
    yield _shared(result, cells, tasks)
    yield _forms(result, cells)
    yield _costs(cells)


def _where(cell: ObjectReader) -> str:
    return f"{cell.text('runtime')}, {cell.integer('image_size')} px"


def _shared(result: Result, cells: list[ObjectReader], tasks: int) -> Figure:
    rows = [
        _range(f"{name}, {_where(cell)}", cell.text("runtime"), cell.nested("ten").nested(name))
        for name in sorted(cells[0].nested("ten").names())
        for cell in cells
    ]
    best = min(rows, key=lambda row: row.value)
    told = f"Least for {best.label}: {best.value:.2f} of the time of {tasks} calls. The bars are over runs."
    return Figure(
        title=f"{tasks} tasks at once, over {tasks} calls",
        told=told,
        chart=Ranges(
            x=f"time of one call for {tasks} tasks / time of {tasks} calls", rows=tuple(rows), groups=RUNTIMES
        ),
        table=_numbers(f"{tasks} tasks on one image, {result.name}.json", rows),
    )


def _forms(result: Result, cells: list[ObjectReader]) -> Figure:
    rows = [
        _range(f"{name}, {_where(cell)}", cell.text("runtime"), cell.nested("forms").nested(name).nested("over_plain"))
        for cell in cells
        for name in cell.nested("forms").names()
        if name != "plain"
    ]
    worst = max(rows, key=lambda row: row.value)
    return Figure(
        title="One task open, over the plain backbone",
        told=f"Most for {worst.label}: {worst.value:.3f}. The dashed line is the backbone without a task.",
        chart=Ranges(x="p50 / p50 of the plain backbone", rows=tuple(rows), groups=RUNTIMES, reference=1.0),
        table=_numbers(f"forms of a task, {result.name}.json", rows),
    )


def _range(label: str, group: str, ratio: ObjectReader) -> Range:
    value, low, high = (ratio.number(name) for name in ("median", "low", "high"))
    return Range(
        label=label,
        group=group,
        value=value,
        low=low,
        high=high,
        told=f"{label}: {value:.3f} ({low:.3f} to {high:.3f})",
    )


def _numbers(title: str, rows: list[Range]) -> Table:
    cells = [(row.label, f"{row.value:.3f}", f"{row.low:.3f} to {row.high:.3f}") for row in rows]
    return Table(title, (Column("what"), *right("median", "95 %")), cells)


def _costs(cells: list[ObjectReader]) -> Table:
    """Milliseconds to open, answer first and switch, and bytes of memory."""
    rows = []
    for cell in cells:
        memory = cell.nested("memory")
        for name in cell.nested("forms").names():
            form = cell.nested("forms").nested(name)
            slots = name.endswith("in slots")
            rows.append(
                (
                    _where(cell),
                    name,
                    *(format_ms(form.number(f"{what}_ms")) for what in ("p50", "open", "first")),
                    format_ms(max(0.0, form.number("switch_ms"))) if form.has("switch_ms") else "–",
                    format_bytes(round(memory.number("further_bytes"))) if slots else "–",
                )
            )
    columns = (
        *left("where", "form"),
        *right("p50", "to open", "first answer", "to switch", "memory of a further task"),
    )
    return Table("What open tasks cost", columns, rows)
