"""One batch, many tasks: images that belong to different tasks go through the backbone in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgepet.deltas.delta import Delta, Head
from edgepet.device.fitting import fit_int8, opened
from edgepet.device.runner import BoundPart
from edgepet.device.runtimes import DEFAULT, RUNTIMES, Runtime, shared_runtime
from edgepet.errors import InputError
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.dense_slots import UnslottedError, alike, dense_slots
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.mixed_slots import Mixture, Shape, UnmixedError, meeting, mixed, showing
from edgepet.graphs.parts import Part, part_of
from edgepet.spec import NpArray

_KEPT = 4  # batches whose slots stay laid out, by the tasks of their images
_Slots = Mapping[str, NpArray]


class Mixed:
    """A network that takes one task for each image. A context manager."""

    def __init__(
        self, mixture: Mixture, slots: Mapping[str, _Slots], heads: Mapping[str, Head], *, runtime: str | Runtime,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        """Open it; ``threads`` None is all cores.

        Args:
            slots, heads: by task.

        Raises:
            InputError: of ``together.opened``.
            MissingError: the runtime is not installed.
        """
        row = shared_runtime(runtime, purpose="one batch of several tasks")
        self._mixture, self._slots, self._heads = mixture, slots, heads
        self._network = opened(row, mixture.part, {}, threads)
        self._bound = dict[tuple[str, ...], BoundPart]()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._heads)

    def __call__(self, images: NpArray, tasks: Sequence[str]) -> list[NpArray]:
        """Logits, float32 (C,), finite or not, of each of preprocessed float32 images (n, 3, H, W) for its own task.

        Raises:
            InputError: another dtype or shape.
        """
        features = self._with_slots_of(tuple(tasks))(images)
        return [self._heads[task](features[k : k + 1])[0] for k, task in enumerate(tasks)]

    def close(self) -> None:
        """Give it back."""
        for bound in self._bound.values():
            bound.close()
        self._bound = {}
        self._network.close()

    def __enter__(self) -> Mixed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _with_slots_of(self, tasks: tuple[str, ...]) -> BoundPart:
        """The network with the slots of a batch; those of the last few batches stay."""
        bound = self._bound.pop(tasks, None)
        if bound is None:
            while len(self._bound) >= _KEPT:
                self._bound.pop(next(iter(self._bound))).close()
            bound = self._network.bind(self._mixture.stacked([self._slots[task] for task in tasks]))
        self._bound[tasks] = bound
        return bound


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixable:
    """Tasks on one graph: ``network`` takes those that can share a call, None where no two can; ``unmixed`` are the
    others, and why.
    """

    network: Mixed | None
    unmixed: Mapping[str, str]


def mix(
    graph: BaseGraph | Int8Graph, tasks: Mapping[str, Delta], *, runtime: str | Runtime, threads: int | None = None
) -> Mixable:
    """Open one network for as many of ``tasks`` as can share a call; ``threads`` None is all cores.

    Raises:
        InputError: a task does not fit; else as ``Mixed``.
        MissingError: the runtime is not installed.
    """
    row = shared_runtime(runtime, purpose="one batch of several tasks")
    part, own, why = part_of(graph, row.name), dict[str, _Slots](), dict[str, str]()
    for name, delta in tasks.items():
        try:
            own[name] = _slots_of(graph, part, delta, row.name)
        except (UnslottedError, UnmixedError) as error:
            why[name] = _told(error)
    while len(own) > 1:
        same = list(own.values()) if isinstance(graph, Int8Graph) else alike(graph, part.file, list(own.values()))
        shapes = {name: slot.shape for name, slot in same[0].items()}
        with_slots = part if isinstance(graph, Int8Graph) else part.with_slots(shapes)
        try:
            mixture = mixed(with_slots, shapes, _seen(with_slots, same[0]))
        except UnmixedError as error:
            out = [name for name, slots in own.items() if _has(slots, error.where)] or list(own)
            why |= dict.fromkeys(out, _told(error))
            own = {name: slots for name, slots in own.items() if name not in out}
            continue
        heads = {name: tasks[name].head.in_float32 for name in own}
        by_task = dict(zip(own, same, strict=True))
        return Mixable(network=Mixed(mixture, by_task, heads, runtime=row, threads=threads), unmixed=why)
    return Mixable(network=None, unmixed=why)


def _slots_of(graph: BaseGraph | Int8Graph, part: Part, delta: Delta, runtime: str) -> _Slots:
    if isinstance(graph, BaseGraph):
        return dense_slots(graph, part.file, delta)
    fitted = fit_int8(graph, delta, runtime)
    if fitted.tensors:
        raise UnmixedError(next(iter(fitted.tensors)), "is its own, and a product in int8 has one for all images")
    return fitted.slots


def _has(slots: _Slots, slot: str) -> bool:
    """Whether a task brings a slot, or another one of the same weight."""
    weight = slot.rpartition(".")[0]
    return any(name in (slot, weight) or name.rpartition(".")[0] == weight for name in slots)


def _told(error: InputError) -> str:
    return f"{error.where}: {error.what}"


def _seen(part: Part, slots: _Slots) -> dict[str, Shape]:
    """The shapes behind the axis of images of what meets slots, as one image and two show them."""
    names = meeting(part, tuple(slots))
    if not names:
        return {}
    network = opened(RUNTIMES[DEFAULT], showing(part, names), {}, 1)
    try:
        bound = network.bind(slots)
        one, two = (bound.outputs(np.zeros((count, *part.shape), np.float32)) for count in (1, 2))
    finally:
        network.close()
    found = zip(names, one, two, strict=True)
    return {
        name: tuple(a[1:].tolist())
        for name, a, b in found
        if a[:1] == 1 and b[:1] == 2 and np.array_equal(a[1:], b[1:])
    }
