"""int8 codes of weights and activations: the only code that knows how a number becomes one. NumPy only.

Weights are symmetric per output channel: W ~ diag(scales) codes. The step is proportional to its channel, so diag(s) W
has the codes of W up to the sign of s, and a task that scales and shifts leaves a shared backbone's codes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgepet.spec import NpArray

LOW, HIGH = -128, 127  # codes of activations; those of weights stop at -HIGH
LEAST_SCALE = float(np.finfo(np.float32).tiny)  # of float32's normal numbers, in which runtimes compute
SMOOTHING = 0.65  # SmoothQuant's strength on a backbone that is shared by tasks
REACH = 3.0  # standard deviations of a normalised channel that count as its largest value
CLIPS = np.arange(0.40, 1.01, 0.05)  # of a channel's largest weight, where codes are too few to hold it
TINY = 1e-30  # the step of a channel of zeros
MOST_BIAS = 2.0**30  # half of what an int32 holds
LEAST_PRODUCT = 2.0**-100  # of two steps: float32 holds it with all of its digits
TIE = 1e-6  # quotients shrink by this part: half a code goes towards zero, however float32 rounded it on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """What the codes of an activation tensor stand for: shift + scale * code, code in -128 .. 127."""

    scale: float
    shift: float = 0.0

    @property
    def stored(self) -> Range:
        """The same in binary32, as packs and graphs keep it."""
        return Range(scale=float(np.float32(self.scale)), shift=float(np.float32(self.shift)))

    def rounded(self, values: NpArray) -> NpArray:
        """What ``values`` become: float32 of their shape, those out of reach as the nearest end."""
        codes = np.clip(np.rint((values - self.shift) / self.scale), LOW, HIGH)
        rounded: NpArray = (codes * self.scale + self.shift).astype(np.float32)
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodedWeight:
    """A weight as diag(scales) codes diag(1 / divisors).

    ``codes`` int8 (out, ...), ``scales`` float32 (out,), ``divisors`` float32 (in,) or None: what the layer norm in
    front divides its channels by, and the weight's columns were multiplied with.
    """

    codes: NpArray
    scales: NpArray
    divisors: NpArray | None = None

    @property
    def dense(self) -> NpArray:
        """The weight that the codes stand for, float32 (out, ...)."""
        weight = self.codes * per_channel(self.scales, self.codes)
        dense: NpArray = (weight if self.divisors is None else weight / self.divisors).astype(np.float32)
        return dense


def coded(
    weight: NpArray, divisors: NpArray | None = None, bits: int = 8, *, least: NpArray | float = 0.0
) -> CodedWeight:
    """The codes of ``weight`` (out, ...), its columns times ``divisors`` (in,), by the one recipe; computed in float64.

    No step is below ``least``, a number or (out,).

    Weights that were published with few bits are often exactly half of their row's largest, and so half-way between two
    codes: scaled and rounded to float32 they must not fall on either side by chance.
    """
    smoothed = weight.astype(np.float64) if divisors is None else weight * divisors.astype(np.float64)
    scales = np.maximum(weight_scales(smoothed, bits), least)
    codes = weight_codes(smoothed, scales, bits)
    return CodedWeight(codes=codes, scales=scales.astype(np.float32), divisors=divisors)


def weight_scales(weight: NpArray, bits: int = 8) -> NpArray:
    """The step of each output channel (out,) of ``weight`` (out, ...).

    With 8 bits the largest weight has the last code; with fewer the step of least squared error is taken.
    """
    rows = np.abs(weight.reshape(len(weight), -1))
    last = 2 ** (bits - 1) - 1
    largest: NpArray = np.maximum(rows.max(axis=1), np.asarray(TINY, rows.dtype))
    if bits == 8:
        steps: NpArray = largest / last
        return steps
    errors = [((_rounded(rows, clip * largest / last, last) - rows) ** 2).sum(axis=1) for clip in CLIPS]
    best: NpArray = CLIPS[np.argmin(errors, axis=0)]
    clipped: NpArray = (best * largest / last).astype(rows.dtype)
    return clipped


def weight_codes(weight: NpArray, scales: NpArray, bits: int = 8) -> NpArray:
    """int8 codes of ``weight`` (out, ...) in steps of ``scales`` (out,), in -127 .. 127, or less with fewer bits."""
    last = 2 ** (bits - 1) - 1
    codes: NpArray = np.clip(np.rint(weight * (1 - TIE) / per_channel(scales, weight)), -last, last).astype(np.int8)
    return codes


def bias_steps(weight: NpArray, bias: NpArray, input_scale: float) -> NpArray:
    """The least step of each output channel (out,) with which its ``bias`` (out,) is an int32 of sums of products.

    ONNX Runtime makes it one, in steps of ``input_scale`` times the weight's, even where it computes in float
    (microsoft/onnxruntime #22020). A channel of zeros has the widest step of ``weight`` (out, ...): any would do.
    """
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    least: NpArray = np.maximum(np.abs(bias) / MOST_BIAS, LEAST_PRODUCT) / input_scale
    widest = largest.max() / HIGH or 1.0
    return np.where(largest > 0, least, np.maximum(least, widest))


def per_channel(values: NpArray, weight: NpArray) -> NpArray:
    """``values`` (out,) in a shape that multiplies ``weight`` (out, ...)."""
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def smoothing(inputs: NpArray, weight: NpArray, strength: float) -> NpArray:
    """SmoothQuant's divisors (in,) of channels whose largest magnitudes are ``inputs`` (in,); their mean is 1.

    Xiao et al. 2022, arXiv:2211.10438, equation 4: max|x_j|^a / max|w_j|^(1 - a); the mean is the geometric one.
    ``weight`` (out, in) is what reads the channels, a is ``strength``, between 0 and 1.
    """
    reach = np.maximum(inputs, 1e-5).astype(np.float64)
    columns = np.maximum(np.abs(weight).max(axis=0), 1e-5).astype(np.float64)
    factors = reach**strength / columns ** (1 - strength)
    divisors: NpArray = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return divisors


def norm_smoothing(tensors: Mapping[str, NpArray], norm: tuple[str, str], weight: str) -> NpArray:
    """Divisors (in,) between ``norm`` (a layer norm's weight and bias) and ``weight`` (out, in): no image is looked at.

    So the codes of a backbone are a function of its weights, the same on every machine and for every task.
    """
    gamma, beta = (np.abs(tensors[name]) for name in norm)
    return smoothing(REACH * gamma + beta, tensors[weight], SMOOTHING)


def _rounded(rows: NpArray, steps: NpArray, last: int) -> NpArray:
    rounded: NpArray = np.minimum(np.rint(rows / steps[:, None]), last) * steps[:, None]
    return rounded
