"""The closed vocabulary of layers that heads are made of, and what of each a pack stores.

Each kind has one NumPy definition, its ``__call__``. A device that was shipped before a head was thought of runs it as
data; a contract test ties each kind's torch forward to the definition. What they compute is in ``weighted``,
``weightless`` and ``asking``, which this module offers as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from edgepet.deltas.asking import Ask, Attention, Compare, Shift
from edgepet.deltas.detection import Detect
from edgepet.deltas.layer import Layer, Shape, bilinear, softmax
from edgepet.deltas.weighted import Attend, Conv, Deconv, Depthwise, Norm, Point, Regions
from edgepet.deltas.weightless import ACTIVATIONS, MODES, Activation, Add, Concat, Mean, Multiply, Pool, Resize, Unit
from edgepet.spec import NpArray

__all__ = [
    "ACTIVATIONS",
    "LAYERS",
    "MODES",
    "OPTIONAL",
    "SETTINGS",
    "TENSORS",
    "Activation",
    "Add",
    "Ask",
    "Attend",
    "Attention",
    "Compare",
    "Concat",
    "Conv",
    "Deconv",
    "Depthwise",
    "Detect",
    "Layer",
    "Mean",
    "Multiply",
    "Norm",
    "Point",
    "Pool",
    "Regions",
    "Resize",
    "Setting",
    "Shape",
    "Shift",
    "Unit",
    "bilinear",
    "settings",
    "softmax",
    "tensors",
    "with_tensors",
]

Setting: TypeAlias = "type[int] | type[float] | tuple[str, ...]"  # a number, or one of some words

LAYERS: dict[str, type[Layer]] = {
    "point": Point,
    "depthwise": Depthwise,
    "conv": Conv,
    "deconv": Deconv,
    "resize": Resize,
    "pool": Pool,
    "add": Add,
    "multiply": Multiply,
    "concat": Concat,
    "activation": Activation,
    "norm": Norm,
    "unit": Unit,
    "attend": Attend,
    "regions": Regions,
    "mean": Mean,
    "detect": Detect,
    "shift": Shift,
    "ask": Ask,
    "attention": Attention,
    "compare": Compare,
}
TENSORS: dict[str, dict[str, int]] = {  # how many axes each has
    "point": {"weight": 2, "bias": 1},
    "depthwise": {"weight": 3, "bias": 1},
    "conv": {"weight": 4, "bias": 1},
    "deconv": {"weight": 4, "bias": 1},
    "norm": {"weight": 1, "bias": 1},
    "attend": {"keys": 3, "key_bias": 2, "values": 3, "bias": 1},
    "regions": {"queries": 2, "weight": 2},
    "detect": {"scales": 1},
    "shift": {"value": 3},
    "ask": {"queries": 3},
}
OPTIONAL: dict[str, frozenset[str]] = {  # tensors that a layer may do without
    "point": frozenset({"bias"}),
    "depthwise": frozenset({"bias"}),
    "conv": frozenset({"bias"}),
    "deconv": frozenset({"bias"}),
    "norm": frozenset({"weight", "bias"}),
    "attend": frozenset({"key_bias", "bias"}),
}
SETTINGS: dict[str, dict[str, Setting]] = {
    "conv": {"stride": int},
    "resize": {"factor": int, "mode": MODES},
    "pool": {"size": int},
    "activation": {"name": ACTIVATIONS},
    "norm": {"eps": float},
    "unit": {"eps": float},
    "detect": {"stride": int, "top": int},
    "attention": {"heads": int},
    "compare": {"scale": float},
}


def tensors(layer: Layer) -> dict[str, NpArray]:
    """What a layer has learnt, by name; a tensor that it does without is left out."""
    given = {name: getattr(layer, name) for name in TENSORS.get(layer.kind, {})}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def settings(layer: Layer) -> dict[str, int | float | str]:
    """The settings of a layer's kind, by name."""
    return {name: getattr(layer, name) for name in SETTINGS.get(layer.kind, {})}


def with_tensors(layer: Layer, given: Mapping[str, NpArray]) -> Layer:
    """The same layer with other tensors, those that ``given`` names."""
    return replace(layer, **given)
