"""On the device: one backbone, many tasks. No torch, timm or ``onnx`` here."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgepet.deltas.delta import Delta, Head
from edgepet.deltas.heads import MapHead
from edgepet.deltas.joined import answer_shapes, apart, reads_of, told_apart
from edgepet.deltas.layers import Shape
from edgepet.deltas.merge import changed_tensors
from edgepet.device.fitting import fit, fit_int8, opened
from edgepet.device.map_heads import map_heads_of, open_heads
from edgepet.device.runner import PartRunner, Runner, SharedRunner
from edgepet.device.runtimes import DEFAULT, Runtime, shared_runtime
from edgepet.errors import CheckError, InputError, option
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph, require_codes
from edgepet.graphs.slots import task_slots
from edgepet.spec import NpArray, Precision, StoredPrecision


class TaskNetwork:
    """A base graph with one task folded in, and the task's head; a context manager.

    It takes images as ``Runner`` does, and puts out logits, float32 (n, C), of masks (n, C, h, w) at the head's own
    stride, of boxes (n, boxes, 6), of several heads all of it in ``as_rows``; a CheckError where they are not finite.
    """

    def __init__(
        self, features: Runner, head: Head | None, *, alone_on: Sequence[SharedRunner] = (),
        shapes: Sequence[Shape] = (),
    ) -> None:  # fmt: skip
        # ``head`` None: what runs puts out what the task answers.
        # ``alone_on``: backbones that no other task runs on are closed with the task.
        # ``shapes``: what each of several heads gives of one image.
        self._features, self._head, self._alone_on, self._shapes = features, head, alone_on, tuple(shapes)
        self.runtime, self.executed = features.runtime, features.executed

    @property
    def evidence(self) -> Mapping[str, object]:
        """How the runtime knows in what it computes."""
        return self._features.evidence

    def __call__(self, images: NpArray) -> NpArray:
        given = self._features(images)
        return require_finite(self._head(given) if self._head else given, f"{self.runtime}, {self.executed}")

    def each(self, images: NpArray) -> tuple[NpArray, ...]:
        """What each head gives, in the order of the task's."""
        answers = self(images)
        return apart(answers, self._shapes) if self._shapes else (answers,)

    def close(self) -> None:
        """Give the network back; one that tasks share stays open."""
        self._features.close()
        for shared in self._alone_on:
            shared.close()

    def __enter__(self) -> TaskNetwork:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def require_finite(logits: NpArray, where: str) -> NpArray:
    """``logits`` themselves; with a NaN among them the first label would be said with a score of NaN.

    Raises:
        CheckError: they are not finite.
    """
    if not np.isfinite(logits).all():
        raise CheckError(where, "must give finite answers", got="NaN or infinity")
    return logits


def open_task(graph: BaseGraph, delta: Delta, *, runtime: str | Runtime = DEFAULT, threads: int | None = None,
              precision: Precision = "fp32") -> TaskNetwork:  # fmt: skip
    """Fold ``delta`` into ``graph``'s tensors and open the result; tensors that did not change are read from its files.

    Neither ``graph`` nor its files are modified.

    Args:
        threads: None is all cores.
        precision: one that the runtime ``computes`` in.

    Raises:
        BackboneError: ``delta`` was trained on another backbone.
        InputError: no such runtime or precision, another image size or other branches, or an update that does not fit.
        MissingError: the runtime is not installed.
    """
    graph.require_fit(delta)
    return network_of(open_folded(graph, delta, runtime=runtime, threads=threads, precision=precision), delta, graph)


def network_of(runner: Runner, delta: Delta, graph: BaseGraph) -> TaskNetwork:
    """The network of a task, of what puts out its features or, where its heads read maps, what they answer."""
    heads = map_heads_of(delta)
    shapes = answer_shapes(heads, [each.map for each in graph.maps], graph.width)
    return TaskNetwork(runner, None if heads else delta.head.in_float32, shapes=shapes)


def open_folded(graph: BaseGraph, delta: Delta, *, runtime: str | Runtime, threads: int | None = None,
                precision: Precision = "fp32") -> Runner:  # fmt: skip
    """A task on a network of its own, folded into ``graph``'s tensors: its features, or what its head makes of maps.

    Raises:
        InputError: maps are asked for in another precision than fp32; else as ``open_task``.
    """
    heads = map_heads_of(delta)
    if not heads:
        changed = changed_tensors(graph.base, delta)
        return open_features(graph, changed, runtime=runtime, threads=threads, precision=precision)
    row = shared_runtime(runtime, purpose="a pack on a shared backbone")
    if precision != "fp32":
        raise InputError(option("precision"), "is fp32 for a head that reads maps", got=repr(precision))
    fitted = fit(graph, delta, "merged")
    network = opened(row, fitted.part, fitted.tensors, threads)
    bound = network.bind({})
    return open_heads(row, heads, graph.maps, graph.width, bound, threads=threads, closes=(network,))


