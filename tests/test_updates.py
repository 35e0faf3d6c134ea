"""Every update's fold is its dense definition, in NumPy as in torch, and touches nothing else."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from edgepet.deltas.expressions import Binary, Gather, Householder, Mix, Product, Scaled, Seeded, Window
from edgepet.deltas.updates import (
    FACTORS,
    UPDATES,
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
    Targeted,
    Update,
    attributes,
    check,
    factors,
    fold,
    in_precision_of,
    keeps_codes,
    with_arrays,
)
from edgepet.errors import InputError
from edgepet.spec import NpArray, Target
from tests import splitmix
from tests.tiny import SETTINGS, Case, block_diagonal, cases


def dense(case: Case) -> NpArray:
    """What the update means, by dense matrices and loops; no code of ``updates`` is used."""
    target, update, tensor = case.targeted.target, plain(case.targeted.update), case.tensor
    if target.rows is None and target.cols is None and isinstance(update, (Add, Replace)):
        return update.value if isinstance(update, Replace) else np.add(tensor, update.d)
    flat = tensor if tensor.ndim == 1 else tensor.reshape(len(tensor), -1)
    first, last = target.rows or (0, len(flat))
    if tensor.ndim == 1:
        part = tensor[first:last]
        if isinstance(update, Push):
            return np.concatenate([tensor[:first], part + pushed(update, case.weight), tensor[last:]])
        new = {"scale": lambda: part * update.s, "add": lambda: part + update.d, "replace": lambda: update.value}
        return np.concatenate([tensor[:first], new[update.kind](), tensor[last:]])
    left, right = target.cols or (0, flat.shape[1])
    middle = np.hstack(
        [flat[first:last, :left], dense_matrix(update, flat[first:last, left:right]), flat[first:last, right:]]
    )
    return np.vstack([flat[:first], middle, flat[last:]]).reshape(tensor.shape)


def pushed(update: Push, weight: Any) -> NpArray:
    """scale W c, by a loop over rows, channels and taps."""
    rows = weight.reshape(len(weight), -1)
    first, last = update.reads.rows or (0, len(rows))
    left, right = update.reads.cols or (0, rows.shape[1])
    taps = (right - left) // len(update.c)
    into = np.zeros(last - first)
    for row in range(last - first):
        into[row] = update.scale * sum(rows[first + row, left + i] * update.c[i // taps] for i in range(right - left))
    return into


def plain(update: Any) -> Any:
    """``update`` with every expression written out, element by element."""
    return replace(update, **{name: written_out(getattr(update, name)) for name in FACTORS[update.kind]})


def written_out(factor: Any) -> Any:
    match factor:
        case Product(left=left, right=right):
            return np.einsum("...ij,...jk->...ik", left, right)
        case Binary(bits=bits, levels=levels):
            return np.where(bits, levels[1], levels[0])
        case Mix(cube=cube, weights=weights, part=part, transposed=transposed):
            r, m = len(cube), weights.shape[1]
            square = np.zeros((r, r))
            for i, j in np.ndindex(r, r):
                flat = part * r + j  # a column of the mixed cube (r, r, m) read as (r, r m)
                square[i, j] = sum(cube[i, flat // m, k] * weights[k, flat % m] for k in range(len(weights)))
            return square.T if transposed else square
        case Scaled(c=c, base=base, transposed=transposed):
            return np.diag(c) @ (written_out(base).T if transposed else written_out(base))
        case Householder(left=left, d=d, right=right):
            diagonal = np.zeros((len(left), len(right)))
            for i, each in enumerate(d):
                diagonal[i, i] = each
            return (np.eye(len(left)) - np.outer(left, left)) @ diagonal @ (np.eye(len(right)) - np.outer(right, right))
        case Seeded(seed=seed, bound=bound, draws=draws):
            values = [bound * splitmix.uniform(seed, draws.start + i) for i in range(draws.size)]
            return np.array(values).reshape(draws.shape)
        case Gather(values=values, seed=seed, total=total, index=index):
            order = splitmix.balanced(seed, total, len(values))
            taken = order[index.start : index.start + index.size]
            return np.array([values[i] / np.sqrt(order.count(i)) for i in taken]).reshape(index.shape)
    return factor


def dense_matrix(update: Any, w: NpArray) -> NpArray:
    out, width = w.shape
    match update:
        case Scale(s=s, axis="out"):
            return np.diag(s) @ w
        case Scale(s=s):
            return w @ np.diag(np.repeat(s, width // len(s)))
        case Add(d=d):
            return np.add(w, d)
        case LowRank(left=left, right=right, core=None, scale=scale):
            return w + scale * np.einsum("or,ri->oi", left, right)
        case LowRank(left=left, right=right, core=core, scale=scale):
            return w + scale * np.einsum("or,rs,si->oi", left, core, right)
        case Grouped(blocks=blocks, order=order):
            columns = np.arange(width) if order is None else order
            taps = width // len(columns)
            read = np.zeros((width, width))  # read @ x is the input in the order in which the branch reads it
            for c, channel in enumerate(columns):
                for tap in range(taps):
                    read[c * taps + tap, channel * taps + tap] = 1
            return w + block_diagonal(blocks) @ read
        case Kronecker(left=left, right=right, scale=scale):
            return w + scale * sum(np.kron(a, b) for a, b in zip(left, right, strict=True))
        case Precompose(left=left, right=right, scale=scale):
            left = left if left.ndim == 3 else left[None]
            return w @ (np.eye(width) + scale * block_diagonal(left) @ right)
        case Replace(value=value):
            return value
        case Modulate(left=left, right=right, scale=scale):
            return np.array(
                [[w[o, i] * (1 + scale * (left[o] @ right[:, i])) for i in range(width)] for o in range(out)]
            )
        case Diagonal(d=d):
            return np.array([[w[o, i] + (d[o] if o == i else 0) for i in range(width)] for o in range(out)])
    raise AssertionError(out)


def close(got: NpArray, expected: NpArray) -> None:
    # Sums of at most some dozens of products in float64: a few units in the last place of the largest term.
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-12 * (1 + np.abs(expected).max())


def in_torch(targeted: Targeted) -> Targeted:
    values = {name: torch.from_numpy(np.array(array)) for name, array in factors(targeted.update).items()}
    return Targeted(targeted.target, with_arrays(targeted.update, values))


@pytest.mark.parametrize("kind", UPDATES)
def test_fold_is_the_dense_definition(kind: str) -> None:
    @given(case=cases((kind,)))
    @SETTINGS
    def holds(case: Case) -> None:
        weight = None if case.weight is None else case.weight.shape
        check(case.targeted, case.tensor.shape, where="test", weight=weight)
        before = case.tensor.copy()

        folded = fold(case.targeted, case.tensor, case.weight)

        close(folded, dense(case))
        assert folded.dtype == np.float64
        assert not np.shares_memory(folded, case.tensor)
        assert case.tensor.tobytes() == before.tobytes()

    holds()


@given(case=cases())
@SETTINGS
def test_torch_folds_as_numpy_does(case: Case) -> None:
    tensor = torch.from_numpy(case.tensor.copy())
    weight = None if case.weight is None else torch.from_numpy(case.weight.copy())

    folded = fold(in_torch(case.targeted), tensor, weight)

    close(folded.numpy(), fold(case.targeted, case.tensor, case.weight))
    assert tensor.numpy().tobytes() == case.tensor.tobytes()


@given(case=cases())
@SETTINGS
def test_fold_gives_a_new_tensor_even_where_it_replaces_the_old_one(case: Case) -> None:
    folded = fold(case.targeted, case.tensor, case.weight)

    assert not any(np.shares_memory(folded, array) for array in factors(case.targeted.update).values())


@given(case=cases())
@SETTINGS
def test_float32_factors_and_weights_give_a_float32_weight(case: Case) -> None:
    tensor = case.tensor.astype(np.float32)
    weight = None if case.weight is None else case.weight.astype(np.float32)

    folded = fold(Targeted(case.targeted.target, in_precision_of(case.targeted.update, tensor)), tensor, weight)

    assert folded.dtype == np.float32


@given(case=cases())
@SETTINGS
def test_a_tensor_that_does_not_lie_in_c_order_folds_alike(case: Case) -> None:
    strange = np.asfortranarray(case.tensor)
    weight = None if case.weight is None else np.asfortranarray(case.weight)

    close(fold(case.targeted, strange, weight), fold(case.targeted, case.tensor, case.weight))


@given(case=cases(tuple(kind for kind in UPDATES if kind != "replace")))
@settings(SETTINGS, max_examples=40)
def test_the_gradient_of_every_factor_flows_through_torch(case: Case) -> None:
    named = {n: torch.from_numpy(np.array(a)) for n, a in factors(case.targeted.update).items() if a.dtype.kind == "f"}
    rest = {n: a for n, a in factors(case.targeted.update).items() if n not in named}  # permutations and bits
    tensor = torch.from_numpy(case.tensor.copy())
    weight = None if case.weight is None else torch.from_numpy(case.weight.copy())

    def run(*values: torch.Tensor) -> torch.Tensor:
        update = with_arrays(case.targeted.update, {**rest, **dict(zip(named, values, strict=True))})
        return fold(Targeted(case.targeted.target, update), tensor, weight)

    if named:  # a factor that a seed stands for has none
        assert torch.autograd.gradcheck(run, tuple(value.requires_grad_() for value in named.values()))


def test_every_update_says_which_arrays_it_stores() -> None:
    kinds = (Scale, Add, LowRank, Grouped, Kronecker, Precompose, Replace, Modulate, Push, Diagonal)
    assert {kind.kind: kind for kind in kinds} == UPDATES
    assert set(FACTORS) == set(UPDATES)


def test_factors_leave_out_what_is_absent_and_attributes_hold_the_rest() -> None:
    left, right = np.ones((2, 1)), np.ones((1, 2))
    update = LowRank(left, right, scale=0.5)

    assert list(factors(update)) == ["left", "right"]
    assert attributes(update) == {"scale": 0.5}
    assert attributes(Scale(left[:, 0], "in")) == {"axis": "in"}


def z(*shape: int) -> NpArray:
    return np.zeros(shape)


MISFITS: list[tuple[str, Update, tuple[int, ...], str]] = [
    ("w", Scale(z(3)), (4, 6), "w: Scale needs s (4,), got (3,)"),
    ("w", Scale(z(4, 1)), (4, 6), "w: Scale needs s (4,), got (4, 1)"),
    ("w", Scale(z(4), "in"), (4, 6), "w: Scale needs s (6,), got (4,)"),
    ("w", Scale(z(0), "in"), (4, 6), "w: Scale needs s (6,), got (0,)"),
    ("b", Scale(z(4), "in"), (4,), "b: Scale scales input channels, got a vector"),
    ("n", Scale(z(1)), (), "n: Scale needs a tensor with axes, got a scalar"),
    ("b", Add(z(3)), (4,), "b: Add needs d (4,), got (3,)"),
    ("k", Add(z(4, 12)), (4, 3, 2, 2), "k: Add needs d (4, 3, 2, 2), got (4, 12)"),
    ("k[0:2]", Add(z(2, 3, 2, 2)), (4, 3, 2, 2), "k[0:2]: Add needs d (2, 12), got (2, 3, 2, 2)"),
    ("b[0:1]", Add(z()), (), "b[0:1]: Add needs a tensor with axes for its block, got ()"),
    ("w", Replace(z(6, 4)), (4, 6), "w: Replace needs value (4, 6), got (6, 4)"),
    ("b", LowRank(z(4, 1), z(1, 4)), (4,), "b: LowRank needs a matrix or a kernel, got a vector"),
    ("w", LowRank(z(4), z(1, 6)), (4, 6), "w: LowRank needs left and right with two axes"),
    ("w", LowRank(z(5, 2), z(2, 6)), (4, 6), "w: LowRank needs left (4, 2), got (5, 2)"),
    ("w", LowRank(z(4, 2), z(3, 6)), (4, 6), "w: LowRank needs right (2, 6), got (3, 6)"),
    ("w", LowRank(z(4, 2), z(3, 6), z(2, 2)), (4, 6), "w: LowRank needs core (2, 3), got (2, 2)"),
    ("w", LowRank(z(4, 2), z(3, 5), z(2, 3)), (4, 6), "w: LowRank needs right (3, 6), got (3, 5)"),
    ("b", Grouped(z(2, 2, 3)), (4,), "b: Grouped needs blocks (g, out/g, in/g) for a matrix or a kernel"),
    ("w", Grouped(z(4, 6)), (4, 6), "w: Grouped needs blocks (g, out/g, in/g) for a matrix or a kernel"),
    ("w", Grouped(z(4, 1, 1)), (4, 6), "w: Grouped needs a number of groups that divides 4 and 6, got 4"),
    ("w", Grouped(z(0, 2, 3)), (4, 6), "w: Grouped needs a number of groups that divides 4 and 6, got 0"),
    ("w", Grouped(z(2, 3, 2)), (4, 6), "w: Grouped needs blocks (2, 2, 3), got (2, 3, 2)"),
    ("w", Grouped(z(2, 2, 3), np.arange(4)), (4, 6), "w: Grouped needs order (6,), got (4,)"),
    ("w", Grouped(z(2, 2, 3), np.zeros((6, 1), int)), (4, 6), "w: Grouped needs order (6,), got (6, 1)"),
    ("w", Grouped(z(2, 2, 3), np.array([0, 1, 2, 3, 4, 4])), (4, 6), "w: Grouped needs an order that names every column once"),
    ("w", Grouped(z(2, 2, 3), np.array([-1, 0, 1, 2, 3, 4])), (4, 6), "w: Grouped needs an order that names every column once"),
    ("b", Kronecker(z(1, 2, 2), z(1, 2, 2)), (4,), "b: Kronecker needs left (n, p, q) for a matrix or a kernel"),
    ("w", Kronecker(z(1, 3, 2), z(1, 1, 3)), (4, 6), "w: Kronecker needs a left that divides 4 by 6, got 3 by 2"),
    ("w", Kronecker(z(2, 2, 2), z(1, 2, 3)), (4, 6), "w: Kronecker needs right (2, 2, 3), got (1, 2, 3)"),
    ("b", Precompose(z(1, 4, 1), z(1, 4)), (4,), "b: Precompose needs left (g, in/g, r/g) for a matrix or a kernel"),
    ("w", Precompose(z(4, 1, 1), z(4, 6)), (4, 6), "w: Precompose needs a number of groups that divides 6, got 4"),
    ("w", Precompose(z(2, 2, 1), z(2, 6)), (4, 6), "w: Precompose needs left (2, 3, 1), got (2, 2, 1)"),
    ("w", Precompose(z(2, 3, 2), z(2, 6)), (4, 6), "w: Precompose needs right (4, 6), got (2, 6)"),
    ("w[2:5]", Scale(z(3)), (4, 6), "w[2:5]: Scale needs a block inside (4, 6)"),
    ("w[:, 4:7]", Scale(z(4)), (4, 6), "w[:, 4:7]: Scale needs a block inside (4, 6)"),
    ("k[:, 0:13]", Scale(z(4)), (4, 3, 2, 2), "k[:, 0:13]: Scale needs a block inside (4, 12)"),
    ("b[0:2, 0:2]", Scale(z(2)), (4,), "b[0:2, 0:2]: Scale needs a matrix for its block, got (4,)"),
    ("w", LowRank(z(4, 2), Product(z(2, 3), z(4, 6))), (4, 6), "w: LowRank needs a product of (..., p, r) and (..., r, q), got (2, 3) and (4, 6)"),
    ("w", LowRank(z(4, 2), Product(z(2, 3), z(1, 3, 6))), (4, 6), "w: LowRank needs a product of (..., p, r) and (..., r, q), got (2, 3) and (1, 3, 6)"),
    ("w", LowRank(z(4, 2), Product(z(2, 3), z(3, 5))), (4, 6), "w: LowRank needs right (2, 6), got (2, 5)"),
    ("w", LowRank(z(4, 2), z(2, 6), Mix(z(2, 3, 4), z(4, 1))), (4, 6), "w: LowRank needs a mix of a cube (r, r, k) by weights (k, m), got (2, 3, 4) and (4, 1)"),
    ("w", LowRank(z(4, 2), z(2, 6), Mix(z(2, 2, 4), z(3, 1))), (4, 6), "w: LowRank needs a mix of a cube (r, r, k) by weights (k, m), got (2, 2, 4) and (3, 1)"),
    ("w", LowRank(z(4, 2), z(2, 6), Mix(z(2, 2, 4), z(4, 2), part=2)), (4, 6), "w: LowRank needs a part below 2, got 2"),
    ("w", LowRank(z(4, 2), Binary(z(2, 6) > 0, z(3))), (4, 6), "w: LowRank needs two levels for its bits, got (3,)"),
    ("w[0:2]", LowRank(z(4, 2), z(2, 6)), (4, 6), "w[0:2]: LowRank needs left (2, 2), got (4, 2)"),
    ("w", Precompose(z(5, 2), z(2, 6)), (4, 6), "w: Precompose needs left (6, 2), got (5, 2)"),
    ("w", Precompose(z(6, 2), z(3, 6)), (4, 6), "w: Precompose needs right (2, 6), got (3, 6)"),
    ("b", Modulate(z(4, 1), z(1, 4)), (4,), "b: Modulate needs a matrix or a kernel, got a vector"),
    ("w", Modulate(z(4), z(1, 6)), (4, 6), "w: Modulate needs left and right with two axes"),
    ("w", Modulate(z(5, 2), z(2, 6)), (4, 6), "w: Modulate needs left (4, 2), got (5, 2)"),
    ("w", Modulate(z(4, 2), z(3, 6)), (4, 6), "w: Modulate needs right (2, 6), got (3, 6)"),
    ("b", Diagonal(z(4)), (4,), "b: Diagonal needs a matrix or a kernel, got a vector"),
    ("w", Diagonal(z(6)), (4, 6), "w: Diagonal needs d (4,), got (6,)"),
    ("w[:, 0:3]", Diagonal(z(4)), (4, 6), "w[:, 0:3]: Diagonal needs d (3,), got (4,)"),
    ("w", LowRank(Scaled(z(4), z(3, 2)), z(2, 6)), (4, 6), "w: LowRank needs c (p,) and a base of p rows, got (4,) and (3, 2)"),
    ("w", LowRank(Scaled(z(2), z(4, 2)), z(2, 6)), (4, 6), "w: LowRank needs c (p,) and a base of p rows, got (2,) and (4, 2)"),
    ("w", LowRank(Scaled(z(4), z(4)), z(2, 6)), (4, 6), "w: LowRank needs c (p,) and a base of p rows, got (4,) and (4,)"),
    ("w", LowRank(Scaled(z(4), Scaled(z(4), z(4, 2))), z(2, 6)), (4, 6), "w: LowRank needs a base that is not scaled itself"),
    ("w", LowRank(Scaled(z(4), Product(z(4, 1), z(2, 2))), z(2, 6)), (4, 6), "w: LowRank needs a product of (..., p, r) and (..., r, q), got (4, 1) and (2, 2)"),
    ("w", LowRank(Scaled(z(2), z(4, 2), transposed=True), z(4, 6)), (4, 6), "w: LowRank needs left (4, 4), got (2, 4)"),
    ("w[0:4]", Add(Householder(z(4), z(6), z(6))), (4, 6), "w[0:4]: Add needs left (p,), d (min(p, q),) and right (q,), got (4,), (6,) and (6,)"),
    ("w[0:4]", Add(Householder(z(4), z(4), z(5))), (4, 6), "w[0:4]: Add needs d (4, 6), got (4, 5)"),
    ("w", LowRank(Seeded(2**53, 1.0, Window(0, (4, 2))), z(2, 6)), (4, 6), f"w: LowRank needs a seed from 0 to below 2^53, got {2**53}"),
    ("w", LowRank(Seeded(-1, 1.0, Window(0, (4, 2))), z(2, 6)), (4, 6), "w: LowRank needs a seed from 0 to below 2^53, got -1"),
    ("w", LowRank(Seeded(0, 1.0, Window(0, (4, 2**40))), z(2, 6)), (4, 6), f"w: LowRank needs 1 to 4194304 of {2**53} values, got (4, {2**40}) from 0"),
    ("w", LowRank(Seeded(0, 1.0, Window(2**53, (4, 2))), z(2, 6)), (4, 6), f"w: LowRank needs 1 to 4194304 of {2**53} values, got (4, 2) from {2**53}"),
    ("w", LowRank(Gather(z(3), 0, 8, Window(1, (4, 2))), z(2, 6)), (4, 6), "w: LowRank needs 1 to 4194304 of 8 values, got (4, 2) from 1"),
    ("w", LowRank(Gather(z(9), 0, 8, Window(0, (4, 2))), z(2, 6)), (4, 6), "w: LowRank needs values (d,) for d to 4194304 factors, got (9,) for 8"),
    ("w", LowRank(Gather(z(3), 0, 2**40, Window(0, (4, 2))), z(2, 6)), (4, 6), f"w: LowRank needs values (d,) for d to 4194304 factors, got (3,) for {2**40}"),
    ("w", LowRank(Gather(z(3, 1), 0, 8, Window(0, (4, 2))), z(2, 6)), (4, 6), "w: LowRank needs values (d,) for d to 4194304 factors, got (3, 1) for 8"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "update", "shape", "message"), MISFITS, ids=[row[-1] for row in MISFITS])
def test_an_update_that_does_not_fit_is_refused(
    target: str, update: Update, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        check(Targeted(Target.parse(target, where="test"), update), shape, where="flowers", fix="another backbone")

    assert str(refused.value) == f"flowers: {message}\n  fix: another backbone"


def push(target: str, c: NpArray, reads: str) -> Targeted:
    return Targeted(Target.parse(target, where="test"), Push(c, Target.parse(reads, where="test")))


UNREAD: list[tuple[Targeted, tuple[int, ...], tuple[int, ...] | None, str]] = [
    (push("b", z(6), "w"), (4,), None, "b: Push reads w, which is not there"),
    (push("w", z(6), "v"), (4, 6), (4, 6), "w: Push needs a vector to push into"),
    (push("b", z(6), "c"), (4,), (4,), "b: Push reads a matrix or a kernel, got c of (4,)"),
    (push("b", z(6), "w"), (4,), (5, 6), "b: Push needs 4 rows of w, got 5"),
    (push("b", z(6), "w[0:3]"), (4,), (5, 6), "b: Push needs 4 rows of w[0:3], got 3"),
    (push("b[0:3]", z(6), "w"), (4,), (4, 6), "b[0:3]: Push needs 3 rows of w, got 4"),
    (push("b", z(5), "w"), (4,), (4, 6), "b: Push needs c (6,), got (5,)"),
    (push("b", z(4), "w[:, 0:6]"), (4,), (4, 8), "b: Push needs c (6,), got (4,)"),
    (push("b", z(0), "w"), (4,), (4, 6), "b: Push needs c (6,), got (0,)"),
    (push("b", z(6, 1), "w"), (4,), (4, 6), "b: Push needs c (6,), got (6, 1)"),
    (push("b", z(6), "w[0:5]"), (5,), (4, 6), "b: Push reads w[0:5] and needs a block inside (4, 6)"),
    (push("b", z(6), "c[:, 0:2]"), (4,), (4,), "b: Push reads c[:, 0:2] and needs a matrix for its block, got (4,)"),
    (push("b[0:5]", z(6), "w"), (4,), (4, 6), "b[0:5]: Push needs a block inside (4,)"),
]  # fmt: skip


@pytest.mark.parametrize(("targeted", "shape", "weight", "message"), UNREAD, ids=[row[-1] for row in UNREAD])
def test_a_push_that_does_not_fit_what_it_reads_is_refused(
    targeted: Targeted, shape: tuple[int, ...], weight: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(InputError) as refused:
        check(targeted, shape, where="flowers", weight=weight)

    assert str(refused.value) == f"flowers: {message}"


KEEPING: list[tuple[str, Update, bool]] = [
    ("w", Scale(z(4)), True),
    ("w[0:2]", Scale(z(2)), True),
    ("w[:, 0:2]", Scale(z(4)), False),
    ("w", Scale(z(6), "in"), False),
    ("b", Add(z(4)), True),
    ("w", Add(z(4, 6)), False),
    ("w[0:4]", Add(Householder(z(4), z(4), z(6))), False),
    ("b", Replace(z(4)), True),
    ("w", Replace(z(4, 6)), False),
    ("w", LowRank(z(4, 1), z(1, 6)), False),
    ("w", Grouped(z(2, 2, 3)), False),
    ("w", Kronecker(z(1, 2, 2), z(1, 2, 3)), False),
    ("w", Precompose(z(6, 1), z(1, 6)), False),
    ("w", Modulate(z(4, 1), z(1, 6)), False),
    ("w", Diagonal(z(4)), False),
    ("b", Push(z(6), Target("w")), True),
]


@pytest.mark.parametrize(("target", "update", "keeps"), KEEPING, ids=[f"{row[0]} {row[1].kind}" for row in KEEPING])
def test_codes_are_kept_where_rows_are_scaled_and_where_vectors_change(
    target: str, update: Update, keeps: bool
) -> None:
    assert keeps_codes(Targeted(Target.parse(target, where="test"), update)) is keeps


def test_every_kind_is_among_those_that_may_keep_codes_or_not() -> None:
    assert {update.kind for _, update, _ in KEEPING} == set(UPDATES)


WRITTEN = ["norm.weight", "a.0.b_1", "w[0:4]", "w[10:384]", "w[:, 384:768]", "blocks.0.attn.qkv.weight[0:4, 1:2]"]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_target_reads_as_it_is_written(text: str) -> None:
    assert str(Target.parse(text, where="test")) == text


NO_TARGETS = [
    "",
    "w.",
    ".w",
    "a..b",
    "../w",
    "w[",
    "w[4]",
    "w[:]",
    "w[0:4,1:2]",
    "w[00:4]",
    "w[0:٤]",
    "w[-1:4]",
    "w[0:4, :]",
    "w\n",
]


@pytest.mark.parametrize("text", NO_TARGETS)
def test_a_target_has_one_spelling_and_no_other(text: str) -> None:
    with pytest.raises(InputError) as refused:
        Target.parse(text, where="test")

    assert str(refused.value) == f"test: a target is NAME, NAME[a:b] or NAME[a:b, c:d], got {text!r}"


@pytest.mark.parametrize("text", ["w[4:2]", "w[4:4]", "w[0:2, 3:1]"])
def test_a_block_ends_behind_its_start(text: str) -> None:
    with pytest.raises(InputError) as refused:
        Target.parse(text, where="test")

    assert str(refused.value) == f"test: a block's end must be greater than its start, got {text!r}"
