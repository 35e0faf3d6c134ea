"""How to train: everything that may be asked of a training besides data, backbone, method and output. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgepet.errors import InputError, option
from edgepet.reports.logs import require_known
from edgepet.spec import FilePath, ImageSize
from edgepet.tuning.recipes import (
    BALANCES,
    BETWEEN,
    CHEAP,
    FULL,
    OWN_OPTIMIZER,
    OWN_SCHEDULE,
    Balance,
    augmentations,
    consistency,
    head_form,
    named,
    task_weights,
)

TASKS = ("class", "mask", "boxes", "labels")  # or several of the last three, with a comma between
PRECISIONS = ("auto", "fp32", "bf16")
BACKBONE_PRECISIONS = ("fp32", "int8", "int4")
CHECKPOINT_S = 30.0
_OF_MAPS = ("head", "text", "dice", "task_weights")  # options of heads that read maps
MOST_LR, MOST_SEED = 1e6, 2**63  # no step is of such a size, and torch takes no larger seed


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How to train. What is None is decided by the method, the backbone or the machine.

    Attributes:
        settings: the method's settings as text, where the method is given by its name.
        image_size: the side of a square input in pixels, or its height and width; None is the checkpoint's own.
        frames: above 1, the data are clips, folders of images: so many are taken of each, spread evenly.
        epochs, lr: None is what the method's recipe says.
        batch_size: images of one step, over all processes; each goes through its share in ``accumulate`` parts: of
            None there is 1 on a GPU, and on a CPU as few as keep no more than 600 MB each for the way back.
        shots: images of each class to train on, chosen by ``seed``; None is all.
        seed: of every random choice.
        val_fraction: the part of each class that is held out where there is no val/.
        augment: "flip", half of the images left to right, and "crop", moved by up to an eighth of their sides; timm's
            "randaugment" or a text of its own such as "rand-m9-mstd0.5", "augmix-m3" or "3a"; "erasing", "mixup" and
            "cutmix", with a strength as "erasing-p0.25", "mixup-a0.8" and "cutmix-a1".
        optimizer: "adamw", or another name of timm's, with settings as "sgd,momentum=0.95,nesterov=true".
        schedule: "cosine", or another of timm's, with settings as "step,decay_epochs=5,decay_rate=0.5".
        head_lr, weight_decay: None is what the method's recipe says.
        balance: for classes of unlike size: "weights" of each class's loss, or "sampling" of images, so that an epoch
            sees all classes alike often, and some images many times.
        consistency: PACE: "full", noise on what each layer is tuned by, in two passes whose logits shall agree, or
            "cheap,sigma=2,weight=0.5", one pass beside the logits of the epoch before. Deviation and weight of "full"
            are its authors' 1.2 and 1 unless they follow as well; sigma=0 is plain training.
        patience: end when so many epochs have brought no better one; None is never.
        precision: "fp32", "bf16" (autocast) or "auto": bf16 where a CPU is measured to be faster in it, and on a GPU
            that has it.
        backbone_precision: "int8" or "int4" (weights; activations have 8 bits) rounds the backbone while tuning, so
            that the delta repairs that too; the pack fits the float backbone as ever.
        device: torch's name of what trains, "cpu" or "cuda"; None is a GPU where torch finds one.
        init: start from the tensors of an earlier training of this method: its work folder, ``pretrain``'s, or its
            pack where the work folder lies beside it; the head starts anew.
        resume: go on from the checkpoint of an interrupted training, or begin where there is none.
        checkpoint_s: seconds between two checkpoints within an epoch.
        memory: bytes that decoded images may take, and what enters the first tuned block of them; more are kept in
            ``TASK.pixels`` and ``TASK.features`` beside the pack until it is there. None is half of what is free, and
            at most 2 GB.
        task: "class" for a folder of class folders, "mask" for images with masks, "boxes" for images with boxes,
            "labels" for images of several labels each, or several of these three, as "boxes,mask,labels": their heads
            see one run of the network; None is what lies in the folder.
        task_weights: of several heads how much each one's loss counts, as "boxes=1,mask=0.5"; 1 where nothing is said.
        head: of masks: "mlp", or "linear", with settings as "mlp,width=32,maps=0/1/2,depthwise=true,norm=false"; of
            boxes "fcos", as "fcos,width=32,depth=2"; maps are the backbone's, 0 the finest; of labels "pooled". None is
            the first of each, and of several heads "+" is between two, as "fcos,width=32+linear".
            "mlp,separation=true" tells neighbouring places and regions apart.
        text: a table with a vector for each class, ``TABLE.safetensors`` or ``TABLE.npy`` beside ``classes.txt``, for
            heads that read text: "score", with settings as "score,mlp=true,context=1", "mlp,language=1" and
            "fcos,scores=true".
        dice: of masks: how much Dice's loss, which sees rare classes, counts beside cross entropy; its sums are over
            the images of a part.
        log: where every step is written to: "csv", "tensorboard", "mlflow" and "wandb", the last two on this machine
            unless ``MLFLOW_TRACKING_URI`` or ``WANDB_MODE`` says otherwise.
        log_dir: the folder of what they write; None is ``logs`` beside the output.
    """

    settings: Mapping[str, str] | None = None
    image_size: ImageSize | None = None
    frames: int = 1
    epochs: int | None = None
    batch_size: int = 32
    accumulate: int | None = None
    lr: float | None = None
    shots: int | None = None
    seed: int = 0
    val_fraction: float = 0.2
    augment: Sequence[str] = ()
    optimizer: str = OWN_OPTIMIZER
    schedule: str = OWN_SCHEDULE
    head_lr: float | None = None
    weight_decay: float | None = None
    balance: Balance | None = None
    consistency: str | None = None
    patience: int | None = None
    precision: str = "auto"
    backbone_precision: str = "fp32"
    device: str | None = None
    init: FilePath | None = None
    resume: bool = False
    checkpoint_s: float = CHECKPOINT_S
    memory: int | None = None
    task: str | None = None
    task_weights: str | None = None
    head: str | None = None
    text: FilePath | None = None
    dice: float = 0.0
    log: Sequence[str] = ()
    log_dir: FilePath | None = None

    def check(self) -> None:
        """Refuse what no training could be, before any work is done.

        Raises:
            InputError: a value out of its range, or a name that is not known.
        """
        if self.precision not in PRECISIONS:
            raise InputError(option("precision"), "is auto, fp32 or bf16", got=repr(self.precision))
        if self.backbone_precision not in BACKBONE_PRECISIONS:
            raise InputError(option("backbone_precision"), "is fp32, int8 or int4", got=repr(self.backbone_precision))
        if self.epochs is not None and self.epochs < 1:
            raise InputError(option("epochs"), "must be at least 1", got=self.epochs)
        if self.batch_size < 1:
            raise InputError(option("batch_size"), "must be at least 1", got=self.batch_size)
        if self.accumulate is not None and not 1 <= self.accumulate <= self.batch_size:
            what = f"must be between 1 and the batch size, {self.batch_size}"
            raise InputError(option("accumulate"), what, got=self.accumulate)
        for field, rate in (("lr", self.lr), ("head_lr", self.head_lr)):
            if rate is not None and not 0 < rate < math.inf:
                raise InputError(option(field), "must be above 0 and finite", got=rate)
            if rate is not None and rate > MOST_LR:
                raise InputError(option(field), f"must be at most {MOST_LR:g}", got=rate)
        if not 0 <= self.seed < MOST_SEED:
            raise InputError(option("seed"), f"must be at least 0 and below {MOST_SEED}", got=self.seed)
        if self.shots is not None and self.shots < 1:
            raise InputError(option("shots"), "must be at least 1", got=self.shots)
        if not 0 < self.val_fraction < 1:
            raise InputError(option("val_fraction"), "must be between 0 and 1, without them", got=self.val_fraction)
        if not 0 <= self.checkpoint_s < math.inf:
            raise InputError(option("checkpoint_s"), "must be at least 0 and finite", got=self.checkpoint_s)
        if self.memory is not None and self.memory < 0:
            raise InputError(option("memory"), "must be at least 0 bytes", got=self.memory)
        self._check_recipe()

    def check_class(self) -> None:
        """Refuse what says nothing of a class for the image.

        Raises:
            InputError: an option of heads that read maps.
        """
        usual = TrainOptions()
        for field in _OF_MAPS:
            value = getattr(self, field)
            if value != getattr(usual, field):
                fix = f"leave {option(field)} out, or ask for what it is of, {option('task', 'mask')} and others"
                raise InputError(option("task", "class"), f"does not go with {option(field)}", got=value, fix=fix)

    def _check_recipe(self) -> None:
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise InputError(option("weight_decay"), "must be at least 0 and finite", got=self.weight_decay)
        if self.balance is not None and self.balance not in BALANCES:
            raise InputError(option("balance"), f"is {' or '.join(BALANCES)}", got=repr(self.balance))
        if self.patience is not None and self.patience < 1:
            raise InputError(option("patience"), "must be at least 1", got=self.patience)
        augmentations(self.augment)
        asked = consistency(self.consistency)
        if asked is not None and asked.form == CHEAP and self.augment:
            what = f"{CHEAP} compares an image with itself an epoch ago, so it must look the same"
            fix = f"train without {option('augment')}, or with {FULL}, both passes of which see one image"
            raise InputError(option("consistency"), what, got=option("augment", ",".join(self.augment)), fix=fix)
        tasks = [] if self.task is None else self.task.split(",")
        if not set(tasks) <= set(TASKS) or len(set(tasks)) < len(tasks) or ("class" in tasks and len(tasks) > 1):
            what = f"is {' or '.join(TASKS)}, or several of the last three"
            raise InputError(option("task"), what, got=repr(self.task))
        for each in [] if self.head is None else self.head.split(BETWEEN):
            head_form(each)
        task_weights(self.task_weights)
        if not 0 <= self.dice < math.inf:
            raise InputError(option("dice"), "must be at least 0 and finite", got=self.dice)
        named("optimizer", self.optimizer)
        named("schedule", self.schedule)
        require_known(self.log)
