"""The local intrinsic dimension of a network's submodules: how few numbers suffice to tune each of them.

He et al. 2023, "Parameter-efficient Model Adaptation for Vision Transformers", arXiv:2203.16329, section 3.2, who
choose by it what to tune; the measure is of Li et al. 2018, arXiv:1804.08838: the smallest random subspace
(``subspaces``) in which tuning reaches 90 % of what it does in all of the weights. What is reached here is what tuning
takes off the loss on held-out images, beyond what training the head alone for as long does: with a pretrained network a
head alone has most of the accuracy, and a few hundred images tell losses apart where they do not tell accuracies.
Needs the ``train`` extra.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from edgepet.errors import InputError
from edgepet.methods import LinearProbe, Method
from edgepet.methods.depth import blocks_in_order, in_blocks
from edgepet.networks.backbone import Backbone
from edgepet.tuning.computing import computing, features_of, inputs_of
from edgepet.tuning.fit import LabelledPixels, Plan, fit
from edgepet.tuning.model import TunedModel
from edgepet.tuning.remembered import Place, remember
from edgepet.tuning.subspaces import InSubspace, Submodule

SHARE = 0.9
DIMENSIONS = (16, 128, 1024, 8192, 65536)
EPOCHS, BATCH, SMOOTHING = 2, 8, 0.1
HEAD_LR, STEP = 1e-3, 0.3  # of the head; of how far the first gradient reaches, the first step of the submodule
PROBE_EPOCHS = 60
LOOKED_AT, MOST_TRIED = 32, 8  # images, and steps that are tried on them
FACTOR, FIRST = 3.0, 1e-4  # from one such step to the next; the first, of a weight
LEAST_GAIN = 1e-5  # less is what float32 rounds
OVERHEAD = 1.3  # of a fit over its passes: Adam, the projection, the blocks before; 1.2 to 1.35 measured on a ViT-S
SETTINGS = {  # what decides the fits, for those who keep what was measured
    "share": SHARE, "dimensions": list(DIMENSIONS), "epochs": EPOCHS, "batch": BATCH, "smoothing": SMOOTHING,
    "head_lr": HEAD_LR, "step": STEP, "probe_epochs": PROBE_EPOCHS, "looked_at": LOOKED_AT, "tried": MOST_TRIED,
    "factor": FACTOR, "first": FIRST,
}  # fmt: skip

Take: TypeAlias = Callable[[Tensor], Tensor]  # indices of images -> what the network takes of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What a fit in a subspace of ``dimension`` reached; 0 is the whole submodule.

    ``gain`` is what it took off the mean loss on held-out images, ``error`` the standard error of that, ``top1`` its
    accuracy there.
    """

    dimension: int
    gain: float
    error: float
    top1: float

    @property
    def counts(self) -> bool:
        """Whether the gain is more than its standard error, and than rounding."""
        return self.gain > max(self.error, LEAST_GAIN)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """What every fit begins with, a linear probe, and is compared with: its head, trained on for as long as a fit.

    ``losses`` (n,) and ``top1`` are that head's on val.
    """

    backbone: Backbone
    train: LabelledPixels
    val: LabelledPixels
    probe: TunedModel
    losses: Tensor
    top1: float
    seed: int

    def model(self, method: Method) -> TunedModel:
        """``method`` at its start, behind the probe's head."""
        made = TunedModel(self.backbone, method, self.probe.linear.out_features, seed=self.seed)
        own = {name: value for name, value in self.probe.state_dict().items() if not name.startswith("backbone.")}
        made.load_state_dict(own, strict=False)
        return made


