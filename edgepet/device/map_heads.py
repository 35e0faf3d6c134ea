"""A task whose head reads maps, on a runtime: the backbone's graph puts them out, the head is a small one behind.

The head's session belongs to one task, and the network before it may be that of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import MapHead
from edgepet.deltas.joined import as_rows, reads_of
from edgepet.deltas.layers import Shape
from edgepet.device.runner import BoundPart, HeadRunner, PartRunner
from edgepet.device.runtimes import Runtime
from edgepet.errors import InputError, option
from edgepet.graphs.head_graph import head_file
from edgepet.graphs.maps import GraphMap
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray


def map_heads_of(delta: Delta) -> tuple[MapHead, ...]:
    """The heads of ``delta`` that read maps, none where it is a classifier.

    Raises:
        InputError: it is a classifier and has such heads, two of them answer alike, or its input leaves out pixels of
            an image.
    """
    heads = tuple(each.head for each in delta.heads)
    if len(set(delta.answers)) < len(delta.answers) or (delta.labels and heads):
        names = format_names([*(["class"] if delta.labels else []), *(head.name for head in heads)])
        what = "must be a classifier, or have one head for each answer, to be run here"
        raise InputError(f"task {delta.task!r}", what, got=names)
    if not heads:
        return ()
    crop, part = delta.preprocess.crop, delta.preprocess.crop_fraction
    if (crop, part) != ("squash", 1.0):
        told = {
            "mask": "have a label for every pixel",
            "boxes": "find every object",
            "labels": "name all that is there",
        }
        what = f"must see all of an image to {told[heads[0].answer]}"
        raise InputError(f"task {delta.task!r}", what, got=f"crop {crop!r} of {part:g}")
    return heads


def map_head_of(delta: Delta) -> MapHead | None:
    """The one head of ``delta`` where it reads maps, None where it is a classifier.

    Raises:
        InputError: it has several heads; else as ``map_heads_of``.
    """
    heads = map_heads_of(delta)
    if len(heads) > 1:
        names = format_names([head.name for head in heads])
        raise InputError(f"task {delta.task!r}", "must have one head here", got=names)
    return heads[0] if heads else None


class WithHead:
    """A network that puts out maps, and heads behind it: images to what they answer, as of ``MapHead``, in ``as_rows``.

    Several heads are one graph: the network runs once, and so does that.
    """

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
        return as_rows(self._head(given))

    def close(self) -> None:
        """Give the head back, and what of the network is this task's alone."""
        self._head.close()
        self._network.close()
        for network in self._closes:
            network.close()


def open_heads(
    row: Runtime, heads: Sequence[MapHead], maps: Sequence[GraphMap], width: int, network: BoundPart, *,
    threads: int | None, closes: Sequence[PartRunner] = (),
) -> WithHead:  # fmt: skip
    """``heads`` behind a network that puts out ``reads_of`` them, of a backbone with these maps and ``width`` features.

    Raises:
        InputError: the runtime opens no heads, or not these; or as ``MapHead.shapes``.
    """
    if row.open_head is None:
        raise InputError(option("runtime"), f"runs no head that reads maps on {row.name}")
    places = [each.map for each in maps]
    shapes = {name: shape for head in heads for name, shape in head.shapes(places, width=width).items()}
    runner = row.open_head(head_file(heads, places, width), threads, row.where)
    return WithHead(network, runner, {name: shapes[name] for name in reads_of(heads)}, closes=closes)
