"""Attach a method to a backbone, fit it, and extract what was learnt as a delta. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.backbones import Backbone
from edgepet.delta import Delta, Head, Score
from edgepet.errors import InputError
from edgepet.imaging import normalize
from edgepet.merging import fold_all
from edgepet.methods import ActivationPath, Method
from edgepet.methods.method import flatten, unflatten
from edgepet.report import Step
from edgepet.spec import NpArray, Preprocess, Site
from edgepet.updates import fold

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


class TunedModel(nn.Module):
    """A frozen backbone, a method's tensors at its sites, and a head; puts out logits (n, C).

    The backbone's own submodules run unchanged, LayerScale and all: the activation path is a hook on each site. The
    head sees features standardised by fixed statistics, which ``head`` folds away; it starts at zero.
    """

    def __init__(self, backbone: Backbone, method: Method, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        self.method, self.sites = method, method.sites(backbone.layers)
        self._base = backbone.tensors
        self.backbone = backbone.module
        rng = np.random.default_rng(seed)
        starts = {site.name: method.start(site, backbone.tensors, rng) for site in self.sites}
        self._names = list(flatten(starts))
        self.tensors = nn.ParameterList([torch.from_numpy(np.array(t)) for t in flatten(starts).values()])
        self.linear = nn.Linear(backbone.width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(backbone.width))
        self.register_buffer("std", torch.ones(backbone.width))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))

    def classify(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.linear((features - self.mean) / self.std))

    def features(self, images: Tensor) -> Tensor:
        tuned = self.tuned()
        if not isinstance(self.method, ActivationPath):
            return cast(Tensor, torch.func.functional_call(self.backbone, self._folded(tuned), (images,)))
        hooks = [
            self.backbone.get_submodule(site.name).register_forward_hook(
                self._hook(self.method, site, tuned[site.name])
            )
            for site in self.sites
        ]
        try:
            return cast(Tensor, self.backbone(images))
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, method: ActivationPath, site: Site, tuned: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            del module
            return cast(Tensor, method.forward(site, inputs[0], output, tuned, training=self.training))

        return after

    def _folded(self, tuned: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        state = dict(self.backbone.state_dict(keep_vars=True))
        for targeted in self.method.lower(self._base, self.sites, tuned):
            name = targeted.target.tensor
            state[name] = fold(targeted, state[name])
        return state

    def train(self, mode: bool = True) -> TunedModel:
        """Frozen modules stay in eval mode, batch norm included."""
        super().train(mode)
        self.backbone.eval()
        return self

    def tuned(self) -> dict[str, dict[str, Any]]:
        """The method's parameters by site and name."""
        return unflatten(dict(zip(self._names, self.tensors, strict=True)), self.sites)

    def arrays(self) -> dict[str, NpArray]:
        """The method's parameters as ``site/name`` -> float32 array, copied."""
        return {name: p.detach().float().numpy().copy() for name, p in zip(self._names, self.tensors, strict=True)}

    def head(self) -> Head:
        """The head on raw features: the standardisation is folded into it, in float64."""
        weight, bias = self.linear.weight.detach().double(), self.linear.bias.detach().double()
        weight = weight / self.std.double()
        bias = bias - weight @ self.mean.double()
        return Head(weight=weight.float().numpy(), bias=bias.float().numpy())

    def load(self, arrays: Mapping[str, NpArray], head: Head) -> None:
        """Take trained values, with a head on raw features."""
        with torch.no_grad():
            for name, parameter in zip(self._names, self.tensors, strict=True):
                parameter.copy_(torch.from_numpy(np.array(arrays[name])))
            self.linear.weight.copy_(torch.from_numpy(np.array(head.weight)))
            self.linear.bias.copy_(torch.from_numpy(np.array(head.bias)))
            self.mean.zero_()
            self.std.fill_(1)


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


def extract(
    model: TunedModel,
    backbone: Backbone,
    *,
    task: str,
    labels: tuple[str, ...],
    val: Score,
    training: Mapping[str, object] | None = None,
) -> Delta:
    """Lower what ``model`` learnt to a delta in float32."""
    tuned = unflatten(model.arrays(), model.sites)
    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(cast(Any, model.method)).items()}
    return Delta(
        task=task,
        backbone=backbone.label,
        fingerprint=backbone.fingerprint,
        updates=model.method.lower(backbone.tensors, model.sites, tuned),
        head=model.head(),
        labels=labels,
        preprocess=backbone.preprocess,
        method=model.method.name,
        settings=settings,
        training=dict(training or {}),
        val=val,
        licences=(backbone.licence,),
    )


def algebra_error(model: TunedModel, backbone: Backbone, images: NpArray) -> tuple[float, float]:
    """Largest difference of logits between the tuned and the merged network, both in float64, and the largest logit.

    Nothing is rounded for storage here: this judges the lowering and ``fold``, not a file format.

    Args:
        images: preprocessed, (n, 3, H, W).
    """
    double = {
        name: tensor.astype(np.float64) if tensor.dtype.kind == "f" else tensor
        for name, tensor in backbone.tensors.items()
    }
    tuned = unflatten({name: value.astype(np.float64) for name, value in model.arrays().items()}, model.sites)
    merged = fold_all(double, model.method.lower(double, model.sites, tuned))
    was_training = model.training
    model.eval().double()
    try:
        batch = torch.from_numpy(images).double()
        with torch.no_grad():
            expected = model(batch)
            state = {name: torch.from_numpy(tensor) for name, tensor in merged.items()}
            got = model.classify(torch.func.functional_call(model.backbone, state, (batch,)))
    finally:
        model.float().train(was_training)
    return float((expected - got).abs().max()), float(expected.abs().max())


def logits_of(network: nn.Module, images: NpArray) -> NpArray:
    """Logits (n, C) of preprocessed float32 images (n, 3, H, W)."""
    with torch.no_grad():
        logits: NpArray = torch.cat([network(batch) for batch in torch.split(torch.from_numpy(images), 64)]).numpy()
    return logits


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
