"""An update and its target: whether they fit, what is stored of them, and folding one into a tensor.

What each kind does is in ``kinds``, which this module offers as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgepet.deltas.expressions import (
    Expression,
    Factor,
    Window,
    cast,
    leaves,
    made_sizes,
    remade,
    settings,
    value,
    windows,
)
from edgepet.deltas.kinds import (
    ATTRIBUTES,
    FACTORS,
    NAMES,
    UPDATES,
    WHOLE_TENSOR,
    Add,
    Diagonal,
    Grouped,
    Kronecker,
    LowRank,
    Modulate,
    Precompose,
    Push,
    Replace,
    Scale,
    Shape,
    Update,
)
from edgepet.errors import InputError
from edgepet.spec import Array, Target

__all__ = [
    "ATTRIBUTES",
    "FACTORS",
    "NAMES",
    "UPDATES",
    "Add",
    "Diagonal",
    "Grouped",
    "Kronecker",
    "LowRank",
    "Modulate",
    "Precompose",
    "Push",
    "Replace",
    "Scale",
    "Targeted",
    "Update",
    "apart",
    "attributes",
    "check",
    "factors",
    "fold",
    "generated",
    "generated_bytes",
    "in_precision_of",
    "keeps_codes",
    "read_by",
    "require_readable",
    "shape_read_by",
    "with_arrays",
]


@dataclass(frozen=True, slots=True, eq=False)
class Targeted:
    """One update and the tensor, or block of it, that it changes. It touches nothing else; a ``Push`` reads another."""

    target: Target
    update: Update


def keeps_codes(targeted: Targeted) -> bool:
    """Whether a backbone's int8 codes stay as they are.

    They do where a weight's rows are only scaled, which are then codes of other steps, and where a vector changes,
    which has no codes.
    """
    update = targeted.update
    if isinstance(update, Scale):
        return update.axis == "out" and targeted.target.cols is None
    if isinstance(update, WHOLE_TENSOR):
        return len((update.d if isinstance(update, Add) else update.value).shape) == 1
    return isinstance(update, Push)


# ------------------------------------------------------------------------------------------------ what it is made of


def factors(update: Update) -> dict[str, Array]:
    """The stored arrays of ``update`` by name, absent ones left out; an expression's as ``left.right`` and the like."""
    return {name: array for factor, given in _given(update).items() for name, array in leaves(factor, given).items()}


def generated(update: Update) -> dict[str, Window]:
    """What of ``update`` is made from a seed, by name, beside its ``factors``."""
    return {name: window for factor, given in _given(update).items() for name, window in windows(factor, given).items()}


def generated_bytes(updates: Iterable[Targeted]) -> int:
    """What is held at once of what seeds stand for: of each the largest part that is made."""
    sizes: dict[object, int] = {}
    for targeted in updates:
        for factor in _given(targeted.update).values():
            for made, size in made_sizes(factor):
                sizes[made] = max(size, sizes.get(made, 0))
    return sum(sizes.values())


def with_arrays(update: Update, arrays: Mapping[str, Array]) -> Update:
    """``update`` with ``arrays`` in place of its own, under the names of ``factors``; permutations and bits too."""
    return replace(update, **{name: remade(given, name, arrays) for name, given in _given(update).items()})


def attributes(update: Update) -> dict[str, object]:
    """What of ``update`` is not an array: ``axis``, ``scale``, and which of its factors are what expressions."""
    plain = {name: getattr(update, name) for name in ATTRIBUTES.get(update.kind, ())}
    return plain | {n: settings(given) for n, given in _given(update).items() if isinstance(given, Expression)}


def in_precision_of(update: Update, tensor: Array) -> Update:
    """``update`` with floating-point factors in the dtype of ``tensor``; where that is torch's, as they are."""
    if not isinstance(tensor, np.ndarray):
        return update
    return replace(update, **{name: cast(given, tensor.dtype) for name, given in _given(update).items()})


def _given(update: Update) -> dict[str, Factor]:
    named = {name: getattr(update, name) for name in FACTORS[update.kind]}
    return {name: given for name, given in named.items() if given is not None}


# -------------------------------------------------------------------------------------------------- whether it fits


def check(targeted: Targeted, shape: Shape, *, where: str, fix: str | None = None, weight: Shape | None = None) -> None:
    """Refuse an update that does not fit a tensor of ``shape``.

    Args:
        weight: the shape of the tensor that a push reads, None where that is not there; no other update looks at it.

    Raises:
        InputError: a block is outside its tensor, or the factors do not fit it or one another.
    """
    target, update = targeted.target, targeted.update
    whole = isinstance(update, WHOLE_TENSOR) and target.rows is None and target.cols is None
    what, seen = (None, shape) if whole else _seen(target, shape)
    problem = what or _broken(update)
    if problem is None:
        problem = _unread(update, seen, weight) if isinstance(update, Push) else update.mismatch(seen)
    if problem is not None:
        raise InputError(f"{where}: {target}", f"{type(update).__name__} {problem}", fix=fix)


