"""One training: what is asked of it, the fit, and the proof that what it lowers to is the same network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import torch

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta
from edgepet.errors import CheckError, InputError
from edgepet.exporters.trace import base_graph
from edgepet.images.preprocess import normalize
from edgepet.images.sets import few_shots, load_sets, open_split
from edgepet.measuring.parity import ALGEBRA
from edgepet.methods import Method, STAdapter, configure
from edgepet.methods.settings import stored
from edgepet.networks.backbone import Backbone, load_backbone
from edgepet.spec import FilePath, NpArray
from edgepet.tuning.checkpoint import EVERY_S, Keeper, checkpoint_file, ends_when_asked, identity_of
from edgepet.tuning.fake_quant import PRECISIONS, Rounding
from edgepet.tuning.fit import AUGMENTATIONS, Augmentation, Fit, Pixels, Plan, Say, fast_bfloat16, fit
from edgepet.tuning.model import TunedModel, algebra_error, extract
from edgepet.tuning.processes import Crew
from edgepet.tuning.work_folder import Work, read_work, work_folder

ALGEBRA_IMAGES = 8  # float64 is slow, and one image already exercises every tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked of a training; see ``train``."""

    data: Path
    backbone: str | Backbone
    method: str | Method
    output: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    image_size: int | None = None
    frames: int = 1
    epochs: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    lr: float | None = None
    shots: int | None = None
    seed: int = 0
    val_fraction: float = 0.2
    augment: Sequence[str] = ()
    precision: str = "auto"
    backbone_precision: str = "fp32"
    device: str | None = None
    init: FilePath | None = None
    resume: bool = False
    checkpoint_s: float = EVERY_S
    say: Say = lambda step: None
    stage: Callable[[str], None] = lambda name: None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A training that is done and proved, but not written."""

    backbone: Backbone
    model: TunedModel
    plan: Plan
    train: Pixels
    val: Pixels
    fitted: Fit
    proof: tuple[float, float]
    delta: Delta
    keeper: Keeper


def run_job(job: Job, crew: Crew) -> Made:
    """Fit, prove and lower."""
    method = job.method if not isinstance(job.method, str) else configure(job.method, job.settings)
    _check_options(job)
    _check_checkpoint(checkpoint_file(job.output), job.resume)
    work = _started_from(job.init)
    job.stage("read images")
    clips = (job.frames if isinstance(job.backbone, str) else job.backbone.preprocess.frames) > 1
    train_set = open_split(job.data, "train", val_fraction=job.val_fraction, seed=job.seed, clips=clips)
    val_set = open_split(job.data, "val", val_fraction=job.val_fraction, seed=job.seed, clips=clips)
    if job.shots is not None:
        train_set = few_shots(train_set, job.shots, job.seed)
    device = _device(crew.device(job.device))
    job.stage("load the backbone")
    backbone = _backbone(job)
    train_images, val_images = (Pixels(*part) for part in load_sets([train_set, val_set], backbone.preprocess))
    plan = _plan(job, method, device, crew)
    model = _attach(backbone, method, len(train_set.classes), job)
    began_with = {} if work is None else {"init": _start(model, backbone, work, str(job.init))}
    identity = _identity(backbone, model, plan, crew, train_set.classes, train_images, val_images) | began_with
    keeper = Keeper(path=checkpoint_file(job.output), identity=identity, every_s=job.checkpoint_s,
                    writes=crew.leads)  # fmt: skip
    job.stage("tune")
    with ends_when_asked(keeper):
        fitted = fit(model, train_images, val_images, backbone.preprocess, plan, job.say, keeper=keeper, crew=crew)
    job.stage("prove, pack and score")
    proof = _prove(model, backbone, val_images.pixels)
    facts = _provenance(plan, model, fitted, len(train_images), job.shots) | began_with
    delta = extract(
        model, backbone, task=job.output.stem, labels=train_set.classes, val=fitted.val, training=facts
    )  # fmt: skip
    return Made(backbone=backbone, model=model, plan=plan, train=train_images, val=val_images, fitted=fitted,
                 proof=proof, delta=delta, keeper=keeper)  # fmt: skip


def _backbone(job: Job) -> Backbone:
    if isinstance(job.backbone, str):
        return load_backbone(job.backbone, image_size=job.image_size, frames=job.frames)
    if job.image_size is not None:
        raise InputError("image_size", "is the Backbone's own, from its preprocess", got=job.image_size)
    if job.frames != 1:
        raise InputError("frames", "are the Backbone's own, from its preprocess", got=job.frames)
    return job.backbone


def _plan(job: Job, method: Method, device: str, crew: Crew) -> Plan:
    recipe = method.recipe
    return Plan(
        epochs=job.epochs or recipe.epochs,
        lr=job.lr or recipe.lr,
        head_lr=recipe.head_lr,
        batch_size=job.batch_size,
        accumulate=job.accumulate,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        label_smoothing=recipe.label_smoothing,
        augment=cast(tuple[Augmentation, ...], tuple(job.augment)),
        autocast=_autocast(job.precision, device, crew, checkpoint_file(job.output)),
        device=device,
        seed=job.seed,
    )


def _started_from(init: FilePath | None) -> Work | None:
    if init is None:
        return None
    folder = work_folder(Path(init)) if Path(init).suffix == ".pet" else Path(init)
    if not folder.is_dir():
        fix = "give the folder that `edgepet pretrain` wrote, or the TASK.work beside TASK.pet"
        raise InputError("--init", "needs the tensors of an earlier training", got=f"no folder {folder}", fix=fix)
    return read_work(folder)


def _start(model: TunedModel, backbone: Backbone, work: Work, where: str) -> str:
    """Take the tensors of ``work``; returns their digest.

    Raises:
        InputError: they are of another backbone or method, or have other shapes.
    """
    method, mine = model.method, model.arrays()
    if work.fingerprint != backbone.fingerprint:
        raise InputError(f"--init {where}", f"was trained on another backbone than {backbone.label}")
    if work.method != method.name:
        raise InputError(f"--init {where}", f"needs tensors of {method.name}", got=work.method)
    settings = stored(method)
    differs = [f"{key}={was}" for key, was in work.settings.items() if settings.get(key) != was]
    if differs:
        fix = f"train with --set {' --set '.join(differs)}"
        raise InputError(f"--init {where}", "was trained with other settings", got=", ".join(differs), fix=fix)
    unlike = [
        name for name, array in mine.items() if name not in work.tensors or work.tensors[name].shape != array.shape
    ]
    if unlike or mine.keys() != work.tensors.keys():
        fix = "train at the image size that it was trained at"
        raise InputError(f"--init {where}", "needs tensors of the same shapes", got=", ".join(unlike[:3]), fix=fix)
    model.take(work.tensors)
    digest = hashlib.sha256()
    for name in sorted(mine):
        digest.update(np.ascontiguousarray(work.tensors[name]).data)
    return f"sha256:{digest.hexdigest()}"


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


def _attach(backbone: Backbone, method: Method, classes: int, job: Job) -> TunedModel:
    if isinstance(method, STAdapter) and backbone.preprocess.frames < 2:
        fix = "train on a folder of clips with --frames 8"
        raise InputError(f"--method {method.name}", "needs clips of at least 2 frames", got="images", fix=fix)
    precision = job.backbone_precision
    rounding = None if precision == "fp32" else Rounding(base_graph(backbone), precision)
    model = TunedModel(backbone, method, classes, seed=job.seed, rounding=rounding)
    if not model.sites and method.name != "linear-probe":
        where, what = f"--method {method.name}", f"finds no layer of {backbone.label} to act on"
        raise InputError(where, what, fix="change its --set settings")
    return model


def _check_options(job: Job) -> None:
    output, lr = job.output, job.lr
    if not output.absolute().parent.is_dir():
        raise InputError(str(output.parent), "is no folder", fix=f"mkdir -p {output.parent}")
    if job.precision not in ("auto", "fp32", "bf16"):
        raise InputError("--train-precision", "is auto, fp32 or bf16", got=repr(job.precision))
    if job.backbone_precision not in PRECISIONS:
        raise InputError("--backbone-precision", "is fp32, int8 or int4", got=repr(job.backbone_precision))
    if job.epochs is not None and job.epochs < 1:
        raise InputError("--epochs", "must be at least 1", got=job.epochs)
    if job.batch_size < 1:
        raise InputError("--batch-size", "must be at least 1", got=job.batch_size)
    if not 1 <= job.accumulate <= job.batch_size:
        what = f"must be between 1 and the batch size, {job.batch_size}"
        raise InputError("--accumulate", what, got=job.accumulate)
    if lr is not None and not 0 < lr < math.inf:
        raise InputError("--lr", "must be above 0 and finite", got=lr)
    unknown = [name for name in job.augment if name not in AUGMENTATIONS]
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


def _check_checkpoint(path: Path, resume: bool) -> None:
    if path.exists() and not resume:
        fix = f"go on with --resume, or delete {path} to begin again"
        raise InputError(str(path), "is left of a training that was interrupted", fix=fix)


def _identity(
    backbone: Backbone,
    model: TunedModel,
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
    return {
        "backbone": backbone.fingerprint,
        "backbone_precision": model.backbone_precision,
        "method": model.method.name,
        **{f"--set {key}": value for key, value in stored(model.method).items()},
        **{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(plan).items()},
        "input": list(backbone.preprocess.input_shape),
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
        **({} if model.rounding is None else {"backbone_precision": model.backbone_precision}),
        "versions": {name: version(name) for name in ("edgepet", "torch", "timm")},
    }
