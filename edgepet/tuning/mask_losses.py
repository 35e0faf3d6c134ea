"""The losses of a mask: of its logits, and of what else is judged by the truth while it is trained.

``truth`` is int64 (n, h, w), the number of a class, or 255 where a pixel counts for nothing. Needs the ``train`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgepet.deltas.heads import NOT_COUNTED
from edgepet.networks.separation import Separated

# What losses beside the mask's own count; 0.4 is usual of auxiliary heads, as in mmsegmentation's configurations.
INTERIM, AFFINITIES, REGIONS, SCORES = 0.4, 0.4, 0.1, 0.4


def cross_entropy(logits: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum over all pixels of ``truth`` (n, h, w), int64, in which 255 counts for nothing, over h · w.

    ``logits`` (n, C, ·, ·) are resized to it. Summed over images and divided by their number it is the loss as
    mmsegmentation has it: a mean over all pixels, those that are not counted among them.
    """
    resized = functional.interpolate(logits.float(), size=truth.shape[-2:], mode="bilinear", align_corners=False)
    summed = functional.cross_entropy(resized, truth, weight=weights, ignore_index=NOT_COUNTED, reduction="sum")
    return summed / (truth.shape[-2] * truth.shape[-1])


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """1 − (2 Σ p g + 1) / (Σ p + Σ g + 1), the mean over the classes that are in ``truth``; sums are over all pixels.

    p are the softmax of ``logits`` at the size of ``truth``, g is 1 where it has the class. Milletari et al. 2016,
    "V-Net", arXiv:1606.04797, equation 3, with the first power of p below, as nnU-Net has it.
    """
    shares = functional.interpolate(logits.float(), size=truth.shape[-2:], mode="bilinear", align_corners=False)
    there = _one_hot(truth, logits.shape[1])
    shares = shares.softmax(dim=1) * (truth != NOT_COUNTED)[:, None]
    both, each = (shares * there).sum((0, 2, 3)), there.sum((0, 2, 3))
    losses = 1 - (2 * both + 1) / (shares.sum((0, 2, 3)) + each + 1)
    present = each > 0
    return losses[present].mean() if bool(present.any()) else losses.sum() * 0


def interim_loss(interim: Sequence[Tensor], truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """INTERIM times the mean of ``cross_entropy`` of several logits (n, C, ·, ·), summed over images as it is."""
    losses = [cross_entropy(logits, truth, weights) for logits in interim]
    return INTERIM * torch.stack(losses).mean()


def separation_loss(separated: Separated, truth: Tensor) -> Tensor:
    """What of a separation is judged, summed over images: affinities by their class, regions by which one they are.

    AFFINITIES times the binary cross entropy of s (n, K, ·, ·), resized to ``truth``, with 1 where it has the class:
    the mean over classes and all pixels, those that are not counted among them as zeros. REGIONS times the cross
    entropy of the class of each region whose class the image has, their mean.
    """
    there = _one_hot(truth, separated.logits.shape[1])
    counted = (truth != NOT_COUNTED)[:, None]
    size = truth.shape[-2:]
    affinities = functional.interpolate(separated.affinities.float(), size=size, mode="bilinear", align_corners=False)
    binary = functional.binary_cross_entropy_with_logits(affinities, there, reduction="none") * counted
    present = there.amax(dim=(2, 3))  # (n, K)
    classes = torch.arange(there.shape[1], device=truth.device).expand(len(truth), -1)
    told = functional.cross_entropy(separated.regions.float().movedim(-1, 1), classes, reduction="none") * present
    each = told.sum(dim=1) / present.sum(dim=1).clamp_min(1)
    return AFFINITIES * binary.mean(dim=(1, 2, 3)).sum() + REGIONS * each.sum()


def _one_hot(truth: Tensor, classes: int) -> Tensor:
    """1 where a pixel has the class, float32 (n, classes, h, w); nowhere where it is not counted."""
    counted = truth != NOT_COUNTED
    return (functional.one_hot(truth.where(counted, 0), classes).movedim(-1, 1) * counted[:, None]).float()
