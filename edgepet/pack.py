"""The ``.pet`` file, format version 1: one delta as strict safetensors with one canonical manifest.

The format is docs/spec/pack-v1.md; this file is that page in code. A pack is small by form: every kind of factor is one
plane (a one-dimensional tensor), and a row of the manifest names where in the plane the factor of many targets lies.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from edgepet.canonical import canonical_json, parse_json
from edgepet.delta import Delta, Head, Score
from edgepet.errors import InputError, PackError
from edgepet.expressions import EXPRESSIONS, SETTINGS
from edgepet.files import read_file, write_file
from edgepet.spec import FilePath, NpArray, Preprocess, Target
from edgepet.strict import Table
from edgepet.updates import FACTORS, UPDATES, Targeted, Update, attributes, factors

Codec: TypeAlias = Literal["fp32", "fp16"]
CODECS: dict[Codec, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}
FORMAT, VERSION = "edgepet-pack", 1
MAX_HEADER_BYTES = 1 << 20
MAX_REPEAT = 4096  # targets that one pattern may name
MAX_UPDATES = 1 << 16  # targets of one pack: a megabyte of patterns could name millions

_INTEGERS: dict[str, np.dtype[np.generic]] = {"order": np.dtype(np.int32), "bits": np.dtype(np.uint8)}
_REPEAT = re.compile(r"\{(0|[1-9][0-9]*)\.\.(0|[1-9][0-9]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A delta as it was read: ``delta`` holds the stored precision, ``bytes_by_kind`` the bytes of every plane."""

    delta: Delta
    codec: Codec
    size_bytes: int
    sha256: str
    bytes_by_kind: Mapping[str, int]


def encode_pack(delta: Delta, *, codec: Codec = "fp16") -> bytes:
    """The pack of ``delta``; the same delta gives the same bytes.

    Raises:
        InputError: a value is not finite in ``codec``.
    """
    planes = _Planes(delta.task, CODECS[codec])
    rows = [_write_group(group, planes) for group in _groups(delta.updates)]
    tensors = planes.tensors()
    tensors["head.weight"] = planes.cast(delta.head.weight, "head.weight")
    tensors["head.bias"] = planes.cast(delta.head.bias, "head.bias")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "task": delta.task,
        "codec": codec,
        "backbone": {"name": delta.backbone, "fingerprint": delta.fingerprint},
        "updates": rows,
        "branches": [],
        "labels": list(delta.labels),
        "preprocess": delta.preprocess.as_json(),
        "method": {"name": delta.method, "settings": dict(delta.settings)},
        "training": dict(delta.training),
        "val": {"top1": delta.val.top1, "n": delta.val.n},
        "licences": list(delta.licences),
    }
    return _container(tensors, canonical_json(manifest).decode("utf-8"))


def write_pack(path: FilePath, delta: Delta, *, codec: Codec = "fp16") -> int:
    """Write ``delta`` to ``path`` and return the file's bytes."""
    data = encode_pack(delta, codec=codec)
    read_pack(data)  # what a device would refuse is not written
    write_file(Path(path), data)
    return len(data)


def read_pack(source: Path | str | bytes) -> Pack:
    """Read a pack without any knowledge of its backbone, and refuse whatever version 1 does not know.

    Raises:
        PackError: it is not a pack of version 1 in the one canonical spelling of its tensors and manifest.
        InputError: the file cannot be read.
    """
    where = "pack" if isinstance(source, bytes) else Path(source).name
    data = source if isinstance(source, bytes) else read_file(Path(source))
    tensors, manifest = _open_container(data, where)
    try:
        delta, codec = _read_manifest(manifest, tensors, where)
    except InputError as error:
        raise error if isinstance(error, PackError) else PackError(where, str(error)) from error
    return Pack(
        delta=delta,
        codec=codec,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        bytes_by_kind={name: int(tensor.nbytes) for name, tensor in sorted(tensors.items())},
    )


# ---------------------------------------------------------------------------------------------------- the container


def _container(tensors: Mapping[str, NpArray], manifest: str) -> bytes:
    data: bytes = safetensors.numpy.save(dict(tensors), metadata={"edgepet": manifest})
    return data


def _open_container(data: bytes, where: str) -> tuple[dict[str, NpArray], object]:
    start = data[:8]
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise PackError(
            where, "is not a pack or is cut short", got=f"{len(data)} bytes", fix="copy the file again, whole"
        )
    try:
        header = Table(parse_json(data[8 : 8 + length]), where)
        tensors: dict[str, NpArray] = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise PackError(where, "is not a pack or is cut short", got=error, fix="copy the file again, whole") from error
    except KeyError as error:  # safetensors knows number formats that NumPy has no name for
        raise PackError(where, "holds a number format that no pack has", got=error) from error
    except (ValueError, RecursionError) as error:
        raise PackError(where, "has no readable header", got=error, fix="copy the file again, whole") from error
    text = header.table("__metadata__").text("edgepet")
    # Safetensors readers accept duplicate names, leading spaces and unknown fields; two readings of one signed file
    # must not differ, so only the one canonical spelling is a pack.
    if _container(tensors, text) != data:
        raise PackError(where, "is not written in the canonical form", fix="write it again with edgepet")
    try:
        manifest = parse_json(text)
        canonical = canonical_json(manifest).decode("utf-8") == text
    except (ValueError, RecursionError) as error:
        raise PackError(where, "has no readable manifest", got=error) from error
    if not canonical:
        raise PackError(where, "has a manifest that is not canonical JSON", fix="write it again with edgepet")
    return tensors, manifest


