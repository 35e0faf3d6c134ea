"""The options of a training, which ``train`` and ``pretrain`` have, by the fields of ``TrainOptions``."""

from __future__ import annotations

from edgepet.reports.logs import LOGS
from edgepet.tuning.options import BACKBONE_PRECISIONS, PRECISIONS, TASKS, TrainOptions
from edgepet.tuning.recipes import AUGMENTATIONS, BALANCES
from edgepet.verbs.verb import (
    Options,
    Parser,
    backbone_option,
    image_size_option,
    names,
    natural,
    pairs,
    path,
    size_bytes,
)

DEFAULTS = TrainOptions()


def training_options(parser: Parser) -> None:
    """Declare all of them."""
    own = DEFAULTS
    add = parser.add_argument
    add("data", metavar="DATA", help="a folder with train/ and val/, of class folders, or of images and masks")
    backbone_option(parser, required=True)
    add("--method", required=True, metavar="M", help="what is tuned: `edgepet methods` lists all")
    told = (
        "a setting of the method, as often as needed: --set rank=8, --set blocks=6-11 for these blocks only (default:"
        " the paper's for a ViT, on all blocks)"
    )
    add("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help=told)
    image_size_option(parser, "pixels of a square input, or HEIGHTxWIDTH (default: the backbone's)")
    _task_options(parser)
    told = "frames to take of each clip: classes then hold a folder of frames each (default: %(default)s, images)"
    add("--frames", type=int, default=own.frames, metavar="N", help=told)
    add("--epochs", type=int, metavar="N", help="times that every image is seen (default: the method's)")
    add("--batch-size", type=int, default=own.batch_size, metavar="N", help="images of one step (default: %(default)s)")
    told = "go through a batch in N parts, for less memory (default: on a CPU as few as keep 600 MB each, on a GPU 1)"
    add("--accumulate", type=int, metavar="N", help=told)
    add("--lr", type=float, metavar="X", help="largest learning rate of the method's tensors (default: the method's)")
    add("--shots", type=int, metavar="K", help="train on K images of each class (default: all)")
    told = "of every random choice: equal seeds give equal packs (default: %(default)s)"
    add("--seed", type=natural, default=own.seed, metavar="N", help=told)
    told = "part of each class held out where DATA has no val/ (default: %(default)s)"
    add("--val-fraction", type=float, default=own.val_fraction, metavar="X", help=told)
    _recipe_options(parser)
    told = "what the training computes in; auto measures whether bf16 is faster here (default: %(default)s)"
    add("--train-precision", dest="precision", default=own.precision, choices=PRECISIONS, help=told)
    told = "round the backbone while tuning, so that the delta repairs that too (default: %(default)s)"
    add("--backbone-precision", default=own.backbone_precision, choices=BACKBONE_PRECISIONS, help=told)
    add("--device", choices=["cpu", "cuda"], help="what trains (default: a GPU where torch finds one)")
    told = "start from the tensors of pretrain's WORK, or of a TASK.pet (default: the method's own start)"
    add("--init", metavar="WORK", help=told)
    add("--resume", action="store_true", help="go on from TASK.checkpoint, if there is one (default: begin)")
    told = "seconds between two checkpoints within an epoch (default: %(default)s)"
    add("--checkpoint-every", dest="checkpoint_s", type=float, default=own.checkpoint_s, metavar="SECONDS", help=told)
    told = (
        "of decoded images, 4GB say; more lie in TASK.pixels until the pack is there (default: half of what is free, at"
        " most 2GB)"
    )
    add("--memory", type=size_bytes, metavar="SIZE", help=told)
    told = f"write every step to {', '.join(LOGS)}, with a comma between (default: none)"
    add("--log", type=names, default=own.log, metavar=",".join(LOGS), help=told)
    add("--log-dir", metavar="DIR", help="the folder that logs go to (default: logs beside the output)")


def _task_options(parser: Parser) -> None:
    own, add = DEFAULTS, parser.add_argument
    told = (
        f"{', '.join(TASKS)}: class folders, or images with masks, boxes or several labels; several of the last three,"
        " with a comma between, are heads of one network (default: what lies in DATA)"
    )
    add("--task", metavar="TASK,...", help=told)
    told = "of several heads: what each one's loss counts, as boxes=1,mask=0.5 (default: 1)"
    add("--task-weights", metavar="TASK=X,...", help=told)
    told = (
        "of masks: mlp or linear, with settings as mlp,width=32,maps=0/1/2,depthwise=true,norm=false,separation=true;"
        " maps are the"
        " backbone's, 0 the finest (default: mlp); of boxes: fcos, as fcos,width=64,depth=2; of labels: pooled;"
        " + is between the heads of several"
    )
    add("--head", default=own.head, metavar="H", help=told)
    told = (
        "a vector for each class, as `edgepet text` makes one, for heads that read text: score, with settings as"
        " score,mlp=true,context=1, mlp,language=1 and fcos,scores=true (default: none)"
    )
    add("--text", metavar="TABLE", help=told)
    told = "of masks: what Dice's loss counts beside cross entropy (default: %(default)s)"
    add("--dice", type=float, default=own.dice, metavar="X", help=told)


def _recipe_options(parser: Parser) -> None:
    own, add = DEFAULTS, parser.add_argument
    told = (
        f"{', '.join(AUGMENTATIONS)}, with a comma between; also with strengths, as rand-m9-mstd0.5, augmix-m3,"
        " erasing-p0.25, mixup-a0.8 or cutmix-a1 (default: none)"
    )
    add("--augment", type=names, default=own.augment, metavar="NAME,...", help=told)
    told = "an optimiser of timm's, with settings as sgd,momentum=0.95,nesterov=true (default: %(default)s)"
    add("--optimizer", default=own.optimizer, metavar="NAME", help=told)
    told = "a schedule of timm's, with settings as step,decay_epochs=5,decay_rate=0.5 (default: %(default)s)"
    add("--schedule", default=own.schedule, metavar="NAME", help=told)
    add("--head-lr", type=float, metavar="X", help="largest learning rate of the head (default: the method's)")
    add("--weight-decay", type=float, metavar="X", help="of the optimiser (default: the method's)")
    told = "where classes are uneven: weigh their losses, or draw images of all alike often (default: neither)"
    add("--balance", choices=BALANCES, help=told)
    told = (
        "PACE: full, or full,sigma=1.2,weight=1: two passes under noise that shall agree; or cheap,sigma=X,weight=X:"
        " one pass that shall agree with the epoch before (default: none)"
    )
    add("--consistency", metavar="FORM,...", help=told)
    add("--patience", type=int, metavar="N", help="end after N epochs without a better one (default: never)")


def asked_options(options: Options) -> TrainOptions:
    """The ``TrainOptions`` that a command line asks for.

    Raises:
        InputError: a setting without a value.
    """
    given = {name: getattr(options, name) for name in TrainOptions.__dataclass_fields__}
    paths = {"init": path(options.init), "text": path(options.text), "log_dir": path(options.log_dir)}
    return TrainOptions(**{**given, "settings": pairs(options.settings), **paths})