def open_features(
    graph: BaseGraph, tensors: Mapping[str, NpArray], *, runtime: str | Runtime, threads: int | None = None,
    precision: Precision = "fp32",
) -> Runner:  # fmt: skip
    """Open ``graph`` itself, with ``tensors`` in place of the backbone's: images to pooled features (n, d).

    Raises:
        InputError: no such runtime, one that does not compute in ``precision``, or that cannot open this graph.
        MissingError: the runtime is not installed.
    """
    row = shared_runtime(runtime, purpose="a pack on a shared backbone")
    if precision not in row.computes or row.open_graph is None:
        raise InputError(option("precision"), f"is one of {', '.join(row.computes)} on {row.name}", got=repr(precision))
    return row.open_graph(graph, tensors, threads, precision, row.where)


class SharedInt8:
    """The int8 backbone, opened once on one runtime; tasks are bound to it, each in its own slots.

    A task whose codes changed (LoRA and whatever else does not only scale and shift) gets a network of its own.
    """

    def __init__(
        self,
        graph: Int8Graph,
        *,
        runtime: str | Runtime = DEFAULT,
        threads: int | None = None,
        store: Path | None = None,
    ) -> None:
        """Hash the file of codes, and open the backbone; ``threads`` None is all cores.

        Args:
            store: whose cache keeps what the runtime derives; None keeps nothing.

        Raises:
            InputError: no such runtime, or codes that are not those that were made.
            MissingError: the runtime is not installed.
        """
        require_codes(graph)
        self._row = shared_runtime(runtime, purpose="an int8 backbone")
        self.graph, self._threads, self._store = graph, threads, store
        self._network = self._open({})
        self._parts = dict[tuple[str, ...], PartRunner]()  # that put out maps, by what they put out
        self._fast = weakref.WeakSet[Runner]()  # tasks that take memory of their own for it

    @property
    def own_bytes(self) -> int:
        """About what the tasks that are bound take of memory beside the backbone and their slots."""
        return len(self._fast) * self._network.own_bytes

    def _open(self, codes: Mapping[str, NpArray]) -> SharedRunner:
        if self._row.open_int8 is None:
            raise InputError(option("runtime"), f"has no int8 backbone on {self._row.name}")
        return self._row.open_int8(self.graph, self._threads, codes, self._store, self._row.where)

    def bind(self, delta: Delta, *, alone: bool = False, room_bytes: int | None = None) -> TaskNetwork:
        """A task, ready to run; from one bound task to another there is nothing to switch.

        Args:
            alone: the backbone is closed with it.
            room_bytes: memory that is left for what the task takes to run at full speed; None is no limit. On ONNX
                Runtime a ConvNet's task that has not that much takes about 1.7 times as long.

        Raises:
            BackboneError, InputError: as ``task_slots``.
        """
        heads = map_heads_of(delta)
        if heads:
            return self._bind_maps(delta, heads, alone=alone)
        slots = task_slots(self.graph, delta)
        own = self._open(slots.codes) if slots.codes else None
        closed = (*((own,) if own else ()), *((self._network,) if alone else ()))
        light = own is None and room_bytes is not None and room_bytes < self._network.own_bytes
        bound = (own or self._network).bind(slots, light=light)
        if not light:
            self._fast.add(bound)
        return TaskNetwork(bound, delta.head.in_float32, alone_on=closed)

    def _bind_maps(self, delta: Delta, heads: Sequence[MapHead], *, alone: bool) -> TaskNetwork:
        """A task whose heads read maps: those are put out by another network of the same codes."""
        reads, places = reads_of(heads), [each.map for each in self.graph.maps]
        graph, fitted, own = self.graph, fit_int8(self.graph, delta, self._row.name), list[PartRunner]()
        if fitted.tensors or reads not in self._parts:
            part = opened(self._row, fitted.part, fitted.tensors, self._threads)
            if fitted.tensors:
                own.append(part)
            else:
                self._parts[reads] = part
        bound = (own[0] if own else self._parts[reads]).bind(fitted.slots)
        runner = open_heads(
            self._row, heads, graph.maps, graph.width, bound, threads=self._threads,
            closes=(*own, *(self._parts.values() if alone else ())),
        )  # fmt: skip
        shapes = answer_shapes(heads, places, graph.width)
        return TaskNetwork(runner, None, alone_on=(self._network,) if alone else (), shapes=shapes)

    def close(self) -> None:
        """Give the backbone back, once no bound task runs any more."""
        self._network.close()
        for part in self._parts.values():
            part.close()


def scores_of(logits: NpArray) -> NpArray:
    """Softmax of one image's logits (C,), in float64."""
    shifted = np.exp(logits.astype(np.float64) - float(logits.max()))
    scores: NpArray = shifted / shifted.sum()
    return scores


def require_probe(network: TaskNetwork, delta: Delta, precision: StoredPrecision = "fp32") -> None:
    """Ask a task for the answers that its pack carries, on this machine; one that carries none is not asked.

    Raises:
        CheckError: an answer is further off than the pack allows, or not finite.
    """
    probe = delta.probes.get(precision)
    if probe is None:
        return
    classes = [len(head.labels) for head in map_heads_of(delta)] or [len(delta.labels)]
    told = told_apart(network.each(probe.images(delta.preprocess)), probe.seed, classes)
    missed = float(np.abs(told - probe.logits).max())
    if not missed <= probe.tolerance:
        raise CheckError(
            f"task {delta.task!r} on {network.runtime}, {precision}",
            f"must answer its own probe within {probe.tolerance:.2g} on logits",
            got=f"{missed:.2g}",
            fix="do not serve it from here: the pack, the backbone or the runtime is not what it was made with",
        )
