"""Packs that are wrong on purpose: refused in words, in the memory and time that they state, or read as they say."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepet.deltas.codes import Range
from edgepet.deltas.delta import NO_CLASSIFIER, Delta, Head, Int8Ranges, JudgedHead, Score
from edgepet.deltas.expressions import Binary, Mix
from edgepet.deltas.heads import MapHead, Step
from edgepet.deltas.layers import (
    Activation,
    Attend,
    Concat,
    Conv,
    Deconv,
    Depthwise,
    Detect,
    Mean,
    Multiply,
    Norm,
    Point,
    Pool,
    Regions,
    Resize,
    Unit,
)
from edgepet.deltas.layers import Add as AddMaps
from edgepet.deltas.probe import Probe
from edgepet.deltas.updates import Add, Grouped, LowRank, Replace, Scale, Targeted
from edgepet.errors import EdgepetError, PackError
from edgepet.packs.codecs import CODECS, Codec, Coding
from edgepet.packs.container import with_signature
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.packs.signatures import sign, signer
from edgepet.spec import NpArray, Preprocess, Target
from tests.fuzz import MOST_SECONDS, Parts, examined, spelled, stored, told_truly
from tests.golden.make import closing_updates, every_branch, every_update, values
from tests.packs import deflate
from tests.tiny import SETTINGS, cases, make_delta

ROOT = Path(__file__).parents[1]
PACKS = 10_000  # that the fast suite changes: some 8 s of one core
MENDING = frozenset[str]()  # faults, in the words of a report, that are known and wait for a change of the reader


# ---------------------------------------------------------------------------------------------------------- the corpus


def tiny(updates: Sequence[Targeted] = (), **given: Any) -> Delta:
    """As little as a pack has, but for ``updates``."""
    head = Head(weight=values(2, 2, seed=1), bias=values(2, seed=2))
    plain: dict[str, Any] = {"head": head, "labels": ("a", "b"), "settings": {}, "training": {}, "licences": ()}
    return make_delta(updates, task="golden", backbone="tiny", **{**plain, **given})


def on(name: str, update: Any) -> Targeted:
    return Targeted(Target.parse(name, where="test"), update)


def corpus() -> dict[str, bytes]:
    """Small packs that have every update, expression, branch, codec and key between them."""
    families: dict[str, list[Targeted]] = {}
    for each in (*every_update(), *closing_updates()):
        block, _, layer = each.target.tensor.removeprefix("blocks.").partition(".")
        if block != "2":  # two blocks make a pattern
            families.setdefault(layer.partition(".")[0], []).append(each)
    packs = {
        f"update-{name}": encode_pack(tiny(family), codec=("fp16", "fp32")[i % 2])
        for i, (name, family) in enumerate(families.items())
    }
    branches = every_branch()
    packs |= {b.kind: encode_pack(tiny(branches=branches[2 * i : 2 * i + 2])) for i, b in enumerate(branches[::2])}
    coded = [
        on("a", Scale(1 + values(70, seed=1))),
        on("b", Add(values(66, seed=1))),
        on("c", Replace(values(65, seed=2))),
    ]
    codings = {"scale.s": Coding("int2", 8), "add.d": Coding("int8", 32), "replace.value": Coding("int4", 16)}
    packs["coded"] = encode_pack(tiny(coded), codings=codings)
    bits, order = Binary(np.zeros((64, 8), bool), values(2, seed=1)), np.arange(96) % 2
    even = [
        on("a", Scale(np.ones(80, np.float32))),
        on("b", LowRank(bits, np.zeros((8, 16), np.float32))),
        on("b", Grouped(np.zeros((2, 2, 48), np.float32), order)),
    ]
    packs["packed"] = encode_pack(tiny(even), codings={"low-rank.right": Coding("fp32")})
    pairs = (Range(scale=0.25), Range(scale=0.5, shift=-1.5))
    ranges = Int8Ranges(codes="0123456789abcdef" * 4, ranges=pairs, trunk="fedcba9876543210" * 4)
    probe = Probe(7, values(2, 2, seed=3), 0.25)
    whole = tiny(
        int8=ranges, probes={"fp32": probe, "int8": probe}, labels=("é", "\U0001f600"), licences=("CC0-1.0",),
        preprocess=Preprocess(image_size=(16, 16), frames=8, orientation="exif"), settings={"rank": [1, {"a": 0.5}]},
    )  # fmt: skip
    packs |= {f"head-{n}": encode_pack(each, codec=("fp32", "fp16")[n % 2]) for n, each in enumerate(with_heads())}
    packs["whole"] = with_signature(encode_pack(whole, sequence=7), "0a" * 64)
    return packs


def with_heads() -> list[Delta]:
    """Tasks whose heads have every kind of layer between them: beside a classifier, two of them, and one by itself."""
    weight, kernel = values(2, 2, seed=1), values(2, 2, 3, 3, seed=2)
    mixed = (
        ("map.0", "a", Point(weight, values(2, seed=3))), ("a", "b", Norm(values(2, seed=4), values(2, seed=5))),
        ("b", "c", Depthwise(values(2, 3, 3, seed=6))), ("c", "d", Conv(kernel, values(2, seed=7), 2)),
        ("d", "e", Deconv(values(2, 2, 2, 2, seed=8))), ("e", "f", Attend(values(1, 3, 2, seed=9), values(1, 3, 2, seed=1))),
        ("f a", "g", AddMaps()), ("g", "logits", Regions(weight, weight)),
    )  # fmt: skip
    plain = (
        ("map.12", "a", Resize(4, "nearest")), ("a", "b", Pool(2)), ("b", "c", Activation("gelu")), ("c", "d", Unit(0.5)),
        ("d a a", "e", Concat()), ("e d", "f", Multiply()), ("f", "g", Mean()), ("g features", "h", Concat()),
        ("h", "logits", Norm(None, None, 1e-3)),
    )  # fmt: skip
    boxes = (
        ("map.1", "a", Point(weight, values(2, seed=3))), ("map.1", "b", Point(values(5, 2, seed=4))),
        ("a b", "found", Detect(values(1, seed=5), 8, 50)),
    )  # fmt: skip
    labels = (("features", "logits", Point(weight, values(2, seed=6))),)
    heads = [
        JudgedHead(
            head=MapHead(
                name=name, answer=name if name in ("boxes", "labels") else "mask", labels=("é", "b"),  # type: ignore[arg-type]
                thresholds=(0.25, 1.0) if name == "labels" else (),
                steps=tuple(Step(layer=layer, reads=tuple(reads.split()), gives=gives) for reads, gives, layer in steps),
            ),
            value=0.5, n=8,
        )
        for name, steps in (("mask", mixed), ("other-1", plain), ("boxes", boxes), ("labels", labels))
    ]  # fmt: skip
    alone = {"head": NO_CLASSIFIER, "labels": (), "val": Score(top1=0.0, n=0)}
    probe, several = Probe(7, values(2, 2, seed=3), 0.25), Probe(7, values(2, 4, seed=3), 0.25)
    return [
        tiny(heads=(heads[3],), probes={"fp32": probe}, **alone), tiny(heads=tuple(heads[2:]), probes={"fp32": several}, **alone),
        tiny(heads=tuple(heads)), tiny(heads=tuple(heads), **alone), tiny(heads=(heads[2],), probes={"fp32": probe}, **alone),
        tiny(heads=(heads[0],), probes={"fp32": probe, "int8": probe}, **alone),
    ]  # fmt: skip


CORPUS = corpus()


# ------------------------------------------------------------------------------------------------------ what is changed


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as files."""
    folder = tmp_path_factory.mktemp("packs")
    for name, data in CORPUS.items():
        (folder / f"{name}.pet").write_bytes(data)
    return folder


