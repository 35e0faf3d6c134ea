"""The command line: one function a verb. Contract: what scripts may rely on is the JSON and the exit codes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from edgepet import __version__
from edgepet.cli import options as arguments
from edgepet.errors import EdgepetError

DONE, USAGE, STOPPED = 0, 2, 130
Options: TypeAlias = argparse.Namespace


@dataclass(frozen=True, slots=True)
class Result:
    """What a verb has to say: a report for ``--json``, and how to show it to a person; ``failed`` is a check's no.

    ``silent`` is for all processes of a training but the one that speaks.
    """

    report: object
    show: Callable[[Any, Any], None]
    failed: bool = False
    silent: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        result: Result = options.run(options)
    except EdgepetError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt as stopped:
        sys.stderr.write(f"interrupted: {stopped}\n" if str(stopped) else "interrupted\n")
        return STOPPED
    if not result.silent:
        _put_out(result, options)
    return 4 if result.failed else DONE


def _put_out(result: Result, options: Options) -> None:
    from edgepet.reports.tables import terminal, to_json

    if options.json:
        sys.stdout.write(json.dumps(to_json(result.report), ensure_ascii=False, allow_nan=False) + "\n")
    elif not options.quiet:
        result.show(terminal(stderr=False), result.report)
    sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------------- verbs


def doctor(options: Options) -> Result:
    """what is installed, what each missing runtime needs, CPU features"""
    from edgepet.measuring import machine
    from edgepet.verbs import show

    del options
    return Result(show.Doctor.now(machine.environment(), machine.runtimes()), show.doctor)


def methods(options: Options) -> Result:
    """every method: paper, and its parameters and kilobytes on a backbone"""
    from edgepet.methods import METHODS, Branching, configure
    from edgepet.methods.method import count, fp16_bytes
    from edgepet.verbs import show

    backbone = None
    if options.backbone:
        from edgepet.networks.backbone import load_backbone

        backbone = load_backbone(options.backbone, image_size=options.img_size)
    rows = []
    for name in METHODS:
        method = configure(name)
        params = count(method, backbone.layers, backbone.tensors) if backbone else None
        size = fp16_bytes(method, backbone.layers, backbone.tensors) if backbone else None
        foldable = not isinstance(method, Branching)
        row = show.MethodRow(name=name, paper=method.paper, foldable=foldable, trainable_params=params, fp16_bytes=size)
        rows.append(row)
    return Result(show.MethodList(methods=tuple(rows)), show.methods)


def train(options: Options) -> Result:
    """tune a method on images, fold it to updates, and write a pack"""
    from edgepet.errors import require
    from edgepet.verbs import show

    require("torch", extra="train", purpose="train")
    from edgepet.tuning.processes import crew
    from edgepet.verbs.train import train as run

    label = f"{options.method} on {options.data}"
    with _progress(options) as progress, progress.stages() as stage, progress.training(label) as say:
        report = run(*_trained(options), codec=options.codec, say=say, stage=stage, **_training(options))
    return Result(report, show.train, silent=not crew().leads)


def pretrain(options: Options) -> Result:
    """tune a method on a broad data set and keep its tensors, for `train --init`"""
    from edgepet.errors import require
    from edgepet.verbs import show

    require("torch", extra="train", purpose="pretrain")
    from edgepet.tuning.processes import crew
    from edgepet.verbs.train import pretrain as run

    label = f"{options.method} on {options.data}"
    with _progress(options) as progress, progress.stages() as stage, progress.training(label) as say:
        report = run(*_trained(options), say=say, stage=stage, **_training(options))
    return Result(report, show.pretrain, silent=not crew().leads)


def _trained(options: Options) -> tuple[Path, str, str, Path]:
    return Path(options.data), options.backbone, options.method, Path(options.output)


def _training(options: Options) -> dict[str, Any]:
    """The options that both ways of training have."""
    return {
        "settings": arguments.settings(options.set),
        "image_size": options.img_size,
        "frames": options.frames,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "accumulate": options.accumulate,
        "lr": options.lr,
        "shots": options.shots,
        "seed": options.seed,
        "val_fraction": options.val_fraction,
        "augment": arguments.names(options.augment),
        "precision": options.train_precision,
        "backbone_precision": options.backbone_precision,
        "device": options.device,
        "init": arguments.path(options.init),
        "resume": options.resume,
        "checkpoint_s": options.checkpoint_every,
    }


def evaluate(options: Options) -> Result:
    """top-1 of a pack or an exported model"""
    from edgepet.verbs import show
    from edgepet.verbs.evaluate import evaluate as run

    with _progress(options) as progress, progress.stage(f"eval {options.model}"):
        report = run(
            Path(options.model), Path(options.data), split=options.split, runtime=options.runtime,
            precision=options.precision, backbone=options.backbone, threads=options.threads,
        )  # fmt: skip
    return Result(report, show.evaluate)


def merge(options: Options) -> Result:
    """write dense weights that plain timm loads strictly"""
    from edgepet.verbs import show
    from edgepet.verbs.export import merge as run

    with _progress(options) as progress, progress.stage(f"merge {options.pack}"):
        report = run(
            Path(options.pack), Path(options.output), backbone=options.backbone, data=arguments.path(options.data)
        )
    return Result(report, show.merge)


def export(options: Options) -> Result:
    """write models for ONNX Runtime, OpenVINO and TensorRT, each compared before it is kept"""
    from edgepet.exporters.exporter import ExportOptions
    from edgepet.verbs import show
    from edgepet.verbs.export import export as run
    from edgepet.verbs.export import parse_formats

    chosen = ExportOptions(
        to=parse_formats(options.to),
        precision=options.precision,
        sms=arguments.sms(options.sm),
        simplify=options.simplify,
        calib=options.calib,
        calib_images=options.calib_images,
        max_drop=options.max_drop,
        external_data=options.external_data,
    )
    with _progress(options) as progress, progress.stages() as stage:
        report = run(
            [Path(pack) for pack in options.packs], Path(options.output), backbone=options.backbone,
            data=arguments.path(options.data), options=chosen, stage=stage,
        )  # fmt: skip
    return Result(report, show.export)


def calibrated(options: Options) -> Result:
    """what int8 costs a task: every layer, the ranges, and the recipe that would be chosen"""
    from edgepet.verbs import show
    from edgepet.verbs.calibrate import calibrate, share

    if options.output is not None:
        with _progress(options) as progress, progress.stages() as stage:
            shared = share(
                Path(options.pack), options.calib, Path(options.output), backbone=options.backbone,
                data=arguments.path(options.data), images=options.calib_images, max_drop=options.max_drop, stage=stage,
            )  # fmt: skip
        return Result(shared, show.shared)
    with _progress(options) as progress, progress.stages() as stage:
        report = calibrate(
            Path(options.pack), options.calib, backbone=options.backbone, data=arguments.path(options.data),
            images=options.calib_images, max_drop=options.max_drop, stage=stage,
        )  # fmt: skip
    return Result(report, show.calibrate)


def verify(options: Options) -> Result:
    """check an exported model's files, then the comparison again"""
    from edgepet.verbs import show
    from edgepet.verbs.export import verify as run

    with _progress(options) as progress, progress.stage(f"verify {options.folder}"):
        report = run(
            Path(options.folder),
            data=arguments.path(options.data),
            pack=arguments.path(options.pack),
            backbone=options.backbone,
        )
    return Result(report, show.verify, failed=not report.ok)


