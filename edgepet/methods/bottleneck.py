"""Two linear layers with an activation between them: what every adapter is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.methods.starts import cut_normal, uniform
from edgepet.spec import Array, NpArray


def start_bottleneck(
    width: int, rank: int, rng: np.random.Generator, *, how: Literal["near zero", "as LoRA"], prefix: str = ""
) -> dict[str, NpArray]:
    """Float32 start values: "near zero" as adapter-bert's; "as LoRA" has ``up`` zero, ``down`` as a linear layer's.

    ``down.weight`` (rank, width), ``down.bias`` (rank,), ``up.weight`` (width, rank) and ``up.bias`` (width,), each
    behind ``prefix``; the biases are zero.
    """
    if how == "near zero":
        down, up = cut_normal(rng, 1e-3, rank, width), cut_normal(rng, 1e-3, width, rank)
    else:
        down, up = uniform(rng, width**-0.5, rank, width), np.zeros((width, rank))
    return {
        f"{prefix}down.weight": down.astype(np.float32),
        f"{prefix}down.bias": np.zeros(rank, np.float32),
        f"{prefix}up.weight": up.astype(np.float32),
        f"{prefix}up.bias": np.zeros(width, np.float32),
    }


def bottleneck(
    tuned: Mapping[str, Array], *, tap: str, into: str, activation: str, scale: float = 1.0, prefix: str = ""
) -> Branch:
    """The branch of trained values, named and shaped as ``start_bottleneck`` has them; ``scale`` is folded into ``up``.

    It reads at ``tap`` and adds at ``into``, two points such as "blocks.3.mlp:out".
    """
    tensors = {name: tuned[f"{prefix}{name}"] for name in ("down.weight", "down.bias")}
    tensors |= {name: scale * tuned[f"{prefix}{name}"] for name in ("up.weight", "up.bias")}
    return Branch(kind="bottleneck", tap=tap, into=into, settings={"activation": activation}, tensors=tensors)