def _unread(update: Push, seen: Shape, weight: Shape | None) -> str | None:
    """Why ``update`` cannot push what it reads, a tensor of shape ``weight``, into a vector of shape ``seen``."""
    if weight is None:
        return f"reads {update.reads.tensor}, which is not there"
    what, read = _seen(update.reads, weight)
    return f"reads {update.reads} and {what}" if what else update.mismatch(seen, read)


def shape_read_by(targeted: Targeted, shapes: Mapping[str, Shape]) -> Shape | None:
    """Of ``shapes`` that of the tensor which a push reads, None where it is not there and for any other update."""
    return shapes.get(targeted.update.reads.tensor) if isinstance(targeted.update, Push) else None


def require_readable(updates: Iterable[Targeted], where: str) -> None:
    """Refuse updates that go round in circles: a push of a tensor that a push changes.

    Raises:
        InputError: there is one.
    """
    updates = tuple(updates)
    pushed = {targeted.target.tensor for targeted in updates if isinstance(targeted.update, Push)}
    for targeted in updates:
        if isinstance(targeted.update, Push) and targeted.update.reads.tensor in pushed:
            what = f"Push reads {targeted.update.reads.tensor}, which a push changes"
            raise InputError(f"{where}: {targeted.target}", what)


def _seen(target: Target, shape: Shape) -> tuple[str | None, Shape]:
    """What an update sees of a tensor of ``shape``, and why that is not there, if it is not."""
    if target.rows is None and target.cols is None:
        return None, _flat(shape)
    if not shape or (len(shape) < 2 and target.cols is not None):
        return f"needs a {'tensor with axes' if not shape else 'matrix'} for its block, got {shape}", ()
    spans = list(zip(_flat(shape), (target.rows, target.cols), strict=False))
    inside = all(span is None or span[1] <= size for size, span in spans)
    seen = tuple(size if span is None else span[1] - span[0] for size, span in spans)
    return None if inside else f"needs a block inside {_flat(shape)}", seen


def _broken(update: Update) -> str | None:
    """What is wrong with an expression of ``update`` by itself."""
    problems = (given.mismatch() for given in _given(update).values() if isinstance(given, Expression))
    return next((problem for problem in problems if problem), None)


def _flat(shape: Shape) -> Shape:
    return shape if len(shape) < 2 else (shape[0], int(np.prod(shape[1:])))


# ---------------------------------------------------------------------------------------------------------- folding


def fold(targeted: Targeted, tensor: Array, weight: Array | None = None, *, own: bool = False) -> Array:
    """Apply one update and return a new tensor of the same shape; ``tensor`` and ``weight`` are not touched.

    The factors must have been checked against ``tensor`` and be of its library and dtype. ``weight`` is the whole
    tensor that a push reads (``read_by``); no other update looks at it. With ``own`` a block of ``tensor`` itself is
    changed, and it is returned: for who has made it and keeps no other view of it.
    """
    target, given = targeted.target, targeted.update
    update = replace(given, **{name: value(factor, tensor) for name, factor in _given(given).items()})
    blocked = target.is_block
    if isinstance(update, WHOLE_TENSOR) and not blocked:
        return update.fold(tensor)

    def changed(part: Array) -> Array:
        return update.fold(part, _cut(weight, update.reads)) if isinstance(update, Push) else update.fold(part)

    matrix = _matrix(tensor)
    in_place = isinstance(update, LowRank) and isinstance(matrix, np.ndarray)
    if not blocked and not in_place:
        return changed(matrix).reshape(tensor.shape)
    whole = matrix if own else matrix * 1
    if isinstance(update, LowRank) and in_place:
        update.fold_into(whole[_block(target, matrix)])
    else:
        whole[_block(target, matrix)] = changed(_cut(tensor, target))
    return whole.reshape(tensor.shape)


def apart(updates: Iterable[Targeted]) -> tuple[list[Targeted], list[Targeted]]:
    """Updates of the tensors that no push changes, and those of the others, each in order: to be folded one by one.

    What a push reads is done when the first ones are (``require_readable``).
    """
    updates = list(updates)
    pushed = {targeted.target.tensor for targeted in updates if isinstance(targeted.update, Push)}
    first = [targeted for targeted in updates if targeted.target.tensor not in pushed]
    return first, [targeted for targeted in updates if targeted.target.tensor in pushed]


def read_by(targeted: Targeted, frozen: Mapping[str, Array], changed: Mapping[str, Array]) -> Array | None:
    """The tensor that a push reads, as ``frozen`` has it or, where it is there, as ``changed`` has it; else None."""
    update = targeted.update
    if not isinstance(update, Push):
        return None
    name = update.reads.tensor
    return changed[name] if update.of == "updated" and name in changed else frozen[name]


def _matrix(tensor: Array) -> Array:
    return tensor if tensor.ndim == 1 else tensor.reshape(tensor.shape[0], -1)


def _block(target: Target, matrix: Array) -> tuple[slice, ...]:
    return tuple(slice(*span) if span else slice(None) for span in (target.rows, target.cols)[: matrix.ndim])


def _cut(tensor: Array, target: Target) -> Array:
    """The matrix or vector that ``target`` names of ``tensor``, a view where it can be one."""
    matrix = _matrix(tensor)
    return matrix[_block(target, matrix)]
