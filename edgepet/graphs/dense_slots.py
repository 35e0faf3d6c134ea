"""A task beside the float backbone: what it changes is an input of the graph, a slot, and the weights stay as they are.

Of a layer with weight W, (out, in) or (out, in, kh, kw), these come behind and before its product:

    y = steps * (W (inputs * x)) + left (right x)

with ``W.steps`` (out,), ``W.inputs`` (in,), ``W.right`` (in, r) and ``W.left`` (r, out); of a convolution they have
its axes. Any other tensor that a task changes, norms, biases, branches, is a slot under its own name. So scales, shifts
and low-rank changes need no folding and a few kilobytes; what changes a weight otherwise has to be folded. Neither
torch nor ``onnx`` is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgepet.deltas.branches import named_tensors
from edgepet.deltas.delta import Delta
from edgepet.deltas.expressions import value
from edgepet.deltas.merge import fold_all, require_fitting
from edgepet.deltas.updates import LowRank, Precompose, Push, Scale, Targeted, fold
from edgepet.errors import InputError, option
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.onnx_file import Node, OnnxFile, port
from edgepet.spec import NpArray, Target

STEPS, INPUTS, LEFT, RIGHT, BIAS = ".steps", ".inputs", ".left", ".right", ".bias"  # ends of names of slots
_LINEAR, _CONV = ("MatMul", "Gemm"), "Conv"
_MERGED = f"open the task with {option('mode', 'merged')}"


class UnslottedError(InputError):
    """A task that has to be folded: it changes a weight in a way that no slots can hold."""


@dataclass(frozen=True, slots=True)
class _Product:
    """Where a weight is multiplied: the node's place, whether it is a convolution, and in how many groups."""

    place: int
    conv: bool
    groups: int
    bias: str | None  # that the node adds by itself


def dense_slots(graph: BaseGraph, file: OnnxFile, delta: Delta) -> dict[str, NpArray]:
    """What ``delta`` puts into the slots that it needs, float32; their names and shapes are the form of its graph.

    Args:
        file: the graph's, told apart, or a part of it: what that does not read takes no slot.

    Raises:
        UnslottedError: it changes a weight otherwise than by scales and low rank.
        InputError: a slot is not finite; else as ``BaseGraph.require_fit`` and ``merge.require_fitting``.
    """
    graph.require_fit(delta)
    require_fitting(graph.base, delta)
    tensors, products = graph.base.tensors, _products(file)
    by_tensor, slots = dict[str, list[Targeted]](), dict[str, NpArray]()
    read = [targeted for targeted in delta.updates if targeted.target.tensor in file.tensors]
    for targeted in read:
        by_tensor.setdefault(targeted.target.tensor, []).append(targeted)
    for name in by_tensor.keys() & products.keys():
        slots |= _layer_slots(f"task {delta.task!r}: {name}", name, tensors[name], by_tensor[name], products[name])
    around = slots_of(slots)
    others = [targeted for targeted in read if targeted.target.tensor not in around]
    pushes = any(isinstance(targeted.update, Push) for targeted in others)
    folded = fold_all(tensors, delta.updates if pushes else others)
    slots |= {targeted.target.tensor: folded[targeted.target.tensor] for targeted in others}
    slots |= {name: tensor for name, tensor in named_tensors(delta.branches).items() if name in file.tensors}
    for name in around:
        bias, axes = products[name].bias, tensors[name].ndim
        if bias is not None:
            slots[name + BIAS] = slots.pop(bias, tensors[bias]).reshape(-1, *[1] * (axes - 2))
    return {name: _finite(name, slot, delta.task) for name, slot in slots.items()}


def slots_of(slots: Iterable[str]) -> frozenset[str]:
    """The weights that have slots around their product."""
    ends = (STEPS, INPUTS, LEFT)
    return frozenset(name.removesuffix(end) for name in slots for end in ends if name.endswith(end))