def prepare(backbone: Backbone, train: LabelledPixels, val: LabelledPixels, *, classes: int, seed: int) -> Ground:
    """Train the head that all fits begin with, and on."""
    plan = Plan(epochs=PROBE_EPOCHS, lr=1.0, head_lr=2 * HEAD_LR, seed=seed)
    probe = TunedModel(backbone, LinearProbe(), classes, seed=seed)
    fit(probe, train, val, backbone.preprocess, plan, lambda step: None)
    begun = Ground(backbone=backbone, train=train, val=val, probe=probe, losses=torch.empty(0), top1=0.0, seed=seed)
    seen, held = (features_of(probe, images.pixels, backbone.preprocess, plan) for images in (train, val))
    alone = begun.model(LinearProbe())
    _train(alone, alone.classify, seen.__getitem__, train, 0.0, seed)
    losses, top1 = _judged(alone, held, val)
    return replace(begun, losses=losses, top1=top1)


class Group:
    """The fits of submodules in the same blocks: what lies before these is computed once."""

    def __init__(self, ground: Ground, submodule: Submodule, place: Place) -> None:
        self.ground, self.plan = ground, Plan(epochs=EPOCHS, lr=1.0, head_lr=HEAD_LR, seed=ground.seed)
        model = self._model(submodule, 0)
        self.known = remember(model, ground.backbone, ground.train, ground.val, self.plan, place)

    def _model(self, submodule: Submodule, dimension: int) -> TunedModel:
        ground = self.ground
        return ground.model(in_blocks(InSubspace((submodule.on,), dimension, ground.seed), submodule.blocks))

    def measured(self, submodule: Submodule) -> tuple[Reached, ...]:
        """The whole submodule, then growing subspaces until one reaches enough; none where the whole gains nothing."""
        tried = [self.reached(submodule, 0)]
        if tried[0].counts:
            for dimension in DIMENSIONS:
                if dimension < submodule.parameters and (len(tried) < 2 or tried[-1].gain < SHARE * tried[0].gain):
                    tried.append(self.reached(submodule, dimension))
        return tuple(tried)

    def reached(self, submodule: Submodule, dimension: int) -> Reached:
        """Fit the submodule in a subspace of ``dimension``, or with 0 all of it.

        Raises:
            InputError: the loss stopped being finite.
        """
        ground, model, preprocess = self.ground, self._model(submodule, dimension), self.ground.backbone.preprocess
        train, val = (ground.train, ground.val) if self.known is None else (self.known.train, self.known.val)
        first = FIRST * math.sqrt(submodule.parameters / (dimension or submodule.parameters))
        with computing(model, self.plan, learning=True), model.beginning(self.known.front if self.known else None):

            def take(index: Tensor) -> Tensor:
                return inputs_of(model, train.pixels[index.numpy()], preprocess)

            _train(model, model, take, train, STEP * _reach(model, take, train, first, ground.seed), ground.seed)
            held = features_of(model, val.pixels, preprocess, self.plan)
        losses, top1 = _judged(model, held, val)
        gains = ground.losses - losses
        if not bool(gains.isfinite().all()):
            raise InputError(f"{submodule.name}, {dimension or 'all'} dimensions", "the loss stopped being finite")
        error = float(gains.std()) / math.sqrt(len(gains))
        return Reached(dimension=dimension, gain=float(gains.mean()), error=error, top1=top1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A submodule, and all fits of it, the whole submodule's first."""

    submodule: Submodule
    tried: tuple[Reached, ...]

    @property
    def gain(self) -> float:
        """What tuning the whole submodule takes off the loss, where that is above its standard error; else 0."""
        return self.tried[0].gain if self.tried[0].counts else 0.0

    @property
    def dimension(self) -> int | None:
        """The dimension at 90 % of ``gain``; between the last subspace below it and the first above, by logarithms.

        None where there is no gain, and all parameters where no subspace reached it.
        """
        if not self.gain:
            return None
        enough, before = SHARE * self.gain, None
        for each in self.tried[1:]:
            if each.gain >= enough:
                if before is None:
                    return each.dimension
                share = (enough - before.gain) / (each.gain - before.gain)
                return round(before.dimension * math.pow(each.dimension / before.dimension, share))
            before = each
        return self.submodule.parameters


def most_seconds(ground: Ground, missing: Sequence[Submodule]) -> float:
    """How long the fits of ``missing`` submodules take if all subspaces are tried, by the speed of a step now."""
    backbone, blocks = ground.backbone, len(blocks_in_order(ground.backbone.layers))
    model = ground.model(in_blocks(InSubspace((missing[0].on,)), missing[0].blocks))
    index = torch.arange(min(BATCH, len(ground.train)))
    labels = torch.from_numpy(ground.train.labels)[index]
    images = inputs_of(model, ground.train.pixels[: len(index)], backbone.preprocess)
    there, back = math.inf, math.inf
    for _ in range(3):  # the first is slower, and others may be busy
        began = time.perf_counter()
        loss = _losses(model(images), labels).mean()
        between = time.perf_counter()
        torch.autograd.backward(loss)
        there, back = min(there, between - began), min(back, time.perf_counter() - between)
    there, back = there / len(index), back / len(index)
    behind = (blocks - int(missing[0].blocks.partition("-")[0])) / blocks
    total = 0.0
    for each in missing:
        share = (blocks - int(each.blocks.partition("-")[0])) / blocks
        one_batch = min(LOOKED_AT, len(ground.train))
        learnt = EPOCHS * len(ground.train) + one_batch
        looked_at = len(ground.val) + MOST_TRIED * one_batch
        total += share * ((learnt + looked_at) * there + learnt * back / behind)
    return OVERHEAD * total * (1 + len(DIMENSIONS))


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="none")


