"""A task whose head reads maps, on a runtime: the backbone's graph puts them out, the head is a small one behind.

The head's session belongs to one task, and the network before it may be that of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import MapHead
from edgepet.deltas.layers import Shape
from edgepet.device.runner import BoundPart, HeadRunner, PartRunner
from edgepet.device.runtimes import Runtime
from edgepet.errors import InputError, option
from edgepet.graphs.head_graph import head_file
from edgepet.graphs.maps import GraphMap
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray


def map_head_of(delta: Delta) -> MapHead | None:
    """The head of ``delta`` where it reads maps, None where it is a classifier.

    Raises:
        InputError: it has several heads, or one that reads maps and an input that leaves out pixels of an image.
    """
    if len(delta.answers) > 1:
        names = format_names([*(["class"] if delta.labels else []), *(each.head.name for each in delta.heads)])
        raise InputError(f"task {delta.task!r}", "must have one head to be run here", got=names)
    if not delta.heads:
        return None
    crop, part = delta.preprocess.crop, delta.preprocess.crop_fraction
    if (crop, part) != ("squash", 1.0):
        told = {
            "mask": "have a label for every pixel",
            "boxes": "find every object",
            "labels": "name all that is there",
        }
        what = f"must see all of an image to {told[delta.heads[0].head.answer]}"
        raise InputError(f"task {delta.task!r}", what, got=f"crop {crop!r} of {part:g}")
    return delta.heads[0].head


class WithHead:
    """A network that puts out maps, and the head behind it: images to what the head answers, as of ``MapHead``."""

    def __init__(
        self, network: BoundPart, head: HeadRunner, reads: Mapping[str, Shape], *, closes: Sequence[PartRunner] = ()
    ) -> None:
        # ``reads``: the shape for one image of all that the network puts out, in its order; ``closes`` are this task's.
        self._network, self._head, self._reads, self._closes = network, head, dict(reads), closes
        self.runtime, self.executed = network.runtime, network.executed

    @property
    def evidence(self) -> Mapping[str, object]:
        """That of the network; the head is computed in fp32."""
        return self._network.evidence

    def __call__(self, images: NpArray) -> NpArray:
        given = dict(zip(self._reads, self._network.outputs(images), strict=True))
        for name, shape in self._reads.items():
            if given[name].shape != (len(images), *shape):
                what, fix = f"must be (n, {', '.join(map(str, shape))})", "delete the graph and make it again"
                raise InputError(name, what, got=given[name].shape, fix=fix)
        return self._head(given)

    def close(self) -> None:
        """Give the head back, and what of the network is this task's alone."""
        self._head.close()
        self._network.close()
        for network in self._closes:
            network.close()


def open_head(
    row: Runtime, head: MapHead, maps: Sequence[GraphMap], width: int, network: BoundPart, *, threads: int | None,
    closes: Sequence[PartRunner] = (),
) -> WithHead:  # fmt: skip
    """``head`` behind a network that puts out ``head.inputs``, of a backbone with these maps and ``width`` features.

    Raises:
        InputError: the runtime opens no heads, or not this one; or as ``MapHead.shapes``.
    """
    if row.open_head is None:
        raise InputError(option("runtime"), f"runs no head that reads maps on {row.name}")
    places = [each.map for each in maps]
    shapes = head.shapes(places, width=width)
    runner = row.open_head(head_file(head, places, width), threads, row.where)
    return WithHead(network, runner, {name: shapes[name] for name in head.inputs}, closes=closes)
