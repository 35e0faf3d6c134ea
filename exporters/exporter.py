"""What every exporter is: a function that writes one task's model in one format, from the one ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from edgepet.device.artifact import Takes
from edgepet.device.runtimes import Format
from edgepet.spec import FilePath, StoredPrecision

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How to export. ``sms`` are compute capabilities of a TensorRT engine, 86 for 8.6.

    ``precision`` "auto" is the fastest of the three that this machine can run within the budget. ``calib`` is a folder
    of labelled images: ranges are measured on ``calib_images`` of them; int8 needs it, fp16 takes what the export is
    compared on without. ``max_drop`` is how many points of top-1 int8 may lose; None only reports them.
    With ``input`` "uint8" models take pictures and normalise them inside, with ``resize`` those of any size.
    ``opset`` is an older one for ONNX files, from 13, that older parsers read; None is that of traced graphs.
    """

    to: tuple[Format, ...] = ("onnx",)
    precision: StoredPrecision | Literal["auto"] = "fp32"
    sms: tuple[int, ...] = (86, 89, 120)
    simplify: bool = False
    external_data: bool = False
    calib: FilePath | None = None
    calib_images: int = 256
    max_drop: float | None = None
    opset: int | None = None
    input: Literal["float32", "uint8"] = "float32"
    resize: bool = False

    @property
    def takes(self) -> Takes:
        """What the models are to take."""
        if self.input == "float32":
            return "float32"
        return "uint8, any size" if self.resize else "uint8"


@dataclass(frozen=True, slots=True)
class Written:
    """Files of one format, the engine that wrote them, and what reading them back could not prove.

    ``layers`` says what a compiled format will execute, where nothing here can run it and be asked.
    """

    files: list[str]
    engine: str
    note: str | None = None
    layers: Mapping[str, object] | None = None


class Exporter(Protocol):
    """Writes one task's model in one format; it never chooses a precision and never changes a weight."""

    def __call__(
        self, model: ModelProto, precision: StoredPrecision, folder: Path, options: ExportOptions, task: str
    ) -> Written:
        """Write ``model``, which is in ``precision`` and is not touched, into the empty ``folder``.

        Args:
            model: takes "images" (batch, 3, H, W), or with an axis of frames, or pictures as of ``taking_pixels``, and
                puts out "logits" (batch, C).
            task: its name, for errors.

        Raises:
            InputError: the format has no such operator, or ``folder`` cannot be written.
            CheckError: what was written is not what can be read.
            MissingError: what writes the format is not installed.
        """
        ...
