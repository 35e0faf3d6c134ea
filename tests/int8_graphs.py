"""int8 graphs under test: a model with what flowed through it, its answers, and look-ups in what a pass made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgepet.calibration.coded_maps import MapForm, find_maps, quantize_maps
from edgepet.calibration.layers import Graph, Layer, find_layers
from edgepet.calibration.observe import Activations, observe
from edgepet.calibration.qdq import Int8, Int8Recipe, quantize
from edgepet.calibration.rewriting import folded
from edgepet.exporters.onnx import serialize
from edgepet.spec import NpArray
from tests.flow import Network
from tests.tiny import random_images

PLAIN = Int8Recipe()
CALIBRATION, IMAGES = random_images(4, 32), random_images(9, 32)
PICTURES = random_images(5, 16, 8)


def run(model: Any, images: NpArray = IMAGES) -> NpArray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    answers: NpArray = session.run(None, {"images": images})[0]
    return answers


def apart(got: NpArray, expected: NpArray) -> float:
    """The largest difference, as a part of the largest logit."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@dataclass(frozen=True)
class Observed:
    """A folded model, its layers, and what flowed through them."""

    name: str
    model: Any
    graph: Graph
    layers: tuple[Layer, ...]
    seen: Mapping[str, Activations]

    @classmethod
    def of(cls, name: str, model: Any, weights: frozenset[str], images: NpArray) -> Observed:
        graph = Graph(folded(model))
        layers = find_layers(graph, weights)
        maps = find_maps(graph, layers, outputs=True).axes
        return cls(name, model, graph, layers, observe(graph.model, layers, images, where=name, also=maps))

    def int8(self, recipe: Int8Recipe = PLAIN) -> Int8:
        return quantize(self.graph, self.layers, self.seen, recipe)

    def maps(self, form: MapForm, recipe: Int8Recipe = PLAIN) -> Int8:
        return quantize_maps(self.graph, self.layers, self.seen, recipe, form)


def observed(made: Network) -> Observed:
    return Observed.of(made.backbone.name, made.model, frozenset(made.graph.base.tensors), CALIBRATION)


def producers(model: Any) -> dict[str, Any]:
    return {name: node for node in model.graph.node for name in node.output}


def tensors(model: Any) -> dict[str, NpArray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def of_type(model: Any, *operators: str) -> list[Any]:
    return [node for node in model.graph.node if node.op_type in operators]


def residual(*, bound: float = 6.0, pad: bool = True, twice: bool = False) -> Any:
    """images -> conv -> a bound -> pad, conv -> + what the bound let through -> ReLU -> conv -> means -> logits (n, 4).

    With ``twice`` the sum is read before its ReLU too.
    """
    rng, made = np.random.default_rng(3), helper.make_node
    values = {f"{n}.weight": rng.normal(0, 0.4, (4, i, 3, 3)) for n, i in (("a", 3), ("b", 4), ("c", 4))}
    values |= {f"{n}.bias": rng.normal(0, 0.5, 4) for n in "abc"} | {"low": np.zeros(()), "high": np.array(bound)}
    stored = {name: value.astype(np.float32) for name, value in values.items()}
    stored |= {"pads": np.array([0, 0, 0, 1, 0, 0, 1, 1]), "axes": np.array([2, 3])}
    nodes = [
        made("Conv", ["images", "a.weight", "a.bias"], ["first"], pads=[1, 1, 1, 1]),
        made("Clip", ["first", "low", "high"], ["bounded"]),
        *([made("Pad", ["bounded", "pads"], ["wide"])] if pad else []),
        made(
            "Conv",
            ["wide" if pad else "bounded", "b.weight", "b.bias"],
            ["second"],
            pads=[1, 0, 0, 0] if pad else [1] * 4,
        ),
        made("Add", ["second", "bounded"], ["sum"]),
        made("Relu", ["sum"], ["positive"]),
        made("Conv", ["positive", "c.weight", "c.bias"], ["other"], pads=[1, 1, 1, 1]),
    ]
    nodes.append(made("Add", ["other", "sum"], ["end"]) if twice else made("Identity", ["other"], ["end"]))
    nodes.append(made("ReduceMean", ["end", "axes"], ["logits"], keepdims=0))
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["batch", 3, 8, 8]), ("logits", ["batch", 4]))
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "residual", ports[:1], ports[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def made_by_hand(model: Any) -> Observed:
    return Observed.of("residual", model, frozenset({"a.weight", "b.weight", "c.weight"}), PICTURES)
