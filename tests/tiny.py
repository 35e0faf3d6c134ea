"""Tiny backbones, images, updates and deltas that tests build for themselves, all from a seed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from hypothesis import settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgepet.deltas.delta import Delta, Head, Score
from edgepet.deltas.expressions import Binary, Gather, Householder, Mix, Product, Scaled, Seeded, Window
from edgepet.deltas.updates import (
    UPDATES,
    Add,
    Diagonal,
    Grouped,
    Kronecker,
    LowRank,
    Modulate,
    Precompose,
    Push,
    Replace,
    Scale,
    Targeted,
)
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.networks.sites import watch
from edgepet.spec import ImageSize, NpArray, Preprocess, Site, Target
from edgepet.tuning.model import TunedModel

SETTINGS = settings(deadline=None, derandomize=True, max_examples=150)  # the same examples in every run
FINGERPRINT = "sha256:" + "4f1c" * 16


def tiny_vit(folder: Path, seed: int, *, architecture: str = "test_vit", image_size: ImageSize = 32) -> Backbone:
    """One of timm's architectures with seeded weights, in a file."""
    module = seeded(timm.create_model(architecture, pretrained=False, num_classes=0), seed)
    file = folder / f"{architecture}-{seed}.safetensors"
    safetensors.torch.save_file(module.state_dict(), file)
    return load_backbone(f"{architecture}@{file}", image_size=image_size)


def seeded(module: nn.Module, seed: int) -> nn.Module:
    """``module`` itself, its weights away from every trivial start: no norm is 1, no bias 0, no mean 0."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.from_numpy(rng.standard_normal(tensor.shape).astype(np.float32))
            if name.endswith("running_var"):
                tensor.copy_(torch.exp(0.3 * noise))
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("gamma"):  # LayerScale starts at 1e-5: nothing would get through
                tensor.copy_(0.5 + 0.2 * noise)
            elif tensor.ndim > 1 and name.endswith("weight"):
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(0.2 * noise)
    return module


def random_pixels(seed: int, n: int, size: ImageSize = 32) -> NpArray:
    """uint8 (n, height, width, 3): noise under a colour of each image's own, so that they differ behind a pooling."""
    rng = np.random.default_rng(seed)
    colour, sides = rng.integers(0, 200, (n, 1, 1, 3)), (size, size) if isinstance(size, int) else size
    return (colour + rng.integers(0, 56, (n, *sides, 3))).astype(np.uint8)


def random_images(seed: int, n: int, size: ImageSize = 32) -> NpArray:
    """Preprocessed float32 (n, 3, height, width)."""
    sides = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(seed).standard_normal((n, 3, *sides)).astype(np.float32)


