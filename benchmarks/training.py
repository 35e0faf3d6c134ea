"""Images per second of ``train`` with LoRA, beside a plain PEFT loop on the same backbone, images and batch.

    pip install 'edgepet[train,demo,peft]'
    python benchmarks/training.py

Rounds are interleaved; a round of each candidate is one short epoch. PEFT puts its rank-8 pair on the fused qkv weight
(it cannot name q and v inside it), edgepet on q and v. Writes ``results/training.json``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import timm
import torch
from latency import BACKBONE, IMAGE_SIZE

from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_set, open_split
from edgepet.measuring.latency import ratio_of_runs
from edgepet.measuring.machine import environment
from edgepet.methods import LoRA
from edgepet.networks.backbone import load_backbone
from edgepet.reports.as_json import to_json
from edgepet.samples.tasks import build_task
from edgepet.tuning.fit import LabelledPixels, Plan, fast_bfloat16, fit
from edgepet.tuning.model import TunedModel

BATCH, IMAGES, ROUNDS = 32, 128, 7
RESULT = Path(__file__).parent / "results" / "training.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        build_task("digits", Path(folder) / "digits")
        backbone = load_backbone(BACKBONE, image_size=IMAGE_SIZE)
        chosen = open_split(Path(folder) / "digits", "train")
        pixels, labels = load_set(chosen, backbone.preprocess)
    some = np.random.default_rng(0).permutation(len(labels))[:IMAGES]
    images = LabelledPixels(pixels[some], labels[some])
    bf16 = fast_bfloat16()
    candidates: dict[str, Callable[[], float]] = {
        "edgepet default": ours(backbone, images, bf16),
        "edgepet fp32": ours(backbone, images, False),
        "peft fp32": theirs(backbone, images, False),
        "peft bf16": theirs(backbone, images, True),
    }
    for run in candidates.values():
        run()
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(ROUNDS):
        for turn in range(len(candidates)):
            name = list(candidates)[(number + turn) % len(candidates)]
            speeds[name].append(candidates[name]())

    def over(ours_name: str, theirs_name: str) -> object:
        pairs = zip(speeds[ours_name], speeds[theirs_name], strict=True)
        return to_json(ratio_of_runs([a / b for a, b in pairs]))

    result = {
        "command": "python benchmarks/training.py",
        "what": f"images/s, batch {BATCH}, {IMAGE_SIZE} px; ratios are medians over interleaved rounds",
        "default_precision": "bf16" if bf16 else "fp32",
        "images_per_second": {name: float(np.median(values)) for name, values in speeds.items()},
        "ratios": {
            "default over peft fp32": over("edgepet default", "peft fp32"),
            "fp32 over peft fp32": over("edgepet fp32", "peft fp32"),
            "default over peft bf16": over("edgepet default", "peft bf16"),
        },
        "peft": peft.__version__,
        "environment": to_json(environment()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def ours(backbone: object, images: LabelledPixels, bf16: bool) -> Callable[[], float]:
    """``fit`` as ``train`` calls it; its own count of images per second covers the steps and nothing else."""
    few = LabelledPixels(images.pixels[:8], images.labels[:8])
    plan = Plan(epochs=1, lr=5e-3, head_lr=2e-3, batch_size=BATCH, autocast=bf16)

    def run() -> float:
        model = TunedModel(backbone, LoRA(), 10)
        return fit(model, images, few, backbone.preprocess, plan, lambda step: None).images_per_second

    return run


def theirs(backbone: object, images: LabelledPixels, bf16: bool) -> Callable[[], float]:
    """The loop of PEFT's own image-classification guide, without its data loader: images are in memory, as ours are."""
    network = timm.create_model(backbone.name, num_classes=10, **backbone.create_args)
    network.load_state_dict({n: torch.from_numpy(np.array(t)) for n, t in backbone.tensors.items()}, strict=False)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    model = peft.get_peft_model(network, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    labels = torch.from_numpy(images.labels)

    def run() -> float:
        model.train()
        began = time.perf_counter()
        for index in torch.randperm(IMAGES).split(BATCH):
            batch = torch.from_numpy(normalize(images.pixels[index.numpy()], backbone.preprocess))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = model(batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return IMAGES / (time.perf_counter() - began)

    return run


if __name__ == "__main__":
    main()
