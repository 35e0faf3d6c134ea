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
from edgepet.errors import EdgepetError, InputError

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
    from edgepet.report import terminal, to_json

    if options.json:
        sys.stdout.write(json.dumps(to_json(result.report), ensure_ascii=False, allow_nan=False) + "\n")
    elif not options.quiet:
        result.show(terminal(stderr=False), result.report)
    sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------------- verbs


def doctor(options: Options) -> Result:
    """what is installed, what each missing runtime needs, CPU features"""
    from edgepet import machine, show

    del options
    return Result(show.Doctor.now(machine.environment(), machine.runtimes()), show.doctor)


def methods(options: Options) -> Result:
    """every method: paper, and its parameters and kilobytes on a backbone"""
    from edgepet import show
    from edgepet.methods import METHODS, Branching, configure
    from edgepet.methods.method import count

    backbone = None
    if options.backbone:
        from edgepet.backbones import load_backbone

        backbone = load_backbone(options.backbone, image_size=options.img_size)
    rows = []
    for name in METHODS:
        method = configure(name)
        params = count(method, backbone.layers, backbone.tensors) if backbone else None
        size = None if params is None else 2 * params
        foldable = not isinstance(method, Branching)
        row = show.MethodRow(name=name, paper=method.paper, foldable=foldable, trainable_params=params, fp16_bytes=size)
        rows.append(row)
    return Result(show.MethodList(methods=tuple(rows)), show.methods)


def train(options: Options) -> Result:
    """tune a method on images, fold it to updates, and write a pack"""
    from edgepet import show
    from edgepet.errors import require

    require("torch", extra="train", purpose="train")
    from edgepet.crew import crew
    from edgepet.training import train as run

    label = f"{options.method} on {options.data}"
    with _progress(options) as progress, progress.stages() as stage, progress.training(label) as say:
        report = run(
            Path(options.data),
            options.backbone,
            options.method,
            Path(options.output),
            settings=_settings(options.set),
            image_size=options.img_size,
            epochs=options.epochs,
            batch_size=options.batch_size,
            accumulate=options.accumulate,
            lr=options.lr,
            shots=options.shots,
            seed=options.seed,
            val_fraction=options.val_fraction,
            augment=_names(options.augment),
            precision=options.train_precision,
            device=options.device,
            codec=options.codec,
            resume=options.resume,
            checkpoint_s=options.checkpoint_every,
            say=say,
            stage=stage,
        )
    return Result(report, show.train, silent=not crew().leads)


def evaluate(options: Options) -> Result:
    """top-1 of a pack or an exported model"""
    from edgepet import show
    from edgepet.ondevice import evaluate as run

    with _progress(options) as progress, progress.stage(f"eval {options.model}"):
        report = run(
            Path(options.model), Path(options.data), split=options.split, runtime=options.runtime,
            backbone=options.backbone, threads=options.threads,
        )  # fmt: skip
    return Result(report, show.evaluate)


def merge(options: Options) -> Result:
    """write dense weights that plain timm loads strictly"""
    from edgepet import show
    from edgepet.deploy import merge as run

    with _progress(options) as progress, progress.stage(f"merge {options.pack}"):
        report = run(Path(options.pack), Path(options.output), backbone=options.backbone, data=_path(options.data))
    return Result(report, show.merge)


def export(options: Options) -> Result:
    """write models for ONNX Runtime, OpenVINO and TensorRT, each compared before it is kept"""
    from edgepet import show
    from edgepet.deploy import export as run
    from edgepet.deploy import parse_formats
    from edgepet.exporters.exporter import ExportOptions

    chosen = ExportOptions(
        to=parse_formats(options.to),
        precision=options.precision,
        sms=_sms(options.sm),
        simplify=options.simplify,
        calib=options.calib,
        external_data=options.external_data,
    )
    with _progress(options) as progress, progress.stages() as stage:
        report = run(
            [Path(pack) for pack in options.packs], Path(options.output), backbone=options.backbone,
            data=_path(options.data), options=chosen, stage=stage,
        )  # fmt: skip
    return Result(report, show.export)


