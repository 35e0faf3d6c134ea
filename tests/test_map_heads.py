"""Packs with heads that read maps: their bytes, what is refused, and that who only classifies does not take them."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from edgepet.deltas.delta import NO_CLASSIFIER, Delta, JudgedHead, Score
from edgepet.deltas.heads import Map, MapHead, Step
from edgepet.deltas.layers import LAYERS, Activation, Add, Mean, Norm, Point, Resize, settings, tensors, with_tensors
from edgepet.errors import InputError, PackError
from edgepet.packs.pack import EVERY, encode_pack, read_pack, write_pack
from edgepet.spec import NpArray
from tests.layers import EXAMPLES, LayerCase, layer_cases
from tests.packs import changed, manifest_of, tensors_of
from tests.tiny import make_delta

MAPS = (
    Map(name="map.0", point="stages.2:out", channels=5, stride=8, height=4, width=4),
    Map(name="map.1", point="stages.3:out", channels=6, stride=16, height=2, width=2),
)


def drawn(seed: int, *shape: int) -> NpArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def step(layer: Any, reads: str, gives: str) -> Step:
    return Step(layer=layer, reads=tuple(reads.split()), gives=gives)


def mlp(name: str = "what", seed: int = 0) -> MapHead:
    steps = (
        step(Point(drawn(seed, 4, 5)), "map.0", "fine"),
        step(Norm(eps=1e-6), "map.1", "normed"),
        step(Point(drawn(seed + 1, 4, 6), drawn(seed + 2, 4)), "normed", "coarse"),
        step(Resize(2), "coarse", "up"),
        step(Add(), "fine up", "sum"),
        step(Activation("relu"), "sum", "hidden"),
        step(Point(drawn(seed + 3, 3, 4), drawn(seed + 4, 3)), "hidden", "logits"),
    )
    return MapHead(name=name, answer="mask", labels=("land", "water", "snow"), steps=steps)


def judged(*heads: MapHead) -> tuple[JudgedHead, ...]:
    return tuple(JudgedHead(head=each, value=0.5, n=8) for each in heads or (mlp(),))


def masks(**changes: Any) -> Delta:
    """A task that answers masks alone."""
    given: dict[str, Any] = {"head": NO_CLASSIFIER, "labels": (), "val": Score(top1=0.0, n=0), "heads": judged()}
    return make_delta(**{**given, **changes})


def same(got: MapHead, expected: MapHead) -> bool:
    pairs = list(zip(got.steps, expected.steps, strict=True))
    told = (got.name, got.answer, got.labels) == (expected.name, expected.answer, expected.labels)
    wired = all(
        (a.reads, a.gives, a.layer.kind, settings(a.layer)) == (b.reads, b.gives, b.layer.kind, settings(b.layer))
        for a, b in pairs
    )
    equal = all(np.array_equal(x, y) for x, y in zip(got.arrays(), expected.arrays(), strict=True))
    return told and wired and equal


def test_a_task_of_masks_is_read_as_it_was_written(tmp_path: Path) -> None:
    size = write_pack(tmp_path / "land.pet", masks(), codec="fp32")

    pack = read_pack(tmp_path / "land.pet", answers=EVERY)

    (head,) = pack.delta.heads
    assert same(head.head, mlp())
    assert (head.value, head.n, pack.delta.labels, pack.delta.answers) == (0.5, 8, (), ("mask",))
    assert pack.size_bytes == size
    assert encode_pack(pack.delta, kept=pack.planes) == (tmp_path / "land.pet").read_bytes()
    logits = head.head({each.name: drawn(9, 2, *each.shape) for each in MAPS})
    assert logits.shape == (2, 3, 4, 4)


def test_the_manifest_says_what_is_computed() -> None:
    manifest = manifest_of(encode_pack(masks(), codec="fp32"))

    (head,) = manifest["heads"]
    assert head == {
        "name": "what", "answer": "mask", "labels": ["land", "water", "snow"],
        "val": {"metric": "miou", "value": 0.5, "n": 8},
        "layers": [
            {"kind": "point", "reads": ["map.0"], "gives": "fine", "weight": [0, 0, 4, 5]},
            {"kind": "norm", "reads": ["map.1"], "gives": "normed", "eps": 1e-6},
            {"kind": "point", "reads": ["normed"], "gives": "coarse", "weight": [20, 0, 4, 6], "bias": [0, 0, 4]},
            {"kind": "resize", "reads": ["coarse"], "gives": "up", "factor": 2, "mode": "bilinear"},
            {"kind": "add", "reads": ["fine", "up"], "gives": "sum"},
            {"kind": "activation", "reads": ["sum"], "gives": "hidden", "name": "relu"},
            {"kind": "point", "reads": ["hidden"], "gives": "logits", "weight": [44, 0, 3, 4], "bias": [4, 0, 3]},
        ],
    }  # fmt: skip
    assert sorted(tensors_of(encode_pack(masks()))) == ["head.point.bias", "head.point.weight", "layout"]


def test_classes_and_masks_of_one_task_share_a_pack() -> None:
    both = make_delta(heads=judged(mlp("what"), mlp("where", seed=7)))

    delta = read_pack(encode_pack(both, codec="fp32"), answers=EVERY).delta

    assert delta.answers == ("class", "mask", "mask")
    assert [each.head.name for each in delta.heads] == ["what", "where"]
    np.testing.assert_array_equal(delta.head.weight, both.head.weight)
    assert same(delta.heads[1].head, mlp("where", seed=7))


def test_a_task_of_classes_is_written_as_ever() -> None:
    """No key and no plane is added where there is no head that reads maps."""
    manifest = manifest_of(encode_pack(make_delta()))

    assert [sorted(head) for head in manifest["heads"]] == [["answer", "labels", "layers", "name", "val"]]
    assert manifest["heads"][0]["layers"] == [{"kind": "point", "bias": [0, 0, 3], "weight": [0, 0, 3, 4]}]


@EXAMPLES
@given(layer_cases(kinds=[kind for kind in LAYERS if kind not in ("mean", "detect")]))
def test_every_kind_of_layer_goes_through_a_pack(case: LayerCase) -> None:
    layer = with_tensors(case.layer, {name: array.astype(np.float32) for name, array in tensors(case.layer).items()})
    reads = tuple(f"map.{n}" for n in range(len(case.inputs)))
    head = MapHead(name="any", answer="mask", labels=("a", "b"), steps=(Step(layer=layer, reads=reads, gives="out"),))

    (again,) = read_pack(encode_pack(masks(heads=judged(head)), codec="fp32"), answers=EVERY).delta.heads

    assert same(again.head, head)
    given = {name: x.astype(np.float32) for name, x in zip(reads, case.inputs, strict=True)}
    np.testing.assert_array_equal(again.head(given), head(given))


def test_what_layers_share_is_stored_once() -> None:
    weight = drawn(1, 5, 5)
    head = MapHead(
        name="what", answer="mask", labels=tuple("abcde"),
        steps=(step(Point(weight), "map.0", "a"), step(Point(weight), "a", "b")),
    )  # fmt: skip

    data = encode_pack(masks(heads=judged(head)), codec="fp32")

    assert tensors_of(data)["head.point.weight"].size == 25
    (again,) = read_pack(data, answers=EVERY).delta.heads
    assert again.head.stored_values == 25


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_the_numbers_of_a_head_are_coded_as_others(codec: Any) -> None:
    (head,) = read_pack(encode_pack(masks(), codec=codec), answers=EVERY).delta.heads

    maps = {each.name: drawn(9, 2, *each.shape) for each in MAPS}
    expected = mlp()(maps)
    assert (
        np.abs(head.head.astype(np.float32)(maps) - expected).max()
        < (1e-2 if codec == "fp16" else 0.1) * np.abs(expected).max()
    )


def test_who_only_classifies_does_not_take_masks() -> None:
    data = encode_pack(masks())

    with pytest.raises(PackError) as error:
        read_pack(data)

    assert (
        str(error.value)
        == "pack.heads: must answer class here, got mask\n  fix: `edgepet predict`, `edgepet device` and `edgepet eval` take it"
    )
    with pytest.raises(PackError, match=r"^pack\.heads: must answer class here, got mask"):
        read_pack(encode_pack(make_delta(heads=judged())))
    with pytest.raises(PackError, match=r"^pack\.heads: must answer mask here, got class"):
        read_pack(encode_pack(make_delta()), answers=("mask",))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"heads": ()}, "flowers: a head (0, 0) needs 0 biases and labels, got 0 and 0"),
        ({"heads": judged(mlp(), mlp())}, "flowers: needs a name of its own for every head, got class, what, what"),
        ({"heads": judged(mlp("class"))}, "flowers: needs a name of its own for every head, got class, class"),
        ({"heads": judged(*(mlp(f"h{n}") for n in range(9)))}, "flowers: needs at most 8 heads that read maps, got 9"),
        ({"heads": (replace(judged()[0], value=1.5),)}, "flowers: what: needs a val miou between 0 and 1, got 1.5"),
    ],
)  # fmt: skip
def test_heads_that_a_task_cannot_have_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        masks(**changes)
    assert str(error.value) == told


def layer(number: int, **values: Any) -> Callable[[dict[str, Any], Any], object]:
    return lambda manifest, _: manifest["heads"][0]["layers"][number].update(values)


def head(**values: Any) -> Callable[[dict[str, Any], Any], object]:
    return lambda manifest, _: manifest["heads"][0].update(values)


def dropped(number: int, key: str) -> Callable[[dict[str, Any], Any], object]:
    return lambda manifest, _: manifest["heads"][0]["layers"][number].pop(key)


AP = {"metric": "map", "value": 0.5, "n": 8}
MALFORMED: list[tuple[Callable[..., object], str]] = [
    (head(name="class-2", answer="class"), "pack.heads[0].name: needs one of class, got 'class-2'"),
    (head(answer="text"), "pack.heads[0].answer: needs one of class, mask, boxes, labels, got 'text'"),
    (head(name="What"), "pack: head: needs a name of small letters, digits and '-', at most 32, got 'What'"),
    (head(probe={}), "pack.heads[0].probe: needs one of fp32, int8, got {}"),
    (head(probe={"fp32": {"seed": 1, "tolerance": 1.0}}), "pack: needs the plane 'probe.mask'"),
    (head(labels=["a"]), "pack: what: needs 2 to 255 labels, got 1"),
    (head(labels=["a"] * 256), "pack.heads[0].labels: needs at most 255 texts, got 256"),
    (head(labels=["a", "b", "c" * 257]), f"pack.heads[0].labels[2]: needs at most 256 bytes, got {'c' * 40!r}…"),
    (head(layers=[]), "pack: what: needs 1 to 128 layers, got 0"),
    (lambda m, t: m["heads"][0].update(layers=m["heads"][0]["layers"] * 20), "pack.heads[0].layers: needs at most 128 layers, got 140"),
    (head(val={"metric": "top1", "value": 0.5, "n": 8}), "pack.heads[0].val.metric: needs one of miou, got 'top1'"),
    (head(val={"metric": "miou", "value": 1.5, "n": 8}), "pack: flowers: what: needs a val miou between 0 and 1, got 1.5"),
    (layer(0, kind="softmax"), f"pack.heads[0].layers[0].kind: needs one of {', '.join(LAYERS)}, got 'softmax'"),
    (layer(0, stride=1), "pack.heads[0].layers[0]: knows no key 'stride'\n  fix: update edgepet if a newer version wrote this file"),
    (dropped(0, "weight"), "pack.heads[0].layers[0]: needs the key 'weight'"),
    (layer(0, weight=[0, 0, 20]), "pack.heads[0].layers[0].weight: needs 2 axes, got 1"),
    (layer(0, weight=[40, 0, 4, 5]), "pack.heads[0].layers[0].weight: reaches outside head.point.weight of 56 values, got [40, 0, 4, 5]"),
    (layer(0, weight=[0, 0, 5, 4]), None),
    (layer(0, reads=["map.0"] * 65), "pack.heads[0].layers[0].reads: needs at most 64 inputs, got 65"),
    (layer(0, reads=[]), "pack: what: fine: point reads 1 input, got 0"),
    (layer(0, reads=["later"]), "pack: what: fine: reads a map, or what a layer before it gives, got 'later'"),
    (layer(0, gives="map.3"), "pack: what: needs a name of small letters, digits and '_', at most 32, that is not 'features', got 'map.3'"),
    (layer(1, eps=0), "pack: what: normed: norm needs an eps between 0 and 1, got 0.0"),
    (dropped(1, "eps"), "pack.heads[0].layers[1]: needs the key 'eps'"),
    (layer(3, factor=3), "pack: what: up: resize needs a power of two from 2 to 32 as factor, got 3"),
    (layer(3, factor=1 << 20), "pack.heads[0].layers[3].factor: needs at most 65536, got 1048576"),
    (layer(3, mode="cubic"), "pack.heads[0].layers[3].mode: needs one of bilinear, nearest, got 'cubic'"),
    (layer(5, name="tanh"), "pack.heads[0].layers[5].name: needs one of relu, gelu, sigmoid, got 'tanh'"),
    (head(thresholds=[0.5, 0.5, 0.5]), "pack.heads[0]: knows no key 'thresholds'\n  fix: update edgepet if a newer version wrote this file"),
    (head(answer="labels", val=AP), "pack.heads[0]: needs the key 'thresholds'"),
    (head(answer="labels", thresholds=[0.5, 0.5], val=AP), "pack.heads[0].thresholds: needs 3 numbers, got [0.5, 0.5]"),
    (head(answer="labels", thresholds=[0.5, 0.5, "a"], val=AP), "pack.heads[0].thresholds[2]: needs a finite number, got 'a'"),
    (head(answer="labels", thresholds=[0.5, 0.5, 1.5], val=AP), "pack: what: needs 3 thresholds from 0 to 1, got 0.5, 0.5, 1.5"),
    (lambda m, t: m["heads"].extend(m["heads"] * 9), "pack.heads: needs at most 9 heads, got 10"),
    (lambda m, t: m["heads"].clear(), "pack.heads: needs one head, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), MALFORMED)
def test_a_head_that_is_malformed_names_the_place(change: Any, told: str | None) -> None:
    data = changed(encode_pack(masks(), codec="fp32"), change)

    if told is None:  # another shape of as many values is another head, which the maps will refuse
        (read,) = read_pack(data, answers=EVERY).delta.heads
        with pytest.raises(InputError, match=r"^what: fine: point reads 4 channels, got \(5, 4, 4\)$"):
            read.head.shapes(MAPS)
        return
    with pytest.raises(PackError) as error:
        read_pack(data, answers=EVERY)
    assert str(error.value) == told


def test_the_classifier_comes_first() -> None:
    data = changed(encode_pack(make_delta(heads=judged()), codec="fp32"), lambda m, t: m["heads"].reverse())

    with pytest.raises(PackError) as error:
        read_pack(data, answers=EVERY)

    assert str(error.value) == "pack.heads[1].answer: must be the first, if it is class, got another before it"


def test_a_mean_and_features_may_be_read() -> None:
    steps = (step(Mean(), "map.0", "pooled"), step(Add(), "pooled features", "out"))
    head = MapHead(name="any", answer="mask", labels=("a", "b"), steps=steps)

    (again,) = read_pack(encode_pack(masks(heads=judged(head))), answers=EVERY).delta.heads

    assert again.head.inputs == ("features", "map.0")
