"""Comparisons of an exported model's answers with those that it must give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image

from edgepet.deltas.heads import mask_of
from edgepet.deltas.layer import sigmoid
from edgepet.deltas.probe import condensed, told_of
from edgepet.device.artifact import Artifact
from edgepet.device.model_heads import PlacesProbe, Probe
from edgepet.device.pixels import FromPixels
from edgepet.device.runner import ModelRunner
from edgepet.errors import CheckError
from edgepet.images.batches import batched
from edgepet.images.preprocess import normalize, to_pixels
from edgepet.measuring.parity import MASKS, SAME_CODES, STORED, Limit, Parity, compare, require_parity
from edgepet.proving.subject import Subject
from edgepet.spec import NpArray, StoredPrecision

RESIZED: dict[StoredPrecision, float] = {"fp32": 0.01, "fp16": 0.03, "int8": 0.1}  # parts of the largest logit
SCORES = 2e-3  # of scores, which are σ of logits that were rounded to fp16
_SIZES = ((300, 401), (97, 64))  # pixels of the pictures, height and width: one is made smaller, one wider


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
    if artifact.probe.places is not None:
        return _check_places(artifact.probe, artifact.probe.places, got, stored)
    if artifact.answer == "boxes":
        told, expected = told_of(got, artifact.probe.seed, len(artifact.labels)), artifact.probe.logits
        limits = stored if isinstance(stored, Limit) else STORED[stored]
        limit = cast(float, limits.relative) * max(1.0, float(np.abs(expected).max()))
        value = _nearest(np.abs(told - expected).max(axis=1), limits)
        return Check(name="probe", ok=value <= limit, value=value, limit=limit)
    parity = compare(artifact.probe.logits, got, stored=stored, inputs="synthetic", against="merged",
                     thresholds=artifact.thresholds)  # fmt: skip
    return Check(name="probe", ok=parity.ok, value=parity.max_abs, limit=cast(float, parity.limit))


def probe_images(artifact: Artifact) -> NpArray:
    """The probe's images, as the artefact can take them."""
    return artifact.probe.images(artifact.preprocess, pictures=artifact.takes != "float32")


def check_resizing(artifact: Artifact, runner: ModelRunner) -> list[Check]:
    """Of a model that resizes, its answers to pictures of other sizes against those to what Pillow makes of them.

    ``value`` is the largest difference, ``limit`` a part of the largest logit: single pixels are one level off.
    """
    if not isinstance(runner, FromPixels) or artifact.takes != "uint8, any size":
        return []
    rng, found, most = np.random.default_rng(artifact.probe.seed), list[float](), 0.0
    for height, width in _SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        own = runner.runner(np.asarray(picture)[None])
        expected = runner(normalize(to_pixels(picture, artifact.preprocess)[None], artifact.preprocess))
        found.append(float(np.abs(own - expected).max()))
        most = max(most, float(np.abs(expected).max()))
    value, limit = max(found), RESIZED[artifact.precision] * most
    return [Check(name="resizing", ok=value <= limit, value=value, limit=limit)]


def _check_places(probe: Probe, places: PlacesProbe, got: NpArray, stored: StoredPrecision | Limit) -> Check:
    """Of masks: means over places, and the labels of places, of which as many must stay as ``MASKS`` says.

    ``value`` is the largest difference of means; where too many labels changed, the part of them that did.
    """
    limits = stored if isinstance(stored, Limit) else STORED[stored]
    limit = (limits.relative or 0.0) * places.largest
    apart = _nearest(np.abs(condensed(got, probe.seed) - probe.logits).max(axis=1), limits)
    least = MASKS["int8" if isinstance(stored, Limit) else stored]
    changed = (got.argmax(1) != places.labels).mean(axis=(1, 2))
    other = float(changed.mean()) if limits.images == 1 else _nearest(changed, limits)
    if not other <= 1 - least:
        return Check(name="probe pixels", ok=False, value=other, limit=1 - least)
    return Check(name="probe", ok=apart <= limit, value=apart, limit=limit)


def _nearest(apart: NpArray, limits: Limit) -> float:
    """The largest of what images are ``apart`` (n,), of those that are asked for: the nearest ones."""
    return float(np.sort(apart)[math.ceil(limits.images * len(apart)) - 1])


