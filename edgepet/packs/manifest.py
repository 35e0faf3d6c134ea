"""The manifest of a pack: what it says of itself, and that all of it is there and within its bounds.

docs/spec/pack-v1.md, "Manifest" and "Bounds", in code.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np

from edgepet.canonical import canonical_json
from edgepet.deltas.codes import LEAST_SCALE, Range
from edgepet.deltas.delta import MOST_HEADS, NO_CLASSIFIER, Delta, Head, Int8Ranges, JudgedHead, Score
from edgepet.deltas.generator import SEEDS
from edgepet.deltas.heads import ANSWERS
from edgepet.deltas.probe import Probe
from edgepet.deltas.updates import generated_bytes
from edgepet.errors import PackError
from edgepet.packs.codecs import Codec, Plane, Stored, inflated, read_plane, read_stored
from edgepet.packs.container import Container, canonical_value
from edgepet.packs.layout import MAX_UPDATES, Reader
from edgepet.packs.map_heads import read_map_head, texts
from edgepet.spec import NpArray, Preprocess, StoredPrecision, read_preprocess
from edgepet.strict import ObjectReader

Probes: TypeAlias = dict[StoredPrecision, Probe]

FORMAT, VERSION = "edgepet-pack", 1
HEAD, RANGES, LAYOUT = "head.point", "int8.ranges", "layout"  # planes of a head, of an int8 task, and what is no plane
CORRECTIONS = "int8.corrections"  # a plane of an int8 task
CORRECTED: Codec = "int8"  # and its codec, where it is not tiny
PROBES: dict[str, dict[StoredPrecision, str]] = {  # planes, by what the head answers
    answer: {"fp32": f"probe.{answer}", "int8": f"probe.{answer}.int8"} for answer in ("class", *ANSWERS)
}
EXACT = frozenset(
    (RANGES, *(plane for planes in PROBES.values() for plane in planes.values()))
)  # planes that are no part of the delta's numbers: always fp32
MAX_LABELS = 1 << 16
MAX_PROVENANCE_BYTES, MAX_DEPTH = 1 << 14, 8  # of what no reader acts on
MAX_LICENCES, MAX_METHOD = 64, 64
MAX_PROBE = 16  # images
MAX_SEQUENCE = (1 << 53) - 1

_PER_UPDATE, _PER_TENSOR, _PER_TEXT = 1024, 256, 20  # bytes that reading takes for each, beside the values
_FREE, _PER_BYTE = 1 << 24, 64  # what reading may take of any file, and for each of its bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a pack says that it becomes: bytes of its values, and of its layout's text; tensors and updates."""

    bytes: int
    layout: int
    tensors: int
    updates: int


def write_manifest(
    delta: Delta,
    sequence: int,
    planes: Mapping[str, Plane],
    told: Decoded,
    point: Mapping[str, object],
    maps: Sequence[Mapping[str, object]] = (),
) -> dict[str, object]:
    """All keys but the signature; ``point`` are the places of the classifier's tensors, ``maps`` all of other heads.

    Raises:
        ValueError: a number in it is not finite.
    """
    head: dict[str, object] = {
        "name": "class",
        "answer": "class",
        "labels": list(delta.labels),
        "layers": [{"kind": "point", **point}],
        "val": {"metric": "top1", "value": delta.val.top1, "n": delta.val.n},
    }
    heads = [*([head] if delta.labels else ()), *map(dict, maps)]
    manifest: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "task": delta.task,
        "sequence": sequence,
        "backbone": {"name": delta.backbone, "fingerprint": delta.fingerprint},
        "codecs": {name: plane.stored.as_json() for name, plane in planes.items() if plane.stored.packed},
        "decoded": asdict(told),
        "heads": heads,
        "preprocess": delta.preprocess.as_json() | {"orientation": delta.preprocess.orientation or "none"},
        "method": {"name": delta.method, "settings": dict(delta.settings)},
        "training": dict(delta.training),
        "licences": list(delta.licences),
    }
    if delta.int8 is not None:
        trunk = {} if delta.int8.trunk is None else {"trunk": delta.int8.trunk}
        manifest["int8"] = {"codes": delta.int8.codes, **trunk}
    if delta.probes:
        heads[0]["probe"] = {n: {"seed": each.seed, "tolerance": each.tolerance} for n, each in delta.probes.items()}
    return manifest


