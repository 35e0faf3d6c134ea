"""An exported model folder: the model, and ``artifact.json`` that says what it is and what was checked.

The format is docs/spec/artifact-v1.md; this file is that page in code.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np

from edgepet.canonical import canonical_json
from edgepet.deltas.heads import ANSWERS, Answer
from edgepet.device.pixels import FromPixels
from edgepet.device.runner import ModelRunner
from edgepet.device.runtimes import FORMATS, Format
from edgepet.errors import EdgepetError, InputError
from edgepet.files import write_file
from edgepet.graphs.head_graph import OUTPUTS
from edgepet.graphs.manifest import Listed, listed_files, read_manifest
from edgepet.images.pixels import pixels_of
from edgepet.images.preprocess import normalize
from edgepet.measuring.parity import Against, Inputs, Parity
from edgepet.packs.codecs import CODECS
from edgepet.spec import NpArray, Precision, Preprocess, StoredPrecision, read_preprocess
from edgepet.strict import ObjectReader

FORMAT, VERSION = "edgepet-artifact", 1
MANIFEST = "artifact.json"
_MOST_PLACES = 1 << 24  # of a probe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacesProbe:
    """Of a head for masks the label of every place of its map, uint8 (n, h, w), and the largest of all its logits."""

    labels: NpArray
    largest: float


Takes: TypeAlias = Literal["float32", "uint8", "uint8, any size"]
TAKES: tuple[Takes, ...] = ("float32", "uint8", "uint8, any size")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """Seeded noise images, and the float32 logits (n, C) that the model must give them again.

    They are the merged network's in torch, and of an int8 model those of the same codes in ONNX Runtime. Of masks they
    are means over places (``deltas.probe.condensed``), with what ``places`` has; of boxes ``condensed_boxes``.
    """

    seed: int
    logits: NpArray
    places: PlacesProbe | None = None

    def images(self, preprocess: Preprocess, *, pictures: bool = False) -> NpArray:
        """The inputs again: standard normal, float32 (n, 3, H, W), or (n, frames, 3, H, W); ``pictures``: the nearest
        that pixels of 8 bits can be.
        """
        shape = (len(self.logits), *preprocess.input_shape)
        drawn = np.random.default_rng(self.seed).standard_normal(shape, dtype=np.float32)
        return normalize(pixels_of(drawn, preprocess), preprocess) if pictures else drawn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Artifact:
    """The manifest of one exported model. ``verified`` is false, with a ``reason``, where nothing could run it.

    ``labels`` are in the order of the logits, ``answer`` says of what: an image, each of its pixels, or boxes.
    ``codec`` is the pack's, ``branches`` how many stayed in the graph. ``files`` are name -> (hex sha256, size in
    bytes), ``versions`` package -> version of what wrote it. ``parity`` is None where nothing was run. ``evidence``
    says how its precision is known: what is stored, what was executed, and what stayed fp32 and why. ``thresholds`` are
    those of a head that answers labels. ``takes`` is what
    the model does: preprocessed float32 images, pictures of its size, uint8 (n, H, W, 3), or of any size, which it
    resizes.
    """

    task: str
    format: Format
    engine: str
    precision: StoredPrecision
    labels: tuple[str, ...]
    preprocess: Preprocess
    backbone: str
    fingerprint: str
    method: str
    branches: int
    pack_sha256: str
    codec: str
    files: Listed
    versions: Mapping[str, object]
    verified: bool
    reason: str | None
    parity: Parity | None
    probe: Probe
    evidence: Mapping[str, object]
    answer: Literal["class"] | Answer = "class"
    thresholds: tuple[float, ...] = ()
    takes: Takes = "float32"


def files_of(folder: Path) -> tuple[str, ...]:
    """What an exported model's folder may hold to be replaced: the manifest and what it lists; nothing without one."""
    if not (folder / MANIFEST).is_file():
        return ()
    try:
        return (MANIFEST, *listed_files(read_manifest(folder / MANIFEST, where=MANIFEST, fix="")))
    except EdgepetError:
        return (MANIFEST,)


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Write the manifest into ``folder``; the files that it names must be there.

    Raises:
        InputError: it cannot be written.
    """
    parity = asdict(artifact.parity) if artifact.parity else None
    for later in ("near_ties", "places", "boxes", "labels"):
        if parity and not parity[later]:
            del parity[later]  # there where they say something: earlier readers take all else
    places = artifact.probe.places
    probe = {
        "seed": artifact.probe.seed,
        "shape": list(artifact.probe.logits.shape),
        "logits": base64.b64encode(np.ascontiguousarray(artifact.probe.logits, "<f4").tobytes()).decode("ascii"),
        **({} if places is None else {"places": _places_json(places)}),
    }
    manifest: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "task": artifact.task,
        "model_format": artifact.format,
        "engine": artifact.engine,
        "precision": artifact.precision,
        "labels": list(artifact.labels),
        "preprocess": artifact.preprocess.as_json(),
        "backbone": {"name": artifact.backbone, "fingerprint": artifact.fingerprint},
        "method": artifact.method,
        "branches": artifact.branches,
        "pack": {"sha256": artifact.pack_sha256, "codec": artifact.codec},
        "files": {name: {"sha256": digest, "bytes": size} for name, (digest, size) in artifact.files.items()},
        "versions": dict(artifact.versions),
        "verified": artifact.verified,
        "reason": artifact.reason,
        "parity": parity,
        "probe": probe,
        "evidence": artifact.evidence,
        **(
            {} if artifact.answer == "class" else {"answer": artifact.answer, "outputs": list(OUTPUTS[artifact.answer])}
        ),
    }
    if artifact.answer == "labels":
        manifest["thresholds"] = list(artifact.thresholds)
    if artifact.takes != "float32":  # a key that earlier readers refuse: they would feed it floats
        manifest["takes"] = artifact.takes
    write_file(folder / MANIFEST, canonical_json(manifest))


def read_artifact(folder: Path) -> Artifact:
    """Read the manifest of ``folder`` strictly; the files are not hashed here, see ``manifest.damaged``.

    Raises:
        InputError: no artefact, or a manifest that is damaged or that this version does not know.
    """
    path = folder / MANIFEST
    table = read_manifest(path, where=str(path), fix="export it again")
    table.text("format", choices=[FORMAT])
    if table.integer("version") != VERSION:
        raise InputError(str(path), f"this edgepet reads artefacts of version {VERSION}", got=table.integer("version"))
    backbone, pack = table.nested("backbone"), table.nested("pack")
    answer, labels = _answer(table), table.texts("labels")
    artifact = Artifact(
        task=table.text("task"),
        format=cast(Format, table.text("model_format", choices=list(FORMATS))),
        engine=table.text("engine"),
        precision=cast(StoredPrecision, table.text("precision", choices=["fp32", "fp16", "int8"])),
        labels=labels,
        preprocess=read_preprocess(table.nested("preprocess")),
        backbone=backbone.text("name"),
        fingerprint=backbone.text("fingerprint"),
        method=table.text("method"),
        branches=table.integer("branches"),
        pack_sha256=pack.text("sha256"),
        codec=pack.text("codec", choices=(*CODECS, "mixed")),
        files=listed_files(table),
        versions=_versions(table.nested("versions")),
        verified=table.boolean("verified"),
        reason=None if table.absent("reason") else table.text("reason"),
        parity=_parity(table),
        probe=_probe(table.nested("probe")),
        evidence=_evidence(table),
        answer=answer,
        thresholds=table.numbers("thresholds", count=len(labels)) if answer == "labels" else (),
        takes=cast(Takes, table.text("takes", choices=TAKES)) if table.has("takes") else "float32",
    )
    for part in (backbone, pack, table):
        part.end()
    if artifact.probe.logits.shape[1:] != (len(artifact.labels),):
        raise InputError(
            f"{path}: probe", f"needs {len(artifact.labels)} logits an image", got=artifact.probe.logits.shape
        )
    return artifact


def open_artifact(
    folder: Path, artifact: Artifact, *, threads: int | None = None, precision: Precision = "fp32",
    device: str | None = None,
) -> ModelRunner:  # fmt: skip
    """Open the model in ``folder`` on the runtime of its format; it takes images and puts out logits (n, C).

    Of masks they are (n, C, h, w), of boxes (n, m, 6). One that takes pictures is given preprocessed images
    all the same, see ``FromPixels``.

    Of its files only a TensorRT engine is hashed here, see ``manifest.damaged``.

    Args:
        threads: None is all cores; a GPU takes none.
        precision: what a model of floats is computed in, one that its runtime ``computes`` in.
        device: one of ``DEVICES``; None is the runtime's usual one.

    Raises:
        InputError: the runtime has no such device, cannot read it, or it is another engine's.
        MissingError: the runtime, or a GPU, is not here.
    """
    row = FORMATS[artifact.format].on(device)
    runner = row.open_model(folder, threads, precision, row.where)
    if artifact.takes == "float32":
        return runner
    return FromPixels(runner, artifact.preprocess, resizes=artifact.takes != "uint8")


def _versions(table: ObjectReader) -> dict[str, object]:
    return {name: table.text(name) for name in table.names()}


def _evidence(table: ObjectReader) -> dict[str, object]:
    if not table.has("evidence"):  # edgepet 0.1 before fp16 wrote none
        return {}
    evidence = table.nested("evidence")
    return {name: evidence.raw(name) for name in evidence.names()}


def _parity(table: ObjectReader) -> Parity | None:
    if table.absent("parity"):
        return None
    entry = table.nested("parity")
    parity = Parity(
        max_abs=entry.number("max_abs"),
        limit=None if entry.absent("limit") else entry.number("limit"),
        top1_agreement=entry.number("top1_agreement"),
        least_agreement=entry.number("least_agreement"),
        n=entry.integer("n"),
        inputs=cast(Inputs, entry.text("inputs", choices=["data", "work", "synthetic"])),
        against=cast(Against, entry.text("against", choices=["tuned", "merged"])),
        near_ties=entry.integer("near_ties") if entry.has("near_ties") else 0,  # earlier artefacts allowed none
        places=entry.boolean("places") if entry.has("places") else False,
        boxes=entry.boolean("boxes") if entry.has("boxes") else False,
        labels=entry.boolean("labels") if entry.has("labels") else False,
    )
    entry.end()
    return parity


def _probe(entry: ObjectReader) -> Probe:
    shape = entry.integers("shape", least=1)
    try:
        logits = np.frombuffer(base64.b64decode(entry.text("logits"), validate=True), "<f4").reshape(shape)
    except ValueError as error:
        raise InputError(entry.where, "holds no logits of its shape", got=error) from error
    places = _places(entry.nested("places")) if entry.has("places") else None
    probe = Probe(seed=entry.integer("seed"), logits=logits, places=places)
    entry.end()
    return probe


def _places_json(places: PlacesProbe) -> dict[str, object]:
    packed = zlib.compress(np.ascontiguousarray(places.labels, np.uint8).tobytes(), 9)
    text = base64.b64encode(packed).decode("ascii")
    return {"shape": list(places.labels.shape), "labels": text, "largest": places.largest}


def _places(table: ObjectReader) -> PlacesProbe:
    shape = table.integers("shape", least=1)
    unpacker, size = zlib.decompressobj(), math.prod(shape)
    try:
        packed = base64.b64decode(table.text("labels"), validate=True)
        data = unpacker.decompress(packed, min(size, _MOST_PLACES) + 1)
        labels = np.frombuffer(data, np.uint8).reshape(shape)
    except (ValueError, zlib.error) as error:
        raise InputError(table.where, "holds no labels of its shape", got=error) from error
    made = PlacesProbe(labels=labels, largest=table.number("largest"))
    table.end()
    return made


def _answer(table: ObjectReader) -> Literal["class"] | Answer:
    """What it answers; an artefact that does not say so answers classes."""
    if not table.has("answer"):
        return "class"
    answer = cast(Answer, table.text("answer", choices=ANSWERS))
    if table.texts("outputs") != OUTPUTS[answer]:
        raise table.refusal("outputs", f"needs {', '.join(OUTPUTS[answer])}")
    return answer