def bench(options: Options) -> Result:
    """latency, all candidates in turn in every round"""
    from edgepet.verbs import show
    from edgepet.verbs.evaluate import bench as run

    with _progress(options) as progress, progress.bar("bench", options.rounds) as bar:
        report = run(
            [Path(model) for model in options.models],
            runtimes=arguments.names(options.runtime) or None,
            threads=options.threads,
            batch=options.batch,
            rounds=options.rounds,
            plain=options.plain,
            backbone=options.backbone,
            tick=lambda done: bar.update(done),
        )
    return Result(report, show.bench)


def storage(options: Options) -> Result:
    """bytes of one folder with every task in it, against a full model for every task"""
    from edgepet.verbs import show
    from edgepet.verbs.evaluate import storage as run

    with _progress(options) as progress, progress.stage("storage: run every task from one folder"):
        report = run(
            [Path(pack) for pack in options.packs],
            store=arguments.path(options.store),
            devices=options.devices,
            precision=options.precision,
        )
    return Result(report, show.storage)


def inspect(options: Options) -> Result:
    """what a pack or an exported model says of itself"""
    from edgepet.verbs import show
    from edgepet.verbs.evaluate import inspect as run

    return Result(run(Path(options.file)), show.inspect)


def import_peft(options: Options) -> Result:
    """a PEFT adapter folder as a pack, compared with PEFT itself"""
    from edgepet.verbs import show
    from edgepet.verbs.peft import import_peft as run

    with _progress(options) as progress, progress.stages() as stage:
        report = run(
            Path(options.folder), Path(options.output), backbone=options.backbone, image_size=options.img_size,
            labels=arguments.labels(options.labels), data=arguments.path(options.data), codec=options.codec,
            stage=stage,
        )  # fmt: skip
    return Result(report, show.peft)


