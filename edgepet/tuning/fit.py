"""Fit a tuned model to images: one loop, its plan, and what it reached. Needs the ``train`` extra."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.deltas.delta import Score
from edgepet.errors import InputError, first_line, option
from edgepet.reports.progress import Say, Step
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.augmenting import Augmenter
from edgepet.tuning.balance import class_weights, epoch_order
from edgepet.tuning.checkpoint import Checkpoint, Keeper, no_whole
from edgepet.tuning.computing import autocast, computing, features_of
from edgepet.tuning.consistency import Pace, pace_of
from edgepet.tuning.model import TunedModel
from edgepet.tuning.optimizers import Schedule, optimizer_of, schedule_of, set_state, state_of
from edgepet.tuning.parts import Parts
from edgepet.tuning.processes import ALONE, Processes
from edgepet.tuning.recipes import OWN_OPTIMIZER, OWN_SCHEDULE, Balance


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides a fit besides method, backbone and images.

    ``batch_size`` images make one step of the optimiser, however many processes share them and in however many parts
    (``accumulate``; of None there are as few as memory bears) a process goes through its own. Learning rates, ``lr`` of
    the method's tensors and ``head_lr`` of the head, rise over ``warmup``, a fraction of all steps, and fall as
    ``schedule`` says. With ``autocast`` the network computes in bf16. ``device`` is torch's name. What is not told here
    is as in ``TrainOptions``.
    """

    epochs: int
    lr: float
    head_lr: float
    batch_size: int = 32
    accumulate: int | None = None
    weight_decay: float = 1e-4
    warmup: float = 0.1
    label_smoothing: float = 0.1
    augment: tuple[str, ...] = ()
    optimizer: str = OWN_OPTIMIZER
    schedule: str = OWN_SCHEDULE
    balance: Balance | None = None
    consistency: str | None = None
    patience: int | None = None
    autocast: bool = False
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class LabelledPixels:
    """Decoded images, uint8 (n, H, W, 3), or clips (n, frames, H, W, 3), and their labels, int64 (n,).

    For a model that begins at a block ``pixels`` are kept rows of its ``Front``.
    """

    pixels: NpArray
    labels: NpArray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a fit reached: the epoch that was kept, of ``epochs`` that there were, and how fast images went through.

    ``val`` is that epoch's. ``probe`` is what a linear probe reaches on the features that the fit began with; None
    where the fit is one itself, or was begun by a version that had none. ``images_per_second`` is of training steps
    alone, ``seconds`` is all of this process's fit.
    """

    best_epoch: int
    epochs: int
    val: Score
    probe: Score | None
    images_per_second: float
    seconds: float


Judge: TypeAlias = Callable[[TunedModel, LabelledPixels, Preprocess, Plan, Tensor | None], tuple[float, float]]


def top1_and_loss(
    model: TunedModel, val: LabelledPixels, preprocess: Preprocess, plan: Plan, held: Tensor | None
) -> tuple[float, float]:
    """Top-1 and mean loss of ``model`` on ``val``; ``held`` are its features, where they do not change."""
    model.eval()
    features = features_of(model, val.pixels, preprocess, plan) if held is None else held
    labels = torch.from_numpy(val.labels).to(plan.device)
    with torch.no_grad():
        logits = model.classify(features)
    return float((logits.argmax(1) == labels).float().mean()), float(functional.cross_entropy(logits, labels))


def fit(
    model: TunedModel,
    train: LabelledPixels,
    val: LabelledPixels,
    preprocess: Preprocess,
    plan: Plan,
    say: Say,
    *,
    keeper: Keeper | None = None,
    processes: Processes = ALONE,
    judge: Judge = top1_and_loss,
) -> Fit:
    """Train ``model`` and leave it at its best epoch by val top-1, the lower loss deciding between equals.

    It comes back on the CPU and in eval mode. Gradients are clipped to a norm of 1. The same seed, data, thread count
    and machine give the same bits, also when ``keeper`` resumes it on the way.

    Args:
        judge: gives the two numbers of an epoch by which epochs are compared.

    Raises:
        InputError: the loss stopped being finite, or a checkpoint cannot be written, is damaged or of another training.
        KeyboardInterrupt: ``keeper`` was told to stop; a checkpoint was written.
    """
    try:
        with computing(model, plan, learning=True):
            return Run(model, train, val, preprocess, plan, processes, judge).fit(say, keeper)
    finally:
        model.to("cpu").eval()


class Run:
    """One fit of a classifier under way. What ``state`` holds is all that the steps to come depend on.

    A fit of something else is one too: it has its own ``prepare``, ``look`` and ``backward``, and its own judge.
    """

    def __init__(
        self,
        model: TunedModel,
        train: LabelledPixels,
        val: LabelledPixels,
        preprocess: Preprocess,
        plan: Plan,
        processes: Processes,
        judge: Judge,
    ) -> None:
        self.model, self.train, self.val, self.preprocess, self.plan, self.processes, self.judge = (
            model, train, val, preprocess, plan, processes, judge,
        )  # fmt: skip
        torch.manual_seed(plan.seed + processes.rank)
        self.order = torch.Generator().manual_seed(plan.seed)
        self.labels = torch.from_numpy(train.labels)
        self.optimizer = _optimizer(model, plan)
        self.schedule = _schedule(self.optimizer, plan, len(train))
        self.parts = Parts(model, plan)
        self.pace: Pace | None = None
        self.weights: Tensor | None = None
        self.prepare()
        self.probe = not model.sites and not plan.augment  # frozen features do not change: remember them
        self.seen = torch.empty(0)  # features, where they do not change
        self.held: Tensor | None = None
        self.probed: float | None = None
        self.kept = dict[str, Tensor]()
        self.best, self.best_epoch = (-1.0, 0.0), 0
        self.epoch, self.position, self.steps, self.done, self.busy, self.loss = 1, 0, 0, 0, 0.0, math.nan
        self.drawn = self.order.get_state()  # of the generator before this epoch's order was drawn

    def prepare(self) -> None:
        """What a classifier's steps need besides the optimiser."""
        plan = self.plan
        self.augmenter = Augmenter(plan.augment, self.preprocess, batch_size=plan.batch_size, seed=plan.seed)
        weights = class_weights(self.labels, self.model.linear.out_features, plan.balance)
        self.weights = None if weights is None else weights.to(plan.device)
        self.pace = pace_of(plan.consistency, self.model, len(self.train), plan.seed, plan.device)

    def look(self) -> None:
        """Go through all images once, before the first step: what the head sees is standardised by them."""
        seen = features_of(self.model, self.train.pixels, self.preprocess, self.plan, follow=True)
        self.model.standardize(seen)
        if self.probe or self.model.sites:
            held = features_of(self.model, self.val.pixels, self.preprocess, self.plan)
            if self.probe:
                self.seen, self.held = seen, held
            else:
                self.probed = self.top1_of_probe(seen, held)

    def fit(self, say: Say, keeper: Keeper | None) -> Fit:
        """Every epoch that is left; the model is left at the best one."""
        began, saved = time.perf_counter(), keeper.load() if keeper else None
        if saved is None or self.probe:
            self.look()
        if saved is not None and keeper is not None:
            try:
                self.restore(saved)
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:  # torch's own for shapes
                raise no_whole(keeper.path, first_line(error)) from error
        while self.epoch <= self.plan.epochs and not self.processes.any(self.is_stale):
            self.one_epoch(say, keeper)
        self.model.load_state_dict(self.kept, strict=False)
        return Fit(
            best_epoch=self.best_epoch,
            epochs=self.epoch - 1,
            val=Score(top1=self.best[0], n=len(self.val)),
            probe=None if self.probed is None else Score(top1=self.probed, n=len(self.val)),
            images_per_second=self.done / self.busy,
            seconds=time.perf_counter() - began,
        )

    def top1_of_probe(self, seen: Tensor, held: Tensor) -> float:
        """Best val top-1 of the head alone, on features of train and val; it and random numbers then begin again."""
        plan = replace(self.plan, augment=(), consistency=None)  # features are of the images as they are
        run = Run(self.model, self.train, self.val, self.preprocess, plan, ALONE, top1_and_loss)
        run.probe, run.seen, run.held = True, seen, held
        best = 0.0
        for run.epoch in range(1, plan.epochs + 1):
            run.position = 0
            run.all_steps(lambda step: None, None)
            best = max(best, run.judged(None)[0])
        self.model.reset_head()
        torch.manual_seed(self.plan.seed + self.processes.rank)
        return best

    @property
    def is_stale(self) -> bool:
        """Whether ``patience`` epochs have ended since the best one."""
        return self.plan.patience is not None and self.epoch - 1 - self.best_epoch >= self.plan.patience

    def one_epoch(self, say: Say, keeper: Keeper | None) -> None:
        """Its steps, and what they came to on val."""
        self.all_steps(say, keeper)
        top1, val_loss = self.judged(keeper)
        if (top1, -val_loss) > self.best:
            self.best, self.best_epoch = (top1, -val_loss), self.epoch
            self.kept = {name: value.clone() for name, value in self.own().items()}
        say(self.said(top1, val_loss))
        self.epoch, self.position, self.drawn = self.epoch + 1, 0, self.order.get_state()
        if keeper:
            keeper.save(self.state())

    def judged(self, keeper: Keeper | None) -> tuple[float, float]:
        """Top-1 and mean loss on val."""
        top1, val_loss = self.judge(self.model, self.val, self.preprocess, self.plan, self.held)
        _require_finite(val_loss, self.epoch, self.plan, keeper)
        return top1, val_loss

    def all_steps(self, say: Say, keeper: Keeper | None) -> None:
        """Those of an epoch that are left."""
        self.model.train()
        self.drawn = self.order.get_state()
        parts = torch.split(epoch_order(self.labels, self.plan.balance, self.order), self.plan.batch_size)
        for index in parts[self.position :]:
            start = time.perf_counter()
            self.loss = self.step(index)
            _require_finite(self.loss, self.epoch, self.plan, keeper)
            self.position, self.steps, self.done = self.position + 1, self.steps + 1, self.done + len(index)
            self.busy += time.perf_counter() - start
            say(self.said())
            if keeper and self.processes.any(keeper.stop):
                keeper.save(self.state())
                told = f"{keeper.path} is written, the same command with {option('resume', True)} goes on from there"
                raise KeyboardInterrupt(told)
            if keeper and self.processes.any(keeper.due):
                keeper.save(self.state())

    def said(self, top1: float | None = None, val_loss: float | None = None) -> Step:
        """What is told of a step, and at the end of an epoch."""
        total, lr = self.plan.epochs * len(self.train), self.optimizer.param_groups[0]["lr"]
        return Step(epoch=self.epoch, epochs=self.plan.epochs, images=self.done, total_images=total, loss=self.loss,
                    images_per_second=self.done / self.busy, val_top1=top1, step=self.steps, lr=lr,
                    val_loss=val_loss)  # fmt: skip

    def step(self, index: Tensor) -> float:
        """One step of the optimiser on the images ``index``: this process's share of them, in ``accumulate`` parts."""
        places, total = torch.arange(len(index)), torch.zeros((), dtype=torch.float64)
        share = places[self.processes.rank :: self.processes.size]
        parts = self.parts.of(share, partial(self.backward, index))
        self.schedule(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        for part in torch.tensor_split(share, parts):
            if len(part):
                total += self.backward(index, part)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.processes.add_up(parameters)
        if self.model.fake_quant is not None and not self.probe:  # remembered features move no ranges
            self.processes.average(self.model.fake_quant.ranges)
        if not math.isfinite(nn.utils.clip_grad_norm_(parameters, 1.0)):
            return math.nan  # a step now would put it into the weights, and a checkpoint would keep it
        self.optimizer.step()
        if self.pace is not None:
            self.pace.remember(index, self.processes)
        return self.processes.total(float(total))

    def backward(self, index: Tensor, part: Tensor) -> float:
        """Gradients of the share that the places ``part`` have in the mean loss over the images ``index``."""
        plan = self.plan
        batch, targets, smoothing = self.batch(index, part)
        batch, targets = batch.to(plan.device), targets.to(plan.device)
        with autocast(plan):
            if self.pace is None:
                logits, apart = self.model.classify(batch) if self.probe else self.model(batch), None
            else:
                logits, apart = self.pace.answers(batch, index, part, (self.epoch, self.position))
        summed = functional.cross_entropy(
            logits.float(), targets, weight=self.weights, label_smoothing=smoothing, reduction="sum"
        )
        loss = (summed if apart is None else summed + apart) / len(index)
        torch.autograd.backward(loss)
        return loss.item()

    def batch(self, index: Tensor, part: Tensor) -> tuple[Tensor, Tensor, float]:
        """Images or features, labels or probabilities, and by how much those are still to be smoothed."""
        if self.probe:
            return self.seen[index[part]], self.labels[index[part]], self.plan.label_smoothing
        at, smoothing = (self.epoch, self.position), self.plan.label_smoothing
        if self.model.front is not None:
            return self.model.front.rows(self.take(index[part])), self.labels[index[part]], smoothing
        if self.augmenter.mixes:
            classes = self.model.linear.out_features
            return *self.augmenter.mixed(self.take, index, part, at, self.labels, classes, smoothing), 0.0
        return self.augmenter.images(self.take, index, part, at), self.labels[index[part]], smoothing

    def take(self, chosen: Tensor) -> Tensor:
        """Pixels of the training images ``chosen``."""
        return torch.from_numpy(self.train.pixels)[chosen]

    def own(self) -> dict[str, Tensor]:
        """Everything of the model but the backbone."""
        return {name: value for name, value in self.model.state_dict().items() if not name.startswith("backbone.")}

    def state(self) -> Checkpoint:
        """All that the steps to come depend on."""
        tensors = {
            **{f"model/{name}": value for name, value in self.own().items()},
            **{f"kept/{name}": value for name, value in self.kept.items()},
            **{f"optimizer/{name}": value for name, value in state_of(self.optimizer).items()},
            "order": self.drawn,
            **({} if self.pace is None else self.pace.state()),
        }
        progress = {
            "epoch": self.epoch, "position": self.position, "steps": self.steps, "done": self.done, "busy": self.busy,
            "loss": self.loss, "best": list(self.best), "best_epoch": self.best_epoch, "probe": self.probed,
            "each": self.parts.each,
        }  # fmt: skip
        arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
        return Checkpoint(progress=progress, tensors=arrays | self.processes.random_states(self.plan.device))

    def restore(self, saved: Checkpoint) -> None:
        """Go on from what ``state`` gave."""
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in saved.tensors.items()}
        self.model.load_state_dict(_under("model/", tensors), strict=False)
        self.kept = {name: value.to(self.plan.device) for name, value in _under("kept/", tensors).items()}
        set_state(self.optimizer, _under("optimizer/", tensors))
        self.order.set_state(tensors["order"])
        if self.pace is not None:
            self.pace.restore(tensors)
        progress: Any = saved.progress
        self.epoch, self.position, self.steps = progress["epoch"], progress["position"], progress["steps"]
        self.done, self.busy, self.loss = progress["done"], progress["busy"], progress["loss"]
        self.best, self.best_epoch = tuple(progress["best"]), progress["best_epoch"]
        self.probed, self.parts.each = progress.get("probe"), progress.get("each")  # some were written without them
        self.processes.set_random_state(saved.tensors, self.plan.device)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer(model: TunedModel, plan: Plan) -> torch.optim.Optimizer:
    groups = [
        {"params": list(model.tensors.parameters()), "initial_lr": plan.lr},
        {"params": model.head_parameters(), "initial_lr": plan.head_lr},
    ]
    return optimizer_of([group for group in groups if group["params"]], plan.optimizer, plan.lr, plan.weight_decay)


def _schedule(optimizer: torch.optim.Optimizer, plan: Plan, images: int) -> Schedule:
    updates = math.ceil(images / plan.batch_size)
    rising = max(1, round(plan.warmup * plan.epochs * updates))
    return schedule_of(optimizer, plan.schedule, epochs=plan.epochs, updates=updates, rising=rising)


def _require_finite(loss: float, epoch: int, plan: Plan, keeper: Keeper | None) -> None:
    if not math.isfinite(loss):
        again = f"delete {keeper.path} and " if keeper and keeper.path.exists() else ""
        fix = f"{again}begin again with {option('lr', f'{plan.lr / 3:.1g}')} or less"
        raise InputError(f"epoch {epoch}", "the loss must stay finite", got=loss, fix=fix)
