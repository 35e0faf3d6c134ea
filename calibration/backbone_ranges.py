"""The int8 backbone's own ranges: how far activations of the frozen network reach, on the images of some task.

They hold in a trunk that tasks share, so on images of other tasks too: what a code cannot reach there is lost for all
that comes behind it, and a range that is wider than a task's own costs only a part of a code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepet.calibration.coded_maps import find_maps
from edgepet.calibration.layers import Graph, find_layers
from edgepet.calibration.observe import observe
from edgepet.calibration.qdq import choose_ranges
from edgepet.calibration.ranges import Estimator
from edgepet.calibration.rewriting import folded
from edgepet.calibration.shared_maps import shared_ranges
from edgepet.deltas.codes import Range
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.tensor_files import put_inside
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto

ESTIMATOR: Estimator = "min-max"


def backbone_ranges(
    structure: ModelProto, graph: BaseGraph, codes: Int8Graph, images: NpArray, estimator: Estimator = ESTIMATOR
) -> tuple[Range, ...]:
    """A range for each of ``codes.reads``, in binary32.

    Args:
        structure: of ``graph``, an ``onnx.ModelProto`` whose weights are not inside: they are put there.
        images: preprocessed, float32 (n, 3, H, W), or clips.

    Raises:
        InputError: an activation is not finite.
        MissingError: onnx is not installed.
    """
    made = {layer.weight: codes.coded(layer) for layer in codes.layers}
    tensors = {**graph.base.tensors, **{name: each.dense for name, each in made.items()}}
    for tensor in structure.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            put_inside(tensor, tensors[tensor.name])
    model = folded(structure)
    layers = find_layers(Graph(model), frozenset(made))
    maps = find_maps(Graph(model), layers, outputs=True) if codes.coded_maps else None
    seen = observe(model, layers, images, where=graph.backbone, also=maps.axes if maps else None)
    divisors = {layer.reads: made[layer.weight].divisors for layer in codes.layers}
    smooth = {name: value for name, value in divisors.items() if value is not None}
    if maps is not None:
        chosen = shared_ranges(maps, codes.coded_maps, seen, estimator, smooth)
    else:
        chosen = choose_ranges(layers, seen, estimator, smooth)
    return tuple(chosen[name].stored for name in codes.reads)
