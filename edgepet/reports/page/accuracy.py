"""Accuracy against what it costs: kilobytes that a task ships, and milliseconds that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgepet.reports.page.parts import (
    MISSING,
    RUNTIMES,
    Figure,
    Folded,
    Part,
    Point,
    Scatter,
    Section,
    Text,
    fronts,
    missing,
)
from edgepet.reports.page.results import Result, Results, mean
from edgepet.reports.tables import Table, format_bytes, format_ms, format_percent, left, right
from edgepet.strict import ObjectReader

KINDS = ("folds", "branch", "probe, full", "not said")
PROBES = ("linear-probe", "full")  # tune no backbone, or all of it: what methods are compared with
FEWEST = 3  # points that a chart is drawn for
GAIN = "mean test top-1, %"
Z = 1.96  # of a normal distribution: 95 % lie within


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A method on one backbone: mean top-1 over tasks, of seeds too, and mean bytes of a pack.

    ``half`` is half the 95 % interval that test images allow, None where their number is not said.
    """

    method: str
    tasks: tuple[str, ...]
    top1: float
    half: float | None
    pack_bytes: float
    rows: int


def kilobytes(results: Results) -> Section:
    """A chart for each result with rows of method, task, test_top1 and pack_bytes, and each backbone in it."""
    found = results.with_rows("method", "task", "test_top1", "pack_bytes")
    kinds = kinds_of(results)
    parts: list[Part] = []
    for result in found:
        for backbone, rows in backbones(result).items():
            found_here = scored(rows)
            figure = _figure(result, backbone, found_here, kinds)
            parts.append(Folded(figure.table) if len(_whole(found_here)) < FEWEST else figure)
    how = "benchmarks/accuracy.py writes them."
    lacks = () if found else ("accuracy-*: test_top1 and pack_bytes of methods",)
    if not found:
        parts.append(missing("Accuracy of methods", how))
    told = Text(
        "A task is a pack of kilobytes on a backbone that all tasks share. A point is a method, the mean over tasks; on"
        " the dashed line are those that no other beats in both. Compare points of one chart: charts differ in images"
        " and epochs."
    )
    return Section(key="kilobytes", title="Accuracy against kilobytes", parts=(told, *parts), lacks=lacks)


def kinds_of(results: Results) -> dict[str, str]:
    """Whether each method folds into dense weights or stays a branch, as far as results say it."""
    kinds: dict[str, str] = {}
    methods = results.get("methods")
    if methods is not None:
        cells = methods.table.nested("cells")
        for network in cells.names():
            table = cells.nested(network)
            for name in table.names():
                cell = table.nested(name)
                if cell.has("foldable"):
                    kinds[name] = "folds" if cell.boolean("foldable") else "branch"
    return kinds | dict.fromkeys(PROBES, KINDS[2])


def backbones(result: Result) -> dict[str, list[ObjectReader]]:
    """The rows of every backbone; one that rows do not name is the result's own."""
    own = result.table.nested("backbone").text("name") if isinstance(result.facts.get("backbone"), dict) else "backbone"
    found: dict[str, list[ObjectReader]] = {}
    for row in result.rows():
        found.setdefault(row.text("backbone") if row.has("backbone") else own, []).append(row)
    return found


def scored(rows: Sequence[ObjectReader]) -> list[Scored]:
    """Every method, most accurate first; those that were judged on fewer tasks than others are last."""
    by: dict[str, dict[str, list[ObjectReader]]] = {}
    for row in rows:
        by.setdefault(row.text("method"), {}).setdefault(row.text("task"), []).append(row)
    most = max(len(tasks) for tasks in by.values())
    made = [_scored(method, tasks) for method, tasks in by.items()]
    return sorted(made, key=lambda each: (len(each.tasks) < most, -each.top1, each.method))


def _scored(method: str, tasks: Mapping[str, Sequence[ObjectReader]]) -> Scored:
    top1 = {task: mean([row.number("test_top1") for row in rows]) for task, rows in tasks.items()}
    counts = {task: rows[0].integer("test_n", least=1) for task, rows in tasks.items() if rows[0].has("test_n")}
    half = None
    if len(counts) == len(top1):
        spread = [top1[task] * (1 - top1[task]) / counts[task] for task in top1]
        half = Z * math.sqrt(math.fsum(spread)) / len(spread)
    return Scored(
        method=method,
        tasks=tuple(sorted(tasks)),
        top1=mean(list(top1.values())),
        half=half,
        pack_bytes=mean([row.number("pack_bytes") for rows in tasks.values() for row in rows]),
        rows=sum(map(len, tasks.values())),
    )


