"""The heads of an exported model in its manifest: what each answers, its probe, and how it was compared."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, cast

import numpy as np

from edgepet.deltas.heads import ANSWERS, Answer, Meaning
from edgepet.device.runner import ModelRunner
from edgepet.errors import InputError
from edgepet.graphs.head_graph import OUTPUTS
from edgepet.images.pixels import pixels_of
from edgepet.images.preprocess import normalize
from edgepet.measuring.parity import Against, Inputs, Parity
from edgepet.spec import NpArray, Preprocess
from edgepet.strict import ObjectReader

_MOST_PLACES = 1 << 24  # of a probe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacesProbe:
    """Of a head for masks the label of every place of its map, uint8 (n, h, w), and the largest of all its logits."""

    labels: NpArray
    largest: float


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
class HeadFacts:
    """One head of a model: what it answers, what it gives to the images of a probe, and how it was compared."""

    meaning: Meaning
    probe: Probe
    parity: Parity | None


class OneHead:
    """A model with several heads as if it had one of them alone: what it puts out from ``first`` to before ``last``."""

    def __init__(self, runner: ModelRunner, first: int, last: int) -> None:
        self._runner, self._first, self._last = runner, first, last
        self.runtime, self.executed = runner.runtime, runner.executed

    @property
    def evidence(self) -> Mapping[str, object]:
        """The model's."""
        return self._runner.evidence

    def __call__(self, images: NpArray) -> NpArray:
        return self.outputs(images)[0]

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that the head puts out."""
        return self._runner.outputs(images)[self._first : self._last]

    def close(self) -> None:
        """Give the model back."""
        self._runner.close()


def head_json(each: HeadFacts) -> dict[str, object]:
    """What the manifest says of a head: of several in a list, of one beside all else."""
    parity = asdict(each.parity) if each.parity else None
    for later in ("near_ties", "places", "boxes", "labels"):
        if parity and not parity[later]:
            del parity[later]  # there where they say something: earlier readers take all else
    meaning, places = each.meaning, each.probe.places
    probe = {
        "seed": each.probe.seed,
        "shape": list(each.probe.logits.shape),
        "logits": base64.b64encode(np.ascontiguousarray(each.probe.logits, "<f4").tobytes()).decode("ascii"),
        **({} if places is None else {"places": _places_json(places)}),
    }
    told: dict[str, object] = {"labels": list(meaning.labels), "parity": parity, "probe": probe}
    if meaning.answer != "class":
        told |= {"answer": meaning.answer, "outputs": list(OUTPUTS[meaning.answer])}
    if meaning.answer == "labels":
        told["thresholds"] = list(meaning.thresholds)
    return told


def read_heads(table: ObjectReader, where: str) -> list[HeadFacts]:
    """The heads that a manifest tells of: one in itself, or several in a list."""
    if not table.has("heads"):
        return [_head(table, _answer(table), None, where)]
    tables = table.nested_list("heads")
    found = [_head(each, _answer(each), each.text("name"), each.where) for each in tables]
    for each in tables:
        each.end()
    names = [each.meaning.name for each in found]
    if len(found) < 2 or len(set(names)) < len(names) or any(each.meaning.answer == "class" for each in found):
        raise table.refusal("heads", "needs two heads or more with names of their own, none of which classifies")
    return found


def _head(table: ObjectReader, answer: Literal["class"] | Answer, name: str | None, where: str) -> HeadFacts:
    labels = table.texts("labels")
    thresholds = table.numbers("thresholds", count=len(labels)) if answer == "labels" else ()
    probe = _probe(table.nested("probe"))
    if probe.logits.shape[1:] != (len(labels),):
        raise InputError(f"{where}: probe", f"needs {len(labels)} logits an image", got=probe.logits.shape)
    meaning = Meaning(name=name or answer, answer=answer, labels=labels, thresholds=thresholds)
    return HeadFacts(meaning=meaning, probe=probe, parity=_parity(table))


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
