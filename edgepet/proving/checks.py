"""Comparisons of an exported model's answers with those that it must give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from edgepet.device.artifact import Artifact
from edgepet.measuring.parity import SAME_CODES, compare
from edgepet.spec import NpArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison: ``value`` must not be above ``limit``."""

    name: str
    ok: bool
    value: float
    limit: float


def check_probe(artifact: Artifact, got: NpArray) -> Check:
    """Logits ``got`` (n, C) of the probe's images against those of when the artefact was made.

    ``value`` is their largest difference; of an int8 model on the nearer half of the images (``parity.SAME_CODES``).
    """
    stored = SAME_CODES if artifact.precision == "int8" else artifact.precision
    parity = compare(artifact.probe.logits, got, stored=stored, inputs="synthetic", against="merged")
    return Check(name="probe", ok=parity.ok, value=parity.max_abs, limit=cast(float, parity.limit))


def check_data(artifact: Artifact, merged: NpArray, got: NpArray) -> Check:
    """Logits ``got`` (n, C) of images against those of the merged network, ``merged`` (n, C).

    ``value`` is their largest difference; of an int8 model the part of the images whose top-1 differs.
    """
    parity = compare(merged, got, stored=artifact.precision, inputs="data", against="merged")
    if artifact.precision == "int8":
        value, limit = 1 - parity.top1_agreement, 1 - parity.least_agreement
        return Check(name="data top-1", ok=parity.ok, value=value, limit=limit)
    return Check(name="data", ok=parity.ok, value=parity.max_abs, limit=cast(float, parity.limit))
