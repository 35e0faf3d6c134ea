"""Fit a tuned model to images: one loop, its plan, and what it reached. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.delta import Score
from edgepet.errors import InputError
from edgepet.imaging import normalize
from edgepet.report import Step
from edgepet.spec import NpArray, Preprocess
from edgepet.tune import TunedModel

Augmentation: TypeAlias = Literal["flip", "crop"]
MANY_TOKENS = 512  # from here on a matrix of all pairs of tokens is too large to keep for the backward pass
AUGMENTATIONS: tuple[Augmentation, ...] = ("flip", "crop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides a fit besides method, backbone and images."""

    epochs: int
    lr: float
    head_lr: float
    batch_size: int = 32
    weight_decay: float = 1e-4
    warmup: float = 0.1
    label_smoothing: float = 0.1
    augment: tuple[Augmentation, ...] = ()
    autocast: bool = False
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """Decoded images, uint8 (n, H, W, 3), and their labels, int64 (n,)."""

    pixels: NpArray
    labels: NpArray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a fit reached: the epoch that was kept and how fast images went through."""

    best_epoch: int
    val: Score
    images_per_second: float
    seconds: float


Say: TypeAlias = Callable[[Step], None]


def fit(model: TunedModel, train: Pixels, val: Pixels, preprocess: Preprocess, plan: Plan, say: Say) -> Fit:
    """Train ``model`` and leave it at its best epoch by val top-1, the lower loss deciding between equals.

    The same seed, data, thread count and machine give the same bits.

    Raises:
        InputError: the loss stopped being finite.
    """
    try:
        with _explicit_attention(model.backbone, plan):
            return _fit(model.to(plan.device), train, val, preprocess, plan, say)
    finally:
        model.to("cpu").eval()


def _fit(model: TunedModel, train: Pixels, val: Pixels, preprocess: Preprocess, plan: Plan, say: Say) -> Fit:
    torch.manual_seed(plan.seed)
    order = torch.Generator().manual_seed(plan.seed)
    seen = _features(model, train.pixels, preprocess, plan)
    model.mean.copy_(seen.mean(0))
    model.std.copy_(seen.std(0).clamp_min(1e-6))
    probe = not model.sites and not plan.augment  # frozen features do not change: remember them
    held = _features(model, val.pixels, preprocess, plan) if probe else None
    pixels, labels = torch.from_numpy(train.pixels), torch.from_numpy(train.labels)
    optimizer, schedule = _optimizer(model, plan, math.ceil(len(train) / plan.batch_size))
    best, kept, best_epoch = (-1.0, 0.0), dict[str, Tensor](), 0
    done, began, busy, loss = 0, time.perf_counter(), 0.0, math.nan

    def step(epoch: int, top1: float | None = None) -> Step:
        speed, total = done / busy, plan.epochs * len(train)
        return Step(epoch=epoch, epochs=plan.epochs, images=done, total_images=total, loss=loss,
                    images_per_second=speed, val_top1=top1)  # fmt: skip

    for epoch in range(1, plan.epochs + 1):
        model.train()
        for index in torch.split(torch.randperm(len(train), generator=order), plan.batch_size):
            start = time.perf_counter()
            batch = seen[index] if probe else _images(pixels[index], preprocess, plan)
            loss = _train_step(model, batch, labels[index], optimizer, plan, probe=probe)
            schedule.step()
            _require_finite(loss, epoch, plan)
            busy, done = busy + time.perf_counter() - start, done + len(index)
            say(step(epoch))
        top1, val_loss = _judge(model, val, preprocess, plan, held)
        if (top1, -val_loss) > best:
            best, best_epoch = (top1, -val_loss), epoch
            own = (item for item in model.state_dict().items() if not item[0].startswith("backbone."))
            kept = {name: value.clone() for name, value in own}
        say(step(epoch, top1))
    model.load_state_dict(kept, strict=False)
    score = Score(top1=best[0], n=len(val))
    return Fit(best_epoch=best_epoch, val=score, images_per_second=done / busy, seconds=time.perf_counter() - began)


def _train_step(
    model: TunedModel, batch: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, plan: Plan, *, probe: bool
) -> float:
    with _autocast(plan):
        logits = model.classify(batch) if probe else model(batch)
    loss = functional.cross_entropy(logits.float(), labels.to(plan.device), label_smoothing=plan.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
    optimizer.step()
    return loss.item()


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether bfloat16 makes this machine's matrix products at least 1.2 times as fast: measured, not assumed."""
    left, right = torch.randn(1024, 384, device=device), torch.randn(1536, 384, device=device)

    def seconds(dtype: torch.dtype) -> float:
        a, b = left.to(dtype), right.to(dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            functional.linear(a, b).sum().item()  # the number must be there, also on a device that works ahead
            times.append(time.perf_counter() - start)
        return min(times[2:])

    return seconds(torch.float32) >= 1.2 * seconds(torch.bfloat16)


@contextlib.contextmanager
def _explicit_attention(module: nn.Module, plan: Plan) -> Iterator[None]:
    """Attention as two products and a softmax while training in bf16 on a CPU: torch's fused form has a slow backward
    there, a third of a step at 65 tokens. Long sequences keep it, for its memory.
    """
    tokens = getattr(getattr(module, "patch_embed", None), "num_patches", MANY_TOKENS)
    slow = plan.autocast and plan.device == "cpu" and tokens < MANY_TOKENS
    fused = [part for part in module.modules() if slow and getattr(part, "fused_attn", False) is True]
    try:
        for part in fused:
            setattr(part, "fused_attn", False)  # noqa: B010  timm's own switch, which nn.Module does not declare
        yield
    finally:
        for part in fused:
            setattr(part, "fused_attn", True)  # noqa: B010


def _autocast(plan: Plan) -> torch.autocast:
    return torch.autocast(plan.device.partition(":")[0], dtype=torch.bfloat16, enabled=plan.autocast)


def _optimizer(model: TunedModel, plan: Plan, steps_per_epoch: int) -> tuple[torch.optim.Optimizer, Any]:
    groups = [
        {"params": list(model.tensors.parameters()), "lr": plan.lr},
        {"params": list(model.linear.parameters()), "lr": plan.head_lr},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=plan.weight_decay)
    total = plan.epochs * steps_per_epoch
    rising = max(1, round(plan.warmup * total))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _images(pixels: Tensor, preprocess: Preprocess, plan: Plan) -> Tensor:
    """A batch of uint8 (n, H, W, 3) as the network takes it, lightly augmented."""
    images = torch.from_numpy(normalize(pixels.numpy(), preprocess))
    if "flip" in plan.augment:
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    if "crop" in plan.augment:
        reach = max(1, images.shape[-1] // 8)
        padded = functional.pad(images, (reach,) * 4, mode="reflect")
        height, width = images.shape[-2:]
        corners = torch.randint(0, 2 * reach + 1, (len(images), 2)).tolist()
        images = torch.stack([padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(corners)])
    return images.to(plan.device)


def _features(model: TunedModel, pixels: NpArray, preprocess: Preprocess, plan: Plan) -> Tensor:
    model.eval()
    with torch.no_grad(), _autocast(plan):
        return torch.cat([model.features(part.to(plan.device)).float() for part in _batches(pixels, preprocess)])


def _judge(
    model: TunedModel, val: Pixels, preprocess: Preprocess, plan: Plan, held: Tensor | None
) -> tuple[float, float]:
    model.eval()
    features = _features(model, val.pixels, preprocess, plan) if held is None else held
    labels = torch.from_numpy(val.labels).to(plan.device)
    with torch.no_grad():
        logits = model.classify(features)
    return float((logits.argmax(1) == labels).float().mean()), float(functional.cross_entropy(logits, labels))


def _batches(pixels: NpArray, preprocess: Preprocess, size: int = 64) -> Iterator[Tensor]:
    for start in range(0, len(pixels), size):
        yield torch.from_numpy(normalize(pixels[start : start + size], preprocess))


def _require_finite(loss: float, epoch: int, plan: Plan) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"epoch {epoch}", "the loss must stay finite", got=loss, fix=f"try --lr {plan.lr / 3:.1g} or less"
        )
