"""``device``: the folder on a device. Its actions, their options and screens; all but ``init`` need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepet.device.checking import check
from edgepet.device.pool import MODES
from edgepet.device.runtimes import DEFAULT, SHARED_RUNTIMES
from edgepet.device.serving import Device, Installation, TaskLine
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.files import folder_bytes
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_bytes, left, right
from edgepet.verbs.device import (
    CheckReport,
    ExportReport,
    InitReport,
    InstallReport,
    ListReport,
    RemoveReport,
    TrustReport,
    export,
    init,
    require_signature,
)
from edgepet.verbs.device_bench import DeviceBenchReport, bench
from edgepet.verbs.device_bench import screen as bench_screen
from edgepet.verbs.device_run import VERB as RUN
from edgepet.verbs.verb import (
    Group,
    Options,
    Parser,
    Verb,
    device_option,
    image_size_option,
    names,
    pack_precision_option,
    path,
    size_bytes,
    store_option,
    threads_option,
)

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


def _init_options(parser: Parser) -> None:
    add = parser.add_argument
    store_option(parser)
    add(
        "--backbone",
        metavar="B",
        help="a timm name, NAME@FILE, or demo:vit-small, made here with torch (default: none)",
    )
    add(
        "--for",
        dest="packs",
        nargs="+",
        default=[],
        metavar="TASK.pet",
        help="bring what these packs run on (default: none)",
    )
    add(
        "--from",
        dest="source",
        metavar="DIR",
        help="bring everything from another store; graphs alone, where this is one (default: none)",
    )
    image_size_option(parser, "of --backbone (default: its own)")
    told = "of the graphs: fp32, int8 (default: fp32; with int8 alone no dense backbone is brought)"
    add("--precision", dest="precisions", type=names, default=["fp32"], metavar="P,…", help=told)
    add(
        "--quota",
        dest="quota_bytes",
        type=size_bytes,
        metavar="SIZE",
        help="the most that the folder may take (default: what it was)",
    )


def _init_run(options: Options, progress: Progress) -> InitReport:
    with progress.stage(f"device init: {options.store}"):
        return init(
            Path(options.store),
            backbone=options.backbone,
            packs=[Path(pack) for pack in options.packs],
            source=path(options.source),
            image_size=options.image_size,
            precisions=options.precisions,
            quota_bytes=options.quota_bytes,
        )


def _init_screen(report: InitReport) -> Screen:
    yield lines(
        f"store {report.store}  {format_bytes(report.bytes)}",
        f"  backbone: {report.backbone}",
        *(f"  graph {name}" for name in report.graphs),
        f"  tasks: {', '.join(report.tasks)}"
        if report.tasks
        else f"  next: edgepet device install --store {report.store} TASK.pet",
    )


def _install_options(parser: Parser) -> None:
    store_option(parser)
    parser.add_argument("packs", nargs="+", metavar="TASK.pet", help="packs; each is installed before the next")
    told = "take a pack with a smaller sequence number than was ever installed (default: refuse it)"
    parser.add_argument("--older", action="store_true", help=told)
    told = "ask for the probe on this one alone (default: on every one that is installed)"
    parser.add_argument("--runtime", choices=SHARED_RUNTIMES, help=told)


def _install_run(options: Options, progress: Progress) -> InstallReport:
    device, installed = Device(Path(options.store)), list[Installation]()
    for pack in map(Path, options.packs):
        with progress.stage(f"device install: {pack.name}"):
            installed.append(device.install(pack, older=options.older, runtime=options.runtime))
    last = installed[-1]
    return InstallReport(
        task=last.task, sequence=last.sequence, bytes=last.bytes, seconds=last.seconds, installed=tuple(installed)
    )


def _install_screen(report: InstallReport) -> Screen:
    rows = [
        (each.task, str(each.sequence), format_bytes(each.bytes), f"{each.seconds:.2f} s", each.signed_by or "nobody",
         _reason("", each.refused) or "everywhere")
        for each in report.installed
    ]  # fmt: skip
    columns = (*left("task"), *right("sequence", "pack", "took"), *left("signed by", "served"))
    yield Table("installed", columns, rows)


def _list_run(options: Options, progress: Progress) -> ListReport:
    del progress
    store = Store(Path(options.store))
    now = store.now()
    if not now.number:
        raise InputError(options.store, "is no store", fix=f"edgepet device init --store {options.store} --backbone B")
    return ListReport(
        generation=now.number,
        tasks=Device(store.root).list(),
        bytes=folder_bytes(store.root),
        quota_bytes=now.quota_bytes,
        requires_signature=now.requires_signature,
    )


def _list_screen(report: ListReport) -> Screen:
    quota = "" if report.quota_bytes is None else f" of {format_bytes(report.quota_bytes)}"
    yield lines(
        f"generation {report.generation}, {format_bytes(report.bytes)}{quota}"
        + (", signatures are required" if report.requires_signature else "")
    )
    rows = [
        (t.task, str(t.sequence), format_bytes(t.bytes), t.signed_by or "nobody", t.state,
         "–" if t.previous is None else str(t.previous), _reason(t.reason, t.refused))
        for t in report.tasks
    ]  # fmt: skip
    columns = (
        *left("task"),
        *right("sequence", "pack"),
        *left("signed by", "state"),
        *right("before"),
        *left("reason"),
    )
    yield Table("tasks", columns, rows) if rows else lines("no task is installed")


def _reason(reason: str, refused: Mapping[str, str]) -> str:
    return "; ".join([*([reason] if reason else []), *(f"not on {place}: {why}" for place, why in refused.items())])


def _bench_options(parser: Parser) -> None:
    add = parser.add_argument
    store_option(parser)
    add("tasks", nargs="*", metavar="TASK", help="names of installed tasks (default: all)")
    add("--runtime", default=DEFAULT, choices=SHARED_RUNTIMES, help="(default: %(default)s)")
    pack_precision_option(parser)
    add("--mode", default="auto", choices=MODES, help="as for run (default: %(default)s)")
    threads_option(parser)
    device_option(parser)
    add("--rounds", type=int, default=100, metavar="N", help="timed inferences of each (default: %(default)s)")


def _bench_run(options: Options, progress: Progress) -> DeviceBenchReport:
    with progress.bar("device bench", options.rounds) as bar:
        return bench(
            Path(options.store), options.tasks, runtime=options.runtime, precision=options.precision,
            mode=options.mode, threads=options.threads, device=options.device, rounds=options.rounds,
            tick=lambda done: bar.update(done),
        )  # fmt: skip


def _task_options(parser: Parser) -> None:
    store_option(parser)
    parser.add_argument("task", metavar="TASK", help="the name of an installed task")


def _rollback_run(options: Options, progress: Progress) -> TaskLine:
    del progress
    return Device(Path(options.store)).rollback(options.task)


def _rollback_screen(report: TaskLine) -> Screen:
    yield lines(f"{report.task} is at sequence {report.sequence} again, {format_bytes(report.bytes)}: {report.reason}")


def _remove_run(options: Options, progress: Progress) -> RemoveReport:
    del progress
    Device(Path(options.store)).remove(options.task)
    return RemoveReport(task=options.task)


def _remove_screen(report: RemoveReport) -> Screen:
    yield lines(f"removed {report.task}")


def _check_run(options: Options, progress: Progress) -> CheckReport:
    store = Store(Path(options.store))
    with progress.stage(f"device check: {options.store}"):
        problems = check(store)
    return CheckReport(ok=not problems, problems=problems, bytes=folder_bytes(store.root))


def _check_screen(report: CheckReport) -> Screen:
    if report.ok:
        yield lines(f"everything is whole, {format_bytes(report.bytes)}")
        return
    rows = [(each.where, each.what, each.fix) for each in report.problems]
    yield Table("problems", left("where", "what", "what mends it"), rows)


def _export_options(parser: Parser) -> None:
    store_option(parser)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="tasks to bring (default: all)")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a new folder, for `device init --from`")


def _export_run(options: Options, progress: Progress) -> ExportReport:
    with progress.stage(f"device export: {options.to}"):
        return export(Path(options.store), Path(options.to), options.tasks)


def _export_screen(report: ExportReport) -> Screen:
    yield lines(
        f"{report.path}  {format_bytes(report.bytes)}: {', '.join(report.tasks) or 'no task'}",
        f"  next, on the device: edgepet device init --store DIR --from {report.path}",
    )


def _trust_options(parser: Parser) -> None:
    store_option(parser)
    parser.add_argument("keys", nargs="+", metavar="KEY.pub", help="public keys, or folders of them")


def _trust_run(options: Options, progress: Progress) -> TrustReport:
    del progress
    return require_signature(Path(options.store), [Path(key) for key in options.keys])


def _trust_screen(report: TrustReport) -> Screen:
    yield lines(f"takes only what is signed by {', '.join(report.keys)}")


def _not_ok(report: Any) -> bool:
    return not report.ok


ACTIONS: dict[str, tuple[Verb, str]] = {
    "init": (
        Verb(options=_init_options, run=_init_run, screen=_init_screen),
        "make it on a host, or from another folder, or bring it another backbone",
    ),
    "install": (
        Verb(options=_install_options, run=_install_run, screen=_install_screen),
        "install packs, once each has answered its own probe here",
    ),
    "list": (Verb(options=store_option, run=_list_run, screen=_list_screen), "the tasks, and how each of them is"),
    "run": (RUN, "what installed tasks say of images"),
    "bench": (
        Verb(options=_bench_options, run=_bench_run, screen=bench_screen),
        "what tasks cost here: to open, to run, to change, and in memory",
    ),
    "rollback": (
        Verb(options=_task_options, run=_rollback_run, screen=_rollback_screen),
        "make the pack before a task's active one again",
    ),
    "remove": (Verb(options=_task_options, run=_remove_run, screen=_remove_screen), "take a task out"),
    "check": (
        Verb(options=store_option, run=_check_run, screen=_check_screen, failed=_not_ok),
        "read everything, and say what is damaged and what would mend it",
    ),
    "export": (
        Verb(options=_export_options, run=_export_run, screen=_export_screen),
        "the least folder that another device can be made of",
    ),
    "require-signature": (
        Verb(options=_trust_options, run=_trust_run, screen=_trust_screen),
        "take only packs that these keys have signed",
    ),
}
GROUP = Group(actions=ACTIONS)
