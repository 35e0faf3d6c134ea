"""Comparisons of an exported model's answers with those that it must give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from edgepet.device.artifact import Artifact
from edgepet.device.runner import Runner
from edgepet.errors import CheckError
from edgepet.images.batches import batched
from edgepet.measuring.parity import SAME_CODES, Parity, compare, require_parity
from edgepet.proving.subject import Subject
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


def prove(subject: Subject, artifact: Artifact, runner: Runner, *, where: str) -> Parity:
    """Compare an exported model with the merged network, where nothing may be lost, and the tuned one, where storage
    may cost; and with its probe. It runs once on the subject's images and once on the probe's.

    Returns:
        The comparison with the tuned network, or where training left none with the merged one.

    Raises:
        CheckError: one of them says no.
    """
    images, inputs = subject.images
    got = batched(runner, images)
    merged = compare(subject.merged_reference, got, stored=artifact.precision, inputs=inputs, against="merged")
    require_parity(merged, where)
    parity = subject.judge(got, precision=artifact.precision)
    require_parity(parity, where)
    probe = check_probe(artifact, runner(artifact.probe.images(artifact.preprocess)))
    if not probe.ok:
        raise CheckError(where, f"must repeat its probe within {probe.limit:.1e}", got=f"{probe.value:.1e}")
    return parity
