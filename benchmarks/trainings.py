"""The trainings that benchmarks measure, as jobs: images and packs below ``--dir``, made once, whoever asks first.

What ran is kept when a run is interrupted (``edgepet/jobs``). A table that takes longer than a machine lasts grows by
``rows.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from harness import IMAGE_SIZES, Asked
from judging import right_answers, written

from edgepet.errors import InputError
from edgepet.files import sha256_file
from edgepet.jobs.job import MEASURED, Job, Result
from edgepet.jobs.running import run_jobs
from edgepet.measuring.machine import environment
from edgepet.reports.progress import Progress
from edgepet.samples.tasks import build_task
from edgepet.samples.weights import WEIGHTS
from edgepet.verbs.dense_answers import DenseScore

TEST_CAP, FEW = 2000, 4  # test images of a task at most; images of a class in each split of a quick run
BALANCED = {
    "balance": "weights"
}  # of masks of scenes, nine tenths of which are background: without it that is all there is
MODULES = "modules.work"  # what a pretraining leaves
GPU = "gpu"  # a measured fact of a training
NATIVE_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining:
    """A method's tensors, tuned on the classes of several demo tasks together, or with ``options`` of ``pretrain`` on
    all answers of one; all else as in ``Training``.
    """

    tasks: tuple[str, ...]
    backbone: str
    method: str
    image_size: int
    epochs: int | None = None
    few: int | None = None
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A pack of a demo task on a demo backbone. ``scored`` judges it on the test split as well.

    ``few`` is how many images of each class are left in each split, None is all. ``settings`` are the method's, as
    text, ``options`` further ones of ``train``, and ``init`` is what the method's tensors start from. ``imbalance`` is
    how many times the training images of the last class the first one has.
    """

    task: str
    backbone: str
    method: str
    image_size: int
    epochs: int | None = None
    shots: int | None = None
    backbone_precision: str = "fp32"
    test_cap: int = TEST_CAP
    few: int | None = None
    imbalance: float | None = None
    scored: bool = False
    seed: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    init: Pretraining | None = None

    @property
    def pack_name(self) -> str:
        """Of the file; the task of a pack is called so as well."""
        rounded = "" if self.backbone_precision == "fp32" else f"-{self.backbone_precision}"
        return f"{self.task}-{self.method}{rounded}.pet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A training that is done: its pack, with the work folder beside it, and the images that it was trained on."""

    training: Training
    result: Result
    data: Path

    @property
    def pack(self) -> Path:
        """The file."""
        return self.result.folder / self.training.pack_name


def jobs_folder(run: Asked) -> Path:
    """Where results of jobs are."""
    return run.folder / "jobs"


def finished(run: Asked, jobs: Sequence[Job], ray: str | None = None) -> tuple[Result, ...]:
    """The results of ``jobs``; those that are not there yet are made here in turn, with all cores, or on ``ray``.

    What measures times stays here.
    """
    return _finished(run, jobs, ray=ray)


