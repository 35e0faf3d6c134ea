"""A head of layers: what flows through it, what it refuses to be, and the mask that comes of its logits."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgepet.deltas.heads import FEATURES, Map, MapHead, Step, mask_of
from edgepet.deltas.layers import Activation, Add, Concat, Detect, Layer, Mean, Multiply, Point, Resize
from edgepet.errors import InputError
from edgepet.spec import NpArray

FINE = Map(name="map.1", point="stages.1:out", channels=2, stride=8, height=4, width=6)
COARSE = Map(name="map.2", point="stages.2:out", channels=3, stride=16, height=2, width=3)


def drawn(seed: int, *shape: int) -> NpArray:
    return np.random.default_rng(seed).standard_normal(shape)


def step(layer: Layer, reads: str, gives: str) -> Step:
    return Step(layer=layer, reads=tuple(reads.split()), gives=gives)


STEPS = (
    step(Point(drawn(1, 4, 2)), "map.1", "fine"),
    step(Point(drawn(2, 4, 3), drawn(3, 4)), "map.2", "coarse"),
    step(Resize(2), "coarse", "up"),
    step(Add(), "fine up", "sum"),
    step(Activation("relu"), "sum", "hidden"),
    step(Point(drawn(4, 2, 4), drawn(5, 2)), "hidden", "logits"),
)


def head(*steps: Step, **changes: Any) -> MapHead:
    given: dict[str, Any] = {"name": "what", "answer": "mask", "labels": ("land", "water"), "steps": steps or STEPS}
    return MapHead(**{**given, **changes})


def maps() -> dict[str, NpArray]:
    return {each.name: drawn(number, 5, *each.shape) for number, each in enumerate((FINE, COARSE))}


def test_what_flows_through_a_head_has_the_shapes_that_it_says() -> None:
    given, kept = maps(), maps()

    logits = head()(given)

    fine = np.einsum("oc,nchw->nohw", STEPS[0].layer.weight, given["map.1"])
    coarse = np.einsum("oc,nchw->nohw", STEPS[1].layer.weight, given["map.2"]) + drawn(3, 4)[:, None, None]
    hidden = np.maximum(fine + Resize(2)(coarse), 0)
    expected = np.einsum("oc,nchw->nohw", drawn(4, 2, 4), hidden) + drawn(5, 2)[:, None, None]
    np.testing.assert_allclose(logits, expected, atol=1e-12)
    assert all(np.array_equal(given[name], kept[name]) for name in kept)
    assert head().shapes([FINE, COARSE]) == {
        "map.1": (2, 4, 6), "map.2": (3, 2, 3), "fine": (4, 4, 6), "coarse": (4, 2, 3), "up": (4, 4, 6),
        "sum": (4, 4, 6), "hidden": (4, 4, 6), "logits": (2, 4, 6),
    }  # fmt: skip
    assert head().inputs == ("map.1", "map.2")
    assert head().stored_values == 4 * 2 + 4 * 3 + 4 + 2 * 4 + 2


def test_a_map_and_a_layer_may_be_read_several_times() -> None:
    twice = head(
        step(Point(drawn(1, 2, 2)), "map.1", "a"),
        step(Multiply(), "a a", "square"),
        step(Add(), "square a map.1", "logits"),
    )
    given = maps()

    a = Point(drawn(1, 2, 2))(given["map.1"])
    np.testing.assert_allclose(twice(given), a * a + a + given["map.1"], atol=1e-12)
    assert list(given) == ["map.1", "map.2"]


def test_an_array_that_layers_share_counts_once_and_stays_shared() -> None:
    weight = drawn(1, 2, 2)
    shared = head(step(Point(weight), "map.1", "a"), step(Point(weight), "a", "logits"))

    single = shared.astype(np.float32)

    assert shared.stored_values == 4
    assert single.stored_values == 4
    assert {array.dtype for array in single.arrays()} == {np.dtype(np.float32)}
    assert {array.dtype for array in shared.arrays()} == {np.dtype(np.float64)}
    np.testing.assert_allclose(single({n: x.astype(np.float32) for n, x in maps().items()}), shared(maps()), atol=1e-4)


def test_a_mask_has_a_label_a_pixel_and_the_first_of_two_that_are_equal() -> None:
    logits = np.zeros((1, 3, 2, 2))
    logits[0, 1, 0] = 1.0  # above, the second; below, all are equal

    mask = mask_of(logits, (8, 6))

    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask[0, :, 0], [1, 1, 1, 1, 1, 1, 0, 0])  # 1 on the way to 0 is still the largest
    assert (mask[0] == mask[0, :, :1]).all()


LEAF = step(Point(drawn(1, 2, 2)), "map.1", "logits")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: head(name="What"), "head: needs a name of small letters, digits and '-', at most 32, got 'What'"),
        (lambda: head(answer="text"), "what: needs one of mask, boxes, labels as answer, got 'text'"),
        (lambda: head(LEAF, answer="boxes"), "what: needs a layer detect where it answers boxes, as the last one, and nowhere else, got point as layer 1"),
        (lambda: head(step(Detect(np.ones(1), 8), "map.1 map.2", "found")), "what: needs a layer detect where it answers boxes, as the last one, and nowhere else, got detect as layer 1"),
        (lambda: head(labels=(), answer="boxes"), "what: needs 1 to 255 labels, got 0"),
        (lambda: head(labels=("land",)), "what: needs 2 to 255 labels, got 1"),
        (lambda: head(labels=("land", "land")), "what: needs labels that differ, got land, land"),
        (lambda: head(labels=tuple(map(str, range(256)))), "what: needs 2 to 255 labels, got 256"),
        (lambda: head(labels=("land", "")), "what: needs labels that UTF-8 can spell, got ''"),
        (lambda: head(labels=("land", "\udcff")), "what: needs labels that UTF-8 can spell, got '\\udcff'"),
        (lambda: head(steps=()), "what: needs 1 to 64 layers, got 0"),
        (lambda: head(*[LEAF] * 65), "what: needs 1 to 64 layers, got 65"),
        (lambda: head(LEAF, LEAF), "what: logits: is given by two layers"),
        (
            lambda: head(step(Point(drawn(1, 2, 2)), "map.1", "map.9")),
            "what: needs a name of small letters, digits and '_', at most 32, that is not 'features', got 'map.9'",
        ),
        (
            lambda: head(step(Point(drawn(1, 2, 2)), "map.1", FEATURES)),
            "what: needs a name of small letters, digits and '_', at most 32, that is not 'features', got 'features'",
        ),
        (
            lambda: head(step(Point(drawn(1, 2, 2)), "later", "logits"), step(Mean(), "map.1", "later")),
            "what: logits: reads a map, or what a layer before it gives, got 'later'",
        ),
        (
            lambda: head(step(Point(drawn(1, 2, 2)), "map.01", "logits")),
            "what: logits: reads a map, or what a layer before it gives, got 'map.01'",
        ),
        (lambda: head(step(Mean(), "map.1", "pooled"), LEAF), "what: pooled: must be read by a layer behind it, or be the last"),
        (lambda: head(step(Add(), "map.1", "logits")), "what: logits: add reads two inputs or more, got 1"),
        (lambda: head(step(Multiply(), "map.1", "logits")), "what: logits: multiply reads 2 inputs, got 1"),
        (lambda: head(step(Mean(), "map.1 map.2", "logits")), "what: logits: mean reads 1 input, got 2"),
        (lambda: head(step(Resize(5), "map.1", "logits")), "what: logits: resize needs a power of two from 2 to 32 as factor, got 5"),
    ],
)  # fmt: skip
def test_a_head_that_is_none_is_refused(make: Callable[[], MapHead], told: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (head(step(Point(drawn(1, 2, 2)), "map.0", "logits")), "what: map.0: is not what the backbone puts out, got map.1, map.2\n  fix: use the backbone that the head was trained on"),
        (head(step(Point(drawn(1, 2, 2)), "map.2", "logits")), "what: logits: point reads 2 channels, got (3, 2, 3)"),
        (head(step(Point(drawn(1, 3, 2)), "map.1", "logits")), "what: needs a map of 2 channels, one a label, got (3, 4, 6)"),
        (head(step(Mean(), "map.1", "pooled")), "what: needs a map of 2 channels, one a label, got (2,)"),
        (head(step(Resize(16), "map.1", "logits")), "what: logits: needs at most 16384 channels, and a place a pixel, got (2, 64, 96)"),
        (
            head(step(Concat(), " ".join(["map.1"] * 8193), "logits")),
            "what: logits: needs at most 16384 channels, and a place a pixel, got (16386, 4, 6)",
        ),
    ],
)  # fmt: skip
def test_maps_that_a_head_cannot_read_are_refused(given: MapHead, told: str) -> None:
    with pytest.raises(InputError) as error:
        given.shapes([FINE, COARSE])
    assert str(error.value) == told


def detector(classes: int = 2, stride: int = 8) -> MapHead:
    """Two levels, read from maps of other widths."""
    steps = [
        step(Point(drawn(10 * level + place, out, width)), name, f"{gives}_{level}")
        for level, (name, width) in enumerate((("map.1", 2), ("map.2", 3)))
        for place, (gives, out) in enumerate((("what", classes), ("where", 5)))
    ]
    found = step(Detect(np.array([1.0, 0.5]), stride, 20), "what_0 where_0 what_1 where_1", "found")
    return MapHead(name="boxes", answer="boxes", labels=("land", "water"), steps=(*steps, found))


def test_a_detector_gives_boxes_and_what_its_last_layer_reads_is_told() -> None:
    head = detector()

    assert head.shapes([FINE, COARSE])["found"] == (20, 6)
    found, read = head(maps()), head.read_last(maps())

    assert found.shape == (5, 20, 6)
    assert [x.shape[1:] for x in read] == [(2, 4, 6), (5, 4, 6), (2, 2, 3), (5, 2, 3)]
    np.testing.assert_array_equal(head.steps[-1].layer(*read), found)
    assert (np.diff(found[:, :, 4]) <= 0).all()


def test_a_detector_of_other_classes_than_its_labels_is_refused() -> None:
    with pytest.raises(InputError, match=r"^boxes: needs maps of 2 classes, one a label, got 3$"):
        detector(classes=3).shapes([FINE, COARSE])


def test_a_head_may_read_features_where_their_width_is_known() -> None:
    both = head(
        step(Mean(), "map.1", "pooled"),
        step(Add(), "pooled features", "sum"),
        step(Point(drawn(1, 2, 2)), "sum", "out"),
    )

    assert both.inputs == ("features", "map.1")
    with pytest.raises(InputError, match=r"^what: features: is not what the backbone puts out, got map.1\n"):
        both.shapes([FINE])
    with pytest.raises(InputError, match=r"^what: needs a map of 2 channels, one a label, got \(2,\)$"):
        both.shapes([FINE], width=2)
