"""The ``.pet`` file: what goes in comes out, kilobytes stay kilobytes, and whatever is not a pack is refused."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepet.canonical import canonical_json
from edgepet.deltas.branches import BRANCHES, Branch
from edgepet.deltas.codes import Range
from edgepet.deltas.delta import Delta, Head, Int8Ranges, Score
from edgepet.deltas.expressions import Binary, Gather, Mix, Scaled, Seeded, Window
from edgepet.deltas.updates import (
    Add,
    Grouped,
    LowRank,
    Precompose,
    Push,
    Scale,
    Targeted,
    attributes,
    factors,
    generated,
)
from edgepet.errors import InputError, PackError
from edgepet.methods import SSF, Consolidator, LoRA, Method
from edgepet.packs.layout import MAX_UPDATES
from edgepet.packs.pack import Codec, encode_pack, read_pack, write_pack
from edgepet.spec import NpArray, Preprocess, Site, Target
from tests.tiny import FINGERPRINT, SETTINGS, cases, make_delta


def on(target: str, update: Any) -> Targeted:
    return Targeted(Target.parse(target, where="test"), update)


def floats(*shape: int, start: float = 1.0) -> NpArray:
    return (start + np.arange(np.prod(shape, dtype=int), dtype=np.float32)).reshape(shape)


def small() -> Delta:
    """Two low-rank additions, a scale and a grouped addition with an order: every part of the format once."""
    order = np.array([1, 0, 3, 2])
    return make_delta(
        [
            on("blocks.0.w[0:2]", LowRank(floats(2, 1), floats(1, 4), scale=0.5)),
            on("blocks.1.w[0:2]", LowRank(floats(2, 1, start=9), floats(1, 4, start=9), scale=0.5)),
            on("norm.weight", Scale(floats(4))),
            on("head.fc", Grouped(floats(2, 2, 2), order)),
        ]
    )


# ---------------------------------------------------------------------------------------------------- what comes out


def by_tensor(delta: Delta, dtype: type | None = None) -> dict[str, list[object]]:
    """Updates in the order that matters, which is the order on one tensor; floats as ``dtype`` would store them."""
    seen: dict[str, list[object]] = {}
    for targeted in delta.updates:
        arrays = {
            name: (array.astype(dtype if dtype and array.dtype.kind == "f" else array.dtype).tolist(), array.shape)
            for name, array in factors(targeted.update).items()
        }
        made = (attributes(targeted.update), generated(targeted.update), str(getattr(targeted.update, "reads", "")))
        one = (str(targeted.target), targeted.update.kind, made, arrays)
        seen.setdefault(targeted.target.tensor, []).append(one)
    return seen


def rest(delta: Delta) -> dict[str, object]:
    slots = (
        "task",
        "backbone",
        "fingerprint",
        "labels",
        "preprocess",
        "method",
        "val",
        "settings",
        "training",
        "licences",
    )
    return {name: getattr(delta, name) for name in slots}


NAMES = ["blocks.{}.attn.qkv.weight", "stages.1.blocks.{}.conv.weight", "norm.weight", "{}.0", "pos_embed"]


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    names = st.builds(str.format, st.sampled_from(NAMES), st.integers(0, 12))
    drawn = draw(st.lists(names.flatmap(lambda name: cases(name=name)), max_size=8))
    return make_delta([case.targeted for case in drawn])


@pytest.mark.parametrize(("codec", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_every_update_comes_out_as_it_went_in(codec: Codec, dtype: type) -> None:
    @given(delta=deltas())
    @SETTINGS
    def holds(delta: Delta) -> None:
        pack = read_pack(encode_pack(delta, codec=codec))

        assert by_tensor(pack.delta) == by_tensor(delta, dtype)
        assert rest(pack.delta) == rest(delta)
        assert pack.delta.head.weight.tolist() == delta.head.weight.astype(dtype).tolist()
        assert {a.dtype for a in pack.delta.arrays()} <= {np.dtype(dtype), np.dtype(np.int32), np.dtype(bool)}
        assert pack.codec == codec

    holds()


@given(delta=deltas())
@settings(SETTINGS, max_examples=60)
def test_what_was_read_is_written_with_the_same_bytes(delta: Delta) -> None:
    data = encode_pack(delta)

    assert encode_pack(delta) == data
    assert encode_pack(read_pack(data).delta) == data


def test_a_pack_says_its_bytes_and_what_they_are_for(tmp_path: Path) -> None:
    size = write_pack(tmp_path / "flowers.pet", small(), codec="fp32")
    data = (tmp_path / "flowers.pet").read_bytes()

    pack = read_pack(tmp_path / "flowers.pet")

    assert pack.size_bytes == size == len(data)
    assert pack.sha256 == hashlib.sha256(data).hexdigest()
    assert pack.bytes_by_kind == {
        "grouped.blocks": 32, "grouped.order": 16, "head.bias": 12, "head.weight": 48,
        "low-rank.left": 16, "low-rank.right": 32, "scale.s": 16,
    }  # fmt: skip
    assert size == 8 + header_bytes(data) + sum(pack.bytes_by_kind.values())


def test_the_manifest_of_version_1_never_changes() -> None:
    # docs/spec/pack-v1.md: a reader in the field knows these keys and no others.
    manifest = manifest_of(encode_pack(small()))

    assert manifest == {
        "format": "edgepet-pack",
        "version": 1,
        "task": "flowers",
        "codec": "fp16",
        "backbone": {"name": "tiny", "fingerprint": FINGERPRINT},
        "updates": [
            {"kind": "low-rank", "scale": 0.5, "on": [
                {"target": "blocks.{0..1}.w[0:2]", "left": [0, 2, 2, 1], "right": [0, 4, 1, 4]},
            ]},
            {"kind": "scale", "axis": "out", "on": [{"target": "norm.weight", "s": [0, 0, 4]}]},
            {"kind": "grouped", "on": [{"target": "head.fc", "blocks": [0, 0, 2, 2, 2], "order": [0, 0, 4]}]},
        ],
        "branches": [],
        "labels": ["class 0", "class 1", "class 2"],
        "preprocess": {
            "image_size": [32, 32], "interpolation": "bicubic", "crop_fraction": 1.0, "crop": "center",
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        },
        "method": {"name": "lora", "settings": {"rank": 2}},
        "training": {"epochs": 3},
        "val": {"top1": 0.875, "n": 8},
        "licences": ["CC0-1.0"],
    }  # fmt: skip


def test_a_head_that_does_not_lie_in_c_order_is_stored_by_its_values() -> None:
    weight = np.asfortranarray(floats(3, 4))

    pack = read_pack(encode_pack(make_delta(head=Head(weight=weight, bias=floats(6)[::2]))))

    assert pack.delta.head.weight.tolist() == floats(3, 4).tolist()
    assert pack.delta.head.bias.tolist() == [1, 3, 5]


def test_an_array_that_updates_share_is_stored_once() -> None:
    left, order = floats(2, 1), np.array([1, 0])
    delta = make_delta(
        [
            *(on(f"blocks.{i}.w", LowRank(left, floats(1, 4, start=i))) for i in range(5)),
            *(on(f"blocks.{i}.v", Grouped(floats(2, 1, 1, start=i), order)) for i in range(5)),
        ]
    )

    pack = read_pack(encode_pack(delta))

    assert delta.stored_values == 2 + 5 * 4 + 5 * 2
    assert pack.delta.stored_values == delta.stored_values
    assert pack.bytes_by_kind["low-rank.left"] == 2 * 2
    assert pack.bytes_by_kind["grouped.order"] == 2 * 4
    assert by_tensor(pack.delta) == by_tensor(delta, np.float16)


@given(steps=st.lists(st.integers(0, 3), min_size=4, max_size=4), others=st.permutations(range(4)))
@settings(SETTINGS, max_examples=60)
def test_arrays_that_are_shared_in_any_pattern_come_out_right(steps: list[int], others: list[int]) -> None:
    pool = [floats(2, start=10 * i) for i in range(4)]
    delta = make_delta(
        [
            *(on(f"blocks.{i}.b", Scale(pool[i])) for i in range(4)),
            *(on(f"blocks.{i}.b", Scale(pool[others[i]])) for i in range(4)),
            *(on(f"blocks.{i}.b", Scale(pool[steps[i]])) for i in range(4)),
        ]
    )

    pack = read_pack(encode_pack(delta, codec="fp32"))

    assert by_tensor(pack.delta) == by_tensor(delta)
    assert pack.delta.stored_values == 8


def test_the_order_of_updates_on_one_tensor_is_kept() -> None:
    updates = [
        on("b", Scale(floats(2))),
        on("b", Add(floats(2))),
        on("b", Scale(floats(2, start=5))),
        on("a", Add(floats(1))),
    ]

    assert [t.update.kind for t in read_pack(encode_pack(make_delta(updates))).delta.updates if t.target.tensor == "b"] == [
        "scale", "add", "scale",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ small by its form


def vit_small() -> tuple[Site, ...]:
    """The layers of a ViT-S/14, by hand: 12 blocks of width 384."""
    d = 384

    def site(name: str, kind: Any, out: int, width: int, blocks: Any = ()) -> Site:
        bias = f"{name}.bias"
        return Site(
            name=name, kind=kind, weight=f"{name}.weight", bias=bias, in_features=width, out_features=out, blocks=blocks
        )

    fused = (("q", (0, d)), ("k", (d, 2 * d)), ("v", (2 * d, 3 * d)))
    layers = [site("patch_embed.proj", "conv", d, 3)]
    for i in range(12):
        layers += [
            site(f"blocks.{i}.norm1", "norm", d, d),
            site(f"blocks.{i}.attn.qkv", "linear", 3 * d, d, fused),
            site(f"blocks.{i}.attn.proj", "linear", d, d),
            site(f"blocks.{i}.norm2", "norm", d, d),
            site(f"blocks.{i}.mlp.fc1", "linear", 4 * d, d),
            site(f"blocks.{i}.mlp.fc2", "linear", d, 4 * d),
        ]
    return (*layers, site("norm", "norm", d, d))


def lowered(method: Method, sites: Iterable[Site]) -> tuple[Targeted, ...]:
    rng = np.random.default_rng(0)
    chosen = method.sites(tuple(sites))
    return method.lower({}, chosen, method.start(chosen, {}, rng))


VIT_S = [(SSF(), 102_912), (LoRA(rank=8), 147_456), (Consolidator(groups=(384,)), 96_768)]


@pytest.mark.parametrize(("method", "values"), VIT_S, ids=[method.name for method, _ in VIT_S])
def test_a_task_of_a_vit_small_costs_two_bytes_a_value_and_one_page(method: Method, values: int) -> None:
    labels = ("daisy", "dandelion", "rose", "sunflower", "tulip")
    delta = make_delta(lowered(method, vit_small()), classes=5, width=384, labels=labels)

    data = encode_pack(delta)
    pack = read_pack(data)

    assert sum(size for name, size in pack.bytes_by_kind.items() if not name.startswith("head.")) == 2 * values
    assert 8 + header_bytes(data) <= 4096  # the target: one page of the file system, whatever the depth
    assert by_tensor(pack.delta) == by_tensor(delta, np.float16)


# ----------------------------------------------------------------------------------------------- what is not written


@pytest.mark.parametrize(("value", "codec", "shown"), [
    (1e5, "fp16", "1e+05"), (-7e4, "fp16", "7e+04"), (np.inf, "fp32", "inf"), (np.nan, "fp32", "nan"),
])  # fmt: skip
def test_a_value_that_the_codec_cannot_hold_is_not_written(
    value: float, codec: Codec, shown: str, tmp_path: Path
) -> None:
    dtype = "float16" if codec == "fp16" else "float32"

    with pytest.raises(InputError) as refused:
        write_pack(tmp_path / "a.pet", make_delta([on("b", Add(np.array([1, value], np.float32)))]), codec=codec)

    assert str(refused.value) == (
        f"flowers: add.d: holds a value that {dtype} cannot, got largest magnitude {shown}\n"
        "  fix: store it with `codec=fp32`, or train with a smaller learning rate if it is not finite"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_largest_fp16_is_written() -> None:
    assert read_pack(encode_pack(make_delta([on("b", Add(np.array([65504.0])))]))).delta.stored_values == 1


# --------------------------------------------------------------------------------------------------- what is refused


def header_bytes(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + header_bytes(data)])


def manifest_of(data: bytes) -> Any:
    return json.loads(header_of(data)["__metadata__"]["edgepet"])


def container(header: bytes, planes: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + planes


def rewritten(
    change: Callable[[dict[str, Any], dict[str, NpArray]], object] = lambda manifest, tensors: None,
    spell: Callable[[object], str] = lambda manifest: canonical_json(manifest).decode(),
) -> bytes:
    """A small pack, changed and written again in the canonical form, so that only the change is wrong."""
    data = encode_pack(small(), codec="fp32")
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load(data).items()}
    manifest = manifest_of(data)
    change(manifest, tensors)
    return safetensors.numpy.save(tensors, metadata={"edgepet": spell(manifest)})


def with_header(change: Callable[[bytes], bytes], behind: bytes = b"") -> bytes:
    data = rewritten()
    length = header_bytes(data)
    return container(change(data[8 : 8 + length]), data[8 + length :] + behind)


def header_as(change: Callable[[dict[str, Any]], object]) -> bytes:
    def edit(text: bytes) -> bytes:
        header = json.loads(text)
        change(header)
        return json.dumps(header, separators=(",", ":")).encode()

    return with_header(edit)


def row(group: int, **changes: Any) -> bytes:
    """The first row of an update's group, changed."""
    return rewritten(lambda m, t: m["updates"][group]["on"][0].update(changes))


