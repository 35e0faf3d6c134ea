"""The ``train`` verb: images and a backbone in, a pack and its work folder out. Needs the ``train`` extra."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from edgepet.backbones import Backbone, load_backbone
from edgepet.canonical import canonical_json
from edgepet.checkpoint import EVERY_S, Keeper, checkpoint_file, ends_when_asked, identity_of
from edgepet.crew import Crew
from edgepet.crew import crew as join_crew
from edgepet.data import few_shots, load_sets, open_split
from edgepet.delta import Delta, Score
from edgepet.errors import CheckError, InputError
from edgepet.exporters.trace import keep_weights
from edgepet.fitting import AUGMENTATIONS, Augmentation, Fit, Pixels, Plan, Say, fast_bfloat16, fit
from edgepet.graft import grafted, in_torch
from edgepet.imaging import normalize
from edgepet.merging import task_tensors
from edgepet.methods import Method, configure
from edgepet.methods.method import count
from edgepet.pack import Codec, encode_pack, read_pack, write_pack
from edgepet.parity import ALGEBRA, Accuracy, accuracy
from edgepet.spec import FilePath, NpArray
from edgepet.tune import TunedModel, algebra_error, extract
from edgepet.work import work_folder, write_work

ALGEBRA_IMAGES = 8  # float64 is slow, and one image already exercises every tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneFacts:
    name: str
    fingerprint: str
    bytes: int
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What ``train`` made. ``val`` is of the pack as stored, in float32; ``trainable_params`` leaves the head out.

    ``algebra_max_abs`` is the largest difference of logits between tuned and merged network in float64.
    ``images_per_class`` are the fewest and the most that a class was trained on.
    """

    pack: Path
    work: Path
    method: str
    trainable_params: int
    head_params: int
    pack_bytes: int
    epochs: int
    best_epoch: int
    seconds: float
    images_per_second: float
    precision: str
    images_per_class: tuple[int, int]
    val: Accuracy
    algebra_max_abs: float
    algebra_limit: float
    backbone: BackboneFacts


def train(
    data: FilePath,
    backbone: str | Backbone,
    method: str | Method,
    output: FilePath,
    *,
    settings: Mapping[str, str] | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    lr: float | None = None,
    shots: int | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    augment: Sequence[str] = (),
    precision: str = "auto",
    device: str | None = None,
    codec: Codec = "fp16",
    resume: bool = False,
    checkpoint_s: float = EVERY_S,
    say: Say = lambda step: None,
    stage: Callable[[str], None] = lambda name: None,
) -> TrainReport:
    """Tune ``method`` on the images in ``data`` and write ``output`` (``TASK.pet``) and ``TASK.work`` beside it.

    Args:
        data: a folder with train/, val/ and perhaps test/, each of class folders; or one folder of class folders.
        backbone: a timm name, ``NAME@FILE`` or ``demo:NAME``; or a network of your own, ``Backbone.from_module``.
        settings: the method's settings as text, where ``method`` is a name.
        image_size: pixels of the square input; None is the architecture's own.
        batch_size: images of one step, over all processes; each goes through its share in ``accumulate`` parts.
        shots: images of each class to train on, chosen by ``seed``; None is all.
        precision: "fp32", "bf16" (autocast) or "auto": bf16 where it is measured to be faster here.
        device: torch's name of what trains, "cpu" or "cuda"; None is a GPU where torch finds one.
        resume: go on from the checkpoint of an interrupted training, or begin where there is none.
        checkpoint_s: seconds between two checkpoints within an epoch.
        say: told of every step; stage: told the name of what begins.

    Raises:
        InputError: data, backbone or settings at fault, or the checkpoint of another training is in the way.
        CheckError: the merged network is not the tuned one.
        KeyboardInterrupt: SIGINT or SIGTERM arrived, and a checkpoint was written.
    """
    began, data, output, crew = time.perf_counter(), Path(data), Path(output), join_crew()
    chosen = configure(method, settings or {}) if isinstance(method, str) else method
    _check_options(output, precision, epochs, batch_size, accumulate, lr, augment)
    _check_checkpoint(checkpoint_file(output), resume)
    stage("read images")
    train_set = open_split(data, "train", val_fraction=val_fraction, seed=seed)
    val_set = open_split(data, "val", val_fraction=val_fraction, seed=seed)
    if shots is not None:
        train_set = few_shots(train_set, shots, seed)
    if image_size is not None and not isinstance(backbone, str):
        raise InputError("image_size", "is the Backbone's own, from its preprocess", got=image_size)
    device = _device(crew.device(device))
    stage("load the backbone")
    loaded = load_backbone(backbone, image_size=image_size) if isinstance(backbone, str) else backbone
    train_images, val_images = (Pixels(*part) for part in load_sets([train_set, val_set], loaded.preprocess))
    recipe = chosen.recipe
    plan = Plan(
        epochs=epochs or recipe.epochs,
        lr=lr or recipe.lr,
        head_lr=recipe.head_lr,
        batch_size=batch_size,
        accumulate=accumulate,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        label_smoothing=recipe.label_smoothing,
        augment=cast(tuple[Augmentation, ...], tuple(augment)),
        autocast=_autocast(precision, device, crew, checkpoint_file(output)),
        device=device,
        seed=seed,
    )
    model = _attach(loaded, chosen, len(train_set.classes), seed)
    identity = _identity(loaded, chosen, plan, crew, train_set.classes, train_images, val_images)
    keeper = Keeper(path=checkpoint_file(output), identity=identity, every_s=checkpoint_s, writes=crew.leads)
    stage("tune")
    with ends_when_asked(keeper):
        fitted = fit(model, train_images, val_images, loaded.preprocess, plan, say, keeper=keeper, crew=crew)
    stage("prove, pack and score")
    proof = _prove(model, loaded, val_images.pixels)
    training = _provenance(plan, model, fitted, len(train_images), shots)
    delta = extract(model, loaded, task=output.stem, labels=train_set.classes, val=fitted.val, training=training)
    if crew.leads:
        _write(output, delta, codec, loaded, model, val_images)
        keeper.remove()
    crew.wait()
    counts = np.bincount(train_images.labels, minlength=len(train_set.classes))
    shares = int(counts.min()), int(counts.max())
    return _report(output, loaded, model, plan, fitted, proof, val_images, shares, time.perf_counter() - began)


