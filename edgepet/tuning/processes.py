"""The processes that train one model together: one by itself, or those that ``accelerate launch`` started.

Every process has the same images and parameters and takes its share of each batch; gradients are added up, so that a
step is the step of one process on the whole batch, up to the order of a sum. Needs the ``train`` extra.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgepet.errors import require
from edgepet.spec import NpArray, Tensors


def reduced(tensor: Tensor) -> Tensor:
    """The sum of every process's ``tensor``, by accelerate."""
    accelerate = require("accelerate", extra="accelerate", purpose="training in several processes")
    summed: Tensor = accelerate.utils.reduce(tensor, reduction="sum")
    return summed


@dataclass(frozen=True, slots=True)
class Processes:
    """``rank`` of ``size`` processes; ``state`` is accelerate's, None for one process by itself.

    ``sum_of`` adds a tensor up over the processes.
    """

    rank: int = 0
    size: int = 1
    state: Any = None
    sum_of: Callable[[Tensor], Tensor] = reduced

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def device(self, asked: str | None) -> str | None:
        """This process's own GPU, where it has one and no device was asked for by name."""
        return str(self.state.device) if self.state is not None and asked is None else asked

    def add_up(self, parameters: Sequence[Tensor]) -> None:
        """Sum each parameter's gradient over the processes, in place; one that saw no image counts as zero."""
        if self.state is None:
            return
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters])
        parts = torch.split(self.sum_of(flat), [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean of each tensor over the processes, in place."""
        if self.state is not None:
            for tensor in tensors:
                tensor.copy_(self.sum_of(tensor.clone()) / self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's ``tensor``, or itself where there is one process."""
        return tensor if self.state is None else self.sum_of(tensor)

    def total(self, value: float) -> float:
        """The sum of every process's ``value``."""
        return value if self.state is None else float(self.sum_of(torch.tensor([value], device=self.state.device)))

    def any(self, here: bool) -> bool:
        """Whether it is so in any process: all must take the same turn."""
        return here if self.state is None else self.total(float(here)) > 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def random_states(self, device: str) -> dict[str, NpArray]:
        """The states of every process's random generators, uint8, as ``random/RANK/cpu`` and ``random/RANK/cuda``."""
        own = {"cpu": torch.get_rng_state().numpy()}
        if device.startswith("cuda"):
            own["cuda"] = torch.cuda.get_rng_state(device).numpy()
        everyone = [own]
        if self.state is not None:
            everyone = require("accelerate", extra="accelerate", purpose="training").utils.gather_object([own])
        return {f"random/{rank}/{kind}": value for rank, each in enumerate(everyone) for kind, value in each.items()}

    def set_random_state(self, states: Tensors, device: str) -> None:
        """Take up this process's generators from ``random_states``."""
        torch.set_rng_state(torch.from_numpy(np.array(states[f"random/{self.rank}/cpu"])))
        if device.startswith("cuda"):
            torch.cuda.set_rng_state(torch.from_numpy(np.array(states[f"random/{self.rank}/cuda"])), device)


ALONE = Processes()


def processes() -> Processes:
    """Those that were launched together with this process, by ``accelerate launch`` or ``torchrun``.

    Raises:
        MissingError: there are several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    accelerate = require("accelerate", extra="accelerate", purpose="training in several processes")
    state = accelerate.PartialState()
    return Processes(state.process_index, state.num_processes, state)
