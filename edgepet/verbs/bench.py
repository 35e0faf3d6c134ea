"""``bench``: latency of packs and exported models, all candidates in turn in every round."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.device.runtimes import RUNTIMES, SHARED_RUNTIMES
from edgepet.errors import InputError, option
from edgepet.measuring.latency import SETTLE_S, BenchReport, Candidate, LatencyRow, measure
from edgepet.measuring.machine import TORCH, environment
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.sources import open_source
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import Table, format_ms, left, right
from edgepet.spec import FilePath
from edgepet.verbs.verb import (
    MOST_THREADS,
    Options,
    Parser,
    Verb,
    at_least_one,
    backbone_option,
    device_option,
    names,
    threads_option,
)

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress

ENGINES_ONLY = tuple(name for name in RUNTIMES if name not in SHARED_RUNTIMES)  # these run exported models only
ALL_RUNTIMES = (*SHARED_RUNTIMES, TORCH.name, *ENGINES_ONLY)


def bench(
    models: Sequence[FilePath],
    *,
    runtimes: Sequence[str] | None = None,
    threads: int | None = None,
    batch: int = 1,
    rounds: int = 200,
    warmup: int | None = None,
    settle_s: float = SETTLE_S,
    plain: bool = False,
    backbone: AnyBackbone = None,
    device: str | None = None,
    tick: Callable[[int], None] | None = None,
) -> BenchReport:
    """Latency of packs and artefacts, all candidates in turn in every round; inputs are seeded noise.

    A pack runs on each of ``runtimes`` in every precision that it computes in, torch tuned and merged. ``plain`` adds
    the backbone's own weights under the task's head: what a merged task is to be compared with.

    Args:
        runtimes: None is all that are installed.
        threads: None is all cores.
        device: "cpu", "gpu", "npu" or "cuda", for every model; None is each runtime's usual one.
        tick: told the number of rounds that are done.

    Raises:
        InputError: models of several image sizes, nothing that can run, or no such runtime or device.
    """
    at_least_one("threads", threads, MOST_THREADS)
    at_least_one("batch", batch)
    threads = threads or environment().cores
    candidates: list[Candidate] = []
    sizes = set[tuple[int, ...]]()
    for path in models:
        source = open_source(path)
        sizes.add(source.preprocess.input_shape)
        candidates += source.candidates(_chosen(runtimes, device), threads, plain, backbone, device)
    if len(sizes) > 1:
        got = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise InputError("bench", "needs models of one image size", got=got)
    if not candidates and device is not None:
        has = "; ".join(f"{name}: {', '.join(devices)}" for name, devices in _devices().items())
        raise InputError(option("device"), f"has nothing to run on it; {has}", got=repr(device))
    if not candidates:
        fix = "name a pack or an artefact, and a runtime that is installed"
        raise InputError("bench", "found nothing to run", fix=fix)
    images = np.random.default_rng(0).standard_normal((batch, *sizes.pop()), dtype=np.float32)
    return measure(candidates, images, threads=threads, rounds=rounds, warmup=warmup, settle_s=settle_s, tick=tick)


def _chosen(runtimes: Sequence[str] | None, device: str | None) -> tuple[str, ...]:
    """The runtimes asked for, else those that are installed and have the device, if one is asked for; engines are
    opened only where a model needs them.
    """
    for name in runtimes or ():
        if name not in ALL_RUNTIMES:
            raise InputError(option("runtimes"), f"is one of {', '.join(ALL_RUNTIMES)}", got=repr(name))
    if runtimes is not None:
        return tuple(runtimes)
    return tuple(name for name, devices in _devices().items() if device is None or device in devices)


def _devices() -> dict[str, tuple[str, ...]]:
    """Of each runtime that may run, the devices that it has on this machine."""
    here = [name for name in ALL_RUNTIMES if name in ENGINES_ONLY or _installed(name)]
    return {name: ("cpu",) if name == TORCH.name else tuple(RUNTIMES[name].devices()) for name in here}


def _installed(name: str) -> bool:
    engines = (TORCH,) if name == TORCH.name else RUNTIMES[name].engines
    try:
        return any(importlib.util.find_spec(engine.module) is not None for engine in engines)
    except ValueError:  # a blocked module leaves None where its spec should be
        return False


def _options(parser: Parser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="TASK.pet or an exported folder, of one image size")
    told = f"of {', '.join(ALL_RUNTIMES)}, with commas between (default: all that are installed)"
    add("--runtime", dest="runtimes", type=names, default=[], metavar="R[,R]", help=told)
    threads_option(parser)
    device_option(parser)
    add("--batch", type=int, default=1, metavar="N", help="images of one inference (default: %(default)s)")
    add("--rounds", type=int, default=200, metavar="N", help="timed inferences of each (default: %(default)s)")
    told = "time the backbone's own weights under the head too (default: the models only)"
    add("--plain", action="store_true", help=told)
    backbone_option(parser)


def _run(options: Options, progress: Progress) -> BenchReport:
    with progress.bar("bench", options.rounds) as bar:
        return bench(
            [Path(model) for model in options.models],
            runtimes=options.runtimes or None,
            threads=options.threads,
            batch=options.batch,
            rounds=options.rounds,
            plain=options.plain,
            backbone=options.backbone,
            device=options.device,
            tick=lambda done: bar.update(done),
        )


def latency_table(title: str, what: str, rows: Sequence[LatencyRow]) -> Table:
    """A row for each candidate; ``what`` they are."""
    cells = [
        (
            row.model,
            row.runtime,
            row.precision,
            row.mode,
            *map(format_ms, (row.p50_ms, row.p90_ms, row.p99_ms, row.open_ms, row.first_ms)),
            "noisy" if row.noisy else "",
        )
        for row in rows
    ]
    columns = (*left(what, "runtime", "precision", "mode"), *right("p50", "p90", "p99", "open", "first"), *left(""))
    return Table(title, columns, cells)


def screen(report: BenchReport) -> Screen:
    """A row for each candidate, and what the machine did meanwhile."""
    first, here = report.rows[0], report.environment
    title = f"latency, batch {first.batch}, {first.threads} threads, {first.n} interleaved rounds"
    yield latency_table(title, "model", report.rows)
    yield lines(
        f"  {here.cpu}, load {here.load_1m}; one inference after another; 'noisy': the middle half"
        " of the rounds spreads over more than 10 % of p50"
    )


VERB = Verb(options=_options, run=_run, screen=screen)
