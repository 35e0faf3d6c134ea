"""Model cards: what a pack says and does not say, for people and in CycloneDX, and nothing of it that a reader runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from edgepet.deltas.codes import Range
from edgepet.deltas.delta import NO_CLASSIFIER, Delta, Int8Ranges, JudgedHead, Score
from edgepet.deltas.heads import MapHead, Step
from edgepet.deltas.layers import Activation, Point
from edgepet.deltas.updates import Scale, Targeted
from edgepet.errors import InputError
from edgepet.packs.pack import EVERY, Pack, encode_pack, read_pack
from edgepet.reports.tables import printable
from edgepet.spec import Preprocess, Target
from edgepet.verbs.card import SPDX, code, cyclonedx_card, limits, markdown_card
from edgepet.verbs.inspect import inspect
from tests.flow import Artifacts, edgepet, refused
from tests.packs import changed
from tests.tiny import FINGERPRINT, SETTINGS, make_delta

DIGEST, CODES = "sha256:" + "d1" * 32, "0f" * 32
HOSTILE = (
    "<script>alert(1)</script>", "a | b", "a\\| <b>c", "one\n| --- |\ntwo", "](http://x)", "[here](http://x)",
    "http://x.example", "www.x.example", "me@x.example", "![](http://x/y.png)", "`", "``a`", " ` ", "<!-- ",
    "\n\n# Title", "&lt;", "**a**", "\x1b[31mred", "\u202eright", "\x7f", "\x85", " ",
)  # fmt: skip


def packed(**changes: Any) -> Pack:
    return read(make_delta(**changes))


def read(delta: Delta, **asked: Any) -> Pack:
    return read_pack(encode_pack(delta, **asked), answers=EVERY)


def masks(**changes: Any) -> Delta:
    """A task of two classes of pixels that was judged on eight images."""
    layers = (Point(np.ones((3, 4), np.float32)), Activation("relu"), Point(np.ones((2, 3), np.float32)))
    steps = [Step(layer=layer, reads=(read,), gives=gives)
             for layer, read, gives in zip(layers, ("map.0", "a", "b"), ("a", "b", "c"), strict=True)]  # fmt: skip
    head = MapHead(name="mask", answer="mask", labels=("sea", "land"), steps=tuple(steps))
    judged = JudgedHead(head=head, value=0.525, n=8)
    return make_delta(head=NO_CLASSIFIER, labels=(), val=Score(top1=0.0, n=0), heads=(judged,), **changes)


def several() -> dict[str, Delta]:
    ranges = (Range(scale=0.25), Range(scale=0.5, shift=-1.5))
    return {
        "small": make_delta(),
        "no licence": make_delta(licences=()),
        "odd licences": make_delta(licences=("apache-2.0", "MIT", "see the weights' publisher", "MIT OR ISC", "MIT")),
        "int8": make_delta(int8=Int8Ranges(codes=CODES, ranges=ranges)),
        "no score": make_delta(val=Score(top1=0.0, n=0)),
        "one class": make_delta(classes=1, val=Score(top1=1.0, n=10**20 - 1)),
        "clips": make_delta(preprocess=Preprocess(image_size=(32, 32), frames=8, orientation="none")),
        "known data": make_delta(training={"data": DIGEST, "init": "sha256:", "versions": {"edgepet": "0.1.0"}}),
        "hostile": hostile(),
        "masks": masks(),
    }


def hostile() -> Delta:
    """Every text that a pack is free to choose, chosen by somebody else."""
    texts = {text: text for text in HOSTILE}
    return make_delta(
        task="www.x.example", method=HOSTILE[0], labels=HOSTILE, classes=len(HOSTILE), settings=texts,
        training={**texts, "data": HOSTILE[0]}, licences=HOSTILE,
    )  # fmt: skip


SEVERAL = several()


def is_read_alike(text: str) -> bool:
    """Whether nothing in it steers a terminal or turns a line."""
    return all(character.isprintable() or character == "\n" for character in text)


# For people


def test_a_card_says_what_a_pack_says_and_what_it_does_not() -> None:
    pack = packed()

    assert (
        markdown_card(pack, None)
        == f"""\
