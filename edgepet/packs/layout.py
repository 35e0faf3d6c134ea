"""The rows and planes of a pack: every kind of factor in one long tensor, and where in it each target's lies.

docs/spec/pack-v1.md, "Groups, rows and patterns", in code. A pack is small by form: one row of the manifest names the
factors of all blocks of a network.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from edgepet.canonical import canonical_json
from edgepet.deltas.branches import BRANCHES, Branch
from edgepet.deltas.expressions import EXPRESSIONS, SETTINGS
from edgepet.deltas.updates import FACTORS, UPDATES, Targeted, Update, attributes, factors
from edgepet.errors import InputError, PackError, option
from edgepet.spec import NpArray, Target
from edgepet.strict import ObjectReader

MAX_REPEAT = 4096  # targets that one pattern may name
MAX_UPDATES = 1 << 16  # targets of one pack: a megabyte of patterns could name millions

_INTEGERS: dict[str, np.dtype[np.generic]] = {"order": np.dtype(np.int32), "bits": np.dtype(np.uint8)}
_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]*)(?=[.:])")
_REPEAT = re.compile(r"\{(0|[1-9][0-9]*)\.\.(0|[1-9][0-9]*)\}")


# --------------------------------------------------------------------------------------------------------- writing


class Planes:
    """Planes being filled; an array that several updates share is stored once."""

    def __init__(self, task: str, dtype: type[np.floating]) -> None:
        self._task, self._dtype = task, dtype
        self._parts: dict[str, list[NpArray]] = {}
        self._ends: dict[str, int] = {}
        self._seen: dict[tuple[str, int], int] = {}

    def place(self, plane: str, array: NpArray) -> int:
        """Where ``array`` starts in ``plane``, in values, or bytes of bits; a new one is put behind the others.

        Raises:
            InputError: as ``cast``.
        """
        key = (plane, id(array))
        if key not in self._seen:
            self._seen[key] = self._ends.get(plane, 0)
            part = self.cast(array, plane).reshape(-1)
            self._parts.setdefault(plane, []).append(part)
            self._ends[plane] = self._seen[key] + part.size
        return self._seen[key]

    def cast(self, array: NpArray, name: str) -> NpArray:
        """A new array as it is stored: floats in the codec's dtype, bits packed into bytes, integers as int32.

        Raises:
            InputError: a value that is not finite, or beyond the codec; ``name`` is for the message.
        """
        if array.dtype.kind == "b":
            return np.packbits(array, axis=None, bitorder="little")
        if array.dtype.kind != "f":
            return array.astype(np.int32, order="C")
        with np.errstate(over="ignore"):
            stored = array.astype(self._dtype, order="C")  # safetensors writes memory as it lies, and no strides
        if not np.isfinite(stored).all():
            raise InputError(
                f"{self._task}: {name}",
                f"holds a value that {np.dtype(self._dtype).name} cannot",
                got=f"largest magnitude {np.abs(array).max():.3g}",
                fix=f"store it with {option('codec', 'fp32')},"
                " or train with a smaller learning rate if it is not finite",
            )
        return stored

    def tensors(self) -> dict[str, NpArray]:
        """Every plane by name, as one vector."""
        return {plane: np.concatenate(parts) for plane, parts in self._parts.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What one row, or one of its repeats, says: texts such as its target, and the arrays that it names."""

    texts: Mapping[str, str]
    arrays: Mapping[str, NpArray]


def write_updates(updates: Iterable[Targeted], planes: Planes) -> list[dict[str, object]]:
    """Groups of one kind and attributes, in such an order that the updates of one tensor keep theirs.

    Raises:
        InputError: as ``Planes.cast``.
    """
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
    entries = [Entry({"target": str(targeted.target)}, factors(targeted.update)) for targeted in group]
    return {"kind": first.kind, **attributes(first), "on": list(_rows(entries, first.kind, planes))}


def write_branches(branches: Iterable[Branch], planes: Planes) -> list[dict[str, object]]:
    """Groups of one kind and settings.

    Raises:
        InputError: as ``Planes.cast``.
    """
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
        shapes = tuple((name, array.shape) for name, array in entry.arrays.items())
        families.setdefault((templates, shapes), []).append((number, entry))
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
    places = [{name: planes.place(f"{kind}.{name}", array) for name, array in entry.arrays.items()} for _, entry in run]
    steps = {name: {b[name] - a[name] for a, b in itertools.pairwise(places)} for name in places[0]}
    if len(run) > 1 and any(len(step) > 1 or min(step) < 0 for step in steps.values()):
        for member in run:  # arrays shared in no regular step: a row for each target
            yield from _write_run(templates, [member], kind, planes)
        return
    first, last = run[0][0], run[-1][0]
    span = "" if first < 0 else str(first) if first == last else f"{{{first}..{last}}}"
    row: dict[str, object] = {key: template.replace("{}", span) for key, template in templates}
    for name, array in run[0][1].arrays.items():
        row[name] = [places[0][name], *(steps[name] or [0]), *array.shape]
    yield row