def export_peft(options: Options) -> Result:
    """a pack as an adapter folder that PEFT loads on the timm model"""
    from edgepet.verbs import show
    from edgepet.verbs.peft import export_peft as run

    with _progress(options) as progress, progress.stages() as stage:
        report = run(
            Path(options.pack),
            Path(options.output),
            backbone=options.backbone,
            data=arguments.path(options.data),
            stage=stage,
        )
    return Result(report, show.peft)


def demo(options: Options) -> Result:
    """the whole flow on real data, offline once installed"""
    from edgepet.errors import require
    from edgepet.verbs import show

    for package in ("torch", "timm", "onnx", "onnxscript"):
        require(package, extra="train,openvino,tensorrt-rtx,demo", purpose="demo")
    from edgepet.verbs.demo import demo as run

    with _progress(options) as progress:
        report = run(Path(options.dir), progress=progress)
    return Result(report, show.demo)


# --------------------------------------------------------------------------------------------------------- options


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations: an option that grows a sibling must not change what a script meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="edgepet", description="One vision backbone and fifty tasks on an edge device.")
    parser.add_argument("--version", action="version", version=f"edgepet {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=_Parser)
    shared = _Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else there")
    shared.add_argument("--quiet", action="store_true", help="no progress and no tables")
    shared.add_argument("-v", "--verbose", action="store_true", help="progress with versions")

    def verb(name: str, run: Callable[[Options], Result]) -> argparse.ArgumentParser:
        told = run.__doc__ or ""
        made: argparse.ArgumentParser = verbs.add_parser(name, help=told, description=told, parents=[shared])
        made.set_defaults(run=run)
        return made

    verb("doctor", doctor)
    arguments.for_methods(verb("methods", methods))
    arguments.for_train(verb("train", train))
    arguments.for_eval(verb("eval", evaluate))
    arguments.for_merge(verb("merge", merge))
    arguments.for_export(verb("export", export))
    arguments.for_calibrate(verb("calibrate", calibrated))
    arguments.for_verify(verb("verify", verify))
    arguments.for_bench(verb("bench", bench))
    arguments.for_storage(verb("storage", storage))
    verb("inspect", inspect).add_argument("file", help="TASK.pet or an exported folder")
    arguments.for_pretrain(verb("pretrain", pretrain))
    arguments.for_import_peft(verb("import-peft", import_peft))
    arguments.for_export_peft(verb("export-peft", export_peft))
    verb("demo", demo).add_argument("--dir", default="demo", help="where everything goes (default: %(default)s)")
    return parser


def _progress(options: Options) -> Any:
    from edgepet.reports.tables import Progress

    if options.verbose and not options.quiet:
        from edgepet.measuring.machine import environment

        here = environment()
        told = ", ".join(f"{name} {version}" for name, version in here.versions.items())
        sys.stderr.write(f"{told}; Python {here.python}; {here.cpu}, {here.cores} cores\n")
    return Progress(quiet=options.quiet)


if __name__ == "__main__":
    sys.exit(main())
