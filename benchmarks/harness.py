"""What all benchmarks share: their arguments, their one writer of results, and the trainings that they measure.

Images and packs are jobs (``edgepet/jobs``) below ``--dir``: made once, whichever benchmark asks for them first, and
kept when a run is interrupted. ``--quick`` goes the same way through the code with as little as it takes; what it
writes says nothing, and goes into a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepet.errors import InputError
from edgepet.files import sha256_file, write_file
from edgepet.jobs.job import Job, Result
from edgepet.jobs.running import run_jobs
from edgepet.measuring.machine import environment
from edgepet.reports.as_json import to_json
from edgepet.reports.progress import Progress
from edgepet.samples.tasks import build_task
from edgepet.samples.weights import WEIGHTS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IMAGE_SIZES = {"vit-small": 112, "efficientnet-lite0": 224}
SMALLER = {"vit-small": 112, "efficientnet-lite0": 128}  # where every method is tried
# ONNX Runtime's idle threads spin so long that its own next session waits.
SETTLE_S = {"torch": 0.002, "onnxruntime": 0.05, "openvino": 0.002}
TEST_CAP, FEW = 2000, 4  # test images of a task at most; images of a class in each split of a quick run
WARMUP = 20  # untimed rounds, but no more than timed ones
MODULES = "modules.work"  # what a pretraining leaves
OF_WHOEVER = ("--dir", "--results", "--ray")  # folders and addresses that a result does not tell
NATIVE_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}


# ---------------------------------------------------------------------------------------------- arguments and results


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked of a run: ``folder`` holds its jobs, ``results`` takes what it writes, ``ray`` is who trains."""

    command: str
    quick: bool
    folder: Path
    results: Path
    ray: str | None = None


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="as little of everything as goes the whole way")
    add("--dir", type=Path, default=Path("bench"), help="where images and packs are kept (%(default)s)")
    add(
        "--ray",
        metavar="ADDRESS",
        help="train on the nodes of a Ray cluster, auto for this machine's (on this machine)",
    )
    add("--results", type=Path, help="where results go (benchmarks/results, or a temporary folder when quick)")
    return parser


def asked(options: argparse.Namespace) -> Asked:
    """What ``options`` ask for, and the command as results tell it."""
    quick: bool = options.quick
    results: Path = options.results or (Path(tempfile.mkdtemp(prefix="edgepet-bench-")) if quick else RESULTS)
    results.mkdir(parents=True, exist_ok=True)
    return Asked(command=command(sys.argv), quick=quick, folder=options.dir, results=results, ray=options.ray)


def command(argv: Sequence[str]) -> str:
    """The command that was run, without the folders of whoever ran it: ``--dir DIR --pack digits-ssf.pet``."""
    told, before = list[str](), ""
    for part in argv[1:]:
        name, equals, value = part.partition("=")
        if before in OF_WHOEVER:
            told.append(before[2:].upper())
        elif equals and name in OF_WHOEVER:
            told += [name, name[2:].upper()]
        else:
            told.append(f"{name}={Path(value).name}" if equals else Path(part).name)
        before = part
    return shlex.join(["python", f"benchmarks/{Path(argv[0]).name}", *told])


def write_result(run: Asked, name: str, facts: Mapping[str, object]) -> Path:
    """Write ``NAME.json``: the facts, the command that found them, the machine and the versions that they hold for."""
    result = {"command": run.command, **facts, "environment": environment()}
    path = run.results / f"{name}.json"
    write_file(path, json.dumps(to_json(result), indent=1, allow_nan=False).encode() + b"\n")
    print(f"{path} is written", flush=True)
    return path


def earlier(run: Asked, name: str) -> dict[str, Any]:
    """The result that a run adds to; empty where there is none."""
    path = run.results / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def source(result: Mapping[str, Any]) -> str:
    """The command that found a result, where and when."""
    here = result["environment"]
    versions = ", ".join(
        f"{name} {here['versions'][name]}" for name in ("torch", "onnxruntime", "openvino") if name in here["versions"]
    )
    return f"`{result['command']}` on {here['cpu']} ({here['cores']} cores), {versions}, {here['date']}."


# -------------------------------------------------------------------------------------------------------------- pages


@dataclass(frozen=True, slots=True)
class Marks:
    """The two lines of a page between which its tables are."""

    begin: str
    end: str

    def put(self, page: Path, made: str, into: Path | None = None) -> None:
        """Put ``made`` between the marks of ``page``; ``into``, a folder, gets the page in its place."""
        text = page.read_text()
        before, after = text.split(self.begin)[0], text.split(self.end)[1]
        target = page if into is None else into / page.name
        write_file(target, f"{before}{self.begin}\n\n{made}\n{self.end}{after}".encode())


TABLES = Marks("<!-- results: made by benchmarks/report.py -->", "<!-- end of results -->")
SWEEP = Marks("<!-- sweep: made by benchmarks/timm_sweep.py -->", "<!-- end of sweep -->")


# --------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining:
    """A method's tensors, tuned on the classes of several demo tasks together; all else as in ``Training``."""

    tasks: tuple[str, ...]
    backbone: str
    method: str
    image_size: int
    epochs: int | None = None
    few: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A pack of a demo task on a demo backbone. ``scored`` judges it on the test split as well.

    ``few`` is how many images of each class are left in each split, None is all. ``settings`` are the method's, as
    text, ``options`` further ones of ``train``, and ``init`` is what the method's tensors start from.
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
    return run_jobs(jobs, jobs_folder(run), ray=ray, tell=lambda line: print(line, file=sys.stderr, flush=True))