def _autocast(precision: str, device: str, crew: Crew, checkpoint: Path) -> bool:
    """Whether to train in bf16; what was measured when a training began stands when it is resumed."""
    if precision != "auto":
        return precision == "bf16"
    before = identity_of(checkpoint).get("autocast")
    return bool(before) if before is not None else crew.any(fast_bfloat16(device))


def _device(name: str | None) -> str:
    here = torch.cuda.is_available()
    if name is not None and name.startswith("cuda") and not here:
        raise InputError(
            "--device", "needs a GPU that torch can use", got="none", fix="leave it out to train on the CPU"
        )
    return name or ("cuda" if here else "cpu")


def _attach(backbone: Backbone, method: Method, classes: int, seed: int) -> TunedModel:
    model = TunedModel(backbone, method, classes, seed=seed)
    if not model.sites and method.name != "linear-probe":
        where, what = f"--method {method.name}", f"finds no layer of {backbone.label} to act on"
        raise InputError(where, what, fix="change its --set settings")
    return model


def _report(
    output: Path,
    backbone: Backbone,
    model: TunedModel,
    plan: Plan,
    fitted: Fit,
    proof: tuple[float, float],
    val: Pixels,
    images_per_class: tuple[int, int],
    seconds: float,
) -> TrainReport:
    return TrainReport(
        pack=output,
        work=work_folder(output),
        method=model.method.name,
        trainable_params=count(model.method, backbone.layers, backbone.tensors),
        head_params=sum(p.numel() for p in model.linear.parameters()),
        pack_bytes=output.stat().st_size,
        epochs=plan.epochs,
        best_epoch=fitted.best_epoch,
        seconds=seconds,
        images_per_second=fitted.images_per_second,
        precision="bf16" if plan.autocast else "fp32",
        images_per_class=images_per_class,
        val=_accuracy(backbone, read_pack(output).delta, val),
        algebra_max_abs=proof[0],
        algebra_limit=proof[1],
        backbone=BackboneFacts(
            name=backbone.label,
            fingerprint=backbone.fingerprint,
            bytes=backbone.native_bytes,
            description=backbone.description,
        ),
    )


def merged_logits(backbone: Backbone, delta: Delta, images: NpArray) -> NpArray:
    """Logits (n, C) of ``delta`` folded into ``backbone``, its branches beside it, run by torch in float32."""
    tensors = task_tensors(backbone.base, delta)
    branches = in_torch([branch.with_tensors(tensors) for branch in delta.branches])
    state = {name: torch.from_numpy(np.array(tensors[name])) for name in backbone.tensors}
    head = torch.from_numpy(delta.head.weight.astype(np.float32)), torch.from_numpy(delta.head.bias.astype(np.float32))
    parts = []
    with torch.no_grad(), grafted(backbone.module, branches):
        for batch in torch.split(torch.from_numpy(images), 64):
            features = torch.func.functional_call(backbone.module, state, (batch,), tie_weights=False)
            parts.append(torch.nn.functional.linear(features, *head))
    logits: NpArray = torch.cat(parts).numpy()
    return logits