def alike(graph: BaseGraph, file: OnnxFile, tasks: Sequence[Mapping[str, NpArray]]) -> list[dict[str, NpArray]]:
    """Slots of tasks as slots of the same names and shapes: what a task leaves as it is does nothing in its slots.

    Ranks are filled up with zeros to the largest. ``tasks`` are not modified.
    """
    tensors, products = graph.base.tensors, _products(file)
    plain, shapes = dict(tensors), dict[str, tuple[int, ...]]()
    own = dict[str, str]()  # slots of biases that a node around itself adds, by the bias
    for weight in sorted(slots_of(name for task in tasks for name in task)):
        bias = products[weight].bias
        if bias is not None:
            own[bias] = weight + BIAS
            shapes[own[bias]] = (len(tensors[bias]), *[1] * (tensors[weight].ndim - 2))
            plain[own[bias]] = tensors[bias]
    given = [{own.get(name, name): slot for name, slot in task.items()} for task in tasks]
    for name, slot in ((name, slot) for task in given for name, slot in task.items()):
        if name not in own.values():
            held = shapes.get(name, slot.shape)
            shapes[name] = tuple(max(pair) for pair in zip(held, slot.shape, strict=True))
    return [{name: _filled(task.get(name), name, shape, plain) for name, shape in shapes.items()} for task in given]


def _filled(slot: NpArray | None, name: str, shape: tuple[int, ...], plain: Mapping[str, NpArray]) -> NpArray:
    """A slot in ``shape``; None is the backbone's own, that of a factor ones and of low rank zeros."""
    found = plain.get(name) if slot is None else slot
    if found is None:
        return (np.ones if name.endswith((STEPS, INPUTS)) else np.zeros)(shape, np.float32)
    if name.endswith((LEFT, RIGHT)):
        found = np.pad(found, [(0, wide - side) for side, wide in zip(found.shape, shape, strict=True)])
    return np.ascontiguousarray(found.reshape(shape), np.float32)


def with_slots(file: OnnxFile, shapes: Mapping[str, tuple[int, ...]]) -> OnnxFile:
    """``file`` with slots of these names and shapes as inputs, in the order of their names."""
    weights, products, nodes = slots_of(shapes), _products(file), list[Node]()
    places = {products[name].place: name for name in weights}
    for place, node in enumerate(file.nodes):
        nodes += _around(places[place], node, shapes) if place in places else [node]
    read = {name for node in nodes for name in node.reads}
    return replace(
        file,
        nodes=tuple(nodes),
        tensors={name: data for name, data in file.tensors.items() if name in read and name not in shapes},
        inputs={**file.inputs, **{name: port(name, shape) for name, shape in sorted(shapes.items())}},
    )


def _products(file: OnnxFile) -> dict[str, _Product]:
    """Where each weight is multiplied, of those that one node multiplies and no other reads."""
    readers: dict[str, list[int]] = {}
    for place, node in enumerate(file.nodes):
        for name in node.reads:
            readers.setdefault(name, []).append(place)
    found = dict[str, _Product]()
    for name in file.tensors:
        read, places = name, readers.get(name, [])
        if len(places) == 1 and file.nodes[places[0]].operator == "Transpose":
            (read,) = file.nodes[places[0]].puts_out
            places = readers.get(read, [])
        if len(places) != 1:
            continue
        node = file.nodes[places[0]]
        if node.operator in (*_LINEAR, _CONV) and node.reads[1] == read:
            bias = node.reads[2] if len(node.reads) > 2 and node.reads[2] else None
            found[name] = _Product(places[0], node.operator == _CONV, node.integer("group", 1), bias)
    return found


