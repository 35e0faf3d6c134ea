"""What heads while they are trained have in common when they become layers. Needs the ``train`` extra."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from edgepet.deltas.heads import Step
from edgepet.deltas.layers import Layer
from edgepet.spec import NpArray


def behind(steps: Sequence[Step], layer: Layer, gives: str) -> Step:
    """A step that reads what the last one gives."""
    return Step(layer=layer, reads=(steps[-1].gives,), gives=gives)


def array_of(tensor: Tensor) -> NpArray:
    """A copy in float64."""
    array: NpArray = tensor.detach().cpu().double().numpy()
    return array
