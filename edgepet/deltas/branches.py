"""Branches: modules of a task that cannot be folded and stay in the graph. Data here; ``networks.graft`` runs them.

A branch reads what flows through one point of the backbone and adds to another. A point is a module's name with ``:in``
or ``:out``, "blocks.3.norm2:in". Tasks whose branches have one *structure*, all but the values, share one graph.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgepet.canonical import canonical_json
from edgepet.errors import InputError
from edgepet.spec import Array

POINT = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*:(?:in|out)")
ATTENTION = ("key-values", "prompts")  # kinds that go into torch's attention operator
ACTIVATIONS = ("relu", "gelu", "quick-gelu", "none")
MOST_RECURRENCES = 8  # each is nodes in a graph


@dataclass(frozen=True, slots=True)
class Kind:
    """How many axes each tensor of a kind of branch has, and the types of its settings."""

    tensors: Mapping[str, int]
    settings: Mapping[str, type]


_BOTTLENECK = {"down.weight": 2, "down.bias": 1, "up.weight": 2, "up.bias": 1}
_GRID = {
    "prefix": int,
    "height": int,
    "width": int,
}  # tokens in front of the patches, and their grid
_PAIR = Kind(
    {"conv.weight": 4, "conv.bias": 1, "point.weight": 4, "point.bias": 1},
    {"stride": int, "padding": int, "dilation": int, "activation": str},
)
BRANCHES: dict[str, Kind] = {
    # up act(down x), on the last axis
    "bottleneck": Kind(_BOTTLENECK, {"activation": str}),
    # up act(conv act(down x)), the convolution over the grid of patches; tokens in front are grids of one
    "patch-conv": Kind({**_BOTTLENECK, "conv.weight": 4, "conv.bias": 1}, {**_GRID, "activation": str}),
    # point act(conv x) on (n, C, H, W); as many groups as the convolution puts out channels
    "conv-pair": _PAIR,
    # the same on (n, H, W, C)
    "conv-pair-last": _PAIR,
    # out act(conv act(reduce x)) on (n, C, H, W), or on the patches of (n, N, C) or (n, H, W, C), ``height`` then not 0
    "stage-prompt": Kind(
        {"reduce.weight": 2, "reduce.bias": 1, "conv.weight": 4, "conv.bias": 1, "out.weight": 2, "out.bias": 1},
        {**_GRID, "activation": str},
    ),
    # out z; z = gelu(reduce x), then ``recurrences`` times z + conv(gelu(mix [z; softmax(slots z)])), depthwise and on
    # what stage-prompt is on; the biases of the five in this order in one vector
    "semantic-prompt": Kind(
        {"reduce": 2, "slots": 2, "mix": 2, "conv": 4, "out": 2, "bias": 1},
        {**_GRID, "recurrences": int},
    ),
    # up conv(down x) over the frames of a clip, patches only
    "temporal": Kind({**_BOTTLENECK, "conv.weight": 2, "conv.bias": 1}, {"prefix": int, "frames": int}),
    # tokens put behind those in front of the patches at ``tap``, taken away again at ``into``
    "tokens": Kind({"prompt": 2}, {"prefix": int}),
    # further keys and values of an attention
    "key-values": Kind({"keys": 2, "values": 2}, {"heads": int}),
    # the same, from tokens that go through the norm at ``tap`` and the attention's own projection
    "prompts": Kind({"prompt": 2}, {"heads": int}),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """One branch: reads at ``tap``, adds at ``into``; ``BRANCHES`` says what a ``kind`` has of settings and tensors."""

    kind: str
    tap: str
    into: str
    settings: Mapping[str, int | str]
    tensors: Mapping[str, Array]

    @property
    def named(self) -> dict[str, Array]:
        """The tensors under their names in a graph, ``INTO/KIND.NAME``."""
        return {f"{self.into}/{self.kind}.{name}": tensor for name, tensor in self.tensors.items()}

    def with_tensors(self, named: Mapping[str, Array]) -> Branch:
        """The branch with other tensors, which are called as ``named`` calls them."""
        return replace(self, tensors={name: named[f"{self.into}/{self.kind}.{name}"] for name in self.tensors})

    def check(self, where: str) -> None:
        """Refuse what no graph could be made of.

        Raises:
            InputError: a point that is none, other tensors or axes than this kind has, an unknown activation, or more
                recurrences than it may have.
        """
        kind = BRANCHES[self.kind]
        for point in (self.tap, self.into):
            if POINT.fullmatch(point) is None:
                raise InputError(where, "a point is a module's name with :in or :out", got=repr(point))
        wrong = {name: len(t.shape) for name, t in self.tensors.items() if kind.tensors.get(name) != len(t.shape)}
        if wrong or self.tensors.keys() != kind.tensors.keys():
            wanted = ", ".join(f"{name} of {axes} axes" for name, axes in kind.tensors.items())
            raise InputError(f"{where}: {self.into}", f"{self.kind} needs {wanted}", got=", ".join(self.tensors))
        activation = self.settings.get("activation", ACTIVATIONS[0])
        if activation not in ACTIVATIONS:
            raise InputError(f"{where}: {self.into}", f"knows {', '.join(ACTIVATIONS)}", got=repr(activation))
        recurrences = self.settings.get("recurrences", 1)
        if not 1 <= int(recurrences) <= MOST_RECURRENCES:
            what = f"{self.kind} recurs 1 to {MOST_RECURRENCES} times"
            raise InputError(f"{where}: {self.into}", what, got=recurrences)


def structure_of(branches: Iterable[Branch]) -> list[object]:
    """All of the branches but their values, as JSON, in the order in which they act."""
    return [
        [b.kind, b.tap, b.into, dict(b.settings), {name: list(t.shape) for name, t in sorted(b.tensors.items())}]
        for b in ordered(branches)
    ]


def shapes_of(structure: Iterable[Sequence[Any]]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a ``structure_of`` branches, by its name in a graph."""
    return {
        f"{into}/{kind}.{name}": tuple(shape)
        for kind, _, into, _, tensors in structure
        for name, shape in tensors.items()
    }


def ordered(branches: Iterable[Branch]) -> list[Branch]:
    """By the point that they add to and by kind: this is how they act, however a pack lists them."""
    return sorted(branches, key=lambda branch: (branch.into, branch.kind))


def structure_digest(structure: list[object]) -> str:
    """Twelve hex digits of the sha256 of a structure; empty where there is no branch."""
    return hashlib.sha256(canonical_json(structure)).hexdigest()[:12] if structure else ""


def named_tensors(branches: Iterable[Branch]) -> dict[str, Array]:
    """Every tensor of ``branches`` under its name in a graph."""
    return {name: tensor for branch in branches for name, tensor in branch.named.items()}


def require_distinct(branches: Iterable[Branch], where: str) -> None:
    """Refuse two branches whose tensors would have one name.

    Raises:
        InputError: two branches of one kind add to one point.
    """
    seen = set[tuple[str, str]]()
    for branch in branches:
        key = (branch.kind, branch.into)
        if key in seen:
            raise InputError(where, f"has two branches of kind {branch.kind}", got=branch.into)
        seen.add(key)


def arrays_of(branches: Iterable[Branch]) -> Iterator[Array]:
    """Every tensor of ``branches``, branch by branch."""
    for branch in branches:
        yield from branch.tensors.values()
