"""The options of every verb, and how the texts that people type become values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from edgepet.errors import InputError


def _backbone_option(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    told = "a timm name, NAME@FILE, or demo:vit-small" + ("" if required else " (default: the one that the pack names)")
    parser.add_argument("--backbone", required=required, metavar="B", help=told)


def for_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", metavar="B", help="count parameters on it")
    parser.add_argument("--img-size", type=int, metavar="N")


def for_train(parser: argparse.ArgumentParser) -> None:
    _training_options(parser)
    parser.add_argument("--codec", default="fp16", choices=["fp16", "fp32"], help="precision of the pack")
    parser.add_argument("-o", "--output", required=True, metavar="TASK.pet")


def for_pretrain(parser: argparse.ArgumentParser) -> None:
    _training_options(parser)
    parser.add_argument("-o", "--output", required=True, metavar="NAME.work")


def _training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a folder with train/ and val/, or of class folders")
    _backbone_option(parser, required=True)
    parser.add_argument("--method", required=True, metavar="M", help="see `edgepet methods`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method: rank=8"
    )
    parser.add_argument(
        "--img-size", type=int, metavar="N", help="pixels of the square input (default: the backbone's)"
    )
    parser.add_argument("--frames", type=int, default=1, metavar="N", help="of clips: DATA's classes hold folders")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images of one step (%(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="go through a batch in N parts")
    parser.add_argument("--lr", type=float, metavar="X")
    parser.add_argument("--shots", type=int, metavar="K", help="train on K images of each class")
    parser.add_argument("--seed", type=_natural, default=0, metavar="N")
    parser.add_argument("--val-fraction", type=float, default=0.2, metavar="X")
    parser.add_argument("--augment", default="", metavar="flip,crop")
    parser.add_argument("--train-precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument(
        "--backbone-precision", default="fp32", choices=["fp32", "int8", "int4"],
        help="round the backbone while tuning, so that the delta repairs that too (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="what trains (default: a GPU where torch finds one)")
    parser.add_argument("--init", metavar="WORK", help="start from the tensors of pretrain's WORK, or of a TASK.pet")
    parser.add_argument("--resume", action="store_true", help="go on from TASK.checkpoint, if there is one")
    parser.add_argument(
        "--checkpoint-every", type=float, default=30.0, metavar="SECONDS", help="within an epoch (%(default)s)"
    )


def for_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="TASK.pet or an exported folder")
    parser.add_argument("data")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--runtime", choices=["torch", "onnxruntime", "openvino", "tensorrt"])
    _pack_precision(parser)
    parser.add_argument("--threads", type=int, metavar="N")
    _backbone_option(parser)


def for_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="TASK.pet")
    _backbone_option(parser)
    parser.add_argument("--data", metavar="DIR", help="images to compare on (default: the work folder's)")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")


def for_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packs", nargs="+", metavar="TASK.pet")
    _backbone_option(parser)
    parser.add_argument("--to", default="onnx", metavar="onnx,openvino,tensorrt")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "int8", "auto"])
    parser.add_argument(
        "--calib", metavar="DIR", help="labelled images: int8 measures ranges on them (fp16's default: as --data)"
    )
    _budget_options(parser)
    parser.add_argument(
        "--sm", default="86,89,120", metavar="86,89,120", help="compute capabilities of a TensorRT engine"
    )
    parser.add_argument("--simplify", action="store_true", help="through onnxsim, kept only if the answers stay")
    parser.add_argument("--external-data", action="store_true", help="ONNX weights in a file of their own")
    parser.add_argument("--data", metavar="DIR", help="images to compare on (default: the work folder's)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")


def for_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="TASK.pet")
    _backbone_option(parser)
    parser.add_argument("--calib", required=True, metavar="DIR", help="labelled images of the task, as for train")
    _budget_options(parser)
    parser.add_argument("--data", metavar="DIR", help="where the test images are that must not be calibrated on")
    told = "calibrate on the int8 backbone that tasks share, and write the pack with its ranges"
    parser.add_argument("-o", "--output", metavar="OUT.pet", help=told)


def _budget_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calib-images", type=_natural, default=256, metavar="N", help="of --calib, at most (%(default)s)"
    )
    parser.add_argument("--max-drop", type=float, metavar="POINTS", help="of top-1 that int8 may lose on train and val")


def for_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--data", metavar="DIR", help="images to compare on, against the merged pack")
    parser.add_argument("--pack", metavar="TASK.pet", help="with --data, if it is not beside the folder")
    _backbone_option(parser)


def for_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="TASK.pet or an exported folder")
    parser.add_argument(
        "--runtime", default="", metavar="R[,R]", help="torch, onnxruntime, openvino (default: all here)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=200, metavar="N")
    parser.add_argument("--plain", action="store_true", help="time the backbone's own weights under the head too")
    _backbone_option(parser)


def for_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packs", nargs="*", metavar="TASK.pet")
    parser.add_argument("--store", metavar="DIR", help="a device's folder")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="count a fleet")
    _pack_precision(parser)


def _pack_precision(parser: argparse.ArgumentParser) -> None:
    told = "of packs: int8 is on the int8 backbone that tasks share (default: %(default)s)"
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int8"], help=told)


def for_import_peft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what PeftModel.save_pretrained wrote")
    _backbone_option(parser, required=True)
    parser.add_argument("--img-size", type=int, metavar="N", help="pixels it was tuned at (default: the backbone's)")
    parser.add_argument("--labels", metavar="A,B,C", help="class names, or a file of one a line (default: 0,1,2 ...)")
    parser.add_argument("--data", metavar="DIR", help="images to compare on (default: seeded noise)")
    parser.add_argument("--codec", default="fp32", choices=["fp16", "fp32"], help="fp32 is exact, fp16 rounds")
    parser.add_argument("-o", "--output", required=True, metavar="TASK.pet")


def for_export_peft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="TASK.pet")
    _backbone_option(parser)
    parser.add_argument("--data", metavar="DIR", help="images to compare on (default: the work folder's)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")


# ------------------------------------------------------------------------------------------------------------ texts


def settings(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError("--set", "needs NAME=VALUE", got=repr(pair))
        found[key] = value
    return found


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def labels(text: str | None) -> list[str] | None:
    if text is None or not Path(text).is_file():
        return None if text is None else names(text)
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(text, "needs one class name a line, in UTF-8", got=error) from error
    return [line.strip() for line in lines if line.strip()]


def sms(text: str) -> tuple[int, ...]:
    found = names(text)
    if not found or not all(name.isdecimal() for name in found):
        raise InputError("--sm", "needs compute capabilities such as 86,89,120", got=repr(text))
    return tuple(int(name) for name in found)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 0, got {text!r}")
    return int(text)


def path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
