"""In how many parts a step goes through its images, so that memory bears each. Needs the ``train`` extra."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgepet.tuning.model import TunedModel

if TYPE_CHECKING:
    from edgepet.tuning.fit import Plan

MOST_KEPT = 600_000_000  # bytes that a part keeps for the way back: with more a ViT-S and Lite0 are slower as well


class Parts:
    """The parts of one fit's steps. ``each`` is what every further image of a part keeps for the way back, in bytes.

    It is measured on a CPU, where ``plan`` asks for no number: a GPU refuses by itself what it cannot hold. The same
    network, method and head keep the same anywhere in one precision.
    """

    def __init__(self, model: TunedModel, plan: Plan) -> None:
        self._model, self._plan, self.each = model, plan, None if plan.device == "cpu" else 0

    def of(self, share: Tensor, there_and_back: Callable[[Tensor], object]) -> int:
        """How many for the images ``share`` of a step; gradients of some of them may have come on top of others then.

        Args:
            there_and_back: goes with some images to the loss and back.
        """
        asked = self._plan.accumulate
        if asked is None:
            if self.each is None and len(share) > 1:
                one, two = (self._kept(partial(there_and_back, share[:count])) for count in (1, 2))
                self.each = two - one
            asked = math.ceil((self.each or 0) * len(share) / MOST_KEPT)
        return max(1, min(asked, len(share)))

    def _kept(self, there_and_back: Callable[[], object]) -> int:
        """Bytes that lie between there and back; neither ranges nor random numbers are moved."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            memory = tensor.untyped_storage()
            kept[memory.data_ptr()] = memory.nbytes()
            return tensor.detach()  # an operation that kept what it puts out would hold itself

        def give(tensor: Tensor) -> Tensor:
            return tensor

        rounding = self._model.fake_quant
        with torch.random.fork_rng(devices=()), torch.autograd.graph.saved_tensors_hooks(keep, give):
            if rounding is not None:
                rounding.train(False)
            there_and_back()
            if rounding is not None:
                rounding.train(True)
        return sum(kept.values())
