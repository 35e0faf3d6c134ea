"""Boxes in a plane: x1, y1, x2, y2, the first corner not beyond the second."""

from __future__ import annotations

import numpy as np

from edgepet.spec import NpArray


def overlaps(first: NpArray, second: NpArray) -> NpArray:
    """Intersection over union of every box (n, 4) with every other (m, 4): (n, m); 0 where there is no area."""
    low, high = np.maximum(first[:, None, :2], second[None, :, :2]), np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.maximum(high - low, 0).prod(axis=2)
    areas = [np.maximum(each[:, 2:] - each[:, :2], 0).prod(axis=1) for each in (first, second)]
    union = areas[0][:, None] + areas[1][None] - both
    shares: NpArray = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return shares
