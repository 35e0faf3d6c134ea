"""Every layer of a head is its definition, written out here place by place, and says what it cannot read."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from edgepet.deltas.layers import (
    LAYERS,
    OPTIONAL,
    SETTINGS,
    TENSORS,
    Activation,
    Add,
    Ask,
    Attend,
    Attention,
    Compare,
    Concat,
    Conv,
    Deconv,
    Depthwise,
    Detect,
    Layer,
    Mean,
    Multiply,
    Norm,
    Point,
    Pool,
    Regions,
    Resize,
    Shape,
    Shift,
    Unit,
    bilinear,
    settings,
    tensors,
    with_tensors,
)
from edgepet.spec import NpArray
from tests.layers import EXAMPLES, LayerCase, layer_cases


def biased(bias: Any, channel: int) -> float:
    return 0.0 if bias is None else float(bias[channel])


def at(x: NpArray, row: int, column: int) -> NpArray:
    """All channels of one image at a place; zeros around the map."""
    inside = 0 <= row < x.shape[1] and 0 <= column < x.shape[2]
    return x[:, row, column] if inside else np.zeros(len(x))


def between(x: NpArray, row: float, column: float) -> NpArray:
    """All channels at a place between four, those at the rim going on for ever."""
    top, left = math.floor(row), math.floor(column)
    total = np.zeros(len(x))
    for r in (top, top + 1):
        for c in (left, left + 1):
            weight = (1 - abs(row - r)) * (1 - abs(column - c))
            total += weight * x[:, min(max(r, 0), x.shape[1] - 1), min(max(c, 0), x.shape[2] - 1)]
    return total


def written_out(layer: Any, inputs: tuple[NpArray, ...], row: int, column: int) -> NpArray:
    """All channels that a layer gives at one place, of one image; no code of the layers is used."""
    x = inputs[0]
    here = x[:, row, column] if row < x.shape[1] and column < x.shape[2] else np.zeros(0)
    match layer:
        case Point(weight=w, bias=b):
            return np.array([sum(w[o, i] * here[i] for i in range(len(here))) + biased(b, o) for o in range(len(w))])
        case Depthwise(weight=w, bias=b):
            reach = w.shape[1] // 2
            taps = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
            return np.array(
                [
                    sum(w[c, reach + dy, reach + dx] * at(x, row + dy, column + dx)[c] for dy, dx in taps)
                    + biased(b, c)
                    for c in range(len(x))
                ]
            )
        case Conv(weight=w, bias=b, stride=stride):
            reach = w.shape[2] // 2
            total = np.array([biased(b, o) for o in range(len(w))])
            for dy, dx in np.ndindex(w.shape[2:]):
                total = total + w[:, :, dy, dx] @ at(x, stride * row + dy - reach, stride * column + dx - reach)
            return total
        case Deconv(weight=w, bias=b):
            shift = np.array([biased(b, o) for o in range(w.shape[1])])
            return shift + w[:, :, row % 2, column % 2].T @ x[:, row // 2, column // 2]
        case Resize(factor=factor, mode="nearest"):
            return x[:, row // factor, column // factor]
        case Resize(factor=factor):
            return between(x, (row + 0.5) / factor - 0.5, (column + 0.5) / factor - 0.5)
        case Pool(size=size):
            return x[:, row * size : (row + 1) * size, column * size : (column + 1) * size].reshape(len(x), -1).max(1)
        case Add():
            return np.sum([each[:, row, column] for each in inputs], axis=0)
        case Multiply():
            return here * inputs[1][:, row, column]
        case Concat():
            return np.concatenate([each[:, row, column] for each in inputs])
        case Activation(name="relu"):
            return np.array([max(value, 0.0) for value in here])
        case Activation(name="gelu"):
            return np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in here])
        case Activation(name="sigmoid"):
            return np.array([1 / (1 + math.exp(-value)) for value in here])
        case Norm(weight=w, bias=b, eps=eps):
            normed = (here - here.mean()) / math.sqrt(here.var() + eps)
            return normed if w is None else normed * w + b
        case Unit(eps=eps):
            return here / max(math.sqrt(sum(here**2)), eps)
        case Attend(keys=keys, values=values, key_bias=shift, bias=b):
            total = np.array([biased(b, o) for o in range(values.shape[2])])
            for head in range(len(keys)):
                scores = np.exp(keys[head] @ here + (0 if shift is None else shift[head]))
                total = total + values[head].T @ (scores / scores.sum())
            return total
        case Regions(queries=queries, weight=w):
            pixels = x.reshape(len(x), -1).T
            answer = []
            for query in queries:
                scores = np.exp(pixels @ query)
                answer.append(here @ w @ (scores / scores.sum() @ pixels))
            return np.array(answer)
        case Shift(value=value):
            return here + value[:, row, column]
        case Ask(queries=queries):
            return np.concatenate([answered(inputs, heads[row], g, len(queries)) for g, heads in enumerate(queries)])
        case Attention(heads=heads):
            parts = np.split(here, heads)
            keys = [
                (k[g * len(parts[g]) : (g + 1) * len(parts[g])], v)
                for g in range(heads)
                for k, v in pairs_of(inputs[1:])
            ]
            each = len(keys) // heads
            return np.concatenate(
                [
                    answered([x for pair in keys[g * each : (g + 1) * each] for x in pair], parts[g], g, heads)
                    for g in range(heads)
                ]
            )
        case Compare(scale=scale):
            return np.array([scale * sum(here * inputs[1][:, k, 0]) for k in range(inputs[1].shape[1])])
    raise AssertionError(layer)


def pairs_of(inputs: Any) -> list[tuple[NpArray, NpArray]]:
    return list(zip(inputs[::2], inputs[1::2], strict=True))


def answered(inputs: Any, query: NpArray, head: int, heads: int) -> NpArray:
    """What one query of one head finds at all places of all pairs of keys and values."""
    scores, told = list[float](), list[NpArray]()
    for keys, values in pairs_of(inputs):
        width = len(values) // heads
        for row, column in np.ndindex(keys.shape[1:]):
            scores.append(math.exp(query @ keys[:, row, column]))
            told.append(values[head * width : (head + 1) * width, row, column])
    return np.average(told, axis=0, weights=scores)


@EXAMPLES
@given(layer_cases(kinds=[kind for kind in LAYERS if kind not in ("mean", "detect")]))
def test_a_layer_gives_at_every_place_what_its_definition_says(case: LayerCase) -> None:
    grids = tuple(x.reshape(*x.shape, *[1] * (4 - x.ndim)) for x in case.inputs)  # features are a map of one place

    got = case.layer(*case.inputs)

    flat = got.reshape(*got.shape, *[1] * (4 - got.ndim))
    for image in range(len(flat)):
        for row, column in np.ndindex(flat.shape[2:]):
            expected = written_out(case.layer, tuple(x[image] for x in grids), row, column)
            np.testing.assert_allclose(flat[image, :, row, column], expected, atol=1e-12, rtol=1e-12)


def test_the_mean_is_that_of_all_places() -> None:
    x = np.arange(24.0).reshape(2, 3, 2, 2)

    np.testing.assert_array_equal(Mean()(x), [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]])


@EXAMPLES
@given(layer_cases())
def test_the_shape_is_said_before_anything_is_computed(case: LayerCase) -> None:
    shapes = [x.shape[1:] for x in case.inputs]
    before = [x.copy() for x in case.inputs]

    assert case.layer.wrong() is None
    assert case.layer.mismatch(*shapes) is None
    assert case.layer(*case.inputs).shape[1:] == case.layer.shape(*shapes)
    assert all(np.array_equal(x, was) for x, was in zip(case.inputs, before, strict=True))


@EXAMPLES
@given(layer_cases())
def test_a_layer_computes_in_the_number_format_that_it_is_given(case: LayerCase) -> None:
    single = with_tensors(case.layer, {name: array.astype(np.float32) for name, array in tensors(case.layer).items()})

    got = single(*(x.astype(np.float32) for x in case.inputs))

    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, case.layer(*case.inputs), atol=1e-3, rtol=1e-3
    )  # float32, and softmax over 36 places


@EXAMPLES
@given(layer_cases())
def test_tensors_and_settings_make_the_layer_again(case: LayerCase) -> None:
    layer = case.layer
    again = LAYERS[layer.kind](**tensors(layer), **settings(layer))

    np.testing.assert_array_equal(again(*case.inputs), layer(*case.inputs))
    assert {name: array.ndim for name, array in tensors(layer).items()}.items() <= TENSORS.get(layer.kind, {}).items()
    assert TENSORS.get(layer.kind, {}).keys() - tensors(layer).keys() <= OPTIONAL.get(layer.kind, frozenset())
    assert settings(layer).keys() == SETTINGS.get(layer.kind, {}).keys()


def test_every_kind_is_called_as_the_table_calls_it() -> None:
    assert {name: each.kind for name, each in LAYERS.items()} == {name: name for name in LAYERS}


def test_softmax_and_sigmoid_do_not_overflow() -> None:
    x = np.array([[[[-1e4, 1e4]]]])

    np.testing.assert_array_equal(Activation("sigmoid")(x), [[[[0.0, 1.0]]]])
    assert np.isfinite(Regions(np.array([[1.0]]), np.array([[1.0]]))(x)).all()


@pytest.mark.parametrize("size", [(7, 7), (14, 9), (3, 5), (1, 1)])
def test_a_map_of_one_value_stays_one_at_any_size(size: tuple[int, int]) -> None:
    np.testing.assert_allclose(bilinear(np.full((1, 2, 4, 6), 3.5), size), np.full((1, 2, *size), 3.5), rtol=1e-15)


def box_of(layer: Detect, inputs: tuple[NpArray, ...], level: int, row: int, column: int) -> list[float]:
    """What a detector says of one place of one image; no code of the layer is used."""
    classes, beside = inputs[2 * level][:, row, column], inputs[2 * level + 1][:, row, column]
    stride = layer.stride * 2**level
    x, y = (column + 0.5) * stride, (row + 0.5) * stride
    left, top, right, bottom = (max(0.0, float(side * layer.scales[level])) * stride for side in beside[:4])
    best = max(range(len(classes)), key=lambda label: classes[label])
    score = math.sqrt(1 / (1 + math.exp(-classes[best])) / (1 + math.exp(-beside[4])))
    return [x - left, y - top, x + right, y + bottom, score, best]


@EXAMPLES
@given(layer_cases(kinds=["detect"]))
def test_a_detector_has_a_box_for_every_place_and_tells_the_best(case: LayerCase) -> None:
    layer, found = case.layer, case.layer(*case.inputs)
    assert isinstance(layer, Detect)

    for image in range(len(found)):
        inputs = tuple(x[image] for x in case.inputs)
        boxes = [
            box_of(layer, inputs, level, row, column)
            for level in range(len(layer.scales))
            for row, column in np.ndindex(inputs[2 * level].shape[1:])
        ]
        expected = sorted(boxes, key=lambda box: -box[4])[: layer.top]
        np.testing.assert_allclose(found[image], expected, atol=1e-12, rtol=1e-12)


def z(*shape: int) -> NpArray:
    return np.zeros(shape)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (Point(z(2)), "needs weight of 2 axes, got (2,)"),
        (Point(z(0, 3)), "needs weight of 2 axes, got (0, 3)"),
        (Point(z(2, 3), z(3)), "needs bias (2,), got (3,)"),
        (Depthwise(z(2, 3)), "needs weight of 3 axes, got (2, 3)"),
        (Depthwise(z(2, 3, 1)), "needs a kernel of k x k, k odd, got 3 x 1"),
        (Depthwise(z(2, 2, 2)), "needs a kernel of k x k, k odd, got 2 x 2"),
        (Depthwise(z(2, 3, 3), z(1)), "needs bias (2,), got (1,)"),
        (Conv(z(2, 3, 3)), "needs weight of 4 axes, got (2, 3, 3)"),
        (Conv(z(2, 3, 4, 4)), "needs a kernel of k x k, k odd, got 4 x 4"),
        (Conv(z(2, 3, 3, 3), stride=3), "needs a stride of 1 or 2, got 3"),
        (Conv(z(2, 3, 3, 3), z(3)), "needs bias (2,), got (3,)"),
        (Deconv(z(2, 3, 3, 3)), "needs taps (2, 2), got (3, 3)"),
        (Deconv(z(2, 3, 2, 2), z(2)), "needs bias (3,), got (2,)"),
        (Resize(3), "needs a power of two from 2 to 32 as factor, got 3"),
        (Resize(1), "needs a power of two from 2 to 32 as factor, got 1"),
        (Resize(64), "needs a power of two from 2 to 32 as factor, got 64"),
        (Resize(2, "cubic"), "needs one of bilinear, nearest as mode, got 'cubic'"),
        (Pool(1), "needs a size from 2 to 32, got 1"),
        (Activation("tanh"), "needs one of relu, gelu, sigmoid as name, got 'tanh'"),
        (Norm(z(2)), "needs weight and bias, or none of both"),
        (Norm(z(2), z(3)), "needs bias (2,), got (3,)"),
        (Norm(eps=0.0), "needs an eps between 0 and 1, got 0.0"),
        (Unit(eps=1.0), "needs an eps between 0 and 1, got 1.0"),
        (Attend(z(2, 3, 4), z(2, 3)), "needs values of 3 axes, got (2, 3)"),
        (Attend(z(2, 3, 4), z(2, 2, 4)), "needs values (2, 3, out), got (2, 2, 4)"),
        (Attend(z(2, 3, 4), z(2, 3, 5), key_bias=z(2, 4)), "needs key_bias (2, 3), got (2, 4)"),
        (Attend(z(2, 3, 4), z(2, 3, 5), bias=z(4)), "needs bias (5,), got (4,)"),
        (Regions(z(2, 3), z(2, 3)), "needs weight (3, 3), got (2, 3)"),
        (Shift(z(2, 3)), "needs value of 3 axes, got (2, 3)"),
        (Ask(z(2, 3)), "needs queries of 3 axes, got (2, 3)"),
        (Ask(z(65, 1, 1)), "needs at most 64 heads, got 65"),
        (Attention(0), "needs 1 to 64 heads, got 0"),
        (Attention(65), "needs 1 to 64 heads, got 65"),
        (Compare(0.0), "needs a scale above 0 and at most 1000, got 0.0"),
        (Compare(1001.0), "needs a scale above 0 and at most 1000, got 1001.0"),
        (Detect(z(2), 0), "needs a stride from 1 to 64, got 0"),
        (Detect(z(2), 65), "needs a stride from 1 to 64, got 65"),
        (Detect(z(2), 8, 0), "needs a top from 1 to 1000, got 0"),
        (Detect(z(2), 8, 1001), "needs a top from 1 to 1000, got 1001"),
        (Detect(z(2, 1), 8), "needs scales of 1 axes, got (2, 1)"),
    ],
)  # fmt: skip
def test_a_layer_that_is_none_says_why(layer: Layer, told: str) -> None:
    assert layer.wrong() == told


@pytest.mark.parametrize(
    ("layer", "shapes", "told"),
    [
        (Point(z(2, 3)), [(4, 2, 2)], "reads 3 channels, got (4, 2, 2)"),
        (Point(z(2, 3)), [(4,)], "reads 3 channels, got (4,)"),
        (Depthwise(z(3, 3, 3)), [(3,)], "reads a map, got (3,)"),
        (Depthwise(z(3, 3, 3)), [(2, 4, 4)], "reads 3 channels, got (2, 4, 4)"),
        (Conv(z(2, 3, 3, 3)), [(2, 4, 4)], "reads 3 channels, got (2, 4, 4)"),
        (Deconv(z(3, 2, 2, 2)), [(2, 4, 4)], "reads 3 channels, got (2, 4, 4)"),
        (Resize(2), [(3,)], "reads a map, got (3,)"),
        (Pool(4), [(3, 4, 3)], "reads maps of at least 4 x 4, got (3, 4, 3)"),
        (Pool(4), [(3,)], "reads a map, got (3,)"),
        (Add(), [(3, 4, 4), (3, 2, 2)], "reads inputs of one shape, got (3, 4, 4) and (3, 2, 2)"),
        (Multiply(), [(3, 4, 4), (2, 4, 4)], "reads a second input of (3, 4, 4) or of one channel, got (2, 4, 4)"),
        (Concat(), [(3, 4, 4), (3, 2, 2)], "reads inputs of one height and width, got (3, 4, 4) and (3, 2, 2)"),
        (Norm(z(3), z(3)), [(2, 4, 4)], "reads 3 channels, got (2, 4, 4)"),
        (Attend(z(2, 3, 4), z(2, 3, 5)), [(5, 4, 4)], "reads 4 channels, got (5, 4, 4)"),
        (Attend(z(2, 3, 4), z(2, 3, 5)), [(4,)], "reads a map, got (4,)"),
        (Regions(z(2, 3), z(3, 3)), [(2, 4, 4)], "reads 3 channels, got (2, 4, 4)"),
        (Mean(), [(3,)], "reads a map, got (3,)"),
        (Shift(z(2, 3, 1)), [(2, 3, 3)], "reads (2, 3, 1), got (2, 3, 3)"),
        (Ask(z(2, 3, 4)), [(4, 2, 2), (6, 2, 2), (4,)], "reads keys and values in turn, got 3"),
        (Ask(z(2, 3, 4)), [(5, 2, 2), (6, 2, 2)], "reads 4 channels, got (5, 2, 2)"),
        (Ask(z(2, 3, 4)), [(4, 2, 2), (5, 2, 2)], "reads values whose channels 2 heads share evenly, got (5, 2, 2)"),
        (Ask(z(2, 3, 4)), [(4, 2, 2), (6, 2, 1)], "reads a value for every key, got (4, 2, 2) and (6, 2, 1)"),
        (Ask(z(1, 3, 4)), [(4, 2, 2), (6, 2, 2), (3,), (6,)], "reads keys of one number of channels, got (4, 2, 2) and (6, 2, 2) and (3,) and (6,)"),
        (Ask(z(1, 3, 4)), [(4, 2, 2), (6, 2, 2), (4,), (5,)], "reads values of one number of channels, got (4, 2, 2) and (6, 2, 2) and (4,) and (5,)"),
        (Attention(2), [(4, 2, 1), (4, 2, 2)], "reads keys and values in turn, got 1"),
        (Attention(2), [(4,), (4, 2, 2), (4, 2, 2)], "reads a map, got (4,)"),
        (Attention(2), [(3, 2, 1), (3, 2, 2), (4, 2, 2)], "reads channels that 2 heads share evenly, got (3, 2, 1)"),
        (Attention(2), [(4, 2, 1), (6, 2, 2), (4, 2, 2)], "reads 4 channels, got (6, 2, 2)"),
        (Compare(1.0), [(4, 2, 2), (3, 2, 1)], "reads 4 channels, got (3, 2, 1)"),
        (Compare(1.0), [(4, 2, 2), (4,)], "reads a map, got (4,)"),
        (Detect(z(2), 8), [(3, 4, 4), (5, 4, 4)], "reads two maps for each of 2 levels, got 2"),
        (Detect(z(1), 8), [(3, 4, 4), (5,)], "reads a map, got (5,)"),
        (Detect(z(1), 8), [(3, 4, 4), (4, 4, 4)], "reads maps of 3 classes and of 5 channels in turn, got (3, 4, 4) and (4, 4, 4)"),
        (Detect(z(2), 8), [(3, 4, 4), (5, 4, 4), (2, 2, 2), (5, 2, 2)], "reads maps of 3 classes and of 5 channels in turn, got (3, 4, 4) and (5, 4, 4) and (2, 2, 2) and (5, 2, 2)"),
        (Detect(z(2), 8), [(3, 4, 4), (5, 4, 4), (3, 3, 3), (5, 3, 3)], "reads levels a whole number of times coarser than the first, got (3, 4, 4) and (3, 3, 3)"),
    ],
)  # fmt: skip
def test_an_input_that_a_layer_cannot_read_is_told(layer: Layer, shapes: list[Shape], told: str) -> None:
    assert layer.mismatch(*shapes) == told
