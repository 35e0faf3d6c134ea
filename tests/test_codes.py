"""int8 codes: a scaled weight has the codes of the weight, and what codes stand for is as near as codes allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgepet.deltas.codes import TINY, CodedWeight, Range, coded, norm_smoothing, smoothing, weight_codes
from edgepet.spec import NpArray
from tests.tiny import SETTINGS

FINITE = {"allow_nan": False, "allow_infinity": False}


def weights(**limits: Any) -> st.SearchStrategy[NpArray]:
    """Matrices and kernels in float64, most of them with a row of zeros or of one magnitude now and then."""
    sides = st.integers(1, 5)
    shapes = st.one_of(st.tuples(sides, sides), st.tuples(sides, sides, st.just(3), st.just(2)))
    return arrays(np.float64, shapes, elements=st.floats(-9, 9, width=32, **FINITE, **limits))


def heavy(seed: int, *shape: int) -> NpArray:
    """Float32 weights with the tails that trained ones have."""
    return np.random.default_rng(seed).standard_t(5, shape).astype(np.float32)


# ------------------------------------------------------------------------------------------- scaled weights have codes


@given(weights(), st.data())
@SETTINGS
def test_a_scaled_row_has_its_codes_with_the_scales_sign(weight: NpArray, data: st.DataObject) -> None:
    """In float64 with powers of two nothing is rounded, so that the identity is seen itself."""
    powers = data.draw(arrays(np.int64, len(weight), elements=st.integers(-20, 20)))
    signs = data.draw(arrays(np.int64, len(weight), elements=st.sampled_from([-1, 1])))
    scales = signs * 2.0**powers

    scaled = coded(np.einsum("o...,o->o...", weight, scales))

    plain = coded(weight)
    assert np.array_equal(scaled.codes, np.einsum("o...,o->o...", plain.codes, signs))
    some = np.abs(weight.reshape(len(weight), -1)).max(axis=1) > 1e-6  # a row of zeros has a step of its own
    assert np.array_equal(scaled.scales[some], (np.abs(scales) * plain.scales)[some].astype(np.float32))


def test_the_codes_of_a_large_scaled_matrix_are_equal_in_float64() -> None:
    weight = heavy(1, 256, 768).astype(np.float64)
    scales = np.random.default_rng(2).normal(0, 1, 256)

    scaled = coded(scales[:, None] * weight).codes

    assert 100 < (scales < 0).sum() < 156  # of either sign
    assert np.array_equal(scaled, coded(weight).codes * np.sign(scales)[:, None])


def test_in_float32_a_scaled_weight_moves_by_one_code_at_most_and_hardly_ever() -> None:
    weight = heavy(3, 1536, 384)
    scales = np.random.default_rng(4).normal(0, 1, 1536).astype(np.float32)

    scaled = coded(scales[:, None] * weight).codes.astype(int)

    apart = np.abs(scaled - coded(weight).codes * np.sign(scales)[:, None])
    assert apart.max() <= 1
    # Three float32 roundings of 6e-8, of codes up to 127: the chance to step over a half is some 1e-6.
    assert (apart > 0).mean() <= 1e-5


def test_a_weight_half_way_between_two_codes_has_one_code_however_it_is_scaled() -> None:
    """Published in few bits, weights are often exactly half of their row's largest: 63.5 of its steps."""
    halves = (np.arange(-127, 127, 2) / 254).astype(np.float32)  # 0.5, 1.5, .. 126.5 steps of 1 / 127
    weight = np.repeat(np.r_[halves, np.float32(1)][None], 500, axis=0)
    scales = np.random.default_rng(8).normal(0, 1, (500, 1)).astype(np.float32)

    codes = coded(weight).codes

    assert np.array_equal(codes[0], np.r_[np.trunc(127 * halves), 127])
    assert np.array_equal(coded(weight * scales).codes, codes * np.sign(scales))
    assert np.array_equal(coded(weight.astype(np.float64) * scales).codes, codes * np.sign(scales))


@given(weights())
@SETTINGS
def test_the_largest_weight_of_each_row_has_the_last_code(weight: NpArray) -> None:
    rows = coded(weight).codes.reshape(len(weight), -1).astype(int)

    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1)
    assert np.array_equal(np.abs(rows).max(axis=1)[largest > TINY], np.full((largest > TINY).sum(), 127))
    assert rows.min() >= -127


def test_a_row_of_zeros_has_codes_of_zero_and_a_step_above_it() -> None:
    made = coded(np.array([[0, 0], [1, -2]], np.float32))

    assert made.codes.tolist() == [[0, 0], [63, -127]]  # 63.5 goes towards zero
    assert (made.scales > 0).all()
    assert made.dense[0].tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------ what codes stand for


@given(weights())
@SETTINGS
def test_a_weight_is_half_a_step_from_what_its_codes_stand_for(weight: NpArray) -> None:
    made = coded(weight)

    reach = 0.5 * made.scales.reshape(-1, *[1] * (weight.ndim - 1)) + 1e-5 * np.abs(weight)  # and float32's rounding
    assert (np.abs(made.dense - weight) <= reach).all()
    assert (made.dense.dtype, made.codes.dtype, made.scales.dtype) == (np.float32, np.int8, np.float32)


@pytest.mark.parametrize("shape", [(256, 384), (64, 16, 3, 3)])
def test_what_codes_stand_for_has_the_same_codes(shape: tuple[int, ...]) -> None:
    once = coded(heavy(5, *shape))

    twice = coded(once.dense)

    assert np.array_equal(twice.codes, once.codes)
    np.testing.assert_array_max_ulp(twice.scales, once.scales, maxulp=1)  # 127 s / 127, two roundings of float32


