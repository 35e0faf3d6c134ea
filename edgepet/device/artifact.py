"""An exported model folder: the model, and ``artifact.json`` that says what it is and what was checked.

The format is docs/spec/artifact-v1.md; this file is that page in code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, cast

from edgepet.canonical import canonical_json
from edgepet.deltas.heads import Answer, Meaning
from edgepet.device.model_heads import HeadFacts, OneHead, Probe, head_json, read_heads
from edgepet.device.pixels import FromPixels
from edgepet.device.runner import ModelRunner
from edgepet.device.runtimes import FORMATS, Format
from edgepet.errors import EdgepetError, InputError
from edgepet.files import write_file
from edgepet.graphs.head_graph import OUTPUTS
from edgepet.graphs.manifest import Listed, listed_files, read_manifest
from edgepet.measuring.parity import Parity
from edgepet.packs.codecs import CODECS
from edgepet.spec import Precision, Preprocess, StoredPrecision, read_preprocess
from edgepet.strict import ObjectReader

FORMAT, VERSION = "edgepet-artifact", 1
MANIFEST = "artifact.json"


Takes: TypeAlias = Literal["float32", "uint8", "uint8, any size"]
TAKES: tuple[Takes, ...] = ("float32", "uint8", "uint8, any size")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Artifact:
    """The manifest of one exported model. ``verified`` is false, with a ``reason``, where nothing could run it.

    ``labels`` are in the order of the logits, ``answer`` says of what: an image, each of its pixels, or boxes.
    ``codec`` is the pack's, ``branches`` how many stayed in the graph. ``files`` are name -> (hex sha256, size in
    bytes), ``versions`` package -> version of what wrote it. ``parity`` is None where nothing was run. ``evidence``
    says how its precision is known: what is stored, what was executed, and what stayed fp32 and why. ``thresholds`` are
    those of a head that answers labels. Of several heads ``answer``, ``labels``, ``thresholds``, ``parity`` and
    ``probe`` are the first's, which is called ``head``, and ``further`` are the others. ``takes`` is what
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
    head: str = ""
    further: tuple[HeadFacts, ...] = ()
    takes: Takes = "float32"

    @property
    def heads(self) -> tuple[HeadFacts, ...]:
        """All of its heads."""
        name = self.head or self.answer
        meaning = Meaning(name=name, answer=self.answer, labels=self.labels, thresholds=self.thresholds)
        return (HeadFacts(meaning=meaning, probe=self.probe, parity=self.parity), *self.further)

    def of_head(self, place: int) -> Artifact:
        """The same as if it had one of its heads alone."""
        meaning = self.heads[place].meaning
        return replace(
            self, answer=meaning.answer, labels=meaning.labels, thresholds=meaning.thresholds, head=meaning.name,
            probe=self.heads[place].probe, parity=self.heads[place].parity, further=(),
        )  # fmt: skip

    @property
    def worst(self) -> Parity | None:
        """The comparison of the head that is nearest to its limit."""
        made = [each.parity for each in self.heads if each.parity is not None]
        return max(made, key=lambda parity: parity.max_abs / (parity.limit or math.inf), default=None)

    @property
    def answer_places(self) -> tuple[int, ...]:
        """Where among its outputs each head's answer is, of several heads."""
        counts = [len(OUTPUTS[cast(Answer, each.meaning.answer)]) for each in self.heads] if self.further else [1]
        return tuple(sum(counts[:place]) for place in range(len(counts)))

    def of_head_run(self, runner: ModelRunner, place: int) -> ModelRunner:
        """``runner`` of this model as that of one of its heads."""
        if not self.further:
            return runner
        if isinstance(runner, FromPixels):
            return runner.around(self.of_head_run(runner.runner, place))
        first = self.answer_places[place]
        return OneHead(runner, first, first + len(OUTPUTS[cast(Answer, self.heads[place].meaning.answer)]))


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
    manifest: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "task": artifact.task,
        "model_format": artifact.format,
        "engine": artifact.engine,
        "precision": artifact.precision,
        "preprocess": artifact.preprocess.as_json(),
        "backbone": {"name": artifact.backbone, "fingerprint": artifact.fingerprint},
        "method": artifact.method,
        "branches": artifact.branches,
        "pack": {"sha256": artifact.pack_sha256, "codec": artifact.codec},
        "files": {name: {"sha256": digest, "bytes": size} for name, (digest, size) in artifact.files.items()},
        "versions": dict(artifact.versions),
        "verified": artifact.verified,
        "reason": artifact.reason,
        "evidence": artifact.evidence,
    }
    if artifact.further:
        manifest["heads"] = [{"name": each.meaning.name, **head_json(each)} for each in artifact.heads]
    else:
        manifest |= head_json(artifact.heads[0])
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
    first, *further = read_heads(table, str(path))
    artifact = Artifact(
        task=table.text("task"),
        format=cast(Format, table.text("model_format", choices=list(FORMATS))),
        engine=table.text("engine"),
        precision=cast(StoredPrecision, table.text("precision", choices=["fp32", "fp16", "int8"])),
        labels=first.meaning.labels,
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
        parity=first.parity,
        probe=first.probe,
        evidence=_evidence(table),
        answer=first.meaning.answer,
        thresholds=first.meaning.thresholds,
        head=first.meaning.name,
        further=tuple(further),
        takes=cast(Takes, table.text("takes", choices=TAKES)) if table.has("takes") else "float32",
    )
    for part in (backbone, pack, table):
        part.end()
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