def read_manifest(parts: Container, where: str, length: int) -> tuple[Delta, dict[str, Plane], int]:
    """The delta of a file of ``length`` bytes, its planes, and its sequence number.

    Raises:
        PackError, InputError: anything of it is not as version 1 has it.
    """
    table, tensors = ObjectReader(parts.manifest, where), parts.tensors
    table.text("auth")
    table.text("format", choices=[FORMAT])
    if table.integer("version") != VERSION:
        raise PackError(
            f"{where}.version",
            f"this edgepet reads version {VERSION}",
            got=table.integer("version"),
            fix="update edgepet",
        )
    told = _decoded(table.nested("decoded"), parts.header_bytes, length)
    layout = _layout(tensors, told, where)
    planes = _planes(tensors, table.nested("codecs"), told, where)
    values = {name: plane.values for name, plane in planes.items()}
    reader = Reader(values, where, updates=told.updates, tensors=told.tensors)
    updates = tuple(itertools.chain.from_iterable(map(reader.updates, layout.nested_list("updates"))))
    branches = tuple(itertools.chain.from_iterable(map(reader.branches, layout.nested_list("branches"))))
    layout.end()
    made = planes_bytes({name: plane.stored for name, plane in planes.items()}) + generated_bytes(updates)
    if told.bytes != made:
        raise PackError(f"{where}.decoded.bytes", f"must be the {made} that there are", got=told.bytes)
    head, labels, val, heads, probes = _heads(table, reader)
    backbone, method = table.nested("backbone"), table.nested("method")
    delta = Delta(
        task=table.text("task"),
        backbone=backbone.text("name"),
        fingerprint=backbone.text("fingerprint"),
        updates=updates,
        branches=branches,
        head=head,
        labels=labels,
        preprocess=_preprocess(table.nested("preprocess")),
        method=_name(method),
        settings=provenance(method, "settings"),
        training=provenance(table, "training"),
        val=val,
        licences=texts(table, "licences", MAX_LICENCES),
        int8=_int8(table.nested("int8"), reader) if table.has("int8") else None,
        probes=probes,
        heads=heads,
    )
    sequence = table.integer("sequence")
    if sequence > MAX_SEQUENCE:
        raise table.refusal("sequence", f"needs an integer of at most {MAX_SEQUENCE}", sequence)
    reader.end()
    reader.require_counts()
    for part in (backbone, method, table):
        part.end()
    return delta, planes, sequence


def _decoded(table: ObjectReader, header: int, length: int) -> Decoded:
    """What the pack says of itself, within what a file of ``length`` bytes may ask for."""
    told = Decoded(table.integer("bytes"), table.integer("layout"), table.integer("tensors"), table.integer("updates"))
    table.end()
    asked = told.bytes + _PER_TEXT * (header + told.layout) + _PER_UPDATE * told.updates + _PER_TENSOR * told.tensors
    most = _FREE + _PER_BYTE * length
    if asked > most:
        what = f"asks for more memory than the {most} bytes that a pack of {length} bytes may"
        raise PackError(table.where, what, got=asked)
    if told.updates > MAX_UPDATES:
        raise PackError(f"{table.where}.updates", f"needs at most {MAX_UPDATES}", got=told.updates)
    return told


def _layout(tensors: Mapping[str, NpArray], told: Decoded, where: str) -> ObjectReader:
    packed = tensors.get(LAYOUT)
    if packed is None or packed.dtype != np.uint8 or packed.ndim != 1:
        raise PackError(where, f"needs the tensor {LAYOUT!r} of bytes")
    text = inflated(packed.tobytes(), told.layout, f"{where}: {LAYOUT}")
    return ObjectReader(canonical_value(text, where, LAYOUT), where)


def _planes(tensors: Mapping[str, NpArray], codecs: ObjectReader, told: Decoded, where: str) -> dict[str, Plane]:
    """Every plane decoded, once all of them together are known to be no larger than the pack says."""
    stored = {name: tensor for name, tensor in tensors.items() if name != LAYOUT}
    said = {name: read_stored(codecs, name, tensor, where) for name, tensor in stored.items()}
    codecs.end()
    asked = planes_bytes(said)
    if asked > told.bytes:
        raise PackError(f"{where}.decoded.bytes", f"must be the {asked} that its planes are, or more", got=told.bytes)
    for name in EXACT & said.keys():
        if said[name].coding.format != "fp32":
            raise PackError(f"{where}: {name}", "must be fp32", got=said[name].coding.format)
    return {name: read_plane(name, stored[name], said[name], where) for name in stored}


def planes_bytes(said: Mapping[str, Stored]) -> int:
    """What planes take when they are read, from what is said of each."""
    return sum(each.coding.decoded_bytes(name, each.values) for name, each in said.items())


def _split(table: ObjectReader) -> tuple[list[ObjectReader], list[ObjectReader]]:
    """The classifier, if there is one, and the heads that read maps; it comes first: one task has one spelling."""
    heads = table.nested_list("heads")
    if not heads:
        raise table.refusal("heads", "needs one head", 0)
    if len(heads) > 1 + MOST_HEADS:
        raise table.refusal("heads", f"needs at most {1 + MOST_HEADS} heads", len(heads))
    answers = [each.text("answer", choices=["class", *ANSWERS]) for each in heads]
    first = answers[0] == "class"
    if "class" in answers[1:]:
        raise heads[answers.index("class", 1)].refusal(
            "answer", "must be the first, if it is class", "another before it"
        )
    return heads[:1] if first else [], heads[1:] if first else heads