def refusal(data: bytes) -> str:
    with pytest.raises(PackError) as refused:
        read_pack(data)
    return str(refused.value)


def test_the_way_these_tests_rewrite_a_pack_is_sound() -> None:
    assert rewritten() == encode_pack(small(), codec="fp32")
    assert with_header(lambda text: text) == rewritten()


CUT = "pack: is not a pack or is cut short"
WHOLE = "\n  fix: copy the file again, whole"
AGAIN = "pack: is not written in the canonical form\n  fix: write it again with edgepet"
FIRST, SECOND, THIRD = (f"pack.updates[{i}].on[0]" for i in range(3))
BRANCH = "pack.branches[0].on[0]"


@pytest.mark.parametrize("place", [*range(12), *(i / 40 for i in range(1, 40)), -1])
def test_a_pack_that_was_cut_short_is_refused_wherever_it_was_cut(place: float) -> None:
    data = rewritten()
    short = data[: place if isinstance(place, int) else int(place * len(data))]

    assert refusal(short).startswith(CUT)


def scale_huge(manifest: dict[str, Any], tensors: dict[str, NpArray]) -> None:
    manifest["updates"][0]["scale"] = 10**400


def bomb(manifest: dict[str, Any], tensors: dict[str, NpArray]) -> None:
    one = {"target": "blocks.{0..4095}.b", "s": [0, 0, 4]}
    manifest["updates"][1]["on"] = [one] * (MAX_UPDATES // 4096 + 1)


def key_to(value: object, *path: Any) -> bytes:
    def change(manifest: Any, tensors: dict[str, NpArray]) -> None:
        for step in path[:-1]:
            manifest = manifest[step]
        manifest[path[-1]] = value

    return rewritten(change)


def without(*path: Any) -> bytes:
    def change(manifest: Any, tensors: dict[str, NpArray]) -> None:
        for step in path[:-1]:
            manifest = manifest[step]
        del manifest[path[-1]]

    return rewritten(change)


def tensor_to(name: str, value: NpArray | None) -> bytes:
    def change(manifest: dict[str, Any], tensors: dict[str, NpArray]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return rewritten(change)


def planted(name: str, value: float) -> bytes:
    def change(manifest: dict[str, Any], tensors: dict[str, NpArray]) -> None:
        tensors[name].reshape(-1)[-1] = value

    return rewritten(change)


def expressed(change: Callable[[dict[str, Any], dict[str, NpArray]], object] = lambda group, tensors: None) -> bytes:
    """A pack whose one update has a factor of bits and one that is mixed, changed."""
    bits = Binary(np.arange(12).reshape(4, 3) % 2 == 0, floats(2))
    delta = make_delta([on("w", LowRank(bits, floats(3, 5), Mix(floats(3, 3, 2), floats(2, 2), 1, True)))])
    data = encode_pack(delta, codec="fp32")
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load(data).items()}
    manifest = manifest_of(data)
    change(manifest["updates"][0], tensors)
    return safetensors.numpy.save(tensors, metadata={"edgepet": canonical_json(manifest).decode()})


def seeded() -> Delta:
    """Uni-LoRA's factors, VeRA's, ARC's and a push: what is generated, nested, tied and read."""
    theta, base = floats(5), floats(4, 2)
    index = [Window(8 * i, (4, 2)) for i in range(4)]
    return make_delta(
        [
            *(on(f"blocks.{i}.q", LowRank(Gather(theta, 9, 64, index[i]), Gather(theta, 9, 64, Window(32 + 8 * i, (2, 4)))))
              for i in range(2)),
            *(on(f"blocks.{i}.v", LowRank(Scaled(floats(4, start=i), Seeded(7, 0.5, Window(0, (4, 3)))),
                                          Scaled(floats(3, start=i), Seeded(7, 0.25, Window(12, (3, 4))))))
              for i in range(2)),
            *(on(f"blocks.{i}.k", Precompose(base, Scaled(floats(2, start=i), base, transposed=True))) for i in range(2)),
            *(on(f"blocks.{i}.bias", Push(floats(4, start=i), Target(f"blocks.{i}.k"), "updated", -1.0)) for i in range(2)),
        ]
    )  # fmt: skip


def generating(change: Callable[[list[Any], dict[str, NpArray]], object] = lambda groups, tensors: None) -> bytes:
    """``seeded`` as a pack, its groups changed."""
    data = encode_pack(seeded(), codec="fp32")
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load(data).items()}
    manifest = manifest_of(data)
    change(manifest["updates"], tensors)
    return safetensors.numpy.save(tensors, metadata={"edgepet": canonical_json(manifest).decode()})


