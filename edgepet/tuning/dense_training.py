"""One training of a head that reads maps: what is asked of it, the fit, and the proof of what it lowers to.

As ``training`` is for classifiers. Needs the ``train`` extra.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import Answer
from edgepet.errors import InputError, option
from edgepet.files import require_space
from edgepet.images.folders import PassedOver, Split
from edgepet.images.held import Shape, Turn, features_folder, hold, load_held, pixels_folder
from edgepet.images.masks import squashed
from edgepet.images.notes import passed_over, tell_nobody
from edgepet.images.preprocess import normalize
from edgepet.images.sets import ImageSet
from edgepet.measuring.machine import free_memory_bytes
from edgepet.methods import Method, configure
from edgepet.methods.settings import stored
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_forms import MapForm
from edgepet.networks.head_settings import FORMS, Form
from edgepet.packs.pack import EVERY, encode_pack, read_pack
from edgepet.reports.tables import format_bytes, format_names
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.checkpoint import Keeper, checkpoint_file, ends_when_asked, identity_of
from edgepet.tuning.computing import computing, device_of
from edgepet.tuning.dense import DenseModel, dense_algebra_error, extract_dense
from edgepet.tuning.dense_fit import DensePixels, Objective, fill_rows, fit_dense
from edgepet.tuning.fit import Fit, Plan
from edgepet.tuning.joint import joint_augmentations
from edgepet.tuning.model import require_algebra
from edgepet.tuning.options import TrainOptions
from edgepet.tuning.processes import Processes
from edgepet.tuning.recipes import head_form
from edgepet.tuning.remembered import Place, no_room
from edgepet.tuning.training import (
    Training,
    backbone_of,
    began_with,
    check_asked,
    chosen_of,
    held_bytes,
    plan_of,
    provenance_of,
)
from edgepet.tuning.words import facts_of_text, projected, worded
from edgepet.tuning.work_folder import HELD_OUT

_REFUSED = ("shots", "frames", "consistency", "backbone_precision")  # of no head that reads maps
_OWN = frozenset(("balance", "dice"))  # of some

ALGEBRA_IMAGES = 4  # float64 is slow, and heads are computed by their NumPy definitions


class DenseSet(Protocol):
    """Images with their truths, of one answer: ``MaskSet`` and its like."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of what truths hold."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The image files."""

    @property
    def images(self) -> ImageSet:
        """The images alone."""

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        """What lies among them and is not used."""

    def __len__(self) -> int: ...


SetT = TypeVar("SetT", bound=DenseSet)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learnt:
    """What one head learns from and is judged by; ``counts`` are what each class has in the training images."""

    task: DenseTask[Any]
    train: DenseSet
    val: DenseSet
    counts: NpArray


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


class DenseTask(Protocol[SetT]):
    """What of a training depends on what its head answers: the images' truths, the losses and the judge."""

    answer: ClassVar[Answer]
    usual_head: ClassVar[str]
    options: ClassVar[frozenset[str]]  # that say something of this answer, and of some others nothing
    thing: ClassVar[str]  # what a class has many of
    truths_are: ClassVar[str]  # in words

    def listed(self, training: Training, split: Split) -> SetT:
        """The images of a split.

        Raises:
            InputError: as of what opens such folders.
        """

    def checked(self, training: Training, preprocess: Preprocess, train: SetT, val: SetT) -> tuple[SetT, SetT, NpArray]:
        """Both splits, every truth looked at once, and what each class has in the training images.

        Raises:
            InputError: truths that do not fit their images, or in which there is nothing to learn.
        """

    def truths(self, images: SetT, preprocess: Preprocess) -> Sequence[Any]:
        """The truth of each image, as its objective takes it."""

    def arrays(self, truths: Sequence[Any]) -> Iterator[NpArray]:
        """All that is to be learnt, as arrays: their bytes are part of what a training is known by."""

    def losses(self, options: TrainOptions, counts: NpArray) -> Mapping[str, object]:
        """What is asked of the losses, as JSON."""

    def objective(
        self, form: MapForm, preprocess: Preprocess, plan: Plan, losses: Mapping[str, object]
    ) -> Objective[Any]:
        """What its head is fitted to, with what ``losses`` gave."""


def run_dense(training: Training, processes: Processes, task: DenseTask[Any]) -> MadeDense:
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
    form = _form_asked(training, task)
    stage("load the backbone")
    train_set, val_set = task.listed(training, "train"), task.listed(training, "val")
    device = device_of(processes.device(options.device))
    backbone = backbone_of(training)
    backbone = replace(backbone, preprocess=squashed(backbone.preprocess))
    form = projected(worded(form, options.text, train_set.classes), backbone.spec, backbone.maps)
    model = _attach(backbone, method, form, train_set.classes, training)
    began = began_with(model, backbone, options.init)
    _rehearse(training, backbone, model, train_set.classes)
    stage(f"check {task.truths_are}")
    train_set, val_set, counts = task.checked(training, backbone.preprocess, train_set, val_set)
    learnt = Learnt(task=task, train=train_set, val=val_set, counts=counts)
    if processes.leads:
        _tell(training, learnt)
    stage("read images")
    before = identity_of(checkpoint_file(training.output))
    plan = replace(plan_of(training, method, device, processes, before), label_smoothing=0.0)
    return _run(training, processes, backbone, model, plan, learnt, began)