def _heads(table: ObjectReader, reader: Reader) -> tuple[Head, tuple[str, ...], Score, tuple[JudgedHead, ...], Probes]:
    """The classifier, its labels and its score; the heads that read maps; and what the first head was probed for."""
    classifiers, others = _split(table)
    if classifiers:
        head, labels, val, probes = _head(classifiers[0], reader)
        return head, labels, val, tuple(read_map_head(each, reader) for each in others), probes
    asked = others[0].nested("probe") if others[0].has("probe") else None
    heads = tuple(read_map_head(each, reader) for each in others)
    classes = sum(len(each.head.labels) for each in heads)
    probes = {} if asked is None else _probes(asked, reader, classes, heads[0].head.answer)
    return NO_CLASSIFIER, (), Score(top1=0.0, n=0), heads, probes


def _head(head: ObjectReader, reader: Reader) -> tuple[Head, tuple[str, ...], Score, Probes]:
    """The head that is no list of layers: classes by a product of pooled features."""
    head.text("name", choices=["class"])
    layers = head.nested_list("layers")
    if len(layers) != 1:
        raise head.refusal("layers", "needs one layer", len(layers))
    layer = layers[0]
    layer.text("kind", choices=["point"])
    weight, bias = reader.factor(HEAD, layer, "weight", axes=2), reader.factor(HEAD, layer, "bias", axes=1)
    labels = texts(head, "labels", MAX_LABELS)
    val = head.nested("val")
    val.text("metric", choices=["top1"])
    score = Score(top1=val.number("value"), n=val.integer("n"))
    probes = _probes(head.nested("probe"), reader, len(bias), "class") if head.has("probe") else {}
    for part in (val, layer, head):
        part.end()
    return Head(weight=weight, bias=bias), labels, score, probes


def _probes(table: ObjectReader, reader: Reader, classes: int, answer: str) -> Probes:
    probes: Probes = {}
    for precision, plane in PROBES[answer].items():
        if not table.has(precision):
            continue
        told, logits = table.nested(precision), reader.whole(plane)
        seed, tolerance = told.integer("seed"), told.number("tolerance")
        told.end()
        images = logits.size // max(1, classes)
        if not 0 < images <= MAX_PROBE or logits.size != images * classes:
            what, got = f"needs logits of 1 to {MAX_PROBE} images", f"{logits.size} for {classes} classes"
            raise PackError(f"{told.where}: {plane}", what, got=got)
        if seed >= SEEDS or tolerance <= 0:
            raise PackError(told.where, f"needs a seed below {SEEDS} and a tolerance above 0", got=[seed, tolerance])
        probes[precision] = Probe(seed, logits.reshape(images, classes), tolerance)
    table.end()
    if not probes:
        raise table.refusal("", f"needs one of {', '.join(PROBES[answer])}", {})
    return probes


def _preprocess(table: ObjectReader) -> Preprocess:
    if not table.has("orientation"):
        raise PackError(table.where, "needs the key 'orientation'")
    return read_preprocess(table)


def _name(method: ObjectReader) -> str:
    name = method.text("name")
    if len(name) > MAX_METHOD:
        raise method.refusal("name", f"needs at most {MAX_METHOD} characters", len(name))
    return name


def _int8(table: ObjectReader, reader: Reader) -> Int8Ranges:
    numbers = reader.whole(RANGES)
    where = f"{table.where}.ranges"
    if numbers.size % 2:
        raise PackError(where, "needs pairs of a scale and a shift", got=f"{numbers.size} numbers")
    pairs = numbers.reshape(-1, 2)
    for index in np.flatnonzero(~(pairs[:, 0] >= LEAST_SCALE)):
        raise PackError(f"{where}[{index}]", "needs a scale above 0", got=f"{pairs[index, 0]:g}")
    codes, trunk = _digest(table, "codes"), _digest(table, "trunk") if table.has("trunk") else None
    table.end()
    ranges = tuple(Range(scale=float(scale), shift=float(shift)) for scale, shift in pairs)
    corrections = tuple(reader.whole(CORRECTIONS).tolist()) if reader.has(CORRECTIONS) else ()
    return Int8Ranges(codes=codes, ranges=ranges, trunk=trunk, corrections=corrections)


def _digest(table: ObjectReader, key: str) -> str:
    digest = table.text(key)
    if re.fullmatch("[0-9a-f]{64}", digest) is None:
        raise PackError(f"{table.where}.{key}", "needs a sha256 of 64 digits", got=repr(digest[:80]))
    return digest


def provenance(table: ObjectReader, key: str) -> dict[str, object]:
    """What no reader acts on, of a bounded size.

    Raises:
        PackError: it is no object, or too large or too deep a one.
    """
    value = table.raw(key)
    if not isinstance(value, dict):
        raise PackError(f"{table.where}.{key}", "needs an object", got=json.dumps(value)[:80])
    if not _is_shallow(value, MAX_DEPTH):
        raise PackError(f"{table.where}.{key}", f"needs at most {MAX_DEPTH} levels")
    size = len(canonical_json(value))
    if size > MAX_PROVENANCE_BYTES:
        raise PackError(f"{table.where}.{key}", f"needs at most {MAX_PROVENANCE_BYTES} bytes", got=size)
    return value


def _is_shallow(value: object, levels: int) -> bool:
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_shallow(each, levels - 1) for each in within)