def _finished(run: Asked, jobs: Sequence[Job], *, processes: int = 1, ray: str | None = None) -> tuple[Result, ...]:
    return run_jobs(
        jobs, jobs_folder(run), processes=processes, ray=ray,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip


def draw(run: Asked, task: str) -> Path:
    """The images of a demo task."""
    (images,) = finished(run, [_images_job(task, TEST_CAP, FEW if run.quick else None)])
    return images.folder / task


def draw_named(run: Asked, task: str, test_cap: int, few: int | None) -> dict[str, object]:
    """The images of a demo task as a job's specification names them."""
    (images,) = finished(run, [_images_job(task, test_cap, few)])
    return _named(task, images)


def trained(run: Asked, trainings: Sequence[Training]) -> tuple[Trained, ...]:
    """Train those that are not trained yet, ``run.processes`` at the same time."""
    begun = {each.init: _pretraining_job(run, each.init) for each in trainings if each.init is not None}
    _finished(run, list(begun.values()), processes=run.processes, ray=run.ray)
    jobs = planned(run, trainings)
    made = _finished(run, [job for job, _ in jobs], processes=run.processes, ray=run.ray)
    return tuple(
        Trained(training=each, result=result, data=images.folder / each.task)
        for each, result, (_, images) in zip(trainings, made, jobs, strict=True)
    )


def planned(run: Asked, trainings: Sequence[Training]) -> list[tuple[Job, Result]]:
    """The job of each training, and the images that it is of, which are drawn."""
    pools = [_images_job(each.task, each.test_cap, each.few, each.imbalance) for each in trainings]
    images = dict(zip((pool.digest for pool in pools), finished(run, pools), strict=True))
    begun = {each.init: _pretraining_job(run, each.init) for each in trainings if each.init is not None}
    return [
        (_training_job(run, each, drawn, None if each.init is None else begun[each.init]), drawn)
        for each, drawn in zip(trainings, (images[pool.digest] for pool in pools), strict=True)
    ]


def short_packs(run: Asked, backbone: str, methods: Sequence[str]) -> list[Path]:
    """Packs of the digits, hardly trained: for what does not depend on a pack's values, as latency does not."""
    few, size = FEW if run.quick else None, IMAGE_SIZES[backbone]
    trainings = [
        Training(task="digits", backbone=backbone, method=each, image_size=size, few=few, epochs=1, shots=2)
        for each in methods
    ]
    return [each.pack for each in trained(run, trainings)]


def in_turns(every: Sequence[Trained], rounds: int) -> list[float]:
    """The p50 of each pack's network with its heads in ms, on ONNX Runtime in one thread, interleaved."""
    from edgepet import bench

    report = bench([made.pack for made in every], runtimes=["onnxruntime"], threads=1, rounds=rounds)
    return [row.p50_ms for row in report.rows]


def measuring_job(function: str, made: Trained, **settings: object) -> Job:
    """A job that measures a pack, which ``pack_of`` finds there, with its images, which ``images_of`` finds."""
    data, threads = made.result.job.specification["data"], environment().cores
    asked = {"pack": named_pack(made), "data": data, "threads": threads, **settings}
    return Job(function=function, specification=asked)


def named_pack(made: Trained) -> dict[str, object]:
    """A pack as a specification names it, for ``pack_of``."""
    return named_file(made.result, made.training.pack_name)


def named_file(result: Result, name: str) -> dict[str, object]:
    """A file of a job as a specification names it, for ``pack_of``."""
    return {"job": result.job.digest, "name": name, "sha256": result.files[name]}


def pack_of(specification: Mapping[str, Any], folder: Path) -> Path:
    """The pack that a specification names, beside the folder of this job.

    Raises:
        InputError: it is not that one.
    """
    named = specification["pack"]
    pack: Path = folder.parent / named["job"] / named["name"]
    if not pack.is_file() or sha256_file(pack) != named["sha256"]:
        raise InputError(str(pack), f"needs the pack sha256:{named['sha256'][:12]}")
    return pack


def _images_job(task: str, test_cap: int, few: int | None, imbalance: float | None = None) -> Job:
    told = {} if imbalance is None else {"imbalance": imbalance}
    return Job(function="trainings:draw_images", specification={"task": task, "test_cap": test_cap, "few": few, **told})


def _pretraining_job(run: Asked, asked: Pretraining) -> Job:
    pools = finished(run, [_images_job(task, TEST_CAP, asked.few) for task in asked.tasks])
    specification = {
        "data": [_named(task, pool) for task, pool in zip(asked.tasks, pools, strict=True)],
        "backbone": _network(asked.backbone, asked.image_size),
        "method": asked.method,
        "options": {"epochs": asked.epochs, "precision": _precision(), **dict(asked.options)},
        "threads": _threads(run),
    }
    return Job(function="trainings:pretrain_modules", specification=specification)


def _training_job(run: Asked, training: Training, images: Result, init: Job | None) -> Job:
    return Job(
        function="trainings:train_pack",
        specification={
            "data": _named(training.task, images),
            "backbone": _network(training.backbone, training.image_size),
            "method": training.method,
            "settings": dict(training.settings),
            "options": {
                "epochs": training.epochs,
                "shots": training.shots,
                "seed": training.seed,
                "precision": _precision(),
                "backbone_precision": training.backbone_precision,
                **training.options,
            },
            "init": None if init is None else init.digest,
            "pack": training.pack_name,
            "scored": training.scored,
            "threads": _threads(run),
        },
    )


def _named(task: str, images: Result) -> dict[str, object]:
    return {"job": images.job.digest, "task": task, "pixel_sha256": images.report["pixel_sha256"]}


def _network(name: str, image_size: int) -> dict[str, object]:
    return {"name": f"demo:{name}", "sha256": WEIGHTS[name].sha256, "image_size": image_size}


def _threads(run: Asked) -> int:
    return max(1, environment().cores // run.processes)


def _precision() -> str:
    """What this machine trains fastest in, not measured: a job is pure."""
    return "bf16" if NATIVE_BF16 & set(environment().cpu_features) else "fp32"


def draw_images(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """The images of a demo task, in ``folder/TASK``."""
    drawn, few = folder / specification["task"], specification["few"]
    summary = build_task(specification["task"], drawn, test_cap=specification["test_cap"])
    if few is not None:
        for images in drawn.glob("*/*/"):
            for path in sorted(images.iterdir())[few:]:
                path.unlink()
    if "imbalance" in specification:
        classes = sorted((drawn / "train").iterdir())
        for number, images in enumerate(classes):
            paths = sorted(images.iterdir())
            kept = max(1, round(len(paths) * specification["imbalance"] ** (-number / (len(classes) - 1))))
            for path in paths[kept:]:
                path.unlink()
    return {"pixel_sha256": summary.pixel_sha256, "counts": summary.counts, "source": summary.source}


def pretrain_modules(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """``folder/modules.work``: what further trainings of the method start from; classes are called TASK-CLASS."""
    import torch

    from edgepet import pretrain
    from edgepet.networks.loading import load_backbone

    torch.set_num_threads(specification["threads"])
    network, options = specification["backbone"], _options(specification)
    data = (
        _classes_of_all(specification, folder)
        if "task" not in options
        else images_of({"data": specification["data"][0]}, folder)
    )
    with Progress() as progress, progress.training(f"{network['name']} {specification['method']}") as say:
        report: Any = pretrain(  # on class folders
            data, load_backbone(network["name"], image_size=network["image_size"]), specification["method"],
            folder / MODULES, say=say, **options,
        )  # fmt: skip
    if "task" in options:
        return {"val": {each.name: each.val.value for each in report.heads}, "val_n": report.val.n}
    shutil.rmtree(data)
    return {"classes": report.classes, "val_top1": report.val.top1, "val_n": report.val.n}


def _classes_of_all(specification: Mapping[str, Any], folder: Path) -> Path:
    """``folder/data``, the train and val images of several tasks."""
    data = folder / "data"
    for named in specification["data"]:
        drawn = images_of({"data": named}, folder)
        for held in (each for split in ("train", "val") for each in sorted((drawn / split).iterdir())):
            shutil.copytree(held, data / held.parent.name / f"{named['task']}-{held.name}", copy_function=os.link)
    return data


def _options(specification: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``train``; a table of text is the repository's, so that a job is the same wherever it runs."""
    options = dict(specification["options"])
    if "text" in options:
        options["text"] = Path(__file__).parents[1] / options["text"]
    return options


def train_pack(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """A pack and its work folder, from images that another job drew."""
    import torch

    from edgepet import evaluate, read_pack, train
    from edgepet.exporters.trace import base_graph
    from edgepet.networks.loading import load_backbone
    from edgepet.packs.pack import EVERY

    torch.set_num_threads(specification["threads"])
    data, network = images_of(specification, folder), specification["backbone"]
    backbone, pack = load_backbone(network["name"], image_size=network["image_size"]), folder / specification["pack"]
    init = None if specification["init"] is None else folder.parent / specification["init"] / MODULES
    with Progress() as progress, progress.training(f"{network['name']} {pack.stem}") as say:
        report: Any = train(data, backbone, specification["method"], pack, settings=specification["settings"],
                            init=init, say=say, **_options(specification))  # fmt: skip
    delta = read_pack(pack, answers=EVERY).delta
    found: dict[str, object] = {
        "backbone": backbone.label,
        "stored_values": delta.stored_values,
        "pack_bytes": report.pack_bytes,
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "precision": report.precision,
        MEASURED: {"seconds": report.seconds, **_gpu()},
    }
    if delta.heads:
        head = {"trainable_params": report.trainable_params, "head_params": report.head_params}
        found |= head | {"val": {each.name: each.val.value for each in report.heads}, "val_n": report.val.n}
    else:
        found |= {"val_top1": delta.val.top1, "val_n": delta.val.n}
    if not specification["scored"]:
        return found
    if delta.heads:
        base_graph(backbone, delta.branches)
        return found | {"test": head_scores(evaluate(pack, data), report.heads[0].name)}
    right = right_answers(backbone, delta, data)
    return found | {"test_top1": float(right.mean()), "test_n": len(right), "test_right": written(right)}


def _gpu() -> dict[str, str]:
    """The GPU that trainings run on here; empty where the CPU does."""
    import torch

    return {GPU: torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def recoded(specification: Mapping[str, Any], folder: Path) -> tuple[dict[str, object], dict[str, dict[str, Any]]]:
    """A pack in the smallest codes that lose at most so many points on val: its bytes and planes, and by head what
    ``eval`` says of it on test.
    """
    import torch

    from edgepet import evaluate, pack

    torch.set_num_threads(specification["threads"])
    trained_pack, data = pack_of(specification, folder), images_of(specification, folder)
    output = folder / "coded.pet"
    report = pack(trained_pack, output, codec="auto", data=data, max_drop=specification["max_drop"])
    made = {"coded_bytes": report.bytes, "coded_planes": {each.name: each.format for each in report.planes}}
    return made, head_scores(evaluate(output, data), report.answers[0])


def head_scores(test: Any, name: str) -> dict[str, dict[str, object]]:
    """By head what ``eval`` says of each; that of one head says it of ``name``."""
    heads, told = getattr(test, "heads", {name: test}), [each.name for each in fields(DenseScore)]
    scores = {head: {key: getattr(each, key) for key in told} for head, each in heads.items()}
    return {head: {key: value for key, value in each.items() if value is not None} for head, each in scores.items()}


def images_of(specification: Mapping[str, Any], folder: Path) -> Path:
    """The images that a specification names: what another job drew, beside the folder of this one.

    Raises:
        InputError: they are not those.
    """
    named = specification["data"]
    data: Path = folder.parent / named["job"] / named["task"]
    found = json.loads((data / "meta.json").read_text())["pixel_sha256"] if data.is_dir() else "nothing"
    if found != named["pixel_sha256"]:
        raise InputError(str(data), f"needs the images {named['pixel_sha256'][:12]}", got=found[:12])
    return data
