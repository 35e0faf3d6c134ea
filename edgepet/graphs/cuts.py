"""Where a graph can be cut in two: tensors that alone carry the images on, such as what goes from block to block.

What lies before a cut is the same for all tasks that change nothing there: a device computes it once for an image.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from edgepet.graphs.onnx_file import Node, OnnxFile

_SHAPE = "Shape"
# Of sizes these make sizes, int64; whatever else reads one of them computes with it.
_ON_SIZES = frozenset(("Add", "Concat", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub",
                       "Unsqueeze"))  # fmt: skip
_CODES = frozenset(("QLinearAdd", "QLinearConv", "QLinearMul", "QLinearSigmoid"))  # put out uint8
_NOT_FLOAT = frozenset(("ArgMax", "Cast", "DynamicQuantizeLinear", "Equal", "QuantizeLinear", "TopK"))


@dataclass(frozen=True, slots=True)
class Cut:
    """A place in a graph: ``name`` is the one tensor, of ``dtype``, that goes through it: numbers, or their codes.

    ``sizes`` are beside it, integers that what lies behind reads, of the number of images say. ``before`` are the
    tensors and inputs, but for the images, that what lies before it reads; ``after`` is the last layer there.
    """

    name: str
    sizes: tuple[str, ...]
    before: frozenset[str]
    after: str
    dtype: str = "float32"


def cuts(file: OnnxFile, images: str) -> tuple[Cut, ...]:
    """Every place where ``file``, which reads ``images``, can be cut, in the order in which it runs."""
    return tuple(_cuts(file, images))


def last_before(found: Iterable[Cut], changed: Collection[str]) -> Cut | None:
    """The last of the cuts before which no tensor of ``changed`` is read, or None where there is none."""
    chosen = None
    for cut in found:
        if not cut.before.isdisjoint(changed):
            break
        chosen = cut
    return chosen


def _cuts(file: OnnxFile, images: str) -> Iterator[Cut]:
    last = {name: place for place, node in enumerate(file.nodes) for name in node.reads}
    last |= dict.fromkeys(file.outputs, len(file.nodes))
    flow, constant = _Flow({images: "images"}), dict[str, frozenset[str]]()  # and what each constant is made of
    live, before, after = {images}, set[str](), images
    for place, node in enumerate(file.nodes):
        read = frozenset[str]().union(*(constant.get(name, frozenset((name,))) for name in node.reads if name))
        kind = flow.of(node)
        if kind is None:
            constant |= dict.fromkeys(node.puts_out, read)
            continue
        before |= read - flow.kinds.keys()
        after = max(filter(None, map(_layer_of, read - flow.kinds.keys())), default=after)
        flow.kinds |= dict.fromkeys(node.puts_out, kind)
        live |= {name for name in node.puts_out if name in last}
        live = {name for name in live if last[name] > place}
        carrying = [name for name in live if flow.kinds[name] == "images"]
        if len(carrying) != 1 or node.operator in _NOT_FLOAT:
            continue
        if carrying[0] in node.puts_out and carrying[0] not in file.outputs:
            dtype = "uint8" if node.operator in _CODES else "float32"
            yield Cut(carrying[0], tuple(sorted(live - set(carrying))), frozenset(before), after, dtype)


def _layer_of(name: str) -> str:
    """The layer whose tensor has this name; what an exporter or a pass makes is of none."""
    return "" if name.startswith("edgepet.") else name.removesuffix(".codes").rpartition(".")[0]


@dataclass(slots=True)
class _Flow:
    """What is known of tensors that depend on the images: whether they are sizes alone."""

    kinds: dict[str, Literal["images", "sizes"]]

    def of(self, node: Node) -> Literal["images", "sizes"] | None:
        """What ``node`` puts out; None does not depend on the images."""
        found = {self.kinds[name] for name in node.reads if name in self.kinds}
        if not found:
            return None
        if node.operator == _SHAPE or (found == {"sizes"} and node.operator in _ON_SIZES):
            return "sizes"
        return "images"
