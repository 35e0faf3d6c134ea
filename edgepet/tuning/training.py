"""One training: what is asked of it, the fit, and the proof that what it lowers to is the same network."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta, Score
from edgepet.errors import InputError, option
from edgepet.exporters.trace import base_graph
from edgepet.files import cache_folder, made_cache, require_only, require_place, require_space
from edgepet.graphs.base import WEIGHTS, graph_folder
from edgepet.images.held import Turn, features_folder, load_held, pixels_folder
from edgepet.images.notes import Tell, tell_nobody, tell_of
from edgepet.images.preprocess import normalize
from edgepet.images.sets import ImageSet, few_shots, open_split
from edgepet.methods import Method, STAdapter, configure
from edgepet.methods.settings import stored
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.reports.progress import Say
from edgepet.spec import FilePath, NpArray
from edgepet.tuning.augmenting import require_augmentations
from edgepet.tuning.checkpoint import Keeper, checkpoint_file, ends_when_asked, identity_of
from edgepet.tuning.computing import device_of
from edgepet.tuning.consistency import require_differences, table_bytes
from edgepet.tuning.fake_quant import FakeQuant
from edgepet.tuning.fit import Fit, LabelledPixels, Plan, fit
from edgepet.tuning.model import TunedModel, algebra_error, extract, require_algebra
from edgepet.tuning.optimizers import require_optimizer, require_schedule
from edgepet.tuning.options import TrainOptions
from edgepet.tuning.processes import Processes
from edgepet.tuning.recipes import consistency
from edgepet.tuning.remembered import Place, most_held, remember
from edgepet.tuning.work_folder import FILES, HELD_OUT, Work, read_work, work_folder

# Of a plan: told where they are not what they always were.
_LATER = ("optimizer", "schedule", "balance", "consistency", "patience")
ALGEBRA_IMAGES = 8  # float64 is slow, and one image already exercises every tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is asked of one training. ``say`` is told of every step, ``stage`` the name of what begins, ``tell`` what is
    used of the data and what is passed over.

    ``output`` is the pack to come: it names the task, and the checkpoint lies beside it.
    """

    data: Path
    backbone: str | Backbone
    method: str | Method
    output: Path
    options: TrainOptions
    say: Say = lambda step: None
    stage: Callable[[str], None] = lambda name: None
    tell: Tell = tell_nobody


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A training that is done and proved, but not written.

    ``proof`` is the largest difference of logits between tuned and merged network in float64, and its limit.
    """

    backbone: Backbone
    model: TunedModel
    plan: Plan
    train: LabelledPixels
    val: LabelledPixels
    fitted: Fit
    proof: tuple[float, float]
    delta: Delta
    keeper: Keeper


def run(training: Training, processes: Processes) -> Made:
    """Fit, prove and lower; neither the pack nor its work folder is written.

    Raises:
        InputError: data, backbone, options or the name of the output at fault, the loss stopped being finite, or the
            checkpoint of another training is in the way.
        CheckError: the merged network is not the tuned one.
        MissingError: timm, or a package that the backbone or its rounding needs, is not installed.
        KeyboardInterrupt: the process was asked to end, and a checkpoint was written.
    """
    options, say, stage = training.options, training.say, training.stage
    method = training.method
    method = configure(method, options.settings or {}) if isinstance(method, str) else method
    check_asked(training)
    options.check_class()
    require_differences(options.consistency, method)
    work = started_from(options.init)
    stage("load the backbone")
    train_set, val_set = _image_sets(training)
    if processes.leads:
        tell_of(training.data, {"train": train_set, "val": val_set}, training.tell, clips=_clips(training))
    device = device_of(processes.device(options.device))
    backbone = backbone_of(training)
    require_augmentations(options.augment, backbone.preprocess)
    before = identity_of(checkpoint_file(training.output))
    model = _attach(backbone, method, len(train_set.classes), options, before)
    began_with = {} if work is None else {"init": start_model(model, backbone, work, str(options.init))}
    _rehearse(training, backbone, model, train_set)
    stage("read images")
    budget_bytes = most_held(processes) if options.memory is None else options.memory
    turn = Turn(anywhere=processes.any, makes=processes.leads, wait=processes.wait)
    held = load_held(
        {"train": train_set, "val": val_set}, backbone.preprocess, pixels_folder(training.output),
        budget_bytes=budget_bytes, turn=turn, stage=stage,
    )  # fmt: skip
    train_images, val_images = (LabelledPixels(*held[name]) for name in ("train", "val"))
    plan = plan_of(training, method, device, processes, before)
    identity = _identity(backbone, model, plan, processes, train_set.classes, train_images, val_images) | began_with
    keeper = Keeper(path=checkpoint_file(training.output), identity=identity, every_s=options.checkpoint_s,
                    writes=processes.leads)  # fmt: skip
    place = Place(
        folder=features_folder(training.output), budget_bytes=budget_bytes - held_bytes(train_images, val_images),
        identity=identity, turn=turn, tell=training.tell if processes.leads else tell_nobody, stage=stage,
    )  # fmt: skip
    known = remember(model, backbone, train_images, val_images, plan, place)
    stage("tune")
    given = (train_images, val_images) if known is None else (known.train, known.val)
    with ends_when_asked(keeper), model.beginning(None if known is None else known.front):
        fitted = fit(model, *given, backbone.preprocess, plan, say, keeper=keeper, processes=processes)
    stage("prove, pack and score")
    proof = _prove(model, backbone, val_images.pixels)
    told = {"data": f"sha256:{identity['images']}", **began_with}
    facts = provenance_of(plan, model, fitted, len(train_images), options.shots) | told
    delta = extract(
        model, backbone, task=training.output.stem, labels=train_set.classes, val=fitted.val, training=facts
    )
    return Made(backbone=backbone, model=model, plan=plan, train=train_images, val=val_images, fitted=fitted,
                proof=proof, delta=delta, keeper=keeper)  # fmt: skip


def held_bytes(*sets: LabelledPixels) -> int:
    """Bytes of the pixels that lie in memory."""
    return sum(images.pixels.nbytes for images in sets if not isinstance(images.pixels, np.memmap))


def _image_sets(training: Training) -> tuple[ImageSet, ImageSet]:
    """The images to train on, and those to judge epochs by."""
    options, clips = training.options, _clips(training)
    train_set, val_set = (
        open_split(training.data, split, val_fraction=options.val_fraction, seed=options.seed, clips=clips)
        for split in ("train", "val")
    )
    return train_set if options.shots is None else few_shots(train_set, options.shots, options.seed), val_set


def _clips(training: Training) -> bool:
    backbone = training.backbone
    return (training.options.frames if isinstance(backbone, str) else backbone.preprocess.frames) > 1


def backbone_of(training: Training) -> Backbone:
    """The backbone that is asked for, at the image size that is.

    Raises:
        InputError: it is none, or a network of one's own is asked for another size.
    """
    options, backbone = training.options, training.backbone
    if isinstance(backbone, str):
        return load_backbone(backbone, image_size=options.image_size, frames=options.frames)
    if options.image_size is not None:
        raise InputError(option("image_size"), "is the Backbone's own, from its preprocess", got=options.image_size)
    if options.frames != 1:
        raise InputError(option("frames"), "are the Backbone's own, from its preprocess", got=options.frames)
    return backbone


def plan_of(
    training: Training, method: Method, device: str, processes: Processes, before: Mapping[str, object]
) -> Plan:
    """What is asked for, and where nothing is, the method's recipe."""
    options, recipe = training.options, method.recipe
    pace = consistency(options.consistency)
    return Plan(
        epochs=options.epochs or recipe.epochs,
        lr=options.lr or recipe.lr,
        head_lr=options.head_lr or recipe.head_lr,
        batch_size=options.batch_size,
        accumulate=_accumulate(options.accumulate, before),
        weight_decay=recipe.weight_decay if options.weight_decay is None else options.weight_decay,
        warmup=recipe.warmup,
        label_smoothing=recipe.label_smoothing,
        augment=tuple(options.augment),
        optimizer=options.optimizer,
        schedule=options.schedule,
        balance=options.balance,
        consistency=None if pace is None else str(pace),
        patience=options.patience,
        autocast=_autocast(options.precision, device, processes, before),
        device=device,
        seed=options.seed,
    )