def _judged(model: TunedModel, features: Tensor, images: LabelledPixels) -> tuple[Tensor, float]:
    labels = torch.from_numpy(images.labels)
    with torch.no_grad():
        logits = model.classify(features)
    return _losses(logits, labels), float((logits.argmax(1) == labels).float().mean())


def _train(
    model: TunedModel, answer: Callable[[Tensor], Tensor], take: Take, images: LabelledPixels, lr: float, seed: int
) -> None:
    """Adam with a cosine, ``EPOCHS`` times through ``images`` in the order of ``seed``."""
    model.train()
    groups = [
        {"params": list(model.tensors.parameters()), "lr": lr},
        {"params": list(model.linear.parameters()), "lr": HEAD_LR},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    generator, labels = torch.Generator().manual_seed(seed), torch.from_numpy(images.labels)
    steps, taken = EPOCHS * math.ceil(len(images) / BATCH), 0
    rates = [(float(group["lr"]), group) for group in optimizer.param_groups]
    for _ in range(EPOCHS):
        for index in torch.split(torch.randperm(len(images), generator=generator), BATCH):
            for rate, group in rates:
                group["lr"] = rate * (1 + math.cos(math.pi * taken / steps)) / 2
            optimizer.zero_grad()
            torch.autograd.backward(_losses(answer(take(index)), labels[index]).mean())
            optimizer.step()
            taken += 1
    model.eval()


def _reach(model: TunedModel, take: Take, images: LabelledPixels, first: float, seed: int) -> float:
    """How far along the signs of its gradient the loss of one batch falls most: a scale of steps, in any subspace.

    As a step of Adam is of one size in every coordinate, so is this; ``first`` is tried first, then larger and smaller
    ones until the loss rises. The submodule comes back as it was.
    """
    (z,) = model.tensors
    index = torch.split(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)), LOOKED_AT)[0]
    inputs, labels = take(index), torch.from_numpy(images.labels)[index]
    (gradient,) = torch.autograd.grad(_losses(model(inputs), labels).mean(), [z])
    signs, tried = gradient.sign(), dict[float, float]()

    def falls(size: float) -> bool:
        """Whether no other size takes the loss lower."""
        with torch.no_grad():
            z.copy_(-size * signs)
            tried[size] = float(_losses(model(inputs), labels).mean())
        return tried[size] <= min(tried.values())

    falls(first)
    for factor in (FACTOR, 1 / FACTOR):
        size = first * factor
        while len(tried) < MOST_TRIED and falls(size):
            size *= factor
    with torch.no_grad():
        z.zero_()
    return min(tried, key=tried.__getitem__)
