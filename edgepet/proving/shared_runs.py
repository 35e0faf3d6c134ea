"""A task on the int8 backbone that tasks share, on a runtime: compared with its Q/DQ graph, and judged."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from edgepet.calibration.budget import BATCH, Answers, Drop, answers
from edgepet.calibration.images import CalibrationImages
from edgepet.device.map_heads import map_heads_of
from edgepet.device.runtime import SharedInt8
from edgepet.device.runtimes import RUNTIMES, SHARED_RUNTIMES
from edgepet.graphs.head_graph import answer_names
from edgepet.graphs.int8 import Int8Graph
from edgepet.measuring.machine import runtimes
from edgepet.measuring.parity import SAME_CODES, Parity, compare, require_parity
from edgepet.proving.precision import Expressed
from edgepet.spec import NpArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRun:
    """A task on the int8 backbone on one runtime: what it loses, and how far from the Q/DQ graph its answers
    are, of several heads those of the first.

    ``bind_ms`` is what it took to make the task ready, once; ``layers`` counts what multiplied codes or floats.
    """

    runtime: str
    drop: Drop
    parity: Parity
    bind_ms: float
    layers: Mapping[str, int]


def installed() -> list[str]:
    """The runtimes that run every task on one backbone, and are here."""
    rows = [RUNTIMES[name] for name in SHARED_RUNTIMES]
    return [row.name for row in rows if any(status.available for status in runtimes(row.engines))]


def run_shared(expressed: Expressed, graph: Int8Graph, runtime: str, chosen: CalibrationImages) -> SharedRun:
    """Bind the task on ``runtime``, compare it on the held-out images, and judge it on all of train and val.

    Raises:
        CheckError: it answers otherwise than the Q/DQ graph of the same numbers.
        InputError: the file of codes is not what it was.
    """
    delta, shared = expressed.delta, SharedInt8(graph, runtime=runtime)
    try:
        began = time.perf_counter()
        network = shared.bind(delta)
        bind_ms = 1e3 * (time.perf_counter() - began)

        def answered(batches: Iterable[NpArray]) -> Answers:
            rows = [network.each(batch) for batch in batches]
            return tuple(np.concatenate(each) for each in zip(*rows, strict=True))

        held, heads = chosen.held_out_images, map_heads_of(delta)
        expected = answers(expressed.model_for(runtime), held, answer_names(heads))
        got = answered(held[start : start + BATCH] for start in range(0, len(held), BATCH))
        parities = list[Parity]()
        for place, (was, now) in enumerate(zip(expected, got, strict=True)):
            parities.append(compare(was, now, stored=SAME_CODES, inputs="data", against="merged"))
            named = f", {heads[place].name}" if len(heads) > 1 else ""
            require_parity(parities[-1], f"{delta.task}{named} on the int8 backbone, {runtime}")
        drop = expressed.calibration.judged(answered)
        layers = network.evidence.get("layers", {})
    finally:
        shared.close()
    return SharedRun(
        runtime=runtime, drop=drop, parity=parities[0], bind_ms=bind_ms, layers=cast(Mapping[str, int], layers)
    )
