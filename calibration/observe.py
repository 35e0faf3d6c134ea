"""What layers read on the calibration images: one pass of ONNX Runtime, channels kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgepet.calibration.layers import Layer
from edgepet.device.onnxruntime import ModelSession, open_model
from edgepet.errors import InputError, option
from edgepet.graphs.base import INPUT
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto

ROWS = 4096  # of one tensor, drawn evenly from all images: enough for histograms and means of channels
MOST_IMAGES, MOST_BYTES = 4, 1 << 30  # of one step: every watched tensor is held at once
Seen: TypeAlias = "Mapping[str, Activations]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activations:
    """A tensor on all images: ``rows`` (m, channels) drawn from it, ``least`` and ``most`` (channels,) of all of it."""

    rows: NpArray
    least: NpArray
    most: NpArray

    @property
    def largest(self) -> NpArray:
        """The largest magnitude of each channel."""
        return np.maximum(np.abs(self.least), np.abs(self.most))

    def divided(self, by: NpArray) -> Activations:
        """The same with every channel divided by a number above zero."""
        return replace(self, rows=self.rows / by, least=self.least / by, most=self.most / by)


def observe(
    model: ModelProto, layers: Sequence[Layer], images: NpArray, *, where: str, also: Mapping[str, int] | None = None
) -> dict[str, Activations]:
    """What ``layers`` of an ``onnx.ModelProto`` read on preprocessed ``images`` (n, 3, H, W), by the tensors' names.

    Args:
        also: further tensors, by name, with the axis of their channels.

    Raises:
        InputError: a number that is not finite, in what they read or put out: a clip behind them may hide it.
        MissingError: onnx is not installed.
    """
    axes = {layer.reads: layer.channel_axis for layer in layers}
    others = {name: axis for name, axis in (also or {}).items() if name not in axes}
    around = dict.fromkeys((*(name for layer in layers for name in (layer.reads, layer.puts_out)), *others))
    names = [name for name in around if name != INPUT]
    session = open_model(model, names)
    gathered: dict[str, list[Activations]] = {}
    rng, other = np.random.default_rng(0), np.random.default_rng(1)  # what layers read is drawn alike with and without
    step = at_once(session, names, images[:1])
    for start in range(0, len(images), step):
        batch = images[start : start + step]
        values = dict(zip(names, session.run(names, {INPUT: batch}), strict=True)) | {INPUT: batch}
        for name, value in values.items():
            if not np.isfinite(value).all():
                fix = f"train again with a lower {option('lr')}, or look at the images"
                what = "must stay finite on the calibration images"
                raise InputError(f"{where}: {name}", what, got="NaN or infinity", fix=fix)
        each = max(1, ROWS * len(batch) // len(images))
        for name, axis in axes.items():
            gathered.setdefault(name, []).append(_drawn(values[name], axis, each, rng))
        for name, axis in others.items():
            gathered.setdefault(name, []).append(_drawn(values[name], axis, each, other))
    return {name: _joined(parts) for name, parts in gathered.items()}


def at_once(session: ModelSession, names: Sequence[str], image: NpArray) -> int:
    """How many images to run at once, so that the tensors ``names`` of all of them take little memory.

    ``image`` (1, ...) is one of them: large images on a network of many maps take gigabytes each.
    """
    size = sum(value.nbytes for value in session.run(names, {INPUT: image}))
    return max(1, min(MOST_IMAGES, MOST_BYTES // max(1, size)))


def _drawn(value: NpArray, axis: int, count: int, rng: np.random.Generator) -> Activations:
    matrix = np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis])
    chosen = rng.integers(0, len(matrix), count) if len(matrix) > count else slice(None)
    return Activations(rows=matrix[chosen].astype(np.float32), least=matrix.min(axis=0), most=matrix.max(axis=0))


def _joined(parts: Sequence[Activations]) -> Activations:
    return Activations(
        rows=np.concatenate([part.rows for part in parts]),
        least=np.min([part.least for part in parts], axis=0),
        most=np.max([part.most for part in parts], axis=0),
    )