# --------------------------------------------------------------------------------------------------------- reading


class Reader:
    """Factors cut out of planes; ``end`` refuses values that no row names and rows that overlap."""

    def __init__(self, tensors: dict[str, NpArray], dtype: np.dtype[np.floating], where: str) -> None:
        self._tensors, self._dtype, self._where = tensors, dtype, where
        self._cut: dict[str, dict[tuple[int, tuple[int, ...]], NpArray]] = {}
        self._whole: set[str] = set()
        self._updates = 0

    def whole(self, name: str, *, axes: int) -> NpArray:
        """The tensor ``name``, which is no plane and is not cut.

        Raises:
            PackError: it is not there, not in the codec's dtype, or has not ``axes`` axes.
        """
        self._whole.add(name)
        tensor = self._plane(name, self._dtype)
        if tensor.ndim != axes:
            raise PackError(f"{self._where}: {name}", f"needs {axes} axes", got=tensor.ndim)
        return tensor

    def branches(self, table: ObjectReader) -> Iterator[Branch]:
        """The branches of one group.

        Raises:
            PackError: keys, kinds or patterns that version 1 does not know, too many, or factors outside of a plane.
        """
        kind = BRANCHES[table.text("kind", choices=list(BRANCHES))]
        name, given = table.text("kind"), table.nested("settings")
        settings: dict[str, int | str] = {
            key: given.text(key) if wanted is str else given.integer(key) for key, wanted in kind.settings.items()
        }
        given.end()
        rows = table.nested_list("on")
        table.end()
        for row in rows:
            taps, intos = (list(_expand(row.text(key), f"{row.where}.{key}")) for key in ("tap", "into"))
            if len(taps) != len(intos):
                raise PackError(row.where, "repeats tap and into equally often", got=f"{len(taps)} and {len(intos)}")
            self._count(len(taps), row.where)
            each = {tensor: self._series(name, tensor, row, len(taps)) for tensor in kind.tensors}
            row.end()
            for i, (tap, into) in enumerate(zip(taps, intos, strict=True)):
                tensors = {tensor: series[i] for tensor, series in each.items()}
                yield Branch(kind=name, tap=tap, into=into, settings=settings, tensors=tensors)

    def _count(self, more: int, where: str) -> None:
        self._updates += more
        if self._updates > MAX_UPDATES:
            raise PackError(where, f"is beyond the {MAX_UPDATES} updates that a pack may hold")

    def updates(self, table: ObjectReader) -> Iterator[Targeted]:
        """The updates of one group.

        Raises:
            PackError: keys, kinds or patterns that version 1 does not know, too many, or factors outside of a plane.
            InputError: a target that is not NAME, NAME[a:b] or NAME[a:b, c:d].
        """
        kind = table.text("kind", choices=list(UPDATES))
        settings: dict[str, object] = {}
        if kind == "scale":
            settings["axis"] = table.text("axis", choices=["out", "in"])
        if kind in ("low-rank", "kronecker", "precompose"):
            settings["scale"] = table.number("scale")
        expressions = {
            name: _expression(table.nested(name)) for name in FACTORS[kind] if name != "order" and table.has(name)
        }
        names = [leaf for name in FACTORS[kind] for leaf in _leaves(name, expressions)]
        rows = table.nested_list("on")
        table.end()
        for row in rows:
            texts = _expand(row.text("target"), f"{row.where}.target")
            targets = [Target.parse(text, where=row.where) for text in texts]
            self._count(len(targets), row.where)
            each = {name: self._series(kind, name, row, len(targets)) for name in names if row.has(name)}
            row.end()
            for i, target in enumerate(targets):
                arrays = {name: series[i] for name, series in each.items()}
                yield Targeted(target, self._build(kind, arrays, expressions, settings, row.where))

    def _build(
        self,
        kind: str,
        arrays: dict[str, NpArray],
        expressions: Mapping[str, Mapping[str, object]],
        settings: dict[str, object],
        where: str,
    ) -> Update:
        optional = {"core", "order"} - set(expressions)
        leaves = [leaf for name in FACTORS[kind] if name not in optional for leaf in _leaves(name, expressions)]
        missing = [leaf for leaf in leaves if leaf not in arrays]
        if missing:
            raise PackError(where, f"needs the key {missing[0]!r}")
        factors: dict[str, object] = {name: array for name, array in arrays.items() if "." not in name}
        for name, made in expressions.items():
            parts = {leaf.removeprefix(f"{name}."): arrays[leaf] for leaf in _leaves(name, expressions)}
            rest = {key: value for key, value in made.items() if key != "kind"}
            factors[name] = cast(type, EXPRESSIONS[str(made["kind"])])(**parts, **rest)
        return cast(Update, cast(type, UPDATES[kind])(**factors, **settings))

    def _series(self, kind: str, name: str, row: ObjectReader, count: int) -> list[NpArray]:
        place = row.integers(name)
        if len(place) < 2:
            raise PackError(f"{row.where}.{name}", "needs [start, step, axes...]", got=list(place))
        start, step, *shape = place
        plane = f"{kind}.{name}"
        bits = name.endswith(".bits")
        tensor = self._plane(plane, _INTEGERS.get(name.rpartition(".")[2], self._dtype))
        count_of = math.prod(shape)  # of Python integers: nothing wraps around
        size = -(-count_of // 8) if bits else count_of
        if tensor.ndim != 1 or size == 0 or start + step * (count - 1) + size > tensor.size:
            raise PackError(f"{row.where}.{name}", f"reaches outside {plane} of {tensor.size} values", got=list(place))
        cut = self._cut.setdefault(plane, {})
        series = []
        for i in range(count):
            key = (start + i * step, tuple(shape))
            part = tensor[key[0] : key[0] + size]
            series.append(cut.setdefault(key, _unpacked(part, shape, row.where) if bits else part.reshape(shape)))
        return series

    def _plane(self, name: str, dtype: np.dtype[np.generic]) -> NpArray:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise PackError(self._where, f"needs the tensor {name!r}")
        if tensor.dtype != dtype:
            raise PackError(f"{self._where}: {name}", f"needs {dtype.name}", got=tensor.dtype.name)
        return tensor

    def end(self) -> None:
        """Refuse what nothing has asked for, once all groups are read.

        Raises:
            PackError: an unknown tensor, a value that is not finite, or rows that leave gaps in a plane or overlap.
        """
        unknown = sorted(set(self._tensors) - self._whole - set(self._cut))
        if unknown:
            raise PackError(self._where, f"knows no tensor {', '.join(map(repr, unknown))}")
        for name, tensor in self._tensors.items():
            if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
                raise PackError(f"{self._where}: {name}", "holds a value that is not finite")
        for plane, cut in self._cut.items():
            end = 0
            for start, shape in sorted(cut):
                if start != end:
                    raise PackError(
                        f"{self._where}: {plane}",
                        "needs rows that fill it without gap or overlap",
                        got=f"{start} after {end}",
                    )
                values = math.prod(shape)
                end += -(-values // 8) if plane.endswith(".bits") else values
            if end != self._tensors[plane].size:
                raise PackError(
                    f"{self._where}: {plane}",
                    "holds values that no row names",
                    got=f"{self._tensors[plane].size - end} of them",
                )


def _expression(table: ObjectReader) -> dict[str, object]:
    """The kind and the settings of a factor that is computed."""
    made: dict[str, object] = {"kind": table.text("kind", choices=list(EXPRESSIONS))}
    for name, kind in SETTINGS.get(str(made["kind"]), {}).items():
        made[name] = table.boolean(name) if kind is bool else table.integer(name)
    table.end()
    return made


def _leaves(name: str, expressions: Mapping[str, Mapping[str, object]]) -> list[str]:
    """What a row names for a factor: the factor itself, or the tensors that it is computed from."""
    if name not in expressions:
        return [name]
    return [f"{name}.{part}" for part in EXPRESSIONS[str(expressions[name]["kind"])].tensors]


def _unpacked(packed: NpArray, shape: list[int], where: str) -> NpArray:
    bits = np.unpackbits(packed, bitorder="little")
    if bits[math.prod(shape) :].any():
        raise PackError(where, "needs zeros behind the last of its bits")
    return bits[: math.prod(shape)].astype(bool).reshape(shape)


def _expand(pattern: str, where: str) -> Iterator[str]:
    """``blocks.{0..2}.x`` as blocks.0.x, blocks.1.x, blocks.2.x."""
    match = _REPEAT.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if not first < last < first + MAX_REPEAT:
        raise PackError(where, f"repeats at least 2 and at most {MAX_REPEAT} times", got=repr(pattern))
    for number in range(first, last + 1):
        yield f"{pattern[: match.start()]}{number}{pattern[match.end() :]}"
