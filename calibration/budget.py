"""What int8 and codes cost: paired loss of top-1, its interval, mean divergence, and which layers cost most of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgepet.device.onnxruntime import open_model
from edgepet.errors import CheckError, InputError, option
from edgepet.graphs.base import INPUT
from edgepet.images.batches import in_batches
from edgepet.measuring.parity import INTERVAL_Z, by_place
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto

Answers: TypeAlias = tuple[NpArray, ...]  # what each head of a model gives for the same images, in their order

BATCH = 16
MOST_NAMED = 12  # layers in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """What ``n`` images lose from float to int8, or from a pack to one in other codings.

    ``points`` of ``metric``, top-1, of masks mIoU, of boxes and labels AP, negative for a gain, with the 95 % interval
    of a paired difference; ``kl`` is the mean Kullback-Leibler divergence of the answers' distributions, in nats, of
    boxes how far they are apart, 0..1.
    """

    points: float
    low: float
    high: float
    kl: float
    n: int
    metric: str = "top1"

    @property
    def shown(self) -> list[str]:
        """The names of what JSON has: ``metric`` where it is not top-1."""
        return [each.name for each in fields(self) if each.name != "metric" or self.metric != "top1"]


def worst(drops: Iterable[Drop]) -> Drop:
    """That of the head that loses most, which budgets hold: a mean would let one be ruined."""
    return max(drops, key=lambda drop: drop.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDrop:
    """One layer alone in int8: what it takes off top-1 in points (``drop``), and the mean divergence (``kl``)."""

    name: str
    drop: float
    kl: float


def drop_between(before: NpArray, after: NpArray, labels: NpArray) -> Drop:
    """Compare logits (n, C) of the same images, whose classes are ``labels`` (n,).

    Source of the interval: Agresti & Min 2005, doi:10.1002/sim.1781, half an image added to each cell of the table.
    """
    n = len(labels)
    right, still = before.argmax(axis=1) == labels, after.argmax(axis=1) == labels
    lost, won = int((right & ~still).sum()), int((~right & still).sum())
    b, c, m = lost + 0.5, won + 0.5, n + 2
    middle, error = (b - c) / m, math.sqrt((b + c) - (b - c) ** 2 / m) / m
    return Drop(
        points=100 * (lost - won) / n,
        low=100 * (middle - INTERVAL_Z * error),
        high=100 * (middle + INTERVAL_Z * error),
        kl=divergence(before, after),
        n=n,
    )


def divergence(before: NpArray, after: NpArray) -> float:
    """Mean Kullback-Leibler divergence of softmax(``after``) from softmax(``before``), in nats.

    Logits of both are (n, C), or of masks (n, C, h, w): then the mean is over places too.
    """
    if before.ndim == 4:
        before, after = by_place(before), by_place(after)
    p, q = _log_softmax(before), _log_softmax(after)
    return float(max(0.0, (np.exp(p) * (p - q)).sum(axis=1).mean()))


def _log_softmax(logits: NpArray) -> NpArray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log: NpArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log


def answers(model: ModelProto, images: NpArray, outputs: Sequence[str] = ()) -> Answers:
    """What an ``onnx.ModelProto`` gives in ONNX Runtime for preprocessed float32 ``images`` (n, 3, H, W).

    ``outputs`` are asked for, without them the first one.
    """
    return answers_of(model, in_batches(images, BATCH), outputs)


def answers_of(model: ModelProto, batches: Iterable[NpArray], outputs: Sequence[str] = ()) -> Answers:
    """``answers`` to images that come in batches, of which one is held at a time."""
    session = open_model(model)
    asked = list(outputs) or None
    rows = [session.run(asked, {INPUT: batch})[: len(outputs) or 1] for batch in batches]
    return tuple(np.concatenate(each) for each in zip(*rows, strict=True))


def require_resolution(budget: float, n: int) -> None:
    """Refuse a budget, in points of top-1, that ``n`` images cannot show.

    Raises:
        InputError: it is finer than one image, or not between 0 and 100.
    """
    if not 0 < budget < 100:
        raise InputError(option("max_drop"), "is in points of top-1, above 0 and below 100", got=budget)
    if budget < 100 / n:
        what = f"must be at least {100 / n:.2g} points: {n} images show no less"
        raise InputError(option("max_drop"), what, got=budget, fix="give more images, or a wider budget")


def within_budget(
    judge: Callable[[tuple[str, ...]], Drop],
    ranked: Callable[[], Sequence[LayerDrop]],
    budget: float,
    first: Drop,
    *,
    where: str,
) -> tuple[tuple[str, ...], Drop, tuple[LayerDrop, ...]]:
    """Names of the fewest layers, worst first, that have to return to float, what the rest then costs, and the ranking.

    The 1, 2, 4 ... worst are tried, then fewer by halving. The ranking is empty where the budget holds at once.

    Args:
        judge: layers that stay float -> what the rest costs.
        ranked: layers by what they cost, the worst first; asked for only where the budget does not hold at once.
        first: what it costs with every layer in int8.

    Raises:
        CheckError: with half of the layers in float the budget still does not hold; the message names the worst.
    """
    if first.points <= budget:
        return (), first, ()
    layers = tuple(ranked())
    names = [layer.name for layer in layers]
    most, low, tried = len(names) // 2, 0, {0: first}
    while low < most:
        high = min(max(2 * low, 1), most)
        tried[high] = judge(tuple(names[:high]))
        if tried[high].points <= budget:
            break
        low = high
    else:
        raise _too_much(where, budget, tried[low], layers)
    while high - low > 1:  # fewer may do
        middle = (low + high) // 2
        tried[middle] = judge(tuple(names[:middle]))
        low, high = (low, middle) if tried[middle].points <= budget else (middle, high)
    return tuple(names[:high]), tried[high], layers


def _too_much(where: str, budget: float, last: Drop, layers: Sequence[LayerDrop]) -> CheckError:
    told = "\n".join(
        f"  {layer.name}: {layer.drop:+.2f} points, divergence {layer.kl:.2g}" for layer in layers[:MOST_NAMED]
    )
    more = f"\n  and {len(layers) - MOST_NAMED} more: edgepet calibrate lists all" if len(layers) > MOST_NAMED else ""
    what = f"must lose at most {budget:g} points in int8, with half of its layers in float"
    got = f"{last.points:.2f} ({last.low:.2f} to {last.high:.2f}) on {last.n} images; alone in int8, the worst first:"
    return CheckError(
        where, what, got=f"{got}\n{told}{more}", fix=f"a wider {option('max_drop')}, more calibration images, or fp16"
    )
