"""Each layer's ONNX nodes are its NumPy definition on both runtimes, and maps come out of a graph as torch has them."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from hypothesis import given

from edgepet.canonical import canonical_json
from edgepet.deltas.heads import Map, MapHead, Step, mask_of
from edgepet.deltas.layers import LAYERS, Activation, Add, Concat, Layer, Mean, Multiply, Point, Resize
from edgepet.device.onnxruntime import open_session
from edgepet.device.runtimes import RUNTIMES, SHARED_RUNTIMES
from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.graphs.base import BaseGraph, graph_folder, open_graph
from edgepet.graphs.head_graph import head_file, with_head, with_mask
from edgepet.graphs.head_layers import EMITTERS, Emitted, Place, emit
from edgepet.graphs.onnx_file import OnnxFile, new_file, port
from edgepet.graphs.parts import part_of
from edgepet.networks.backbone import Backbone
from edgepet.networks.heads import HeadNetwork
from edgepet.networks.maps import taking
from edgepet.spec import NpArray, Preprocess
from tests.flow import has_openvino
from tests.layers import EXAMPLES, LayerCase, layer_cases
from tests.tiny import random_images, seeded, tiny_vit

NAMES = [name for name in SHARED_RUNTIMES if name == "onnxruntime" or has_openvino]


def alone(case: LayerCase) -> OnnxFile:
    """A graph of one layer; it reads x0, x1, … and gives head.layer, as it is called in a head."""
    shapes = tuple(x.shape[1:] for x in case.inputs)
    reads, shape = tuple(f"x{number}" for number in range(len(shapes))), case.layer.shape(*shapes)
    out = Emitted("head.")
    place = Place(reads=reads, gives="head.layer", shapes=shapes, shape=shape, name="layer")
    emit(Step(layer=case.layer, reads=reads, gives="layer"), place, out)
    inputs = {name: port(name, ("batch", *sides)) for name, sides in zip(reads, shapes, strict=True)}
    return new_file("layer", out.nodes, out.tensors, inputs, {"head.layer": port("head.layer", ("batch", *shape))})


@pytest.mark.parametrize("runtime", NAMES)
@EXAMPLES
@given(case=layer_cases())
def test_a_layer_on_a_runtime_is_its_definition_in_numpy(case: LayerCase, runtime: str) -> None:
    file = alone(case)
    onnx.checker.check_model(onnx.ModelProto.FromString(file.encoded()), full_check=True)
    opener = RUNTIMES[runtime].open_head
    assert opener is not None

    network = opener(file, 1, RUNTIMES[runtime].where)
    (got,) = network({f"x{number}": x.astype(np.float32) for number, x in enumerate(case.inputs)})
    network.close()

    expected = case.layer(*case.inputs)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))  # float32 beside float64


def test_every_kind_of_layer_has_its_nodes() -> None:
    assert EMITTERS.keys() == LAYERS.keys()


FINE = Map(name="map.1", point="stages.1:out", channels=2, stride=8, height=4, width=6)
COARSE = Map(name="map.2", point="stages.2:out", channels=3, stride=16, height=2, width=3)


def drawn(seed: int, *shape: int) -> NpArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def step(layer: Layer, reads: str, gives: str) -> Step:
    return Step(layer=layer, reads=tuple(reads.split()), gives=gives)


SHARED = drawn(1, 2, 2)
HEADS = {
    "a sum of two maps": (
        step(Point(drawn(1, 4, 2)), "map.1", "fine"), step(Point(drawn(2, 4, 3), drawn(3, 4)), "map.2", "coarse"),
        step(Resize(2), "coarse", "up"), step(Add(), "fine up", "sum"), step(Activation("relu"), "sum", "hidden"),
        step(Point(drawn(4, 2, 4), drawn(5, 2)), "hidden", "logits"),
    ),
    "one product": (step(Point(drawn(1, 2, 2)), "map.1", "logits"),),
    "a tensor of two layers": (step(Point(SHARED), "map.1", "a"), step(Point(SHARED), "a", "b"), step(Add(), "a b", "c")),
    "features and a gate": (
        step(Mean(), "map.1", "pooled"), step(Concat(), "pooled features", "all"), step(Point(drawn(6, 2, 5)), "all", "two"),
        step(Concat(), "map.1 map.1", "wide"), step(Point(drawn(7, 2, 4)), "wide", "narrow"),
        step(Activation("sigmoid"), "narrow", "gate"), step(Multiply(), "map.1 gate", "gated"),
        step(Add(), "gated gated gated", "logits"),
    )[3:],
}  # fmt: skip


@pytest.mark.parametrize("runtime", NAMES)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_by_itself_is_what_it_says_in_numpy_and_in_torch(name: str, runtime: str) -> None:
    head = MapHead(name="what", answer="mask", labels=("land", "water"), steps=HEADS[name])
    maps = {
        each.name: drawn(number, 3, *each.shape)
        for number, each in enumerate((FINE, COARSE))
        if each.name in head.inputs
    }
    opener = RUNTIMES[runtime].open_head
    assert opener is not None

    file = head_file([head], (FINE, COARSE), 3)
    (got,) = opener(file, 1, RUNTIMES[runtime].where)(maps)

    expected = head(maps)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with torch.no_grad():
        in_torch = HeadNetwork(head)({key: torch.from_numpy(x) for key, x in maps.items()}).numpy()
    np.testing.assert_allclose(in_torch, expected, atol=1e-5)
    assert set(file.inputs) == set(head.inputs)
    if name == "a tensor of two layers":
        assert len(file.tensors) == 1


# ------------------------------------------------------------------------------------------------- maps out of graphs


def convnet() -> Backbone:
    module = seeded(timm.create_model("test_convnext", pretrained=False, num_classes=0), 5).eval()
    return Backbone.from_module(module, name="convnext", preprocess=Preprocess(image_size=(64, 96)))


def channels_last() -> Backbone:
    module = seeded(timm.create_model("test_mambaout", pretrained=False, num_classes=0), 5).eval()
    return Backbone.from_module(module, name="mambaout", preprocess=Preprocess(image_size=(64, 64)))


MAKERS: dict[str, Callable[[Path], Backbone]] = {
    "tokens": lambda folder: tiny_vit(folder, 5),
    "nchw": lambda folder: convnet(),
    "nhwc": lambda folder: channels_last(),
}


@pytest.fixture(scope="module", params=MAKERS)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, BaseGraph]:
    folder = tmp_path_factory.mktemp(request.param)
    backbone = MAKERS[request.param](folder)
    graph = base_graph(backbone, root=folder)
    assert {each.layout for each in graph.maps} == {request.param}
    return backbone, graph


@pytest.mark.parametrize("runtime", NAMES)
def test_a_graph_puts_out_the_maps_that_torch_has(traced: tuple[Backbone, BaseGraph], runtime: str) -> None:
    backbone, graph = traced
    images = random_images(3, 2, backbone.preprocess.image_size)
    names = ["map.3", "features", "map.0"]
    opener = RUNTIMES[runtime].open_part
    assert opener is not None
    assert tuple(each.map for each in graph.maps) == backbone.maps

    network = opener(part_of(graph).putting_out(graph.maps, names), {}, 1, RUNTIMES[runtime].where)
    got = dict(zip(names, network.bind({}).outputs(images), strict=True))
    network.close()

    with torch.no_grad(), taking(backbone.module, backbone.maps) as taken:
        features = backbone.module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got["features"], features, atol=1e-4 * np.abs(features).max())
    for name in ("map.0", "map.3"):
        np.testing.assert_allclose(got[name], taken[name].numpy(), atol=1e-4 * float(taken[name].abs().max()))


def test_who_classifies_runs_the_file_that_puts_out_features_alone(traced: tuple[Backbone, BaseGraph]) -> None:
    _, graph = traced
    session = open_session(graph.model_path)

    assert [entry.name for entry in session.get_outputs()] == ["features"]


def test_what_no_map_needs_is_not_computed(traced: tuple[Backbone, BaseGraph]) -> None:
    _, graph = traced
    whole = part_of(graph).file

    early = part_of(graph).putting_out(graph.maps, ["map.0"]).file

    assert len(early.nodes) < 0.6 * len(whole.nodes)
    assert set(early.tensors) - {name for name in early.tensors if name.startswith("edgepet.map.")} < set(whole.tensors)


@pytest.mark.parametrize("runtime", NAMES)
def test_a_head_behind_a_graph_gives_logits_and_a_mask(traced: tuple[Backbone, BaseGraph], runtime: str) -> None:
    """Of 64 x 96 pixels, or of 32: no two sides of a map are alike, and a mask is as large as the input."""
    backbone, graph = traced
    first, last = graph.maps[0].map, graph.maps[-1].map
    steps = [step(Point(drawn(1, 3, last.channels), drawn(2, 3)), "map.3", "last")]
    if first.height > last.height:
        steps.append(step(Resize(first.height // last.height), "last", "up"))
    steps += [
        step(Point(drawn(3, 3, first.channels)), "map.0", "first"),
        step(Add(), f"first {steps[-1].gives}", "sum"),
    ]
    head = MapHead(name="what", answer="mask", labels=("a", "b", "c"), steps=tuple(steps))
    size, images = backbone.preprocess.image_size, random_images(3, 2, backbone.preprocess.image_size)

    file = with_head(part_of(graph).file, [head], graph.maps, graph.width, size)
    session = open_session(file.encoded(), folder=graph.folder)
    logits, mask = session.run(["logits", "mask"], {"images": images})

    with torch.no_grad(), taking(backbone.module, backbone.maps) as taken:
        backbone.module(torch.from_numpy(images))
    expected = head({name: x.numpy() for name, x in taken.items()})
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert mask.dtype == np.uint8
    assert mask.shape == (2, *size)
    assert (mask == mask_of(logits, size)).mean() >= 0.999


@pytest.mark.parametrize(("side", "pixels"), [(7, 200), (7, 224), (3, 100), (13, 407), (5, 129)])
def test_a_mask_is_as_large_as_the_input_whatever_its_side(side: int, pixels: int) -> None:
    """Scales are rounded to float32: a side must not come out a pixel short."""
    given = Map(name="map.0", point="a:out", channels=2, stride=32, height=side, width=side)
    head = MapHead(
        name="what", answer="mask", labels=("a", "b"), steps=(step(Point(drawn(1, 2, 2)), "map.0", "logits"),)
    )
    file = head_file([head], (given,), 1)
    session = open_session(with_mask(file, (2, side, side), (pixels, pixels)).encoded())
    logits, mask = session.run(["logits", "mask"], {"map.0": drawn(2, 1, 2, side, side)})

    assert mask.shape == (1, pixels, pixels)
    assert (mask == mask_of(logits, (pixels, pixels))).mean() >= 0.999


def test_layers_may_be_called_as_what_makes_the_mask_is() -> None:
    steps = (
        step(Point(drawn(1, 2, 2)), "map.0", "best"), step(Resize(2), "best", "mask"),
        step(Activation("relu"), "mask", "resized"), step(Point(drawn(2, 2, 2)), "resized", "scales"),
    )  # fmt: skip
    given = Map(name="map.0", point="a:out", channels=2, stride=32, height=3, width=3)
    file = head_file([MapHead(name="what", answer="mask", labels=("a", "b"), steps=steps)], (given,), 1)
    session = open_session(with_mask(file, (2, 6, 6), (96, 96)).encoded())

    logits, mask = session.run(["logits", "mask"], {"map.0": drawn(2, 1, 2, 3, 3)})

    assert (mask == mask_of(logits, (96, 96))).mean() >= 0.999


# ------------------------------------------------------------------------------------------------------- descriptions


def changed(graph: BaseGraph, change: Callable[[Any], None]) -> Path:
    path = graph.folder / f"{graph.stem}.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_bytes(canonical_json(told))
    return path


@pytest.fixture(scope="module")
def of_tokens(tmp_path_factory: pytest.TempPathFactory) -> BaseGraph:
    folder = tmp_path_factory.mktemp("of_tokens")
    return base_graph(tiny_vit(folder, 5), root=folder)


def test_a_description_without_maps_is_read_and_made_again_where_they_are_needed(tmp_path: Path) -> None:
    """As earlier versions wrote them: the file of the graph is the same."""
    backbone = tiny_vit(tmp_path, 5)
    graph = base_graph(backbone, root=tmp_path)
    digest = hashlib.sha256(graph.model_path.read_bytes()).hexdigest()
    changed(graph, lambda told: told.pop("maps"))

    assert open_graph(graph.fingerprint, graph.preprocess, root=tmp_path).maps == ()
    assert base_graph(backbone, root=tmp_path).maps == ()
    again = base_graph(backbone, root=tmp_path, needs_maps=True)

    assert again.maps == graph.maps
    assert hashlib.sha256(again.model_path.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda maps: maps[0].update(name="fine"), "graph-32.json.maps[0]: needs at most 16 maps, each with a name of its own such as map.0, got 'fine'"),
        (lambda maps: maps[1].update(name="map.0"), "graph-32.json.maps[1]: needs at most 16 maps, each with a name of its own such as map.0, got 'map.0'"),
        (lambda maps: maps[0].update(channels=0), "graph-32.json.maps[0].channels: needs an integer of at least 1, got 0"),
        (lambda maps: maps[0].update(height=65537), "graph-32.json.maps[0].height: needs at most 65536, got 65537"),
        (lambda maps: maps[0].update(layout="chw"), "graph-32.json.maps[0].layout: needs one of nchw, nhwc, tokens, got 'chw'"),
        (lambda maps: maps[0].update(more=1), "graph-32.json.maps[0]: knows no key 'more'\n  fix: update edgepet if a newer version wrote this file"),
        (lambda maps: maps[0].pop("tensor"), "graph-32.json.maps[0]: needs the key 'tensor'"),
    ],
)  # fmt: skip
def test_a_malformed_map_names_the_place(
    change: Callable[[Any], Any], told: str, of_tokens: BaseGraph, tmp_path: Path
) -> None:
    folder = graph_folder(of_tokens.fingerprint, tmp_path)
    shutil.copytree(of_tokens.folder, folder)
    graph = replace(of_tokens, folder=folder)
    changed(graph, lambda given: change(given["maps"]))

    with pytest.raises(InputError) as error:
        open_graph(graph.fingerprint, graph.preprocess, root=tmp_path)
    assert str(error.value) == told


def test_a_map_of_no_tensor_is_refused(traced: tuple[Backbone, BaseGraph]) -> None:
    _, graph = traced

    with pytest.raises(InputError) as error:
        part_of(graph).putting_out((), ["map.0"])
    assert str(error.value) == (
        "map.0: is no map of the graph, got none\n"
        "  fix: make the graph again with this edgepet, from the backbone that the task was trained on"
    )
