"""Packs that are wrong on purpose, and what a reader must make of any of them.

``python -m tests.fuzz FOLDER SEED COUNT`` changes the packs of FOLDER, reads what became of them, and prints a report;
without SEED it weighs each of them. A process of its own can be given little memory, and is not slowed down by whoever
measures coverage. There are three parts: what must come of a pack, the specification written once more and slowly, and
the changes.
"""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import struct
import sys
import time
import traceback
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from edgepet.deltas.branches import ACTIVATIONS, BRANCHES
from edgepet.deltas.expressions import EXPRESSIONS, NESTED, SETTINGS, WINDOWS
from edgepet.deltas.updates import ATTRIBUTES, FACTORS, NAMES, attributes, factors, generated
from edgepet.errors import EdgepetError, PackError
from edgepet.packs.container import UNSIGNED, with_signature
from edgepet.packs.pack import EVERY, Pack, encode_pack, read_pack
from edgepet.spec import NpArray
from tests.fuzz_heads import counted_places, head_meaning, meaning_of_head
from tests.packs import deflate, header_bytes, manifest_of, tensors_of

FORMATS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int2": 2, "int32": 32, "bits": 8}  # bits of a stored value
PLAIN = {"F32": "fp32", "I32": "int32", "F16": "fp16", "U8": "bits"}  # in the order of a file
PROBES = {
    answer: (f"probe.{answer}", f"probe.{answer}.int8") for answer in ("class", "mask", "boxes", "labels")
}  # in fp32, in int8
EXACT = ("int8.ranges", *(plane for planes in PROBES.values() for plane in planes))  # planes that are not of the delta
MOST_TEXT, MOST_SECONDS = 2000, 2.0  # of a message, and of reading one of these packs, nearly all below 10 kB
MOST_MEMORY = 2 << 30  # of a process; NumPy and its libraries take half a gigabyte of addresses


class FaultError(AssertionError):
    """What a reader must not do."""


UNREADABLE = (  # what taking apart raises where there is no pack
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    FaultError, safetensors.SafetensorError, struct.error, zlib.error,
)  # fmt: skip


def need(holds: object, what: str) -> None:
    """Say ``what`` is wrong where it does not hold."""
    if not holds:
        raise FaultError(what)


# --------------------------------------------------------------------------------------------- what must come of a pack


def examined(data: bytes) -> bool:
    """Whether ``data`` is read as a pack.

    Raises:
        FaultError: it was read and may not be, or as something else than it says; or the refusal cannot be shown.
        Exception: whatever the reader raises beside a refusal.
    """
    try:
        pack = read_pack(data, answers=EVERY)
    except EdgepetError as error:
        need(isinstance(error, PackError), f"{type(error).__name__} in place of PackError")
        lines = str(error).split("\n  fix: ")
        need(len(lines) <= 2 and all(line.isprintable() for line in lines), "a message with control characters")
        need(len(str(error)) < MOST_TEXT, "a message that is too long")
        need(not allowed(data), "a pack that the specification allows is refused")
        return False
    told = meaning(data)
    need(told == meaning_of(pack), "read as something else")
    mapped = {name: tensor for name, tensor in safetensors.deserialize(data) if name != "layout"}
    need(mapped == {name: as_mapped(plane.tensor) for name, plane in pack.planes.items()}, "other tensors")
    again = encode_pack(pack.delta, codec="fp32", kept=pack.planes, sequence=pack.sequence)
    again = with_signature(again, pack.signature or UNSIGNED)
    if spelling(again) == spelling(data):
        need(again == data, "one spelling and other bytes")
    else:  # rows may be grouped otherwise, and a number that is whole may have no point
        need(settled(meaning(again)) == settled(told), "another meaning when it is written again")
        need(meaning_of(read_pack(again, answers=EVERY)) == meaning(again), "written again and read as something else")
    return True


def allowed(data: bytes) -> bool:
    """Whether ``meaning`` finds nothing wrong."""
    with contextlib.suppress(*UNREADABLE):
        meaning(data)
        return True
    return False


def spelling(data: bytes) -> tuple[str, bytes, bytes]:
    """The texts of a pack, and its layout as it is packed: what a writer may write otherwise."""
    layout = tensors_of(data)["layout"].tobytes()
    return json.loads(data[8 : 8 + header_bytes(data)])["__metadata__"]["edgepet"], layout, inflate(layout, 1 << 24)


def settled(told: Mapping[str, Any]) -> dict[str, Any]:
    """A meaning whatever the order of tensors, of branches, and of planes."""
    by_tensor: dict[str, list[Any]] = {}
    for update in told["updates"]:
        by_tensor.setdefault(update[0].partition("[")[0], []).append(update)
    branches = sorted(told["branches"], key=lambda branch: (branch[2], branch[0]))
    return {key: told[key] for key in told if key != "codec"} | {"updates": by_tensor, "branches": branches}


def meaning_of(pack: Pack) -> dict[str, Any]:
    """What ``meaning`` says of its file."""
    delta = pack.delta
    told: dict[str, Any] = {
        name: getattr(delta, name) for name in ("task", "backbone", "fingerprint", "method", "settings", "training")
    }
    updates = []
    for targeted in delta.updates:
        update = targeted.update
        leaves: dict[str, Any] = {name: plain(array) for name, array in factors(update).items()}
        leaves |= {name: (window.start, window.shape) for name, window in generated(update).items()}
        reads = [str(getattr(update, name)) for name in NAMES.get(update.kind, ())]
        updates.append([str(targeted.target), update.kind, attributes(update), reads, leaves])
    branches = [
        [b.kind, b.tap, b.into, dict(b.settings), {name: plain(array) for name, array in b.tensors.items()}]
        for b in delta.branches
    ]
    head = {"weight": plain(delta.head.weight), "bias": plain(delta.head.bias)}
    int8 = delta.int8 and (
        delta.int8.codes,
        delta.int8.trunk,
        [number for r in delta.int8.ranges for number in (r.scale, r.shift)],
    )
    probes = {
        name: (each.seed, each.tolerance, each.logits.reshape(-1).tolist()) for name, each in delta.probes.items()
    }
    preprocess = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(delta.preprocess).items()}
    return told | {
        "labels": list(delta.labels), "licences": list(delta.licences), "val": (delta.val.top1, delta.val.n),
        "preprocess": preprocess, "head": head, "int8": int8, "probes": probes, "sequence": pack.sequence,
        "codec": pack.codec, "updates": updates, "branches": branches, "signature": pack.signature or UNSIGNED,
        "heads": [meaning_of_head(each, plain) for each in delta.heads],
    }  # fmt: skip


