"""Tables of text that no tower made: every number drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgepet.deltas.text import TextTable
from edgepet.packs.text_file import write_text
from edgepet.spec import NpArray

WIDTH = 8


def vectors(classes: Sequence[str], width: int = WIDTH) -> NpArray:
    """A vector for each class, which its name alone decides."""
    drawn = [np.random.default_rng(list(name.encode())).standard_normal(width) for name in classes]
    return np.stack(drawn).astype(np.float32)


def table(classes: Sequence[str], width: int = WIDTH) -> TextTable:
    """The table of such vectors."""
    made = vectors(classes, width)
    return TextTable(classes=tuple(classes), vectors=made, source="seeds", sha256="0" * 64, where="t.safetensors")


def table_file(path: Path, classes: Sequence[str], width: int = WIDTH) -> Path:
    """The table as a file."""
    write_text(path, tuple(classes), vectors(classes, width), "seeds")
    return path