def branched(change: Callable[[dict[str, Any], dict[str, NpArray]], object] = lambda group, tensors: None) -> bytes:
    """A pack of two bottlenecks, its group changed."""
    shapes = {"down.weight": (2, 4), "down.bias": (2,), "up.weight": (4, 2), "up.bias": (4,)}
    branches = [
        Branch(kind="bottleneck", tap=f"blocks.{i}.mlp:out", into=f"blocks.{i}.mlp:out", settings={"activation": "relu"},
               tensors={name: floats(*shape, start=i) for name, shape in shapes.items()})
        for i in range(2)
    ]  # fmt: skip
    data = encode_pack(make_delta(branches=tuple(branches)), codec="fp32")
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load(data).items()}
    manifest = manifest_of(data)
    change(manifest["branches"][0], tensors)
    return safetensors.numpy.save(tensors, metadata={"edgepet": canonical_json(manifest).decode()})


def calibrated(change: Callable[[dict[str, Any]], object] = lambda int8: None) -> bytes:
    """A pack with two ranges for an int8 backbone, its section changed."""
    ranges = (Range(scale=0.5), Range(scale=1.25e-05, shift=-3.0))
    data = encode_pack(make_delta(int8=Int8Ranges(codes="0f" * 32, ranges=ranges)), codec="fp32")
    manifest = manifest_of(data)
    change(manifest["int8"])
    tensors = safetensors.numpy.load(data)
    return safetensors.numpy.save(tensors, metadata={"edgepet": canonical_json(manifest).decode()})