# Model card of `flowers`

A classifier of images into 3 classes: {pack.size_bytes:,} bytes for the backbone `tiny`.

## Model

- Task: `flowers`, classification
- Method: `lora`
- Settings: `rank=2`
- Backbone: `tiny`
- Fingerprint of the backbone: `{FINGERPRINT}`
- Licences of what it was made from: `CC0-1.0`
- Labels, in the order of the answers: `class 0`, `class 1`, `class 2`

## Accuracy

- Top-1 on val: 87.5 % of n = 8
- 95 % interval (Wilson): 52.9 % to 97.8 %

## Data and training

- Images by hash: unknown
- `epochs`: `3`

## Preprocessing

- `image_size`: `[32,32]`
- `interpolation`: `"bicubic"`
- `crop_fraction`: `1.0`
- `crop`: `"center"`
- `mean`: `[0.485,0.456,0.406]`
- `std`: `[0.229,0.224,0.225]`
- `orientation`: `"exif"`

## File

- Size: {pack.size_bytes:,} bytes
- sha256: `{pack.sha256}`
- Sequence number: 0
- Signed by: nobody
- Codec: fp16

| plane | codec | values | bytes |
| --- | --- | ---: | ---: |
| `head.point.bias` | fp16 | 3 | 6 |
| `head.point.weight` | fp16 | 12 | 24 |

## Limits

