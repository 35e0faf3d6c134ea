"""How far a tensor's int8 codes reach: estimators of one clipping threshold from a histogram of magnitudes.

Wu et al. 2020, "Integer Quantization for Deep Learning Inference", arXiv:2004.09602, section 3 and 5.2, compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from edgepet.spec import NpArray

Estimator: TypeAlias = Literal["min-max", "percentile", "mse", "entropy"]
BINS = 2048
PERCENTILE = 99.99
LEAST = 1e-12  # of a threshold: a tensor that is zero everywhere still has a scale above zero


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of magnitudes in ``BINS`` bins of equal width between 0 and ``top``, the largest one."""

    counts: NpArray
    top: float

    @classmethod
    def of(cls, values: NpArray, top: float) -> Histogram:
        """Of ``values``, any shape; those beyond ``top`` count as ``top``."""
        magnitudes = np.minimum(np.abs(values).ravel(), top)
        counts, _ = np.histogram(magnitudes, BINS, (0.0, max(top, LEAST)))
        return cls(counts.astype(np.float64), max(top, LEAST))

    @property
    def centres(self) -> NpArray:
        """The magnitude in the middle of each bin, (BINS,)."""
        return (np.arange(BINS) + 0.5) * (self.top / BINS)


def threshold(histogram: Histogram, estimator: Estimator, levels: int) -> float:
    """The magnitude that the largest of ``levels`` codes above zero stands for (127 or 255 of int8)."""
    return max(ESTIMATORS[estimator](histogram, levels), LEAST)


def _min_max(histogram: Histogram, levels: int) -> float:
    del levels
    return histogram.top


def _percentile(histogram: Histogram, levels: int) -> float:
    del levels
    reached = np.cumsum(histogram.counts) >= PERCENTILE / 100 * histogram.counts.sum()
    return float(int(reached.argmax()) + 1) * histogram.top / BINS


def _mse(histogram: Histogram, levels: int) -> float:
    """The threshold of least squared error, among hundredths of the largest magnitude."""
    candidates = histogram.top * np.arange(20, 101) / 100
    return float(min(candidates, key=lambda limit: _squared_error(histogram, float(limit), levels)))


def _squared_error(histogram: Histogram, limit: float, levels: int) -> float:
    step = limit / levels
    coded = np.minimum(np.round(histogram.centres / step), levels) * step
    return float(histogram.counts @ (coded - histogram.centres) ** 2)


def _entropy(histogram: Histogram, levels: int) -> float:
    """The threshold whose codes keep most of the distribution: least Kullback-Leibler divergence.

    Migacz 2017, "8-bit Inference with TensorRT", GTC: bins beyond the threshold are counted in the last one, then the
    rest is cut into ``levels`` steps whose counts are spread evenly over the bins that were not empty.
    """
    stops = np.unique(np.append(np.arange(levels + 1, BINS, 16), BINS))
    divergences = [_divergence(histogram.counts, int(stop), levels) for stop in stops]
    return float(stops[int(np.argmin(divergences))]) * histogram.top / BINS


def _divergence(counts: NpArray, stop: int, levels: int) -> float:
    kept = counts[:stop].copy()
    filled = kept > 0
    step = (np.arange(stop) * levels) // stop
    totals, members = np.bincount(step, kept, levels), np.bincount(step, filled, levels)
    coded = np.where(filled, (totals / np.maximum(members, 1))[step], 0.0)
    kept[-1] += counts[stop:].sum()
    seen = (kept > 0) & (coded > 0)
    if not coded.sum():
        return float("inf")
    p, q = kept / kept.sum(), coded / coded.sum()
    lost = p[(kept > 0) & ~seen].sum()  # what falls where no code can be: as if its code had the least probability
    return float((p[seen] * np.log(p[seen] / q[seen])).sum() + lost * np.log(1 / LEAST))


ESTIMATORS: dict[Estimator, Callable[[Histogram, int], float]] = {
    "min-max": _min_max,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
