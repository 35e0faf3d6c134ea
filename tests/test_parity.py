"""How far apart answers may be, and what is said when they are further."""

from __future__ import annotations

import numpy as np
import pytest

from edgepet.errors import CheckError
from edgepet.measuring.parity import SAME_CODES, Parity, compare, require_parity
from edgepet.spec import NpArray, Precision

LOGITS = np.array([[4.0, 0.0, -1.0], [0.0, 2.0, 1.0]])


def judged(got: NpArray, stored: Precision = "fp32", expected: NpArray = LOGITS) -> Parity:
    return compare(expected, got, stored=stored, inputs="work", against="tuned")


def test_equal_answers_are_equal() -> None:
    assert judged(LOGITS) == Parity(
        max_abs=0.0, limit=4e-4, top1_agreement=1.0, least_agreement=0.0, n=2, inputs="work", against="tuned"
    )


@pytest.mark.parametrize(("stored", "limit", "least"), [("fp32", 4e-4, 0.0), ("fp16", 0.08, 0.99), ("int8", None, 0.9)])
def test_a_limit_is_a_fraction_of_the_largest_logit(stored: Precision, limit: float | None, least: float) -> None:
    parity = judged(-LOGITS, stored, -LOGITS)

    assert parity.limit == (None if limit is None else pytest.approx(limit, rel=1e-12))  # one product in float64
    assert parity.least_agreement == least


@pytest.mark.parametrize(
    ("stored", "step", "ok"),
    [
        ("fp32", 3.9e-4, True),
        ("fp32", 4.1e-4, False),
        ("fp16", 0.079, True),
        ("fp16", 0.081, False),
        ("int8", 50, True),
    ],
)
def test_within_the_limit_passes_and_beyond_it_does_not(stored: Precision, step: float, ok: bool) -> None:
    assert judged(LOGITS + step, stored).ok is ok


@pytest.mark.parametrize(("stored", "ok"), [("fp32", True), ("fp16", False), ("int8", False)])
def test_answers_that_changed_count_where_the_precision_is_low(stored: Precision, ok: bool) -> None:
    expected = np.array([[1.0, 1.00001], [100.0, 0.0]])

    parity = judged(expected - [[0.0, 0.001], [0.0, 0.0]], stored, expected)

    assert (parity.top1_agreement, parity.ok) == (0.5, ok)


@pytest.mark.parametrize("stored", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_no_number_is_beyond_every_limit(stored: Precision, value: float) -> None:
    expected = np.tile([[2.0, 1.0]], (200, 1))
    got = expected.copy()
    got[0, 1] = value  # one image of 200: agreement stays above 99 %

    parity = judged(got, stored, expected)

    assert parity.max_abs == np.inf
    assert not parity.ok


@pytest.mark.parametrize("stored", ["fp32", "fp16", "int8"])
def test_a_head_that_answers_zero_equals_itself(stored: Precision) -> None:
    assert judged(np.zeros((2, 3)), stored, np.zeros((2, 3))).ok


def test_the_difference_is_taken_in_float64() -> None:
    large = np.array([[60000.0, 0.0]], np.float16)

    assert judged(np.array([[-60000.0, 0.0]], np.float16), "fp32", large).max_abs == 120000.0


def test_of_the_same_codes_the_nearer_half_of_the_images_must_be_near() -> None:
    expected = np.tile(LOGITS[:1], (5, 1))
    steps = np.array([0.1, 0.39, 3.0, 0.2, 50.0])[:, None]

    near = compare(expected, expected + steps, stored=SAME_CODES, inputs="synthetic", against="merged")
    far = compare(expected, expected + np.maximum(steps, 0.41), stored=SAME_CODES, inputs="synthetic", against="merged")

    assert (near.ok, near.max_abs, near.limit) == (True, pytest.approx(0.39), pytest.approx(0.4))  # the third of five
    assert (far.ok, far.max_abs) == (False, pytest.approx(0.41))


def test_a_comparison_that_passed_says_nothing() -> None:
    require_parity(judged(LOGITS), "flowers.onnx")


def test_a_failed_comparison_is_an_error_with_its_own_exit_code() -> None:
    with pytest.raises(CheckError) as refused:
        require_parity(judged(LOGITS + 0.5), "flowers.onnx")

    assert str(refused.value) == (
        "flowers.onnx: must answer as the tuned network does, within 4.0e-04 on logits, "
        "got 5.0e-01 and 100.0% on 2 images (work)\n"
        "  fix: nothing was kept; report this with the pack if the backbone is an ordinary one"
    )
    assert refused.value.exit_code == 4


def test_a_failed_comparison_of_low_precision_says_how_many_answers_must_stay() -> None:
    with pytest.raises(CheckError) as refused:
        require_parity(judged(-LOGITS, "fp16"), "flowers.onnx")

    assert str(refused.value).splitlines()[0] == (
        "flowers.onnx: must answer as the tuned network does, within 8.0e-02 on logits and with 99% equal answers, "
        "got 8.0e+00 and 0.0% on 2 images (work)"
    )
