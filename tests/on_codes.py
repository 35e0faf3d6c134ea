"""Tasks on an int8 backbone, and what their numbers say node by node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgepet.calibration.images import CalibrationImages
from edgepet.deltas.delta import Delta
from edgepet.exporters.onnx import serialize
from edgepet.images.sets import ImageSet
from edgepet.proving.precision import Expressed
from edgepet.spec import NpArray, Preprocess
from tests.tiny import random_images

CALIBRATION, IMAGES = random_images(4, 32), random_images(9, 16)


class Noise(CalibrationImages):
    """Normal noise in place of pictures."""

    images = held_out_images = CALIBRATION


class Others(Noise):
    """Pictures of another task."""

    images = held_out_images = 2 * random_images(5, 32)


def noise(preprocess: Preprocess, kind: type[Noise] = Noise) -> Noise:
    """Calibration images of five classes that no file holds."""
    none = ImageSet(tuple("abcde"), (), ())
    return kind(folder=Path(), preprocess=preprocess, measured=none, held_out=none, judged=none, digests={}, seed=0)


@dataclass(frozen=True)
class Task:
    """A task with ranges, and the Q/DQ model of the same numbers; ``made`` has that of each runtime."""

    delta: Delta
    model: Any
    made: Expressed | None = None

    @classmethod
    def of(cls, made: Expressed) -> Task:
        return cls(made.delta, made.model, made)

    def expected(self, images: NpArray = IMAGES, runtime: str = "onnxruntime") -> NpArray:
        """Node by node, as the graph says: ONNX Runtime fuses nothing. But of codes in every map it makes integers, and
        that is what a task's own file is in its hands.
        """
        model = self.model if self.made is None else self.made.model_for(runtime)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if runtime != "onnxruntime" or not has_maps_of_codes(model):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
        answers: NpArray = session.run(None, {"images": images})[0]
        return answers


def has_maps_of_codes(model: Any) -> bool:
    """Whether what its convolutions put out has codes."""
    rounded = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    return sum(node.op_type == "Conv" and node.output[0] in rounded for node in model.graph.node) > 1


def apart(got: NpArray, expected: NpArray) -> NpArray:
    """The largest difference of each image, as a part of the largest logit of all."""
    differences: NpArray = np.abs(got - expected).max(axis=1) / np.abs(expected).max()
    return differences