def draw(run: Asked, task: str) -> Path:
    """The images of a demo task."""
    (images,) = finished(run, [_images_job(task, TEST_CAP, FEW if run.quick else None)])
    return images.folder / task


def trained(run: Asked, trainings: Sequence[Training]) -> tuple[Trained, ...]:
    """Train those that are not trained yet."""
    pools = [_images_job(each.task, each.test_cap, each.few) for each in trainings]
    images = dict(zip((pool.digest for pool in pools), finished(run, pools), strict=True))
    begun = {each.init: _pretrained(run, each.init) for each in trainings if each.init is not None}
    jobs = [
        _training_job(each, images[pool.digest], None if each.init is None else begun[each.init])
        for each, pool in zip(trainings, pools, strict=True)
    ]
    return tuple(
        Trained(training=each, result=result, data=images[pool.digest].folder / each.task)
        for each, pool, result in zip(trainings, pools, finished(run, jobs, run.ray), strict=True)
    )


def short_packs(run: Asked, backbone: str, methods: Sequence[str]) -> list[Path]:
    """Packs of the digits, hardly trained: for what does not depend on a pack's values, as latency does not."""
    few, size = FEW if run.quick else None, IMAGE_SIZES[backbone]
    trainings = [
        Training(task="digits", backbone=backbone, method=each, image_size=size, few=few, epochs=1, shots=2)
        for each in methods
    ]
    return [each.pack for each in trained(run, trainings)]


def measuring_job(function: str, made: Trained, **settings: object) -> Job:
    """A job that measures a pack, which ``pack_of`` finds there, with its images, which ``images_of`` finds."""
    name = made.training.pack_name
    pack = {"job": made.result.job.digest, "name": name, "sha256": made.result.files[name]}
    data = made.result.job.specification["data"]
    threads = environment().cores
    return Job(function=function, specification={"pack": pack, "data": data, "threads": threads, **settings})


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


def _images_job(task: str, test_cap: int, few: int | None) -> Job:
    return Job(function="harness:draw_images", specification={"task": task, "test_cap": test_cap, "few": few})


def _pretrained(run: Asked, asked: Pretraining) -> Result:
    pools = finished(run, [_images_job(task, TEST_CAP, asked.few) for task in asked.tasks])
    specification = {
        "data": [_named(task, pool) for task, pool in zip(asked.tasks, pools, strict=True)],
        "backbone": _network(asked.backbone, asked.image_size),
        "method": asked.method,
        "options": {"epochs": asked.epochs, "precision": _precision()},
        "threads": environment().cores,
    }
    (made,) = finished(run, [Job(function="harness:pretrain_modules", specification=specification)], run.ray)
    return made


def _training_job(training: Training, images: Result, init: Result | None) -> Job:
    return Job(
        function="harness:train_pack",
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
            "init": None if init is None else init.job.digest,
            "pack": training.pack_name,
            "scored": training.scored,
            "threads": environment().cores,
        },
    )


def _named(task: str, images: Result) -> dict[str, object]:
    return {"job": images.job.digest, "task": task, "pixel_sha256": images.report["pixel_sha256"]}


def _network(name: str, image_size: int) -> dict[str, object]:
    return {"name": f"demo:{name}", "sha256": WEIGHTS[name].sha256, "image_size": image_size}


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
    return {"pixel_sha256": summary.pixel_sha256, "counts": summary.counts, "source": summary.source}


def pretrain_modules(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """``folder/modules.work``: what further trainings of the method start from; classes are called TASK-CLASS."""
    import torch

    from edgepet import pretrain
    from edgepet.networks.loading import load_backbone

    torch.set_num_threads(specification["threads"])
    network, data = specification["backbone"], folder / "data"
    for named in specification["data"]:
        drawn = images_of({"data": named}, folder)
        for held in (each for split in ("train", "val") for each in sorted((drawn / split).iterdir())):
            shutil.copytree(held, data / held.parent.name / f"{named['task']}-{held.name}", copy_function=os.link)
    with Progress() as progress, progress.training(f"{network['name']} {specification['method']}") as say:
        report = pretrain(
            data, load_backbone(network["name"], image_size=network["image_size"]), specification["method"],
            folder / MODULES, say=say, **specification["options"],
        )  # fmt: skip
    shutil.rmtree(data)
    return {"classes": report.classes, "val_top1": report.val.top1, "val_n": report.val.n}


def train_pack(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """A pack and its work folder, from images that another job drew."""
    import torch

    from edgepet import evaluate, read_pack, train
    from edgepet.exporters.trace import base_graph
    from edgepet.networks.loading import load_backbone

    torch.set_num_threads(specification["threads"])
    data, network = images_of(specification, folder), specification["backbone"]
    backbone, pack = load_backbone(network["name"], image_size=network["image_size"]), folder / specification["pack"]
    init = None if specification["init"] is None else folder.parent / specification["init"] / MODULES
    with Progress() as progress, progress.training(f"{network['name']} {pack.stem}") as say:
        report = train(data, backbone, specification["method"], pack, settings=specification["settings"], init=init,
                       say=say, **specification["options"])  # fmt: skip
    delta = read_pack(pack).delta
    found: dict[str, object] = {
        "backbone": backbone.label,
        "stored_values": delta.stored_values,
        "pack_bytes": report.pack_bytes,
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "precision": report.precision,
        "val_top1": delta.val.top1,
        "val_n": delta.val.n,
    }
    if not specification["scored"]:
        return found
    base_graph(backbone, delta.branches)
    test: Any = evaluate(pack, data)  # of classes
    return found | {"test_top1": test.top1, "test_n": test.n}


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