def check_data(artifact: Artifact, merged: NpArray, got: NpArray) -> Check:
    """Logits ``got`` (n, C) of images against those of the merged network, ``merged`` (n, C).

    ``value`` is their largest difference; of an int8 model the part of the images whose top-1 differs.
    """
    parity = compare(merged, got, stored=artifact.precision, inputs="data", against="merged",
                     thresholds=artifact.thresholds)  # fmt: skip
    near = parity.limit is None or parity.max_abs <= parity.limit
    if parity.boxes and near:  # what is said of boxes is said by how many have their like
        return Check(name="data boxes", ok=parity.ok, value=1 - parity.top1_agreement, limit=1 - parity.least_agreement)
    if parity.places and near:  # what is said of masks is said by pixels, where logits are near
        other = 1 - parity.top1_agreement
        return Check(name="data pixels", ok=parity.ok, value=other, limit=1 - parity.least_agreement)
    if artifact.precision == "int8":
        value, limit = 1 - parity.top1_agreement, 1 - parity.least_agreement
        return Check(name="data top-1", ok=parity.ok, value=value, limit=limit)
    return Check(name="data", ok=parity.ok, value=parity.max_abs, limit=cast(float, parity.limit))


def prove(subject: Subject, artifact: Artifact, runner: ModelRunner, *, where: str) -> Parity:
    """Compare an exported model with the merged network, where nothing may be lost, and the tuned one, where storage
    may cost; and with its probe. It runs once on the subject's images and once on the probe's.

    Returns:
        The comparison with the tuned network, or where training left none with the merged one.

    Raises:
        CheckError: one of them says no.
    """
    images, inputs = subject.images
    got = batched(runner, images)
    merged = compare(subject.merged_reference, got, stored=artifact.precision, inputs=inputs, against="merged",
                     thresholds=artifact.thresholds)  # fmt: skip
    require_parity(merged, where)
    parity = subject.judge(got, precision=artifact.precision)
    require_parity(parity, where)
    probe = check_probe(artifact, runner(probe_images(artifact)))
    if not probe.ok:
        what = "must repeat its probe" + (" in pixels" if "pixels" in probe.name else "")
        raise CheckError(where, f"{what} within {probe.limit:.1e}", got=f"{probe.value:.1e}")
    for resized in check_resizing(artifact, runner):
        if not resized.ok:
            what = f"must answer a picture of another size within {resized.limit:.1e} of what Pillow makes of it"
            raise CheckError(where, what, got=f"{resized.value:.1e}")
    if artifact.answer == "mask":
        _require_masks(subject, artifact, batched(lambda batch: runner.outputs(batch)[1], images), where)
    if artifact.answer == "boxes":
        _require_parts(runner.outputs(images[:1]), where)
    if artifact.answer == "labels":
        _require_scores(runner.outputs(images[:1]), where)
    return parity


def _require_parts(outputs: Sequence[NpArray], where: str) -> None:
    """Refuse boxes, scores and labels that are not the columns of what is found."""
    found, boxes, scores, labels = outputs
    same = [np.array_equal(boxes, found[:, :, :4]), np.array_equal(scores, found[:, :, 4])]
    if not all(same) or not np.array_equal(labels, found[:, :, 5]):
        raise CheckError(where, "must put out boxes, scores and labels of what it finds", got="others")


def _require_scores(outputs: Sequence[NpArray], where: str) -> None:
    """Refuse scores that are not σ of the logits beside them, in as many digits as fp16 has."""
    logits, scores = outputs
    apart = float(np.abs(sigmoid(logits.astype(np.float64)) - scores).max())
    if not apart <= SCORES:
        raise CheckError(where, f"must put out the scores of its logits within {SCORES:g}", got=f"{apart:.1e}")


def _require_masks(subject: Subject, artifact: Artifact, got: NpArray, where: str) -> None:
    """Refuse masks (n, H, W) that a model puts out beside its logits where too many pixels are others than in torch."""
    expected = mask_of(subject.merged_reference, artifact.preprocess.image_size)
    same, least = float((expected == got).mean()), MASKS[artifact.precision]
    if not same >= least:
        raise CheckError(where, f"must give masks with {100 * least:.4g}% equal pixels", got=f"{same:.2%}")
