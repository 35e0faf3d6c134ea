"""Convpass: a small convolution over the patches beside attention and beside the MLP.

Jie and Deng 2022, "Convolutional Bypasses Are Better Vision Transformer Adapters", arXiv:2207.07039, section 3.2:
x' = x + attn(norm x) + s up(act(conv3x3(act(down(norm x))))), and the same beside the MLP; act is the quick GELU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.methods.limits import require_rank
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.places import blocks_with
from edgepet.methods.starts import uniform
from edgepet.spec import Array, Block, NpArray, Site, Tensors, Tuned

_TENSORS = ("down.weight", "down.bias", "conv.weight", "conv.bias", "up.weight", "up.bias")


@dataclass(frozen=True, slots=True)
class Convpass(BranchesOnly):
    """``rank`` channels; a token in front of the patches goes through the kernel's middle.

    ``scale`` multiplies what is added; ``attention_only`` leaves out the bypass of the MLP.

    Raises:
        InputError: ``rank`` is below 1.
    """

    rank: int = 8
    scale: float = 1.0
    attention_only: bool = False

    name: ClassVar[str] = "convpass"
    paper: ClassVar[str] = "Jie and Deng 2022, arXiv:2207.07039"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-4)
    starts_as_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank)

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks with norm1, drop_path1, norm2 and drop_path2, whose patches form a grid from end to end."""
        blocks = blocks_with(layers, "norm1", "drop_path1", "norm2", "drop_path2")
        return tuple(block for block in blocks if block.grid and _keeps_its_grid(block))

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """Under "1." the tensors beside attention, under "2." those beside the MLP: "1.down.weight" and so on.

        ``down.weight`` (rank, d) Xavier uniform; ``conv.weight`` (rank, rank, 3, 3) the identity in its middle tap;
        ``up.weight`` (d, rank) and the biases, ``down.bias`` and ``conv.bias`` (rank,), ``up.bias`` (d,), zero.
        """
        del base
        return {
            site.name: {
                f"{number}.{name}": value
                for number in self._numbers
                for name, value in self._start(site.in_features, rng).items()
            }
            for site in sites
        }

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "patch-conv" branch from what norm1 puts out to what drop_path1 does, and one from norm2 to drop_path2.

        ``scale`` is folded into the second linear layer.
        """
        return tuple(
            self._branch(site, number, {name: tuned[site.name][f"{number}.{name}"] for name in _TENSORS})
            for site in sites
            if isinstance(site, Block)
            for number in self._numbers
        )

    @property
    def _numbers(self) -> tuple[int, ...]:
        return (1,) if self.attention_only else (1, 2)

    def _start(self, width: int, rng: np.random.Generator) -> dict[str, NpArray]:
        h = self.rank
        kernel = np.zeros((h, h, 3, 3), np.float32)
        kernel[:, :, 1, 1] = np.eye(h)
        return {
            "down.weight": uniform(rng, (6 / (width + h)) ** 0.5, h, width),  # Xavier uniform
            "down.bias": np.zeros(h, np.float32),
            "conv.weight": kernel,
            "conv.bias": np.zeros(h, np.float32),
            "up.weight": np.zeros((width, h), np.float32),
            "up.bias": np.zeros(width, np.float32),
        }

    def _branch(self, block: Block, number: int, tensors: dict[str, Array]) -> Branch:
        scaled = {name: self.scale * tensors[name] for name in ("up.weight", "up.bias")}
        rows, columns = block.grid or (0, 0)
        return Branch(
            kind="patch-conv",
            tap=f"{block.name}.norm{number}:out",
            into=f"{block.name}.drop_path{number}:out",
            settings={"prefix": block.prefix, "height": rows, "width": columns, "activation": "quick-gelu"},
            tensors={**tensors, **scaled},
        )


def _keeps_its_grid(block: Block) -> bool:
    """Whether what each bypass reads and adds to has the shape of what goes in: MViT's blocks pool, or widen."""
    points = ("norm1:out", "drop_path1:out", "norm2:out", "drop_path2:out")
    return all(block.points.get(point) == block.points[":in"] for point in points)
