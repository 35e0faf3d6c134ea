"""Packs with a head for masks that nobody trained: every number drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgepet.deltas.delta import Delta
from edgepet.images.masks import squashed
from edgepet.methods import METHODS
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.packs.codecs import Codec
from edgepet.packs.pack import EVERY, encode_pack, read_pack, write_pack
from edgepet.proving.probing import probed
from edgepet.tuning.dense import DenseModel, extract_dense
from tests.tiny import tiny_vit

LABELS = ("red", "green", "blue")


def mask_backbone(folder: Path, *, pixels: int = 64) -> Backbone:
    """A tiny transformer that sees all of an image."""
    backbone = tiny_vit(folder, 5, image_size=pixels)
    return replace(backbone, preprocess=squashed(backbone.preprocess))


def mask_delta(
    backbone: Backbone, method: str, *, form: Form | None = None, task: str | None = None, seed: int = 3,
    labels: Sequence[str] = LABELS,
) -> Delta:  # fmt: skip
    """A task of masks, its method and its head away from where they start."""
    settings = {"length": 3} if method.startswith("vpt") else {}
    model = DenseModel(backbone, METHODS[method](**settings), form or Form(width=8), len(labels), seed=1)
    return extract_dense(moved_model(model, seed), backbone, task=task or method, labels=tuple(labels))


def moved_model(model: DenseModel, seed: int) -> DenseModel:
    """Itself, its method and its heads away from where they start; scores of boxes are of all sizes."""
    rng = np.random.default_rng(seed)
    moved = {name: x + 0.05 * rng.standard_normal(x.shape) for name, x in model.arrays().items()}
    model.take({name: x.astype(np.float32) for name, x in moved.items()})
    drawn = torch.Generator().manual_seed(seed)
    for name, parameter in (each for form in model.forms for each in form.named_parameters()):
        if parameter.ndim > 1 or name.endswith("gamma"):
            nn.init.trunc_normal_(parameter, std=parameter[0].numel() ** -0.5, generator=drawn)
        elif name == "what.bias":
            nn.init.constant_(parameter, -1.0)
    return model.eval()


def mask_pack(path: Path, backbone: Backbone, delta: Delta, *, codec: Codec = "fp16", sequence: int = 0) -> Path:
    """A pack of ``delta`` as it is stored, with its probe."""
    stored = read_pack(encode_pack(delta, codec=codec), answers=EVERY)
    write_pack(path, probed(backbone, stored.delta), kept=stored.planes, sequence=sequence)
    return path
