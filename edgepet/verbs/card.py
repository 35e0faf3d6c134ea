"""A model card of a pack: Markdown for people, and beside it CycloneDX 1.6 (ECMA-424) with a ``modelCard`` for tools.

Both say what the pack says of itself, and what it does not say. Its texts come from outside: in Markdown they are code
spans, in which nothing is a link, HTML or a table's row, and what steers a terminal or turns a line is in neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import Answer
from edgepet.errors import InputError, option
from edgepet.files import require_file_place, require_other, write_file
from edgepet.measuring.parity import interval
from edgepet.packs.pack import Pack
from edgepet.reports.tables import Table, format_number, format_percent, left, markdown, printable, right

MARKDOWN, CYCLONEDX = ".md", ".cdx.json"
DATA = "data"  # where a pack's ``training`` has the digest of its images, "sha256:" and 64 digits

# Identifiers of weights and images, by how they are compared: as the list has them, or as model hubs do, in lower case.
SPDX = {
    name.lower(): name
    for name in (
        "0BSD", "AFL-3.0", "AGPL-3.0-only", "AGPL-3.0-or-later", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause",
        "BSD-3-Clause", "BSD-3-Clause-Clear", "BSL-1.0", "C-UDA-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0",
        "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0", "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0",
        "CC-BY-ND-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0",
        "CDLA-Sharing-1.0", "ECL-2.0", "EPL-2.0", "EUPL-1.2", "GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-only",
        "GPL-3.0-or-later", "ISC", "LGPL-2.1-only", "LGPL-2.1-or-later", "LGPL-3.0-only", "LGPL-3.0-or-later", "MIT",
        "MIT-0", "MPL-2.0", "MS-PL", "NCSA", "ODC-By-1.0", "ODbL-1.0", "OGL-UK-3.0", "PDDL-1.0", "PSF-2.0", "Unlicense",
        "WTFPL", "Zlib",
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """One of what a pack answers: a ``kind`` of answer, its labels, and the ``value`` of a metric on ``n`` val images.

    ``interval`` is that of ``value``, 95 %, where the pack has what it takes to tell one; ``layers`` are of a head that
    reads maps, by kind, and ``values`` what they hold.
    """

    sentence: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    metric: str
    metric_type: str
    value: float
    n: int
    interval: tuple[float, float] | None = None
    layers: tuple[str, ...] = ()
    values: int = 0


_OF_MAPS: dict[Answer, tuple[str, str, str, str, str]] = {  # how a sentence begins, kind, unit, metric and its type
    "mask": ("A mask of every image in", "semantic segmentation", "pixel", "mIoU", "mean intersection over union"),
    "labels": (
        "The labels that every image has, of",
        "multi-label classification",
        "image",
        "mean AP",
        "mean average precision",
    ),
    "boxes": ("Boxes around the objects of every image, of", "object detection", "object", "AP", "average precision"),
}


def _answers(delta: Delta) -> tuple[_Answer, ...]:
    """What a pack answers, its classifier first."""
    several = "images" if delta.preprocess.frames == 1 else "clips"
    found = []
    if delta.labels:
        low, high = interval(round(delta.val.top1 * delta.val.n), delta.val.n) if delta.val.n else (0.0, 1.0)
        found.append(
            _Answer(
                sentence=f"A classifier of {several} into {_classes(delta.labels)}", kind="classification",
                unit="image", labels=delta.labels, metric="Top-1", metric_type="top-1 accuracy", value=delta.val.top1,
                n=delta.val.n, interval=(low, high),
            )
        )  # fmt: skip
    for each in delta.heads:
        begins, kind, unit, metric, metric_type = _OF_MAPS[each.head.answer]
        found.append(
            _Answer(
                sentence=f"{begins} {_classes(each.head.labels)}", kind=kind, unit=unit, labels=each.head.labels,
                metric=metric, metric_type=metric_type,
                value=each.value, n=each.n, layers=tuple(step.layer.kind for step in each.head.steps),
                values=each.head.stored_values,
            )
        )  # fmt: skip
    return tuple(found)


def _classes(labels: tuple[str, ...]) -> str:
    return f"{format_number(len(labels))} {'class' if len(labels) == 1 else 'classes'}"


def require_card_place(output: Path, source: Path) -> None:
    """Refuse a card's place before the work: its name, or one where either file could not be written.

    Raises:
        InputError: the name does not end in .md, a folder or ``source`` is there, or nothing can be written there.
    """
    if output.suffix != MARKDOWN:
        raise InputError(option("card"), f"needs a file name ending in {MARKDOWN}", got=repr(output.name))
    for place in _places(output):
        require_file_place(place)
        require_other(place, source)


def write_card(pack: Pack, signed_by: str | None, output: Path) -> tuple[Path, Path]:
    """Write both forms and return where they are: ``output``, and the same name with .cdx.json.

    Args:
        signed_by: the trusted key that the pack is signed with, None where there is none or nobody has asked.

    Raises:
        InputError: one cannot be written.
    """
    places = _places(output)
    for place, text in zip(places, (markdown_card(pack, signed_by), cyclonedx_card(pack, signed_by)), strict=True):
        write_file(place, text.encode())
    return places


def _places(output: Path) -> tuple[Path, Path]:
    return output, output.with_suffix(CYCLONEDX)


def limits(pack: Pack) -> tuple[str, ...]:
    """What a reader of the card could take for known, and is not: in sentences without any text of the pack."""
    delta, answers = pack.delta, _answers(pack.delta)
    scored, units = all(each.n for each in answers), {each.unit for each in answers}
    told = {
        "The accuracy is of a val split that chose the epoch as well: on images that chose nothing it may be lower.":
            scored,
        "It was scored before its numbers became integer codes: as it is stored it may answer otherwise.":
            scored and pack.rounding == "int8",
        "It has no score: how often it is right is not known.": not scored,
        "Nothing is known of other data: other places, cameras or times, or a class alone.": True,
        "Every image is given one of the labels: one that shows none of them is not detected.": "image" in units,
        "Every pixel is given one of the labels: one that shows none of them is not detected.": "pixel" in units,
        "Which images it was trained on is unknown: the pack has no digest of them.": _data_digest(delta) is None,
        "The licences are of what it was made from; the pack has none of its own.": bool(delta.licences),
        "The pack names no licence, neither of its backbone nor of its own.": not delta.licences,
        "Nobody has signed it: who made it is unknown, and anybody could have changed it.": pack.signature is None,
        "All but its size, its sha256 and its signature is what the pack says of itself, and was not measured for this"
        " card.": True,
    }  # fmt: skip
    return tuple(text for text, holds in told.items() if holds)


def _data_digest(delta: Delta) -> str | None:
    told = delta.training.get(DATA)
    return told if isinstance(told, str) and re.fullmatch("sha256:[0-9a-f]{64}", told) else None


def _spelled(value: object) -> str:
    """JSON on one line."""
    return printable(canonical_json(value).decode())


# --------------------------------------------------------------------------------------------------------- Markdown


def markdown_card(pack: Pack, signed_by: str | None) -> str:
    """The card for people; the same pack gives the same text."""
    delta = pack.delta
    what = ", and ".join(each.sentence for each in _answers(delta))
    blocks = [
        f"# Model card of {code(delta.task)}",
        f"{what}: {format_number(pack.size_bytes)} bytes for the backbone {code(delta.backbone)}.",
        _section("Model", _model_points(delta)),
        _section("Accuracy", _accuracy_points(delta)),
        _section("Data and training", _training_points(delta)),
        _section("Preprocessing", _fact_points(delta.preprocess.as_json())),
        _section("File", _file_points(pack, signed_by)),
        markdown(_planes(pack)).rstrip(),
        _section("Limits", limits(pack)),
    ]
    return "\n\n".join(blocks) + "\n"


def code(text: str) -> str:
    """``text`` as a code span of Markdown, in which all of it is itself (CommonMark 0.31, section 6.1)."""
    shown = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    ends = {shown[:1], shown[-1:]} & {"`", " ", ""}
    pad = " " if ends and (shown.strip() or not shown) else ""  # taken off again, but where all is spaces
    return f"{fence}{pad}{shown}{pad}{fence}"


def _section(title: str, points: Iterable[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {point}" for point in points)


def _codes(texts: Iterable[str]) -> str:
    return ", ".join(map(code, texts))


def _model_points(delta: Delta) -> Iterator[str]:
    answers = _answers(delta)
    yield f"Task: {code(delta.task)}, {', '.join(each.kind for each in answers)}"
    yield f"Method: {code(delta.method)}"
    settings = _codes(f"{key}={_spelled(value)}" for key, value in delta.settings.items())
    yield f"Settings: {settings or 'none'}"
    yield f"Backbone: {code(delta.backbone)}"
    yield f"Fingerprint of the backbone: {code(delta.fingerprint)}"
    yield f"Licences of what it was made from: {_codes(delta.licences) or 'unknown'}"
    for each in answers:
        if each.layers:
            yield f"Head: {format_number(each.values)} values in {_codes(each.layers)}"
        yield f"Labels, in the order of the answers: {_codes(each.labels)}"


def _accuracy_points(delta: Delta) -> Iterator[str]:
    for each in _answers(delta):
        if each.n == 0:
            yield f"{each.metric} on val: not scored"
            continue
        yield f"{each.metric} on val: {format_percent(each.value)} of n = {format_number(each.n)}"
        if each.interval is not None:
            low, high = map(format_percent, each.interval)
            yield f"95 % interval (Wilson): {low} to {high}"


def _training_points(delta: Delta) -> Iterator[str]:
    digest = _data_digest(delta)
    yield f"Images by hash: {'unknown' if digest is None else code(digest)}"
    yield from _fact_points({key: value for key, value in delta.training.items() if digest is None or key != DATA})


def _fact_points(facts: Mapping[str, object]) -> Iterator[str]:
    for key, value in facts.items():
        yield f"{code(key)}: {code(_spelled(value))}"


def _file_points(pack: Pack, signed_by: str | None) -> Iterator[str]:
    yield f"Size: {format_number(pack.size_bytes)} bytes"
    yield f"sha256: {code(pack.sha256)}"
    yield f"Sequence number: {pack.sequence}"
    if signed_by is not None:
        yield f"Signed by: {code(signed_by)}"
    else:
        yield "Signed by: nobody" if pack.signature is None else "Signed, and by whom was not asked (`--trusted`)"
    yield f"Codec: {pack.codec}"
    if (int8 := pack.delta.int8) is not None:
        yield f"int8: ranges of {format_number(len(int8.ranges))} tensors, for the backbone of codes {code(int8.codes)}"
        if int8.trunk is not None:
            yield f"int8, before these: the backbone's own ranges, {code(int8.trunk)}"


def _planes(pack: Pack) -> Table:
    """Names of planes are those that this version knows, so none has a bar in it."""
    rows = [
        (code(name), plane.stored.coding.format, *map(format_number, (plane.stored.values, plane.tensor.nbytes)))
        for name, plane in sorted(pack.planes.items())
    ]
    return Table("", (*left("plane", "codec"), *right("values", "bytes")), rows)


# -------------------------------------------------------------------------------------------------------- CycloneDX


def cyclonedx_card(pack: Pack, signed_by: str | None) -> str:
    """The card for tools, as JSON; without a time, so that the same pack gives the same text."""
    delta, model = pack.delta, f"sha256:{pack.sha256}"
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid5(NAMESPACE_URL, f"urn:{model}").urn,
        "version": 1,
        "components": [
            {
                "type": "machine-learning-model",
                "bom-ref": model,
                "name": delta.task,
                "version": str(pack.sequence),
                "description": f"{_nouns(delta)}: a parameter-efficient delta for the backbone {delta.backbone}",
                "hashes": [{"alg": "SHA-256", "content": pack.sha256}],
                **({"licenses": [{"license": _licence(each)} for each in delta.licences]} if delta.licences else {}),
                "modelCard": _model_card(pack),
                "properties": _properties(_file_facts(pack, signed_by)),
            },
            {
                "type": "machine-learning-model",
                "bom-ref": delta.fingerprint,
                "name": delta.backbone,
                "properties": _properties({"fingerprint": delta.fingerprint}),
            },
        ],
        "dependencies": [{"ref": model, "dependsOn": [delta.fingerprint]}],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _licence(text: str) -> dict[str, str]:
    known = SPDX.get(text.lower())
    return {"name": printable(text)} if known is None else {"id": known}


def _model_card(pack: Pack) -> dict[str, object]:
    delta = pack.delta
    card: dict[str, object] = {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": ", ".join(each.kind for each in _answers(delta)),
            "architectureFamily": printable(f"{delta.method} on a frozen backbone"),
            "modelArchitecture": delta.backbone,
            "datasets": [_dataset(delta)],
        }
    }
    scored = [_performance(each) for each in _answers(delta) if each.n]
    if scored:
        card["quantitativeAnalysis"] = {"performanceMetrics": scored}
    return card | {"considerations": {"technicalLimitations": list(limits(pack))}}


def _nouns(delta: Delta) -> str:
    return ", and ".join(each.sentence.partition(" of ")[0] for each in _answers(delta))


def _performance(answer: _Answer) -> dict[str, object]:
    told: dict[str, object] = {
        "type": answer.metric_type,
        "value": f"{answer.value:.4f}",
        "slice": f"val, n = {answer.n}",
    }
    if answer.interval is None:
        return told
    low, high = (f"{fraction:.4f}" for fraction in answer.interval)
    return told | {"confidenceInterval": {"lowerBound": low, "upperBound": high}}


def _dataset(delta: Delta) -> dict[str, object]:
    digest = _data_digest(delta)
    if digest is None:
        return {"type": "dataset", "description": "images of training and val, unknown by hash"}
    return {
        "type": "dataset",
        "name": digest,
        "contents": {"properties": _properties({"sha256": digest.removeprefix("sha256:")})},
        "description": "images of training and val",
    }


def _file_facts(pack: Pack, signed_by: str | None) -> dict[str, str]:
    delta = pack.delta
    planes = {
        name: {"format": plane.stored.coding.format, "values": plane.stored.values, "bytes": plane.tensor.nbytes}
        for name, plane in pack.planes.items()
    }
    facts = {
        "method": printable(delta.method),
        "settings": _spelled(delta.settings),
        "training": _spelled(delta.training),
        "labels": _spelled([label for each in _answers(delta) for label in each.labels]),
        "preprocess": _spelled(delta.preprocess.as_json()),
        "bytes": str(pack.size_bytes),
        "sequence": str(pack.sequence),
        "codec": pack.codec,
        "planes": _spelled(planes),
        "signed": str(pack.signature is not None).lower(),
    }
    if signed_by is not None:
        facts["signed_by"] = printable(signed_by)
    if delta.int8 is not None:
        facts["int8:codes"] = delta.int8.codes
        if delta.int8.trunk is not None:
            facts["int8:trunk"] = delta.int8.trunk
        facts["int8:ranges"] = _spelled([(each.scale, each.shift) for each in delta.int8.ranges])
    return facts


def _properties(facts: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"edgepet:{key}", "value": value} for key, value in facts.items()]
