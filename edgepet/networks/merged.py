"""Answers of a pack as stored: its delta folded into the backbone, its branches beside it. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from edgepet.deltas.delta import Delta
from edgepet.deltas.merge import task_tensors
from edgepet.images.batches import in_batches
from edgepet.networks.backbone import Backbone
from edgepet.networks.graft import grafted, in_torch
from edgepet.spec import NpArray


def merged_logits(backbone: Backbone, delta: Delta, images: NpArray) -> NpArray:
    """Logits (n, C) of ``delta`` folded into ``backbone``, its branches beside it, run by torch in float32.

    Args:
        backbone: is not touched.
        images: float32 (n, 3, H, W), preprocessed, or clips (n, frames, 3, H, W).

    Raises:
        BackboneError, InputError: as ``task_tensors``.
    """
    return merged_answers(backbone, delta, in_batches(images))


def merged_answers(backbone: Backbone, delta: Delta, batches: Iterable[NpArray]) -> NpArray:
    """``merged_logits`` of images that come in ``batches``: folded once, and held one batch at a time."""
    tensors = task_tensors(backbone.base, delta)
    branches = in_torch([branch.with_tensors(tensors) for branch in delta.branches])
    state = {name: torch.from_numpy(np.array(tensors[name])) for name in backbone.tensors}
    head = torch.from_numpy(delta.head.weight.astype(np.float32)), torch.from_numpy(delta.head.bias.astype(np.float32))
    parts = []
    with torch.no_grad(), grafted(backbone.module, branches):
        for batch in batches:
            inputs = (torch.from_numpy(batch),)
            features = torch.func.functional_call(backbone.module, state, inputs, tie_weights=False)
            parts.append(torch.nn.functional.linear(features, *head))
    logits: NpArray = torch.cat(parts).numpy()
    return logits