def fuzz(folder: Path, *numbers: int, seconds: float) -> Any:
    """What a process of ``tests.fuzz`` printed."""
    command = [sys.executable, "-m", "tests.fuzz", folder, *map(str, numbers)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


def require_sound(report: Mapping[str, Any]) -> None:
    """Refuse a report of faults that are not known: a line for each, with the pack that shows it."""
    faults = {what: found for what, found in report["faults"].items() if what not in MENDING}
    shown = [f"{what}: pack {number}, {data[:8000]}" for what, (number, data) in faults.items()]
    assert not shown, "\n".join(shown)
    assert report["slowest_s"] < MOST_SECONDS
    assert report["read"] > report["packs"] / 20  # else no change gets past the first rule


def test_a_pack_that_is_changed_anywhere_is_refused_or_read_as_what_it_says(packs: Path) -> None:
    require_sound(fuzz(packs, 0, PACKS, seconds=300))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_million_packs_are_refused_or_read_as_what_they_say(seed: int, packs: Path) -> None:
    require_sound(fuzz(packs, seed, 100_000, seconds=3600))


GUIDED = """
import pathlib, resource, sys, warnings
import atheris
with atheris.instrument_imports(include=["edgepet"]):
    from tests.fuzz import Mutator, outcome

known, folder, *options = sys.argv[1:]
mutator = Mutator([path.read_bytes() for path in sorted(pathlib.Path(folder).glob("*.pet"))], 0)
warnings.simplefilter("error")
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

def examine(data):
    fault = outcome(data)[1]
    if fault is not None and fault not in known.split(";"):
        raise RuntimeError(fault)

def change(data, most, seed):
    return mutator.near(data, seed)[:most]

atheris.Setup([sys.argv[0], *options], examine, custom_mutator=change)
atheris.Fuzz()
"""


@pytest.mark.slow
def test_changes_that_reach_new_lines_find_nothing_either(packs: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs the package atheris")
    found = tmp_path / "found"  # what reaches new lines is kept here
    shutil.copytree(packs, found)
    options = [
        "-runs=100000",
        "-seed=1",
        "-max_len=65536",
        "-timeout=30",
        "-rss_limit_mb=2048",
        f"-artifact_prefix={tmp_path}/",
    ]
    command = [sys.executable, "-c", GUIDED, ";".join(MENDING), packs, *options, found]

    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False)

    left = {path.name: path.read_bytes().hex()[:8000] for path in tmp_path.iterdir() if path.is_file()}
    assert ran.returncode == 0, f"{ran.stderr[-2000:]}\n{left}"
    assert "Done 100000 runs" in ran.stderr


# ------------------------------------------------------------------------------------------------- the two readings


def test_every_pack_of_the_corpus_is_read_as_what_it_says() -> None:
    assert [name for name, data in CORPUS.items() if not examined(data)] == []


@given(found=st.lists(cases(), max_size=4), codec=st.sampled_from(CODECS))
@settings(SETTINGS, max_examples=60)
def test_whatever_is_written_is_read_as_what_it_says(found: list[Any], codec: Codec) -> None:
    assert examined(encode_pack(make_delta([case.targeted for case in found]), codec=codec))


# -------------------------------------------------------------------------------------------------- every bit and byte


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """A small pack with a signature, and the folder of the key that it is of."""
    pytest.importorskip("cryptography", reason="needs the package cryptography")
    from cryptography.hazmat.primitives import serialization as spelling
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    folder, key = tmp_path_factory.mktemp("keys"), Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    plain = (spelling.Encoding.PEM, spelling.PrivateFormat.PKCS8, spelling.NoEncryption())
    (folder / "private").write_bytes(key.private_bytes(*plain))
    public = key.public_key().public_bytes(spelling.Encoding.PEM, spelling.PublicFormat.SubjectPublicKeyInfo)
    (folder / "ours.pub").write_bytes(public)
    return sign(CORPUS["update-bias"], folder / "private"), folder


def refused(read: Callable[..., object], *given: object) -> bool:
    try:
        read(*given)
    except EdgepetError:
        return True
    return False


def test_no_bit_of_a_signed_pack_can_be_turned(signed: tuple[bytes, Path]) -> None:
    data, trusted = signed
    assert signer(data, trusted, "x") == "ours"

    def turned(bit: int) -> bytes:
        return bytes([*data[: bit // 8], data[bit // 8] ^ 1 << bit % 8, *data[bit // 8 + 1 :]])

    every = map(turned, range(8 * len(data)))
    assert all(refused(signer, each, trusted, "x") or refused(read_pack, each) for each in every)


def test_no_beginning_of_a_signed_pack_is_one(signed: tuple[bytes, Path]) -> None:
    data, trusted = signed

    short = [data[:length] for length in range(len(data))]

    assert all(refused(read_pack, each) for each in short)
    assert all(refused(signer, each, trusted, "x") for each in short)


# ---------------------------------------------------------------------------------------- what is refused, one by one


def crafted(
    updates: Sequence[Any] = (),
    branches: Sequence[Any] = (),
    tensors: Mapping[str, NpArray] | None = None,
    *,
    codecs: Mapping[str, Any] | None = None,
    text: bytes | None = None,
    packed: NpArray | None = None,
    behind: str = "",
    decoded: Mapping[str, int] | None = None,
    **manifest: Any,
) -> bytes:
    """A pack of these groups and planes, with ``behind`` at the manifest's end; what it states is true if it can be."""
    parts = Parts.of(encode_pack(tiny()))
    layout, planes = {"updates": updates, "branches": branches}, {**parts.tensors, **(tensors or {})}
    text = spelled(layout) if text is None else text
    told = told_truly({**parts.manifest, "codecs": codecs or {}, **manifest}, layout, planes, len(text), counts=True)
    told["decoded"] |= decoded or {}
    metadata = {"edgepet": f"{spelled(told).decode()[:-1]}{behind}}}"}
    planes |= {"layout": deflate(text) if packed is None else packed}
    return safetensors.numpy.save(planes, metadata=metadata)


def head(**changes: Any) -> list[Any]:
    return [{**Parts.of(encode_pack(tiny())).manifest["heads"][0], **changes}]


def zeros(count: int, dtype: Any = np.float16) -> NpArray:
    return np.zeros(count, dtype)


def group(kind: str, *rows: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    return {"kind": kind, **given, "on": list(rows)}


def one(plane: str, place: list[int], tensor: NpArray, codec: list[Any] | None = None, **given: Any) -> bytes:
    """A pack of one update with one factor."""
    kind, _, factor = plane.partition(".")
    codecs = {} if codec is None else {plane: codec}
    return crafted([group(kind, {"target": "a", factor: place}, **given)], tensors={plane: tensor}, codecs=codecs)


def raw_header(tensors: str, planes: bytes = b"") -> bytes:
    """A file whose header has ``tensors`` behind the manifest of a pack of nothing."""
    start = b'{"__metadata__":{"edgepet":"{\\"auth\\":\\"' + b"0" * 128 + b'\\"}"},'
    header = start + tensors.encode() + b"}"
    return len(header).to_bytes(8, "little") + header + planes


CODES = deflate(b"\0\x3c\1\2\3\4")
BINARY = {"kind": "binary"}
NAN = np.array([0x7D01, 0, 0, 0], np.uint16).view(np.float16)  # a NaN that signals when it is made wider
FORBIDDEN: dict[str, Callable[[], bytes]] = {
    "more axes than NumPy has": lambda: one("add.d", [0, 0, 4] + [1] * 64, zeros(4)),
    "bits of more axes than NumPy has": (
        lambda: crafted([group("add", {"target": "a", "d.bits": [0, 0, 8] + [1] * 64, "d.levels": [0, 0, 2]}, d=BINARY)],
                        tensors={"add.d.bits": zeros(1, np.uint8), "add.d.levels": zeros(2)})),
    "scales that are whole numbers": lambda: one("scale.s", [0, 0, 4], zeros(4, np.int32), axis="out"),
    "scales that are bytes": lambda: one("scale.s", [0, 0, 4], zeros(4, np.uint8), axis="out"),
    "scales that are packed bytes": lambda: one("scale.s", [0, 0, 4], deflate(b"abcd"), ["bits", 4], axis="out"),
    "a scale that is a signalling NaN": lambda: one("scale.s", [0, 0, 4], NAN, axis="out"),
    "ranges that are codes": (
        lambda: crafted(tensors={"int8.ranges": CODES}, codecs={"int8.ranges": ["int8", 4, 4]}, int8={"codes": "0" * 64})),
    "a probe that is codes": (
        lambda: crafted(tensors={"probe.class": CODES}, codecs={"probe.class": ["int8", 4, 4]},
                        heads=head(probe={"fp32": {"seed": 0, "tolerance": 1.0}}))),
    "a probe of nothing": lambda: crafted(heads=head(probe={})),
    "a signature of more digits": lambda: crafted(auth="0" * 192),
}  # fmt: skip
STEERS, HIDES = "\x1b[2J\n", "\U000e0001"  # clears a terminal; is not seen, and ten characters when it is spelled out
SHOWN: dict[str, Callable[[], bytes]] = {
    "a tensor of two axes": lambda: crafted(tensors={STEERS: np.zeros((2, 2), np.float32)}),
    "a tensor of a long name that is not seen": lambda: crafted(tensors={HIDES * 400: np.zeros((2, 2), np.float32)}),
    "a tensor of doubles": lambda: crafted(tensors={STEERS: zeros(2, np.float64)}),
    "a codec that is none": lambda: crafted(tensors={STEERS: zeros(2, np.uint8)}, codecs={STEERS: ["int3"]}),
    "a codec of no array": lambda: crafted(tensors={STEERS: zeros(2, np.uint8)}, codecs={STEERS: 3}),
    "a packed tensor of floats": lambda: crafted(tensors={STEERS: zeros(2)}, codecs={STEERS: ["fp16", 2]}),
    "a stream that is none": lambda: crafted(tensors={STEERS: zeros(2, np.uint8)}, codecs={STEERS: ["fp16", 2]}),
    "a plane that nobody names": lambda: crafted(tensors={"x" * 9999: zeros(2)}),
    "a codec for no plane": lambda: crafted(codecs={"x" * 9999: ["fp16", 2]}),
    "a codec for no plane, many times": lambda: crafted(codecs={f"{i:09}": ["fp16", 2] for i in range(999)}),
    "unknown keys": lambda: crafted(behind="," + ",".join(f'"z{i:09}":0' for i in range(999))),
    "labels that are equal": lambda: crafted(heads=head(labels=[STEERS, STEERS])),
    "many labels that are equal": (
        lambda: crafted(tensors={"head.point.weight": zeros(999), "head.point.bias": zeros(999)},
                        heads=head(labels=["abc"] * 999,
                                   layers=[{"kind": "point", "weight": [0, 0, 999, 1], "bias": [0, 0, 999]}]))),
    "a place of many axes": lambda: one("add.d", [0, 0] + [9] * 999, zeros(2)),
    "a window of many axes": (
        lambda: crafted([group("add", {"target": "a", "d.draws": [0, 0] + [9] * 999},
                               d={"kind": "seeded", "seed": 0, "bound": 1.0})], decoded={"bytes": 99})),
    "an activation that is none": (
        lambda: crafted(branches=[group("bottleneck", {"tap": "a:in", "into": "a:in", "down.weight": [0, 0, 1, 1],
                                                       "down.bias": [0, 0, 1], "up.weight": [0, 0, 1, 1],
                                                       "up.bias": [0, 0, 1]}, settings={"activation": "x" * 9999})],
                        tensors={f"bottleneck.{name}": zeros(1) for name in
                                 ("down.weight", "down.bias", "up.weight", "up.bias")})),
    "a number of many digits that is not finite": lambda: crafted(behind=f',"z":{"9" * 9999}.5'),
    "a tensor that is not where it must be": (
        lambda: raw_header(f'"\\u001b{"x" * 9999}":{{"dtype":"U8","shape":[1],"data_offsets":[3,2]}}')),
    "a number format that is none": (
        lambda: raw_header(f'"x":{{"dtype":"\\u001b{"x" * 9999}","shape":[1],"data_offsets":[0,1]}}', b"0")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_refused_is(name: str) -> None:
    with pytest.raises(PackError):
        read_pack(FORBIDDEN[name]())


@pytest.mark.parametrize("name", SHOWN)
def test_a_refusal_can_be_shown(name: str) -> None:
    assert not examined(SHOWN[name]())


NESTED = {
    "settings": (("manifest", "method", "settings"), {"a": "@"}),
    "training": (("manifest", "training"), "@"),
    "a version": (("manifest", "version"), "@"),
    "a label": (("manifest", "heads", 0, "labels", 0), "@"),
    "a codec": (("manifest", "codecs"), {"push.c": "@"}),
    "a codec's format": (("manifest", "codecs"), {"push.c": ["@", 4]}),
    "a layout": (("layout",), "@"),
    "a group": (("layout", "updates", 0), "@"),
    "an axis of a place": (("layout", "updates", 0, "on", 0, "c.draws"), "@"),
    "an expression": (("layout", "updates", 0, "c"), {"kind": "scaled", "transposed": False, "base": "@"}),
}


@pytest.mark.parametrize("name", NESTED)
def test_what_is_nested_too_deep_is_refused_at_any_depth(name: str) -> None:
    (document, *path), value = NESTED[name]
    parts = Parts.of(CORPUS["update-bias"])
    both = {"manifest": parts.manifest, "layout": parts.layout}

    def with_value(within: Any, steps: Sequence[Any]) -> Any:
        if not steps:
            return value
        changed = dict(within) if isinstance(within, dict) else list(within)
        changed[steps[0]] = with_value(within[steps[0]], steps[1:])
        return changed

    made = {**both, document: with_value(both[document], path)}
    for depth in (*range(9, 12), *range(880, 1001)):  # the interpreter's own bound lies there, less the frames around
        texts = {key: spelled(each).decode().replace('"@"', "[" * depth + "]" * depth) for key, each in made.items()}
        told = dict(parts.manifest["decoded"])
        texts["manifest"] = texts["manifest"].replace(f'"layout":{told["layout"]}', f'"layout":{len(texts["layout"])}')
        planes = {**parts.tensors, "layout": deflate(texts["layout"].encode())}
        assert not examined(safetensors.numpy.save(planes, metadata={"edgepet": texts["manifest"]})), depth


# ------------------------------------------------------------------------------------------------------ time and memory

Weighed = tuple[Callable[[], bytes], str]  # a pack, and how its refusal begins; it is read where there is none
MANY = [f"{i:02}" for i in range(4)]
LONG = {letter: letter * 230 for letter in "ab"}


def wide(count: int, plane: str = "add.d", codec: str = "fp32", group: int = 0) -> bytes:
    """A plane of ``count`` values that are all nothing, packed."""
    entry = [codec, count, *([group] if group else [])]
    return one(
        plane, [0, 0, count], deflate(bytes(stored(codec, count, group))), entry, **(AXIS if plane == "scale.s" else {})
    )


AXIS = {"axis": "out"}
HEAVY: dict[str, Weighed] = {  # right ones that take as much as packs of their length may; the time of others is held to it
    "updates of long names": (
        lambda: crafted([group("push", *({"target": f"{LONG['a']}{i}.{{0..4095}}", "reads": f"{LONG['b']}{i}.{{0..4095}}",
                                          "c": [0, 0, 1]} for i in MANY[:3]), of="frozen", scale=1.0)],
                        tensors={"push.c": zeros(1)}), ""),
    "bits that 16,384 updates share": (
        lambda: crafted([group("replace", *({"target": f"b{i}.{{0..4095}}", "value.bits": [0, 0, 8_000_000],
                                             "value.levels": [0, 0, 2]} for i in MANY), value=BINARY)],
                        tensors={"replace.value.bits": zeros(1_000_000, np.uint8), "replace.value.levels": zeros(2)}), ""),
}  # fmt: skip
WEIGHED: dict[str, Weighed] = HEAVY | {
    "branches of long names": (
        lambda: crafted(branches=[group("key-values", *({"tap": f"{LONG['a']}{i}.{{0..4095}}:in", "keys": [0, 0, 1, 1],
                                                         "into": f"{LONG['b']}{i}.{{0..4095}}:in", "values": [0, 0, 1, 1]}
                                                        for i in MANY[:1]), settings={"heads": 1})],
                        tensors={"key-values.keys": zeros(1), "key-values.values": zeros(1)}), ""),
    "arrays of one value": (
        lambda: crafted([group("add", *({"target": f"a{i}.{{0..4095}}", "d": [4096 * int(i), 1, 1]} for i in MANY[:1]))],
                        tensors={"add.d": zeros(4096)}), ""),
    "bits of one byte": (
        lambda: crafted([group("add", *({"target": f"a{i}.{{0..4095}}", "d.bits": [4096 * int(i), 1, 8],
                                         "d.levels": [0, 0, 2]} for i in MANY[:1]), d=BINARY)],
                        tensors={"add.d.bits": zeros(4096, np.uint8), "add.d.levels": zeros(2)}), ""),
    "a mix of 490,000 columns": (
        lambda: crafted([group("add", {"target": "a", "d.cube": [0, 0, 64, 64, 1], "d.weights": [0, 0, 1, 490_000]},
                               d={"kind": "mix", "part": 0, "transposed": False})],
                        tensors={"add.d.cube": zeros(4096), "add.d.weights": zeros(490_000)}), ""),
    "patterns of more than is stated": (
        lambda: crafted([group("add", {"target": "a.{0..4095}", "d": [0, 0, 1]}, {"target": "b.{0..4095}", "d": [0, 0, 1]})],
                        tensors={"add.d": zeros(1)}, decoded={"updates": 4096}), "pack.updates[0].on[1]: is beyond"),
    "more patterns than a pack may state": (
        lambda: crafted([group("add", *[{"target": "a.{0..4095}", "d": [0, 0, 1]}] * 5)], tensors={"add.d": zeros(1)}),
        "pack.decoded: asks for more memory"),
    "a layout that swells": (
        lambda: crafted(packed=deflate(b" " * (16 << 20)), text=b" " * 800_000), "pack: layout: must hold 800000 bytes"),
    "a plane that swells": (
        lambda: one("add.d", [0, 0, 1 << 18], deflate(bytes(16 << 20)), ["fp32", 1 << 18]), "pack: add.d: must hold"),
    "a layout that is nested without end": (
        lambda: crafted(text=b"[" * 400_000 + b"]" * 400_000), "pack: has no readable layout"),
    "a manifest that is nested without end": (
        lambda: crafted(behind=f',"z":{"[" * 400_000}{"]" * 400_000}'), "pack: has no readable manifest"),
    "a layout of empty objects": (lambda: crafted(text=b"[" + b"{}," * 150_000 + b"{}]"), "pack: needs an object"),
    "a layout of objects of one key and one wide letter": (
        lambda: crafted(text=b"[" + b'{"":0},' * 60_000 + '"\U0001f600"]'.encode()), "pack: needs an object"),
    "a manifest of empty objects": (lambda: crafted(behind=f',"z":[{"{}," * 150_000}{{}}]'), "pack: knows no key 'z'"),
    "a manifest of empty objects and one wide letter": (
        lambda: crafted(behind=f',"z":[{"{}," * 150_000}"\U0001f600"]'), "pack: knows no key 'z'"),
    "groups of nothing": (lambda: crafted([group("add")] * 10_000), ""),
    "provenance of empty arrays": (lambda: crafted(training={"a": [[]] * 5400}), ""),
    "an integer of 900,000 digits": (
        lambda: crafted(behind=f',"z":{"9" * 900_000}'), "pack: has no readable manifest, got an integer has 900000 digits"),
    "a fraction of 900,000 digits": (
        lambda: crafted(behind=f',"z":0.{"9" * 900_000}'), "pack: has a manifest that is not canonical JSON"),
    "a header of 6,000 tensors": (
        lambda: crafted(tensors={f"x{i:05}": zeros(0, np.uint8) for i in range(6_000)}), "pack: knows no plane"),
    "65,536 labels": (
        lambda: crafted(tensors={"head.point.weight": zeros(65_536), "head.point.bias": zeros(65_536)},
                        heads=head(labels=[f"{i:05}" for i in range(65_536)],
                                   layers=[{"kind": "point", "weight": [0, 0, 65_536, 1], "bias": [0, 0, 65_536]}])), ""),
    "a crop of nearly nothing": (
        lambda: crafted(preprocess={**Parts.of(encode_pack(tiny())).manifest["preprocess"], "crop_fraction": 5e-324}), "pack.preprocess: needs"),
    "a name of a megabyte": (lambda: crafted(method={"name": "a" * 900_000, "settings": {}}), "pack.method.name: needs"),
    "a shuffle for every update": (
        lambda: crafted([group("add", {"target": f"a{i}", "d.values": [0, 0, 1], "d.index": [0, 0, 1]},
                               d={"kind": "gather", "seed": i, "total": 1 << 22}) for i in range(8)],
                        tensors={"add.d.values": zeros(1)}), "pack.decoded: asks for more memory"),
    "axes of twenty digits": (
        lambda: one("add.d", [0, 0] + [10**20 - 1] * 20_000, zeros(1)), "pack.updates[0].on[0].d"),
    "a million numbers": (lambda: wide(1 << 20), ""),
    "a million halves": (lambda: wide(1 << 20, codec="fp16"), ""),
    "a million scales in halves": (lambda: wide(1 << 20, "scale.s", "fp16"), ""),
    "a million codes of eight bits": (lambda: wide(1 << 20, codec="int8", group=512), ""),
    "a million codes of four bits": (lambda: wide(1 << 20, codec="int4", group=128), ""),
    "a million codes of two bits": (lambda: wide(1 << 20, codec="int2", group=64), ""),
    "a million scales in two bits": (lambda: wide(1 << 20, "scale.s", "int2", 64), ""),
    "a million codes with scales of their own": (lambda: wide(1 << 20, codec="int2", group=1), ""),
    "codes of one scale for more values than there are": (
        lambda: one("add.d", [0, 0, 4], CODES, ["int8", 4, 1 << 26]), ""),
    "two million numbers in place": (lambda: one("add.d", [0, 0, 1 << 21], zeros(1 << 21, np.float32)), ""),
    "four million halves in place": (lambda: one("add.d", [0, 0, 1 << 22], zeros(1 << 22)), ""),
    "four million bits": (
        lambda: crafted([group("add", {"target": "a", "d.bits": [0, 0, 1 << 22], "d.levels": [0, 0, 2]}, d=BINARY)],
                        tensors={"add.d.bits": deflate(bytes(1 << 19)), "add.d.levels": zeros(2)},
                        codecs={"add.d.bits": ["bits", 1 << 19]}), ""),
    "sixteen million bits in place": (
        lambda: crafted([group("add", {"target": "a", "d.bits": [0, 0, 1 << 24], "d.levels": [0, 0, 2]}, d=BINARY)],
                        tensors={"add.d.bits": zeros(1 << 21, np.uint8), "add.d.levels": zeros(2)}), ""),
    "four megabytes of doubles": (
        lambda: crafted(tensors={"add.d": zeros(1 << 19, np.float64)}), "pack: add.d: holds a number format"),
    "a stream of empty blocks": (
        lambda: one("add.d", [0, 0, 2], np.frombuffer(b"\0\0\0\xff\xff" * 800_000 + deflate(bytes(8)).tobytes(), np.uint8),
                    ["fp32", 2]), ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of these packs takes to be read."""
    folder = tmp_path_factory.mktemp("weighed")
    for name, (made, _) in WEIGHED.items():
        (folder / f"{name}.pet").write_bytes(made())
    sizes = {path.stem: path.stat().st_size for path in folder.glob("*.pet")}
    return {name: {**found, "size_bytes": sizes[name]} for name, found in fuzz(folder, seconds=300).items()}


@pytest.mark.parametrize("name", WEIGHED)
def test_what_asks_for_much_is_read_or_refused(name: str, weights: Any) -> None:
    said, begins = weights[name]["said"], WEIGHED[name][1]

    assert said.startswith(begins) if begins else said == ""


@pytest.mark.parametrize("name", WEIGHED)
def test_reading_takes_twice_the_memory_that_a_pack_states_and_no_more(name: str, weights: Any) -> None:
    found = weights[name]

    assert (
        found["peak_bytes"] <= 2 * (found["asked_bytes"] + found["size_bytes"]) + 1_000_000
    )  # docs/spec/pack-v1.md, "Bounds"


@pytest.mark.parametrize("name", WEIGHED)
def test_reading_takes_twice_the_time_of_a_right_pack_of_its_length_and_no_more(name: str, weights: Any) -> None:
    found = weights[name]
    right = [weights[heavy] for heavy in HEAVY if weights[heavy]["size_bytes"] <= max(found["size_bytes"], 1 << 14)]

    assert found["seconds"] <= 2 * max(each["seconds"] for each in right)


def test_of_a_mix_the_columns_that_are_used_are_computed() -> None:
    mix = Mix(np.ones((64, 64, 1), np.float32), np.ones((1, 490_000), np.float32))
    mix.value(mix.cube)

    tracemalloc.start()
    mix.value(mix.cube)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1_000_000
