"""Fold a delta into dense weights: all checks first, then all results, never in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from edgepet.deltas.branches import named_tensors
from edgepet.deltas.delta import Delta
from edgepet.deltas.updates import Targeted, apart, check, fold, in_precision_of, read_by, shape_read_by
from edgepet.errors import BackboneError, InputError, option
from edgepet.spec import Array, Base, NpArray, Tensors


def merge(base: Base, delta: Delta) -> dict[str, NpArray]:
    """The backbone's tensors with ``delta`` folded in.

    Tensors that the delta leaves alone are the very arrays of ``base``; the others are new, in the base's dtype.
    There is no way back from a merged weight: keep the base and merge from it again, which is exact.

    Raises:
        BackboneError: ``delta`` was trained on another backbone.
        InputError: an update names a tensor that is not there, does not fit it, or makes of it what is not finite; or
            ``delta`` has branches.
    """
    require_foldable(delta)
    return task_tensors(base, delta)


def require_foldable(delta: Delta) -> None:
    """Refuse a delta that dense weights cannot hold.

    Raises:
        InputError: it has branches.
    """
    if delta.branches:
        what = f"{delta.method} has {len(delta.branches)} branches, which stay in the graph and cannot be folded"
        raise InputError(f"task {delta.task!r}", what, fix="export it, or run its pack: both take branches")


def task_tensors(base: Base, delta: Delta) -> dict[str, NpArray]:
    """What a task's graph computes with: the tensors of ``base`` with the updates folded in, and those of the branches.

    Raises:
        BackboneError, InputError: as ``merge``, branches apart.
    """
    require_fitting(base, delta)
    branches = {name: tensor.astype(np.float32) for name, tensor in named_tensors(delta.branches).items()}
    with np.errstate(over="ignore", invalid="ignore"):  # said below
        tensors = fold_all(base.tensors, delta.updates) | branches
    for name in (*delta.targets, *branches):
        if not np.isfinite(tensors[name]).all():
            raise InputError(f"task {delta.task!r}: {name}", "must be finite when folded", got="NaN or infinity")
    return tensors


def changed_tensors(base: Base, delta: Delta) -> dict[str, NpArray]:
    """Of ``task_tensors`` those that are not the backbone's own.

    Raises:
        BackboneError, InputError: as ``task_tensors``.
    """
    tensors = task_tensors(base, delta)
    return {name: tensors[name] for name in (*delta.targets, *named_tensors(delta.branches))}


def require_fitting(base: Base, delta: Delta) -> None:
    """Refuse updates that cannot be folded into ``base``.

    Raises:
        BackboneError: ``delta`` was trained on another backbone.
        InputError: an update names a tensor that is not there, or does not fit it.
    """
    require_backbone(base, delta)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    fix = f"use the backbone it was trained on, {delta.fingerprint}"
    for targeted in delta.updates:
        shape = shapes.get(targeted.target.tensor)
        if shape is None:
            raise InputError(f"{delta.task}: {targeted.target}", f"is no tensor of {base.name}")
        check(targeted, shape, where=delta.task, fix=fix, weight=shape_read_by(targeted, shapes))


def fold_all(tensors: Tensors, updates: Iterable[Targeted]) -> dict[str, NpArray]:
    """``tensors`` with ``updates`` folded in, in order and in each tensor's own precision; nothing is checked here.

    Vectors that pushes change come last: a push may read what all updates of a weight leave of it.
    """
    first, last = apart(updates)
    return dict(tensors) | fold_each(last, tensors, fold_each(first, tensors, {}))


def fold_each(
    updates: Iterable[Targeted], frozen: Mapping[str, Array], changed: Mapping[str, Array]
) -> dict[str, Array]:
    """``changed`` with ``updates`` folded into its tensors, and into those of ``frozen`` that it lacks.

    All are of one library; neither is modified. A push reads ``frozen``, or what is there by then (``read_by``): its
    weight must be done.
    """
    made, own = dict(changed), set[str]()  # own: copies that nobody else sees, whose blocks are changed where they lie
    for targeted in updates:
        name = targeted.target.tensor
        tensor = made[name] if name in made else frozen[name]
        precise = Targeted(targeted.target, in_precision_of(targeted.update, tensor))
        made[name] = fold(precise, tensor, read_by(targeted, frozen, made), own=name in own)
        if targeted.target.is_block and isinstance(tensor, np.ndarray):  # a gradient would need what was there before
            own.add(name)
        else:
            own.discard(name)
    return made


def require_backbone(base: Base, delta: Delta) -> None:
    """Refuse a delta whose backbone is not ``base``, by content and not by name.

    Raises:
        BackboneError: the fingerprints differ.
    """
    require_fingerprint(base.name, base.fingerprint, delta)


def require_fingerprint(name: str, fingerprint: str, delta: Delta) -> None:
    """``require_backbone`` of a backbone that is not here as dense tensors.

    Raises:
        BackboneError: the fingerprints differ.
    """
    if fingerprint != delta.fingerprint:
        raise BackboneError(
            f"task {delta.task!r}",
            f"was trained on {delta.backbone} {short(delta.fingerprint)}",
            got=f"{name} {short(fingerprint)}",
            fix=f"pass {option('backbone', delta.backbone)} with the weights that it was trained on",
        )


def short(fingerprint: str) -> str:
    """A fingerprint as people compare it: the first 12 hex digits."""
    return fingerprint.removeprefix("sha256:")[:12]
