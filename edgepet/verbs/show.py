"""Reports for people: every verb's result as tables and lines on a console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from edgepet.measuring.machine import Environment, RuntimeStatus
from edgepet.reports.tables import (
    Column,
    Table,
    format_bytes,
    format_ms,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    print_table,
    program,
)

if TYPE_CHECKING:
    from rich.console import Console

    from edgepet.calibration.budget import Drop
    from edgepet.measuring.latency import BenchReport
    from edgepet.verbs.calibrate import CalibrateReport, ShareReport
    from edgepet.verbs.demo import DemoReport
    from edgepet.verbs.evaluate import EvalReport, InspectReport
    from edgepet.verbs.export import Exported, ExportReport, MergeReport, VerifyReport
    from edgepet.verbs.peft import PeftReport
    from edgepet.verbs.storage import StorageReport
    from edgepet.verbs.train import PretrainReport, TrainReport


FEW_IMAGES = 100  # of a val set: one image is a point
IMBALANCE = 3  # times as many images of one class as of another


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    runtimes: tuple[RuntimeStatus, ...]
    python: str
    cpu: Environment

    @classmethod
    def now(cls, environment: Environment, runtimes: tuple[RuntimeStatus, ...]) -> Doctor:
        return cls(runtimes=runtimes, python=environment.python, cpu=environment)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """``fp16_bytes`` is what a pack stores in fp16, head and manifest left out; 0 where there is no place for it."""

    name: str
    paper: str
    foldable: bool
    trainable_params: int | None
    fp16_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodList:
    methods: tuple[MethodRow, ...]


def doctor(console: Console, report: Doctor) -> None:
    cpu = report.cpu
    _lines(
        console,
        f"{cpu.cpu}, {cpu.cores} cores, {cpu.system}",
        f"features: {', '.join(cpu.cpu_features) or 'none known'}",
        f"Python {report.python}",
    )
    rows = [(r.name, r.version or "–", "yes" if r.available else "no", r.fix or "") for r in report.runtimes]
    print_table(
        console, Table("runtimes", (Column("name"), Column("version"), Column("available"), Column("fix")), rows)
    )


def methods(console: Console, report: MethodList) -> None:
    rows = [
        (
            m.name,
            m.paper,
            "folds" if m.foldable else "branch",
            *_size(m),
        )
        for m in report.methods
    ]
    columns = (
        Column("method"),
        Column("paper"),
        Column(""),
        Column("parameters", right=True),
        Column("fp16", right=True),
    )
    print_table(console, Table("methods", columns, rows))


def _size(row: MethodRow) -> tuple[str, str]:
    if row.fp16_bytes is None:
        return "–", "–"
    if not row.trainable_params and row.name != "linear-probe":
        return "no place", "–"
    return format_number(row.trainable_params), format_bytes(row.fp16_bytes)


def train(console: Console, report: TrainReport) -> None:
    _lines(
        console,
        f"{report.pack}  {format_bytes(report.pack_bytes)}",
        f"  {report.method} on {report.backbone.name}: {format_number(report.trainable_params)} parameters"
        f" and a head of {format_number(report.head_params)}",
        f"  {report.backbone.description}",
        f"  val {format_percent(report.val.top1)} of {report.val.n} images, as stored;"
        f" epoch {report.best_epoch} of {report.epochs}",
        f"  95 % interval {format_percent(report.val.low)} to {format_percent(report.val.high)}",
        *_rounded(report),
        *_warnings(report),
        f"  {format_number(report.images_per_second)} images/s in {report.precision},"
        f" {format_seconds(report.seconds)} in all",
        f"  merged equals tuned in float64: {report.algebra_max_abs:.1e}, limit {report.algebra_limit:.1e}",
        f"next: {program()} export {report.pack} --to onnx,openvino -o exported",
    )


def pretrain(console: Console, report: PretrainReport) -> None:
    _lines(
        console,
        f"{report.path}",
        f"  {format_number(report.trainable_params)} parameters of {report.method}, tuned on {report.classes} classes",
        f"  val {format_percent(report.val.top1)} of {report.val.n} images; epoch {report.best_epoch}"
        f" of {report.epochs}; {format_seconds(report.seconds)} in all",
        f"  lowered equals tuned in float64: {report.max_abs_diff:.1e}",
        f"next: {program()} train DATA --method {report.method} --init {report.path} ...",
    )


def _rounded(report: TrainReport) -> list[str]:
    if report.val_rounded is None:
        return []
    top1 = format_percent(report.val_rounded.top1)
    return [f"  val {top1} with the backbone rounded to {report.backbone_precision}, as it was tuned"]


def _warnings(report: TrainReport) -> list[str]:
    """What makes the accuracy above say less than it seems to."""
    lines, (fewest, most) = [], report.images_per_class
    if report.val.n < FEW_IMAGES:
        lines.append(f"  {report.val.n} val images tell epochs apart poorly: the best one is partly luck")
    if most > IMBALANCE * fewest:
        lines.append(
            f"  classes are uneven, {fewest} to {most} training images:"
            f" the mean over classes is {format_percent(report.val.balanced)}"
        )
    return lines


def evaluate(console: Console, report: EvalReport) -> None:
    _lines(
        console,
        f"top-1 {format_percent(report.top1)} of {report.n} images, {len(report.classes)} classes"
        f" ({report.runtime}, {report.precision})",
        f"  95 % interval {format_percent(report.low)} to {format_percent(report.high)};"
        f" mean over classes {format_percent(report.balanced_accuracy)}",
    )


def merge(console: Console, report: MergeReport) -> None:
    _lines(
        console,
        f"{report.path}  {format_bytes(report.bytes)}",
        f"  loads strictly into {report.loads_into}",
        f"  {report.max_abs_diff:.1e} from the {report.against} network on {report.n} images ({report.inputs}),"
        f" limit {report.limit:.1e}",
    )


def export(console: Console, report: ExportReport) -> None:
    rows = []
    for a in report.artifacts:
        difference = f"{a.parity.max_abs:.1e}" if a.parity else "–"
        agreement = format_percent(a.parity.top1_agreement) if a.parity else "–"
        rows.append(
            (
                a.task,
                a.engine,
                a.precision,
                format_bytes(a.size_bytes),
                f"{a.seconds:.2f} s",
                difference,
                agreement,
                "yes" if a.verified else "not verified",
                str(a.path),
            )
        )
    columns = (
        *(Column(name) for name in ("task", "engine", "precision")),
        *(Column(name, right=True) for name in ("size", "fold+write", "max|Δ|", "same top-1")),
        *(Column(name) for name in ("verified", "folder")),
    )
    print_table(console, Table("artefacts", columns, rows))
    for reason in dict.fromkeys(a.reason for a in report.artifacts if a.reason):
        _lines(console, f"  {reason}")
    for told in dict.fromkeys(_kept_fp32(a) for a in report.artifacts if a.kept_fp32):
        _lines(console, f"  {told}")
    for a in report.artifacts:
        cost = _int8(a) if a.int8 else None
        _lines(console, *(f"  {line}" for line in (cost, a.why, a.warning) if line))


def _kept_fp32(artifact: Exported) -> str:
    """What an fp16 or int8 model computes in fp32: layers that its numbers keep by name, operators by their count."""
    kinds = Counter(node.op for node in artifact.kept_fp32 if not node.forced)
    forced = [f"{node.name} ({node.op}, {node.reason})" for node in artifact.kept_fp32 if node.forced]
    parts = [*forced, *(f"{count} {op}" for op, count in sorted(kinds.items()))]
    facts = artifact.calibration or {}
    looked = f"{facts.get('n')} images ({facts.get('inputs')})"
    return f"{artifact.task} {artifact.precision}, ranges on {looked}: fp32 in {', '.join(parts)}"


def _int8(artifact: Exported) -> str:
    """What int8 costs on how many images, by which recipe, and what was executed."""
    facts = cast(Mapping[str, Any], artifact.int8)
    shown = recipe(facts["recipe"])
    executed = cast(Mapping[str, int], artifact.executed.get("layers", {}))
    ran = f"; {artifact.format} ran {executed.get('int8', 0)} of {sum(executed.values())} products on int8 codes"
    return f"{artifact.task} int8: {lost(artifact.drop)}; {shown}{ran if executed else ''}"


def recipe(facts: Mapping[str, Any]) -> str:
    """A recipe in one line."""
    smooth = "no smoothing" if facts["smooth"] is None else f"SmoothQuant {facts['smooth']}"
    corrected = "bias correction" if facts["bias_correction"] else "no bias correction"
    return f"{smooth}, {facts['estimator']} ranges, {corrected}"


def lost(drop: Drop | None) -> str:
    """Points of top-1, the interval, and on how many images."""
    if drop is None:
        return "not judged"
    reach = f"{drop.low:.2f} to {drop.high:.2f}"
    return f"loses {drop.points:.2f} points of top-1 ({reach}, n = {drop.n}), divergence {drop.kl:.2g}"


def calibrate(console: Console, report: CalibrateReport) -> None:
    rows = [(layer.name, f"{layer.drop:+.2f}", f"{layer.kl:.2g}") for layer in report.layers]
    columns = (Column("layer, alone in int8"), Column("points", right=True), Column("divergence", right=True))
    print_table(console, Table(f"sensitivity on {report.held_out} held-out images, the worst first", columns, rows))
    chosen = report.recipe
    _lines(
        console,
        f"  recipe: {recipe(asdict(chosen))}, of {len(report.tried)} tried on the held-out images",
        f"  all layers in int8: {lost(report.drop)}",
        *([f"  in float for the budget: {', '.join(chosen.keep)}"] if chosen.keep else []),
        *([f"  {report.warning}"] if report.warning else []),
    )


def shared(console: Console, report: ShareReport) -> None:
    rows = [
        (
            run.runtime,
            f"{run.drop.points:.2f} ({run.drop.low:.2f} to {run.drop.high:.2f})",
            f"{run.drop.kl:.2g}",
            f"{run.layers.get('int8', 0)} of {sum(run.layers.values())}",
            format_ms(run.bind_ms),
        )
        for run in report.runs
    ]
    numbers = (f"points lost, n = {report.runs[0].drop.n}", "divergence", "products on codes", "bind")
    columns = (Column("runtime"), *(Column(name, right=True) for name in numbers))
    print_table(console, Table("on the int8 backbone that tasks share", columns, rows))
    own = f", {format_bytes(report.own_codes_bytes)} of it codes of its own" if report.own_codes_bytes else ""
    _lines(
        console,
        f"  {report.pack}  {format_bytes(report.pack_bytes)}; codes {format_bytes(report.codes_bytes)},"
        f" sha256 {report.codes_sha256[:12]}, for all tasks",
        f"  in memory the task adds {format_bytes(report.own_memory_bytes)}{own}",
        *([f"  {report.warning}"] if report.warning else []),
    )


def verify(console: Console, report: VerifyReport) -> None:
    rows = [(c.name, "ok" if c.ok else "FAILED", f"{c.value:.1e}", f"{c.limit:.1e}") for c in report.checks]
    print_table(
        console,
        Table("", (Column("check"), Column(""), Column("value", right=True), Column("limit", right=True)), rows),
    )
    if report.reason:
        _lines(console, report.reason)


def bench(console: Console, report: BenchReport) -> None:
    rows = [
        (
            r.model,
            r.runtime,
            r.precision,
            r.mode,
            format_ms(r.p50_ms),
            format_ms(r.p90_ms),
            format_ms(r.p99_ms),
            format_ms(r.open_ms),
            format_ms(r.first_ms),
            "noisy" if r.noisy else "",
        )
        for r in report.rows
    ]
    numbers = tuple(Column(name, right=True) for name in ("p50", "p90", "p99", "open", "first"))
    columns = (Column("model"), Column("runtime"), Column("precision"), Column("mode"), *numbers, Column(""))
    first, here = report.rows[0], report.environment
    print_table(
        console,
        Table(f"latency, batch {first.batch}, {first.threads} threads, {first.n} interleaved rounds", columns, rows),
    )
    _lines(
        console,
        f"  {here.cpu}, load {here.load_1m}; one inference after another; 'noisy': the middle half"
        " of the rounds spreads over more than 10 % of p50",
    )


def storage(console: Console, report: StorageReport) -> None:
    rows = [
        (
            t.task,
            t.method,
            format_bytes(t.pack_bytes),
            format_bytes(t.full_copy_bytes),
            format_ratio(t.full_copy_bytes / t.pack_bytes),
        )
        for t in report.tasks
    ]
    columns = (
        Column("task"),
        Column("method"),
        Column("pack", right=True),
        Column("own model", right=True),
        Column("", right=True),
    )
    print_table(console, Table("storage", columns, rows))
    _lines(
        console,
        f"  backbone {format_bytes(report.backbone_bytes)}, graph {format_bytes(report.graph_bytes)},"
        f" caches {format_bytes(report.cache_bytes)}: once for all tasks",
    )
    runtimes = [
        (
            r.runtime,
            "one backbone" if r.shares_backbone else "a model a task",
            format_bytes(r.total_bytes),
            format_ratio(r.ratio),
            r.note,
        )
        for r in report.per_runtime
    ]
    heads = (Column("runtime"), Column("keeps"), Column("total", right=True), Column("saves", right=True), Column(""))
    print_table(
        console,
        Table(
            f"{len(report.tasks)} tasks on one device, against {format_bytes(report.full_total_bytes)} of models",
            heads,
            runtimes,
        ),
    )
    if report.devices > 1:
        _lines(
            console,
            f"  {report.devices} devices: {format_bytes(report.fleet_shared_bytes)} instead of"
            f" {format_bytes(report.fleet_full_bytes)}",
        )


def inspect(console: Console, report: InspectReport) -> None:
    size = sum(report.bytes_by_kind.values())
    settings = ", ".join(f"{key}={value}" for key, value in report.settings.items())
    _lines(
        console,
        f"{report.kind} {report.task}  {format_bytes(size)}",
        f"  {report.method}{f' ({settings})' if settings else ''} on {report.backbone.name}"
        f" {report.backbone.fingerprint[:19]}…",
        f"  {len(report.classes)} classes: {', '.join(report.classes[:8])}{', …' if len(report.classes) > 8 else ''}",
    )
    if report.kind == "pack":
        scored = f"val {format_percent(report.val_top1)}" if report.val_top1 is not None else "not scored"
        _lines(console, f"  {scored}; signed by: {report.signed_by or 'nobody'}")
        if report.int8_codes is not None:
            _lines(console, f"  has ranges for the int8 codes {report.int8_codes[:12]}…")
    if report.verified is not None:
        _lines(console, "  verified when it was made" if report.verified else "  not verified when it was made")
    for title, counts in (("updates", report.updates), ("branches", report.branches)):
        rows = [(u.kind, format_number(u.count), format_number(u.values)) for u in counts]
        columns = (Column("kind"), Column("targets", right=True), Column("new values", right=True))
        if rows:
            print_table(console, Table(title, columns, rows))
    parts = [(kind, format_bytes(count)) for kind, count in report.bytes_by_kind.items()]
    print_table(console, Table("bytes", (Column("part"), Column("size", right=True)), parts))


def peft(console: Console, report: PeftReport) -> None:
    _lines(
        console,
        f"{report.path}  {format_bytes(report.bytes)}",
        f"  {report.method}, {report.classes} classes",
        f"  {report.max_abs_diff:.1e} from PEFT {report.peft} on {report.n} images ({report.inputs}),"
        f" limit {report.limit:.1e}",
    )


def demo(console: Console, report: DemoReport) -> None:
    _lines(console, "", report.backbone)
    rows = [
        (
            t.task,
            t.trained.method,
            format_number(t.trained.trainable_params),
            format_bytes(t.trained.pack_bytes),
            format_percent(t.trained.val.top1),
            f"{format_percent(t.test.top1)} of {t.test.n}",
        )
        for t in report.tasks
    ]
    columns = (
        Column("task"),
        Column("method"),
        Column("parameters", right=True),
        Column("pack", right=True),
        Column("val", right=True),
        Column("test", right=True),
    )
    print_table(console, Table("tasks", columns, rows))
    export(console, report.artifacts)
    storage(console, report.storage)
    bench(console, report.bench)
    for skipped in report.skipped:
        _lines(console, f"left out: {skipped}")
    _lines(console, "", "next:", *(f"  {command}" for command in report.commands))


def _lines(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
