"""One exported model, as ``export`` reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from edgepet.calibration.budget import Drop
from edgepet.calibration.fp16 import Kept
from edgepet.device.artifact import Artifact
from edgepet.device.runtimes import Format
from edgepet.measuring.parity import Parity
from edgepet.spec import StoredPrecision


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An artefact, where it lies and what it took: ``seconds`` to fold and write, ``verify_seconds`` to compare.

    ``why`` says why "auto" chose this precision. What its manifest says is read from there; JSON has the names in
    ``shown``.
    """

    artifact: Artifact
    path: Path
    size_bytes: int
    seconds: float
    verify_seconds: float
    warning: str | None
    why: str | None = None

    shown: ClassVar[tuple[str, ...]] = (
        *("task", "format", "engine", "precision", "path", "size_bytes", "seconds", "verify_seconds", "verified"),
        *("reason", "parity", "stored", "executed", "kept_fp32", "calibration", "int8", "drop", "warning", "why"),
    )

    @property
    def task(self) -> str:
        """What it answers."""
        return self.artifact.task

    @property
    def format(self) -> Format:
        """One of ``EXPORTERS``."""
        return self.artifact.format

    @property
    def engine(self) -> str:
        """The package that runs it."""
        return self.artifact.engine

    @property
    def precision(self) -> StoredPrecision:
        """What the model stores."""
        return self.artifact.precision

    @property
    def verified(self) -> bool:
        """Whether it was run here, and passed."""
        return self.artifact.verified

    @property
    def reason(self) -> str | None:
        """Why it was not run."""
        return self.artifact.reason

    @property
    def parity(self) -> Parity | None:
        """How far its answers are from the tuned network's; of several heads that of the one nearest to its limit."""
        return self.artifact.worst

    @property
    def stored(self) -> Mapping[str, object]:
        """Tensors and bytes by type."""
        return self._evidence("stored") or {}

    @property
    def executed(self) -> Mapping[str, object]:
        """What the runtime says of its nodes, or what was built where nothing here can run it."""
        return self._evidence("executed") or {}

    @property
    def calibration(self) -> Mapping[str, object] | None:
        """The images that were looked at."""
        return self._evidence("calibration")

    @property
    def int8(self) -> Mapping[str, object] | None:
        """The recipe of int8, and what it costs."""
        return self._evidence("int8")

    @property
    def kept_fp32(self) -> tuple[Kept, ...]:
        """What an fp16 or int8 model computes in fp32."""
        kept = cast("Sequence[Mapping[str, str]]", self.artifact.evidence.get("kept_fp32", ()))
        return tuple(Kept(**node) for node in kept)

    @property
    def drop(self) -> Drop | None:
        """What int8 costs."""
        return Drop(**cast("Mapping[str, Any]", self.int8["drop"])) if self.int8 else None

    def _evidence(self, name: str) -> Mapping[str, object] | None:
        return cast("Mapping[str, object] | None", self.artifact.evidence.get(name))