def _run(
    training: Training, processes: Processes, backbone: Backbone, model: DenseModel, plan: Plan, learnt: Learnt,
    began: Mapping[str, object],
) -> MadeDense:  # fmt: skip
    """Read what is checked, tune by it, and prove what was tuned."""
    options, stage, task = training.options, training.stage, learnt.task
    budget_bytes = free_memory_bytes() // (2 * processes.size) if options.memory is None else options.memory
    turn = Turn(anywhere=processes.any, makes=processes.leads, wait=processes.wait)
    train, val = _read(training, backbone.preprocess, learnt, budget_bytes, turn)
    losses = task.losses(options, learnt.counts)
    identity = {**_identity(backbone, model, plan, losses, processes, _digest(learnt, train, val)), **began}
    keeper = Keeper(path=checkpoint_file(training.output), identity=identity, every_s=options.checkpoint_s,
                    writes=processes.leads)  # fmt: skip
    place = Place(
        folder=features_folder(training.output), budget_bytes=budget_bytes - held_bytes(train, val), identity=identity,
        turn=turn, tell=training.tell if processes.leads else tell_nobody, stage=stage,
    )  # fmt: skip
    train, val = _remembered(model, backbone, train, val, plan, place)
    stage("tune")
    objectives = [task.objective(model.form, backbone.preprocess, plan, losses)]
    with ends_when_asked(keeper):
        fitted = fit_dense(
            model, train, val, backbone.preprocess, plan, training.say, objectives=objectives, keeper=keeper,
            processes=processes,
        )  # fmt: skip
    stage("prove, pack and score")
    proof = _prove(model, backbone, val.pixels)
    told: dict[str, object] = {"data": f"sha256:{identity['images']}", "head": str(model.form.form)}
    told |= {key: value for key, value in losses.items() if key != "weights" and value}
    told |= {**facts_of_text(model.form.form), **began}
    facts = provenance_of(plan, model, fitted, len(train), None) | told
    delta = extract_dense(model, backbone, task=training.output.stem, labels=learnt.train.classes, training=facts)
    return MadeDense(backbone=backbone, model=model, plan=plan, train=train, val=val, learnt=(learnt,), fitted=fitted,
                     proof=proof, delta=delta, keeper=keeper)  # fmt: skip


def _read(
    training: Training, preprocess: Preprocess, learnt: Learnt, budget_bytes: int, turn: Turn
) -> tuple[DensePixels, DensePixels]:
    """The images decoded, in memory or in files, with their truths."""
    task, sets = learnt.task, {"train": learnt.train, "val": learnt.val}
    held = load_held(
        {name: images.images for name, images in sets.items()}, preprocess, pixels_folder(training.output),
        budget_bytes=budget_bytes, turn=turn, stage=training.stage,
    )  # fmt: skip
    first, second = (
        DensePixels(*held[name], truths={task.answer: task.truths(images, preprocess)}) for name, images in sets.items()
    )
    return first, second


def _form_asked(training: Training, task: DenseTask[Any]) -> Form:
    """The head that is asked for.

    Raises:
        InputError: a head or an option that does not go with what is answered.
    """
    options, usual = training.options, TrainOptions()
    joint_augmentations(options.augment)
    for field in (*_REFUSED, *sorted(_OWN - task.options)):
        value = getattr(options, field)
        if value != getattr(usual, field):
            fix = f"leave {option(field)} out"
            raise InputError(option("task", task.answer), f"does not go with {option(field)}", got=value, fix=fix)
    if options.balance == "sampling":
        fix = f"weigh classes with {option('balance', 'weights')}, or add {option('dice', 1)}"
        raise InputError(option("task", task.answer), "has no images of a class", got=option("balance", "sampling"),
                         fix=fix)  # fmt: skip
    form = head_form(options.head or task.usual_head)
    if form.answer != task.answer:
        known = ", ".join(name for name, answer in FORMS.items() if answer == task.answer)
        raise InputError(option("task", task.answer), f"needs a head of {known}", got=option("head", form.name))
    return form


def _attach(
    backbone: Backbone, method: Method, form: Form, classes: tuple[str, ...], training: Training
) -> DenseModel:  # fmt: skip
    model = DenseModel(backbone, method, form, len(classes), seed=training.options.seed)
    if not model.sites and method.name != "linear-probe":
        what, fix = f"finds no layer of {backbone.label} to act on", f"change its {option('settings')} settings"
        raise InputError(option("method", method.name), what, fix=fix)
    return model


def _rehearse(training: Training, backbone: Backbone, model: DenseModel, classes: tuple[str, ...]) -> None:
    """Pack what is not trained yet, into nothing: what could not be written then is refused now."""
    data = encode_pack(extract_dense(model, backbone, task=training.output.stem, labels=classes), codec="fp32")
    read_pack(data, answers=EVERY)
    further = HELD_OUT * math.prod(backbone.preprocess.input_shape)
    require_space(training.output, 10 * len(data) + further, "its checkpoints, the pack and the work folder")


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


def _digest(learnt: Learnt, train: DensePixels, val: DensePixels) -> str:
    """Of all images and truths, and of the classes' names."""
    digest = hashlib.sha256(canonical_json(list(learnt.train.classes)))
    for images in (train, val):
        for array in chain([images.pixels], learnt.task.arrays(images.truths[learnt.task.answer])):
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
        "head": str(model.form.form),
        **facts_of_text(model.form.form),
        **losses,
        "input": list(backbone.preprocess.input_shape),
        "images": images,
        "processes": processes.size,
    }


def _plain(plan: Plan) -> Mapping[str, object]:
    usual = {key: value for key, value in asdict(plan).items() if key not in ("balance", "consistency")}
    return {**usual, **chosen_of(plan)}
