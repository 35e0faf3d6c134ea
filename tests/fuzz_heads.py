"""Heads that read maps, by the words of docs/spec/pack-v1.md, "Heads", once more and slowly; and what they became."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from edgepet.deltas.delta import JudgedHead
from edgepet.deltas.layers import settings, tensors

ANSWERS = {
    "mask": ("miou", 2),
    "boxes": ("map", 1),
    "labels": ("map", 1),
}  # what each is judged by, and the fewest labels
INPUTS = {
    "multiply": (2, 2),
    "add": (2, 64),
    "concat": (2, 64),
    "detect": (2, 64),
}  # fewest and most that a layer reads; one of all others
# Tensors that a layer must have, and those that it may.
TENSORS: dict[str, tuple[str, str]] = {
    "point": ("weight", "bias"), "depthwise": ("weight", "bias"), "conv": ("weight", "bias"),
    "deconv": ("weight", "bias"), "norm": ("", "weight bias"), "attend": ("keys values", "key_bias bias"),
    "regions": ("queries weight", ""), "resize": ("", ""), "pool": ("", ""), "add": ("", ""), "multiply": ("", ""),
    "concat": ("", ""), "activation": ("", ""), "unit": ("", ""), "mean": ("", ""),
    "detect": ("scales", ""),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "conv": {"stride": lambda value: type(value) is int and value in (1, 2)},
    "resize": {
        "factor": lambda value: type(value) is int and value in (2, 4, 8, 16, 32),
        "mode": lambda value: value in ("bilinear", "nearest"),
    },
    "pool": {"size": lambda value: type(value) is int and 2 <= value <= 32},
    "activation": {"name": lambda value: value in ("relu", "gelu", "sigmoid")},
    "norm": {"eps": lambda value: type(value) in (int, float) and 0 < value < 1},
    "unit": {"eps": lambda value: type(value) in (int, float) and 0 < value < 1},
    "detect": {
        "stride": lambda value: type(value) is int and 1 <= value <= 64,
        "top": lambda value: type(value) is int and 1 <= value <= 1000,
    },
}

Need = Callable[[object, str], None]
Leaf = Callable[[str, str, Mapping[str, Any]], Any]  # plane's kind, tensor, the layer: shape and values


def head_meaning(head: Mapping[str, Any], leaf: Leaf, need: Need, labels: list[str]) -> list[Any]:
    """Name, answer, labels, layers and score of a head; ``labels`` are its own, of a right number of bytes each."""
    name, score = head["name"], head["val"]
    need(re.fullmatch("[a-z][a-z0-9-]{0,31}", name) and head["answer"] in ANSWERS, "a head of another name or answer")
    metric, least = ANSWERS[head["answer"]]
    need(least <= len(labels) <= 255 and len(set(labels)) == len(labels), "labels of another number, or twice one")
    need(isinstance(head["layers"], list) and 1 <= len(head["layers"]) <= 64, "layers of another number")
    known, read, layers = {"features"}, set[str](), list[Any]()
    for layer in head["layers"]:
        layers.append(layer_meaning(layer, known, leaf, need))
        read |= set(layer["reads"])
        need(layer["gives"] not in known, "a name that is given twice")
        known.add(layer["gives"])
    kinds = [layer["kind"] for layer in head["layers"]]
    need(
        "detect" not in kinds[:-1] and (kinds[-1] == "detect") == (head["answer"] == "boxes"), "boxes by another layer"
    )
    need({layer["gives"] for layer in head["layers"][:-1]} <= read, "a layer that nobody reads")
    need(score.keys() == {"metric", "value", "n"} and score["metric"] == metric, "another score")
    need(type(score["value"]) in (int, float) and 0 <= score["value"] <= 1, "a score that is none")
    need(type(score["n"]) is int and 0 <= score["n"] < 10**20, "a score of no number of images")
    thresholds = head.get("thresholds", [])
    need(("thresholds" in head) == (head["answer"] == "labels"), "thresholds of another answer, or none")
    need(isinstance(thresholds, list) and len(thresholds) == len(labels) * ("thresholds" in head), "other thresholds")
    need(all(type(each) in (int, float) and 0 <= each <= 1 for each in thresholds), "a threshold that is none")
    return [
        name, head["answer"], labels, layers, (float(score["value"]), score["n"]), [float(each) for each in thresholds],
    ]  # fmt: skip


def layer_meaning(layer: Mapping[str, Any], known: set[str], leaf: Leaf, need: Need) -> list[Any]:
    """Kind, what it reads and gives, settings and tensors of a layer."""
    kind = layer["kind"]
    must, may = (set(names.split()) for names in TENSORS[kind])
    told, here = SETTINGS.get(kind, {}), (must | may) & layer.keys()
    need(layer.keys() == {"kind", "reads", "gives", *told, *must, *here}, "a key too few or too many")
    need(all(right(layer[name]) for name, right in told.items()), "a setting that is none")
    least, most = INPUTS.get(kind, (1, 1))
    need(isinstance(layer["reads"], list) and least <= len(layer["reads"]) <= most, "inputs of another number")
    for name in layer["reads"]:
        is_map = isinstance(name, str) and re.fullmatch(r"map\.(0|[1-9][0-9]?)", name)
        need(is_map or (isinstance(name, str) and name in known), "an input that is not there")
    need(re.fullmatch("[a-z][a-z0-9_]{0,31}", layer["gives"]) and layer["gives"] != "features", "a name that is none")
    cut = {name: leaf(f"head.{kind}", name, layer) for name in sorted(here)}
    need(_fits(kind, {name: shape for name, (shape, _) in cut.items()}), "tensors that make no layer")
    values = {name: float(layer[name]) if name == "eps" else layer[name] for name in told}
    return [kind, layer["reads"], layer["gives"], values, cut]


def _fits(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors of a layer are of right shapes, and right beside each other."""
    axes = {
        "point": {"weight": 2}, "depthwise": {"weight": 3}, "conv": {"weight": 4}, "deconv": {"weight": 4},
        "norm": {"weight": 1}, "attend": {"keys": 3, "values": 3}, "regions": {"queries": 2, "weight": 2},
        "detect": {"scales": 1},
    }.get(kind, {})  # fmt: skip
    if any(len(shapes[name]) != count for name, count in axes.items() if name in shapes):
        return False
    weight, bias = shapes.get("weight", ()), shapes.get("bias")
    match kind:
        case "norm":
            return not shapes or bias == weight
        case "regions":
            return weight == (shapes["queries"][1],) * 2
        case "attend":
            keys, values = shapes["keys"], shapes["values"]
            shift = shapes.get("key_bias", keys[:2])
            return values[:2] == keys[:2] == shift and (bias is None or bias == values[2:])
        case "point" | "depthwise" | "conv":
            odd = kind == "point" or (weight[-1] == weight[-2] and weight[-1] % 2 == 1)
            return odd and (bias is None or bias == weight[:1])
        case "deconv":
            return weight[2:] == (2, 2) and (bias is None or bias == weight[1:2])
    return True


def meaning_of_head(judged: JudgedHead, plain: Callable[[Any], Any]) -> list[Any]:
    """What ``head_meaning`` says of it."""
    head = judged.head
    layers = [
        [step.layer.kind, list(step.reads), step.gives, dict(settings(step.layer)),
         {name: plain(array) for name, array in sorted(tensors(step.layer).items())}]
        for step in head.steps
    ]  # fmt: skip
    return [
        head.name, head.answer, list(head.labels), layers, (judged.value, judged.n), list(head.thresholds),
    ]  # fmt: skip


def counted_places(heads: Any) -> list[tuple[object, ...]]:
    """What is cut out of planes for heads that need not be any: plane and place."""
    found = list[tuple[object, ...]]()
    for head in heads:
        for layer in head["layers"]:
            must, may = TENSORS[layer["kind"]]
            found += [("head", layer["kind"], name, *layer[name]) for name in f"{must} {may}".split() if name in layer]
    return found
