"""Codecs: what is stored is what is read, in the bytes that they say, and the scales are those that lose least."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepet.deltas.expressions import Binary
from edgepet.deltas.merge import fold_all
from edgepet.deltas.updates import Add, Grouped, LowRank, Scale, Targeted
from edgepet.errors import InputError, PackError
from edgepet.packs.codecs import CODECS, GROUPS, Codec, Coding, decode, deflated, encode, inflated, write_plane
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.spec import NpArray, Target
from edgepet.tuning.counted import error_weights
from tests.tiny import SETTINGS, make_delta

CODED: list[Codec] = ["int8", "int4", "int2"]


def normal(count: int, seed: int = 0) -> NpArray:
    return (np.random.default_rng(seed).standard_normal(count) / 32).astype(np.float32)


def there_and_back(values: NpArray, coding: Coding, plane: str = "add.d", weights: NpArray | None = None) -> NpArray:
    stream = encode(plane, values, coding, "task", weights)
    assert len(stream) == coding.stored_bytes(values.size)
    return decode(plane, stream, coding, values.size, "here")


@pytest.mark.parametrize("plane", ["add.d", "scale.s"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 513, 4096])
def test_numbers_come_back_as_near_as_the_codec_holds_them(codec: Codec, plane: str, count: int) -> None:
    values = normal(count) + np.float32(plane == "scale.s")

    read = there_and_back(values, Coding.of(codec), plane)

    largest = float(np.abs(values - (plane == "scale.s")).max())
    step = {"fp32": 2.0**-22, "fp16": 2.0**-10, "int8": 1 / 127, "int4": 1 / 7, "int2": 1.0}[codec]
    assert float(np.abs(read - values).max()) <= largest * (step if codec in ("fp32", "fp16") else 1 + step)
    error = float(((read - values) ** 2).sum() / ((values - (plane == "scale.s")) ** 2).sum())
    assert error <= {"fp32": 1e-12, "fp16": 1e-6, "int8": 2e-4, "int4": 2.5e-2, "int2": 0.2}[codec]


@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
def test_a_small_layer_of_a_head_has_scales_of_its_own(codec: Codec) -> None:
    """What says where boxes are is 320 numbers among a hundred thousand of other layers."""
    small = np.float32(0.01) * normal(320, 2)
    values = np.concatenate([normal(640), small, normal(576, 3)])
    plane = write_plane("head.point.weight", values, codec, "t")

    read = decode("head.point.weight", inflated(plane.tensor.tobytes(), plane.stored.coding.stored_bytes(1536), "t"),
                  plane.stored.coding, 1536, "t")[640:960]  # fmt: skip

    assert plane.stored.coding.group == 64
    error = float(np.square(read - small).sum() / np.square(small).sum())
    assert error <= {"int8": 2e-4, "int4": 2.5e-2, "int2": 0.2}[codec]


@pytest.mark.parametrize(("codec", "levels"), [("int8", 127), ("int4", 7)])
def test_multiples_of_one_step_come_back_exactly(codec: Codec, levels: int) -> None:
    values = np.tile(np.arange(-levels, levels + 1), 8).astype(np.float32) * np.float32(0.125)

    assert there_and_back(values, Coding.of(codec)).tolist() == values.tolist()


def test_the_four_codes_of_two_bits_lie_evenly_around_zero() -> None:
    values = np.tile(np.array([-3, -1, 1, 3], np.float32), 16) * np.float32(0.25)

    assert there_and_back(values, Coding("int2", 64)).tolist() == values.tolist()


def test_bits_lie_where_the_format_says() -> None:
    """A scale of 1 as binary16, then codes, the lowest bits of a byte first."""
    assert encode("add.d", np.array([7.0, -7.0, 1.0]), Coding("int4", 4), "t").hex() == "003c" + "97" + "01"
    assert encode("add.d", np.array([127.0, -127.0]), Coding("int8", 2), "t").hex() == "003c" + "7f81"
    assert encode("add.d", np.array([-3.0, -1.0, 1.0, 3.0]), Coding("int2", 4), "t").hex() == "003c" + "4e"
    assert encode("scale.s", np.array([1.5], np.float32), Coding("fp16"), "t").hex() == "0038"
    assert encode("scale.s", np.array([1.5], np.float32), Coding("fp32"), "t").hex() == "0000c03f"


def test_the_weights_decide_what_a_scale_is_good_for() -> None:
    """One large value counts for nothing: the others get a fine step, and it is clipped."""
    values, weights = normal(64), np.ones(64)
    values[5], weights[5] = 4.0, 0.0

    even, weighted = (there_and_back(values, Coding("int4", 64), weights=given) for given in (None, weights))

    others = np.arange(64) != 5
    assert np.abs(weighted - values)[others].max() < np.abs(even - values)[others].max() / 4
    assert weighted[5] < 1


def test_zeros_stay_zeros_and_the_smallest_scale_is_not_zero() -> None:
    assert not there_and_back(np.zeros(300, np.float32), Coding("int4", 128)).any()
    assert not there_and_back(np.zeros(300, np.float32), Coding("int2", 64)).any()
    assert there_and_back(np.full(64, 2.0**-22, np.float32), Coding("int8", 64)).min() > 0


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_what_no_scale_reaches_is_not_coded(codec: Codec, value: float) -> None:
    values = normal(128)
    values[3] = value

    with pytest.raises(InputError) as refused:
        encode("add.d", values, Coding.of(codec), "flowers")

    assert str(refused.value) == (
        f"flowers: add.d: holds a value that {codec} cannot, got largest magnitude {np.abs(values).max():.3g}\n"
        "  fix: store it with `codec=fp32`, or train with a smaller learning rate if it is not finite"
    )


@given(data=st.binary(max_size=300), size=st.integers(0, 400))
@SETTINGS
def test_a_stream_is_as_long_as_is_said_or_refused(data: bytes, size: int) -> None:
    assert inflated(deflated(data), len(data), "here") == data
    for stream, said in ((deflated(data), size), (data, size)):
        with contextlib.suppress(PackError):
            assert len(inflated(stream, said, "here")) == said


def test_a_plane_is_packed_where_that_makes_the_file_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 512, np.uint8)
    cases: list[tuple[str, NpArray, Any, str, bool]] = [
        ("add.d", np.zeros(4096, np.float32), "fp16", "fp16", True),
        ("add.d", normal(64), "fp16", "fp16", False),
        ("add.d", normal(63), "int4", "fp16", False),  # too few for codes
        ("add.d", normal(64), "int4", "int4", True),
        ("low-rank.left.levels", normal(160), "int4", "fp16", False),  # two levels, exactly
        ("low-rank.left.bits", noise, "int4", "bits", False),
        ("grouped.order", np.arange(384), "int4", "int32", True),
    ]
    for name, values, asked, kind, packed in cases:
        plane = write_plane(name, values, asked, "task")
        assert (plane.stored.coding.format, plane.stored.packed) == (kind, packed), name


def test_a_pack_in_codes_is_written_again_with_the_same_bytes() -> None:
    delta = make_delta(
        [
            Targeted(Target("w"), LowRank(normal(512).reshape(64, 8), normal(512, 1).reshape(8, 64))),
            Targeted(Target("v"), Grouped(normal(256, 2).reshape(4, 8, 8), np.arange(32))),
            Targeted(Target("u"), LowRank(Binary(normal(640, 3).reshape(64, 10) > 0, normal(2)), normal(640).reshape(10, 64))),  # noqa: E501
            Targeted(Target("b"), Scale(1 + normal(512, 4))),
            Targeted(Target("b"), Add(normal(512, 5))),
        ],
        classes=5, width=64,
    )  # fmt: skip
    for codec in CODED:
        data = encode_pack(delta, codec=codec, sequence=4)
        pack = read_pack(data)

        assert pack.codec == "mixed"  # biases stay fp16
        assert {plane.stored.coding.format for plane in pack.planes.values()} == {codec, "fp16", "int32", "bits"}
        assert encode_pack(pack.delta, kept=pack.planes, sequence=4) == data
        assert pack.rounding == "int8"
        assert GROUPS[codec] == pack.planes["add.d"].stored.coding.group


# ------------------------------------------------------------------------------------------------ what an error does


def test_an_error_counts_as_much_as_it_changes_the_folded_tensors() -> None:
    rng = np.random.default_rng(3)
    base = {"w": rng.standard_normal((6, 5)), "b": rng.standard_normal(6)}
    left, right, s = rng.standard_normal((6, 2)), rng.standard_normal((2, 5)), 1 + rng.standard_normal(6) / 8
    updates = [
        Targeted(Target("w"), LowRank(left, right, scale=0.5)),
        Targeted(Target("w"), Scale(s)),
        Targeted(Target("b"), Scale(s)),
    ]

    found = error_weights(base, updates)

    before = fold_all(base, updates)
    for array in (left, right, s):
        exact = np.empty(array.size)
        for place in range(array.size):
            kept = array.flat[place]
            array.flat[place] += 1e-4
            after = fold_all(base, updates)
            array.flat[place] = kept
            exact[place] = sum(((after[name] - before[name]) ** 2).sum() for name in base) / 1e-8
        assert np.corrcoef(exact, found[id(array)].reshape(-1))[0, 1] > 0.7  # of eight random signs
        assert 0.6 < found[id(array)].sum() / exact.sum() < 1.6


def test_clipping_by_the_folded_error_loses_less_of_the_folded_tensor() -> None:
    """Half of the rows of ``left`` meet nothing in ``right``: their size must not decide the step of the others."""
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((64, 8)), rng.standard_normal((8, 64)) / 8
    left[:, 4:] *= 20
    right[4:] *= 1e-4
    base, updates = {"w": np.zeros((64, 64))}, [Targeted(Target("w"), LowRank(left, right))]
    delta = make_delta(updates, classes=3)
    exact = fold_all(base, updates)["w"]

    def error(**given: Any) -> float:
        codings = {"low-rank.left": Coding("int4", 128), "low-rank.right": Coding("fp32")}
        read = read_pack(encode_pack(delta, codings=codings, **given)).delta
        return float(((fold_all(base, read.updates)["w"] - exact) ** 2).sum())

    assert error(weights=error_weights(base, updates)) < error() / 3
