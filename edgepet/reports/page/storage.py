"""Bytes on disk as tasks grow: full copies, merged files, and one backbone with packs, in fp32 and in int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgepet.reports.page.accuracy import METHOD, backbones
from edgepet.reports.page.parts import Figure, Line, Lines, Part, Section, Text, missing
from edgepet.reports.page.results import Results, mean
from edgepet.reports.tables import Table, format_bytes, format_names, format_ratio, left, right
from edgepet.strict import ObjectReader

COUNTS = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of keeping tasks: ``shared`` bytes once, and mean ``each`` bytes of a task; ``made`` says of what."""

    name: str
    shared: float
    each: float
    made: str

    def bytes_of(self, tasks: int) -> float:
        """Of so many tasks."""
        return self.shared + tasks * self.each


def section(results: Results) -> Section:
    """A chart for each backbone of shared-int8.json, and the folders that ``edgepet storage`` has counted."""
    parts = [*_grown(results), *_counted(results)]
    lacks = []
    if not any(isinstance(part, Figure) for part in parts):
        lacks.append("shared-int8, int8 and accuracy-*: bytes of backbones, files and packs")
        parts.append(missing("Storage as tasks grow", "benchmarks/shared_int8.py, int8.py and accuracy.py write it."))
    if not any(isinstance(part, Table) for part in parts):
        lacks.append("what `edgepet storage --json` prints: bytes of a folder from which tasks were run")
        parts.append(missing("A device's whole folder, caches too", "`edgepet storage TASK.pet… --json` counts one."))
    told = Text(
        "Bytes on disk, SSF. Sizes are those of the results; beyond as many tasks as they have, dashed, each further"
        " task takes the mean of those. Derived caches and the fp32 graph are not in these results."
    )
    return Section(key="storage", title="Storage as tasks grow", parts=(told, *parts), lacks=tuple(lacks))


def _grown(results: Results) -> Iterator[Figure]:
    shared, single = results.get("shared-int8"), results.get("int8")
    if shared is None or single is None:
        return
    nets = shared.table.nested("backbones")
    for backbone in nets.names():
        sizes = nets.nested(backbone)
        files = [row for row in single.rows() if (row.text("backbone"), row.text("method")) == (backbone, METHOD)]
        packs = _packs(results, f"demo:{backbone}")
        if files and packs:
            yield _figure(backbone, _ways(sizes, files, packs), measured=len(files))


def _packs(results: Results, backbone: str) -> list[int]:
    """Bytes of fp32's packs of a backbone, of the result that has most of them."""
    found = [
        [row.integer("pack_bytes") for row in rows if row.text("method") == METHOD]
        for result in results.with_rows("method", "task", "test_top1", "pack_bytes")
        for name, rows in backbones(result).items()
        if name == backbone
    ]
    return max(found, key=len, default=[])


def _ways(sizes: ObjectReader, files: Sequence[ObjectReader], packs: Sequence[int]) -> tuple[Way, ...]:
    fp32, merged = sizes.integer("fp32_bytes"), [row.nested("size_bytes").integer("fp32") for row in files]
    int8 = [row.nested("size_bytes").integer("int8") for row in files]
    codes, graph, own = sizes.integer("codes_bytes"), sizes.integer("graph_bytes"), sizes.nested("pack_bytes")
    ranged = [own.integer(task) for task in own.names()]
    made = "{} of {} tasks, {} on average"
    return (
        Way(name="full copies, fp32", shared=0, each=fp32, made=f"the backbone's weights, {format_bytes(fp32)}, each"),
        Way(name="merged files, fp32", shared=0, each=mean(merged),
            made=made.format("ONNX files", len(merged), format_bytes(round(mean(merged))))),
        Way(name="merged files, int8", shared=0, each=mean(int8),
            made=made.format("ONNX files", len(int8), format_bytes(round(mean(int8))))),
        Way(name="fp32 backbone + packs", shared=fp32, each=mean(packs),
            made=f"{format_bytes(fp32)} once; " + made.format("packs", len(packs), format_bytes(round(mean(packs))))),
        Way(name="int8 backbone + packs", shared=codes + graph, each=mean(ranged),
            made=f"codes {format_bytes(codes)} and graphs {format_bytes(graph)} once; "
            + made.format("packs", len(ranged), format_bytes(round(mean(ranged))))),
    )  # fmt: skip


def _figure(backbone: str, ways: Sequence[Way], measured: int) -> Figure:
    lines = tuple(
        Line(
            name=way.name,
            ys=tuple(way.bytes_of(n) / 1e6 for n in COUNTS),
            told=tuple(f"{way.name}, {_tasks(n)}: {format_bytes(round(way.bytes_of(n)))}" for n in COUNTS),
        )
        for way in ways
    )
    full, best = ways[0], ways[-1]
    told = (
        f"{best.name} of ten tasks take {format_bytes(round(best.bytes_of(10)))}, full copies"
        f" {format_ratio(full.bytes_of(10) / best.bytes_of(10))} that; of fifty"
        f" {format_bytes(round(best.bytes_of(50)))}, full copies {format_ratio(full.bytes_of(50) / best.bytes_of(50))}."
        f" Sizes of {measured} tasks are measured."
    )
    chart = Lines(x="tasks", y="megabytes", xs=tuple(map(float, COUNTS)), lines=lines, measured=measured)
    rows = [(way.name, *(format_bytes(round(way.bytes_of(n))) for n in COUNTS), way.made) for way in ways]
    rows.append((
        "full copies / int8 backbone + packs", *(format_ratio(full.bytes_of(n) / best.bytes_of(n)) for n in COUNTS), ""
    ))  # fmt: skip
    columns = (*left("kept as"), *right(*map(_tasks, COUNTS)), *left("of"))
    return Figure(
        title=f"demo:{backbone}", told=told, chart=chart, table=Table(f"demo:{backbone}, bytes", columns, rows)
    )


def _tasks(n: int) -> str:
    return "1 task" if n == 1 else f"{n} tasks"


def _counted(results: Results) -> list[Part]:
    """A row for each document of ``edgepet storage --json``."""
    found = results.having("backbone_bytes", "graph_bytes", "cache_bytes", "shared_total_bytes", "full_total_bytes")
    if not found:
        return []
    rows = []
    for result in found:
        table = result.table
        tasks = table.nested_list("tasks")
        total, full = table.integer("shared_total_bytes"), table.integer("full_total_bytes")
        rows.append(
            (
                result.name,
                table.text("precision"),
                str(len(tasks)),
                format_names(sorted({task.text("method") for task in tasks})),
                *(format_bytes(table.integer(f"{what}_bytes")) for what in ("backbone", "graph", "cache")),
                format_bytes(sum(task.integer("pack_bytes") for task in tasks)),
                format_bytes(total),
                format_bytes(full),
                format_ratio(full / total),
            )
        )
    numbers = ("tasks", "backbone", "graphs", "caches", "packs", "the whole folder", "models of their own", "saves")
    columns = (*left("result", "precision"), *right(numbers[0]), *left("methods"), *right(*numbers[1:]))
    return [Table("Folders that tasks were run from, all files counted", columns, rows)]
