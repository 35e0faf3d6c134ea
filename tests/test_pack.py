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
from edgepet.packs.codecs import Codec, as_stored
from edgepet.packs.container import UNSIGNED, with_signature
from edgepet.packs.layout import MAX_UPDATES
from edgepet.packs.pack import encode_pack, read_pack, write_pack
from edgepet.spec import NpArray, Preprocess, Site, Target
from tests.packs import Change, changed, deflate, header_bytes, layout_of, manifest_of, tensors_of
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

    def stored(kind: str, array: NpArray) -> NpArray:
        if dtype is None or array.dtype.kind != "f":
            return array
        if kind == "scale" and dtype is np.float16:  # as the difference from one
            near: NpArray = (array.astype(np.float64) - 1).astype(dtype).astype(np.float32) + np.float32(1)
            return near
        return array.astype(dtype)

    seen: dict[str, list[object]] = {}
    for targeted in delta.updates:
        kind = targeted.update.kind
        arrays = {name: (stored(kind, a).tolist(), a.shape) for name, a in factors(targeted.update).items()}
        made = (attributes(targeted.update), generated(targeted.update), str(getattr(targeted.update, "reads", "")))
        seen.setdefault(targeted.target.tensor, []).append((str(targeted.target), kind, made, arrays))
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
        assert {a.dtype for a in pack.delta.arrays()} <= {
            np.dtype(dtype),
            np.dtype(np.float32),
            np.dtype(np.int32),
            np.dtype(bool),
        }
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
        "grouped.blocks": 32, "grouped.order": 16, "head.point.bias": 12, "head.point.weight": 48, "layout": len(tensors_of(data)["layout"]),
        "low-rank.left": 16, "low-rank.right": 32, "scale.s": 16,
    }  # fmt: skip
    assert size == 8 + header_bytes(data) + sum(pack.bytes_by_kind.values())


