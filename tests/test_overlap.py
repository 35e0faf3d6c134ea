"""Intersection over union: one matrix over all images, pixels that do not count, classes that are not there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepet.measuring.overlap import confusion, ious_of, mean_iou, overlap
from tests.layers import EXAMPLES


def test_a_matrix_has_a_row_for_what_is_there_and_a_column_for_what_is_answered() -> None:
    truth = np.array([[0, 0, 1], [2, 2, 255]], np.uint8)
    answers = np.array([[0, 1, 1], [2, 0, 0]], np.uint8)

    np.testing.assert_array_equal(confusion(answers, truth, 3), [[1, 1, 0], [0, 1, 0], [1, 0, 1]])


def test_the_union_counts_what_is_there_and_what_is_answered_once() -> None:
    matrix = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])

    np.testing.assert_allclose(ious_of(matrix), [6 / 9, 3 / 6, np.nan])
    assert mean_iou(matrix) == (6 / 9 + 3 / 6) / 2  # the third is neither there nor answered
    assert mean_iou(np.array([[6, 0, 1], [0, 3, 0], [0, 0, 0]])) == (6 / 7 + 1 + 0) / 3  # answered in vain
    assert mean_iou(np.zeros((3, 3), np.int64)) == 0


def test_it_is_no_mean_over_images() -> None:
    full, speck = np.array([[90, 10], [0, 0]]), np.array([[99, 0], [1, 0]])

    judged = overlap([full, speck])

    total = full + speck
    assert judged.miou == mean_iou(total)
    assert judged.miou != (mean_iou(full) + mean_iou(speck)) / 2
    assert judged.pixels == 189 / 200
    assert judged.ious == (189 / 200, 0.0)
    assert judged.n == 2


def test_a_class_that_is_nowhere_has_no_overlap() -> None:
    assert overlap([np.array([[4, 0, 0], [0, 4, 0], [0, 0, 0]])]).ious == (1.0, 1.0, None)
    nothing = overlap([np.zeros((2, 2), np.int64)])
    assert (nothing.miou, nothing.low, nothing.high, nothing.pixels, nothing.ious) == (0.0, 0.0, 0.0, 0.0, (None, None))


def test_the_interval_holds_the_mean_and_narrows_with_images() -> None:
    rng = np.random.default_rng(3)
    many = [np.array([[50 + rng.integers(40), 10], [5, 30 + rng.integers(30)]]) for _ in range(200)]
    few, all_of_them = overlap(many[:10]), overlap(many)

    assert few.low <= few.miou <= few.high
    assert all_of_them.low <= all_of_them.miou <= all_of_them.high
    assert all_of_them.high - all_of_them.low < (few.high - few.low) / 2
    assert overlap(many) == all_of_them


@EXAMPLES
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_counting_is_what_sets_of_pixels_say(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(classes), 255], (2, 6, 7)).astype(np.uint8)
    answers = rng.integers(0, classes, truth.shape).astype(np.uint8)

    ious = ious_of(confusion(answers, truth, classes))

    for each in range(classes):
        there = {tuple(at) for at in np.argwhere(truth == each)}
        answered = {tuple(at) for at in np.argwhere((answers == each) & (truth != 255))}
        union = there | answered
        assert ious[each] == pytest.approx(len(there & answered) / len(union)) if union else np.isnan(ious[each])
