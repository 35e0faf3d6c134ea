"""OpenVINO IR from the ONNX model. It stores what was asked for: ``save_model`` alone would halve weights to fp16."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgepet.device.openvino import core
from edgepet.device.refusals import refusing_model
from edgepet.disk import DISK
from edgepet.errors import InputError, first_line, require
from edgepet.exporters.exporter import ExportOptions, Written
from edgepet.exporters.onnx import readable
from edgepet.spec import StoredPrecision

if TYPE_CHECKING:
    from onnx import ModelProto

MODEL = "model.xml"
_MADE_UP = re.compile(r"[A-Za-z]+_\d+")


def write_openvino(onnx_model: bytes | Path, folder: Path, *, where: str) -> list[str]:
    """Convert ``onnx_model`` and write ``model.xml`` and ``model.bin`` in its own precision; returns the file names.

    It is bytes with the weights inside, or a path, beside which they may lie.

    Raises:
        InputError: OpenVINO cannot convert an operator, or the files cannot be written.
        MissingError: OpenVINO is not installed.
    """
    openvino = require("openvino", extra="openvino", purpose="OpenVINO")
    with refusing_model(where, "cannot be converted by OpenVINO", RuntimeError, package="openvino", copied=False):
        model = core().read_model(onnx_model)
    for number, node in enumerate(model.get_ordered_ops()):
        # Names that OpenVINO made up count up over the life of the process: number them by place, for equal bytes.
        if _MADE_UP.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
    names = [MODEL, str(Path(MODEL).with_suffix(".bin"))]
    try:
        openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
        for name in names:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        DISK.sync_folder(folder)
    except (OSError, RuntimeError) as error:
        got = getattr(error, "strerror", None) or first_line(error)
        raise InputError(str(folder / MODEL), "could not be written", got=got) from error
    return names


def export(model: ModelProto, precision: StoredPrecision, folder: Path, options: ExportOptions, task: str) -> Written:
    """Write the IR; see ``Exporter``, and ``write_openvino`` for what it raises."""
    del precision, options
    with readable(model, folder) as source:
        return Written(write_openvino(source, folder, where=task), "openvino")
