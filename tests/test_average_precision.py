"""AP is pycocotools' own, on any boxes; its interval draws images anew."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepet.errors import MissingError
from edgepet.measuring.average_precision import BoxFit, box_fit
from edgepet.spec import NpArray

pytest.importorskip("faster_coco_eval", reason="the package faster-coco-eval is not installed")
CLASSES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """True boxes of an image."""

    corners: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowds: NDArray[np.bool_]


def image(rng: np.random.Generator) -> tuple[NpArray, Truth]:
    """Up to six objects, some of them crowds, and boxes near them and elsewhere; either may be none."""
    count, others = int(rng.integers(0, 7)), int(rng.integers(0, 6))
    first = rng.uniform(0, 200, (count, 2))
    corners = np.hstack([first, first + rng.uniform(2, 150, (count, 2))])
    labels, crowds = rng.integers(0, CLASSES, count), rng.random(count) < 0.15
    seen = rng.random(count) < 0.8
    near = (corners + rng.normal(0, 3, (count, 4)))[seen]
    wrong = rng.uniform(0, 100, (others, 2))
    boxes = np.vstack([near, np.hstack([wrong, wrong + rng.uniform(1, 90, (others, 2))])])
    said = np.concatenate([np.where(rng.random(count) < 0.9, labels, 0)[seen], rng.integers(0, CLASSES, others)])
    scores = rng.integers(1, 30, len(boxes)) / 30  # equal ones among them
    found = np.column_stack([boxes, scores, said])
    keep = (found[:, 2] > found[:, 0]) & (found[:, 3] > found[:, 1])
    return found[keep], Truth(corners, labels, crowds)


def by_pycocotools(found: list[NpArray], truth: list[Truth]) -> tuple[float, float, float]:
    """AP, AP50 and AR100, as pycocotools says them; -1 where there is no object."""
    coco, cocoeval = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    told: Any = coco.COCO()
    annotations = [
        (number + 1, corners, int(label), int(crowd))
        for number, each in enumerate(truth)
        for corners, label, crowd in zip(each.corners.tolist(), each.labels, each.crowds, strict=True)
    ]
    told.dataset = {
        "images": [{"id": number + 1} for number in range(len(truth))],
        "categories": [{"id": number, "name": str(number)} for number in range(CLASSES)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": label, "iscrowd": crowd, "bbox": [x, y, w - x, h - y],
             "area": (w - x) * (h - y)}
            for number, (image, (x, y, w, h), label, crowd) in enumerate(annotations, start=1)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        told.createIndex()
        given = [
            {"image_id": number + 1, "category_id": int(row[5]), "score": row[4],
             "bbox": [row[0], row[1], row[2] - row[0], row[3] - row[1]]}
            for number, rows in enumerate(found) for row in rows.tolist()
        ]  # fmt: skip
        judged = cocoeval.COCOeval(told, told.loadRes(given), "bbox")
        judged.params.areaRng, judged.params.areaRngLbl, judged.params.maxDets = [[0, 1e10]], ["all"], [100]
        judged.evaluate()
        judged.accumulate()
    precision, recall = judged.eval["precision"], judged.eval["recall"]
    of_each = [precision, precision[0], recall]
    ap, ap50, found_part = (float(values[values > -1].mean()) for values in of_each)  # as its summarize has it
    return ap, ap50, found_part


@pytest.mark.parametrize("sets", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_ap_is_that_of_pycocotools(sets: int) -> None:
    pytest.importorskip("pycocotools", reason="the package pycocotools is not installed")
    rng, seen = np.random.default_rng(0), set[bool]()
    for _ in range(sets):
        drawn = [image(rng) for _ in range(int(rng.integers(1, 5)))]
        found, truth = [each for each, _ in drawn], [each for _, each in drawn]
        if not any(map(len, found)) or not any((~each.crowds).any() for each in truth):
            continue  # pycocotools takes no empty list of results, and says -1 where there is no object
        seen.add(any(each.crowds.any() for each in truth))
        seen.add(any(not len(each.labels) for each in truth))

        got = box_fit(found, truth, CLASSES, interval=False)

        np.testing.assert_allclose((got.ap, got.ap50, got.recall), by_pycocotools(found, truth), atol=1e-12)
    assert seen == {True, False}  # crowds, and images without an object


def test_no_box_and_no_object_are_nothing_and_no_error() -> None:
    rng = np.random.default_rng(1)
    found, truth = image(rng)
    nothing = Truth(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool))

    blind = box_fit([np.zeros((0, 6))], [truth], CLASSES)
    assert (blind.ap, blind.ap50, blind.recall) == (0, 0, 0)
    assert box_fit([found], [nothing], CLASSES) == BoxFit(
        ap=0, ap50=0, n=1, low=0, high=0, recall=0, objects=0, aps=(None, None, None)
    )


def test_classes_are_judged_one_by_one_and_those_without_an_object_left_out() -> None:
    corners = np.array([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    truth = Truth(corners, np.array([0, 2]), np.zeros(2, bool))
    found = np.column_stack([corners[:1], [0.9], [0]])

    judged = box_fit([found], [truth], CLASSES)

    assert judged.aps == (1, None, 0)
    assert (judged.ap, judged.ap50, judged.objects, judged.n) == (0.5, 0.5, 2, 1)


def test_the_interval_holds_the_value_and_comes_again() -> None:
    rng = np.random.default_rng(3)
    drawn = [image(rng) for _ in range(30)]
    found, truth = [each for each, _ in drawn], [each for _, each in drawn]

    judged = box_fit(found, truth, CLASSES)

    assert judged.low < judged.ap < judged.high
    assert judged.high - judged.low > 0.01
    assert box_fit(found, truth, CLASSES) == judged
    assert box_fit(found, truth, CLASSES, seed=1).low != judged.low


def test_who_has_no_evaluator_is_told_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    truth = Truth(np.array([[0.0, 0, 1, 1]]), np.array([0]), np.array([False]))

    with pytest.raises(MissingError) as error:
        box_fit([np.zeros((0, 6))], [truth], 1)

    assert str(error.value) == (
        "average precision: needs the package 'faster_coco_eval', got import of faster_coco_eval halted; "
        "None in sys.modules\n  fix: pip install 'edgepet[boxes]'"
    )
