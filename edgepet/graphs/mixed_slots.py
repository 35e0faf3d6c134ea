"""One batch of several tasks: slots that have an axis for the images in front, so that each image meets its own task's.

A slot that is added or multiplied number by number becomes (n, 1, ..., c), a matrix (n, in, out): its product is one of
each image with its own. A layer norm that a task changes is written without its affine part, which stands behind it, as
do biases that a node adds by itself, and on codes the scales: a node that makes or multiplies them has scales of one.
What else reads a slot has one for all images, and such tasks run one after the other. Neither torch nor ``onnx`` is
needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from edgepet.errors import InputError
from edgepet.graphs.onnx_file import Node, OnnxFile, port, tensor_of
from edgepet.graphs.parts import Part
from edgepet.spec import NpArray

Shape: TypeAlias = "tuple[int, ...]"

_NUMBER_BY_NUMBER = frozenset(("Add", "Div", "Expand", "Mul", "Sub"))  # an axis more in front goes through them
_ADDS_THIRD = frozenset(("Conv", "Gemm"))
_ON_CODES = frozenset(("DequantizeLinear", "MatMulIntegerToFloat", "QuantizeLinear"))
_BATCH = "batch"


class UnmixedError(InputError):
    """A task that shares no call with others: something reads one slot for all images."""


@dataclass(frozen=True, slots=True)
class Laid:
    """How a task's slot lies in a batch: turned where it is, ``times`` another one, in this shape behind the images."""

    slot: str
    shape: Shape
    turned: bool = False
    times: str | None = None

    def of(self, slots: Mapping[str, NpArray]) -> NpArray:
        """One task's."""
        slot = slots[self.slot] if self.times is None else slots[self.slot] * slots[self.times]
        return (slot.T if self.turned else slot).reshape(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixture:
    """A stretch whose slots have an axis for the images, and how a task's slots come into it."""

    part: Part
    laid: Mapping[str, Laid]

    def stacked(self, tasks: Sequence[Mapping[str, NpArray]]) -> dict[str, NpArray]:
        """The slots, float32 (n, ...), of a batch whose images belong to these tasks in this order."""
        return {name: np.stack([how.of(task) for task in tasks]) for name, how in self.laid.items()}


def meeting(part: Part, slots: Collection[str]) -> tuple[str, ...]:
    """What nodes put out that read one of ``slots``: ``mixed`` must know the shapes."""
    turned = _turned(part.file, slots)
    wanted = {*slots, *turned}
    return tuple(
        node.puts_out[0]
        for node in part.file.nodes
        if node.puts_out[0] not in turned and not wanted.isdisjoint(node.reads)
    )


def showing(part: Part, names: Sequence[str]) -> Part:
    """``part``, but that it puts out the shapes of these tensors, int64 each, instead of its own outputs."""
    ends = {f"{name}.shape": port(f"{name}.shape", None, "int64") for name in names}
    shapes = tuple(Node("Shape", (name,), (f"{name}.shape",)) for name in names)
    file = replace(part.file, nodes=(*part.file.nodes, *shapes))
    reads = {part.reads: part.file.inputs[part.reads]}
    return replace(part, file=file.between(reads, ends), puts_out=f"{names[0]}.shape")


def mixed(part: Part, slots: Mapping[str, Shape], seen: Mapping[str, Shape]) -> Mixture:
    """``part``, whose slots have these shapes, as one whose slots have an axis for the images in front.

    Args:
        seen: of what ``meeting`` names the shape behind that axis; what does not begin with it is not there.

    Raises:
        UnmixedError: something reads a slot that has one for all images.
    """
    mixing = _Mixing(slots, seen, _turned(part.file, slots), part.file.tensors.keys())
    nodes = tuple(made for node in part.file.nodes for made in mixing.around(node))
    inputs = {name: data for name, data in part.file.inputs.items() if name not in slots}
    ones = {_ones(shape): tensor_of(_ones(shape), np.ones(shape, np.float32)) for shape in mixing.ones}
    file = replace(
        part.file,
        nodes=nodes,
        tensors={**part.file.tensors, **ones},
        inputs={**inputs, **{name: port(name, (_BATCH, *how.shape)) for name, how in mixing.laid.items()}},
    )
    return Mixture(part=replace(part, file=file), laid=mixing.laid)


def _ones(shape: Shape) -> str:
    """A tensor of ones: no layer norm's weight, or scales that are none."""
    return f"edgepet.ones.{'x'.join(map(str, shape))}"


def _turned(file: OnnxFile, slots: Collection[str]) -> dict[str, str]:
    """Slots by what a node puts out that turns them: matrices of branches."""
    return {n.puts_out[0]: n.reads[0] for n in file.nodes if n.operator == "Transpose" and n.reads[0] in slots}


class _Mixing:
    """Nodes as they are for a batch of several tasks, and what was found of slots on the way."""

    def __init__(
        self, slots: Mapping[str, Shape], seen: Mapping[str, Shape], turned: Mapping[str, str], tensors: Collection[str]
    ) -> None:
        self._slots, self._seen, self._turned, self._tensors = slots, seen, turned, tensors
        self._behind_product = dict[str, str]()  # steps of a weight's outputs, by what multiplies
        self.laid, self.ones = dict[str, Laid](), set[Shape]()

    def around(self, node: Node) -> Iterator[Node]:
        """``node`` itself, or what computes the same where each image has its own slots."""
        read = [name for name in node.reads if name in self._slots or name in self._turned]
        if not read:
            yield node
        elif node.puts_out[0] in self._turned:
            return
        elif node.operator in _NUMBER_BY_NUMBER and len(read) == 1:
            yield self._renamed(node, {read[0]: self._beside(read[0], node)})
        elif node.operator == "MatMul" and read == [node.reads[1]]:
            yield self._renamed(node, {read[0]: self._matrix(read[0], node)})
        elif node.operator == "LayerNormalization" and node.reads[0] not in read:
            yield from self._norm(node)
        elif node.operator in _ADDS_THIRD and read == [*node.reads[2:3]]:
            yield from self._behind(node, node.reads[:2], read[0], steps=self._behind_product.get(node.reads[1]))
        elif node.operator in _ON_CODES and node.reads[0] not in read:
            yield from self._coded(node)
        else:
            raise self._refusal(read[0], node)

    def _coded(self, node: Node) -> Iterator[Node]:
        """Codes that are made, taken apart or multiplied, with scales of one, and each image's own beside that."""
        images, scale, *others = node.reads
        (put_out,), now = node.puts_out, f"{node.puts_out[0]}.plain"
        if node.operator == "MatMulIntegerToFloat":
            codes, (scale, steps, zero, zeros, *bias) = scale, others
            self.ones |= {(), self._slots[steps]}
            reads = (images, codes, _ones(()), _ones(self._slots[steps]), zero, zeros)
            yield replace(node, reads=reads, puts_out=(now,))
            then = f"{put_out}.scaled" if bias else put_out
            yield Node("Mul", (now, self._beside(steps, node, times=scale)), (then,))
            if bias:
                yield Node("Add", (then, self._beside(bias[0], node)), (put_out,))
            return
        self.ones.add(self._slots[scale])
        plain = _ones(self._slots[scale])
        if node.operator == "QuantizeLinear":
            yield Node("Div", (images, self._beside(scale, node)), (now,))
            yield replace(node, reads=(now, plain, *others))
        elif images in self._tensors:  # of a weight: its steps lie behind its product
            self._behind_product[put_out] = scale
            yield replace(node, reads=(images, plain, *others))
        else:
            yield replace(node, reads=(images, plain, *others), puts_out=(now,))
            yield Node("Mul", (now, self._beside(scale, node)), (put_out,))

    def _norm(self, node: Node) -> Iterator[Node]:
        images, weight, *bias = node.reads
        shifted = [name for name in bias if name]
        if weight not in self._slots:
            yield from self._behind(node, (images, weight), shifted[0])
            return
        self.ones.add(self._slots[weight])
        (put_out, *others), plain = node.puts_out, f"{node.puts_out[0]}.plain"
        now = f"{put_out}.scaled" if shifted else put_out
        yield replace(node, reads=(images, _ones(self._slots[weight])), puts_out=(plain, *others))
        yield Node("Mul", (plain, self._beside(weight, node)), (now,))
        for bias_name in shifted:
            again = self._beside(bias_name, node) if bias_name in self._slots else bias_name
            yield Node("Add", (now, again), (put_out,))

    def _behind(self, node: Node, reads: Sequence[str], slot: str, *, steps: str | None = None) -> Iterator[Node]:
        """``node``, which reads no slot, and its bias behind it; ``steps`` come before that."""
        put_out, now = node.puts_out[0], f"{node.puts_out[0]}.plain"
        conv = node.operator == "Conv"
        yield replace(node, reads=tuple(reads), puts_out=(now, *node.puts_out[1:]))
        if steps is not None:
            yield Node("Mul", (now, self._beside(steps, node, channels_first=conv)), (f"{put_out}.scaled",))
            now = f"{put_out}.scaled"
        yield Node("Add", (now, self._beside(slot, node, channels_first=conv)), (put_out,))

    def _beside(self, slot: str, node: Node, *, channels_first: bool = False, times: str | None = None) -> str:
        """A slot that meets what ``node`` puts out number by number, (C,) along the first axis of it if asked."""
        of, axes = self._of(slot, node), len(self._seen_of(slot, node))
        if channels_first and len(of) == 1:
            of = (*of, *[1] * (axes - 1))
        if len(of) == axes + 1 and of[0] == 1:
            of = of[1:]
        if len(of) > axes:
            raise self._refusal(slot, node)
        return self._lay(slot, node, (*[1] * (axes - len(of)), *of), times)

    def _matrix(self, slot: str, node: Node) -> str:
        of, axes = self._of(slot, node), len(self._seen_of(slot, node))
        if len(of) != 2 or axes < 2:
            raise self._refusal(slot, node)
        return self._lay(slot, node, (*[1] * (axes - 2), *of))

    def _of(self, slot: str, node: Node) -> Shape:
        if slot not in self._turned:
            return self._slots[slot]
        shape = self._slots[self._turned[slot]]
        if len(shape) != 2:
            raise self._refusal(slot, node)
        return shape[::-1]

    def _seen_of(self, slot: str, node: Node) -> Shape:
        if node.puts_out[0] not in self._seen:
            raise self._refusal(slot, node)
        return self._seen[node.puts_out[0]]

    def _lay(self, slot: str, node: Node, shape: Shape, times: str | None = None) -> str:
        own = self._turned.get(slot, slot)
        how, name = Laid(own, shape, slot in self._turned, times), own if times is None else f"{own}.times.{times}"
        if self.laid.setdefault(name, how) != how:
            raise self._refusal(slot, node)
        return name

    def _renamed(self, node: Node, names: Mapping[str, str]) -> Node:
        return replace(node, reads=tuple(names.get(name, name) for name in node.reads))

    def _refusal(self, slot: str, node: Node) -> UnmixedError:
        return UnmixedError(self._turned.get(slot, slot), f"is read by {node.operator}, which has one for all images")