def _layer_slots(
    where: str, name: str, weight: NpArray, updates: Iterable[Targeted], product: _Product
) -> dict[str, NpArray]:
    """The slots of one layer, whose updates come in the order in which they are folded."""
    channels, taps = weight.shape[1], weight.shape[2:]
    matrix = weight.reshape(len(weight), -1).astype(np.float64)
    out, columns = matrix.shape
    steps, inputs = np.ones(out), np.ones(columns)
    left, right = np.zeros((out, 0)), np.zeros((0, columns))
    for targeted in updates:
        update, target = targeted.update, targeted.target
        if isinstance(update, Scale) and update.axis == "out" and target.cols is None:
            factor = fold(targeted, np.ones(out))
            steps, left = steps * factor, left * factor[:, None]
        elif isinstance(update, Scale) and update.axis == "in" and not target.is_block:
            factor = fold(targeted, np.ones((1, columns)))[0]
            inputs, right = inputs * factor, right * factor
        elif isinstance(update, (LowRank, Precompose)):
            now = steps[:, None] * matrix * inputs + left @ right
            added = _low_rank(update, target, now)
            left, right = np.concatenate([left, added[0]], axis=1), np.concatenate([right, added[1]])
        else:
            raise UnslottedError(where, f"is changed by {type(update).__name__}, which no slot can hold", fix=_MERGED)
    slots, wide, rank = dict[str, NpArray](), (1,) * len(taps), len(right)
    if product.groups > 1 and (rank or (inputs != 1).any()):
        raise UnslottedError(where, "is a convolution in groups, whose inputs no slot can change", fix=_MERGED)
    if not rank or (steps != 1).any():
        slots[name + STEPS] = steps.reshape(out, *wide)
    if (inputs != 1).any():
        slots[name + INPUTS] = inputs.reshape(channels, -1)[:, 0].reshape(channels, *wide)
    if rank:
        slots[name + LEFT] = left.reshape(out, rank, *wide) if product.conv else left.T
        slots[name + RIGHT] = right.reshape(rank, channels, *taps) if product.conv else right.T
    return slots


def _low_rank(update: LowRank | Precompose, target: Target, now: NpArray) -> tuple[NpArray, NpArray]:
    """An update of a block of a matrix as left (out, r) and right (r, in) of the whole one, in float64."""
    rows, cols = slice(*(target.rows or (None,))), slice(*(target.cols or (None,)))
    exact = replace(update, left=value(update.left, now), right=value(update.right, now))
    if isinstance(exact, Precompose):
        inner, outer = exact.through(now[rows, cols]), np.asarray(exact.right, np.float64)
    else:
        inner = np.asarray(exact.left, np.float64)
        inner = inner if exact.core is None else inner @ value(exact.core, now)
        outer = np.asarray(exact.right, np.float64)
    left, right = np.zeros((now.shape[0], len(outer))), np.zeros((len(outer), now.shape[1]))
    left[rows], right[:, cols] = exact.scale * inner, outer
    return left, right


def _around(name: str, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> list[Node]:
    """The product of the weight ``name`` with its slots around it."""
    (put_out,), reads, made = node.puts_out, list(node.reads[:2]), list[Node]()
    images, now = reads[0], f"{name}.product"
    if name + INPUTS in shapes:
        made.append(Node("Mul", (images, name + INPUTS), (f"{name}.scaled_inputs",)))
        reads[0] = f"{name}.scaled_inputs"
    made.append(replace(node, reads=tuple(reads), puts_out=(now,)))
    if name + STEPS in shapes:
        made.append(Node("Mul", (now, name + STEPS), (f"{name}.scaled",)))
        now = f"{name}.scaled"
    if name + LEFT in shapes:
        conv = node.operator == _CONV
        down = replace(node.nameless, reads=(images, name + RIGHT), puts_out=(f"{name}.down",))
        made.append(down if conv else Node("MatMul", down.reads, down.puts_out))
        made.append(Node(_CONV if conv else "MatMul", (f"{name}.down", name + LEFT), (f"{name}.up",)))
        made.append(Node("Add", (now, f"{name}.up"), (f"{name}.changed",)))
        now = f"{name}.changed"
    if len(node.reads) > 2 and node.reads[2]:
        made.append(Node("Add", (now, name + BIAS), (f"{name}.shifted",)))
    return [*made[:-1], replace(made[-1], puts_out=(put_out,))]


def _finite(name: str, slot: NpArray, task: str) -> NpArray:
    if not np.isfinite(slot).all():
        raise InputError(f"task {task!r}: {name}", "must be finite", got="NaN or infinity")
    return np.ascontiguousarray(slot, np.float32)