def test_four_bits_stay_within_seven_and_are_nearer_than_steps_of_the_largest_weight() -> None:
    weight = heavy(6, 32, 400)

    made = coded(weight, bits=4)

    steps = np.abs(weight).max(axis=1, keepdims=True) / 7
    of_largest = np.rint(weight / steps) * steps
    errors = [((candidate - weight) ** 2).sum(axis=1) for candidate in (made.dense, of_largest)]
    assert np.abs(made.codes).max() == 7
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()  # never worse, but for float32's rounding
    assert errors[0].sum() < 0.7 * errors[1].sum()  # clipping a tail of Student's t with 5 degrees pays: 0.66 of it
    assert ((coded(weight).dense - weight) ** 2).sum() < errors[0].sum() / 50  # and 8 bits are far nearer


def test_a_weight_beyond_the_last_code_has_the_last_code() -> None:
    weight = heavy(7, 4, 9)

    assert np.array_equal(weight_codes(weight, np.full(4, 1e-9)), 127 * np.sign(weight))


# ----------------------------------------------------------------------------------------------------------- smoothing


def test_smoothing_leaves_the_product_and_the_mean_of_magnitudes() -> None:
    rng = np.random.default_rng(8)
    inputs, weight = rng.normal(0, 1, (20, 48)) * np.exp(rng.normal(0, 2, 48)), rng.normal(0, 1, (8, 48))

    divisors = smoothing(np.abs(inputs).max(axis=0), weight, 0.5)

    assert np.exp(np.log(divisors.astype(np.float64)).mean()) == pytest.approx(1, rel=1e-6)  # float32 divisors
    assert divisors.max() / divisors.min() > 50  # or smoothing that does nothing would pass
    np.testing.assert_allclose((inputs / divisors) @ (weight * divisors).T, inputs @ weight.T, rtol=1e-9, atol=1e-9)


def test_full_strength_brings_all_channels_to_one_magnitude_and_none_all_columns() -> None:
    rng = np.random.default_rng(9)
    largest, weight = np.exp(rng.normal(0, 2, 48)), rng.normal(0, 1, (8, 48))

    channels = largest / smoothing(largest, weight, 1.0)
    columns = np.abs(weight * smoothing(largest, weight, 0.0)).max(axis=0)

    assert channels == pytest.approx(np.full(48, channels[0]), rel=1e-6)  # float32
    assert columns == pytest.approx(np.full(48, columns[0]), rel=1e-6)


def test_channels_that_are_dead_and_columns_of_zeros_have_finite_divisors() -> None:
    divisors = smoothing(np.array([0.0, 1.0, 2.0]), np.array([[1.0, 0.0, 3.0]]), 0.5)

    assert np.isfinite(divisors).all()
    assert (divisors > 0).all()


def test_the_divisors_of_a_norm_come_from_its_own_tensors() -> None:
    gamma, beta = np.array([1, -4, 0.25, 0], np.float32), np.array([0, 1, -8, 2], np.float32)
    tensors = {"n.weight": gamma, "n.bias": beta, "fc.weight": np.ones((3, 4), np.float32)}

    divisors = norm_smoothing(tensors, ("n.weight", "n.bias"), "fc.weight")

    reach = np.array([3.0, 13.0, 8.75, 2.0]) ** 0.65  # |gamma| times three deviations, and |beta|
    assert divisors == pytest.approx(reach / np.exp(np.log(reach).mean()), rel=1e-6)  # float32


def test_divisors_are_taken_off_again_where_a_weight_is_dense() -> None:
    weight = heavy(10, 6, 8)
    divisors = np.geomspace(0.1, 10, 8).astype(np.float32)

    made, plain = coded(weight, divisors), coded(weight)

    assert not np.array_equal(made.codes, plain.codes)
    assert (np.abs(made.dense - weight) <= (0.5 + 1e-3) * made.scales[:, None] / divisors).all()  # half of its own step
    whole = CodedWeight(codes=made.codes, scales=made.scales).dense
    np.testing.assert_allclose(whole, made.dense * divisors, rtol=1e-6)  # float32


# --------------------------------------------------------------------------------------------------------- activations


@given(
    arrays(np.float32, 30, elements=st.floats(-100, 100, width=32, **FINITE)),
    st.floats(1e-3, 2, **FINITE),
    st.floats(-50, 50, **FINITE),
)
@SETTINGS
def test_a_range_rounds_by_half_a_step_inside_and_saturates_outside(
    values: NpArray, scale: float, shift: float
) -> None:
    low, high = shift - 128 * scale, shift + 127 * scale

    rounded = Range(scale=scale, shift=shift).rounded(values.astype(np.float64))

    slack = 1e-6 * (abs(shift) + 128 * scale)  # what is returned is float32
    inside = (values >= low) & (values <= high)
    assert (np.abs(rounded - values)[inside] <= scale / 2 + slack).all()
    assert np.abs(rounded[values > high] - high).max(initial=0) <= slack
    assert np.abs(rounded[values < low] - low).max(initial=0) <= slack


def test_a_shift_lets_all_codes_lie_on_one_side() -> None:
    shifted = Range(scale=1.0, shift=128.0)

    assert shifted.rounded(np.array([0.0, 254.6, 255.0, 300.0, -7.0])).tolist() == [0.0, 255.0, 255.0, 255.0, 0.0]
    assert Range(scale=1.0).rounded(np.array([254.6, -300.0])).tolist() == [127.0, -128.0]
