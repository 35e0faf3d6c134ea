"""The planes of a pack being written: every kind of factor in one long tensor, and rows that say where in it each lies.

docs/spec/pack-v1.md, "Groups, rows and patterns", in code. A pack is small by form: one row of the manifest names the
factors of all blocks of a network. ``layout`` reads them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from edgepet.canonical import canonical_json
from edgepet.deltas.branches import Branch
from edgepet.deltas.expressions import Window
from edgepet.deltas.updates import NAMES, Targeted, attributes, factors, generated
from edgepet.spec import NpArray

Leaf: TypeAlias = NpArray | Window  # what a row has a place for: stored values, or some that a seed stands for

_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]*)(?=[.:])")


class Planes:
    """Planes being filled; an array that several updates share is stored once."""

    def __init__(self) -> None:
        self._parts: dict[str, list[NpArray]] = {}
        self._arrays: dict[str, list[NpArray]] = {}
        self._ends: dict[str, int] = {}
        self._seen: dict[tuple[str, int], int] = {}

    def place(self, plane: str, leaf: Leaf) -> int:
        """Where ``leaf`` starts in ``plane``, in values, or bytes of bits; a new array is put behind the others."""
        if isinstance(leaf, Window):
            return leaf.start
        key = (plane, id(leaf))
        if key not in self._seen:
            self._seen[key] = self._ends.get(plane, 0)
            packed = np.packbits(leaf, axis=None, bitorder="little") if leaf.dtype.kind == "b" else leaf
            part = np.asarray(packed, order="C").reshape(-1)
            self._parts.setdefault(plane, []).append(part)
            self._arrays.setdefault(plane, []).append(leaf)
            self._ends[plane] = self._seen[key] + part.size
        return self._seen[key]

    @property
    def tensors(self) -> int:
        """How many arrays there are."""
        return len(self._seen)

    def flat(self) -> dict[str, NpArray]:
        """Every plane by name, as one vector: floats, integers, or bytes of bits."""
        return {plane: np.concatenate(parts) for plane, parts in self._parts.items()}

    def spread(self, weights: Mapping[int, NpArray]) -> dict[str, NpArray]:
        """What ``weights`` has for each array, by ``id``, as ``flat`` has the arrays themselves."""
        return {
            plane: np.concatenate([np.asarray(weights[id(array)]).reshape(-1) for array in arrays])
            for plane, arrays in self._arrays.items()
            if all(id(array) in weights for array in arrays)
        }


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What one row, or one of its repeats, says: texts such as its target, and what it has places for, by name.

    ``tied`` are names without a place of their own: what they are called by is the same array.
    """

    texts: Mapping[str, str]
    leaves: Mapping[str, Leaf]
    tied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, targeted: Targeted) -> Entry:
        """That of an update."""
        update = targeted.update
        texts = {"target": str(targeted.target)}
        texts |= {name: str(getattr(update, name)) for name in NAMES.get(update.kind, ())}
        arrays, first, tied = factors(update), dict[int, str](), dict[str, str]()
        for name, array in arrays.items():
            known = first.setdefault(id(array), name)
            if known != name and array.dtype.kind == "f":
                tied[name] = known
        return cls(texts, {name: a for name, a in arrays.items() if name not in tied} | generated(update), tied)


def write_updates(updates: Iterable[Targeted], planes: Planes) -> list[dict[str, object]]:
    """Groups of one kind and attributes, in such an order that the updates of one tensor keep theirs."""
    depth: dict[str, int] = {}
    groups: dict[tuple[int, str, bytes], list[Targeted]] = {}
    for targeted in updates:
        name = targeted.target.tensor
        level = depth.get(name, 0)
        depth[name] = level + 1
        key = (level, targeted.update.kind, canonical_json(attributes(targeted.update)))
        groups.setdefault(key, []).append(targeted)
    return [_write_updates(groups[key], planes) for key in sorted(groups, key=lambda key: key[0])]


def _write_updates(group: list[Targeted], planes: Planes) -> dict[str, object]:
    first = group[0].update
    rows = list(_rows(map(Entry.of, group), first.kind, planes))
    return {"kind": first.kind, **attributes(first), "on": rows}


def write_branches(branches: Iterable[Branch], planes: Planes) -> list[dict[str, object]]:
    """Groups of one kind and settings."""
    groups: dict[tuple[str, bytes], list[Branch]] = {}
    for branch in branches:
        groups.setdefault((branch.kind, canonical_json(dict(branch.settings))), []).append(branch)
    written: list[dict[str, object]] = []
    for (kind, _), group in groups.items():
        entries = [Entry({"tap": branch.tap, "into": branch.into}, branch.tensors) for branch in group]
        rows = list(_rows(entries, kind, planes))
        written.append({"kind": kind, "settings": dict(group[0].settings), "on": rows})
    return written


def _rows(entries: Iterable[Entry], kind: str, planes: Planes) -> Iterator[dict[str, object]]:
    families: dict[tuple[tuple[tuple[str, str], ...], object], list[tuple[int, Entry]]] = {}
    for entry in entries:
        templates, number = _templates(entry.texts)
        shapes = tuple((name, leaf.shape) for name, leaf in entry.leaves.items())
        families.setdefault((templates, (shapes, tuple(entry.tied.items()))), []).append((number, entry))
    for (templates, _), members in families.items():
        for run in _runs(members):
            yield from _write_run(templates, run, kind, planes)


def _templates(texts: Mapping[str, str]) -> tuple[tuple[tuple[str, str], ...], int]:
    """``blocks.3.norm.weight`` as "blocks.{}.norm.weight" and 3, by its last number, the same in all texts; else -1."""
    made, numbers = [], set[int]()
    for key, text in texts.items():
        found = list(_NUMBER.finditer(text))
        if not found:
            return tuple(texts.items()), -1
        start, stop = found[-1].span()
        made.append((key, f"{text[:start]}{{}}{text[stop:]}"))
        numbers.add(int(found[-1].group()))
    return (tuple(made), numbers.pop()) if len(numbers) == 1 else (tuple(texts.items()), -1)


def _runs(members: list[tuple[int, Entry]]) -> Iterator[list[tuple[int, Entry]]]:
    """Members whose numbers follow one another."""
    ordered = sorted(members, key=lambda member: member[0])
    for _, run in itertools.groupby(enumerate(ordered), key=lambda pair: pair[1][0] - pair[0]):
        yield [member for _, member in run]


def _write_run(
    templates: tuple[tuple[str, str], ...], run: list[tuple[int, Entry]], kind: str, planes: Planes
) -> Iterator[dict[str, object]]:
    places = [{name: planes.place(f"{kind}.{name}", leaf) for name, leaf in entry.leaves.items()} for _, entry in run]
    steps = {name: {b[name] - a[name] for a, b in itertools.pairwise(places)} for name in places[0]}
    if len(run) > 1 and any(len(step) > 1 or min(step) < 0 for step in steps.values()):
        for member in run:  # arrays shared in no regular step: a row for each target
            yield from _write_run(templates, [member], kind, planes)
        return
    first, last = run[0][0], run[-1][0]
    span = "" if first < 0 else str(first) if first == last else f"{{{first}..{last}}}"
    row: dict[str, object] = {key: template.replace("{}", span) for key, template in templates}
    for name, leaf in run[0][1].leaves.items():
        row[name] = [places[0][name], *(steps[name] or [0]), *leaf.shape]
    yield {**row, **run[0][1].tied}