def test_ranges_for_an_int8_backbone_come_out_as_they_went_in() -> None:
    data = calibrated()

    read = read_pack(data)

    assert manifest_of(data)["int8"] == {"codes": "0f" * 32, "ranges": [[0.5, 0.0], [1.25e-05, -3.0]]}
    assert read.delta.int8 == Int8Ranges(codes="0f" * 32, ranges=(Range(scale=0.5), Range(scale=1.25e-05, shift=-3.0)))
    assert encode_pack(read.delta, codec="fp32") == data
    plain = encode_pack(replace(read.delta, int8=None), codec="fp32")
    assert "int8" not in manifest_of(plain)
    assert read_pack(plain).delta.int8 is None


def test_ranges_that_a_device_would_refuse_are_not_written(tmp_path: Path) -> None:
    delta = make_delta(int8=Int8Ranges(codes="0f" * 32, ranges=(Range(scale=0.0),)))

    with pytest.raises(PackError) as refused:
        write_pack(tmp_path / "x.pet", delta)

    assert str(refused.value) == f"pack.int8.ranges[0]: {A_RANGE}, got [0.0, 0.0]"
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_where_branches_read_and_where_they_are_added() -> None:
    (group,) = manifest_of(branched())["branches"]

    assert group == {
        "kind": "bottleneck", "settings": {"activation": "relu"},
        "on": [{
            "tap": "blocks.{0..1}.mlp:out", "into": "blocks.{0..1}.mlp:out",
            "down.weight": [0, 8, 2, 4], "down.bias": [0, 2, 2], "up.weight": [0, 8, 4, 2], "up.bias": [0, 4, 4],
        }],
    }  # fmt: skip


def stray_bit(group: dict[str, Any], tensors: dict[str, NpArray]) -> None:
    tensors["low-rank.left.bits"][-1] |= 1 << 4  # the 13th of 12


def test_the_manifest_says_how_a_factor_is_computed() -> None:
    (group,) = manifest_of(expressed())["updates"]

    assert group == {
        "kind": "low-rank", "scale": 1.0,
        "left": {"kind": "binary"}, "core": {"kind": "mix", "part": 1, "transposed": True},
        "on": [{
            "target": "w", "left.bits": [0, 0, 4, 3], "left.levels": [0, 0, 2], "right": [0, 0, 3, 5],
            "core.cube": [0, 0, 3, 3, 2], "core.weights": [0, 0, 2, 2],
        }],
    }  # fmt: skip


def test_the_manifest_says_what_is_generated_tied_and_read() -> None:
    data = generating()

    assert manifest_of(data)["updates"] == [
        {"kind": "low-rank", "scale": 1.0,
         "left": {"kind": "gather", "seed": 9, "total": 64}, "right": {"kind": "gather", "seed": 9, "total": 64},
         "on": [{"target": "blocks.{0..1}.q", "left.values": [0, 0, 5], "right.values": "left.values",
                 "left.index": [0, 8, 4, 2], "right.index": [32, 8, 2, 4]}]},
        {"kind": "low-rank", "scale": 1.0,
         "left": {"kind": "scaled", "transposed": False, "base": {"kind": "seeded", "seed": 7, "bound": 0.5}},
         "right": {"kind": "scaled", "transposed": False, "base": {"kind": "seeded", "seed": 7, "bound": 0.25}},
         "on": [{"target": "blocks.{0..1}.v", "left.c": [0, 4, 4], "right.c": [0, 3, 3],
                 "left.base.draws": [0, 0, 4, 3], "right.base.draws": [12, 0, 3, 4]}]},
        {"kind": "precompose", "scale": 1.0, "right": {"kind": "scaled", "transposed": True},
         "on": [{"target": "blocks.{0..1}.k", "left": [0, 0, 4, 2], "right.c": [0, 2, 2], "right.base": "left"}]},
        {"kind": "push", "of": "updated", "scale": -1.0,
         "on": [{"target": "blocks.{0..1}.bias", "reads": "blocks.{0..1}.k", "c": [0, 4, 4]}]},
    ]  # fmt: skip
    read = read_pack(data)
    assert by_tensor(read.delta) == by_tensor(seeded(), np.float32)
    assert {name: size // 4 for name, size in read.bytes_by_kind.items() if not name.startswith("head")} == {
        "low-rank.left.values": 5, "low-rank.left.c": 8, "low-rank.right.c": 6, "precompose.left": 8,
        "precompose.right.c": 4, "push.c": 8,
    }  # fmt: skip
    assert read.delta.stored_values == seeded().stored_values == 39
    assert encode_pack(read.delta, codec="fp32") == data


NEWER = "\n  fix: update edgepet if a newer version wrote this file"
A_RANGE = "needs a scale above 0 and a shift, both finite float32 numbers with a decimal point"


def ranges_to(*value: object) -> bytes:
    return calibrated(lambda int8: int8.update(ranges=list(value)))


def range_to(value: object) -> tuple[bytes, str]:
    """A pack whose second range is ``value``, and what is said of it."""
    return ranges_to([0.5, 0.0], value), f"pack.int8.ranges[1]: {A_RANGE}, got {json.dumps(value)}"


