"""What lies before the first tuned block, computed once for every image. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgepet.networks.split import Split, begun, entering
from edgepet.spec import NpArray


@dataclass(frozen=True, slots=True, eq=False)
class Front:
    """What lies before the first tuned block, as what enters that block: rows, one for each image, as arrays keep them.

    NumPy has no bfloat16: its bits are kept as int16.
    """

    split: Split

    def begun(self, network: nn.Module, rows: Tensor) -> contextlib.AbstractContextManager[Tensor]:
        """While the block runs ``network`` goes on from ``rows``, as ``split.begun`` does."""
        return begun(network, self.split, rows)

    def of(self, network: nn.Module, images: Tensor) -> NpArray:
        """Rows of preprocessed ``images`` (n, 3, H, W), or clips, to keep."""
        bits = entering(network, self.split, images).detach().cpu().contiguous()
        kept: NpArray = (bits.view(torch.int16) if bits.dtype is torch.bfloat16 else bits).numpy()
        return kept

    @property
    def stored(self) -> str:
        """The dtype of kept rows."""
        return "int16" if self.split.dtype is torch.bfloat16 else str(self.split.dtype).removeprefix("torch.")

    def rows(self, kept: NpArray | Tensor) -> Tensor:
        """Kept rows, as they enter the block."""
        return torch.as_tensor(kept).view(self.split.dtype)