def started_from(init: FilePath | None) -> Work | None:
    """What an earlier training left in the folder ``init``, or beside the pack that it names.

    Raises:
        InputError: there is no such folder, or it is damaged.
    """
    if init is None:
        return None
    folder = work_folder(Path(init)) if Path(init).suffix == ".pet" else Path(init)
    if not folder.is_dir():
        fix = "give the folder that `edgepet pretrain` wrote, or the TASK.work beside TASK.pet"
        raise InputError(option("init"), "needs the tensors of an earlier training", got=f"no folder {folder}", fix=fix)
    return read_work(folder)


def start_model(model: TunedModel, backbone: Backbone, work: Work, where: str) -> str:
    """Take the tensors of ``work``; returns their digest.

    Raises:
        InputError: they are of another backbone or method, or have other shapes.
    """
    method = model.method
    if work.fingerprint != backbone.fingerprint:
        raise InputError(option("init", where), f"was trained on another backbone than {backbone.label}")
    if work.method != method.name:
        raise InputError(option("init", where), f"needs tensors of {method.name}", got=work.method)
    settings = stored(method)
    differs = [f"{key}={was}" for key, was in work.settings.items() if settings.get(key) != was]
    if differs:
        fix = "train with " + " ".join(f"{option('settings')} {each}" for each in differs)
        raise InputError(option("init", where), "was trained with other settings", got=", ".join(differs), fix=fix)
    unlike = model.unlike(work.tensors)
    if unlike:
        fix = "train at the image size that it was trained at"
        raise InputError(option("init", where), "needs tensors of the same shapes", got=", ".join(unlike[:3]), fix=fix)
    model.take(work.tensors)
    digest = hashlib.sha256()
    for name in sorted(work.tensors):
        digest.update(np.ascontiguousarray(work.tensors[name]).data)
    return f"sha256:{digest.hexdigest()}"


