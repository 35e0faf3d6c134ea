"""A task on a backbone that others use too: which stretch of the graph it runs, and what it brings to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from edgepet.deltas.branches import named_tensors
from edgepet.deltas.delta import Delta, Head
from edgepet.deltas.joined import reads_of
from edgepet.deltas.merge import task_tensors
from edgepet.device.map_heads import map_heads_of
from edgepet.device.runner import PartRunner
from edgepet.device.runtimes import Runtime
from edgepet.errors import InputError, option
from edgepet.graphs.base import BaseGraph, require_heads
from edgepet.graphs.dense_slots import UnslottedError, dense_slots
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.map_slots import in_form
from edgepet.graphs.maps import GraphMap
from edgepet.graphs.parts import Part, part_of
from edgepet.graphs.slots import backbone_slots, task_slots
from edgepet.spec import NpArray

Form: TypeAlias = Literal["merged", "slots"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A task on a graph: ``part`` is all of it, ``tensors`` stand in place of its own, ``slots`` are handed over.

    ``changed`` are the tensors and slots that are not as the backbone's own graph has them.
    """

    part: Part
    tensors: Mapping[str, NpArray]
    slots: Mapping[str, NpArray]
    changed: frozenset[str]
    head: Head


def fit(graph: BaseGraph, delta: Delta, form: Form) -> Fitted:
    """A task on the float backbone, folded into its tensors or in slots.

    Raises:
        InputError: it does not fit, or no slots can hold it.
    """
    graph.require_fit(delta)
    part, head = _read_by(delta, part_of(graph), graph.maps), delta.head.in_float32
    changed = frozenset((*delta.targets, *named_tensors(delta.branches)))
    if form == "slots":
        slots = dense_slots(graph, part.file, delta)
        with_slots = part.with_slots({name: value.shape for name, value in slots.items()})
        return Fitted(part=with_slots, tensors={}, slots=slots, changed=changed, head=head)
    tensors = task_tensors(graph.base, delta)
    own = {name: tensors[name] for name in changed if name in part.file.tensors}
    return Fitted(part=part, tensors=own, slots={}, changed=changed, head=head)


def _read_by(delta: Delta, part: Part, maps: Sequence[GraphMap]) -> Part:
    """Of a graph what the heads of ``delta`` read: features, or maps."""
    heads = map_heads_of(delta)
    return part.putting_out(maps, reads_of(heads)) if heads else part


def fit_lightly(graph: BaseGraph | Int8Graph, delta: Delta, runtime: str) -> Fitted:
    """A task in slots where they can hold it, else folded; on the int8 backbone in its form for ``runtime``.

    Raises:
        BackboneError, InputError: as ``fit`` and ``fit_int8``.
    """
    if isinstance(graph, Int8Graph):
        return fit_int8(graph, delta, runtime)
    try:
        return fit(graph, delta, "slots")
    except UnslottedError:
        return fit(graph, delta, "merged")


def fit_int8(graph: Int8Graph, delta: Delta, runtime: str) -> Fitted:
    """A task on the int8 backbone, in the form for ``runtime``.

    Raises:
        BackboneError, InputError: as ``task_slots``, and as ``require_heads`` where a head reads maps.
    """
    if delta.heads:
        require_heads(delta, graph.width, graph.maps)
    slots, own = task_slots(graph, delta), own_slots(graph, runtime)
    values = in_form(graph, slots, runtime)
    changed = {name for name, value in values.items() if not np.array_equal(value, own.get(name, np.nan))}
    part = _read_by(delta, part_of(graph, runtime), graph.maps)
    codes = {name: value for name, value in slots.codes.items() if name in part.file.tensors}
    return Fitted(
        part=part, tensors=codes, slots=values, changed=frozenset((*changed, *slots.codes)),
        head=delta.head.in_float32,
    )  # fmt: skip


def own_slots(graph: Int8Graph, runtime: str) -> dict[str, NpArray]:
    """The slots of the int8 backbone itself, for a trunk; none where it has no ranges of its own."""
    slots = backbone_slots(graph)
    return {} if slots is None else in_form(graph, slots, runtime)


def opened(row: Runtime, part: Part, tensors: Mapping[str, NpArray], threads: int | None) -> PartRunner:
    """A stretch of a graph on a runtime, with ``tensors`` in place of its own.

    Raises:
        InputError: the runtime opens none, or not this one.
        MissingError: it is not installed.
    """
    if row.open_part is None:
        raise InputError(option("runtime"), f"opens no stretch of a graph on {row.name}")
    return row.open_part(part, tensors, threads, row.where)
