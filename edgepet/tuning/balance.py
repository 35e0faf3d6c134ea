"""Classes of unlike size: which images an epoch sees, and what a class's loss counts for. Needs the ``train`` extra."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from edgepet.tuning.recipes import Balance


def epoch_order(labels: Tensor, balance: Balance | None, generator: torch.Generator) -> Tensor:
    """The images of one epoch, int64 (n,): each once; with ``sampling`` drawn with replacement, classes alike often."""
    if balance != "sampling":
        return torch.randperm(len(labels), generator=generator)
    chances = (1 / torch.bincount(labels).clamp_min(1).double())[labels]
    return torch.tensor(list(WeightedRandomSampler(chances.tolist(), len(labels), generator=generator)))


def class_weights(labels: Tensor, classes: int, balance: Balance | None) -> Tensor | None:
    """With ``weights``, float32 (classes,): n / (classes · the class's images), whose mean over the images is 1."""
    if balance != "weights":
        return None
    counts = torch.bincount(labels, minlength=classes).clamp_min(1).double()
    return (len(labels) / (classes * counts)).float()