# --------------------------------------------------------------------------------------------------------- writing


class _Planes:
    """Planes being filled; an array that several updates share is stored once."""

    def __init__(self, task: str, dtype: type[np.floating]) -> None:
        self._task, self._dtype = task, dtype
        self._parts: dict[str, list[NpArray]] = {}
        self._ends: dict[str, int] = {}
        self._seen: dict[tuple[str, int], int] = {}

    def place(self, plane: str, array: NpArray) -> int:
        """Where ``array`` starts in ``plane``."""
        key = (plane, id(array))
        if key not in self._seen:
            self._seen[key] = self._ends.get(plane, 0)
            part = self.cast(array, plane).reshape(-1)
            self._parts.setdefault(plane, []).append(part)
            self._ends[plane] = self._seen[key] + part.size
        return self._seen[key]

    def cast(self, array: NpArray, name: str) -> NpArray:
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
                fix="store it with --codec fp32, or train with a smaller learning rate if it is not finite",
            )
        return stored

    def tensors(self) -> dict[str, NpArray]:
        return {plane: np.concatenate(parts) for plane, parts in self._parts.items()}


def _groups(updates: Iterable[Targeted]) -> list[list[Targeted]]:
    """Updates of one kind and attributes together, so that the order of those on one tensor is kept."""
    depth: dict[str, int] = {}
    groups: dict[tuple[int, str, bytes], list[Targeted]] = {}
    for targeted in updates:
        name = targeted.target.tensor
        level = depth.get(name, 0)
        depth[name] = level + 1
        key = (level, targeted.update.kind, canonical_json(attributes(targeted.update)))
        groups.setdefault(key, []).append(targeted)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _write_group(group: list[Targeted], planes: _Planes) -> dict[str, object]:
    first = group[0].update
    return {"kind": first.kind, **attributes(first), "on": list(_write_rows(group, planes))}


def _write_rows(group: list[Targeted], planes: _Planes) -> Iterator[dict[str, object]]:
    families: dict[tuple[str, object], list[tuple[int, Targeted]]] = {}
    for targeted in group:
        template, number = _template(str(targeted.target))
        shapes = tuple((name, array.shape) for name, array in factors(targeted.update).items())
        families.setdefault((template, shapes), []).append((number, targeted))
    for (template, _), members in families.items():
        for run in _runs(members):
            yield from _write_run(template, run, planes)


def _template(target: str) -> tuple[str, int]:
    """``blocks.3.norm.weight`` as ("blocks.{}.norm.weight", 3), by its last number; (target, -1) without one."""
    found = list(re.finditer(r"(?<=\.)(0|[1-9][0-9]*)(?=\.)", target))
    if not found:
        return target, -1
    start, stop = found[-1].span()
    return f"{target[:start]}{{}}{target[stop:]}", int(found[-1].group())


def _runs(members: list[tuple[int, Targeted]]) -> Iterator[list[tuple[int, Targeted]]]:
    """Members whose numbers follow one another."""
    ordered = sorted(members, key=lambda member: member[0])
    for _, run in itertools.groupby(enumerate(ordered), key=lambda pair: pair[1][0] - pair[0]):
        yield [member for _, member in run]


def _write_run(template: str, run: list[tuple[int, Targeted]], planes: _Planes) -> Iterator[dict[str, object]]:
    kind = run[0][1].update.kind
    places = [
        {name: planes.place(f"{kind}.{name}", array) for name, array in factors(targeted.update).items()}
        for _, targeted in run
    ]
    steps = {name: {b[name] - a[name] for a, b in itertools.pairwise(places)} for name in places[0]}
    if len(run) > 1 and any(len(step) > 1 or min(step) < 0 for step in steps.values()):
        for member in run:  # arrays shared in no regular step: a row for each target
            yield from _write_run(template, [member], planes)
        return
    first, last = run[0][0], run[-1][0]
    span = "" if first < 0 else str(first) if first == last else f"{{{first}..{last}}}"
    row: dict[str, object] = {"target": template.replace("{}", span)}
    for name, array in factors(run[0][1].update).items():
        row[name] = [places[0][name], *(steps[name] or [0]), *array.shape]
    yield row


# --------------------------------------------------------------------------------------------------------- reading


