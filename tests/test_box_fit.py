"""A detector's losses are torchvision's, places are dealt to objects as FCOS has it, and a fit finds objects."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection.fcos import FCOSHead

from edgepet.deltas.heads import Map
from edgepet.images.box_folders import open_boxes
from edgepet.images.boxes import Boxes, check_boxes
from edgepet.images.masks import squashed
from edgepet.images.sets import load_set
from edgepet.networks.box_forms import BoxForm
from edgepet.networks.head_settings import Form
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.box_fit import NOT_COUNTED, NOWHERE, Places, detection_loss, scales_of
from edgepet.tuning.joint import JointAugmenter, Move
from tests.box_folders import coco_folder

STAGES = tuple(
    Map(name=f"map.{n}", point=f"stages.{n}:out", channels=4, stride=8 << n, height=8 >> n, width=8 >> n)
    for n in range(3)
)
SIZE = (64, 64)


def form(classes: int = 3) -> BoxForm:
    return BoxForm(Form(name="fcos", width=4), STAGES, classes)


def drawn_boxes(seed: int, count: int = 6) -> Boxes:
    rng = np.random.default_rng(seed)
    first = rng.uniform(0, 50, (count, 2))
    corners = np.hstack([first, np.minimum(first + rng.uniform(3, 60, (count, 2)), 64)])
    return Boxes(corners, rng.integers(0, 3, count), rng.random(count) < 0.2)


def by_hand(boxes: Boxes) -> list[int]:
    """The number of each place's object, place by place."""
    found, limits = list[int](), [0.0, 8 * 8 * 64 / 448, 8 * 16 * 64 / 448, math.inf]
    for level, side in enumerate((8, 4, 2)):
        stride = 8 << level
        for row, column in np.ndindex(side, side):
            x, y, best, answer = (column + 0.5) * stride, (row + 0.5) * stride, math.inf, NOWHERE
            for number, (x1, y1, x2, y2) in enumerate(boxes.corners.tolist()):
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                if min(sides) <= 0:
                    continue
                if boxes.crowds[number]:
                    answer = NOT_COUNTED if best == math.inf else answer
                    continue
                away = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                fits = limits[level] < max(sides) <= limits[level + 1]
                area = (x2 - x1) * (y2 - y1)
                if fits and away < 1.5 * stride and area < best:
                    best, answer = area, number
            found.append(answer)
    return found


def test_places_have_the_objects_that_fcos_deals_them() -> None:
    places, seen = Places.of(form(), SIZE), set[int]()
    for seed in range(40):
        boxes = drawn_boxes(seed)

        got = places.objects(boxes).tolist()

        assert got == by_hand(boxes)
        seen |= {min(number, 0) for number in got}
    assert seen == {0, NOWHERE, NOT_COUNTED}
    assert places.objects(Boxes.of(())).tolist() == [NOWHERE] * 84


def test_the_limits_of_levels_follow_the_size_of_the_input() -> None:
    highs = [sorted(set(Places.of(form(), (side, side)).high.tolist())) for side in (64, 224, 448, 896)]

    np.testing.assert_allclose([each[:-1] for each in highs], [[64 / 7, 128 / 7], [32, 64], [64, 128], [64, 128]])
    assert {each[-1] for each in highs} == {math.inf}


