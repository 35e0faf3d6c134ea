"""One training of a head for masks: what is asked of it, the fit, and the proof of what it lowers to.

As ``training`` is for classifiers. Needs the ``train`` extra.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta
from edgepet.errors import InputError, option
from edgepet.files import require_space
from edgepet.images.held import Shape, Turn, features_folder, hold, load_held, pixels_folder
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import MaskSet, check_masks, require_classes, squashed
from edgepet.images.notes import passed_over, tell_nobody
from edgepet.images.preprocess import normalize
from edgepet.measuring.machine import free_memory_bytes
from edgepet.methods import Method, configure
from edgepet.methods.settings import stored
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import EVERY, encode_pack, read_pack
from edgepet.reports.tables import format_bytes, format_names
from edgepet.spec import NpArray
from edgepet.tuning.checkpoint import Keeper, checkpoint_file, ends_when_asked, identity_of
from edgepet.tuning.computing import computing, device_of
from edgepet.tuning.dense import DenseModel, dense_algebra_error, extract_dense
from edgepet.tuning.fit import Fit, Plan
from edgepet.tuning.joint import joint_augmentations
from edgepet.tuning.mask_fit import Losses, MaskedPixels, fill_rows, fit_masks
from edgepet.tuning.model import require_algebra
from edgepet.tuning.processes import Processes
from edgepet.tuning.recipes import head_form
from edgepet.tuning.remembered import Place, no_room
from edgepet.tuning.training import (
    Training,
    backbone_of,
    check_asked,
    chosen_of,
    held_bytes,
    plan_of,
    provenance_of,
)
from edgepet.tuning.work_folder import HELD_OUT

ALGEBRA_IMAGES = 4  # float64 is slow, and heads are computed by their NumPy definitions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MadeMasks:
    """A training that is done and proved, but not written; ``counts`` are the training pixels of each class.

    ``proof`` is the largest difference of logits between tuned and lowered in float64, and its limit.
    """

    backbone: Backbone
    model: DenseModel
    plan: Plan
    train: MaskedPixels
    val: MaskedPixels
    val_set: MaskSet
    counts: NpArray
    fitted: Fit
    proof: tuple[float, float]
    delta: Delta
    keeper: Keeper


def run_masks(training: Training, processes: Processes) -> MadeMasks:
    """Fit, prove and lower; neither the pack nor its work folder is written.

    Raises:
        InputError: data, backbone, options or the name of the output at fault, the loss stopped being finite, or the
            checkpoint of another training is in the way.
        CheckError: the merged network and the lowered head are not what was tuned.
        MissingError: timm, or a package that the backbone needs, is not installed.
        KeyboardInterrupt: the process was asked to end, and a checkpoint was written.
    """
    options, stage = training.options, training.stage
    named = training.method
    method = configure(named, options.settings or {}) if isinstance(named, str) else named
    check_asked(training)
    _require_known(training)
    stage("load the backbone")
    train_set, val_set = _listed(training)
    device = device_of(processes.device(options.device))
    backbone = backbone_of(training)
    backbone = replace(backbone, preprocess=squashed(backbone.preprocess))
    model = _attach(backbone, method, train_set, training)
    _rehearse(training, backbone, model, train_set)
    stage("check masks")
    counts = _checked(training, backbone, train_set, val_set, leads=processes.leads)
    stage("read images")
    budget_bytes = free_memory_bytes() // (2 * processes.size) if options.memory is None else options.memory
    turn = Turn(anywhere=processes.any, makes=processes.leads, wait=processes.wait)
    train, val = _read(training, backbone, train_set, val_set, budget_bytes, turn)
    before = identity_of(checkpoint_file(training.output))
    plan = replace(plan_of(training, method, device, processes, before), label_smoothing=0.0)
    losses = Losses(weights=_weights(counts) if options.balance else None, dice=options.dice)
    identity = _identity(backbone, model, plan, losses, processes, train_set.classes, train, val)
    keeper = Keeper(path=checkpoint_file(training.output), identity=identity, every_s=options.checkpoint_s,
                    writes=processes.leads)  # fmt: skip
    place = Place(
        folder=features_folder(training.output), budget_bytes=budget_bytes - held_bytes(train, val), identity=identity,
        turn=turn, tell=training.tell if processes.leads else tell_nobody, stage=stage,
    )  # fmt: skip
    train, val = _remembered(model, backbone, train, val, plan, place)
    stage("tune")
    with ends_when_asked(keeper):
        fitted = fit_masks(
            model,
            train,
            val,
            backbone.preprocess,
            plan,
            training.say,
            losses=losses,
            keeper=keeper,
            processes=processes,
        )
    stage("prove, pack and score")
    proof = _prove(model, backbone, val.pixels)
    told = {"data": f"sha256:{identity['images']}", "head": str(model.form.form), **_told_of(losses)}
    facts = provenance_of(plan, model, fitted, len(train), None) | told
    delta = extract_dense(model, backbone, task=training.output.stem, labels=train_set.classes, training=facts)
    return MadeMasks(backbone=backbone, model=model, plan=plan, train=train, val=val, val_set=val_set, counts=counts,
                     fitted=fitted, proof=proof, delta=delta, keeper=keeper)  # fmt: skip


def _listed(training: Training) -> tuple[MaskSet, MaskSet]:
    """The images to train on, and those to judge epochs by."""
    data, fraction, seed = training.data, training.options.val_fraction, training.options.seed
    train = open_masks(data, "train", val_fraction=fraction, seed=seed)
    return train, open_masks(data, "val", val_fraction=fraction, seed=seed)


def _read(
    training: Training, backbone: Backbone, train: MaskSet, val: MaskSet, budget_bytes: int, turn: Turn
) -> tuple[MaskedPixels, MaskedPixels]:
    """The images decoded, in memory or in files; masks are read when they are asked for."""
    held = load_held(
        {"train": train.images, "val": val.images}, backbone.preprocess, pixels_folder(training.output),
        budget_bytes=budget_bytes, turn=turn, stage=training.stage,
    )  # fmt: skip
    return MaskedPixels(*held["train"], masks=train.masks), MaskedPixels(*held["val"], masks=val.masks)


def _require_known(training: Training) -> None:
    """Refuse what a training of masks does not do.

    Raises:
        InputError: it is asked for.
    """
    options = training.options
    joint_augmentations(options.augment)
    usual = type(options)()
    for field in ("shots", "frames", "consistency", "init", "backbone_precision"):
        value = getattr(options, field)
        if value != getattr(usual, field):
            fix = f"leave {option(field)} out"
            raise InputError(option("task", "mask"), f"does not go with {option(field)}", got=value, fix=fix)
    if options.balance == "sampling":
        fix = f"weigh classes with {option('balance', 'weights')}, or add {option('dice', 1)}"
        raise InputError(option("task", "mask"), "has no images of a class", got=option("balance", "sampling"), fix=fix)


def _attach(backbone: Backbone, method: Method, images: MaskSet, training: Training) -> DenseModel:
    options = training.options
    model = DenseModel(backbone, method, head_form(options.head), len(images.classes), seed=options.seed)
    if not model.sites and method.name != "linear-probe":
        what, fix = f"finds no layer of {backbone.label} to act on", f"change its {option('settings')} settings"
        raise InputError(option("method", method.name), what, fix=fix)
    return model


def _rehearse(training: Training, backbone: Backbone, model: DenseModel, images: MaskSet) -> None:
    """Pack what is not trained yet, into nothing: what could not be written then is refused now."""
    data = encode_pack(extract_dense(model, backbone, task=training.output.stem, labels=images.classes), codec="fp32")
    read_pack(data, answers=EVERY)
    further = HELD_OUT * math.prod(backbone.preprocess.input_shape)
    require_space(training.output, 10 * len(data) + further, "its checkpoints, the pack and the work folder")


def _checked(training: Training, backbone: Backbone, train: MaskSet, val: MaskSet, *, leads: bool) -> NpArray:
    """Read every mask once; returns how many training pixels each class has, and tells what is used of the data."""
    counts = check_masks(train, backbone.preprocess)
    check_masks(val, backbone.preprocess)
    absent = require_classes(counts, train.classes, training.data)
    if leads and training.tell is not tell_nobody:
        summary = passed_over(training.data, (*train.passed_over, *val.passed_over))
        told = (
            f"{training.data}: {len(train)} train and {len(val)} val images with masks of {len(train.classes)} classes"
        )
        training.tell(f"{told}; {summary}" if summary else told, [])
        if absent:
            training.tell(f"{training.data}: no training pixel of {format_names(absent)}", [])
    return counts


def _weights(counts: NpArray) -> tuple[float, ...]:
    """n / (classes · the class's pixels), whose mean over the pixels is 1; 1 for a class that has none."""
    there = np.maximum(counts, 1)
    return tuple(float(w) for w in np.where(counts > 0, counts.sum() / (np.count_nonzero(counts) * there), 1.0))


def _told_of(losses: Losses) -> dict[str, object]:
    """What of the losses is not as it is where nothing is asked for."""
    return {} if not losses.dice else {"dice": losses.dice}


def _remembered(
    model: DenseModel, backbone: Backbone, train: MaskedPixels, val: MaskedPixels, plan: Plan, place: Place
) -> tuple[MaskedPixels, MaskedPixels]:
    """With the maps of every image, computed once, where the network is frozen, nothing moves and there is room."""
    if model.sites or plan.augment:
        return train, val
    sets = {"train": train, "val": val}
    shapes = {name: Shape((len(images), model.row_values), "float32") for name, images in sets.items()}
    size = sum(shape.size_bytes for shape in shapes.values())
    if place.turn.anywhere(size > place.budget_bytes) and place.turn.anywhere(no_room(place, size)):
        place.tell(f"every step runs the network: there is no room for {format_bytes(size)} of maps", ())
        return train, val

    def fill(arrays: list[NpArray]) -> None:
        place.stage(f"compute once the maps of {len(train) + len(val)} images, {format_bytes(size)}")
        with computing(model, plan):
            for array, images in zip(arrays, sets.values(), strict=True):
                fill_rows(array, model, images, backbone.preprocess, plan)

    made_by = {**place.identity, "maps": list(model.form.inputs), "torch": torch.__version__}
    rows = hold(shapes, fill, place.folder, made_by, budget_bytes=place.budget_bytes, turn=place.turn, what="maps")
    return replace(train, rows=rows["train"]), replace(val, rows=rows["val"])


def _prove(model: DenseModel, backbone: Backbone, pixels: NpArray) -> tuple[float, float]:
    error = dense_algebra_error(model, backbone, normalize(pixels[:ALGEBRA_IMAGES], backbone.preprocess))
    compared = "merged network with its head and the tuned one"
    return require_algebra(model.method.name, *error, compared, "a lowering")


def _identity(
    backbone: Backbone,
    model: DenseModel,
    plan: Plan,
    losses: Losses,
    processes: Processes,
    classes: tuple[str, ...],
    *images: MaskedPixels,
) -> dict[str, object]:
    """All that decides the weights a training ends with, as JSON."""
    digest = hashlib.sha256(canonical_json(list(classes)))
    for part in images:
        digest.update(np.ascontiguousarray(part.pixels).data)
        for mask in part.masks:
            digest.update(mask.read().data)
    return {
        "backbone": backbone.fingerprint,
        "method": model.method.name,
        **{f"--set {key}": value for key, value in stored(model.method).items()},
        **{key: list(v) if isinstance(v, tuple) else v for key, v in _plain(plan).items()},
        "head": str(model.form.form),
        "weights": list(losses.weights or ()),
        "dice": losses.dice,
        "input": list(backbone.preprocess.input_shape),
        "images": digest.hexdigest(),
        "processes": processes.size,
    }


def _plain(plan: Plan) -> Mapping[str, object]:
    usual = {key: value for key, value in asdict(plan).items() if key not in ("balance", "consistency")}
    return {**usual, **chosen_of(plan)}
