"""What layers read on the calibration images: one pass of ONNX Runtime, channels kept apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgepet.calibration.layers import Layer
from edgepet.device.onnxruntime import ModelSession, open_model
from edgepet.errors import InputError, option
from edgepet.graphs.base import INPUT
from edgepet.measuring.machine import free_memory_bytes
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto

ROWS = 4096  # of one tensor, drawn evenly from all images: enough for histograms and means of channels
MOST_IMAGES, MOST_BYTES = 4, 1 << 30  # of one step, where a machine has no more to spare
LIKELY = 16  # times the bytes of an image: a tensor of it, before it is measured
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
    put_out = (layer.puts_out for layer in layers)
    names = list(dict.fromkeys((*axes, *others, *put_out)))
    session = open_model(model, [name for name in names if name != INPUT])
    gathered: dict[str, list[Activations]] = {}
    rng, other = np.random.default_rng(0), np.random.default_rng(1)  # what layers read is drawn alike with and without
    for name, value, count in watched(session, names, images):
        if not np.isfinite(value).all():
            fix = f"train again with a lower {option('lr')}, or look at the images"
            what = "must stay finite on the calibration images"
            raise InputError(f"{where}: {name}", what, got="NaN or infinity", fix=fix)
        each = max(1, ROWS * count // len(images))
        if name in axes:
            gathered.setdefault(name, []).append(_drawn(value, axes[name], each, rng))
        elif name in others:
            gathered.setdefault(name, []).append(_drawn(value, others[name], each, other))
    return {name: _joined(parts) for name, parts in gathered.items()}


def watched(session: ModelSession, names: Sequence[str], images: NpArray) -> Iterator[tuple[str, NpArray, int]]:
    """Each of the tensors ``names``, of how many of ``images`` (n, 3, H, W); then of the next images.

    As few are held at once as memory asks for: of one large image on a network of many maps all take tens of gigabytes,
    which is then run again for every part of them.
    """
    first = images[:1]
    sizes = {name: first.nbytes if name == INPUT else 0 for name in names}
    for part in _split(names, lambda name: LIKELY * first.nbytes, MOST_BYTES):
        sizes |= {name: value.nbytes for name, value in _values(session, part, first).items()}
    step = max(1, min(MOST_IMAGES, MOST_BYTES // max(1, sum(sizes.values()))))
    parts = _split(names, lambda name: step * sizes[name], max(MOST_BYTES, free_memory_bytes() // 4))
    for start in range(0, len(images), step):
        batch = images[start : start + step]
        for part in parts:
            yield from ((name, value, len(batch)) for name, value in _values(session, part, batch).items())


def _values(session: ModelSession, names: Sequence[str], batch: NpArray) -> dict[str, NpArray]:
    inner = [name for name in names if name != INPUT]
    found = dict(zip(inner, session.run(inner, {INPUT: batch}), strict=True)) if inner else {}
    return {name: batch if name == INPUT else found[name] for name in names}


def _split(names: Sequence[str], size: Callable[[str], int], most: int) -> list[list[str]]:
    """``names`` in order, in parts that are no larger than ``most`` or are one name."""
    parts, held = list[list[str]](), 0
    for name in names:
        if not parts or held + size(name) > most:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size(name)
    return parts


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
