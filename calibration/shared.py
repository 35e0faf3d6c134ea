"""One int8 backbone for all tasks: its codes are made once, from its weights alone."""

from __future__ import annotations

from edgepet.calibration.layers import Graph, Layer, find_layers
from edgepet.codes import CodedWeight, coded, norm_smoothing
from edgepet.errors import require
from edgepet.graph import BaseGraph


def backbone_layers(graph: BaseGraph) -> tuple[Layer, ...]:
    """The layers of a traced backbone that have codes."""
    onnx = require("onnx", extra="train", purpose="int8")
    model = onnx.load(str(graph.model_path), load_external_data=False)
    return find_layers(Graph(model), graph.places)


def coded_backbone(graph: BaseGraph, bits: int = 8) -> dict[str, CodedWeight]:
    """The codes of every linear layer and convolution, by the name of its weight; no image is looked at."""
    tensors = graph.base.tensors
    return {
        layer.weight: coded(
            tensors[layer.weight],
            None if layer.norm is None or layer.kind != "linear" else norm_smoothing(tensors, layer.norm, layer.weight),
            bits,
        )
        for layer in backbone_layers(graph)
    }
