"""Every method on a ViT and three ConvNets: what it costs, what its fold is worth, and who runs the result.

    python benchmarks/methods.py                 # half an hour on 2 cores
    python benchmarks/methods.py --only ResNet   # one network

Each method makes a few steps of its default recipe, is lowered and packed, and the pack is compared with the tuned
network on ONNX Runtime and OpenVINO; TensorRT-RTX builds it. Writes ``methods.json``, of which
``report.py`` makes the tables in docs/guide/methods.md; an interrupted run keeps what it found, and a run of one
network or of some methods adds to what is there. ViT-S/14 and EfficientNet-Lite0 have real weights; no package carries
any for the other two, which are seeded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from harness import Asked, asked, earlier, parser_of, write_result
from trainings import draw

from edgepet.deltas.delta import Delta, Score
from edgepet.deltas.merge import task_tensors
from edgepet.device.runtime import open_task
from edgepet.errors import EdgepetError
from edgepet.exporters.onnx import build_model, serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.exporters.trace import base_graph
from edgepet.images.preprocess import normalize
from edgepet.images.sets import few_shots, load_set, open_split
from edgepet.methods import METHODS, Branching, Method, configure
from edgepet.methods.method import count
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.spec import NpArray
from edgepet.tuning.fit import LabelledPixels, Plan, fit
from edgepet.tuning.model import TunedModel, algebra_error, extract, logits_of

BASELINES = ("linear-probe", "full")  # nothing to fold, and everything
FRAMES = 4  # of a clip, for the method that mixes frames
STEPS = Plan(epochs=6, lr=0.0, head_lr=2e-3, batch_size=10)


@dataclass(frozen=True)
class Network:
    """A backbone to try methods on."""

    architecture: str
    image_size: int
    weights: str


NETWORKS = {
    "ViT": Network("demo:vit-small", 112, "real"),
    "ConvNeXt": Network("convnext_atto", 96, "seeded"),
    "ResNet": Network("resnet18", 96, "seeded"),
    "EfficientNet": Network("demo:efficientnet-lite0", 128, "real"),
}
_NO_BLOCKS = "its place is in a transformer's block, beside attention or the MLP"
_NO_QUERIES = "its rows are extra keys and values, and there is no attention"
_NO_TOKENS = "it learns tokens, and a ConvNet has none"
_NO_NORM_BEFORE = "it goes in front of dense 1 x 1 layers behind a norm; here every norm is behind its convolution"
REASONS = {  # why a method finds no place on ConvNets; Conv-Adapter has its own below
    **dict.fromkeys(("adapter", "houlsby", "adaptformer", "parallel-adapter", "convpass"), _NO_BLOCKS),
    **dict.fromkeys(("prefix", "mam"), _NO_QUERIES),
    **dict.fromkeys(("vpt-shallow", "vpt-deep"), _NO_TOKENS),
    "st-adapter": "its place is on the patches of a transformer's residual stream",
    **dict.fromkeys(("repadapter", "arc"), _NO_NORM_BEFORE),
    "conv-adapter": "it repeats a convolution's kernel and stride, and a ViT has none in its blocks",
}


QUICK_NETWORKS, QUICK_METHODS, QUICK_EPOCHS = ("ResNet",), ("ssf", "adaptformer", "conv-adapter"), 1


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--only", choices=NETWORKS, help="one network (default: all)")
    made.add_argument("--methods", default="", help="names with commas between (default: all)")
    return made


def main() -> None:
    """Try every method on every network that is asked for."""
    options = parser().parse_args()
    run = asked(options)
    every = QUICK_METHODS if run.quick else tuple(name for name in METHODS if name not in BASELINES)
    names: tuple[str, ...] = tuple(options.methods.split(",")) if options.methods else every
    titles = (options.only,) if options.only else QUICK_NETWORKS if run.quick else tuple(NETWORKS)
    steps = replace(STEPS, epochs=QUICK_EPOCHS) if run.quick else STEPS
    cells: dict[str, dict[str, Any]] = earlier(run, "methods").get("cells", {})
    data = draw(run, "digits")
    with tempfile.TemporaryDirectory() as scratch:
        for title in titles:
            network = NETWORKS[title]
            spec = spec_of(network, Path(scratch))
            for name in names:
                began = time.perf_counter()
                cell = examine(configure(name), load(spec, network, name), data, Path(scratch), steps)
                cells.setdefault(title, {})[name] = cell | {"seconds": round(time.perf_counter() - began, 1)}
                print(f"{title} {name}: {cell}", flush=True)
                write(run, cells)


def write(run: Asked, cells: dict[str, dict[str, Any]]) -> None:
    """All cells so far, in the order of ``METHODS``: an interrupted run keeps what it found."""
    ordered = {
        title: {name: cells[title][name] for name in METHODS if name in cells[title]}
        for title in NETWORKS
        if title in cells
    }
    networks = {
        title: {"name": n.architecture, "image_size": n.image_size, "weights": n.weights}
        for title, n in NETWORKS.items()
    }
    write_result(run, "methods", {"networks": networks, "cells": ordered})


def load(spec: str, network: Network, method: str) -> Backbone:
    """The network as the method takes it."""
    frames = FRAMES if method == "st-adapter" and network.architecture == "demo:vit-small" else 1
    return load_backbone(spec, image_size=network.image_size, frames=frames)


def spec_of(network: Network, folder: Path) -> str:
    """What ``load_backbone`` takes; seeded weights have norms and layer scales as trained networks have them."""
    if network.weights == "real":
        return network.architecture
    torch.manual_seed(0)
    rng, state = np.random.default_rng(0), {}
    for name, tensor in timm.create_model(network.architecture, num_classes=0).state_dict().items():
        spread = tensor.ndim == 1 and not name.endswith(("bias", "running_mean"))
        state[name] = torch.from_numpy(rng.uniform(0.5, 1.5, tensor.shape).astype(np.float32)) if spread else tensor
    file = folder / f"{network.architecture}.safetensors"
    safetensors.torch.save_file(state, file)
    return f"{network.architecture}@{file}"


def examine(method: Method, backbone: Backbone, data: Path, folder: Path, steps: Plan) -> dict[str, Any]:
    """One cell: parameters, bytes and differences, or why there are none."""
    sites = method.sites(backbone.layers)
    if not sites:
        return {"reason": REASONS[method.name]}
    images = digits(data, backbone)
    model = TunedModel(backbone, method, 10)
    fit(model, images, images, backbone.preprocess, replace(steps, lr=method.recipe.lr), lambda step: None)
    shown = normalize(images.pixels[:4], backbone.preprocess)
    error, largest = algebra_error(model, backbone, shown)
    labels = tuple("0123456789")
    delta = extract(model, backbone, task="digits", labels=labels, val=Score(top1=0.0, n=1))
    cell: dict[str, Any] = {
        "parameters": count(method, backbone.layers, backbone.tensors),
        "stored_values": delta.stored_values,
        "pack_bytes_fp16": len(encode_pack(delta)),
        "foldable": not isinstance(method, Branching),
        "float64": error / largest,
    }
    return cell | runtimes(model, backbone, read_pack(encode_pack(delta, codec="fp32")).delta, shown, folder)


def runtimes(model: TunedModel, backbone: Backbone, delta: Delta, images: NpArray, folder: Path) -> dict[str, Any]:
    """Largest differences from the tuned network, as fractions of the largest logit."""
    expected, graph = logits_of(model, images), base_graph(backbone, delta.branches, root=folder / "graphs")
    found: dict[str, Any] = {}
    for runtime in ("onnxruntime", "openvino"):
        with open_task(graph, delta, runtime=runtime) as network:
            found[runtime] = float(np.abs(network(images) - expected).max() / np.abs(expected).max())
    try:
        engine = serialize(build_model(graph, task_tensors(graph.base, delta), delta))
        found["tensorrt-rtx"] = build_engines(engine, folder).engine == "tensorrt-rtx"
    except EdgepetError as refusal:
        found["tensorrt-rtx"] = str(refusal).partition("\n")[0]
    return found


def digits(data: Path, backbone: Backbone) -> LabelledPixels:
    """Twenty images; a clip is one image that comes in from the side."""
    pixels, labels = load_set(few_shots(open_split(data, "train"), 2, 0), replace(backbone.preprocess, frames=1))
    if backbone.preprocess.frames > 1:
        pixels = np.stack([np.roll(pixels, 8 * i, axis=2) for i in range(backbone.preprocess.frames)], axis=1)
    return LabelledPixels(pixels, labels)


if __name__ == "__main__":
    main()
