"""Write the golden files of this folder: ``python -m tests.golden.make FOLDER``.

The files beside this script were made before the house was rearranged (ADR-0017) and are never made again: what is
added to a format gets files of its own. Packs were written anew, with their numbers, when their format was final
(ADR-0030); ``packs/before`` are three of those that they were. ``tasks/maps`` are the graphs of the int8 backbone since
maps have codes (ADR-0048); those in ``tasks/device`` are older, and are still read. Weights and pixels come from
integer formulas, so that no generator's stream and no library's sums are in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

import edgepet
from edgepet import SSF, Backbone, LoRA, Preprocess
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.deltas.branches import BRANCHES, Branch
from edgepet.deltas.codes import Range
from edgepet.deltas.delta import Delta, Head, Int8Ranges, Score
from edgepet.deltas.expressions import Binary, Gather, Householder, Mix, Product, Scaled, Seeded, Window
from edgepet.deltas.merge import fold_all
from edgepet.deltas.probe import Probe
from edgepet.deltas.updates import (
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
from edgepet.device.store import Store
from edgepet.exporters.exporter import ExportOptions
from edgepet.exporters.trace import base_graph
from edgepet.packs.codecs import CODECS, Codec
from edgepet.packs.container import signed_bytes, with_signature
from edgepet.packs.pack import read_pack, write_pack
from edgepet.spec import NpArray, Target

CLASSES = ("circle", "square", "triangle")
SIZE, WIDTH = 16, 12  # pixels, features


def values(*shape: int, seed: int, unit: float = 1 / 64) -> NpArray:
    """Float32 multiples of ``unit`` between -32 and 32 of them, without any generator."""
    count = int(np.prod(shape, dtype=int))
    return (((np.arange(count) * 37 + 11 * seed) % 65 - 32) * unit).astype(np.float32).reshape(shape)


def network() -> Backbone:
    """Convolutions with batch norms, then linear layers with a layer norm; every tensor from a formula."""
    module = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            stem_norm=nn.BatchNorm2d(8),
            act=nn.ReLU(),
            depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            depthwise_norm=nn.BatchNorm2d(8),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc1=nn.Linear(8, 16),
            norm=nn.LayerNorm(16),
            fc2=nn.Linear(16, WIDTH),
        )
    )
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(module.state_dict().items()):
            if tensor.is_floating_point():
                made = torch.from_numpy(values(*tensor.shape, seed=seed))
                positive = name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight"))
                tensor.copy_(1 + made / 2 if positive else made)
    preprocess = Preprocess(image_size=(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Backbone.from_module(module, name="golden", preprocess=preprocess, licence="CC0-1.0")


def draw(folder: Path, each: dict[str, int]) -> None:
    """``each`` images of every class and split: a patch of the class's own place and colour on a pattern."""
    for split, count in each.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                start = 100 * label + 7 * number + len(split)
                pixels = (values(SIZE, SIZE, 3, seed=start, unit=1) + 96).astype(np.uint8)
                pixels[4 * label : 4 * label + 6, 2 : 12 - label, label] = 200 + number % 50
                Image.fromarray(pixels).save(folder / split / name / f"{number:02d}.png")


# ------------------------------------------------------------------------------------------------------------- packs


def delta(updates: tuple[Targeted, ...] = (), **given: Any) -> Delta:
    """A task of three classes with these updates."""
    head = Head(weight=values(3, 4, seed=1), bias=values(3, seed=2))
    facts: dict[str, Any] = {
        "task": "golden", "backbone": "tiny", "fingerprint": "sha256:" + "4f1c" * 16, "labels": CLASSES,
        "preprocess": Preprocess(image_size=(32, 48), crop="squash", interpolation="bilinear"), "method": "golden",
        "settings": {"rank": 2, "on": ["q", "v"], "ranks": {"fc1": 4}, "shuffle": True, "alpha": 0.5},
        "training": {"epochs": 3, "versions": {"torch": "2.0"}}, "val": Score(top1=0.875, n=8),
        "licences": ("CC0-1.0",),
    }  # fmt: skip
    return Delta(updates=updates, head=head, **{**facts, **given})