- The accuracy is of a val split that chose the epoch as well: on images that chose nothing it may be lower.
- Nothing is known of other data: other places, cameras or times, or a class alone.
- Every image is given one of the labels: one that shows none of them is not detected.
- Which images it was trained on is unknown: the pack has no digest of them.
- The licences are of what it was made from; the pack has none of its own.
- Nobody has signed it: who made it is unknown, and anybody could have changed it.
- All but its size, its sha256 and its signature is what the pack says of itself, and was not measured for this card.
"""
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("no licence", ["- Licences of what it was made from: unknown",
                        "- The pack names no licence, neither of its backbone nor of its own."]),
        ("int8", [f"- int8: ranges of 2 tensors, for the backbone of codes `{CODES}`"]),
        ("no score", ["- Top-1 on val: not scored", "- It has no score: how often it is right is not known."]),
        ("known data", [f"- Images by hash: `{DIGEST}`", '- `init`: `"sha256:"`',
                        '- `versions`: `{"edgepet":"0.1.0"}`']),
        ("one class", ["A classifier of images into 1 class: SIZE bytes for the backbone `tiny`."]),
        ("masks", ["A mask of every image in 2 classes: SIZE bytes for the backbone `tiny`.",
                   "- Task: `flowers`, semantic segmentation",
                   "- Head: 18 values in `point`, `activation`, `point`", "- mIoU on val: 52.5 % of n = 8",
                   "- Every pixel is given one of the labels: one that shows none of them is not detected.",
                   "- Labels, in the order of the answers: `sea`, `land`"]),
        ("clips", ["A classifier of clips into 3 classes: SIZE bytes for the backbone `tiny`.", "- `frames`: `8`"]),
    ],
)  # fmt: skip
def test_a_card_says_what_only_some_packs_have(name: str, lines: list[str]) -> None:
    pack = read(SEVERAL[name])

    said = markdown_card(pack, None).replace(f"{pack.size_bytes:,}", "SIZE").splitlines()

    assert [line for line in lines if line not in said] == []


def test_a_card_of_masks_says_nothing_of_classes_of_images() -> None:
    said, document = markdown_card(read(masks()), None), json.loads(cyclonedx_card(read(masks()), None))

    assert [word for word in ("Top-1", "Wilson", "Every image", "no score", "A classifier") if word in said] == []
    card = document["components"][0]["modelCard"]
    assert card["modelParameters"]["task"] == "semantic segmentation"
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "mean intersection over union", "value": "0.5250", "slice": "val, n = 8"}
    ]
    assert "Every pixel is given one of the labels" in " ".join(card["considerations"]["technicalLimitations"])


def test_a_card_does_not_say_that_known_data_are_unknown() -> None:
    said = markdown_card(packed(training={"data": DIGEST}), None)

    assert said.count(DIGEST) == 1
    assert "unknown: the pack has no digest" not in said


def test_a_score_from_before_codes_is_told_as_one() -> None:
    scale = [Targeted(Target("a.weight"), Scale(make_delta(classes=64, width=8).head.weight.reshape(-1)))]
    told = "It was scored before its numbers became integer codes: as it is stored it may answer otherwise."

    assert {codec: told in limits(read_pack(encode_pack(make_delta(scale), codec=codec)))
            for codec in ("fp32", "fp16", "int8", "int4")} == {
        "fp32": False, "fp16": False, "int8": True, "int4": True,
    }  # fmt: skip


# Texts from outside


def test_nothing_that_a_pack_says_becomes_markdown() -> None:
    said = markdown_card(read(SEVERAL["hostile"]), "a`b | <i>")

    blocks = MarkdownIt("commonmark").enable("table").parse(said)
    spans = [span for block in blocks for span in block.children or ()]
    assert is_read_alike(said)
    assert {block.type for block in blocks if "html" in block.type or block.type in ("fence", "code_block")} == set()
    assert {span.type for span in spans} == {"text", "code_inline"}
    shown = [span.content for span in spans if span.type == "code_inline"]
    plain = "".join(span.content for span in spans if span.type == "text")
    labels = [printable(text) for text in HOSTILE]
    assert [text for text in (*labels, "a`b | <i>", "www.x.example") if text not in shown] == []
    assert [mark for mark in ("script", "http", "www", "@x", "Title", "|") if mark in plain] == []
    assert len([block for block in blocks if block.type == "heading_open"]) == said.count("\n## ") + 1 == 7


@SETTINGS
@given(st.text(st.sampled_from(list("` \\|<>[]()*_&!#ab\n\x1b\u202e"))))
def test_a_code_span_shows_the_very_text(text: str) -> None:
    (block,) = [token for token in MarkdownIt("commonmark").parse(f"a {code(text)} b") if token.type == "inline"]

    assert [(span.type, span.content) for span in block.children or ()] == [
        ("text", "a "), ("code_inline", printable(text) or "  "), ("text", " b"),
    ]  # fmt: skip


# For tools


@pytest.mark.parametrize("name", SEVERAL)
def test_a_card_is_cyclonedx_1_6(name: str) -> None:
    pytest.importorskip("cyclonedx", reason="needs the package cyclonedx-python-lib")
    pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    said = cyclonedx_card(read(SEVERAL[name]), "key")

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(said) is None
    assert is_read_alike(said)
    assert is_read_alike("".join(texts(json.loads(said))))


def texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts(each)]
    return [str(value)]


def test_licences_that_spdx_lists_are_spelled_as_there() -> None:
    pytest.importorskip("cyclonedx", reason="needs the package cyclonedx-python-lib")
    from cyclonedx.spdx import is_supported_id

    assert [name for name in SPDX.values() if not is_supported_id(name)] == []


def test_the_whole_of_a_document() -> None:
    ranges = (Range(scale=0.25), Range(scale=0.5, shift=-1.5))
    pack = packed(
        int8=Int8Ranges(codes=CODES, ranges=ranges), training={"data": DIGEST}, licences=("mit", "ask the publisher")
    )

    document = json.loads(cyclonedx_card(pack, "line-1"))

    serial = document.pop("serialNumber")
    assert document == {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": [
            {
                "type": "machine-learning-model",
                "bom-ref": f"sha256:{pack.sha256}",
                "name": "flowers",
                "version": "0",
                "description": "A classifier: a parameter-efficient delta for the backbone tiny",
                "hashes": [{"alg": "SHA-256", "content": pack.sha256}],
                "licenses": [{"license": {"id": "MIT"}}, {"license": {"name": "ask the publisher"}}],
                "modelCard": {
                    "modelParameters": {
                        "approach": {"type": "supervised"},
                        "task": "classification",
                        "architectureFamily": "lora on a frozen backbone",
                        "modelArchitecture": "tiny",
                        "datasets": [
                            {
                                "type": "dataset",
                                "name": DIGEST,
                                "contents": {"properties": [{"name": "edgepet:sha256", "value": "d1" * 32}]},
                                "description": "images of training and val",
                            }
                        ],
                    },
                    "quantitativeAnalysis": {
                        "performanceMetrics": [
                            {
                                "type": "top-1 accuracy",
                                "value": "0.8750",
                                "slice": "val, n = 8",
                                "confidenceInterval": {"lowerBound": "0.5291", "upperBound": "0.9776"},
                            }
                        ]
                    },
                    "considerations": {"technicalLimitations": list(limits(pack))},
                },
                "properties": [
                    {"name": f"edgepet:{name}", "value": value}
                    for name, value in {
                        "method": "lora",
                        "settings": '{"rank":2}',
                        "training": f'{{"data":"{DIGEST}"}}',
                        "labels": '["class 0","class 1","class 2"]',
                        "preprocess": '{"crop":"center","crop_fraction":1.0,"image_size":[32,32],'
                        '"interpolation":"bicubic","mean":[0.485,0.456,0.406],"orientation":"exif",'
                        '"std":[0.229,0.224,0.225]}',
                        "bytes": str(pack.size_bytes),
                        "sequence": "0",
                        "codec": "fp16",
                        "planes": '{"head.point.bias":{"bytes":6,"format":"fp16","values":3},'
                        '"head.point.weight":{"bytes":24,"format":"fp16","values":12},'
                        '"int8.ranges":{"bytes":16,"format":"fp32","values":4}}',
                        "signed": "false",
                        "signed_by": "line-1",
                        "int8:codes": CODES,
                        "int8:ranges": "[[0.25,0.0],[0.5,-1.5]]",
                    }.items()
                ],
            },
            {
                "type": "machine-learning-model",
                "bom-ref": FINGERPRINT,
                "name": "tiny",
                "properties": [{"name": "edgepet:fingerprint", "value": FINGERPRINT}],
            },
        ],
        "dependencies": [{"ref": f"sha256:{pack.sha256}", "dependsOn": [FINGERPRINT]}],
    }
    other = json.loads(cyclonedx_card(packed(), None))
    assert serial.startswith("urn:uuid:")
    assert serial != other["serialNumber"]


# The command line


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    path = tmp_path / "flowers.pet"
    path.write_bytes(encode_pack(make_delta()))
    return path


def test_inspect_writes_both_forms(flowers: Path) -> None:
    card, document = flowers.parent / "out.v1.md", flowers.parent / "out.v1.cdx.json"

    said = edgepet("inspect", flowers, "--card", card)

    pack = read_pack(flowers)
    assert (said.code, said.err) == (0, "")
    assert f"\n  wrote {card} and {document}\n" in said.out
    assert card.read_text() == markdown_card(pack, None)
    assert document.read_text() == cyclonedx_card(pack, None)
    before = card.read_bytes(), document.read_bytes()
    assert edgepet("inspect", flowers, "--card", card, "--json").json["card"] == [str(card), str(document)]
    assert (card.read_bytes(), document.read_bytes()) == before
    assert edgepet("inspect", flowers, "--json").json["card"] is None


def test_the_same_pack_gives_the_same_bytes_wherever_it_is(flowers: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / "renamed.pet"
    again.write_bytes(encode_pack(make_delta()))

    first = inspect(flowers, card=tmp_path / "a.md").card
    second = inspect(again, card=tmp_path / "b.md").card

    assert first is not None
    assert second is not None
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_card_names_the_signer_only_where_keys_are_given(flowers: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="needs the package cryptography")
    (tmp_path / "keys").mkdir()
    for key in ("ours", "theirs"):
        assert edgepet("keygen", "-o", tmp_path / key).code == 0
    (tmp_path / "keys" / "line-1.pub").write_bytes((tmp_path / "ours.pub").read_bytes())
    signed, others, card = tmp_path / "signed.pet", tmp_path / "others.pet", tmp_path / "a.md"
    assert edgepet("pack", flowers, "--sign", tmp_path / "ours", "-o", signed).code == 0
    assert edgepet("pack", flowers, "--sign", tmp_path / "theirs", "-o", others).code == 0

    def told(*arguments: object) -> tuple[list[str], dict[str, str]]:
        assert edgepet("inspect", *arguments, "--card", card).code == 0
        component = json.loads(card.with_suffix(".cdx.json").read_text())["components"][0]
        facts = {fact["name"]: fact["value"] for fact in component["properties"] if "signed" in fact["name"]}
        return [line for line in card.read_text().splitlines() if line.startswith("- Signed")], facts

    assert told(signed, "--trusted", tmp_path / "keys") == (
        ["- Signed by: `line-1`"], {"edgepet:signed": "true", "edgepet:signed_by": "line-1"},
    )  # fmt: skip
    assert told(signed) == (["- Signed, and by whom was not asked (`--trusted`)"], {"edgepet:signed": "true"})
    assert told(flowers, "--trusted", tmp_path / "keys") == (["- Signed by: nobody"], {"edgepet:signed": "false"})
    refused(4, "inspect", others, "--trusted", tmp_path / "keys", "--card", tmp_path / "no.md")
    assert not (tmp_path / "no.md").exists()


def test_a_place_that_no_card_can_have_is_refused(flowers: Path, tmp_path: Path) -> None:
    (tmp_path / "there.cdx.json").mkdir()
    odd = tmp_path / "odd.md"
    odd.write_bytes(flowers.read_bytes())
    assert refused(3, "inspect", flowers, "--card", tmp_path / "card.txt") == (
        "--card: needs a file name ending in .md, got 'card.txt'\n"
    )
    assert refused(3, "inspect", flowers, "--card", tmp_path / "nosuch" / "a.md") == (
        f"{tmp_path / 'nosuch'}: is no folder\n  fix: mkdir -p {tmp_path / 'nosuch'}\n"
    )
    assert refused(3, "inspect", flowers, "--card", tmp_path / "there.md") == (
        f"{tmp_path / 'there.cdx.json'}: must be a file, or not there, got a folder\n  fix: name another place\n"
    )
    assert refused(3, "inspect", odd, "--card", odd) == (
        f"{odd}: is {odd}, which is read\n  fix: name another output\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flowers.pet", "odd.md", "there.cdx.json"]


def test_the_place_is_refused_before_the_pack_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError) as told:
        inspect(tmp_path / "nosuch.pet", card=tmp_path / "card.txt")

    assert str(told.value) == "`card`: needs a file name ending in .md, got 'card.txt'"


def test_a_damaged_pack_has_no_card(flowers: Path, tmp_path: Path) -> None:
    flowers.write_bytes(changed(flowers.read_bytes(), lambda manifest, tensors: manifest.update(colour="green")))

    refused(3, "inspect", flowers, "--card", tmp_path / "a.md")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["flowers.pet"]


def test_a_card_is_of_packs_alone(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = artifacts.of("tints", "onnx")

    assert refused(3, "inspect", folder, "--card", tmp_path / "a.md") == (
        f"--card: is of packs alone, got {folder}, an exported model\n  fix: name the pack that it was exported from\n"
    )
    assert list(tmp_path.iterdir()) == []
