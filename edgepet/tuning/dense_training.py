"""One training of heads that read maps: what is asked of it, the fit, and the proof of what they lower to.

As ``training`` is for classifiers. Needs the ``train`` extra.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta
from edgepet.errors import InputError, option
from edgepet.files import require_space
from edgepet.images.held import Shape, Turn, features_folder, hold, load_held, pixels_folder
from edgepet.images.masks import squashed
from edgepet.images.notes import passed_over, tell_nobody
from edgepet.images.preprocess import normalize
from edgepet.methods import Method, configure
from edgepet.methods.settings import stored
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.packs.pack import EVERY, encode_pack, read_pack
from edgepet.reports.tables import format_bytes, format_names
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.checkpoint import Keeper, checkpoint_file, ends_when_asked, identity_of
from edgepet.tuning.computing import computing, device_of
from edgepet.tuning.dense import DenseModel, dense_algebra_error, extract_dense
from edgepet.tuning.dense_fit import DensePixels, fill_rows, fit_dense
from edgepet.tuning.dense_tasks import DenseTask, Learnt, aligned, asked_forms, spelled
from edgepet.tuning.fit import Fit, Plan
from edgepet.tuning.model import require_algebra
from edgepet.tuning.processes import Processes
from edgepet.tuning.recipes import task_weights
from edgepet.tuning.remembered import Place, most_held, no_room
from edgepet.tuning.training import (
    Training,
    backbone_of,
    check_asked,
    chosen_of,
    held_bytes,
    plan_of,
    provenance_of,
    start_model,
    started_from,
)
from edgepet.tuning.words import facts_of_text, worded
from edgepet.tuning.work_folder import HELD_OUT

ALGEBRA_IMAGES = 4  # float64 is slow, and heads are computed by their NumPy definitions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MadeDense:
    """A training that is done and proved, but not written; ``learnt`` is of its heads, in the order of the delta's.

    ``proof`` is the largest difference between tuned and lowered in float64, and its limit.
    """

    backbone: Backbone
    model: DenseModel
    plan: Plan
    train: DensePixels
    val: DensePixels
    learnt: tuple[Learnt, ...]
    fitted: Fit
    proof: tuple[float, float]
    delta: Delta
    keeper: Keeper


def run_dense(training: Training, processes: Processes, tasks: Sequence[DenseTask[Any]]) -> MadeDense:
    """Fit a head for each of ``tasks`` on one network, prove and lower; neither pack nor work folder is written.

    Raises:
        InputError: data, backbone, options or the name of the output at fault, the loss stopped being finite, or the
            checkpoint of another training is in the way.
        CheckError: the merged network and a lowered head are not what was tuned.
        MissingError: timm, or a package that the backbone needs, is not installed.
        KeyboardInterrupt: the process was asked to end, and a checkpoint was written.
    """
    options, stage = training.options, training.stage
    named = training.method
    method = configure(named, options.settings or {}) if isinstance(named, str) else named
    check_asked(training)
    forms = asked_forms(options, tasks)
    work = started_from(options.init)
    stage("load the backbone")
    listed = [(task.listed(training, "train"), task.listed(training, "val")) for task in tasks]
    device = device_of(processes.device(options.device))
    backbone = backbone_of(training)
    backbone = replace(backbone, preprocess=squashed(backbone.preprocess))
    classes = [train.classes for train, _ in listed]
    forms = list(worded(forms, options.text, classes, backbone))
    model = _attach(backbone, method, forms, classes, training)
    began_with = {} if work is None else {"init": start_model(model, backbone, work, str(options.init))}
    _rehearse(training, backbone, model, classes)
    learnt = list[Learnt]()
    for task, sets in zip(tasks, listed, strict=True):
        stage(f"check {task.truths_are}")
        train, val, counts = task.checked(training, backbone.preprocess, *sets)
        learnt.append(Learnt(task=task, train=train, val=val, counts=counts))
    learnt = aligned(learnt, training.data)
    for each in learnt if processes.leads else ():
        _tell(training, each)
    stage("read images")
    before = identity_of(checkpoint_file(training.output))
    plan = replace(plan_of(training, method, device, processes, before), label_smoothing=0.0)
    return _run(training, processes, backbone, model, plan, learnt, began_with)


def _run(
    training: Training, processes: Processes, backbone: Backbone, model: DenseModel, plan: Plan,
    learnt: Sequence[Learnt], began_with: Mapping[str, object],
) -> MadeDense:  # fmt: skip
    """Read what is checked, tune by it, and prove what was tuned."""
    options, stage = training.options, training.stage
    budget_bytes = most_held(processes) if options.memory is None else options.memory
    turn = Turn(anywhere=processes.any, makes=processes.leads, wait=processes.wait)
    train, val = _read(training, backbone.preprocess, learnt, budget_bytes, turn)
    losses: dict[str, object] = {}
    for each in learnt:
        losses |= each.task.losses(options, each.counts)
    weights = task_weights(options.task_weights)
    losses |= {"task weights": weights} if weights else {}
    identity = _identity(backbone, model, plan, losses, processes, _digest(learnt, train, val)) | dict(began_with)
    keeper = Keeper(path=checkpoint_file(training.output), identity=identity, every_s=options.checkpoint_s,
                    writes=processes.leads)  # fmt: skip
    place = Place(
        folder=features_folder(training.output), budget_bytes=budget_bytes - held_bytes(train, val), identity=identity,
        turn=turn, tell=training.tell if processes.leads else tell_nobody, stage=stage,
    )  # fmt: skip
    train, val = _remembered(model, backbone, train, val, plan, place)
    stage("tune")
    objectives = [
        each.task.objective(form, backbone.preprocess, plan, losses).weighing(weights.get(each.task.answer, 1.0))
        for each, form in zip(learnt, model.forms, strict=True)
    ]
    with ends_when_asked(keeper):
        fitted = fit_dense(
            model, train, val, backbone.preprocess, plan, training.say, objectives=objectives, keeper=keeper,
            processes=processes,
        )  # fmt: skip
    stage("prove, pack and score")
    proof = _prove(model, backbone, val.pixels)
    told: dict[str, object] = {"data": f"sha256:{identity['images']}", "head": spelled(model.forms), **began_with}
    told |= facts_of_text(model.forms)
    told |= {key: value for key, value in losses.items() if key != "weights" and value}
    facts = provenance_of(plan, model, fitted, len(train), None) | told
    first, *further = (each.train.classes for each in learnt)
    delta = extract_dense(
        model, backbone, task=training.output.stem, labels=first, further=further, training=facts
    )  # fmt: skip
    return MadeDense(backbone=backbone, model=model, plan=plan, train=train, val=val, learnt=tuple(learnt),
                     fitted=fitted, proof=proof, delta=delta, keeper=keeper)  # fmt: skip


def _read(
    training: Training, preprocess: Preprocess, learnt: Sequence[Learnt], budget_bytes: int, turn: Turn
) -> tuple[DensePixels, DensePixels]:
    """The images decoded, in memory or in files, with their truths."""
    held = load_held(
        {"train": learnt[0].train.images, "val": learnt[0].val.images}, preprocess, pixels_folder(training.output),
        budget_bytes=budget_bytes, turn=turn, stage=training.stage,
    )  # fmt: skip
    train = {each.task.answer: each.task.truths(each.train, preprocess) for each in learnt}
    val = {each.task.answer: each.task.truths(each.val, preprocess) for each in learnt}
    return DensePixels(*held["train"], truths=train), DensePixels(*held["val"], truths=val)


def _attach(
    backbone: Backbone, method: Method, forms: Sequence[Form], classes: Sequence[tuple[str, ...]], training: Training
) -> DenseModel:  # fmt: skip
    first, *further = zip(forms, map(len, classes), strict=True)
    model = DenseModel(backbone, method, *first, further=further, seed=training.options.seed)
    if not model.sites and method.name != "linear-probe":
        what, fix = f"finds no layer of {backbone.label} to act on", f"change its {option('settings')} settings"
        raise InputError(option("method", method.name), what, fix=fix)
    return model


def _rehearse(
    training: Training, backbone: Backbone, model: DenseModel, classes: Sequence[tuple[str, ...]]
) -> None:  # fmt: skip
    """Pack what is not trained yet, into nothing: what could not be written then is refused now."""
    first, *further = classes
    delta = extract_dense(model, backbone, task=training.output.stem, labels=first, further=further)
    data = encode_pack(delta, codec="fp32")
    read_pack(data, answers=EVERY)
    beside = HELD_OUT * math.prod(backbone.preprocess.input_shape)
    require_space(training.output, 10 * len(data) + beside, "its checkpoints, the pack and the work folder")


def _tell(training: Training, learnt: Learnt) -> None:
    """Say what is used of the data, and which classes have nothing to learn."""
    if training.tell is tell_nobody:
        return
    task, train, val, classes = learnt.task, learnt.train, learnt.val, learnt.train.classes
    summary = passed_over(training.data, (*train.passed_over, *val.passed_over))
    what = f"{len(classes)} {'class' if len(classes) == 1 else 'classes'}"
    told = f"{training.data}: {len(train)} train and {len(val)} val images with {task.truths_are} of {what}"
    training.tell(f"{told}; {summary}" if summary else told, [])
    absent = [name for name, count in zip(classes, learnt.counts.tolist(), strict=True) if not count]
    if absent:
        training.tell(f"{training.data}: no training {task.thing} of {format_names(absent)}", [])


def _remembered(
    model: DenseModel, backbone: Backbone, train: DensePixels, val: DensePixels, plan: Plan, place: Place
) -> tuple[DensePixels, DensePixels]:
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

    made_by = {**place.identity, "maps": list(model.reads), "torch": torch.__version__}
    rows = hold(shapes, fill, place.folder, made_by, budget_bytes=place.budget_bytes, turn=place.turn, what="maps")
    return replace(train, rows=rows["train"]), replace(val, rows=rows["val"])


def _prove(model: DenseModel, backbone: Backbone, pixels: NpArray) -> tuple[float, float]:
    error = dense_algebra_error(model, backbone, normalize(pixels[:ALGEBRA_IMAGES], backbone.preprocess))
    compared = "merged network with its head and the tuned one"
    return require_algebra(model.method.name, *error, compared, "a lowering")


def _digest(learnt: Sequence[Learnt], train: DensePixels, val: DensePixels) -> str:
    """Of all images and truths, and of the classes' names."""
    digest = hashlib.sha256(canonical_json([name for each in learnt for name in each.train.classes]))
    for images in (train, val):
        digest.update(np.ascontiguousarray(images.pixels).data)
        for each in learnt:
            for array in each.task.arrays(images.truths[each.task.answer]):
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _identity(
    backbone: Backbone, model: DenseModel, plan: Plan, losses: Mapping[str, object], processes: Processes, images: str
) -> dict[str, object]:
    """All that decides the weights a training ends with, as JSON; ``images`` is their digest, truths within."""
    return {
        "backbone": backbone.fingerprint,
        "method": model.method.name,
        **{f"--set {key}": value for key, value in stored(model.method).items()},
        **{key: list(v) if isinstance(v, tuple) else v for key, v in _plain(plan).items()},
        "head": spelled(model.forms),
        **facts_of_text(model.forms),
        **losses,
        "input": list(backbone.preprocess.input_shape),
        "images": images,
        "processes": processes.size,
    }


def _plain(plan: Plan) -> Mapping[str, object]:
    usual = {key: value for key, value in asdict(plan).items() if key not in ("balance", "consistency")}
    return {**usual, **chosen_of(plan)}
