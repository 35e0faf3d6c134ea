"""A base graph and a delta in, a model that one runtime opens out. To add a format: its file, and its line here."""

from __future__ import annotations

from edgepet.device.runtimes import Format
from edgepet.exporters import onnx, openvino, tensorrt
from edgepet.exporters.exporter import Exporter

EXPORTERS: dict[Format, Exporter] = {
    "onnx": onnx.export,
    "openvino": openvino.export,
    "tensorrt": tensorrt.export,
}
