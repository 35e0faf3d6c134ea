"""What was compared with what, how far apart the answers were, and which checks said no."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgepet.reports.page.parts import FAILED, REFUSED, Failure, Folded, Items, Part, Section, Text, missing
from edgepet.reports.page.results import Result, Results
from edgepet.reports.tables import Column, Table, format_number, format_percent, left, right
from edgepet.strict import ObjectReader

COMPARED = ("onnxruntime", "openvino")
RUNTIMES = (*COMPARED, "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "int8")
NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far answers may be apart, as fractions of the largest logit: the algebra in float64, and fp32 as stored."""

    algebra: float
    fp32: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The parts that one result brings, its checks, and those that failed."""

    parts: tuple[Part, ...]
    checks: int
    failures: tuple[Failure, ...]


def section(results: Results, limits: Limits) -> Section:
    """Tables of half.json, methods.json and timm-sweep.json, and everything that failed in front of them."""
    found, lacks, absent = list[Found](), list[str](), list[Part]()
    for name, of, what, script in (
        ("half", _exported, "fp16 beside the tuned network", "half.py"),
        ("methods", _methods, "every method's algebra and its exports", "methods.py"),
        ("timm-sweep", _sweep, "every family of timm's networks", "timm_sweep.py"),
    ):
        result = results.get(name)
        if result is None:
            lacks.append(name)
            absent.append(missing(what.capitalize(), f"benchmarks/{script} measures it."))
        else:
            found.append(of(result, limits))
    failures = tuple(failure for each in found for failure in each.failures)
    parts = [part for each in found for part in each.parts]
    checks = sum(each.checks for each in found)
    first = tuple(_failed(failures, checks)) if found else ()
    return Section(
        key="parity",
        title="Parity",
        parts=(*first, *parts, *absent),
        lacks=tuple(lacks),
        failures=failures,
        checks=checks,
    )


def _failed(failures: Sequence[Failure], checks: int) -> Iterator[Part]:
    if not failures:
        yield Text(f"All of {format_number(checks)} checks in these results say yes.")
        return
    yield Text(f"{FAILED} or {REFUSED}: {len(failures)} of {format_number(checks)} checks.", FAILED)
    kinds = (each.why.partition(": ") for each in failures)
    yield Items(
        tuple(
            f"{kind}: {each.what} ({each.result}): {why}" for each, (kind, _, why) in zip(failures, kinds, strict=True)
        )
    )


# -------------------------------------------------------------------------------------------------- exported artefacts


def _exported(result: Result, limits: Limits) -> Found:
    del limits  # a row has its own
    rows, failures, checks = [], list[Failure](), 0
    for row in result.rows():
        where = f"{row.text('task')}, {row.text('format')}, {row.text('precision')}"
        head = (row.text("task"), row.text("format"), row.text("precision"))
        if row.absent("parity"):
            rows.append((*head, "–", "–", "–", "–", "", NOT_RUN))
            continue
        parity = row.nested("parity")
        checks += 1
        told = _too_far(parity)
        if told:
            failures.append(Failure(result=result.name, what=where, why=f"{FAILED}: {told}"))
        rows.append((*head, f"{parity.number('max_abs'):.1e}", f"{parity.number('limit'):.1e}",
                     format_percent(parity.number("top1_agreement")), str(parity.integer("n")),
                     f"{parity.text('against')}, {parity.text('inputs')}",
                     f"{FAILED}: {told}" if told else "ok"))  # fmt: skip
    columns = (*left("task", "format", "precision"), *right("furthest apart", "limit", "same top-1", "n"),
               *left("against, inputs", "verdict"))  # fmt: skip
    table = Table(f"Exported models beside what was tuned, {result.name}.json", columns, rows)
    return Found(parts=(table,), checks=checks, failures=tuple(failures))


def _too_far(parity: ObjectReader) -> str:
    """Why a comparison failed; empty where it did not."""
    apart, agreed, least = parity.number("max_abs"), parity.number("top1_agreement"), parity.number("least_agreement")
    if not parity.absent("limit") and apart > parity.number("limit"):
        return f"{apart:.1e} is beyond {parity.number('limit'):.1e}"
    return "" if agreed >= least else f"{format_percent(agreed)} of top-1 is below {format_percent(least)}"


# ------------------------------------------------------------------------------------------------------------ methods


def _methods(result: Result, limits: Limits) -> Found:
    """The worst of every network; the numbers of all methods are in the guide."""
    bounds = {"float64": limits.algebra, "onnxruntime": limits.fp32, "openvino": limits.fp32}
    rows, failures, checks = [], list[Failure](), 0
    networks, cells = result.table.nested("networks"), result.table.nested("cells")
    for network in cells.names():
        methods = cells.nested(network)
        placed = {name: methods.nested(name) for name in methods.names() if not methods.nested(name).has("reason")}
        worst = dict.fromkeys(bounds, 0.0)
        for name, cell in placed.items():
            for kind, bound in bounds.items():
                checks, apart = checks + 1, cell.number(kind)
                worst[kind] = max(worst[kind], apart)
                if apart > bound:
                    why = f"{FAILED}: {apart:.1e} of the largest logit is beyond {bound:.0e}"
                    failures.append(Failure(result=result.name, what=f"{name} on {network}, {kind}", why=why))
        built = sum(cell.raw("tensorrt-rtx") is True for cell in placed.values())
        told = [f"{worst[kind]:.1e}" + ("" if worst[kind] <= bounds[kind] else ", too far") for kind in bounds]
        rows.append(
            (network, networks.nested(network).text("name"), str(len(placed)), *told, f"{built} of {len(placed)}")
        )
    numbers = ("methods", "float64", "ONNX Runtime", "OpenVINO", "built by TensorRT-RTX")
    title = f"The merged network beside the tuned one: furthest apart of all methods, {result.name}.json"
    table = Table(title, (*left("kind", "network"), *right(*numbers)), rows)
    return Found(parts=(table,), checks=checks, failures=tuple(failures))


# -------------------------------------------------------------------------------------------------------------- sweep


def _sweep(result: Result, limits: Limits) -> Found:
    rows, failures, checks = [], list[Failure](), 0
    count = {precision: dict.fromkeys(RUNTIMES, 0) for precision in PRECISIONS}
    for row in result.rows():
        model = row.text("model") if row.has("model") else row.text("family")
        told = [Failure(result=result.name, what=what, why=why) for what, why in _refusals(row, model, limits)]
        checks += 1  # the algebra
        failures += told
        for precision in PRECISIONS:
            for runtime in RUNTIMES:
                cell = _cell(row, precision, runtime)
                checks += cell is not None
                count[precision][runtime] += cell is not None and not cell.has("refused")
        apart = [f"{row.number(key):.0e}" if row.has(key) else "–" for key in ("algebra", "onnxruntime", "openvino")]
        rows.append((row.text("family"), model, *apart, f"{REFUSED}: {len(told)}" if told else "ok"))
    total = len(rows)
    columns = (Column("precision"), *right("ONNX Runtime", "OpenVINO", "TensorRT-RTX, built"))
    cells = [
        (precision, *(f"{count[precision][runtime]} of {total}" for runtime in RUNTIMES)) for precision in PRECISIONS
    ]
    short = Table(f"timm's families: exports within their limits, {result.name}.json", columns, cells)
    columns = (*left("family", "smallest model"), *right("algebra", "ONNX Runtime", "OpenVINO"), *left("verdict"))
    return Found(parts=(short, Folded(Table(f"All {total} families", columns, rows))), checks=checks,
                 failures=tuple(failures))  # fmt: skip


def _refusals(row: ObjectReader, model: str, limits: Limits) -> Iterator[tuple[str, str]]:
    """What of a family was refused, and what is too far apart, once each."""
    for key in ("refused", "onnxruntime_refused", "openvino_refused", "eval_torch_refused", "eval_onnxruntime_refused"):
        if row.has(key):
            runtime = key.rpartition("_")[0]
            yield f"{model}, {runtime}" if runtime else model, f"{REFUSED}: {row.text(key)}"
    if row.has("algebra_ok") and not row.boolean("algebra_ok"):
        yield f"{model}, algebra", f"{FAILED}: {row.number('algebra'):.1e} of the largest logit"
    for precision in PRECISIONS:
        for runtime in RUNTIMES:
            cell = _cell(row, precision, runtime)
            if cell is not None and cell.has("refused"):
                yield f"{model}, {precision}, {runtime}", f"{REFUSED}: {cell.text('refused')}"
    for runtime in COMPARED:
        cell = _cell(row, "fp32", runtime)
        refused = cell is not None and cell.has("refused")  # its reason has been told
        if row.has(runtime) and row.number(runtime) > limits.fp32 and not refused:
            why = f"{FAILED}: {row.number(runtime):.1e} of the largest logit is beyond {limits.fp32:.0e}"
            yield f"{model}, fp32, {runtime}", why


def _cell(row: ObjectReader, precision: str, runtime: str) -> ObjectReader | None:
    """What a family's row says of one export; None where it was not tried."""
    found = row.nested(precision) if row.has(precision) else None
    return found.nested(runtime) if found is not None and found.has(runtime) else None