def as_mapped(tensor: NpArray) -> dict[str, Any]:
    """Format, shape and bytes, as safetensors tells them."""
    dtype = {"f4": "F32", "f2": "F16", "i4": "I32", "u1": "U8"}[tensor.dtype.str[1:]]
    return {"dtype": dtype, "shape": [*tensor.shape], "data": tensor.tobytes()}


def plain(array: NpArray) -> tuple[tuple[int, ...], list[Any]]:
    """Shape and values, in C order."""
    return array.shape, array.reshape(-1).tolist()


# ------------------------------------------------------------------------------------------- the specification, slowly


def meaning(data: bytes) -> dict[str, Any]:
    """What the file of a pack says, by the words of docs/spec/pack-v1.md and none of the code of ``edgepet.packs``.

    Raises:
        FaultError: it says what no pack may.
    """
    text, tensors = contents(data)
    need(re.match('{"auth":"[0-9a-f]{128}",', text), "a signature that is not in its place")
    manifest = canonical(text.encode())
    needed = "auth format version task sequence backbone codecs decoded heads preprocess method training licences"
    keys(manifest, needed, "int8")
    need((manifest["format"], whole(manifest["version"])) == ("edgepet-pack", 1), "another format")
    told, name = manifest["decoded"], manifest["backbone"]
    keys(told, "bytes layout tensors updates")
    keys(name, "name fingerprint")
    need(re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", manifest["task"]), "a task that is no name")
    need(re.fullmatch("(demo:|module:)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name["name"]), "a backbone that is no name")
    need(re.fullmatch("sha256:[0-9a-f]{64}", name["fingerprint"]), "a fingerprint that is none")
    layout_text = inflate(tensors.pop("layout")[1], whole(told["layout"]))
    need(len(layout_text) == told["layout"], "a layout of another length than is said")
    layout = canonical(layout_text)
    keys(layout, "updates branches")
    need(asked(data) <= (1 << 24) + 64 * len(data), "more than a file of its length may ask for")
    planes = Planes(tensors, manifest["codecs"])
    updates = [each for group in listed(layout["updates"]) for each in planes.updates(group)]
    branches = [each for group in listed(layout["branches"]) for each in planes.branches(group)]
    need(len(updates) + len(branches) == whole(told["updates"]) <= 1 << 16, "another number of updates than is said")
    most = max(Counter(update[0].partition("[")[0] for update in updates).values(), default=0)
    need(most <= 32, "more than 32 updates of a tensor")
    pushed = {update[0].partition("[")[0] for update in updates if update[1] == "push"}
    need(not any(read.partition("[")[0] in pushed for u in updates for read in u[3]), "a push of what a push changes")
    need(len({(b[0], b[2]) for b in branches}) == len(branches), "two branches of one kind at one point")
    head, labels, val, heads = planes.heads(listed(manifest["heads"]))
    method = manifest["method"]
    keys(method, "name settings")
    need(len(worded(method["name"])) <= 64, "a long name of a method")
    for value in (method["settings"], manifest["training"]):
        need(isinstance(value, dict) and depth(value) <= 8 and len(dumps(value)) <= 1 << 14, "too much provenance")
    need(0 <= whole(manifest["sequence"]) < 1 << 53, "a sequence number that JSON readers round")
    first = manifest["heads"][0]
    probed = manifest["heads"][: 1 if first["answer"] == "class" else None]  # a classifier by itself, else all
    classes = sum(len(each["labels"]) for each in probed)
    probes = planes.probes(first["probe"], classes, first["answer"]) if "probe" in first else {}
    int8 = planes.ranges(manifest["int8"]) if "int8" in manifest else None
    planes.end()
    need(planes.tensors == whole(told["tensors"]), "another number of tensors than is said")
    need(planes.bytes() == whole(told["bytes"]), "another number of bytes than is said")
    return {
        "task": manifest["task"], "backbone": name["name"], "fingerprint": name["fingerprint"],
        "method": worded(method["name"]), "settings": method["settings"], "training": manifest["training"],
        "labels": labels, "licences": texts(manifest["licences"], 64), "val": val,
        "preprocess": preprocess(manifest["preprocess"]), "head": head, "int8": int8, "probes": probes,
        "sequence": manifest["sequence"], "codec": planes.codec, "updates": updates, "branches": branches,
        "signature": manifest["auth"], "heads": heads,
    }  # fmt: skip


def contents(data: bytes) -> tuple[str, dict[str, tuple[str, bytes]]]:
    """The manifest and, by name, number format and bytes of every tensor of a file that is spelled in the one way."""
    size = header_bytes(data)
    need(size <= 1 << 20 and size % 8 == 0, "a header of another length")
    header = json.loads(data[8 : 8 + size])
    text = header.pop("__metadata__")["edgepet"]
    names = sorted(header, key=lambda name: (list(PLAIN).index(header[name]["dtype"]), name))
    ordered = {name: {key: header[name][key] for key in ("dtype", "shape", "data_offsets")} for name in names}
    again = {"__metadata__": {"edgepet": text}, **ordered}
    raw = json.dumps(again, separators=(",", ":"), ensure_ascii=False).encode()
    need(data[8 : 8 + size] == raw.ljust(-(-len(raw) // 8) * 8), "a header that is spelled otherwise")
    tensors, end = {}, 0
    for name in names:
        start, stop = header[name]["data_offsets"]
        (count,) = header[name]["shape"]
        need(start == end and stop - start == count * FORMATS[PLAIN[header[name]["dtype"]]] // 8, "a misplaced tensor")
        end = stop
        tensors[name] = (header[name]["dtype"], data[8 + size + start : 8 + size + stop])
    need(8 + size + end == len(data), "bytes behind the last tensor")
    return text, tensors


class Planes:
    """Values of planes, and which of them were asked for."""

    def __init__(self, tensors: Mapping[str, tuple[str, bytes]], codecs: Mapping[str, Any]) -> None:
        self.formats: dict[str, tuple[str, int]] = {}
        self._values: dict[str, list[Any]] = {}
        self._cut: dict[str, dict[tuple[int, tuple[int, ...]], Any]] = {}
        self._made: dict[object, int] = {}
        need(codecs.keys() <= tensors.keys(), "a codec for no plane")
        for name, (dtype, raw) in tensors.items():
            self.formats[name], self._values[name] = decoded(name, dtype, raw, codecs.get(name, ()))

    @property
    def tensors(self) -> int:
        return sum(map(len, self._cut.values()))

    @property
    def codec(self) -> str:
        """The one of all planes of numbers, or "mixed"."""
        used = {kind for name, (kind, _) in self.formats.items() if name not in EXACT} - {"int32", "bits"}
        return used.pop() if len(used) == 1 else "mixed"

    def bytes(self) -> int:
        """What planes become, and what seeds stand for."""
        sizes = {name: n * width(name, kind) for name, (kind, n) in self.formats.items()}
        return sum(sizes.values()) + sum(self._made.values())

    def updates(self, group: Mapping[str, Any]) -> Iterator[list[Any]]:
        """Target, kind, attributes, what is read, and factors of each update."""
        kind = group["kind"]
        given = {name: group[name] for name in FACTORS[kind] if name in group and name != "order"}
        keys(group, " ".join(("kind", "on", *ATTRIBUTES.get(kind, ()), *given)))
        told: dict[str, Any] = {}
        for name, wanted in ATTRIBUTES.get(kind, {}).items():
            told[name] = number(group[name]) if wanted is float else one_of(group[name], wanted)
        told |= {name: expression(table) for name, table in given.items()}
        parts = {leaf: how for name in FACTORS[kind] for leaf, how in leaves(name, given.get(name))}
        for row in listed(group["on"]):
            here = {name for name in parts if name in row or name not in ("core", "order")}
            keys(row, " ".join(("target", *NAMES.get(kind, ()), *here)))
            targets = expanded(row["target"])
            reads = [expanded(row[name]) for name in NAMES.get(kind, ())]
            need(all(len(read) == len(targets) for read in reads), "reads that are not as many")
            for i, target in enumerate(targets):
                cut = {name: self.leaf(kind, name, row, i, parts[name]) for name in parts if name in here}
                for name in (target, *(read[i] for read in reads)):
                    need(targeted(name), "a target that is none")
                yield [target, kind, told, [read[i] for read in reads], cut]

    def branches(self, group: Mapping[str, Any]) -> Iterator[list[Any]]:
        """Kind, points, settings and tensors of each branch."""
        keys(group, "kind settings on")
        kind = BRANCHES[group["kind"]]
        keys(group["settings"], " ".join(kind.settings))
        for name, wanted in kind.settings.items():
            value = group["settings"][name]
            need(one_of(value, ACTIVATIONS) if wanted is str else whole(value) >= 0, "a setting that is none")
            need(name != "recurrences" or 1 <= value <= 8, "too many recurrences, or none")
        for row in listed(group["on"]):
            keys(row, " ".join(("tap", "into", *kind.tensors)))
            taps, intos = expanded(row["tap"]), expanded(row["into"])
            for i, (tap, into) in enumerate(zip(taps, intos, strict=True)):
                for point in (tap, into):
                    need(re.fullmatch(r"\w+(\.\w+)*:(in|out)", point, re.ASCII), "a point that is none")
                cut = {name: self.leaf(group["kind"], name, row, i, None) for name in kind.tensors}
                need(all(len(cut[name][0]) == axes for name, axes in kind.tensors.items()), "a branch of other axes")
                yield [group["kind"], tap, into, group["settings"], cut]

    def heads(self, given: list[Any]) -> tuple[dict[str, Any], list[str], tuple[float, int], list[Any]]:
        """The classifier as ``head`` has it, nothing where there is none, and the heads that read maps."""
        need(1 <= len(given) <= 9, "another number of heads")
        classes = given[0]["answer"] == "class"
        need(all(each["answer"] != "class" for each in given[1:]), "a classifier that is not the first")
        others = given[1:] if classes else given
        none: tuple[Any, Any, Any] = ({"weight": ((0, 0), []), "bias": ((0,), [])}, [], (0.0, 0))
        made = self.head(given[:1]) if classes else none
        names = [each["name"] for each in given]
        need(len(others) <= 8 and len({"class", *names}) == len(names) + (not classes), "too many, or of one name")
        found = []
        for place, each in enumerate(others):
            own = "thresholds" if each["answer"] == "labels" else ""
            keys(each, f"name answer labels layers val {own}".strip(), "" if classes or place else "probe")
            labels = texts(each["labels"], 255)
            found.append(head_meaning(each, lambda *told: self.leaf(*told, 0, None), need, labels))
        return (*made, found)

    def head(self, heads: list[Any]) -> tuple[dict[str, Any], list[str], tuple[float, int]]:
        """Weight and bias, labels, and the score."""
        need(len(listed(heads)) == len(listed(heads[0]["layers"])) == 1, "another number of heads or layers")
        (head,), (layer,) = heads, heads[0]["layers"]
        keys(head, "name answer labels layers val", "probe")
        keys(layer, "kind bias weight")
        keys(head["val"], "metric value n")
        words = (head["name"], head["answer"], layer["kind"], head["val"]["metric"])
        need(words == ("class", "class", "point", "top1"), "a head that is not there yet")
        cut = {name: self.leaf("head.point", name, layer, 0, None) for name in ("weight", "bias")}
        labels = texts(head["labels"], 1 << 16)
        rows, shape = cut["bias"][0], cut["weight"][0]
        need(len(shape) == 2 and rows == shape[:1] and len(labels) == len(set(labels)) == rows[0] > 0, "a wrong head")
        score = number(head["val"]["value"])
        need(0 <= score <= 1 and whole(head["val"]["n"]) >= 0, "a score that is none")
        return cut, labels, (score, head["val"]["n"])

    def probes(self, table: Mapping[str, Any], classes: int, answer: str) -> dict[str, Any]:
        """What a task answers to images of a seed."""
        keys(table, "", "fp32 int8")
        need(table, "a probe of nothing")
        told = {}
        for name, plane in zip(("fp32", "int8"), PROBES[answer], strict=True):
            if name not in table:
                continue
            keys(table[name], "seed tolerance")
            seed, tolerance, logits = whole(table[name]["seed"]), number(table[name]["tolerance"]), self.exact(plane)
            need(0 <= seed < 1 << 53 and tolerance > 0, "a probe without a seed or a tolerance")
            need(len(logits) in range(classes, 16 * classes + 1, classes), "a probe of other images")
            told[name] = (seed, tolerance, logits)
        return told

    def exact(self, plane: str) -> list[float]:
        """A plane that is not cut, and never rounded."""
        need(self.formats[plane][0] == "fp32", "a plane in a format that is not for it")
        return self._values.pop(plane)

    def ranges(self, table: Mapping[str, Any]) -> tuple[str, str | None, list[float]]:
        """What an int8 backbone needs."""
        keys(table, "codes", "trunk")
        need(re.fullmatch("[0-9a-f]{64}", table["codes"]), "codes that are no digest")
        need("trunk" not in table or re.fullmatch("[0-9a-f]{64}", table["trunk"]), "a trunk that is no digest")
        numbers = self.exact("int8.ranges")
        need(len(numbers) % 2 == 0 and all(scale >= 2.0**-126 for scale in numbers[::2]), "a range without a scale")
        return table["codes"], table.get("trunk"), numbers

    def leaf(self, kind: str, name: str, row: Mapping[str, Any], i: int, how: Any) -> Any:
        """The array, or the window, that a row names for its ``i``-th target."""
        if isinstance(row[name], str):
            other = row[row[name]]
            need(how is None and isinstance(other, list), "a tie to no place")
            last = {name.split(".")[-1], row[name].split(".")[-1]}
            need(not last & {"bits", "order", "draws", "index"}, "a tie of what is not tied")
            return self.leaf(kind, row[name], row, i, None)
        start, step, *shape = listed(row[name])
        need(len(shape) <= 8 and all(whole(each) >= 0 for each in row[name]), "a place that is none")
        at, size = start + i * step, math.prod(shape)
        if how is not None and how[0] != "bits":
            end = how[1].get("total", 1 << 53)
            need(0 < size <= 1 << 22 and at + size <= end, "a window outside of its sequence")
            add_made(self._made, how[1], size)
            return at, tuple(shape)
        plane, key = f"{kind}.{name}", (at, tuple(shape))
        cut = self._cut.setdefault(plane, {})
        if key not in cut:
            cut[key] = self.part(plane, at, size)
        return tuple(shape), cut[key]

    def part(self, plane: str, at: int, size: int) -> list[Any]:
        """``size`` values of a plane of the right kind."""
        values, kind = self._values[plane], self.formats[plane][0]
        last = plane.rpartition(".")[2]
        wanted = {"order": ("int32",), "bits": ("bits",)}.get(last, ("fp32", "fp16", "int8", "int4", "int2"))
        need(kind in wanted, "a plane in a format that is not for it")
        if last != "bits":
            need(size > 0 and at + size <= len(values), "a place outside of its plane")
            return values[at : at + size]
        packed = values[at : at + (size + 7) // 8]
        need(0 < size <= 8 * len(packed), "a place outside of its plane")
        bits = [bool(byte >> place & 1) for byte in packed for place in range(8)]
        need(not any(bits[size:]), "bits behind the last")
        return bits[:size]

    def end(self) -> None:
        """Every plane must have been cut, from its first value to its last."""
        need(self._cut.keys() == self._values.keys(), "a plane that nobody names")
        for plane, cut in self._cut.items():
            end = 0
            for start, shape in sorted(cut):
                need(start == end, "a gap or an overlap")
                end += math.prod(shape) if not plane.endswith(".bits") else (math.prod(shape) + 7) // 8
            need(end == len(self._values[plane]), "values that nobody names")


def add_made(made: dict[object, int], table: Mapping[str, Any], size: int) -> None:
    """Note what a seed stands for, in bytes: of each the largest part counts."""
    seed, total = table["seed"], table.get("total")
    sizes: dict[object, int] = {("draws", seed): 8 * size}
    if total is not None:
        sizes = {("shuffle", seed, total): 4 * total, ("gathered", seed, total): 8 * size}
    for key, most in sizes.items():
        made[key] = max(most, made.get(key, 0))


def decoded(name: str, dtype: str, raw: bytes, entry: Any) -> tuple[tuple[str, int], list[Any]]:
    """Format, number and values of a plane."""
    kind = PLAIN[dtype]
    n, group, stream = 8 * len(raw) // FORMATS[kind], 0, raw
    if entry != ():
        kind, n, *groups = listed(entry)
        need(dtype == "U8" and all(0 < whole(each) < 1 << 31 for each in entry[1:]), "a codec that is none")
        need(len(groups) == (kind in ("int8", "int4", "int2")), "a codec without a group, or a group without codes")
        group = groups[0] if groups else 0
        stream = inflate(raw, stored(kind, n, group))
        need(len(stream) == stored(kind, n, group), "a plane of another length")
    if group:
        values = coded(stream, kind, n, group)
    else:
        values = list(struct.unpack(f"<{n}{ {'fp32': 'f', 'fp16': 'e', 'int32': 'i', 'bits': 'B'}[kind] }", stream))
    if name == "scale.s" and kind != "fp32":
        values = [float(np.float32(value + 1)) for value in values]
    need(all(map(math.isfinite, values)), "a value that is not finite")
    return (kind, n), values


def coded(stream: bytes, kind: str, n: int, group: int) -> list[float]:
    """Codes times the scale of their group."""
    bits, groups = FORMATS[kind], -(-n // group)
    scales = struct.unpack(f"<{groups}e", stream[: 2 * groups])
    need(all(math.isfinite(scale) and math.copysign(1, scale) > 0 for scale in scales), "a scale that is none")
    whole_stream = int.from_bytes(stream[2 * groups :], "little")
    need(whole_stream >> n * bits == 0, "codes behind the last")
    half, made = 1 << (bits - 1), []
    for i in range(n):
        code = ((whole_stream >> i * bits & (2 * half - 1)) ^ half) - half
        need(bits == 2 or code > -half, "a code that stands for nothing")
        made.append((2 * code + 1 if bits == 2 else code) * scales[i // group])
    return made


def stored(kind: str, n: int, group: int) -> int:
    """Bytes of a stream."""
    return (2 * -(-n // group) if group else 0) + (n * FORMATS[kind] + 7) // 8


def width(name: str, kind: str) -> int:
    """Bytes that a value becomes, or a byte of bits."""
    return 8 if kind == "bits" else 2 if kind == "fp16" and name != "scale.s" else 4


def inflate(data: bytes, size: int) -> bytes:
    """Raw deflate, at most one byte more than ``size``."""
    reader = zlib.decompressobj(-15)
    made = reader.decompress(data, size + 1)
    need(reader.eof and not reader.unused_data, "a stream without an end, or with bytes behind it")
    return made


def leaves(name: str, table: Any) -> Iterator[tuple[str, Any]]:
    """What a row has places for, each with its expression where that says more of it than where it lies."""
    if table is None:
        yield name, None
        return
    kind = table["kind"]
    for part in EXPRESSIONS[kind].tensors:
        for leaf, how in leaves(f"{name}.{part}", table.get(part) if part in NESTED.get(kind, ()) else None):
            yield leaf, ("bits", table) if part == "bits" else how
    for part in WINDOWS.get(kind, ()):
        yield f"{name}.{part}", (part, table)


def expression(table: Mapping[str, Any], within: bool = False) -> dict[str, Any]:
    """What a group says of an expression."""
    kind = table["kind"]
    need(not (within and kind in NESTED), "an expression that none may hold")
    inner = [part for part in NESTED.get(kind, ()) if part in table]
    keys(table, " ".join(("kind", *SETTINGS.get(kind, {}), *inner)))
    told: dict[str, Any] = {"kind": kind}
    for name, wanted in SETTINGS.get(kind, {}).items():
        value = table[name]
        need(isinstance(value, bool) if wanted is bool else True, "a setting that is none")
        told[name] = number(value) if wanted is float else value if wanted is bool else whole(value)
    need(0 <= told.get("seed", 0) < 1 << 53, "a seed beyond its end")
    need(1 <= told.get("total", 1) <= 1 << 22, "a total beyond its end")
    need(told.get("part", 0) >= 0, "a part that is none")
    return told | {part: expression(table[part], True) for part in inner}


def preprocess(table: Mapping[str, Any]) -> dict[str, Any]:
    """What an image goes through."""
    keys(table, "image_size interpolation crop_fraction crop mean std orientation", "frames")
    need(
        len(listed(table["image_size"])) == 2 and all(whole(side) > 0 for side in table["image_size"]),
        "no size of an image",
    )
    told = dict(table) | {name: list(map(number, listed(table[name]))) for name in ("mean", "std")}
    need(len(told["mean"]) == len(told["std"]) == 3 and min(told["std"]) >= 1e-30, "no mean or std")
    need(max(map(abs, (*told["mean"], *told["std"]))) <= 1e6, "a mean or a std that no pixel is near")
    told["crop_fraction"] = number(table["crop_fraction"])
    need(1 / 64 <= told["crop_fraction"] <= 1, "no part of an image")
    one_of(table["interpolation"], ("bicubic", "bilinear"))
    one_of(table["crop"], ("center", "squash"))
    one_of(table["orientation"], ("exif", "none"))
    need(whole(table.get("frames", 2)) >= 2, "no clip")
    return told | {"frames": table.get("frames", 1)}


def canonical(text: bytes) -> Any:
    """A JSON value that is spelled in the one way."""
    value = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 20 else whole(digits))
    need(dumps(value) == text, "JSON that is not canonical")
    return value


def dumps(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def keys(table: Any, needed: str, more: str = "") -> None:
    """The keys of an object must be those, perhaps with more."""
    must = set(needed.split())
    need(isinstance(table, dict) and must <= table.keys() <= must | set(more.split()), "a key too few or too many")


def whole(value: Any) -> int:
    need(type(value) is int and abs(value) < 10**20, "no whole number")
    return int(value)


def number(value: Any) -> float:
    need(type(value) in (int, float) and math.isfinite(value), "no finite number")
    return float(value)


def listed(value: Any) -> list[Any]:
    need(isinstance(value, list), "no array")
    return list(value)


def worded(value: Any) -> str:
    need(isinstance(value, str) and value, "no text")
    return str(value)


def one_of(value: Any, choices: Any) -> Any:
    need(isinstance(value, str) and value in choices, "another word")
    return value


def texts(values: Any, most: int) -> list[str]:
    need(len(listed(values)) <= most, "too many texts")
    need(all(len(worded(value).encode()) <= 256 for value in values), "a text that is too long")
    return list(values)


def depth(value: Any) -> int:
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max((1 + depth(each) for each in within), default=0)


def expanded(pattern: Any) -> list[str]:
    """The names that a pattern stands for."""
    need(len(worded(pattern)) <= 256, "a name that is too long")
    match = re.search(r"\{(0|[1-9][0-9]{0,8})\.\.(0|[1-9][0-9]{0,8})\}", pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    need(2 <= last - first + 1 <= 4096, "a pattern of too few or too many")
    return [pattern.replace(match[0], str(i), 1) for i in range(first, last + 1)]


def targeted(text: str) -> bool:
    """Whether a text is a target."""
    match = re.fullmatch(r"\w+(?:\.\w+)*(?:\[(?:(\d+):(\d+)|:(?=,))(?:, (\d+):(\d+))?\])?", text, re.ASCII)
    if match is None:
        return False
    numbers = [each for each in match.groups() if each is not None]
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return all(str(int(each)) == each and len(each) <= 10 for each in numbers) and all(
        int(a) < int(b) for a, b in pairs
    )


# ------------------------------------------------------------------------------------------------------------ mutations

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 4, 7, 64, 255, 4095, 4096, 65504, 65536, 1 << 22, (1 << 22) + 1, (1 << 31) - 1, 1 << 31,
    (1 << 53) - 1, 1 << 53, (1 << 62) + 1, 1 << 63, 10**20 - 1, 10**20, -0.0, 0.5, 1.0, 2.0, 5e-324, 1e-40, 2.0**-126,
    3.5e38, 1e308, -1e308,
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", "a", "é", "\0", "\x1b[2J", "a\nb", "\u202e", "\U0001f600", "a" * 64, "a" * 65, "a" * 256, "a" * 257, "é" * 129,
    "a" * 3000, "../../etc/passwd", "demo:a", "w", "w[0:2]", "w[:, 0:1]", "w[2:1]", "w:in",
    "w[0:9999999999]", "w[0:" + "9" * 200 + "]", "b.{0..1}.w", "b.{0..4095}.w", "b.{0..4096}.w", "b.{1..0}.w", "{0..1}.{0..1}",
    "b.{999999998..999999999}.w", "w.{0..3}:out", "0" * 128, "sha256:" + "0" * 64, "exif", "int8", "left", "left.values",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], {"": 0}, [0], [0, 0], [0, 0, 1], [0, 0, 2, 2], [0, 0] + [1] * 63 + [2],
    [0, 0] + [1] * 70, [0, 0] + [2] * 800, {str(i) * 20: i for i in range(60)}, {"kind": "product"}, {"kind": "binary"},
    {"kind": "householder"}, {"kind": "seeded", "seed": 1, "bound": 1.0}, {"kind": "gather", "seed": 0, "total": 99},
    ["int8", 4, 4], ["bits", 1], ["int4", 4, (1 << 31) - 1], ["int2", (1 << 31) - 1, 1], ["fp32", 1 << 22], ["fp16", 4],
)  # fmt: skip
RAW: dict[str, str] = {  # texts of JSON that no value is written as
    "@deep": "[" * 3000 + "]" * 3000, "@ten": '{"a":' * 10 + "1" + "}" * 10, "@digits": "9" * 4999, "@nan": "NaN",
    "@float": "9" * 4999 + ".5", "@end": "1e999", "@minus": "-0", "@half": '"\\ud800"', "@twice": '{"a":1,"a":1}',
    "@space": "[ ]", "@long": "1.00000000000000000001", "@wide": "[" + "{}," * 2000 + "{}]",
}  # fmt: skip
DTYPES = ("<f4", "<f2", "<i4", "u1", "<f8", "<i8", "i1", "<u2", "?")


@dataclass(frozen=True, slots=True)
class Parts:
    """A pack taken apart."""

    manifest: Any
    layout: Any
    text: bytes  # of the layout, and as it is packed
    packed: NpArray
    tensors: Mapping[str, NpArray]

    @classmethod
    def of(cls, data: bytes) -> Parts:
        tensors = tensors_of(data)
        packed = tensors.pop("layout")
        text = inflate(packed.tobytes(), 1 << 24)
        return cls(manifest_of(data), json.loads(text), text, packed, tensors)


class Mutator:
    """Changes of packs, all from one seed."""

    def __init__(self, corpus: Sequence[bytes], seed: int) -> None:
        self._rng, self._corpus = random.Random(seed), list(corpus)
        self._parts = [Parts.of(data) for data in corpus]
        nodes = [node for p in self._parts for part in (p.manifest, p.layout) for node in _nodes(part)]
        self._nodes = [node for node in nodes if isinstance(node, (dict, list))]
        self._words = sorted({word for node in nodes if isinstance(node, dict) for word in node} | _texts(nodes))
        self._planes = sorted({name for parts in self._parts for name in parts.tensors})

    def draw(self) -> bytes:
        """A pack of the corpus, changed in one place or in some."""
        which = self._rng.randrange(len(self._corpus))
        with np.errstate(all="ignore"):
            return self.struck(self._corpus[which]) if self._rng.random() < 0.3 else self.changed(self._parts[which])

    def near(self, data: bytes, seed: int) -> bytes:
        """Any bytes, changed as ``seed`` says: for whoever keeps a corpus of its own."""
        self._rng.seed(seed)
        with contextlib.suppress(*UNREADABLE), np.errstate(all="ignore"):
            if self._rng.random() < 0.7:
                return self.changed(Parts.of(data))
        return self.struck(data or self._corpus[0])

    def struck(self, data: bytes) -> bytes:
        """Bytes changed, and nothing put right behind them."""
        rng, made = self._rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = min(rng.choice((rng.randrange(8), rng.randrange(len(made)), rng.randrange(len(made)))), len(made) - 1)
            how = rng.randrange(7)
            if how < 2:
                made[at] ^= 1 << rng.randrange(8)
            elif how == 2:
                made[at] = rng.choice(b'\0\xff\x80 "{}[]:,0123456789abcdef\\')
            elif how == 3:
                made[at : at + rng.choice((1, 2, 8, 64))] = b""
            elif how == 4:
                made[at:at] = rng.choice((b"\0", b" ", b"9" * 40, b'"a":1,', rng.randbytes(8)))
            elif how == 5:
                made[at : at + 8] = rng.choice((0, 1, len(data), 1 << 20, (1 << 20) + 8, 1 << 63)).to_bytes(8, "little")
            else:
                other = rng.choice(self._corpus)
                made[at : at + rng.choice((8, 256))] = other[at : at + rng.choice((8, 256))]
            if not made:
                break
        return bytes(made)

    def changed(self, parts: Parts) -> bytes:
        """Values changed, and the whole mostly put together so that it is canonical and tells the truth of itself."""
        rng = self._rng
        manifest, layout, tensors = parts.manifest, parts.layout, parts.tensors
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            how = rng.random()
            if how < 0.45:
                layout = self._within(layout)
            elif how < 0.75:
                manifest = self._within(manifest)
            else:
                manifest, tensors = self._planes_of(manifest, tensors)
        text, packed = parts.text, parts.packed
        if layout is not parts.layout or rng.random() < 0.02:
            text = spelled(layout)
            packed = deflate(text) if rng.random() < 0.95 else self._stream(text)
        if (packed is not parts.packed or tensors is not parts.tensors) and rng.random() < 0.97:
            manifest = told_truly(manifest, layout, tensors, len(text), counts=rng.random() < 0.9)
        metadata = {"edgepet": spelled(manifest).decode()}
        return safetensors.numpy.save({**tensors, "layout": packed}, metadata=metadata)

    def _within(self, value: Any) -> Any:
        """A value with one change somewhere in it."""
        rng = self._rng
        if isinstance(value, dict):
            if not value or rng.random() < 0.12:
                return self._object(value)
            key = rng.choice(list(value))
            return {**value, key: self._within(value[key])}
        if isinstance(value, list):
            if not value or rng.random() < (0.5 if _is_place(value) else 0.2):
                return self._array(value)
            at = rng.randrange(len(value))
            return [*value[:at], self._within(value[at]), *value[at + 1 :]]
        return self._near(value) if rng.random() < 0.6 else self._anything()

    def _object(self, value: dict[str, Any]) -> Any:
        rng, made = self._rng, dict(value)
        how, key = rng.randrange(5), rng.choice(list(value) or ["a"])
        if how == 0:
            made.pop(key, None)
        elif how == 1:
            made[rng.choice(self._words)] = made.pop(key, 0)
        elif how == 2:
            made[rng.choice(self._words)] = self._anything()
        elif how == 3:
            made[key] = rng.choice(self._nodes)
        else:
            return self._anything()
        return made

    def _array(self, value: list[Any]) -> Any:
        rng, made = self._rng, list(value)
        how, at = rng.randrange(6), rng.randrange(len(value) or 1)
        if _is_place(value) and rng.random() < 0.5:
            axes, ones = made[2:], [1] * rng.choice((1, 1, 2, 62, 64, 200))
            others = ([*axes, *ones], [*ones, *axes], [math.prod(axes)], axes[::-1], [*axes[1:], *axes[:1]], [])
            return [*rng.choice((made[:2], [0, 0], [made[0] + 1, made[1]])), *rng.choice(others)]
        if how == 0:
            del made[at : at + 1]
        elif how == 1:
            made[at:at] = made[at : at + 1] * rng.choice((1, 1, 1, 2, 31, 32))
        elif how == 2:
            made.insert(at, rng.choice(self._nodes))
        elif how == 3:
            made.insert(at, self._anything())
        elif how == 4:
            rng.shuffle(made)
        else:
            return self._anything()
        return made

    def _near(self, value: Any) -> Any:
        rng = self._rng
        if isinstance(value, str):
            at = rng.randrange(len(value) + 1)
            number = re.sub(r"\d+", lambda match: str(int(match[0][:9]) + rng.choice((1, -1, 4094))), value, count=1)
            other = f"{value[:at]}{rng.choice(TEXTS)}{value[at:]}"
            return rng.choice((number, value[:at], other, rng.choice(self._words), re.sub(r"\{.*\}", "3", value)))
        if isinstance(value, bool) or value is None:
            return rng.choice((not value, int(bool(value)), None, "true"))
        near = (value + 1, value - 1, -value, value * 2, value // 2, value + 4, float(value), value * 1.5)
        return rng.choice(near)

    def _anything(self) -> Any:
        rng = self._rng
        how = rng.random()
        pool = NUMBERS if how < 0.4 else TEXTS if how < 0.65 else OTHERS if how < 0.8 else self._nodes
        return rng.choice(pool) if how < 0.97 else rng.choice(list(RAW))

    def _planes_of(self, manifest: Any, tensors: Mapping[str, NpArray]) -> tuple[Any, dict[str, NpArray]]:
        """A plane that is coded, called, cut or valued otherwise."""
        rng, made = self._rng, dict(tensors)
        codecs = manifest.get("codecs") if isinstance(manifest, dict) else None
        if not made or not isinstance(codecs, dict):
            return manifest, made
        name = rng.choice(list(made))
        tensor, how, changed = made[name], rng.randrange(10), dict(codecs)
        if how < 3:
            changed[name], made[name] = self._recoded(name, tensor, codecs.get(name))
        elif how == 3:
            other = rng.choice((rng.choice(self._planes), rng.choice(self._words), *TEXTS))
            made[other if other != "__metadata__" else "layout2"] = tensor if rng.random() < 0.5 else made.pop(name)
        elif how == 4:
            del made[name]
        elif how == 5:
            made[name] = tensor.astype(rng.choice(DTYPES)) if rng.random() < 0.7 else tensor.reshape(1, -1)
        elif how == 6:
            made[name] = np.resize(tensor, rng.choice((0, 1, tensor.size - 1, tensor.size + 1, 2 * tensor.size)) % 4096)
        elif how == 7:
            raw = bytearray(tensor.tobytes() or b"\0" * tensor.itemsize)
            at = rng.randrange(len(raw))
            odd = (b"\0\0\xc0\x7f", b"\1\x7d\1\x7d", b"\0\x7c\0\xfc", b"\xff" * 4, rng.randbytes(4))
            raw[at : at + 4] = rng.choice(odd)
            made[name] = np.frombuffer(bytes(raw[: tensor.nbytes or tensor.itemsize]), tensor.dtype)
        elif how == 8:
            changed[name] = rng.choice(OTHERS)
        else:
            made[name] = np.frombuffer(self._stream(tensor.tobytes()).tobytes(), np.uint8)
        return {**manifest, "codecs": changed}, made

    def _recoded(self, name: str, tensor: NpArray, entry: Any) -> tuple[list[Any], NpArray]:
        """A plane of as many values in a codec that is drawn, with values of its own; mostly a right one."""
        rng, n = self._rng, tensor.size
        if isinstance(entry, list) and len(entry) > 1 and type(entry[1]) is int:
            n = min(max(entry[1], 0), 4096)
        kind = rng.choice(list(FORMATS))
        group = rng.choice((1, 2, 3, 8, 64, 512, n + 1, (1 << 31) - 1)) if kind in ("int8", "int4", "int2") else 0
        stream = bytearray(rng.randbytes(stored(kind, n, group)))
        top = {"fp32": 4, "fp16": 2, "int32": 4}.get(kind, 0)
        if top:  # numbers near one, or small ones
            stream[top - 1 :: top] = bytes(rng.choice((0, 0 if kind == "int32" else 0x3C)) for _ in range(n))
        scales = 2 * -(-n // group) if group else 0
        stream[1:scales:2] = bytes(rng.randrange(0x7C) for _ in range(scales // 2))
        if group and rng.random() < 0.9:  # codes that are, and zeros behind them
            codes = {"int8": b"\x7f\x81\0", "int4": b"\x79\x97\0", "int2": b"\x1b"}[kind] * n
            stream[scales:-1] = codes[: len(stream) - scales - 1]
            stream[-1:] = b"\0" * bool(n)
        packed = deflate(bytes(stream)) if rng.random() < 0.85 else self._stream(bytes(stream))
        return [kind, n, *([group] if group else [])], packed

    def _stream(self, text: bytes) -> NpArray:
        """Deflate of ``text`` that is cut, too long, not one stream, of other settings, or of much more."""
        rng = self._rng
        how = rng.randrange(6)
        if how == 0:
            text += b"\0" * rng.choice((1, 1 << 10, 1 << 21))
        packer = zlib.compressobj(rng.choice((0, 1, 9)), zlib.DEFLATED, rng.choice((-15, -9, 15)) if how == 1 else -15)
        packed = packer.compress(text) + packer.flush()
        if how == 2:
            packed = packed[: rng.randrange(len(packed) + 1)]
        elif how == 3:
            packed += rng.choice((b"\0", packed, b"\3\0"))
        elif how == 4:
            at = rng.randrange(len(packed))
            packed = packed[:at] + bytes([packed[at] ^ 1 << rng.randrange(8)]) + packed[at + 1 :]
        return np.frombuffer(packed, np.uint8)


def _is_place(value: list[Any]) -> bool:
    return len(value) > 2 and all(type(each) is int for each in value)


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(each)


def _texts(nodes: Iterable[Any]) -> set[str]:
    return {node for node in nodes if isinstance(node, str)}


def spelled(value: Any) -> bytes:
    """Canonical JSON, but for what ``RAW`` has."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if '"@' in text:
        for token, raw in RAW.items():
            text = text.replace(f'"{token}"', raw)
    return text.encode("utf-8", "replace")


def told_truly(manifest: Any, layout: Any, tensors: Mapping[str, NpArray], length: int, *, counts: bool) -> Any:
    """A manifest whose ``decoded`` is right, as far as what it is of can be counted."""
    told = manifest.get("decoded") if isinstance(manifest, dict) else None
    if not isinstance(told, dict) or not told.keys() >= {"bytes", "layout", "tensors", "updates"}:
        return manifest
    right = {"layout": length}
    if counts:
        with contextlib.suppress(*UNREADABLE):
            right |= counted(manifest, layout, tensors)
    return {**manifest, "decoded": {**told, **right}}


def counted(manifest: Any, layout: Any, tensors: Mapping[str, NpArray]) -> dict[str, int]:
    """Bytes, tensors and updates of parts that need not be a pack."""
    cut, made, updates = set[object](), dict[object, int](), 0
    for part in ("updates", "branches"):
        for group in layout[part]:
            seeds = {name: table for factor in group for name, table in _seeds(factor, group[factor])}
            for row in group["on"]:
                times = len(expanded(row["target" if part == "updates" else "tap"]))
                updates += times
                for name, place in row.items():
                    if isinstance(place, list) and name in seeds:
                        add_made(made, seeds[name], math.prod(place[2:]))
                    elif isinstance(place, list):
                        for i in range(times):
                            cut.add((group["kind"], name, place[0] + i * place[1], *place[2:]))
    planes = 0
    for name, tensor in tensors.items():
        entry = manifest["codecs"].get(name) or [_PLAIN[tensor.dtype.name], tensor.size]
        planes += width(name, entry[0]) * entry[1]
    cut.update(counted_places(manifest["heads"]))
    return {"bytes": planes + sum(made.values()), "tensors": len(cut), "updates": updates}


_PLAIN = {"float32": "fp32", "float16": "fp16", "int32": "int32", "uint8": "bits"}


def _seeds(name: str, table: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(table, dict):
        for part in WINDOWS.get(table.get("kind", ""), ()):
            yield f"{name}.{part}", table
        yield from _seeds(f"{name}.base", table.get("base"))


# ------------------------------------------------------------------------------------------------------------ campaigns


@dataclass(kw_only=True)
class Report:
    """What came of many packs: the faults by what they are, each with the number of its first and that pack."""

    packs: int = 0
    read: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)


def campaign(corpus: Sequence[bytes], seed: int, count: int) -> Report:
    """Examine ``count`` packs that are drawn from ``seed``."""
    report, mutator, began = Report(packs=count), Mutator(corpus, seed), time.process_time()
    for number in range(count):
        data, start = mutator.draw(), time.process_time()
        read, fault = outcome(data)
        took = time.process_time() - start
        report.read += read
        report.slowest_s = max(took, report.slowest_s)
        fault = "took too long" if fault is None and took > MOST_SECONDS else fault
        if fault is not None and (fault not in report.faults or 2 * len(data) < len(report.faults[fault][1])):
            report.faults[fault] = (number, data.hex())
    report.seconds = time.process_time() - began
    return report


def outcome(data: bytes) -> tuple[bool, str | None]:
    """Whether ``data`` was read, and what was wrong with that: a fault's words, or an error and where it was raised."""
    try:
        return examined(data), None
    except FaultError as fault:
        return False, str(fault)
    except Exception as error:
        return False, f"{type(error).__name__} in {traceback.extract_tb(error.__traceback__)[-1].name}"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """What reading a pack takes, what the pack says of that, and what was said, which is nothing where it is read."""

    seconds: float
    peak_bytes: int
    asked_bytes: int
    said: str


def weighed(data: bytes) -> Weight:
    """Read ``data`` twice, first for the time and then for the memory."""
    peaks, seconds, said = [0, 0], [0.0, 0.0], ""
    for traced in (0, 1):
        if traced:
            tracemalloc.start()
        start = time.process_time()
        try:
            read_pack(data, answers=EVERY)
        except Exception as error:
            said = str(error) if isinstance(error, PackError) else f"{type(error).__name__}: {error}"
        seconds[traced] = time.process_time() - start
        if traced:
            peaks[traced] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    return Weight(seconds=seconds[0], peak_bytes=peaks[1], asked_bytes=asked(data), said=said[:200])


def asked(data: bytes) -> int:
    """The sum of docs/spec/pack-v1.md, "Bounds", as far as a file states it."""
    size = header_bytes(data)
    told: dict[str, int] = {}
    with contextlib.suppress(*UNREADABLE):
        told = manifest_of(data)["decoded"]
    counted = 1024 * told.get("updates", 0) + 256 * told.get("tensors", 0)
    return told.get("bytes", 0) + 20 * (size + told.get("layout", 0)) + counted


def main(folder: Path, *numbers: str) -> None:
    """Print the report of a campaign over the packs of ``folder``, or what each weighs; memory is bounded."""
    import resource

    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    corpus = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.pet"))}
    if numbers:
        seed, count = map(int, numbers)
        report: object = asdict(campaign(list(corpus.values()), seed, count))
    else:
        report = {name: asdict(weighed(data)) for name, data in corpus.items()}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
