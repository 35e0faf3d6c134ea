"""The rows and planes of a pack that is read: where in one long tensor the factors of each target lie.

docs/spec/pack-v1.md, "Groups, rows and patterns", in code. ``planes`` writes them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from edgepet.deltas.branches import BRANCHES, Branch
from edgepet.deltas.expressions import EXPRESSIONS, LIMITS, NESTED, SETTINGS, WINDOWS, Factor, Window
from edgepet.deltas.generator import MOST_VALUES, SEEDS
from edgepet.deltas.updates import ATTRIBUTES, FACTORS, NAMES, UPDATES, Targeted, Update
from edgepet.errors import PackError
from edgepet.packs.planes import Leaf
from edgepet.spec import NpArray, Target
from edgepet.strict import ObjectReader

MAX_REPEAT = 4096  # targets that one pattern may name
MAX_UPDATES = 1 << 16  # targets of one pack: a megabyte of patterns could name millions
MAX_PER_TENSOR = 32  # updates of one tensor: folding is work for each
MAX_NAME = 256  # characters of a target or a point
MAX_AXES = 8  # of a factor

_INTEGERS: dict[str, np.dtype[np.generic]] = {"order": np.dtype(np.int32), "bits": np.dtype(np.uint8)}
_REPEAT = re.compile(r"\{(0|[1-9][0-9]{0,8})\.\.(0|[1-9][0-9]{0,8})\}")
_OPTIONAL = {"core", "order"}


class Reader:
    """Factors cut out of planes; ``end`` refuses values that no row names and rows that overlap.

    Args:
        planes: every plane by name, decoded, as one vector.
        updates, tensors: how many of them the pack says that it has. No more are made.
    """

    def __init__(self, planes: Mapping[str, NpArray], where: str, *, updates: int, tensors: int) -> None:
        self._planes, self._where = planes, where
        self._cut: dict[str, dict[tuple[int, tuple[int, ...]], NpArray]] = {}
        self._filled: dict[str, int] = {}
        self._whole: set[str] = set()
        self._most_updates, self._most_tensors = updates, tensors
        self._updates = self._tensors = 0
        self._per_tensor = Counter[str]()

    def has(self, name: str) -> bool:
        """Whether there is a plane ``name``."""
        return name in self._planes

    def whole(self, name: str) -> NpArray:
        """The plane ``name`` of floats, which is not cut.

        Raises:
            PackError: it is not there, or holds something else.
        """
        self._whole.add(name)
        return self._plane(name)

    def factor(self, plane: str, row: ObjectReader, name: str, *, axes: int) -> NpArray:
        """The one array of ``plane.name`` for which ``row`` has a place of ``axes`` axes.

        Raises:
            PackError: the place is none, of other axes, or reaches outside of its plane.
        """
        array = self._series(plane, name, row, 1)[0]
        if array.ndim != axes:
            raise PackError(f"{row.where}.{name}", f"needs {axes} axes", got=array.ndim)
        return array

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
        if self._updates > self._most_updates:
            raise PackError(where, f"is beyond the {self._most_updates} updates that the pack says it has")

    def updates(self, table: ObjectReader) -> Iterator[Targeted]:
        """The updates of one group.

        Raises:
            PackError: keys, kinds or patterns that version 1 does not know, too many, or factors outside of a plane.
            InputError: a target that is not NAME, NAME[a:b] or NAME[a:b, c:d].
        """
        kind = table.text("kind", choices=list(UPDATES))
        attributes: dict[str, object] = {
            name: table.number(name) if wanted is float else table.text(name, choices=cast(tuple[str, ...], wanted))
            for name, wanted in ATTRIBUTES.get(kind, {}).items()
        }
        made = {name: _expressed(table.nested(name)) for name in FACTORS[kind] if name != "order" and table.has(name)}
        rows = table.nested_list("on")
        table.end()
        for row in rows:
            targets = [
                Target.parse(text, where=row.where) for text in _expand(row.text("target"), f"{row.where}.target")
            ]
            self._count(len(targets), row.where)
            for target in targets:
                self._per_tensor[target.tensor] += 1
                if self._per_tensor[target.tensor] > MAX_PER_TENSOR:
                    raise PackError(
                        row.where, f"is beyond the {MAX_PER_TENSOR} updates of one tensor", got=target.tensor
                    )
            named = {name: self._named(name, row, len(targets)) for name in NAMES.get(kind, ())}
            each = self._factors(kind, made, row, len(targets))
            row.end()
            for i, target in enumerate(targets):
                leaves = {name: series[i] for name, series in each.items()}
                given: dict[str, object] = {name: others[i] for name, others in named.items()}
                given |= {
                    name: _factor(name, made.get(name), leaves)
                    for name in FACTORS[kind]
                    if name in made or name in leaves
                }
                yield Targeted(target, cast(Update, cast(type, UPDATES[kind])(**given, **attributes)))

    def _named(self, name: str, row: ObjectReader, count: int) -> list[Target]:
        """Other tensors that a row names, as many as it has targets."""
        found = [Target.parse(text, where=row.where) for text in _expand(row.text(name), f"{row.where}.{name}")]
        if len(found) != count:
            raise PackError(row.where, f"repeats target and {name} equally often", got=f"{count} and {len(found)}")
        return found

    def _factors(
        self, kind: str, made: Mapping[str, _Expressed], row: ObjectReader, count: int
    ) -> dict[str, Sequence[Leaf]]:
        """Everything that a row has a place for, or another's name, as often as it has targets."""
        names = [leaf for name in FACTORS[kind] for leaf in _leaves(name, made.get(name))]
        ends = {leaf: end for name in FACTORS[kind] for leaf, end in _windows(name, made.get(name))}
        needed = [name for name in (*names, *ends) if name not in _OPTIONAL]
        missing = [name for name in needed if not row.has(name)]
        if missing:
            raise PackError(row.where, f"needs the key {missing[0]!r}")
        each: dict[str, Sequence[Leaf]] = {}
        tied = [name for name in names if row.has(name) and isinstance(row.raw(name), str)]
        for name in names:
            if row.has(name) and name not in tied:
                each[name] = self._series(kind, name, row, count)
        stored = {name for name in each if name.rpartition(".")[2] not in _INTEGERS}
        for name in tied:
            if name.rpartition(".")[2] in _INTEGERS:
                raise row.refusal(name, "needs an array", repr(row.raw(name)))
            each[name] = each[row.text(name, choices=sorted(stored))]
        for name, end in ends.items():
            each[name] = _window_series(name, row, count, end)
        return each

    def _series(self, kind: str, name: str, row: ObjectReader, count: int) -> list[NpArray]:
        start, step, *shape = place = _place(row, name)
        plane = f"{kind}.{name}"
        bits = name.endswith(".bits")
        flat = self._plane(plane, _INTEGERS.get(name.rpartition(".")[2]))
        count_of = math.prod(shape)  # of Python integers: nothing wraps around
        size = -(-count_of // 8) if bits else count_of
        if size == 0 or start + step * (count - 1) + size > flat.size:
            raise PackError(f"{row.where}.{name}", f"reaches outside {plane} of {flat.size} values", got=list(place))
        cut = self._cut.setdefault(plane, {})
        series = []
        for i in range(count):
            key = (start + i * step, tuple(shape))
            if key not in cut:
                self._fill(plane, size, flat.size)
                part = flat[key[0] : key[0] + size]
                cut[key] = _unpacked(part, shape, row.where) if bits else part.reshape(shape)
            series.append(cut[key])
        return series

    def _fill(self, plane: str, size: int, whole: int) -> None:
        """Count one more array of a plane, before it is made: its arrays do not overlap."""
        self._tensors += 1
        if self._tensors > self._most_tensors:
            raise PackError(self._where, f"holds more than the {self._most_tensors} tensors that it says it has")
        self._filled[plane] = self._filled.get(plane, 0) + size
        if self._filled[plane] > whole:
            raise PackError(f"{self._where}: {plane}", "needs rows that fill it without gap or overlap", got="too many")

    def _plane(self, name: str, dtype: np.dtype[np.generic] | None = None) -> NpArray:
        flat = self._planes.get(name)
        if flat is None:
            raise PackError(self._where, f"needs the plane {name!r}")
        fits = flat.dtype.kind == "f" if dtype is None else flat.dtype == dtype
        if not fits:
            raise PackError(f"{self._where}: {name}", f"needs {dtype or 'floats'}", got=flat.dtype.name)
        return flat

    def end(self) -> None:
        """Refuse what nothing has asked for, once all groups are read.

        Raises:
            PackError: an unknown plane, a value that is not finite, or rows that leave gaps in a plane or overlap.
        """
        unknown = sorted(set(self._planes) - self._whole - set(self._cut))
        if unknown:
            raise PackError(self._where, f"knows no plane {', '.join(map(repr, unknown))}")
        for name, flat in self._planes.items():
            if flat.dtype.kind == "f" and not np.isfinite(flat).all():
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
            if end != self._planes[plane].size:
                raise PackError(
                    f"{self._where}: {plane}",
                    "holds values that no row names",
                    got=f"{self._planes[plane].size - end} of them",
                )

    def require_counts(self) -> None:
        """Refuse a pack that has not as many updates and tensors as it says.

        Raises:
            PackError: it has fewer.
        """
        for what, said, found in (
            ("updates", self._most_updates, self._updates),
            ("tensors", self._most_tensors, self._tensors),
        ):
            if said != found:
                raise PackError(f"{self._where}.decoded.{what}", f"must be the {found} that there are", got=said)


@dataclass(frozen=True, slots=True)
class _Expressed:
    """How a group says that a factor is computed: the kind, its settings, and which of its tensors are computed."""

    kind: str
    settings: Mapping[str, object]
    within: Mapping[str, _Expressed]


def _expressed(table: ObjectReader, kinds: Sequence[str] = tuple(EXPRESSIONS)) -> _Expressed:
    """Read one of ``kinds``; those within it are of the kinds that hold none."""
    kind = table.text("kind", choices=kinds)
    settings: dict[str, object] = {}
    for name, wanted in SETTINGS.get(kind, {}).items():
        settings[name] = (
            table.boolean(name) if wanted is bool else table.number(name) if wanted is float else _integer(table, name)
        )
    inner = [kind for kind in EXPRESSIONS if kind not in NESTED]
    within = {part: _expressed(table.nested(part), inner) for part in NESTED.get(kind, ()) if table.has(part)}
    table.end()
    return _Expressed(kind, settings, within)


def _integer(table: ObjectReader, name: str) -> int:
    least, most = LIMITS.get(name, (0, None))
    value = table.integer(name, least=least)
    if most is not None and value > most:
        raise table.refusal(name, f"needs an integer of at most {most}", value)
    return value


def _leaves(name: str, made: _Expressed | None) -> Iterator[str]:
    """What a row has places of stored values for: the factor itself, or the tensors that it is computed from."""
    if made is None:
        yield name
        return
    for part in EXPRESSIONS[made.kind].tensors:
        yield from _leaves(f"{name}.{part}", made.within.get(part))


def _windows(name: str, made: _Expressed | None) -> Iterator[tuple[str, int]]:
    """What a row has places of generated values for, and how many there are."""
    if made is None:
        return
    for part in WINDOWS.get(made.kind, ()):
        yield f"{name}.{part}", cast(int, made.settings.get("total", SEEDS))
    for part, inner in made.within.items():
        yield from _windows(f"{name}.{part}", inner)


def _factor(name: str, made: _Expressed | None, leaves: Mapping[str, Leaf]) -> Factor:
    """A factor of the ``leaves`` that are called after it."""
    if made is None:
        return leaves[name]
    kind = EXPRESSIONS[made.kind]
    parts = {part: _factor(f"{name}.{part}", made.within.get(part), leaves) for part in kind.tensors}
    windows = {part: leaves[f"{name}.{part}"] for part in WINDOWS.get(made.kind, ())}
    return cast(type, kind)(**parts, **windows, **made.settings)


def _window_series(name: str, row: ObjectReader, count: int, end: int) -> list[Window]:
    start, step, *shape = _place(row, name)
    size = math.prod(shape)
    if not 0 < size <= MOST_VALUES or start + step * (count - 1) + size > end:
        what = f"needs 1 to {MOST_VALUES} values of {end}"
        raise PackError(f"{row.where}.{name}", what, got=[start, step, *shape])
    return [Window(start + i * step, tuple(shape)) for i in range(count)]


def _place(row: ObjectReader, name: str) -> tuple[int, ...]:
    place = row.integers(name)
    if not 2 <= len(place) <= 2 + MAX_AXES:
        raise PackError(f"{row.where}.{name}", f"needs [start, step, at most {MAX_AXES} axes]", got=list(place[:12]))
    return place


def _unpacked(packed: NpArray, shape: list[int], where: str) -> NpArray:
    bits = np.unpackbits(packed, bitorder="little")
    if bits[math.prod(shape) :].any():
        raise PackError(where, "needs zeros behind the last of its bits")
    return bits[: math.prod(shape)].astype(bool).reshape(shape)


def _expand(pattern: str, where: str) -> Iterator[str]:
    """``blocks.{0..2}.x`` as blocks.0.x, blocks.1.x, blocks.2.x."""
    if len(pattern) > MAX_NAME:
        raise PackError(where, f"needs at most {MAX_NAME} characters", got=len(pattern))
    match = _REPEAT.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if not first < last < first + MAX_REPEAT:
        raise PackError(where, f"repeats at least 2 and at most {MAX_REPEAT} times", got=repr(pattern))
    for number in range(first, last + 1):
        yield f"{pattern[: match.start()]}{number}{pattern[match.end() :]}"
