"""Heads that read maps, in a pack's manifest: their layers as JSON, their tensors in planes.

docs/spec/pack-v1.md, "Heads", in code.
"""

from __future__ import annotations

from typing import Any, cast

from edgepet.deltas.delta import JudgedHead
from edgepet.deltas.heads import ANSWERS, METRICS, MOST_CLASSES, MOST_LAYERS, Answer, MapHead, Step
from edgepet.deltas.layers import LAYERS, OPTIONAL, SETTINGS, TENSORS, settings, tensors
from edgepet.packs.layout import Reader
from edgepet.packs.planes import Planes
from edgepet.strict import ObjectReader

PLANES = "head"  # begins the name of every plane of a head: head.KIND.TENSOR
MAX_READS = 64  # inputs of one layer
MAX_LABEL_BYTES = 256
MAX_SETTING = 1 << 16


def write_map_head(judged: JudgedHead, planes: Planes) -> dict[str, object]:
    """A head as the manifest has it; its tensors are put into ``planes``, and what several layers share once."""
    layers = list[dict[str, object]]()
    for step in judged.head.steps:
        kind = step.layer.kind
        places = {
            name: [planes.place(f"{PLANES}.{kind}.{name}", array), 0, *array.shape]
            for name, array in tensors(step.layer).items()
        }
        layers.append({"kind": kind, "reads": list(step.reads), "gives": step.gives, **settings(step.layer), **places})
    head = judged.head
    val = {"metric": METRICS[head.answer], "value": judged.value, "n": judged.n}
    thresholds = {"thresholds": list(head.thresholds)} if head.answer == "labels" else {}
    return {
        "name": head.name, "answer": head.answer, "labels": list(head.labels), "layers": layers, "val": val,
        **thresholds,
    }  # fmt: skip


def read_map_head(table: ObjectReader, reader: Reader) -> JudgedHead:
    """One head of a manifest.

    Raises:
        PackError: keys, kinds or settings that version 1 does not know, or tensors outside of a plane.
        InputError: layers that make no head.
    """
    name, answer = table.text("name"), cast(Answer, table.text("answer", choices=ANSWERS))
    labels, layers = texts(table, "labels", MOST_CLASSES), table.nested_list("layers")
    if len(layers) > MOST_LAYERS:
        raise table.refusal("layers", f"needs at most {MOST_LAYERS} layers", len(layers))
    steps = tuple(_step(layer, reader) for layer in layers)
    val = table.nested("val")
    val.text("metric", choices=[METRICS[answer]])
    thresholds = table.numbers("thresholds", count=len(labels)) if answer == "labels" else ()
    judged = JudgedHead(
        head=MapHead(name=name, answer=answer, labels=labels, steps=steps, thresholds=thresholds),
        value=val.number("value"),
        n=val.integer("n"),
    )
    for part in (val, table):
        part.end()
    return judged


def _step(table: ObjectReader, reader: Reader) -> Step:
    kind = table.text("kind", choices=list(LAYERS))
    reads = table.texts("reads")
    if len(reads) > MAX_READS:
        raise table.refusal("reads", f"needs at most {MAX_READS} inputs", len(reads))
    given: dict[str, Any] = {
        name: reader.factor(f"{PLANES}.{kind}", table, name, axes=axes)
        for name, axes in TENSORS.get(kind, {}).items()
        if name not in OPTIONAL.get(kind, ()) or table.has(name)
    }
    for name, wanted in SETTINGS.get(kind, {}).items():
        if wanted is int:
            given[name] = table.integer(name)
            if given[name] > MAX_SETTING:
                raise table.refusal(name, f"needs at most {MAX_SETTING}", given[name])
        else:
            given[name] = (
                table.number(name) if wanted is float else table.text(name, choices=cast(tuple[str, ...], wanted))
            )
    step = Step(layer=LAYERS[kind](**given), reads=reads, gives=table.text("gives"))
    table.end()
    return step


def texts(table: ObjectReader, key: str, most: int) -> tuple[str, ...]:
    """Texts of a bounded number and length.

    Raises:
        PackError: they are too many, too long, or no texts.
    """
    texts = table.texts(key)
    if len(texts) > most:
        raise table.refusal(key, f"needs at most {most} texts", len(texts))
    for index, text in enumerate(texts):
        if len(text) > MAX_LABEL_BYTES // 4 and len(text.encode("utf-8", "surrogatepass")) > MAX_LABEL_BYTES:
            raise table.refusal(f"{key}[{index}]", f"needs at most {MAX_LABEL_BYTES} bytes", f"{text[:40]!r}…")
    return texts
