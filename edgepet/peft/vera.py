"""Low-rank additions between random matrices as PEFT's VeRA keeps them: two vectors a layer, and one A and B for all.

PEFT adapts whole layers, each with the first columns of A and the first rows of B. So parts of a fused weight have rows
of A and columns of B to themselves, and their vectors are zero for the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from edgepet.deltas.expressions import Scaled, Seeded, value
from edgepet.deltas.updates import LowRank, Targeted
from edgepet.peft.layers import DOUBLE
from edgepet.spec import NpArray, Site

Projected: TypeAlias = tuple[dict[str, object], dict[str, NpArray], dict[str, NpArray]]


@dataclass(slots=True, eq=False)
class _Pair:
    """Columns of B, zero above the row ``first``, and rows of A, as long as the largest part that has them needs.

    Where they are one of several in a layer, ``alone`` is false and no more rows are put to them: the layer's other
    vectors are not zero there.
    """

    first: int
    alone: bool
    b: NpArray  # (out, r)
    a: NpArray  # (r, in)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One addition on the rows from ``first`` on, diag(b) B diag(d) A, and where B and A are among all pairs."""

    first: int
    b: NpArray
    d: NpArray
    pair: int


def projected(layers: Sequence[tuple[Site, Sequence[Targeted]]]) -> Projected | None:
    """Configuration, tensors by PEFT's names, and A and B; None where an addition is none of VeRA's.

    Args:
        layers: with all updates of their weights, floating-point arrays in float64.
    """
    pairs, parts = list[_Pair](), dict[str, list[_Part]]()
    sites = [site for site, _ in layers]
    for site, updates in layers:
        parts[site.name] = []
        for targeted in updates:
            part = _part(targeted, pairs, alone=len(updates) == 1) if site.kind == "linear" else None
            if part is None:
                return None
            parts[site.name].append(part)
    if any(_overlap(of_layer) for of_layer in parts.values()):
        return None
    starts = np.cumsum([0, *(len(pair.a) for pair in pairs)])
    rank = int(starts[-1])
    whole_a = np.zeros((rank, max(site.in_features for site in sites)))
    whole_b = np.zeros((max(site.out_features for site in sites), rank))
    for pair, start in zip(pairs, starts, strict=False):
        whole_a[start : start + len(pair.a), : pair.a.shape[1]] = pair.a
        whole_b[pair.first : pair.first + len(pair.b), start : start + len(pair.a)] = pair.b
    tensors: dict[str, NpArray] = {}
    for site in sites:
        b, d = np.zeros(site.out_features), np.zeros(rank)
        for part in parts[site.name]:
            b[part.first : part.first + len(part.b)] = part.b
            d[starts[part.pair] : starts[part.pair] + len(part.d)] = part.d
        tensors[f"{site.name}.vera_lambda_b"], tensors[f"{site.name}.vera_lambda_d"] = b, d
    config: dict[str, object] = {
        "peft_type": "VERA", "r": rank, "save_projection": True, "projection_prng_key": 0, "vera_dropout": 0.0,
        "d_initial": 0.1, "bias": "none", "fan_in_fan_out": False, "init_weights": True,
    }  # fmt: skip
    return config, tensors, {"vera_A": whole_a, "vera_B": whole_b}


def _part(targeted: Targeted, pairs: list[_Pair], *, alone: bool) -> _Part | None:
    """An addition in VeRA's form, its matrices put into ``pairs``; None where it has another form."""
    update, target = targeted.update, targeted.target
    if not isinstance(update, LowRank) or update.core is not None or target.cols is not None:
        return None
    if not isinstance(update.left, Scaled) or not isinstance(update.right, Scaled):
        return None
    (b, by_left), (a, by_right) = _matrix(update.left), _matrix(update.right)
    pair = _Pair(target.rows[0] if target.rows else 0, alone, b, a)
    d = update.right.c * by_left * by_right * update.scale
    return _Part(first=pair.first, b=update.left.c, d=d, pair=_placed(pairs, pair))


def _matrix(scaled: Scaled) -> tuple[NpArray, float]:
    """What is scaled, and a number that it is to be multiplied by: drawn matrices differ by their bounds alone."""
    base, by = scaled.base, 1.0
    if isinstance(base, Seeded):
        base, by = replace(base, bound=1.0), base.bound
    matrix: NpArray = value(base, DOUBLE)
    return (matrix.T if scaled.transposed else matrix), by


def _placed(pairs: list[_Pair], wanted: _Pair) -> int:
    """The number of the pair that ``wanted`` is the beginning of, or that begins it; else of a new one."""
    for number, pair in enumerate(pairs):
        same = (pair.first, pair.alone, len(pair.a)) == (wanted.first, wanted.alone, len(wanted.a))
        fits = same and (pair.alone or len(pair.b) == len(wanted.b))
        if fits and _agree(pair.b, wanted.b) and _agree(pair.a.T, wanted.a.T):
            pair.b, pair.a = max(pair.b, wanted.b, key=len), max(pair.a, wanted.a, key=np.size)
            return number
    pairs.append(wanted)
    return len(pairs) - 1


def _agree(left: NpArray, right: NpArray) -> bool:
    rows = min(len(left), len(right))
    return np.array_equal(left[:rows], right[:rows])


def _overlap(parts: Sequence[_Part]) -> bool:
    """Whether two of them are on one row, which has one b."""
    spans = sorted((part.first, part.first + len(part.b)) for part in parts)
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))