def verify(options: Options) -> Result:
    """check an exported model's files, then the comparison again"""
    from edgepet import show
    from edgepet.deploy import verify as run

    with _progress(options) as progress, progress.stage(f"verify {options.folder}"):
        report = run(
            Path(options.folder), data=_path(options.data), pack=_path(options.pack), backbone=options.backbone
        )
    return Result(report, show.verify, failed=not report.ok)


def bench(options: Options) -> Result:
    """latency, all candidates in turn in every round"""
    from edgepet import show
    from edgepet.ondevice import bench as run

    with _progress(options) as progress, progress.bar("bench", options.rounds) as bar:
        report = run(
            [Path(model) for model in options.models],
            runtimes=_names(options.runtime) or None,
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
    from edgepet import show
    from edgepet.ondevice import storage as run

    with _progress(options) as progress, progress.stage("storage: run every task from one folder"):
        report = run([Path(pack) for pack in options.packs], store=_path(options.store), devices=options.devices)
    return Result(report, show.storage)


def inspect(options: Options) -> Result:
    """what a pack or an exported model says of itself"""
    from edgepet import show
    from edgepet.ondevice import inspect as run

    return Result(run(Path(options.file)), show.inspect)


def import_peft(options: Options) -> Result:
    """a PEFT adapter folder as a pack, compared with PEFT itself"""
    from edgepet import show
    from edgepet.interchange import import_peft as run

    with _progress(options) as progress, progress.stages() as stage:
        report = run(
            Path(options.folder), Path(options.output), backbone=options.backbone, image_size=options.img_size,
            labels=_labels(options.labels), data=_path(options.data), codec=options.codec, stage=stage,
        )  # fmt: skip
    return Result(report, show.peft)


def export_peft(options: Options) -> Result:
    """a pack as an adapter folder that PEFT loads on the timm model"""
    from edgepet import show
    from edgepet.interchange import export_peft as run

    with _progress(options) as progress, progress.stages() as stage:
        report = run(
            Path(options.pack), Path(options.output), backbone=options.backbone, data=_path(options.data), stage=stage
        )
    return Result(report, show.peft)


def demo(options: Options) -> Result:
    """the whole flow on real data, offline once installed"""
    from edgepet import show
    from edgepet.errors import require

    for package in ("torch", "timm", "onnx", "onnxscript"):
        require(package, extra="train,openvino,tensorrt-rtx,demo", purpose="demo")
    from edgepet.demo import demo as run

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
    _methods_options(verb("methods", methods))
    _train_options(verb("train", train))
    _eval_options(verb("eval", evaluate))
    _merge_options(verb("merge", merge))
    _export_options(verb("export", export))
    _verify_options(verb("verify", verify))
    _bench_options(verb("bench", bench))
    _storage_options(verb("storage", storage))
    verb("inspect", inspect).add_argument("file", help="TASK.pet or an exported folder")
    _import_peft_options(verb("import-peft", import_peft))
    _export_peft_options(verb("export-peft", export_peft))
    verb("demo", demo).add_argument("--dir", default="demo", help="where everything goes (default: %(default)s)")
    return parser


def _backbone_option(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    told = "a timm name, NAME@FILE, or demo:vit-small" + ("" if required else " (default: the one that the pack names)")
    parser.add_argument("--backbone", required=required, metavar="B", help=told)


def _methods_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", metavar="B", help="count parameters on it")
    parser.add_argument("--img-size", type=int, metavar="N")


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a folder with train/ and val/, or of class folders")
    _backbone_option(parser, required=True)
    parser.add_argument("--method", required=True, metavar="M", help="see `edgepet methods`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method: rank=8"
    )
    parser.add_argument(
        "--img-size", type=int, metavar="N", help="pixels of the square input (default: the backbone's)"
    )
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images of one step (%(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="go through a batch in N parts")
    parser.add_argument("--lr", type=float, metavar="X")
    parser.add_argument("--shots", type=int, metavar="K", help="train on K images of each class")
    parser.add_argument("--seed", type=_natural, default=0, metavar="N")
    parser.add_argument("--val-fraction", type=float, default=0.2, metavar="X")
    parser.add_argument("--augment", default="", metavar="flip,crop")
    parser.add_argument("--train-precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="what trains (default: a GPU where torch finds one)")
    parser.add_argument("--codec", default="fp16", choices=["fp16", "fp32"], help="precision of the pack")
    parser.add_argument("--resume", action="store_true", help="go on from TASK.checkpoint, if there is one")
    parser.add_argument(
        "--checkpoint-every", type=float, default=30.0, metavar="SECONDS", help="within an epoch (%(default)s)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="TASK.pet")


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="TASK.pet or an exported folder")
    parser.add_argument("data")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--runtime", choices=["torch", "onnxruntime", "openvino", "tensorrt"])
    parser.add_argument("--threads", type=int, metavar="N")
    _backbone_option(parser)


def _merge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="TASK.pet")
    _backbone_option(parser)
    parser.add_argument("--data", metavar="DIR", help="images to compare on (default: the work folder's)")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packs", nargs="+", metavar="TASK.pet")
    _backbone_option(parser)
    parser.add_argument("--to", default="onnx", metavar="onnx,openvino,tensorrt")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"])
    parser.add_argument("--calib", metavar="DIR", help="images on which fp16 measures ranges (default: as --data)")
    parser.add_argument(
        "--sm", default="86,89,120", metavar="86,89,120", help="compute capabilities of a TensorRT engine"
    )
    parser.add_argument("--simplify", action="store_true", help="through onnxsim, kept only if the answers stay")
    parser.add_argument("--external-data", action="store_true", help="ONNX weights in a file of their own")
    parser.add_argument("--data", metavar="DIR", help="images to compare on (default: the work folder's)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--data", metavar="DIR", help="images to compare on, against the merged pack")
    parser.add_argument("--pack", metavar="TASK.pet", help="with --data, if it is not beside the folder")
    _backbone_option(parser)


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="TASK.pet or an exported folder")
    parser.add_argument(
        "--runtime", default="", metavar="R[,R]", help="torch, onnxruntime, openvino (default: all here)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=200, metavar="N")
    parser.add_argument("--plain", action="store_true", help="time the backbone's own weights under the head too")
    _backbone_option(parser)


def _storage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packs", nargs="*", metavar="TASK.pet")
    parser.add_argument("--store", metavar="DIR", help="a device's folder")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="count a fleet")


def _import_peft_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what PeftModel.save_pretrained wrote")
    _backbone_option(parser, required=True)
    parser.add_argument("--img-size", type=int, metavar="N", help="pixels it was tuned at (default: the backbone's)")
    parser.add_argument("--labels", metavar="A,B,C", help="class names, or a file of one a line (default: 0,1,2 ...)")
    parser.add_argument("--data", metavar="DIR", help="images to compare on (default: seeded noise)")
    parser.add_argument("--codec", default="fp32", choices=["fp16", "fp32"], help="fp32 is exact, fp16 rounds")
    parser.add_argument("-o", "--output", required=True, metavar="TASK.pet")


def _export_peft_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="TASK.pet")
    _backbone_option(parser)
    parser.add_argument("--data", metavar="DIR", help="images to compare on (default: the work folder's)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")


def _progress(options: Options) -> Any:
    from edgepet.report import Progress

    if options.verbose and not options.quiet:
        from edgepet.machine import environment

        here = environment()
        told = ", ".join(f"{name} {version}" for name, version in here.versions.items())
        sys.stderr.write(f"{told}; Python {here.python}; {here.cpu}, {here.cores} cores\n")
    return Progress(quiet=options.quiet)


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError("--set", "needs NAME=VALUE", got=repr(pair))
        settings[key] = value
    return settings


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _labels(text: str | None) -> list[str] | None:
    if text is None or not Path(text).is_file():
        return None if text is None else _names(text)
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(text, "needs one class name a line, in UTF-8", got=error) from error
    return [line.strip() for line in lines if line.strip()]


def _sms(text: str) -> tuple[int, ...]:
    names = _names(text)
    if not names or not all(name.isdecimal() for name in names):
        raise InputError("--sm", "needs compute capabilities such as 86,89,120", got=repr(text))
    return tuple(int(name) for name in names)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 0, got {text!r}")
    return int(text)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


if __name__ == "__main__":
    sys.exit(main())