def _read_manifest(value: object, tensors: dict[str, NpArray], where: str) -> tuple[Delta, Codec]:
    table = Table(value, where)
    table.text("format", choices=[FORMAT])
    if table.integer("version") != VERSION:
        raise PackError(
            f"{where}.version",
            f"this edgepet reads version {VERSION}",
            got=table.integer("version"),
            fix="update edgepet",
        )
    codec = cast(Codec, table.text("codec", choices=list(CODECS)))
    if table.sequence("branches"):
        raise PackError(f"{where}.branches", "this edgepet folds updates and knows no branches", fix="update edgepet")
    reader = _Reader(tensors, np.dtype(CODECS[codec]), where)
    updates = tuple(itertools.chain.from_iterable(reader.group(group) for group in table.tables("updates")))
    head = Head(weight=reader.whole("head.weight", axes=2), bias=reader.whole("head.bias", axes=1))
    reader.end()
    backbone, method, val = table.table("backbone"), table.table("method"), table.table("val")
    delta = Delta(
        task=table.text("task"),
        backbone=backbone.text("name"),
        fingerprint=backbone.text("fingerprint"),
        updates=updates,
        head=head,
        labels=table.texts("labels"),
        preprocess=read_preprocess(table.table("preprocess")),
        method=method.text("name"),
        settings=_provenance(method, "settings"),
        training=_provenance(table, "training"),
        val=Score(top1=val.number("top1"), n=val.integer("n")),
        licences=table.texts("licences"),
    )
    for part in (backbone, method, val, table):
        part.end()
    return delta, codec


def read_preprocess(table: Table) -> Preprocess:
    """Preprocessing from JSON, as ``Preprocess.as_json`` writes it."""
    sizes = table.integers("image_size", least=1)
    if len(sizes) != 2:
        raise PackError(f"{table.where}.image_size", "needs a height and a width", got=list(sizes))
    preprocess = Preprocess(
        image_size=(sizes[0], sizes[1]),
        interpolation=cast(
            Literal["bicubic", "bilinear"], table.text("interpolation", choices=["bicubic", "bilinear"])
        ),
        crop_fraction=table.number("crop_fraction"),
        crop=cast(Literal["center", "squash"], table.text("crop", choices=["center", "squash"])),
        mean=cast(tuple[float, float, float], table.numbers("mean", count=3)),
        std=cast(tuple[float, float, float], table.numbers("std", count=3)),
    )
    table.end()
    if not 0 < preprocess.crop_fraction <= 1 or min(preprocess.std) <= 0:
        raise PackError(table.where, "needs a crop_fraction in (0, 1] and a std above 0")
    return preprocess


def _provenance(table: Table, key: str) -> dict[str, object]:
    value = table.raw(key)
    if not isinstance(value, dict):
        raise PackError(f"{table.where}.{key}", "needs an object", got=json.dumps(value))
    return value


class _Reader:
    """Factors cut out of planes; ``end`` refuses values that no row names and rows that overlap."""

    def __init__(self, tensors: dict[str, NpArray], dtype: np.dtype[np.floating], where: str) -> None:
        self._tensors, self._dtype, self._where = tensors, dtype, where
        self._cut: dict[str, dict[tuple[int, tuple[int, ...]], NpArray]] = {}
        self._whole: set[str] = set()
        self._updates = 0

    def whole(self, name: str, *, axes: int) -> NpArray:
        self._whole.add(name)
        tensor = self._plane(name, self._dtype)
        if tensor.ndim != axes:
            raise PackError(f"{self._where}: {name}", f"needs {axes} axes", got=tensor.ndim)
        return tensor

    def group(self, table: Table) -> Iterator[Targeted]:
        kind = table.text("kind", choices=list(UPDATES))
        settings: dict[str, object] = {}
        if kind == "scale":
            settings["axis"] = table.text("axis", choices=["out", "in"])
        if kind in ("low-rank", "kronecker", "precompose"):
            settings["scale"] = table.number("scale")
        expressions = {
            name: _expression(table.table(name)) for name in FACTORS[kind] if name != "order" and table.has(name)
        }
        names = [leaf for name in FACTORS[kind] for leaf in _leaves(name, expressions)]
        rows = table.tables("on")
        table.end()
        for row in rows:
            targets = list(_expand(row.text("target"), row.where))
            self._updates += len(targets)
            if self._updates > MAX_UPDATES:
                raise PackError(row.where, f"is beyond the {MAX_UPDATES} updates that a pack may hold")
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

    def _series(self, kind: str, name: str, row: Table, count: int) -> list[NpArray]:
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


def _expression(table: Table) -> dict[str, object]:
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


def _expand(pattern: str, where: str) -> Iterator[Target]:
    """``blocks.{0..2}.x`` as blocks.0.x, blocks.1.x, blocks.2.x."""
    match = _REPEAT.search(pattern)
    if match is None:
        yield Target.parse(pattern, where=where)
        return
    first, last = int(match[1]), int(match[2])
    if not first < last < first + MAX_REPEAT:
        raise PackError(f"{where}.target", f"repeats at least 2 and at most {MAX_REPEAT} times", got=repr(pattern))
    for number in range(first, last + 1):
        yield Target.parse(f"{pattern[: match.start()]}{number}{pattern[match.end() :]}", where=where)