def _check_options(
    output: Path,
    precision: str,
    epochs: int | None,
    batch_size: int,
    accumulate: int,
    lr: float | None,
    augment: Sequence[str],
) -> None:
    if output.suffix != ".pet":
        raise InputError("-o", "needs a file name ending in .pet", got=repr(output.name))
    if not output.absolute().parent.is_dir():
        raise InputError(str(output.parent), "is no folder", fix=f"mkdir -p {output.parent}")
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError("--train-precision", "is auto, fp32 or bf16", got=repr(precision))
    if epochs is not None and epochs < 1:
        raise InputError("--epochs", "must be at least 1", got=epochs)
    if batch_size < 1:
        raise InputError("--batch-size", "must be at least 1", got=batch_size)
    if not 1 <= accumulate <= batch_size:
        raise InputError("--accumulate", f"must be between 1 and the batch size, {batch_size}", got=accumulate)
    if lr is not None and not 0 < lr < math.inf:
        raise InputError("--lr", "must be above 0 and finite", got=lr)
    unknown = [name for name in augment if name not in AUGMENTATIONS]
    if unknown:
        raise InputError("--augment", f"knows {', '.join(AUGMENTATIONS)}", got=repr(unknown[0]))


def _prove(model: TunedModel, backbone: Backbone, pixels: NpArray) -> tuple[float, float]:
    max_abs, largest = algebra_error(model, backbone, normalize(pixels[:ALGEBRA_IMAGES], backbone.preprocess))
    limit = ALGEBRA * largest
    if not max_abs <= limit:
        raise CheckError(
            model.method.name,
            f"merged and tuned network must agree within {limit:.1e} in float64",
            got=f"{max_abs:.1e}",
            fix="this is a fault of the method's lowering: report it",
        )
    return max_abs, limit


def _write(output: Path, delta: Delta, codec: Codec, backbone: Backbone, model: TunedModel, val: Pixels) -> None:
    """The pack, with the val accuracy of what it stores and not of what was trained, and its work folder."""
    stored = read_pack(encode_pack(delta, codec=codec)).delta
    judged = _accuracy(backbone, stored, val)
    spread = np.random.default_rng(0).permutation(len(val))  # folders come class by class
    write_pack(output, replace(delta, val=Score(top1=judged.top1, n=judged.n)), codec=codec)
    keep_weights(backbone)
    write_work(work_folder(output), delta, model.arrays(), val.pixels[spread], val.labels[spread])


def _accuracy(backbone: Backbone, delta: Delta, val: Pixels) -> Accuracy:
    logits = merged_logits(backbone, delta, normalize(val.pixels, backbone.preprocess))
    return accuracy(logits.argmax(1), val.labels, len(delta.labels))


def _check_checkpoint(path: Path, resume: bool) -> None:
    if path.exists() and not resume:
        fix = f"go on with --resume, or delete {path} to begin again"
        raise InputError(str(path), "is left of a training that was interrupted", fix=fix)


def _identity(
    backbone: Backbone,
    method: Method,
    plan: Plan,
    crew: Crew,
    classes: Sequence[str],
    *images: Pixels,
) -> dict[str, object]:
    """All that decides the weights a training ends with, as JSON; the number of threads decides the last bits too."""
    digest = hashlib.sha256(canonical_json(list(classes)))
    for part in images:
        for array in (part.pixels, part.labels):
            digest.update(np.ascontiguousarray(array).data)
    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(cast(Any, method)).items()}
    return {
        "backbone": backbone.fingerprint,
        "method": method.name,
        **{f"--set {key}": value for key, value in settings.items()},
        **{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(plan).items()},
        "image size": list(backbone.preprocess.image_size),
        "images": digest.hexdigest(),
        "processes": crew.size,
    }


def _provenance(plan: Plan, model: TunedModel, fitted: Fit, images: int, shots: int | None) -> dict[str, object]:
    return {
        "epochs": plan.epochs,
        "best_epoch": fitted.best_epoch,
        "images": images,
        "shots": shots,
        "batch_size": plan.batch_size,
        "without_shift": [site.name for site in model.sites if site.operates and not site.takes_shift],
        "lr": plan.lr,
        "weight_decay": plan.weight_decay,
        "augment": list(plan.augment),
        "precision": "bf16" if plan.autocast else "fp32",
        "device": plan.device,
        "seed": plan.seed,
        "versions": {name: version(name) for name in ("edgepet", "torch", "timm")},
    }
