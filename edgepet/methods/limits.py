"""What settings that many methods have must be."""

from __future__ import annotations

from edgepet.deltas.generator import SEEDS
from edgepet.errors import InputError


def require_rank(name: str, rank: int) -> None:
    """Refuse a rank that is none; ``name`` is the method's.

    Raises:
        InputError: ``rank`` is below 1.
    """
    if rank < 1:
        raise InputError(name, "needs a rank of at least 1", got=rank)


def require_length(name: str, length: int) -> None:
    """Refuse a number of tokens that is none; ``name`` is the method's.

    Raises:
        InputError: ``length`` is below 1.
    """
    if length < 1:
        raise InputError(name, "needs a length of at least 1", got=length)


def require_seed(name: str, seed: int) -> None:
    """Refuse a seed that the format's generator does not take; ``name`` is the method's.

    Raises:
        InputError: ``seed`` is not from 0 to below 2^53.
    """
    if not 0 <= seed < SEEDS:
        raise InputError(name, "needs a seed from 0 to below 2^53", got=seed)
