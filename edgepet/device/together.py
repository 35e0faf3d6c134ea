"""Several tasks on one image: what none of them changes is computed once, and each goes on from there by itself.

Every task leaves the trunk at the last cut before which it changes nothing. The trunk is computed from cut to cut; a
task that changes nothing at all, a linear probe, reads the trunk's features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgepet.device.fitting import Fitted, opened
from edgepet.device.runner import BoundPart, PartRunner
from edgepet.device.runtime import TaskNetwork
from edgepet.device.runtimes import Runtime, shared_runtime
from edgepet.graphs.cuts import Cut, last_before
from edgepet.graphs.parts import Boundary, Part
from edgepet.spec import NpArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A stretch of the backbone that is computed once for an image: its last layer, and the tasks that it is for."""

    after: str
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A stretch of the trunk, and the tasks that leave it there: their networks, None where it put out the features."""

    network: BoundPart
    after: str
    tasks: dict[str, BoundPart | None]


class Together:
    """Networks of several tasks, opened so that they share what they can: images to each task's logits.

    A context manager.
    """

    def __init__(
        self, trunk: Part, own: Mapping[str, NpArray], tasks: Mapping[str, Fitted], *, runtime: str | Runtime,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        """Open everything; ``threads`` None is all cores.

        Args:
            trunk: the backbone's own graph, with ``own`` as its slots.

        Raises:
            InputError: no such runtime, or it cannot open a stretch.
            MissingError: the runtime is not installed.
        """
        self._row, self._threads = shared_runtime(runtime, purpose="tasks together"), threads
        self.runtime, self.executed = self._row.name, trunk.precision
        self._tasks, self._networks = dict(tasks), dict[object, PartRunner]()
        self._whole, self._steps = dict[str, BoundPart](), list[_Step]()
        try:
            self._open(trunk, own, trunk.cuts if len(tasks) > 1 else ())
        except BaseException:
            self.close()
            raise

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._tasks)

    @property
    def shared(self) -> tuple[Shared, ...]:
        """The stretches that are computed once, in their order, where that is for more than one task."""
        left = [tuple(name for later in self._steps[k:] for name in later.tasks) for k in range(len(self._steps))]
        told = (Shared(after=step.after, tasks=tasks) for step, tasks in zip(self._steps, left, strict=True))
        return tuple(each for each in told if len(each.tasks) > 1)

    def __call__(self, images: NpArray) -> dict[str, NpArray]:
        """Logits, float32 (n, C), of each task for preprocessed float32 images (n, 3, H, W), finite or not.

        Raises:
            InputError: another dtype or shape.
        """
        found = {name: network(images) for name, network in self._whole.items()}
        flowing = images
        for step in self._steps:
            flowing = step.network(flowing)
            found |= {name: flowing if tail is None else tail(flowing) for name, tail in step.tasks.items()}
        return {name: task.head(found[name]) for name, task in self._tasks.items()}

    def of(self, task: str) -> TaskNetwork:
        """One of the tasks by itself: what others need alone is not computed. Closing it leaves all open."""
        return TaskNetwork(_OneOf(self, task), self._tasks[task].head)

    def features(self, task: str, images: NpArray) -> NpArray:
        """Pooled features, float32 (n, d), of one task."""
        if task in self._whole:
            return self._whole[task](images)
        flowing = images
        for step in self._steps:
            flowing = step.network(flowing)
            if task in step.tasks:
                tail = step.tasks[task]
                return flowing if tail is None else tail(flowing)
        raise KeyError(task)

    def close(self) -> None:
        """Give every network back."""
        for bound in (*self._whole.values(), *(step.network for step in self._steps)):
            bound.close()
        for network in self._networks.values():
            network.close()
        self._whole, self._steps, self._networks = {}, [], {}

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, trunk: Part, own: Mapping[str, NpArray], found: Sequence[Cut]) -> None:
        leaving = {name: last_before(found, task.changed) for name, task in self._tasks.items()}
        ends = [name for name, task in self._tasks.items() if not task.changed]
        rest, boundary, here = trunk, None, dict[str, BoundPart | None]()
        for cut in found:
            names = [name for name, left in leaving.items() if left is cut and name not in ends]
            if not names:
                continue
            stretch = rest.until(cut)
            network = self._network(("trunk", cut.name), stretch, {}).bind(own)
            crossed = _crossed(network, stretch, cut)
            if crossed is None:  # something goes around this cut: those tasks go on from the one before
                network.close()
            else:
                rest, boundary, here = rest.behind(crossed), crossed, {}
                self._steps.append(_Step(network, cut.after, here))
            for name in names:
                (here if self._steps else self._whole)[name] = self._tail(name, boundary)
        for name, left in leaving.items():
            if left is None and name not in ends:
                self._whole[name] = self._tail(name, None)
        if ends:
            network = self._network(("trunk", rest.puts_out), rest, {}).bind(own)
            self._steps.append(_Step(network, rest.puts_out, dict.fromkeys(ends)))

    def _tail(self, name: str, boundary: Boundary | None) -> BoundPart:
        task = self._tasks[name]
        part = task.part if boundary is None else task.part.behind(boundary)
        tensors = {key: tensor for key, tensor in task.tensors.items() if key in part.file.tensors}
        form = name if tensors else tuple(sorted((key, value.shape) for key, value in task.slots.items()))
        return self._network((part.reads, form), part, tensors).bind(task.slots)

    def _network(self, key: object, part: Part, tensors: Mapping[str, NpArray]) -> PartRunner:
        """The stretch, opened; tasks in slots of the same names and shapes run on one."""
        if key not in self._networks:
            self._networks[key] = opened(self._row, part, tensors, self._threads)
        return self._networks[key]


class _OneOf:
    """One task of several, as a runner of its features."""

    def __init__(self, together: Together, task: str) -> None:
        self._together, self._task = together, task
        self.runtime, self.executed = together.runtime, together.executed

    @property
    def evidence(self) -> Mapping[str, object]:
        """Nothing that the runtime says of all of it at once."""
        return {}

    def __call__(self, images: NpArray) -> NpArray:
        return self._together.features(self._task, images)

    def close(self) -> None:
        """All stay open."""


def _crossed(network: BoundPart, stretch: Part, cut: Cut) -> Boundary | None:
    """What goes through ``cut``, seen for one image and for two; None where it is not one thing for each image."""
    seen = [network.outputs(np.zeros((count, *stretch.shape), np.float32)) for count in (1, 2)]
    for count, (carried, *sizes) in enumerate(seen, start=1):
        if carried.shape[:1] != (count,) or any(size.size != 1 or size.item() != count for size in sizes):
            return None
    (one, *sizes), (two, *_) = seen
    if one.shape[1:] != two.shape[1:] or any(size.ndim > 1 for size in sizes):
        return None
    shapes = {name: size.shape for name, size in zip(cut.sizes, sizes, strict=True)}
    return Boundary(name=cut.name, shape=one.shape[1:], dtype=cut.dtype, sizes=shapes)