def _accumulate(asked: int | None, before: Mapping[str, object]) -> int | None:
    """The parts that are asked for; where none are, a training that began with a number of them goes on with it."""
    known = before.get("accumulate")
    return known if asked is None and isinstance(known, int) else asked


def _autocast(precision: str, device: str, processes: Processes, before: Mapping[str, object]) -> bool:
    """Whether to train in bf16; what was measured when a training began stands when it is resumed."""
    if precision != "auto":
        return precision == "bf16"
    measured = before.get("autocast")
    return bool(measured) if measured is not None else processes.any(fast_bfloat16(device))


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether bfloat16 makes a CPU's matrix products at least 1.2 times as fast: measured, not assumed.

    A GPU is asked whether it computes in bfloat16: products as small as these measure how fast it is told of them.
    """
    if device.startswith("cuda"):
        computes: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return computes
    left, right = torch.randn(1024, 384), torch.randn(1536, 384)

    def seconds(dtype: torch.dtype) -> float:
        a, b = left.to(dtype), right.to(dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            functional.linear(a, b)
            times.append(time.perf_counter() - start)
        return min(times[2:])

    return seconds(torch.float32) >= 1.2 * seconds(torch.bfloat16)


def _attach(
    backbone: Backbone, method: Method, classes: int, options: TrainOptions, before: Mapping[str, object]
) -> TunedModel:
    where, precision = option("method", method.name), options.backbone_precision
    if isinstance(method, STAdapter) and backbone.preprocess.frames < 2:
        fix = f"train on a folder of clips with {option('frames', 8)}"
        raise InputError(where, "needs clips of at least 2 frames", got="images", fix=fix)
    fake_quant = None if precision == "fp32" else FakeQuant(base_graph(backbone), precision)
    in_units = not before or bool(before.get("in_units"))  # one from before there were units goes on without
    model = TunedModel(backbone, method, classes, seed=options.seed, fake_quant=fake_quant, in_units=in_units)
    if not model.sites and method.name != "linear-probe":
        what, fix = f"finds no layer of {backbone.label} to act on", f"change its {option('settings')} settings"
        raise InputError(where, what, fix=fix)
    return model


def check_asked(training: Training) -> None:
    """Refuse what no training could be, or where none could be written, before any work is done.

    Raises:
        InputError: an option or a place at fault, or the checkpoint of another training is in the way.
    """
    output, options = training.output, training.options
    require_place(checkpoint_file(output))
    options.check()
    require_optimizer(options.optimizer)
    require_schedule(options.schedule)
    require_only(work_folder(output), FILES)
    made_cache()
    path = checkpoint_file(output)
    if path.exists() and not options.resume:
        fix = f"go on with {option('resume', True)}, or delete {path} to begin again"
        raise InputError(str(path), "is left of a training that was interrupted", fix=fix)


def _rehearse(training: Training, backbone: Backbone, model: TunedModel, images: ImageSet) -> None:
    """Pack what is not trained yet, into nothing: what could not be written then is refused now.

    Raises:
        InputError: a name or a size that packs cannot have, or too little room for what is to come.
    """
    delta = extract(model, backbone, task=training.output.stem, labels=images.classes, val=Score(top1=0.0, n=0))
    data = encode_pack(delta, codec="fp32")
    read_pack(data)
    further = HELD_OUT * math.prod(backbone.preprocess.input_shape)
    further += 2 * table_bytes(training.options.consistency, len(images), len(images.classes))
    what = "its checkpoints, the pack and the work folder"  # a checkpoint has weights, the best ones, and two moments
    require_space(training.output, 10 * len(data) + further, what)
    if not (graph_folder(backbone.fingerprint) / WEIGHTS).is_file():
        require_space(cache_folder(), backbone.native_bytes, "the backbone")


def _prove(model: TunedModel, backbone: Backbone, pixels: NpArray) -> tuple[float, float]:
    error = algebra_error(model, backbone, normalize(pixels[:ALGEBRA_IMAGES], backbone.preprocess))
    return require_algebra(model.method.name, *error, "merged and tuned network", "the method's lowering")


def _identity(
    backbone: Backbone,
    model: TunedModel,
    plan: Plan,
    processes: Processes,
    classes: Sequence[str],
    *images: LabelledPixels,
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
        **({"in_units": True} if model.in_units else {}),  # a checkpoint has what is learnt
        **{f"--set {key}": value for key, value in stored(model.method).items()},
        **{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(plan).items() if key not in _LATER},
        **chosen_of(plan),
        "input": list(backbone.preprocess.input_shape),
        "images": digest.hexdigest(),
        "processes": processes.size,
    }


def chosen_of(plan: Plan) -> dict[str, object]:
    """What of the plan is not as it is where nothing was asked for: trainings of before have no such keys."""
    asked, usual = asdict(plan), {field.name: field.default for field in fields(Plan)}
    return {key: asked[key] for key in _LATER if asked[key] != usual[key]}


def provenance_of(plan: Plan, model: TunedModel, fitted: Fit, images: int, shots: int | None) -> dict[str, object]:
    """What a pack says of how it was trained."""
    return {
        "epochs": plan.epochs,
        "best_epoch": fitted.best_epoch,
        "images": images,
        "shots": shots,
        "batch_size": plan.batch_size,
        "without_shift": [site.name for site in model.sites if site.operates and not site.takes_shift],
        "lr": plan.lr,
        **({} if plan.head_lr == model.method.recipe.head_lr else {"head_lr": plan.head_lr}),
        "weight_decay": plan.weight_decay,
        "augment": list(plan.augment),
        **chosen_of(plan),
        **({} if plan.patience is None else {"epochs_run": fitted.epochs}),
        "precision": "bf16" if plan.autocast else "fp32",
        "device": plan.device,
        "seed": plan.seed,
        **({} if model.fake_quant is None else {"backbone_precision": model.backbone_precision}),
        "versions": {name: version(name) for name in ("edgepet", "torch", "timm")},
    }