def every_update() -> tuple[Targeted, ...]:
    """Each kind of update with each of its forms: blocks, shared arrays, expressions, absent factors."""

    def at(block: int, name: str, rows: Any = None, cols: Any = None) -> Target:
        return Target(f"blocks.{block}.{name}.weight", rows, cols)

    shared, order = values(4, 2, seed=5), np.array([2, 0, 3, 1])
    cube, weights = values(2, 2, 3, seed=6), values(3, 2, seed=7)
    bits = values(4, 2, seed=8) > 0
    made: list[Targeted] = []
    for block in range(3):
        made += [
            Targeted(at(block, "fc1"), Scale(values(4, seed=10 + block))),
            Targeted(at(block, "fc2"), Scale(values(4, seed=20 + block), "in")),
            Targeted(Target(f"blocks.{block}.fc1.bias"), Add(values(4, seed=30 + block))),
            Targeted(at(block, "qkv", (0, 4)), LowRank(shared, values(2, 4, seed=40 + block), scale=0.5)),
            Targeted(at(block, "qkv", (8, 12)), LowRank(shared, values(2, 4, seed=50 + block), values(2, 2, seed=4))),
            Targeted(at(block, "proj"), Grouped(values(2, 2, 2, seed=60 + block), order)),
            Targeted(at(block, "out"), Grouped(values(2, 2, 2, seed=65 + block))),
            Targeted(at(block, "up"), Kronecker(values(2, 2, 2, seed=70 + block), values(2, 2, 2, seed=3), 0.25)),
            Targeted(at(block, "down"), Precompose(values(2, 2, 1, seed=80 + block), values(2, 4, seed=9))),
            Targeted(Target(f"blocks.{block}.norm.running_mean"), Replace(values(4, seed=90 + block))),
        ]
    made += [
        Targeted(at(9, "a", None, (4, 8)), LowRank(shared, values(2, 4, seed=11), Mix(cube, weights, 1, True))),
        Targeted(
            at(9, "b"), Kronecker(values(1, 2, 2, seed=12), Product(values(1, 2, 1, seed=1), values(1, 1, 2, seed=2)))
        ),
        Targeted(at(9, "c"), LowRank(Binary(bits, values(2, seed=13)), values(2, 4, seed=14))),
    ]
    return tuple(made)


def closing_updates() -> tuple[Targeted, ...]:
    """The updates and expressions with which version 1 was closed (ADR-0026), in each of their forms."""
    theta, basis, kernel = values(6, seed=15), values(4, 2, seed=16), Target("stem.weight")
    made: list[Targeted] = []
    for block in range(3):
        name = f"blocks.{block}"
        gathered = [Gather(theta, 5, 48, Window(16 * block + at, shape)) for at, shape in ((0, (4, 2)), (8, (2, 4)))]
        drawn = Seeded(2**53 - 1, 0.5, Window(0, (4, 2))), Seeded(0, 0.25, Window(100 + 8 * block, (2, 4)))
        turned = Scaled(values(2, seed=30 + block), basis, transposed=True)
        reflected = Householder(values(4, seed=50 + block), values(3, seed=60 + block), values(3, seed=70 + block))
        made += [
            Targeted(
                Target(f"{name}.q.weight"), Modulate(values(4, 1, seed=block), values(1, 4, seed=10 + block), scale=0.5)
            ),
            Targeted(Target(f"{name}.q.bias"), Push(values(4, seed=20 + block), Target(f"{name}.q.weight"), "updated")),
            Targeted(
                Target(f"{name}.norm.running_mean", (0, 4)),
                Push(values(2, seed=80 + block), Target(f"{name}.conv.weight", (0, 4), (0, 4)), "frozen", scale=-1.0),
            ),
            Targeted(Target(f"{name}.k.weight", (0, 4)), Diagonal(values(3, seed=40 + block))),
            Targeted(Target(f"{name}.v.weight"), LowRank(*gathered, scale=2.0)),
            Targeted(
                Target(f"{name}.o.weight"),
                LowRank(Scaled(values(4, seed=90 + block), drawn[0]), Scaled(values(2, seed=95 + block), drawn[1])),
            ),
            Targeted(Target(f"{name}.up.weight"), Precompose(basis, turned)),
            Targeted(Target(f"{name}.down.weight", (0, 4)), Add(reflected)),
        ]
    return (*made, Targeted(Target("stem.bias"), Push(Seeded(3, 1.0, Window(7, (3,))), kernel)))