MALFORMED: dict[str, tuple[bytes, str]] = {
    # what an int8 backbone needs
    "ranges for no codes": (calibrated(lambda int8: int8.pop("codes")), "pack.int8: needs the key 'codes'"),
    "codes without ranges": (calibrated(lambda int8: int8.pop("ranges")), "pack.int8: needs the key 'ranges'"),
    "codes that are no digest": (
        calibrated(lambda int8: int8.update(codes="0f" * 31)), f"pack.int8.codes: needs a sha256 of 64 digits, got {'0f' * 31!r}"),
    "codes in capitals": (
        calibrated(lambda int8: int8.update(codes="0F" * 32)), f"pack.int8.codes: needs a sha256 of 64 digits, got {'0F' * 32!r}"),
    "codes that are a path": (
        calibrated(lambda int8: int8.update(codes="../../etc")), "pack.int8.codes: needs a sha256 of 64 digits, got '../../etc'"),
    "codes that are a number": (calibrated(lambda int8: int8.update(codes=64)), "pack.int8.codes: needs a text, got 64"),
    "an int8 section that is a list": (
        key_to([], "int8"), "pack.int8: needs an object, got []"),
    "an int8 section of nothing": (key_to(None, "int8"), "pack.int8: needs an object, got None"),
    "an int8 section with an unknown key": (
        calibrated(lambda int8: int8.update(bits=4)), f"pack.int8: knows no key 'bits'{NEWER}"),
    "ranges that are an object": (
        calibrated(lambda int8: int8.update(ranges={})), "pack.int8.ranges: needs an array, got {}"),
    "a range without its shift": range_to([0.5]),
    "a range of three numbers": range_to([0.5, 0.0, 1.0]),
    "a range that is a number": range_to(0.5),
    "a range of integers": range_to([1, 0]),
    "a range whose shift is an integer": range_to([1.0, 0]),
    "a range of bools": range_to([True, False]),
    "a range of text": range_to(["0.5", "0.0"]),
    "a scale of zero": range_to([0.0, 0.0]),
    "a scale below zero": range_to([-0.5, 0.0]),
    "a scale that float32 rounds to zero": range_to([1e-50, 0.0]),
    "a scale beyond float32": range_to([1e39, 0.0]),
    "a shift beyond float32": range_to([0.5, -1e39]),

    # the container
    "an empty file": (b"", f"{CUT}, got 0 bytes{WHOLE}"),
    "a header longer than the file": (b"\xff" * 64, f"{CUT}, got 64 bytes{WHOLE}"),
    "a header that is no JSON": (
        container(b"{]", b""), f"pack: has no readable header, got Expecting property name enclosed in double quotes: line 1 column 2 (char 1){WHOLE}"),
    "a header that is no object": (container(b"[]", b""), "pack: needs an object, got []"),
    "a header without a manifest": (container(b"{}", b""), "pack: needs the key '__metadata__'"),
    "a header with another program's metadata": (
        safetensors.numpy.save({}, metadata={"format": "pt"}), "pack.__metadata__: needs the key 'edgepet'"),
    "a space before the header": (with_header(lambda text: b" " + text), None),
    "spaces behind the header": (with_header(lambda text: text + b" " * 8), AGAIN),
    "a tensor's name twice in the header": (
        with_header(lambda text: text.replace(b'"scale.s":', b'"scale.s":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"scale.s":')),
        f"pack: has no readable header, got a key appears twice{WHOLE}"),
    "an unknown field of a tensor": (header_as(lambda h: h["scale.s"].update(note="x")), AGAIN),
    "metadata that is not ours beside ours": (header_as(lambda h: h["__metadata__"].update(note="x")), AGAIN),
    "bytes behind the last tensor": (with_header(lambda text: text, b"\0"), None),
    "a hole between tensors": (header_as(lambda h: h["scale.s"].update(data_offsets=[h["scale.s"]["data_offsets"][0] + 4] * 2)), None),
    "a number format that NumPy has not": (
        container(b'{"__metadata__":{"edgepet":"{}"},"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}', b"\0\0"),
        "pack: holds a number format that no pack has, got 'BF16'"),
    "a header nested without end": (container(b"[" * 100_000, b""), None),
    # the manifest as JSON
    "a manifest that is no JSON": (
        rewritten(spell=lambda m: "{"), "pack: has no readable manifest, got Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    "a manifest with a key twice": (
        rewritten(spell=lambda m: '{"a":1,"a":1}'), "pack: has no readable manifest, got a key appears twice"),
    "a manifest with NaN": (rewritten(spell=lambda m: '{"a":NaN}'), "pack: has no readable manifest, got NaN is not a JSON number"),
    "a manifest with a number beyond floats": (
        rewritten(spell=lambda m: '{"a":1e999}'), "pack: has no readable manifest, got 1e999 is not a JSON number"),
    "a manifest with spaces": (
        rewritten(spell=json.dumps), "pack: has a manifest that is not canonical JSON\n  fix: write it again with edgepet"),
    "a manifest with half a character": (rewritten(spell=lambda m: r'{"a":"\ud800"}'), None),
    "a manifest that is an array": (rewritten(spell=lambda m: "[]"), "pack: needs an object, got []"),
    # the manifest's keys
    "another format": (key_to("zip", "format"), "pack.format: needs one of edgepet-pack, got 'zip'"),
    "version 2": (key_to(2, "version"), "pack.version: this edgepet reads version 1, got 2\n  fix: update edgepet"),
    "a bool for the version": (key_to(True, "version"), "pack.version: needs an integer of at least 0, got True"),
    "a codec that version 1 has not": (key_to("int8", "codec"), "pack.codec: needs one of fp32, fp16, got 'int8'"),
    "another codec than the values have": (key_to("fp16", "codec"), "pack: low-rank.left: needs float16, got float32"),
    "a branch of nothing": (key_to([{}], "branches"), "pack.branches[0]: needs the key 'kind'"),
    "a branch of an unknown kind": (
        key_to([{"kind": "gate"}], "branches"),
        f"pack.branches[0].kind: needs one of {', '.join(BRANCHES)}, got 'gate'"),
    "a branch with another kind's setting": (
        branched(lambda b, t: b["settings"].update(heads=3)), f"pack.branches[0].settings: knows no key 'heads'{NEWER}"),
    "a branch without its activation": (
        branched(lambda b, t: b["settings"].pop("activation")), "pack.branches[0].settings: needs the key 'activation'"),
    "an activation that no graph has": (
        branched(lambda b, t: b["settings"].update(activation="tanh")),
        "pack: flowers: blocks.0.mlp:out: knows relu, gelu, quick-gelu, none, got 'tanh'"),
    "a branch without one of its tensors": (branched(lambda b, t: b["on"][0].pop("up.bias")), f"{BRANCH}: needs the key 'up.bias'"),
    "a branch whose tensor has other axes": (
        branched(lambda b, t: b["on"][0].update({"up.bias": [0, 4, 2, 2]})),
        "pack: flowers: blocks.0.mlp:out: bottleneck needs down.weight of 2 axes, down.bias of 1 axes, up.weight of 2 axes, up.bias of 1 axes, got down.weight, down.bias, up.weight, up.bias"),
    "a point without a side": (
        branched(lambda b, t: b["on"][0].update(tap="blocks.{0..1}.mlp")),
        "pack: flowers: a point is a module's name with :in or :out, got 'blocks.0.mlp'"),
    "a point that is a path": (
        branched(lambda b, t: b["on"][0].update(tap="../{0..1}:in")),
        "pack: flowers: a point is a module's name with :in or :out, got '../0:in'"),
    "taps and sums that are not as many": (
        branched(lambda b, t: b["on"][0].update(tap="blocks.0.mlp:out")), f"{BRANCH}: repeats tap and into equally often, got 1 and 2"),
    "two branches of one kind at one point": (
        branched(lambda b, t: b["on"][0].update(into="blocks.0.mlp:out", tap="blocks.0.mlp:out")), None),
    "no branches key": (without("branches"), "pack: needs the key 'branches'"),
    "an unknown key": (key_to(1, "extra"), f"pack: knows no key 'extra'{NEWER}"),
    "an unknown key of the backbone": (key_to(1, "backbone", "extra"), f"pack.backbone: knows no key 'extra'{NEWER}"),
    "an unknown key of the preprocessing": (key_to(1, "preprocess", "extra"), f"pack.preprocess: knows no key 'extra'{NEWER}"),
    "an unknown key of an update": (key_to(1, "updates", 0, "extra"), f"pack.updates[0]: knows no key 'extra'{NEWER}"),
    "an unknown key of a row": (row(1, extra=1), f"{SECOND}: knows no key 'extra'{NEWER}"),
    "an axis where the kind has none": (key_to("out", "updates", 0, "axis"), f"pack.updates[0]: knows no key 'axis'{NEWER}"),
    "an unknown kind of update": (
        key_to("prune", "updates", 1, "kind"),
        "pack.updates[1].kind: needs one of scale, add, low-rank, grouped, kronecker, precompose, replace, modulate, push, diagonal, got 'prune'"),
    "an unknown axis": (key_to("both", "updates", 1, "axis"), "pack.updates[1].axis: needs one of out, in, got 'both'"),
    "a bool for a scale": (key_to(True, "updates", 0, "scale"), "pack.updates[0].scale: needs a finite number, got True"),
    "a scale beyond floats": (rewritten(scale_huge), f"pack.updates[0].scale: needs a finite number, got 1{'0' * 76}..."),
    "a task that is a path": (
        key_to("../../etc/x", "task"),
        "pack: task: needs a name of letters, digits, '.', '_' and '-', at most 64, got '../../etc/x'"),
    "no fingerprint": (without("backbone", "fingerprint"), "pack.backbone: needs the key 'fingerprint'"),
    "a label too few": (key_to(["a", "b"], "labels"), "pack: flowers: a head (3, 4) needs 3 biases and labels, got 3 and 2"),
    "a label twice": (key_to(["a", "b", "a"], "labels"), "pack: flowers: needs labels that differ, got a, b, a"),
    "a number for a label": (key_to(["a", "b", 3], "labels"), "pack.labels[2]: needs a text, got 3"),
    "an image without a width": (key_to([32], "preprocess", "image_size"), "pack.preprocess.image_size: needs a height and a width, got [32]"),
    "an image of no height": (key_to([0, 32], "preprocess", "image_size"), "pack.preprocess.image_size[0]: needs an integer of at least 1, got 0"),
    "a std of zero": (key_to([1, 1, 0], "preprocess", "std"), "pack.preprocess: needs a crop_fraction in (0, 1] and a std above 0"),
    "a crop larger than the image": (key_to(1.5, "preprocess", "crop_fraction"), "pack.preprocess: needs a crop_fraction in (0, 1] and a std above 0"),
    "an orientation that is none": (key_to("left", "preprocess", "orientation"), "pack.preprocess.orientation: needs one of exif, none, got 'left'"),
    "an orientation of null": (key_to(None, "preprocess", "orientation"), "pack.preprocess.orientation: needs a text, got None"),
    "settings that are no object": (key_to([], "method", "settings"), "pack.method.settings: needs an object, got []"),
    "a float for the images scored": (key_to(8.0, "val", "n"), "pack.val.n: needs an integer of at least 0, got 8.0"),
    # targets
    "a target that is a path": (
        row(1, target="../norm.weight"), f"pack: {SECOND}: a target is NAME, NAME[a:b] or NAME[a:b, c:d], got '../norm.weight'"),
    "a block whose end is its start": (
        row(1, target="norm.weight[2:2]"), f"pack: {SECOND}: a block's end must be greater than its start, got 'norm.weight[2:2]'"),
    "a reversed block": (
        row(1, target="norm.weight[4:2]"), f"pack: {SECOND}: a block's end must be greater than its start, got 'norm.weight[4:2]'"),
    "a block in another spelling": (
        row(1, target="norm.weight[00:4]"), f"pack: {SECOND}: a target is NAME, NAME[a:b] or NAME[a:b, c:d], got 'norm.weight[00:4]'"),
    "a repeat of one": (row(1, target="b.{3..3}.w"), f"{SECOND}.target: repeats at least 2 and at most 4096 times, got 'b.{{3..3}}.w'"),
    "a reversed repeat": (row(1, target="b.{3..1}.w"), f"{SECOND}.target: repeats at least 2 and at most 4096 times, got 'b.{{3..1}}.w'"),
    "a repeat without end": (
        row(1, target="b.{0..4096}.w"), f"{SECOND}.target: repeats at least 2 and at most 4096 times, got 'b.{{0..4096}}.w'"),
    "two repeats": (
        row(1, target="b.{0..1}.{0..1}.w"), f"pack: {SECOND}: a target is NAME, NAME[a:b] or NAME[a:b, c:d], got 'b.0.{{0..1}}.w'"),
    "more updates than any method has": (rewritten(bomb), "pack.updates[1].on[15]: is beyond the 65536 updates that a pack may hold"),
    # where factors lie
    "a factor that is missing": (without("updates", 0, "on", 0, "right"), f"{FIRST}: needs the key 'right'"),
    "a place without a step": (row(1, s=[0]), f"{SECOND}.s: needs [start, step, axes...], got [0]"),
    "a bool in a place": (row(1, s=[False, 0, 4]), f"{SECOND}.s[0]: needs an integer of at least 0, got False"),
    "a negative step": (row(0, left=[2, -2, 2, 1]), f"{FIRST}.left[1]: needs an integer of at least 0, got -2"),
    "a factor of no values": (row(1, s=[0, 0, 0]), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, 0]"),
    "a factor that ends outside its plane": (row(1, s=[0, 0, 5]), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, 5]"),
    "a repeat that ends outside its plane": (
        row(0, left=[0, 3, 2, 1]), f"{FIRST}.left: reaches outside low-rank.left of 4 values, got [0, 3, 2, 1]"),
    "axes beyond 64 bits": (row(1, s=[0, 0, 2**70]), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, {2**70}]"),
    "axes whose product wraps around to four": (
        row(1, s=[0, 0, 2**62 + 1, 4]), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, {2**62 + 1}, 4]"),
    "a gap in a plane": (row(1, s=[1, 0, 3]), "pack: scale.s: needs rows that fill it without gap or overlap, got 1 after 0"),
    "an overlap in a plane": (
        row(0, left=[0, 1, 2, 1]), "pack: low-rank.left: needs rows that fill it without gap or overlap, got 1 after 2"),
    "one place with two shapes": (
        rewritten(lambda m, t: m["updates"][1]["on"].append({"target": "b", "s": [0, 0, 2, 2]})),
        "pack: scale.s: needs rows that fill it without gap or overlap, got 0 after 4"),
    "values that no row names": (row(1, s=[0, 0, 3]), "pack: scale.s: holds values that no row names, got 1 of them"),
    # factors that are computed
    "an unknown expression": (
        expressed(lambda g, t: g.update(left={"kind": "sum"})),
        "pack.updates[0].left.kind: needs one of product, mix, binary, scaled, householder, seeded, gather, got 'sum'"),
    "an expression with a setting of another": (
        expressed(lambda g, t: g["left"].update(part=0)), f"pack.updates[0].left: knows no key 'part'{NEWER}"),
    "a mix without a part": (expressed(lambda g, t: g["core"].pop("part")), "pack.updates[0].core: needs the key 'part'"),
    "a mix of a negative part": (
        expressed(lambda g, t: g["core"].update(part=-1)), "pack.updates[0].core.part: needs an integer of at least 0, got -1"),
    "an expression without one of its tensors": (
        expressed(lambda g, t: g["on"][0].pop("left.levels")), f"{FIRST}: needs the key 'left.levels'"),
    "a computed factor that is stored as well": (
        expressed(lambda g, t: g["on"][0].update(left=[0, 0, 4, 3])), f"{FIRST}: knows no key 'left'{NEWER}"),
    "an order that is computed": (
        key_to({"kind": "product"}, "updates", 2, "order"), f"pack.updates[2]: knows no key 'order'{NEWER}"),
    "bits behind the last one": (expressed(stray_bit), f"{FIRST}: needs zeros behind the last of its bits"),
    "bits that reach outside": (
        expressed(lambda g, t: g["on"][0].update({"left.bits": [0, 0, 17]})),
        f"{FIRST}.left.bits: reaches outside low-rank.left.bits of 2 values, got [0, 0, 17]"),
    "bits as floats": (
        expressed(lambda g, t: t.update({"low-rank.left.bits": floats(2)})), "pack: low-rank.left.bits: needs uint8, got float32"),
    # what is generated, tied and read
    "an expression within one that holds none": (
        generating(lambda g, t: g[0]["left"].update(values={"kind": "binary"})),
        f"pack.updates[0].left: knows no key 'values'{NEWER}"),
    "a scaled factor of a scaled one": (
        generating(lambda g, t: g[1]["left"].update(base={"kind": "scaled", "transposed": False})),
        "pack.updates[1].left.base.kind: needs one of product, mix, binary, householder, seeded, gather, got 'scaled'"),
    "a seed beyond what JSON readers hold": (
        generating(lambda g, t: g[0]["left"].update(seed=2**53)),
        f"pack.updates[0].left.seed: needs an integer of at most {2**53 - 1}, got {2**53}"),
    "a negative seed": (
        generating(lambda g, t: g[0]["left"].update(seed=-1)), "pack.updates[0].left.seed: needs an integer of at least 0, got -1"),
    "a seed that is a float": (
        generating(lambda g, t: g[0]["left"].update(seed=9.0)), "pack.updates[0].left.seed: needs an integer of at least 0, got 9.0"),
    "a bound that is a bool": (
        generating(lambda g, t: g[1]["left"]["base"].update(bound=True)), "pack.updates[1].left.base.bound: needs a finite number, got True"),
    "a shuffle of nothing": (
        generating(lambda g, t: g[0]["left"].update(total=0)), "pack.updates[0].left.total: needs an integer of at least 1, got 0"),
    "a shuffle that would take minutes": (
        generating(lambda g, t: g[0]["left"].update(total=2**40)),
        f"pack.updates[0].left.total: needs an integer of at most 4194304, got {2**40}"),
    "factors behind the end of the shuffle": (
        generating(lambda g, t: g[0]["on"][0].update({"right.index": [56, 8, 2, 4]})),
        f"{FIRST}.right.index: needs 1 to 4194304 values of 64, got [56, 8, 2, 4]"),
    "a window of no values": (
        generating(lambda g, t: g[1]["on"][0].update({"left.base.draws": [0, 0, 4, 0]})),
        f"{SECOND}.left.base.draws: needs 1 to 4194304 values of {2**53}, got [0, 0, 4, 0]"),
    "a window that fills the memory": (
        generating(lambda g, t: g[1]["on"][0].update({"left.base.draws": [0, 0, 4, 2**30]})),
        f"{SECOND}.left.base.draws: needs 1 to 4194304 values of {2**53}, got [0, 0, 4, {2**30}]"),
    "a window without its step": (
        generating(lambda g, t: g[0]["on"][0].update({"left.index": [0]})), f"{FIRST}.left.index: needs [start, step, axes...], got [0]"),
    "a window that is missing": (
        generating(lambda g, t: g[1]["on"][0].pop("left.base.draws")), f"{SECOND}: needs the key 'left.base.draws'"),
    "a tie to itself": (
        generating(lambda g, t: g[2]["on"][0].update({"right.base": "right.base"})),
        f"{THIRD}.right.base: needs one of left, right.c, got 'right.base'"),
    "a tie to what no row names": (
        generating(lambda g, t: g[2]["on"][0].update({"right.base": "core"})), f"{THIRD}.right.base: needs one of left, right.c, got 'core'"),
    "a tie to a window": (
        generating(lambda g, t: g[0]["on"][0].update({"right.values": "left.index"})),
        f"{FIRST}.right.values: needs one of left.values, got 'left.index'"),
    "a window that is tied": (
        generating(lambda g, t: g[0]["on"][0].update({"right.index": "left.index"})),
        f"{FIRST}.right.index: needs an array, got 'left.index'"),
    "bits that are tied": (
        expressed(lambda g, t: g["on"][0].update({"left.bits": "right"})), f"{FIRST}.left.bits: needs an array, got 'right'"),
    "a push that reads nothing": (
        generating(lambda g, t: g[3]["on"][0].pop("reads")), "pack.updates[3].on[0]: needs the key 'reads'"),
    "a push that reads a path": (
        generating(lambda g, t: g[3]["on"][0].update(reads="../{0..1}")),
        "pack: pack.updates[3].on[0]: a target is NAME, NAME[a:b] or NAME[a:b, c:d], got '../0'"),
    "a push that reads fewer than it changes": (
        generating(lambda g, t: g[3]["on"][0].update(reads="blocks.0.k")),
        "pack.updates[3].on[0]: repeats target and reads equally often, got 2 and 1"),
    "a push of what is not there yet": (
        generating(lambda g, t: g[3].update(of="next")), "pack.updates[3].of: needs one of frozen, updated, got 'next'"),
    "a push that does not say of what": (
        generating(lambda g, t: g[3].pop("of")), "pack.updates[3]: needs the key 'of'"),
    "pushes in a circle": (
        generating(lambda g, t: g[3]["on"][0].update(reads="blocks.{0..1}.bias")),
        "pack: flowers: blocks.0.bias: Push reads blocks.0.bias, which a push changes"),
    "a scale that reads": (row(1, reads="w"), f"{SECOND}: knows no key 'reads'{NEWER}"),
    # the tensors
    "a tensor that no row names": (tensor_to("add.d", floats(1)), "pack: knows no tensor 'add.d'"),
    "a tensor whose name is a path": (tensor_to("../../etc/x", floats(1)), "pack: knows no tensor '../../etc/x'"),
    "a plane that is missing": (tensor_to("scale.s", None), "pack: needs the tensor 'scale.s'"),
    "a head that is missing": (tensor_to("head.bias", None), "pack: needs the tensor 'head.bias'"),
    "a plane of two axes": (tensor_to("scale.s", floats(2, 2)), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, 4]"),
    "a head of one axis": (tensor_to("head.weight", floats(12)), "pack: head.weight: needs 2 axes, got 1"),
    "a plane in double precision": (tensor_to("scale.s", floats(4).astype(np.float64)), "pack: scale.s: needs float32, got float64"),
    "an order of 64 bits": (tensor_to("grouped.order", np.arange(4)), "pack: grouped.order: needs int32, got int64"),
    "an order of floats": (tensor_to("grouped.order", floats(4)), "pack: grouped.order: needs int32, got float32"),
    "NaN in a plane": (planted("low-rank.right", np.nan), "pack: low-rank.right: holds a value that is not finite"),
    "infinity in a plane": (planted("scale.s", -np.inf), "pack: scale.s: holds a value that is not finite"),
    "NaN in the head": (planted("head.weight", np.nan), "pack: head.weight: holds a value that is not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), MALFORMED.values(), ids=MALFORMED)
def test_refused_is(data: bytes, message: str | None) -> None:
    said = refusal(data)

    if message is not None:  # the others are said in another library's words
        assert said == message


@given(st.data())
@SETTINGS
def test_a_pack_with_any_byte_changed_is_read_as_what_it_is_or_refused(data: st.DataObject) -> None:
    pack = bytearray(rewritten())
    place = data.draw(st.integers(0, len(pack) - 1))
    pack[place] ^= data.draw(st.integers(1, 255))

    try:
        read = read_pack(bytes(pack))
    except PackError:
        return
    assert encode_pack(read.delta, codec="fp32") == bytes(pack)  # one meaning, one spelling


@given(st.binary(max_size=200))
@SETTINGS
def test_noise_is_refused(noise: bytes) -> None:
    refusal(noise)
    refusal(container(noise, b""))


def test_a_file_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "roses.pet").write_bytes(b"")

    with pytest.raises(PackError, match=r"^roses\.pet: is not a pack or is cut short, got 0 bytes"):
        read_pack(tmp_path / "roses.pet")
    with pytest.raises(InputError, match="could not be read, got No such file or directory"):
        read_pack(tmp_path / "tulips.pet")


def test_the_bytes_of_a_pack_do_not_change_from_release_to_release() -> None:
    """Packs in the field are checked against what this edgepet would write: another layout would refuse them all."""
    delta = Delta(
        task="flowers",
        backbone="test_vit",
        fingerprint="sha256:" + "0" * 64,
        updates=tuple(
            Targeted(Target(f"blocks.{i}.norm.weight"), Scale(np.full(3, 1 + i, np.float32))) for i in range(2)
        ),
        head=Head(weight=np.eye(2, 3, dtype=np.float32), bias=np.zeros(2, np.float32)),
        labels=("a", "b"),
        preprocess=Preprocess(image_size=(32, 32)),
        method="ssf",
        val=Score(top1=0.5, n=4),
    )

    assert (
        hashlib.sha256(encode_pack(delta)).hexdigest()
        == "a27e130795101d763110179e0ff03222a33e7873b0a2772c527b5d8b0f589200"
    )


@pytest.mark.parametrize("orientation", ["exif", "none", None])
def test_a_pack_says_how_images_lie_as_it_was_made_and_an_older_one_does_not(orientation: Any) -> None:
    delta = make_delta(preprocess=Preprocess(image_size=(32, 32), orientation=orientation))

    data = encode_pack(delta)

    read = read_pack(data).delta
    assert (read.preprocess.orientation, encode_pack(read)) == (orientation, data)
    assert (b"orientation" in data) is (orientation is not None)