def test_the_losses_are_torchvisions() -> None:
    made, n = form(), 3
    with torch.no_grad():
        made.scales.copy_(torch.tensor([0.7, 1.0, 1.3]))
    places, boxes = Places.of(made, SIZE), [drawn_boxes(seed) for seed in range(n)]
    boxes = [Boxes(each.corners, each.labels, np.zeros(len(each), bool)) for each in boxes[:2]] + [Boxes.of(())]
    objects = torch.stack([places.objects(each) for each in boxes])
    given = torch.from_numpy(np.random.default_rng(5).standard_normal((n, 8, 84))).float().requires_grad_()

    loss = detection_loss(given, places, scales_of(made), boxes, objects)

    half = places.strides[:, None] / 2
    anchors = torch.cat([places.points - half, places.points + half], dim=1)
    sides = torch.relu(given[:, 3:7].transpose(1, 2) * scales_of(made).detach()[:, None])
    outputs = {
        "cls_logits": given[:, :3].transpose(1, 2), "bbox_regression": sides,
        "bbox_ctrness": given[:, 7:].transpose(1, 2),
    }  # fmt: skip
    targets = [
        {"boxes": torch.from_numpy(each.corners).float(), "labels": torch.from_numpy(each.labels)} for each in boxes
    ]
    expected = FCOSHead(32, 1, 3, 1).compute_loss(targets, outputs, [anchors] * n, list(objects))
    positives = int((objects >= 0).sum())
    assert positives > 5
    torch.testing.assert_close(loss / positives, sum(expected.values(), start=torch.zeros(())), rtol=1e-5, atol=1e-5)
    torch.autograd.backward(loss)
    assert made.scales.grad is not None
    assert bool(made.scales.grad.any())
    assert given.grad is not None
    assert bool(given.grad[2].any())


def test_within_crowds_nothing_is_learnt() -> None:
    places = Places.of(form(), SIZE)
    crowd = Boxes(np.array([[0.0, 0, 64, 64]]), np.array([0]), np.array([True]))
    objects = places.objects(crowd)[None]
    given = torch.zeros(1, 8, 84, requires_grad=True)

    detection_loss(given, places, torch.ones(84), [crowd], objects).backward()

    assert given.grad is not None
    assert not given.grad.any()


# ------------------------------------------------------------------------------------------------- moved together


def test_boxes_move_as_their_images_do() -> None:
    preprocess = squashed(Preprocess(image_size=SIZE))
    augment = JointAugmenter(("flip", "crop"), preprocess, batch_size=16, seed=1)
    moves, seen = augment.moves(torch.arange(16), (1, 0)), 0

    for move in moves:
        pixels = np.zeros((*SIZE, 3), np.uint8)
        pixels[20:44, 8:40] = 255  # one object, white
        boxes = move.boxes(Boxes.of([((8, 20, 40, 44), 2, False)]), SIZE)

        rows, columns = np.nonzero(move.image(pixels)[:, :, 0] > 127)
        if len(boxes) and not boxes.crowds[0]:
            seen += 1
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(boxes.corners[0], expected, atol=1)  # edges are blurred by resizing
    assert seen > 8
    assert len({move.part for move in moves}) == 16
    assert {move.flipped for move in moves} == {True, False}
    assert augment.moves(torch.tensor([3]), (1, 0)) == [moves[3]]
    assert augment.moves(torch.tensor([3]), (2, 0)) != [moves[3]]


def test_what_is_left_of_a_box_is_an_object_or_is_not_counted_or_is_gone() -> None:
    boxes = Boxes.of([((0, 0, 20, 20), 0, False), ((14, 0, 34, 20), 1, False), ((0, 40, 10, 60), 2, False)])

    moved = Move((0, 16, 32, 32), flipped=True).boxes(boxes, SIZE)

    assert moved.labels.tolist() == [0, 1]
    assert moved.crowds.tolist() == [True, False]  # a fifth of the first is seen, nine tenths of the second
    np.testing.assert_allclose(moved.corners, [[56, 0, 64, 40], [28, 0, 64, 40]])


def boxed(folder: Path, split: str, size: tuple[int, int]) -> tuple[NpArray, NpArray, tuple[Boxes, ...]]:
    preprocess = squashed(Preprocess(image_size=size))
    images = check_boxes(open_boxes(folder, split), preprocess)  # type: ignore[arg-type]  # a split
    return *load_set(images.images, preprocess), images.boxes


def test_a_folder_of_boxes_is_read_with_its_images(tmp_path: Path) -> None:
    pixels, _, boxes = boxed(coco_folder(tmp_path), "train", SIZE)

    assert pixels.shape == (4, 64, 64, 3)
    for image, each in zip(pixels, boxes, strict=True):
        for (x1, y1, x2, y2), label in zip(each.corners.astype(int).tolist(), each.labels, strict=True):
            inside = image[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].mean((0, 1))
            assert (inside[0] > inside[2]) == (label == 0)  # red ones are round