def closing_base() -> dict[str, NpArray]:
    """Float64 tensors that ``closing_updates`` fit."""
    shapes = {"stem.weight": (5, 3, 2, 2), "stem.bias": (5,)}
    for block in range(3):
        shapes |= {f"blocks.{block}.{name}.weight": (4, 4) for name in ("q", "v", "o", "up")}
        shapes |= {f"blocks.{block}.{name}.weight": (4, 3) for name in ("k", "down")}
        shapes |= {f"blocks.{block}.conv.weight": (4, 4), f"blocks.{block}.q.bias": (4,)}
        shapes |= {f"blocks.{block}.norm.running_mean": (4,)}
    return {name: values(*shape, seed=i).astype(np.float64) for i, (name, shape) in enumerate(shapes.items())}


# The kinds of packs/branches.pet; those that came later are in packs/further-branches.pet.
FIRST_KINDS = (
    "bottleneck", "patch-conv", "conv-pair", "stage-prompt", "temporal", "tokens", "key-values", "prompts",
)  # fmt: skip
FURTHER_KINDS = tuple(kind for kind in BRANCHES if kind not in FIRST_KINDS)


def every_branch(kinds: Sequence[str] = tuple(BRANCHES)) -> tuple[Branch, ...]:
    """Two branches of each kind, at points of their own."""
    settings = {"activation": "gelu", "prefix": 1, "height": 2, "width": 3, "stride": 1, "padding": 1, "dilation": 1,
                "frames": 2, "heads": 2, "recurrences": 2}  # fmt: skip
    return tuple(
        Branch(
            kind=kind,
            tap=f"blocks.{block}.{kind.replace('-', '_')}:in",
            into=f"blocks.{block}.{kind.replace('-', '_')}:out",
            settings={name: settings[name] for name in BRANCHES[kind].settings},
            tensors={
                name: values(*range(2, 2 + axes), seed=block + number)
                for number, (name, axes) in enumerate(BRANCHES[kind].tensors.items())
            },
        )
        for kind in kinds
        for block in range(2)
    )


def packs(folder: Path) -> None:
    """One pack for every part of the format."""
    folder.mkdir(parents=True)
    ranges = Int8Ranges(codes="0123456789abcdef" * 4, ranges=(Range(scale=0.25), Range(scale=0.5, shift=-1.5)))
    clips = Preprocess(image_size=(16, 16), frames=8)
    made: dict[str, tuple[Delta, Codec]] = {
        "updates-fp16": (delta(every_update()), "fp16"),
        "updates-fp32": (delta(every_update()), "fp32"),
        "closing-fp16": (delta(closing_updates()), "fp16"),
        "closing-fp32": (delta(closing_updates()), "fp32"),
        "branches": (delta(branches=every_branch(FIRST_KINDS)), "fp16"),
        "further-branches": (delta(branches=every_branch(FURTHER_KINDS)), "fp16"),
        "clips": (delta(preprocess=clips), "fp16"),
        "int8": (delta(int8=ranges, training={}, licences=()), "fp32"),
    }
    for name, (of, codec) in made.items():
        write_pack(folder / f"{name}.pet", of, codec=codec)
    coded(folder)
    save_file(fold_all(closing_base(), closing_updates()), folder / "closing-folded.safetensors")


def large_enough() -> tuple[Targeted, ...]:
    """Planes of more values than are too few for codes: scales, shifts, factors, bits, and an order."""
    order = (np.arange(64) * 27 + 5) % 64
    made: list[Targeted] = []
    for block in range(2):
        name = f"blocks.{block}"
        made += [
            Targeted(Target(f"{name}.fc1.weight"), Scale(1 + values(160, seed=block, unit=1 / 256))),
            Targeted(Target(f"{name}.fc1.bias"), Add(values(160, seed=5 + block))),
            Targeted(
                Target(f"{name}.qkv.weight"), LowRank(values(64, 3, seed=10 + block), values(3, 70, seed=20 + block))
            ),
            Targeted(Target(f"{name}.proj.weight"), Grouped(values(8, 8, 8, seed=30 + block), order)),
            Targeted(
                Target(f"{name}.up.weight"),
                LowRank(Binary(values(40, 5, seed=40 + block) > 0, values(2, seed=50)), values(5, 40, seed=60 + block)),
            ),
        ]
    return tuple(made)


