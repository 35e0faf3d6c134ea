"""The ``train`` and ``pretrain`` verbs: images and a backbone in, a pack and a work folder out. Needs torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgepet.deltas.delta import Delta, Score
from edgepet.errors import InputError
from edgepet.exporters.trace import keep_weights
from edgepet.images.preprocess import normalize
from edgepet.measuring.parity import Accuracy, accuracy
from edgepet.methods import Method
from edgepet.methods.method import count
from edgepet.networks.backbone import Backbone
from edgepet.networks.merged import merged_logits
from edgepet.packs.pack import Codec, encode_pack, read_pack, write_pack
from edgepet.spec import FilePath
from edgepet.tuning.checkpoint import EVERY_S
from edgepet.tuning.fit import Pixels, Say
from edgepet.tuning.model import TunedModel, logits_of
from edgepet.tuning.processes import crew as join_crew
from edgepet.tuning.training import Job, Made, run_job
from edgepet.tuning.work_folder import work_folder, write_work


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneFacts:
    name: str
    fingerprint: str
    bytes: int
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainReport:
    """What ``pretrain`` made: the work folder at ``path``, from which trainings start. ``max_abs_diff`` is the largest
    difference of logits between tuned and lowered network in float64.
    """

    path: Path
    method: str
    trainable_params: int
    classes: int
    epochs: int
    best_epoch: int
    seconds: float
    val: Accuracy
    max_abs_diff: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What ``train`` made. ``val`` is of the pack as stored, in float32; ``trainable_params`` leaves the head out.

    ``algebra_max_abs`` is the largest difference of logits between tuned and merged network in float64.
    ``images_per_class`` are the fewest and the most that a class was trained on. Where ``backbone_precision``
    is not fp32, ``val_rounded`` is of the network as it was tuned: its backbone rounded, all else float32.
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
    backbone_precision: str
    images_per_class: tuple[int, int]
    val: Accuracy
    val_rounded: Accuracy | None
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
    frames: int = 1,
    epochs: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    lr: float | None = None,
    shots: int | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    augment: Sequence[str] = (),
    precision: str = "auto",
    backbone_precision: str = "fp32",
    device: str | None = None,
    codec: Codec = "fp16",
    init: FilePath | None = None,
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
        frames: above 1, ``data`` holds clips, folders of images: so many are taken of each, spread evenly.
        batch_size: images of one step, over all processes; each goes through its share in ``accumulate`` parts.
        shots: images of each class to train on, chosen by ``seed``; None is all.
        precision: "fp32", "bf16" (autocast) or "auto": bf16 where it is measured to be faster here.
        backbone_precision: "int8" or "int4" (weights; activations have 8 bits) rounds the backbone while tuning, so
            that the delta repairs that too; the pack fits the float backbone as ever.
        init: start from the tensors of an earlier training of this method: its work folder, ``pretrain``'s, or its pack
            where the work folder lies beside it; the head starts anew.
        device: torch's name of what trains, "cpu" or "cuda"; None is a GPU where torch finds one.
        resume: go on from the checkpoint of an interrupted training, or begin where there is none.
        checkpoint_s: seconds between two checkpoints within an epoch.
        say: told of every step; stage: told the name of what begins.

    Raises:
        InputError: data, backbone or settings at fault, or the checkpoint of another training is in the way.
        CheckError: the merged network is not the tuned one.
        KeyboardInterrupt: SIGINT or SIGTERM arrived, and a checkpoint was written.
    """
    began, output, crew = time.perf_counter(), Path(output), join_crew()
    if output.suffix != ".pet":
        raise InputError("-o", "needs a file name ending in .pet", got=repr(output.name))
    request = Job(
        data=Path(data), backbone=backbone, method=method, output=output, settings=settings or {},
        image_size=image_size, frames=frames, epochs=epochs, batch_size=batch_size, accumulate=accumulate, lr=lr,
        shots=shots, seed=seed, val_fraction=val_fraction, augment=augment, precision=precision,
        backbone_precision=backbone_precision, device=device, init=init, resume=resume, checkpoint_s=checkpoint_s,
        say=say, stage=stage,
    )  # fmt: skip
    made = run_job(request, crew)
    if crew.leads:
        _write(output, made.delta, codec, made.backbone, made.model, made.val)
        made.keeper.remove()
    crew.wait()
    return _report(output, made, time.perf_counter() - began)