def _whole(found: Sequence[Scored]) -> list[Scored]:
    """Those that were judged on all tasks: the others' means are not to be compared."""
    return [each for each in found if len(each.tasks) == len(found[0].tasks)]


def _figure(result: Result, backbone: str, found: Sequence[Scored], kinds: Mapping[str, str]) -> Figure:
    whole = _whole(found)
    best = dict(zip(whole, fronts([(each.pack_bytes, each.top1) for each in whole]), strict=True))
    points = tuple(
        Point(
            x=each.pack_bytes / 1000,
            y=100 * each.top1,
            label=each.method,
            told=_told(each),
            group=kinds.get(each.method, KINDS[3]),
            front=best[each],
        )
        for each in whole
    )
    front = sorted((each for each in whole if best[each]), key=lambda each: each.pack_bytes)
    tasks = ", ".join(found[0].tasks)
    told = (
        f"{len(whole)} methods, mean test top-1 over {tasks}. From few bytes to many, the front is"
        f" {', '.join(map(_told, front))}.{_allowed(whole)}{_left_out(found, whole)}"
    )
    chart = Scatter(x="kilobytes of a pack, head included", y=GAIN, points=points, groups=KINDS)
    return Figure(
        title=f"{backbone}, {result.name}.json", told=told, chart=chart, table=_table(result, backbone, found, best)
    )


def _told(each: Scored) -> str:
    return f"{each.method} ({format_percent(each.top1)}, {format_bytes(round(each.pack_bytes))})"


def _allowed(found: Sequence[Scored]) -> str:
    """How far chance may move a point, for the images of the test splits are few."""
    halves = sorted(each.half for each in found if each.half is not None)
    return (
        f" Test images leave each uncertain by about ± {100 * halves[len(halves) // 2]:.1f} points." if halves else ""
    )


def _left_out(found: Sequence[Scored], whole: Sequence[Scored]) -> str:
    names = [f"{each.method} ({', '.join(each.tasks)})" for each in found if each not in whole]
    return f" Not drawn, for they were not judged on all of these: {', '.join(names)}." if names else ""


def _table(result: Result, backbone: str, found: Sequence[Scored], best: Mapping[Scored, bool]) -> Table:
    rows = [
        (
            each.method,
            ", ".join(each.tasks),
            format_percent(each.top1),
            "–" if each.half is None else f"± {100 * each.half:.1f}",
            format_bytes(round(each.pack_bytes)),
            str(each.rows),
            "yes" if best.get(each) else "",
        )
        for each in found
    ]
    columns = (
        *left("method", "tasks"),
        *right("mean top-1", "95 %, of images", "pack", "trainings"),
        *left("on the front"),
    )
    return Table(f"{backbone}, {result.name}.json", columns, rows)


# ------------------------------------------------------------------------------------------------------- milliseconds


def milliseconds(results: Results) -> Section:
    """Methods that branches.json has timed, and precisions that int8.json has judged and shared-int8.json timed."""
    methods, precisions = list(_timed_methods(results)), list(_timed_precisions(results))
    parts, lacks = [*methods, *precisions], list[str]()
    if not methods:
        lacks.append("branches and accuracy-* of one backbone: milliseconds of methods")
        parts.append(missing("Milliseconds of methods", "benchmarks/branches.py writes them."))
    if not precisions:
        lacks.append("int8 and shared-int8: accuracy and milliseconds of precisions")
        parts.append(missing("Milliseconds of precisions", "benchmarks/int8.py and shared_int8.py write them."))
    told = Text("Accuracy and time are from two results, as each caption says; times hold for their machine alone.")
    return Section(key="milliseconds", title="Accuracy against milliseconds", parts=(told, *parts), lacks=tuple(lacks))


def _timed_methods(results: Results) -> Iterator[Part]:
    timed = results.get("branches")
    if timed is None:
        return
    name = timed.table.text("backbone")
    rows = timed.rows()
    for result in results.with_rows("method", "task", "test_top1", "pack_bytes"):
        found = backbones(result).get(name)
        whole = {each.method: each for each in _whole(scored(found))} if found and result.name != timed.name else {}
        joined = [(row, whole[row.text("method")]) for row in rows if row.text("method") in whole]
        if len(joined) < FEWEST:
            continue
        for runtime in ("onnxruntime", "openvino"):
            yield _methods_figure(
                timed, result, runtime, joined, [m for m in whole if m not in {e.method for _, e in joined}]
            )


