"""How much an error in each stored number of a delta counts: what it does to the tensors that it is folded into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from edgepet.deltas.merge import fold_each
from edgepet.deltas.updates import Push, Targeted, apart, factors, with_arrays
from edgepet.spec import NpArray, Tensors

DRAWS, SEED = 8, 20160229  # of signs: enough to choose a scale by
LEAST = 1e-3  # of the mean: a number that nothing reads counts a little as well


def error_weights(tensors: Tensors, updates: Iterable[Targeted]) -> dict[int, NpArray]:
    """For every floating-point array of ``updates``, by its ``id``: by how much the squares of the folded tensors grow
    for each square of an error in one of its numbers, all else being exact.

    That is the diagonal of JᵀJ, J the derivative of all folded numbers by the array's, estimated by random signs z: the
    mean of (Jᵀz)², after Bekas, Kokiopoulou and Saad 2007, doi:10.1016/j.apnum.2007.01.003, here seeded.

    Args:
        tensors: the backbone's, which are not touched.
    """
    updates = list(updates)
    leaves: dict[int, torch.Tensor] = {}

    def leaf(array: NpArray) -> torch.Tensor:
        if id(array) not in leaves:
            leaves[id(array)] = torch.from_numpy(array.astype(np.float32)).requires_grad_()
        return leaves[id(array)]

    def in_torch(targeted: Targeted) -> Targeted:
        arrays = {
            name: leaf(array) if array.dtype.kind == "f" else array for name, array in factors(targeted.update).items()
        }
        return Targeted(targeted.target, with_arrays(targeted.update, arrays))

    changed = {each.target.tensor for each in updates}
    read = {each.update.reads.tensor for each in updates if isinstance(each.update, Push)}
    frozen = {name: torch.from_numpy(np.array(tensors[name])).float() for name in sorted(changed | read)}
    first, last = (list(map(in_torch, part)) for part in apart(updates))
    folded = list(fold_each(last, frozen, fold_each(first, frozen, {})).values())
    sums = _squares(folded, list(leaves.values()))
    return {key: total + LEAST * max(float(total.mean()), 1e-30) for key, total in zip(leaves, sums, strict=True)}


def _squares(folded: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]) -> list[NpArray]:
    signs = torch.Generator().manual_seed(SEED)
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for _ in range(DRAWS if leaves else 0):
        drawn = [torch.randint(0, 2, tensor.shape, generator=signs).float() * 2 - 1 for tensor in folded]
        given = torch.autograd.grad(folded, leaves, drawn, retain_graph=True, allow_unused=True)
        for total, gradient in zip(sums, given, strict=True):
            if gradient is not None:
                total += gradient**2 / DRAWS
    return [total.detach().numpy() for total in sums]