def coded(folder: Path) -> None:
    """A pack in each codec, one with probes, and one that is signed; and what every plane of every pack is read as.

    The key is the one of RFC 8032, section 7.1, test 1: it is no secret.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    for codec in CODECS:
        write_pack(folder / f"codec-{codec}.pet", delta(large_enough()), codec=codec, sequence=3)
    probe = Probe(20221017, values(4, 3, seed=70), 0.25)
    probes: Any = {"fp32": probe, "int8": replace(probe, seed=20221018, tolerance=0.5)}
    write_pack(folder / "probes.pet", delta(large_enough(), probes=probes), codec="int4")
    plain = (folder / "codec-int8.pet").read_bytes()
    key = Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    (folder / "signed.pet").write_bytes(with_signature(plain, key.sign(signed_bytes(plain)).hex()))
    digests = {path.name: decoded(path) for path in sorted(folder.glob("*.pet"))}
    (folder / "decoded.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


def decoded(path: Path) -> dict[str, str]:
    """The sha256 of every plane as it is read, little-endian: float16 or float32, int32, or bytes of bits."""
    planes = read_pack(path).planes
    return {
        name: hashlib.sha256(plane.values.astype(plane.values.dtype.newbyteorder("<")).tobytes()).hexdigest()
        for name, plane in sorted(planes.items())
    }


# ----------------------------------------------------------------------------------------------- a task, end to end


class StopError(Exception):
    """A training that ends in its second epoch, as a power cut ends it."""


def interrupted(data: Path, pack: Path) -> None:
    """Leave the checkpoint of a training of three epochs."""

    def stop(step: Any) -> None:
        if step.epoch == 2:
            raise StopError

    try:
        train(data, pack, SSF(), epochs=3, say=stop)
    except StopError:
        return
    raise AssertionError("the training was not interrupted")


def train(data: Path, pack: Path, method: Any, **options: Any) -> Any:
    """A short training of the golden network."""
    return edgepet.train(data, network(), method, pack, batch_size=8, precision="fp32", device="cpu", **options)


def tasks(folder: Path, data: Path) -> None:
    """Packs with work folders, a checkpoint, a store with both graphs, artefacts and merged weights."""
    draw(data, {"train": 16, "val": 8})
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train(data, folder / "shapes.pet", SSF(), epochs=2)
    train(data, folder / "tints.pet", LoRA(rank=2, on=("fc1", "fc2")), epochs=2)
    interrupted(data, folder / "cut.pet")
    backbone = network()
    shared = folder / "shared"
    shared.mkdir()
    for name in ("shapes", "tints"):
        edgepet.share(folder / f"{name}.pet", data, shared / f"{name}.pet", backbone=backbone)
    edgepet.merge(folder / "shapes.pet", folder / "shapes.safetensors", backbone=backbone)
    for precision in ("fp32", "fp16", "int8"):
        options = ExportOptions(
            to=("onnx", "openvino"), precision=precision, calib=None if precision == "fp32" else data
        )
        edgepet.export([folder / "shapes.pet"], folder / "artifacts", backbone=backbone, options=options)
    store = Store(folder / "device")
    graph = base_graph(backbone)
    store.add_graph(graph)
    store.add_int8(int8_graph(graph))
    for name in ("shapes", "tints"):
        store.install(shared / f"{name}.pet")


def main(folder: Path) -> None:
    """Write everything below ``folder``, with the cache in it for the time being."""
    packs(folder / "packs")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EDGEPET_CACHE"] = str(Path(scratch) / "cache")
        tasks(folder / "tasks", Path(scratch) / "data")
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    sys.stdout.write(
        json.dumps({str(path.relative_to(folder)): path.stat().st_size for path in listed}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
