"""Images per second of ``train`` with LoRA, beside a plain PEFT loop on the same backbone, images and batch.

    pip install 'edgepet[train,demo,peft]'
    python benchmarks/training.py

Rounds are interleaved; a round of each candidate is one short epoch. PEFT puts its rank-8 pair on the fused qkv weight
(it cannot name q and v inside it), edgepet on q and v. Images are in memory, or mapped from files as ``train`` does
with those that memory does not hold: on the same backbone, and at 224 px on a network so small that little else takes
time. Writes ``training.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import safetensors.torch
import timm
import torch
from adapters import peft_lora
from harness import IMAGE_SIZES, Asked, asked, parser_of, write_result
from trainings import draw

from edgepet.images.held import load_held
from edgepet.images.preprocess import normalize
from edgepet.images.sets import ImageSet, open_split
from edgepet.measuring.latency import Ratio, ratio_of_runs
from edgepet.methods import LoRA
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.tuning.fit import LabelledPixels, Plan, fit
from edgepet.tuning.model import TunedModel
from edgepet.tuning.training import fast_bfloat16

BACKBONE, SMALL = "vit-small", "test_vit"
BATCH, IMAGES, ROUNDS = 32, 128, 9
QUICK_IMAGES, QUICK_ROUNDS = 16, 2


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    return parser_of(__doc__)


def main() -> None:
    """Train all candidates in turn."""
    run = asked(parser().parse_args())
    backbone = load_backbone(f"demo:{BACKBONE}", image_size=IMAGE_SIZES[BACKBONE])
    tiny = small_network(run)
    images, mapped = some_images(run, backbone, mapped=False), some_images(run, backbone, mapped=True)
    bf16 = fast_bfloat16()
    candidates: dict[str, Callable[[], float]] = {
        f"{SMALL} fp32": ours(tiny, some_images(run, tiny, mapped=False), False),
        f"{SMALL} fp32, mapped": ours(tiny, some_images(run, tiny, mapped=True), False),
        "edgepet fp32, mapped": ours(backbone, mapped, False),
        "edgepet fp32": ours(backbone, images, False),
        "peft fp32": theirs(backbone, images, False),
        "edgepet default": ours(backbone, images, bf16),
        "peft bf16": theirs(backbone, images, True),
    }  # those that are compared stand side by side: a machine that is not ours alone is faster at one time than another
    for one_epoch in candidates.values():
        one_epoch()
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(QUICK_ROUNDS if run.quick else ROUNDS):
        for turn in range(len(candidates)):
            name = list(candidates)[(number + turn) % len(candidates)]
            speeds[name].append(candidates[name]())

    def over(ours_name: str, theirs_name: str) -> Ratio:
        pairs = zip(speeds[ours_name], speeds[theirs_name], strict=True)
        return ratio_of_runs([a / b for a, b in pairs])

    facts = {
        "what": f"images/s, batch {BATCH}, {IMAGE_SIZES[BACKBONE]} px; ratios are medians over interleaved rounds",
        "default_precision": "bf16" if bf16 else "fp32",
        "images_per_second": {name: float(np.median(values)) for name, values in speeds.items()},
        "ratios": {
            "default over peft fp32": over("edgepet default", "peft fp32"),
            "fp32 over peft fp32": over("edgepet fp32", "peft fp32"),
            "default over peft bf16": over("edgepet default", "peft bf16"),
            "mapped over in memory": over("edgepet fp32, mapped", "edgepet fp32"),
            f"mapped over in memory, {SMALL}": over(f"{SMALL} fp32, mapped", f"{SMALL} fp32"),
        },
        "peft": version("peft"),
    }
    write_result(run, "training", facts)


def small_network(run: Asked) -> Backbone:
    """A network of 0.4 million seeded weights, at the size that most networks take."""
    torch.manual_seed(0)
    run.folder.mkdir(parents=True, exist_ok=True)
    file = run.folder / f"{SMALL}.safetensors"
    safetensors.torch.save_file(timm.create_model(SMALL, num_classes=0).state_dict(), file)
    return load_backbone(f"{SMALL}@{file}", image_size=224)


def some_images(run: Asked, backbone: Backbone, *, mapped: bool) -> LabelledPixels:
    """Digits, chosen by chance; in memory, or mapped from a file that ``train`` would make of them."""
    chosen = open_split(draw(run, "digits"), "train")
    some = np.random.default_rng(0).permutation(len(chosen))[: QUICK_IMAGES if run.quick else IMAGES]
    images: ImageSet = chosen.at(some.tolist())
    budget_bytes = 0 if mapped else 1 << 40
    folder = run.folder / f"{backbone.name}.pixels"
    return LabelledPixels(
        *load_held({"train": images}, backbone.preprocess, folder, budget_bytes=budget_bytes)["train"]
    )


def ours(backbone: Backbone, images: LabelledPixels, bf16: bool) -> Callable[[], float]:
    """``fit`` as ``train`` calls it; its own count of images per second covers the steps and nothing else."""
    few = LabelledPixels(images.pixels[:8], images.labels[:8])
    plan = Plan(epochs=1, lr=5e-3, head_lr=2e-3, batch_size=BATCH, autocast=bf16)

    def run() -> float:
        model = TunedModel(backbone, LoRA(), 10)
        return fit(model, images, few, backbone.preprocess, plan, lambda step: None).images_per_second

    return run


def theirs(backbone: Backbone, images: LabelledPixels, bf16: bool) -> Callable[[], float]:
    """The loop of PEFT's own image-classification guide, without its data loader: images are in memory, as ours are."""
    model = peft_lora(backbone, 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    labels = torch.from_numpy(images.labels)

    def run() -> float:
        model.train()
        began = time.perf_counter()
        for index in torch.split(torch.randperm(len(images)), BATCH):
            batch = torch.from_numpy(normalize(images.pixels[index.numpy()], backbone.preprocess))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = model(batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return len(images) / (time.perf_counter() - began)

    return run


if __name__ == "__main__":
    main()
