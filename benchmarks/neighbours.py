"""int8 by other people's libraries, as their documents say for a network: NNCF, and ONNX Runtime's ``quantize_static``.

``python benchmarks/int8.py`` measures them beside edgepet, on the same fp32 model and the same images. ``SETTINGS`` go
into its result. What they come from:

- NNCF quantises a model of the runtime that runs it: OpenVINO's for OpenVINO, the ONNX file for ONNX Runtime.
- ``model_type=TRANSFORMER`` is for transformers. On an ONNX file whose weights lie behind a transposition its smoothing
  fails in NNCF 3.4 ("'NoneType' object has no attribute 'shape'"), so there it goes without, with the mixed preset that
  it would have.
- ``HISTOGRAM`` is one of NNCF's estimators of activations' ranges. The default, the mean of each image's extremes,
  loses DINOv2, whose blocks have activations of hundreds in few places: 39 % of 200 images of landcover where fp32 has
  66.0, and 66.5 with histograms. Smoothing alone does not mend it: 48 % without any, 39 % with an alpha of 0.15.
- ``fast_bias_correction=False`` is what NNCF advises for MobileNet-like networks.
- ONNX Runtime asks for ``quant_pre_process`` first, which folds batch norms and pads into convolutions, for weights per
  channel, and for unsigned activations on x86.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from edgepet.calibration.rewriting import folded
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.openvino import OpenVino
from edgepet.device.runner import Runner
from edgepet.spec import NpArray

SETTINGS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "transformer": {
        "nncf openvino": {"model_type": "transformer", "activations_range_estimator": "HISTOGRAM"},
        "nncf onnxruntime": {"preset": "mixed", "activations_range_estimator": "HISTOGRAM"},
        "quantize_static onnxruntime": {"per_channel": True, "activation_type": "QUInt8", "calibrate_method": "MinMax"},
    },
    "convnet": {
        "nncf openvino": {"fast_bias_correction": False},
        "nncf onnxruntime": {"fast_bias_correction": False},
        "quantize_static onnxruntime": {
            "per_channel": True, "activation_type": "QUInt8", "calibrate_method": "Percentile",
        },
    },
}  # fmt: skip

OPENED: Mapping[str, Callable[[Path], Runner]] = {"onnxruntime": OnnxRuntime.of_model, "openvino": OpenVino.of_model}


def kind_of(model: Any) -> str:
    """Which ``SETTINGS`` an ONNX model gets: patches are one convolution."""
    return "convnet" if sum(node.op_type == "Conv" for node in model.graph.node) > 1 else "transformer"


def neighbours(fp32: Any, images: NpArray, folder: Path) -> Iterator[tuple[str, Runner]]:
    """The int8 networks of ``quantised``, opened, each with its tool."""
    for name, path in quantised(fp32, images, folder):
        tool, runtime = name.split()
        yield tool, OPENED[runtime](path)


def quantised(fp32: Any, images: NpArray, folder: Path) -> Iterator[tuple[str, Path]]:
    """The int8 files that others make of an fp32 ONNX model and calibration images (n, 3, h, w), by "TOOL RUNTIME".

    They go into ``folder``. Batch norms are folded into convolutions first, as all of them ask.
    """
    settings, model = SETTINGS[kind_of(fp32)], folded(fp32)
    path = folder / "neighbour.onnx"
    onnx.save(model, path)
    yield (name := "nncf openvino"), _nncf_openvino(path, images, settings[name])
    yield (name := "nncf onnxruntime"), _nncf_onnx(model, images, settings[name], folder)
    yield (name := "quantize_static onnxruntime"), _static(path, images, settings[name])


def _nncf_openvino(path: Path, images: NpArray, settings: Mapping[str, object]) -> Path:
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    made, rows = path.with_name("nncf.xml"), nncf.Dataset([images[i : i + 1] for i in range(len(images))])
    quantised = nncf.quantize(openvino.Core().read_model(path), rows, subset_size=len(images), **_nncf(settings))
    openvino.save_model(quantised, made, compress_to_fp16=False)
    return made


def _nncf_onnx(model: Any, images: NpArray, settings: Mapping[str, object], folder: Path) -> Path:
    import nncf

    nncf.set_log_level("ERROR")
    rows = nncf.Dataset([images[i : i + 1] for i in range(len(images))], lambda image: {"images": image})
    onnx.save(nncf.quantize(model, rows, subset_size=len(images), **_nncf(settings)), folder / "nncf.onnx")
    return folder / "nncf.onnx"


def _nncf(settings: Mapping[str, object]) -> dict[str, Any]:
    """The arguments of ``nncf.quantize``."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    made: dict[str, Any] = dict(settings)
    if "model_type" in made:
        made["model_type"] = nncf.ModelType(made["model_type"])
    if "preset" in made:
        made["preset"] = nncf.QuantizationPreset(made["preset"])
    if "activations_range_estimator" in made:
        estimator = getattr(RangeEstimatorParametersSet, made.pop("activations_range_estimator"))
        made["advanced_parameters"] = AdvancedQuantizationParameters(activations_range_estimator_params=estimator)
    return made


def _static(path: Path, images: NpArray, settings: Mapping[str, Any]) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
        def __init__(self) -> None:
            self._left = iter([{"images": images[i : i + 1]} for i in range(len(images))])

        def get_next(self) -> dict[str, NpArray] | None:
            return next(self._left, None)

    prepared, made = path.with_name("prepared.onnx"), path.with_name("static.onnx")
    logging.getLogger().setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # a line for each histogram
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(made), Reader(), per_channel=settings["per_channel"],
            activation_type=QuantType[settings["activation_type"]], weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[settings["calibrate_method"]],
        )  # fmt: skip
    return made
