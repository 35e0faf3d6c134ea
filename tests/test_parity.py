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
        max_abs=0.0,
        limit=4e-4,
        top1_agreement=1.0,
        least_agreement=0.0,
        n=2,
        inputs="work",
        against="tuned",
        near_ties=0,
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


TURNED = np.array([[4.0, 3.9, 0.0], [0.0, 0.0, 4.0]])  # fp16 may move a logit by 0.08, fp32 by 4e-4


@pytest.mark.parametrize(("stored", "ok"), [("fp32", True), ("fp16", False), ("int8", False)])
def test_answers_that_changed_count_where_the_precision_is_low(stored: Precision, ok: bool) -> None:
    nearly = np.array([[4.0, 3.9997, 0.0], [0.0, 0.0, 4.0]]) if stored == "fp32" else TURNED

    parity = judged(nearly[:, [1, 0, 2]], stored, nearly)

    assert (parity.top1_agreement, parity.ok) == (0.5, ok)


@pytest.mark.parametrize(("margin", "near_ties"), [(0.079, 1), (0.081, 0)])
def test_an_answer_too_near_to_call_does_not_count_as_changed(margin: float, near_ties: int) -> None:
    expected = np.tile(LOGITS, (16, 1))  # 32 images, of which 99 % are all
    expected[0] = [4.0, 4.0 - margin, 0.0]
    got = expected.copy()
    got[0, :2] = 4.0 - 0.6 * margin, 4.0 - 0.4 * margin  # within the limit, and turned

    parity = judged(got, "fp16", expected)

    assert parity.max_abs == pytest.approx(0.6 * margin)
    assert (parity.top1_agreement, parity.near_ties, parity.ok) == (31 / 32, near_ties, bool(near_ties))


def test_a_near_tie_does_not_excuse_a_third_answer() -> None:
    expected = np.array([[4.0, 4.0, 3.9]])

    parity = judged(expected - [[0.07, 0.07, -0.04]], "fp16", expected)

    assert (parity.max_abs <= 0.08, parity.near_ties, parity.ok) == (True, 0, False)


def test_a_near_tie_excuses_no_difference_beyond_the_limit() -> None:
    expected = np.array([[4.0, 3.99, 0.0]])

    parity = judged(expected - [[0.09, 0.0, 0.0]], "fp16", expected)

    assert (parity.near_ties, parity.ok) == (1, False)


def test_without_a_limit_on_logits_nothing_is_a_near_tie() -> None:
    parity = judged(TURNED[:, [1, 0, 2]], "int8", TURNED)

    assert (parity.top1_agreement, parity.near_ties, parity.ok) == (0.5, 0, False)


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


def test_a_failed_comparison_says_how_many_answers_were_too_near_to_call() -> None:
    expected = np.array([[4.0, 3.99, 0.0]])

    with pytest.raises(CheckError) as refused:
        require_parity(judged(expected - [[0.09, 0.0, 0.0]], "fp16", expected), "flowers.onnx")

    assert str(refused.value).splitlines()[0] == (
        "flowers.onnx: must answer as the tuned network does, within 8.0e-02 on logits and with 99% equal answers, "
        "got 9.0e-02 and 0.0% on 1 images (work), 1 of them too near to call"
    )