def test_the_manifest_and_the_layout_of_version_1_never_change() -> None:
    # docs/spec/pack-v1.md: a reader in the field knows these keys and no others.
    data = encode_pack(small(), sequence=7)

    assert manifest_of(data) == {
        "auth": "0" * 128,
        "format": "edgepet-pack",
        "version": 1,
        "task": "flowers",
        "sequence": 7,
        "backbone": {"name": "tiny", "fingerprint": FINGERPRINT},
        "codecs": {},
        "decoded": {"bytes": 102, "layout": len(canonical_json(layout_of(data))), "tensors": 9, "updates": 4},
        "heads": [{
            "name": "class", "answer": "class", "labels": ["class 0", "class 1", "class 2"],
            "layers": [{"kind": "point", "bias": [0, 0, 3], "weight": [0, 0, 3, 4]}],
            "val": {"metric": "top1", "value": 0.875, "n": 8},
        }],
        "preprocess": {
            "image_size": [32, 32], "interpolation": "bicubic", "crop_fraction": 1.0, "crop": "center",
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "orientation": "exif",
        },
        "method": {"name": "lora", "settings": {"rank": 2}},
        "training": {"epochs": 3},
        "licences": ["CC0-1.0"],
    }  # fmt: skip
    assert layout_of(data) == {
        "updates": [
            {"kind": "low-rank", "scale": 0.5, "on": [
                {"target": "blocks.{0..1}.w[0:2]", "left": [0, 2, 2, 1], "right": [0, 4, 1, 4]},
            ]},
            {"kind": "scale", "axis": "out", "on": [{"target": "norm.weight", "s": [0, 0, 4]}]},
            {"kind": "grouped", "on": [{"target": "head.fc", "blocks": [0, 0, 2, 2, 2], "order": [0, 0, 4]}]},
        ],
        "branches": [],
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
def test_a_task_of_a_vit_small_costs_at_most_two_bytes_a_value_and_two_kilobytes(method: Method, values: int) -> None:
    labels = ("daisy", "dandelion", "rose", "sunflower", "tulip")
    delta = make_delta(lowered(method, vit_small()), classes=5, width=384, labels=labels)

    data = encode_pack(delta)
    pack = read_pack(data)

    planes = sum(size for name, size in pack.bytes_by_kind.items() if not name.startswith(("head.", "layout")))
    assert planes <= 2 * values
    assert 8 + header_bytes(data) + pack.bytes_by_kind["layout"] <= 2000  # whatever the depth
    assert by_tensor(pack.delta) == by_tensor(delta, np.float16)


# ----------------------------------------------------------------------------------------------- what is not written


@pytest.mark.parametrize(("value", "codec", "shown"), [
    (1e5, "fp16", "1e+05"), (-7e4, "fp16", "7e+04"), (np.inf, "fp32", "inf"), (np.nan, "fp32", "nan"),
])  # fmt: skip
def test_a_value_that_the_codec_cannot_hold_is_not_written(
    value: float, codec: Codec, shown: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        write_pack(tmp_path / "a.pet", make_delta([on("b", Add(np.array([1, value], np.float32)))]), codec=codec)

    assert str(refused.value) == (
        f"flowers: add.d: holds a value that {codec} cannot, got largest magnitude {shown}\n"
        "  fix: store it with `codec=fp32`, or train with a smaller learning rate if it is not finite"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_largest_fp16_is_written() -> None:
    assert read_pack(encode_pack(make_delta([on("b", Add(np.array([65504.0])))]))).delta.stored_values == 1


# --------------------------------------------------------------------------------------------------- what is refused


def container(header: bytes, planes: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + planes


def rewritten(change: Change = lambda manifest, tensors: None, **spelled: Callable[[Any], str]) -> bytes:
    """A small pack, changed and written again in the canonical form, so that only the change is wrong."""
    return changed(encode_pack(small(), codec="fp32"), change, **spelled)


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
    tensors["grouped.blocks"] = np.zeros(1 << 20, np.float32)  # else so many are more than a file so small may ask for
    manifest["decoded"] |= {"updates": MAX_UPDATES + 4096, "layout": len(canonical_json(layout_part(manifest)))}


def heap(manifest: dict[str, Any], tensors: dict[str, NpArray]) -> None:
    manifest["updates"][1]["on"] *= 33
    manifest["decoded"] |= {"updates": 40, "layout": len(canonical_json(layout_part(manifest)))}


def twice(manifest: dict[str, Any], tensors: dict[str, NpArray]) -> None:
    manifest["updates"][1]["on"].append({"target": "b", "s": [0, 0, 2, 2]})
    manifest["decoded"] |= {"updates": 5, "tensors": 10, "layout": len(canonical_json(layout_part(manifest)))}


def layout_part(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("branches", "updates")}


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
    return changed(encode_pack(delta, codec="fp32"), lambda m, t: change(m["updates"][0], t))


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
    return changed(encode_pack(seeded(), codec="fp32"), lambda m, t: change(m["updates"], t))


def branched(change: Callable[[dict[str, Any], dict[str, NpArray]], object] = lambda group, tensors: None) -> bytes:
    """A pack of two bottlenecks, its group changed."""
    shapes = {"down.weight": (2, 4), "down.bias": (2,), "up.weight": (4, 2), "up.bias": (4,)}
    branches = [
        Branch(kind="bottleneck", tap=f"blocks.{i}.mlp:out", into=f"blocks.{i}.mlp:out", settings={"activation": "relu"},
               tensors={name: floats(*shape, start=i) for name, shape in shapes.items()})
        for i in range(2)
    ]  # fmt: skip
    data = encode_pack(make_delta(branches=tuple(branches)), codec="fp32")
    return changed(data, lambda m, t: change(m["branches"][0], t))


def calibrated(change: Change = lambda manifest, tensors: None) -> bytes:
    """A pack with two ranges for an int8 backbone, changed."""
    ranges = (Range(scale=0.5), Range(scale=float(np.float32(1.25e-05)), shift=-3.0))
    return changed(encode_pack(make_delta(int8=Int8Ranges(codes="0f" * 32, ranges=ranges)), codec="fp32"), change)


def test_ranges_for_an_int8_backbone_come_out_as_they_went_in() -> None:
    data = calibrated()

    read = read_pack(data)

    small = float(np.float32(1.25e-05))
    assert manifest_of(data)["int8"] == {"codes": "0f" * 32}
    assert tensors_of(data)["int8.ranges"].tolist() == [0.5, 0.0, small, -3.0]
    assert read.delta.int8 == Int8Ranges(codes="0f" * 32, ranges=(Range(scale=0.5), Range(scale=small, shift=-3.0)))
    assert encode_pack(read.delta, codec="fp32") == data
    plain = encode_pack(replace(read.delta, int8=None), codec="fp32")
    assert "int8" not in manifest_of(plain)
    assert read_pack(plain).delta.int8 is None


def test_corrections_of_biases_are_a_plane_of_codes() -> None:
    numbers = as_stored("int8.corrections", np.linspace(-3, 2, 700, dtype=np.float32), "int8", "flowers").tolist()
    ranges = Int8Ranges(codes="0f" * 32, ranges=(Range(scale=0.5),), corrections=tuple(numbers))
    data = encode_pack(make_delta(int8=ranges), codec="fp32")

    assert manifest_of(data)["codecs"]["int8.corrections"][0] == "int8"
    assert read_pack(data).delta.int8 == ranges
    assert encode_pack(read_pack(data).delta, codec="fp32") == data
    assert "int8.corrections" not in tensors_of(calibrated())


def test_ranges_that_a_device_would_refuse_are_not_written(tmp_path: Path) -> None:
    delta = make_delta(int8=Int8Ranges(codes="0f" * 32, ranges=(Range(scale=0.0),)))

    with pytest.raises(PackError) as refused:
        write_pack(tmp_path / "x.pet", delta)

    assert str(refused.value) == "pack.int8.ranges[0]: needs a scale above 0, got 0"
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_where_branches_read_and_where_they_are_added() -> None:
    (group,) = layout_of(branched())["branches"]

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
    (group,) = layout_of(expressed())["updates"]

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

    assert layout_of(data)["updates"] == [
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
    assert {name: size // 4 for name, size in read.bytes_by_kind.items() if not name.startswith(("head", "layout"))} == {
        "low-rank.left.values": 5, "low-rank.left.c": 8, "low-rank.right.c": 6, "precompose.left": 8,
        "precompose.right.c": 4, "push.c": 8,
    }  # fmt: skip
    assert read.delta.stored_values == seeded().stored_values == 39
    assert encode_pack(read.delta, codec="fp32") == data


CODED = b"\0\x3c\1\2\3\4"  # a scale of 1, and four codes
ENTRY = (
    "pack.codecs.scale.s: needs a format of fp32, fp16, int8, int4, int2, int32, bits, how many values there are,"
    " and of codes how many share a scale"
)
SCALES = "needs scales that are finite and not below 0"


def coded(entry: object, stream: bytes = CODED, packed: bytes | None = None) -> bytes:
    """A pack whose plane ``scale.s`` is packed like this."""

    def change(manifest: dict[str, Any], tensors: dict[str, NpArray]) -> None:
        manifest["codecs"]["scale.s"] = entry
        tensors["scale.s"] = deflate(stream) if packed is None else np.frombuffer(packed, np.uint8)
        manifest["decoded"]["bytes"] = 1 << 10 if not isinstance(entry, list) or entry[1] == 1 << 31 else 172
        manifest["decoded"]["layout"] = LAID

    return rewritten(change)


LAID = manifest_of(rewritten())["decoded"]["layout"]
BEGUN = b'{"__metadata__":{"edgepet":"{\\"auth\\":\\"' + b"0" * 128


def signed_as(digits: str) -> bytes:
    return rewritten(spell=lambda m: canonical_json({**m, "auth": digits}).decode())


def spelled(end: str) -> bytes:
    """A pack whose manifest ends like this behind its signature."""
    return rewritten(spell=lambda m: '{"auth":"' + "0" * 128 + '"' + end)


NEWER = "\n  fix: update edgepet if a newer version wrote this file"


def ranges_to(*numbers: float) -> bytes:
    return calibrated(lambda m, t: t.update({"int8.ranges": np.array(numbers, np.float32)}))


MALFORMED: dict[str, tuple[bytes, str]] = {
    # what an int8 backbone needs
    "ranges for no codes": (calibrated(lambda m, t: m["int8"].pop("codes")), "pack.int8: needs the key 'codes'"),
    "codes without ranges": (calibrated(lambda m, t: t.pop("int8.ranges")), "pack: needs the plane 'int8.ranges'"),
    "ranges without codes": (calibrated(lambda m, t: m.pop("int8")), "pack: knows no plane 'int8.ranges'"),
    "codes that are no digest": (
        calibrated(lambda m, t: m["int8"].update(codes="0f" * 31)), f"pack.int8.codes: needs a sha256 of 64 digits, got {'0f' * 31!r}"),
    "codes in capitals": (
        calibrated(lambda m, t: m["int8"].update(codes="0F" * 32)), f"pack.int8.codes: needs a sha256 of 64 digits, got {'0F' * 32!r}"),
    "codes that are a path": (
        calibrated(lambda m, t: m["int8"].update(codes="../../etc")), "pack.int8.codes: needs a sha256 of 64 digits, got '../../etc'"),
    "a trunk that is no digest": (
        calibrated(lambda m, t: m["int8"].update(trunk="0f" * 31)), f"pack.int8.trunk: needs a sha256 of 64 digits, got {'0f' * 31!r}"),
    "a trunk of nothing": (calibrated(lambda m, t: m["int8"].update(trunk=None)), "pack.int8.trunk: needs a text, got None"),
    "codes that are a number": (calibrated(lambda m, t: m["int8"].update(codes=64)), "pack.int8.codes: needs a text, got 64"),
    "an int8 section that is a list": (
        key_to([], "int8"), "pack.int8: needs an object, got []"),
    "an int8 section of nothing": (key_to(None, "int8"), "pack.int8: needs an object, got None"),
    "an int8 section with an unknown key": (
        calibrated(lambda m, t: m["int8"].update(bits=4)), f"pack.int8: knows no key 'bits'{NEWER}"),
    "a range without its shift": (ranges_to(0.5), "pack.int8.ranges: needs pairs of a scale and a shift, got 1 numbers"),
    "ranges in half precision": (
        calibrated(lambda m, t: t.update({"int8.ranges": np.ones(2, np.float16)})), "pack: int8.ranges: must be fp32, got fp16"),
    "corrections of no codes": (
        calibrated(lambda m, t: (m.pop("int8"), t.pop("int8.ranges"), t.update({"int8.corrections": np.ones(2, np.float16)}))),
        "pack: knows no plane 'int8.corrections'"),
    "a scale of zero": (ranges_to(0.5, 0.0, 0.0, 1.0), "pack.int8.ranges[1]: needs a scale above 0, got 0"),
    "a scale below zero": (ranges_to(-0.5, 0.0), "pack.int8.ranges[0]: needs a scale above 0, got -0.5"),
    "a scale that float32 has no normal number for": (
        ranges_to(1e-40, 0.0), "pack.int8.ranges[0]: needs a scale above 0, got 9.99995e-41"),
    "a scale that is no number": (ranges_to(np.nan, 0.0), "pack.int8.ranges[0]: needs a scale above 0, got nan"),
    "a shift without end": (ranges_to(0.5, np.inf), "pack: int8.ranges: holds a value that is not finite"),

    # the container
    "an empty file": (b"", f"{CUT}, got 0 bytes{WHOLE}"),
    "a header longer than the file": (b"\xff" * 64, f"{CUT}, got 64 bytes{WHOLE}"),
    "a header that is no JSON": (container(b"{]", b""), f"{CUT}, got 10 bytes{WHOLE}"),
    "a header that is no object": (container(b"[]", b""), f"{CUT}, got 10 bytes{WHOLE}"),
    "a header without a manifest": (container(b"{}", b""), f"{CUT}, got 10 bytes{WHOLE}"),
    "a header with another program's metadata": (
        safetensors.numpy.save({}, metadata={"format": "pt"}), f"{CUT}, got 40 bytes{WHOLE}"),
    "a header that ends behind its signature": (
        container(BEGUN + b'\\"', b""), f"pack: has no readable header, got Unterminated string starting at: line 1 column 28 (char 27){WHOLE}"),
    "a header with two metadata": (
        with_header(lambda text: text[:-1].rstrip(b" }") + b'},"__metadata__":{}}'),
        f"pack: has no readable header, got a key appears twice{WHOLE}"),
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
        container(BEGUN + b'\\"}"},"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}', b"\0\0"),
        "pack: holds a number format that no pack has, got 'BF16'"),
    "a header nested without end": (container(b"[" * 100_000, b""), None),
    "a header nested without end behind its signature": (container(BEGUN + b'\\"}"},"x":' + b"[" * 100_000, b""), None),
    # the signature
    "a signature in capitals": (signed_as("A" * 128), f"pack.auth: needs a signature of 128 digits from 0 to f, got {'A' * 80!r}"),
    "a signature that is too short": (signed_as("0" * 127), f"pack.auth: needs a signature of 128 digits from 0 to f, got {'0' * 80!r}"),
    "a signature of more digits": (signed_as("0" * 192), f"pack.auth: needs a signature of 128 digits from 0 to f, got {'0' * 80!r}"),
    "a signature of other letters": (signed_as("g" * 128), f"pack.auth: needs a signature of 128 digits from 0 to f, got {'g' * 80!r}"),
    "a signature that is not first": (
        rewritten(spell=lambda m: canonical_json({**m, "a": 1}).decode()), f"{CUT}, got {len(rewritten()) + 8} bytes{WHOLE}"),
    # the manifest as JSON
    "a manifest that is no JSON": (
        spelled(","), "pack: has no readable manifest, got Expecting property name enclosed in double quotes: line 1 column 140 (char 139)"),
    "a manifest with a key twice": (spelled(',"b":1,"b":1}'), "pack: has no readable manifest, got a key appears twice"),
    "a manifest with NaN": (spelled(',"b":NaN}'), "pack: has no readable manifest, got NaN is not a JSON number"),
    "a manifest with a number beyond floats": (spelled(',"b":1e999}'), "pack: has no readable manifest, got 1e999 is not a JSON number"),
    "a manifest with a number of thousands of digits": (
        spelled(f',"b":{"9" * 5000}}}'), "pack: has no readable manifest, got an integer has 5000 digits"),
    "a manifest with spaces": (spelled(', "b":1}'), "pack: has a manifest that is not canonical JSON\n  fix: write it again with edgepet"),
    "a manifest with half a character": (spelled(r',"b":"\ud800"}'), None),
    "a manifest nested without end": (spelled(',"b":' + "[" * 100_000), None),
    # the layout
    "a layout that is no JSON": (rewritten(lay=lambda v: "{"), None),
    "a layout with spaces": (
        rewritten(lay=json.dumps), "pack: has a layout that is not canonical JSON\n  fix: write it again with edgepet"),
    "a layout with a key twice": (rewritten(lay=lambda v: '{"a":1,"a":1}'), "pack: has no readable layout, got a key appears twice"),
    "a layout that is an array": (rewritten(lay=lambda v: "[]"), "pack: needs an object, got []"),
    "a layout with an unknown key": (
        rewritten(lay=lambda v: canonical_json({**v, "a": 1}).decode()), f"pack: knows no key 'a'{NEWER}"),
    "a layout that is longer than is said": (
        rewritten(lambda m, t: m["decoded"].update(layout=m["decoded"]["layout"] - 1)), f"pack: layout: must hold {LAID - 1} bytes, got more than {LAID - 1}"),
    "a layout that is shorter than is said": (
        rewritten(lambda m, t: m["decoded"].update(layout=m["decoded"]["layout"] + 1)), f"pack: layout: must hold {LAID + 1} bytes, got {LAID}"),
    # what the pack says that it becomes
    "less memory than its planes take": (
        key_to(3, "decoded", "bytes"), "pack.decoded.bytes: must be the 172 that its planes are, or more, got 3"),
    "more memory than it takes": (key_to(999, "decoded", "bytes"), "pack.decoded.bytes: must be the 172 that there are, got 999"),
    "more updates than it says": (key_to(3, "decoded", "updates"), "pack.updates[2].on[0]: is beyond the 3 updates that the pack says it has"),
    "fewer updates than it says": (key_to(5, "decoded", "updates"), "pack.decoded.updates: must be the 4 that there are, got 5"),
    "more tensors than it says": (key_to(8, "decoded", "tensors"), "pack: holds more than the 8 tensors that it says it has"),
    "fewer tensors than it says": (key_to(10, "decoded", "tensors"), "pack.decoded.tensors: must be the 9 that there are, got 10"),
    "a bool for its tensors": (key_to(True, "decoded", "tensors"), "pack.decoded.tensors: needs an integer of at least 0, got True"),
    # the manifest's keys
    "another format": (key_to("zip", "format"), "pack.format: needs one of edgepet-pack, got 'zip'"),
    "version 2": (key_to(2, "version"), "pack.version: this edgepet reads version 1, got 2\n  fix: update edgepet"),
    "a bool for the version": (key_to(True, "version"), "pack.version: needs an integer of at least 0, got True"),
    "a codec for no plane": (key_to(["int8", 4, 4], "codecs", "add.d"), f"pack.codecs: knows no key 'add.d'{NEWER}"),
    "a codec that version 1 has not": (coded(["int3", 4, 4]), f"{ENTRY}, got ['int3', 4, 4]"),
    "a codec without its group": (coded(["int8", 4]), f"{ENTRY}, got ['int8', 4]"),
    "a group where there are no codes": (coded(["fp16", 4, 4]), f"{ENTRY}, got ['fp16', 4, 4]"),
    "a group of nothing": (coded(["int8", 4, 0]), f"{ENTRY}, got ['int8', 4, 0]"),
    "a bool for the values": (coded(["int8", True, 4]), f"{ENTRY}, got ['int8', True, 4]"),
    "more values than 32 bits count": (coded(["int8", 1 << 31, 4]), f"{ENTRY}, got ['int8', 2147483648, 4]"),
    "a codec that is a text": (coded("int8"), "pack.codecs.scale.s: needs an array, got 'int8'"),
    "a codec of numbers that are not packed": (
        key_to(["fp32", 4], "codecs", "scale.s"), "pack: scale.s: needs bytes, for the manifest says how it is packed, got float32"),
    "packed numbers that are longer than is said": (coded(["int8", 3, 4]), "pack: scale.s: must hold 5 bytes, got more than 5"),
    "packed numbers that are shorter than is said": (coded(["int8", 5, 8]), "pack: scale.s: must hold 7 bytes, got 6"),
    "packed numbers that are no stream": (coded(["int8", 4, 4], packed=b"\xff\xff"), None),
    "bytes behind the stream": (
        coded(["int8", 4, 4], packed=deflate(CODED).tobytes() + b"\0"), "pack: scale.s: must hold 6 bytes, got 6, and 1 behind them"),
    "a code that stands for nothing": (coded(["int8", 4, 4], b"\0\x3c\x80\0\0\0"), "pack: scale.s: needs codes of -127 to 127"),
    "a code of four bits that stands for nothing": (coded(["int4", 4, 4], b"\0\x3c\x08\0"), "pack: scale.s: needs codes of -7 to 7"),
    "codes behind the last": (coded(["int4", 3, 4], b"\0\x3c\0\x10"), "pack: scale.s: needs zeros behind the last of its codes"),
    "a scale below zero of codes": (coded(["int8", 4, 4], b"\0\xbc\0\0\0\0"), f"pack: scale.s: {SCALES}"),
    "a scale of codes that is minus zero": (coded(["int8", 4, 4], b"\0\x80\0\0\0\0"), f"pack: scale.s: {SCALES}"),
    "a scale of codes without end": (coded(["int8", 4, 4], b"\0\x7c\0\0\0\0"), f"pack: scale.s: {SCALES}"),
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
    "a scale of hundreds of digits": (rewritten(scale_huge), "pack: has no readable layout, got an integer has 401 digits"),
    "a task that is a path": (
        key_to("../../etc/x", "task"),
        "pack: task: needs a name of letters, digits, '.', '_' and '-', at most 64, got '../../etc/x'"),
    "no fingerprint": (without("backbone", "fingerprint"), "pack.backbone: needs the key 'fingerprint'"),
    "a label too few": (key_to(["a", "b"], "heads", 0, "labels"), "pack: flowers: a head (3, 4) needs 3 biases and labels, got 3 and 2"),
    "a label twice": (key_to(["a", "b", "a"], "heads", 0, "labels"), "pack: flowers: needs labels that differ, got a, b, a"),
    "a number for a label": (key_to(["a", "b", 3], "heads", 0, "labels"), "pack.heads[0].labels[2]: needs a text, got 3"),
    "an image without a width": (key_to([32], "preprocess", "image_size"), "pack.preprocess.image_size: needs a height and a width, got [32]"),
    "an image of no height": (key_to([0, 32], "preprocess", "image_size"), "pack.preprocess.image_size[0]: needs an integer of at least 1, got 0"),
    "a std of zero": (key_to([1, 1, 0], "preprocess", "std"), "pack.preprocess: needs a crop_fraction in [0.016, 1] and a std above 0"),
    "a crop of nothing": (key_to(5e-324, "preprocess", "crop_fraction"), "pack.preprocess: needs a crop_fraction in [0.016, 1] and a std above 0"),
    "a mean that no pixel is near": (key_to([0, 0, 1e308], "preprocess", "mean"), "pack.preprocess: needs a mean and a std of at most 1e+06"),
    "a method of a page": (key_to("m" * 65, "method", "name"), "pack.method.name: needs at most 64 characters, got 65"),
    "a crop larger than the image": (key_to(1.5, "preprocess", "crop_fraction"), "pack.preprocess: needs a crop_fraction in [0.016, 1] and a std above 0"),
    "an orientation that is none": (key_to("left", "preprocess", "orientation"), "pack.preprocess.orientation: needs one of exif, none, got 'left'"),
    "an orientation of null": (key_to(None, "preprocess", "orientation"), "pack.preprocess.orientation: needs a text, got None"),
    "settings that are no object": (key_to([], "method", "settings"), "pack.method.settings: needs an object, got []"),
    "a float for the images scored": (key_to(8.0, "heads", 0, "val", "n"), "pack.heads[0].val.n: needs an integer of at least 0, got 8.0"),
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
    "more updates than any method has": (rewritten(bomb), "pack.decoded.updates: needs at most 65536, got 69632"),
    "a pattern of more than it says": (
        row(1, target="b.{0..4095}.w"), "pack.updates[1].on[0]: is beyond the 4 updates that the pack says it has"),
    "more updates of one tensor than folding bears": (
        rewritten(heap), "pack.updates[1].on[32]: is beyond the 32 updates of one tensor, got norm.weight"),
    "a target that is longer than any name": (
        row(1, target="a" * 257), f"{SECOND}.target: needs at most 256 characters, got 257"),
    "a block's number of hundreds of digits": (
        row(1, target=f"b[0:{'9' * 200}]"), f"pack: {SECOND}: a target is NAME, NAME[a:b] or NAME[a:b, c:d], got 'b[0:{'9' * 200}]'"),
    "a pattern's number of hundreds of digits": (
        row(1, target=f"b.{{0..{'9' * 200}}}"), f"pack: {SECOND}: a target is NAME, NAME[a:b] or NAME[a:b, c:d], got 'b.{{0..{'9' * 200}}}'"),
    # where factors lie
    "a factor that is missing": (without("updates", 0, "on", 0, "right"), f"{FIRST}: needs the key 'right'"),
    "a place without a step": (row(1, s=[0]), f"{SECOND}.s: needs [start, step, at most 8 axes], got [0]"),
    "a bool in a place": (row(1, s=[False, 0, 4]), f"{SECOND}.s[0]: needs an integer of at least 0, got False"),
    "a negative step": (row(0, left=[2, -2, 2, 1]), f"{FIRST}.left[1]: needs an integer of at least 0, got -2"),
    "a factor of no values": (row(1, s=[0, 0, 0]), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, 0]"),
    "a factor that ends outside its plane": (row(1, s=[0, 0, 5]), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, 5]"),
    "a repeat that ends outside its plane": (
        row(0, left=[0, 3, 2, 1]), f"{FIRST}.left: reaches outside low-rank.left of 4 values, got [0, 3, 2, 1]"),
    "axes beyond 64 bits": (row(1, s=[0, 0, 2**66]), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, {2**66}]"),
    "axes whose product wraps around to four": (
        row(1, s=[0, 0, 2**62 + 1, 4]), f"{SECOND}.s: reaches outside scale.s of 4 values, got [0, 0, {2**62 + 1}, 4]"),
    "a gap in a plane": (row(1, s=[1, 0, 3]), "pack: scale.s: needs rows that fill it without gap or overlap, got 1 after 0"),
    "an overlap in a plane": (
        row(0, left=[0, 1, 2, 1]), "pack: low-rank.left: needs rows that fill it without gap or overlap, got 1 after 2"),
    "one place with two shapes": (
        rewritten(twice),
        "pack: scale.s: needs rows that fill it without gap or overlap, got too many"),
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
        generating(lambda g, t: g[0]["on"][0].update({"left.index": [0]})), f"{FIRST}.left.index: needs [start, step, at most 8 axes], got [0]"),
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
    "a tensor that no row names": (tensor_to("add.d", floats(1)), "pack: knows no plane 'add.d'"),
    "a tensor whose name is a path": (tensor_to("../../etc/x", floats(1)), "pack: knows no plane '../../etc/x'"),
    "a plane that is missing": (tensor_to("scale.s", None), "pack: needs the plane 'scale.s'"),
    "a head that is missing": (tensor_to("head.point.bias", None), "pack: needs the plane 'head.point.bias'"),
    "a plane of two axes": (tensor_to("scale.s", floats(2, 2)), "pack: scale.s: needs one axis, got 2"),
    "a head of one axis": (
        key_to([0, 0, 12], "heads", 0, "layers", 0, "weight"), "pack.heads[0].layers[0].weight: needs 2 axes, got 1"),
    "a head of two layers": (
        rewritten(lambda m, t: m["heads"][0].update(layers=m["heads"][0]["layers"] * 2)), "pack.heads[0].layers: needs one layer, got 2"),
    "no head": (key_to([], "heads"), "pack.heads: needs one head, got 0"),
    "a head that is called otherwise": (key_to("mask", "heads", 0, "name"), "pack.heads[0].name: needs one of class, got 'mask'"),
    "a layer that heads have not yet": (
        key_to("conv", "heads", 0, "layers", 0, "kind"), "pack.heads[0].layers[0].kind: needs one of point, got 'conv'"),
    "a metric of another head": (
        key_to("miou", "heads", 0, "val", "metric"), "pack.heads[0].val.metric: needs one of top1, got 'miou'"),
    "a label of a page": (
        key_to(["a", "b", "c" * 257], "heads", 0, "labels"), f"pack.heads[0].labels[2]: needs at most 256 bytes, got {'c' * 40!r}…"),
    "settings of a book": (key_to({"a": "b" * (1 << 14)}, "training"), "pack.training: needs at most 16384 bytes, got 16392"),
    "settings without a bottom": (
        key_to(json.loads('{"a":' * 20 + "1" + "}" * 20), "method", "settings"), "pack.method.settings: needs at most 8 levels"),
    "a licence for every day": (key_to(["x"] * 65, "licences"), "pack.licences: needs at most 64 texts, got 65"),
    "a sequence number that JSON readers round": (key_to(2**53, "sequence"), f"pack.sequence: needs an integer of at most {2**53 - 1}, got {2**53}"),
    "a sequence number below zero": (key_to(-1, "sequence"), "pack.sequence: needs an integer of at least 0, got -1"),
    "no orientation": (without("preprocess", "orientation"), "pack.preprocess: needs the key 'orientation'"),
    "a plane in double precision": (tensor_to("scale.s", floats(4).astype(np.float64)), "pack: scale.s: holds a number format that no pack has, got float64"),
    "an order of 64 bits": (tensor_to("grouped.order", np.arange(4)), "pack: grouped.order: holds a number format that no pack has, got int64"),
    "an order of floats": (tensor_to("grouped.order", floats(4)), "pack: grouped.order: needs int32, got float32"),
    "NaN in a plane": (planted("low-rank.right", np.nan), "pack: low-rank.right: holds a value that is not finite"),
    "infinity in a plane": (planted("scale.s", -np.inf), "pack: scale.s: holds a value that is not finite"),
    "NaN in the head": (planted("head.point.weight", np.nan), "pack: head.point.weight: holds a value that is not finite"),
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
    again = encode_pack(read.delta, kept=read.planes, sequence=read.sequence)
    assert with_signature(again, read.signature or UNSIGNED) == bytes(pack)  # one meaning, one spelling


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
        == "f680dbda41d2d9a0b72e7394a78ea834abc850556d42ec5b8fa6f0fbd444d9fb"
    )


@pytest.mark.parametrize(("orientation", "said"), [("exif", "exif"), ("none", "none"), (None, "none")])
def test_a_pack_says_how_images_lie(orientation: Any, said: str) -> None:
    data = encode_pack(make_delta(preprocess=Preprocess(image_size=(32, 32), orientation=orientation)))

    read = read_pack(data).delta

    assert (manifest_of(data)["preprocess"]["orientation"], read.preprocess.orientation) == (said, said)
    assert encode_pack(read) == data