def perturb(model: TunedModel, seed: int, by: float = 0.05) -> TunedModel:
    """``model`` itself, every method tensor moved away from its start and the head away from zero."""
    rng = np.random.default_rng(seed)
    classes, width = model.linear.weight.shape
    moved = {
        name: (array + by * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in model.arrays().items()
    }
    weight = rng.standard_normal((classes, width)).astype(np.float32)
    model.load(moved, Head(weight=weight, bias=rng.standard_normal(classes).astype(np.float32)))
    return model.eval()


@functools.cache
def sites_of(architecture: str) -> tuple[Site, ...]:
    """The layers of a timm architecture, built and run without any memory for its weights."""
    size = {"img_size": 224} if architecture.startswith("vit") else {}
    with torch.device("meta"):
        module = timm.create_model(architecture, pretrained=False, num_classes=0, **size).eval()
        seen = watch(module, torch.zeros(1, 3, 224, 224))
        return (*seen.sites, *seen.blocks)


def ones(layers: tuple[Site, ...]) -> dict[str, NpArray]:
    """Weights of the shapes of ``layers`` that take no memory: methods look at shapes, rows and variances alone."""
    one = np.float32(1)
    weights = {site.weight: np.broadcast_to(one, (site.out_features, site.columns)) for site in layers}
    means = [(site.mean, site.out_features) for site in layers if site.mean is not None]
    return weights | {f"{mean.removesuffix('mean')}var": np.broadcast_to(one, rows) for mean, rows in means}


def mlp(up: float, down: float) -> Any:
    """images (n, 3, 4, 4) -> fc1, ReLU, fc2 -> logits (n, 5); a ReLU lets ``up`` and 1 / ``up`` cancel."""
    rng = np.random.default_rng(2)
    weights = {
        "fc1.weight": up * rng.standard_normal((64, 48)).astype(np.float32),
        "fc2.weight": down * rng.standard_normal((5, 64)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Transpose", ["fc1.weight"], ["fc1.turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["flat", "fc1.turned"], ["wide"], name="node_fc1"),
        helper.make_node("Relu", ["wide"], ["positive"], name="node_relu"),
        helper.make_node("Gemm", ["positive", "fc2.weight"], ["logits"], name="node_fc2", transB=1),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["batch", 3, 4, 4]), ("logits", ["batch", 5]))
    ]
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "mlp", ports[:1], ports[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def make_delta(updates: Iterable[Targeted] = (), *, classes: int = 3, width: int = 4, **changes: Any) -> Delta:
    """A delta with ``updates`` and otherwise ordinary fields."""
    rng = np.random.default_rng(classes)
    given: dict[str, Any] = {
        "task": "flowers",
        "backbone": "tiny",
        "fingerprint": FINGERPRINT,
        "updates": tuple(updates),
        "head": Head(
            weight=rng.standard_normal((classes, width)).astype(np.float32), bias=np.zeros(classes, np.float32)
        ),
        "labels": tuple(f"class {i}" for i in range(classes)),
        "preprocess": Preprocess(image_size=(32, 32), orientation="exif"),
        "method": "lora",
        "settings": {"rank": 2},
        "training": {"epochs": 3},
        "val": Score(top1=0.875, n=8),
        "licences": ("CC0-1.0",),
    }
    return Delta(**{**given, **changes})


def same_bits(left: Mapping[str, NpArray], right: Mapping[str, NpArray]) -> bool:
    """Equal names, dtypes, shapes and bytes."""
    if left.keys() != right.keys():
        return False
    pairs = [(left[name], right[name]) for name in left]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


# ------------------------------------------------------------------------------------------- updates for Hypothesis


@dataclass(frozen=True, slots=True)
class Case:
    """One update and a tensor that it fits, and the weight that a push reads, all float64."""

    targeted: Targeted
    tensor: NpArray
    weight: NpArray | None = None


@st.composite
def cases(draw: st.DrawFn, kinds: Sequence[str] = tuple(UPDATES), name: str = "blocks.0.attn.qkv.weight") -> Case:
    """Any update on a vector, matrix or kernel, whole or on a block of rows, of columns or of both."""
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g, rows, channels = (draw(st.integers(1, 3)) for _ in range(3))
    if kind == "push":
        return _push_case(draw, rng, name, g * rows)
    if kind in ("scale", "add", "replace") and draw(st.booleans()):
        return _vector_case(draw, kind, rng, name, g * rows)
    kernel = draw(st.sampled_from([(), (1, 1), (2, 2), (3, 1)]))
    taps = int(np.prod(kernel, dtype=int))
    out, width = g * rows, g * channels * taps
    first, more = (0, draw(st.integers(0, 2))) if draw(st.booleans()) else (draw(st.integers(1, 2)), 0)
    left, right = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    whole = (first + out + more, left * taps + width + right * taps)
    target = Target(
        name,
        (first, first + out) if whole[0] > out or draw(st.booleans()) else None,
        (left * taps, left * taps + width) if whole[1] > width else None,
    )
    blocked = target.rows is not None or target.cols is not None
    shape = (whole[0], whole[1] // taps, *kernel)
    seen = (out, width) if blocked else shape
    update = _update(draw, kind, rng, g, out, width, taps, seen)
    if kind in EXPRESSED and (kind != "add" or len(seen) == 2) and draw(st.booleans()):
        update = _expressed(draw, update, rng)
    return Case(Targeted(target, update), rng.standard_normal(shape))


EXPRESSED = {
    "low-rank": ("left", "right", "core"),
    "kronecker": ("left", "right"),
    "precompose": ("left", "right"),
    "modulate": ("left", "right"),
    "add": ("d",),
}


def _expressed(draw: st.DrawFn, update: Any, rng: np.random.Generator) -> Any:
    """``update`` with one of its factors computed from smaller tensors, or two of one."""
    name = draw(st.sampled_from([n for n in EXPRESSED[update.kind] if getattr(update, n) is not None]))
    shape = tuple(getattr(update, name).shape)
    made = draw(expressions(shape, rng))
    if update.kind == "low-rank" and name == "left" and update.core is None and draw(st.booleans()):
        made, square = update.left, Scaled(rng.standard_normal(shape[1]), update.left, transposed=True)
        tied = shape[0] == update.right.shape[1]  # left diag(c) left^T: the base is stored once
        return replace(update, right=square) if tied else replace(update, left=made)
    return replace(update, **{name: made})


@st.composite
def expressions(draw: st.DrawFn, shape: tuple[int, ...], rng: np.random.Generator, nested: bool = False) -> Any:
    """Any expression of a value of ``shape``."""
    inner, normal = draw(st.integers(1, 3)), rng.standard_normal
    kinds = ["binary", "seeded", "gather", *(["product"] if len(shape) > 1 else [])]
    kinds += ["householder", *(["mix"] if shape[0] == shape[-1] else [])] if len(shape) == 2 else []
    kinds += ["scaled"] if len(shape) == 2 and not nested else []
    match draw(st.sampled_from(kinds)):
        case "product":
            return Product(normal((*shape[:-1], inner)), normal((*shape[:-2], inner, shape[-1])))
        case "binary":
            return Binary(rng.random(shape) < 0.5, normal(2))
        case "mix":
            parts = draw(st.integers(1, 3))
            cube, weights = normal((shape[0], shape[0], inner)), normal((inner, parts))
            return Mix(cube, weights, draw(st.integers(0, parts - 1)), draw(st.booleans()))
        case "householder":
            return Householder(normal(shape[0]), normal(min(shape)), normal(shape[1]))
        case "seeded":
            start = draw(st.integers(0, 9))
            return Seeded(draw(st.integers(0, 2**53 - 1)), draw(st.sampled_from([1.0, 0.25])), Window(start, shape))
        case "gather":
            window = Window(draw(st.integers(0, 5)), shape)
            total = window.start + window.size + draw(st.integers(0, 5))
            return Gather(normal(draw(st.integers(1, total))), draw(st.integers(0, 99)), total, window)
        case _:
            turned = draw(st.booleans())
            sides = shape[::-1] if turned else shape
            base = draw(expressions(sides, rng, nested=True)) if draw(st.booleans()) else normal(sides)
            return Scaled(normal(shape[0]), base, turned)


def _push_case(draw: st.DrawFn, rng: np.random.Generator, name: str, size: int) -> Case:
    """A push of a matrix or kernel, whole or a block of it, into a vector or a part of one."""
    first, more = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    target = Target(name, (first, first + size) if first or more else None)
    kernel, channels = draw(st.sampled_from([(), (1, 1), (2, 3)])), draw(st.integers(1, 4))
    taps = int(np.prod(kernel, dtype=int))
    above, left = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    shape = (above + size, left + channels, *kernel)
    reads = Target(
        f"{name}_read",
        (above, above + size) if above else None,
        (left * taps, (left + channels) * taps) if left else None,
    )
    c: Any = rng.standard_normal(draw(st.sampled_from([channels, channels * taps])))
    if draw(st.booleans()):
        c = draw(expressions(c.shape, rng))
    update = Push(c, reads, draw(st.sampled_from(["frozen", "updated"])), draw(st.sampled_from([1.0, -0.5])))
    return Case(Targeted(target, update), rng.standard_normal(first + size + more), rng.standard_normal(shape))


def _vector_case(draw: st.DrawFn, kind: str, rng: np.random.Generator, name: str, size: int) -> Case:
    first, more = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    target = Target(name, (first, first + size) if first or more else None)
    factor = rng.standard_normal(size)
    update = {"scale": Scale, "add": Add, "replace": Replace}[kind](factor)
    return Case(Targeted(target, update), rng.standard_normal(first + size + more))


def _update(
    draw: st.DrawFn, kind: str, rng: np.random.Generator, g: int, out: int, width: int, taps: int, seen: Any
) -> Any:
    rank, inner, terms = (draw(st.integers(1, 3)) for _ in range(3))
    scale = draw(st.sampled_from([1.0, 0.5, -2.0]))
    normal = rng.standard_normal
    if kind == "scale":
        axis = draw(st.sampled_from(["out", "in"]))
        return Scale(normal(out if axis == "out" else draw(st.sampled_from([width, width // taps]))), axis)
    if kind in ("add", "replace"):
        return UPDATES[kind](normal(seen))
    if kind == "low-rank":
        if draw(st.booleans()):
            return LowRank(normal((out, rank)), normal((rank, width)), scale=scale)
        return LowRank(normal((out, rank)), normal((inner, width)), normal((rank, inner)), scale)
    if kind == "modulate":
        return Modulate(normal((out, rank)), normal((rank, width)), scale)
    if kind == "diagonal":
        return Diagonal(normal(min(out, width)))
    if kind == "grouped":
        columns = draw(st.sampled_from([0, width, width // taps]))
        return Grouped(normal((g, out // g, width // g)), rng.permutation(columns) if columns else None)
    if kind == "kronecker":
        p, q = draw(st.sampled_from([(g, g), (1, width // taps), (out, 1)]))
        return Kronecker(normal((terms, p, q)), normal((terms, out // p, width // q)), scale)
    if g == 1 and draw(st.booleans()):
        return Precompose(normal((width, rank)), normal((rank, width)), scale)
    return Precompose(normal((g, width // g, rank)), normal((g * rank, width)), scale)


def block_diagonal(blocks: NpArray) -> NpArray:
    """(g, a, b) -> (g a, g b), written as slowly as it reads."""
    groups, rows, cols = blocks.shape
    dense = np.zeros((groups * rows, groups * cols))
    for k, i, j in itertools.product(range(groups), range(rows), range(cols)):
        dense[k * rows + i, k * cols + j] = blocks[k, i, j]
    return dense