def pretrain(
    data: FilePath, backbone: str | Backbone, method: str | Method, output: FilePath, **options: Any
) -> PretrainReport:
    """Tune ``method`` on a broad data set and keep its tensors in the folder ``output``: ``train`` starts from them.

    The first stage of PVP (arXiv:2304.13639). Give the second the folder as ``init``.

    Args:
        options: those of ``train``, without ``codec``.

    Raises:
        InputError, CheckError, KeyboardInterrupt: as ``train`` does.
    """
    began, output, crew = time.perf_counter(), Path(output), join_crew()
    if output.suffix != ".work":
        raise InputError("-o", "needs a folder name ending in .work", got=repr(output.name))
    made = run_job(Job(data=Path(data), backbone=backbone, method=method, output=output, **options), crew)
    if crew.leads:
        _keep(output, made.delta, made.backbone, made.model, made.val)
        made.keeper.remove()
    crew.wait()
    return PretrainReport(
        path=output,
        method=made.model.method.name,
        trainable_params=count(made.model.method, made.backbone.layers, made.backbone.tensors),
        classes=len(made.delta.labels),
        epochs=made.plan.epochs,
        best_epoch=made.fitted.best_epoch,
        seconds=time.perf_counter() - began,
        val=_accuracy(made.backbone, made.delta, made.val),
        max_abs_diff=made.proof[0],
    )


def _report(output: Path, made: Made, seconds: float) -> TrainReport:
    backbone, model, fitted = made.backbone, made.model, made.fitted
    counts = np.bincount(made.train.labels, minlength=len(made.delta.labels))
    return TrainReport(
        pack=output,
        work=work_folder(output),
        method=model.method.name,
        trainable_params=count(model.method, backbone.layers, backbone.tensors),
        head_params=sum(p.numel() for p in model.linear.parameters()),
        pack_bytes=output.stat().st_size,
        epochs=made.plan.epochs,
        best_epoch=fitted.best_epoch,
        seconds=seconds,
        images_per_second=fitted.images_per_second,
        precision="bf16" if made.plan.autocast else "fp32",
        backbone_precision=model.backbone_precision,
        images_per_class=(int(counts.min()), int(counts.max())),
        val=_accuracy(backbone, read_pack(output).delta, made.val),
        val_rounded=None if model.rounding is None else _rounded(model, backbone, made.val),
        algebra_max_abs=made.proof[0],
        algebra_limit=made.proof[1],
        backbone=BackboneFacts(
            name=backbone.label,
            fingerprint=backbone.fingerprint,
            bytes=backbone.native_bytes,
            description=backbone.description,
        ),
    )


def _write(output: Path, delta: Delta, codec: Codec, backbone: Backbone, model: TunedModel, val: Pixels) -> None:
    """The pack, with the val accuracy of what it stores and not of what was trained, and its work folder."""
    stored = read_pack(encode_pack(delta, codec=codec)).delta
    judged = _accuracy(backbone, stored, val)
    write_pack(output, replace(delta, val=Score(top1=judged.top1, n=judged.n)), codec=codec)
    _keep(work_folder(output), delta, backbone, model, val)


def _keep(folder: Path, delta: Delta, backbone: Backbone, model: TunedModel, val: Pixels) -> None:
    spread = np.random.default_rng(0).permutation(len(val))  # folders come class by class
    keep_weights(backbone)
    write_work(folder, delta, model.arrays(), val.pixels[spread], val.labels[spread])


def _accuracy(backbone: Backbone, delta: Delta, val: Pixels) -> Accuracy:
    logits = merged_logits(backbone, delta, normalize(val.pixels, backbone.preprocess))
    return accuracy(logits.argmax(1), val.labels, len(delta.labels))


def _rounded(model: TunedModel, backbone: Backbone, val: Pixels) -> Accuracy:
    logits = logits_of(model, normalize(val.pixels, backbone.preprocess))
    return accuracy(logits.argmax(1), val.labels, logits.shape[1])