def _methods_figure(
    timed: Result, judged: Result, runtime: str, joined: Sequence[tuple[ObjectReader, Scored]], without: Sequence[str]
) -> Figure:
    times = [row.nested(runtime).number("p50_ms") for row, _ in joined]
    best = fronts([(ms, each.top1) for ms, (_, each) in zip(times, joined, strict=True)])
    plain = joined[0][0].nested(runtime).number("p50_ms") / joined[0][0].nested(runtime).nested("ratio").number(
        "median"
    )
    points = tuple(
        Point(x=ms, y=100 * each.top1, label=each.method, group="folds" if row.boolean("foldable") else "branch",
              told=f"{each.method}: {format_percent(each.top1)}, {format_ms(ms)}", front=front)
        for ms, front, (row, each) in zip(times, best, joined, strict=True)
    )  # fmt: skip
    table = timed.table
    size, threads = table.integer("image_size"), table.integer("threads")
    where = f"{table.text('backbone')} at {size} px, {runtime}, fp32, {threads} threads"
    names = [point.label for point in sorted(points, key=lambda point: point.x) if point.front]
    told = (
        f"{where}. Top-1 is of {judged.name}.json, p50 of {timed.name}.json, where the plain backbone took about"
        f" {format_ms(plain)}. From fast to slow the front is {', '.join(names)}."
    )
    rows = [
        (each.method, "folds" if row.boolean("foldable") else "branch", format_percent(each.top1), format_ms(ms),
         f"{row.nested(runtime).nested('ratio').number('median'):.2f}", "yes" if front else "")
        for ms, front, (row, each) in zip(times, best, joined, strict=True)
    ]  # fmt: skip
    rows += [(name, "", "", MISSING, "", "") for name in sorted(without)]
    columns = (*left("method", "kind"), *right("mean top-1", "p50", "over plain"), *left("on the front"))
    chart = Scatter(x="milliseconds, p50", y=GAIN, points=points, groups=KINDS)
    return Figure(title=f"Methods on {runtime}", told=told, chart=chart, table=Table(where, columns, rows))


FORMS = {"fp32": "fp32", "int8": "own", "shared int8": "shared"}  # of int8.json -> what shared-int8.json calls it
METHOD = "ssf"  # what shared-int8.json has timed


def _timed_precisions(results: Results) -> Iterator[Part]:
    judged, timed = results.get("int8"), results.get("shared-int8")
    if judged is None or timed is None:
        return
    nets = timed.table.nested("backbones")
    for backbone in nets.names():
        rows = [row for row in judged.rows() if (row.text("backbone"), row.text("method")) == (backbone, METHOD)]
        if rows:
            yield _precisions_figure(backbone, rows, nets.nested(backbone).nested("latency"), timed)


def _precisions_figure(backbone: str, rows: Sequence[ObjectReader], latency: ObjectReader, timed: Result) -> Figure:
    found, n = [], [row.integer("n", least=1) for row in rows]
    for runtime in latency.names():
        for form, key in FORMS.items():
            top1 = mean([row.nested("top1").number(f"{form} {runtime}") for row in rows])
            found.append((runtime, form, top1, latency.nested(runtime).nested("p50_ms").number(key)))
    best = fronts([(ms, top1) for _, _, top1, ms in found])
    points = tuple(
        Point(x=ms, y=100 * top1, label=form, group=runtime, front=front,
              told=f"{form}, {runtime}: {format_percent(top1)}, {format_ms(ms)}")
        for (runtime, form, top1, ms), front in zip(found, best, strict=True)
    )  # fmt: skip
    tasks = ", ".join(sorted(row.text("task") for row in rows))
    half = Z * math.sqrt(math.fsum(found[0][2] * (1 - found[0][2]) / count for count in n)) / len(n)
    fastest = min(found, key=lambda each: each[3])
    told = (
        f"SSF on {tasks}: mean top-1 of int8.json, p50 of shared-int8.json, {timed.table.integer('threads')} threads."
        f" The fastest is {fastest[1]} on {fastest[0]}, {format_ms(fastest[3])} at {format_percent(fastest[2])}. Test"
        f" images leave each uncertain by about ± {100 * half:.1f} points."
    )
    cells = [
        (runtime, form, format_percent(top1), format_ms(ms), "yes" if front else "")
        for (runtime, form, top1, ms), front in zip(found, best, strict=True)
    ]
    columns = (*left("runtime", "form"), *right("mean top-1", "p50"), *left("on the front"))
    chart = Scatter(x="milliseconds, p50", y=GAIN, points=points, groups=RUNTIMES)
    table = Table(f"demo:{backbone}, precisions", columns, cells)
    return Figure(title=f"Precisions of demo:{backbone}", told=told, chart=chart, table=table)
