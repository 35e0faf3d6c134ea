"""``import-peft`` and ``export-peft``. The real PEFT runs each folder beside the pack, or the verb fails."""

from __future__ import annotations

import codecs
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from edgepet.deltas.delta import Delta, Head, Score
from edgepet.deltas.merge import fold_all, require_foldable
from edgepet.errors import CheckError, InputError, require
from edgepet.files import folder_bytes, made_cache, new_folder, read_file, require_only, require_place
from edgepet.measuring.parity import STORED, Inputs
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.codecs import Rounding
from edgepet.packs.pack import encode_pack, read_pack, write_pack
from edgepet.peft.adapter import CONFIG, WEIGHTS, read_adapter
from edgepet.peft.naming import Naming, naming_of
from edgepet.peft.reading import Lowered, lower
from edgepet.peft.writing import unlower, write_adapter
from edgepet.proving.probing import probed
from edgepet.proving.subject import Subject, sample_images, synthetic_images
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import format_bytes
from edgepet.spec import FilePath, ImageSize, NpArray, Tensors
from edgepet.verbs.verb import (
    Options,
    Parser,
    Verb,
    backbone_option,
    data_option,
    image_size_option,
    names,
    output_option,
    path,
    require_pack_place,
    require_task_name,
)

if TYPE_CHECKING:
    from torch import nn

    from edgepet.networks.backbone import Backbone
    from edgepet.reports.progress import Progress

EXACT = 1e-5  # of the largest logit: both in float64, after factors were stored in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftReport:
    """What was written. ``max_abs_diff`` is on logits in float64, between PEFT's network and the merged pack."""

    path: Path
    bytes: int
    task: str
    method: str
    classes: int
    max_abs_diff: float
    limit: float
    n: int
    inputs: Inputs
    peft: str


def import_peft(
    folder: FilePath,
    output: FilePath,
    *,
    backbone: str | Backbone,
    image_size: ImageSize | None = None,
    labels: Sequence[str] | None = None,
    data: FilePath | None = None,
    codec: Rounding = "fp32",
    stage: Callable[[str], None] = lambda name: None,
) -> PeftReport:
    """Write the pack ``output`` (``TASK.pet``) of a PEFT adapter folder that was tuned on a timm model.

    Args:
        backbone: what the adapter was tuned on, as ``train`` takes it.
        labels: the classes' names in order; None is "0", "1" and so on, for PEFT keeps none.
        data: images to compare on; None is seeded noise.
        codec: "fp32" keeps the adapter's values; "fp16" rounds them and is compared a second time.

    Raises:
        InputError: the folder asks for something that does not fold, or does not fit the backbone.
        CheckError: the merged network answers otherwise than PEFT's.
        MissingError: peft, torch or timm is not installed.
    """
    folder, output = Path(folder), Path(output)
    require_task_name(output)
    require_pack_place(output)
    made_cache()
    _require("import-peft")
    from edgepet.exporters.trace import keep_weights
    from edgepet.networks.loading import load_backbone

    adapter = read_adapter(folder)
    stage("load the backbone")
    loaded = load_backbone(backbone, image_size=image_size) if isinstance(backbone, str) else backbone
    _require_timm(loaded)
    if loaded.classifier_norms:
        what = "has a batch norm in front of its classifier, of which PEFT keeps no values"
        raise InputError(loaded.label, what, got=", ".join(loaded.classifier_norms), fix="train it with edgepet")
    naming = naming_of(adapter, loaded.tensors, loaded.layers, loaded.classifier_layers)
    lowered = naming.moved(lower(adapter, naming.tensors, naming.layers, naming.classifiers))
    _require_width(lowered.head, loaded, f"{folder}: {naming.classifiers[0]}")
    made_with = f"peft {adapter.config.get('peft_version') or ''}".strip()
    delta = _delta(output.stem, loaded, lowered, labels, made_with)
    images, inputs = _images(loaded, data)
    stage("compare with PEFT")
    expected = peft_logits(loaded, len(delta.labels), folder, images, naming)
    for stored in dict.fromkeys(("fp32", codec)):  # rounding must not hide a fault of the lowering
        packed = read_pack(encode_pack(delta, codec=stored)).delta
        worst = _compare(expected, merged_logits(loaded, packed, images), stored, str(folder))
    write_pack(output, replace(delta, probes=probed(loaded, packed).probes), codec=codec)
    keep_weights(loaded)
    return _report(output, output.stat().st_size, delta, worst, len(images), inputs)


def export_peft(
    pack: FilePath,
    folder: FilePath,
    *,
    backbone: AnyBackbone = None,
    data: FilePath | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> PeftReport:
    """Write a pack as a PEFT adapter folder that ``PeftModel.from_pretrained(timm_model, folder)`` reads.

    Args:
        data: images to compare on; None is the work folder's, or seeded noise.

    Raises:
        InputError: PEFT has no adapter that does what the pack's updates do.
        CheckError: PEFT's network answers otherwise than the merged pack.
        MissingError: peft, torch or timm is not installed.
    """
    _require("export-peft")
    subject, folder = Subject(pack, backbone, data), Path(folder)
    delta = subject.delta
    require_foldable(delta)
    require_only(folder, (CONFIG, WEIGHTS))
    require_place(folder, makes_parents=True)
    stage("load the backbone")
    loaded = subject.backbone
    _require_timm(loaded)
    head = loaded.named_weights({}, delta.head)
    where, numbered = subject.path.name, _finds_blocks_at_the_root()
    adapter = unlower(delta.updates, loaded.tensors, loaded.layers, head, where=where, numbered=numbered)
    images, inputs = subject.images
    with new_folder(folder, only=(CONFIG, WEIGHTS)) as scratch:
        write_adapter(scratch, adapter)
        stage("compare with PEFT")
        got = peft_logits(loaded, len(delta.labels), scratch, images)
        worst = _compare(merged_logits(loaded, delta, images), got, "fp32", str(folder))
    return _report(folder, folder_bytes(folder), delta, worst, len(images), inputs)


def _delta(task: str, backbone: Backbone, lowered: Lowered, labels: Sequence[str] | None, made_with: str) -> Delta:
    names = labels if labels is not None else [str(number) for number in range(len(lowered.head.bias))]
    return Delta(
        task=task,
        backbone=backbone.label,
        fingerprint=backbone.fingerprint,
        updates=lowered.updates,
        head=lowered.head,
        labels=tuple(names),
        preprocess=backbone.preprocess,
        method=lowered.method,
        settings=lowered.settings,
        training={"imported_from": made_with},
        val=Score(top1=0.0, n=0),
        licences=(backbone.licence,),
    )


def peft_logits(
    backbone: Backbone, classes: int, folder: Path, images: NpArray, naming: Naming | None = None
) -> NpArray:
    """Logits (n, C) in float64 of timm's network with the adapter in ``folder``, as PEFT runs it unmerged.

    ``naming`` is what the adapter calls the layers, None where by timm's names. A ``task_type`` of the configuration is
    not looked at: for PEFT it says which other arguments a language model takes.

    Raises:
        InputError: PEFT cannot load it, or misses a tensor.
    """
    peft = require("peft", extra="peft", purpose="comparing with PEFT")
    blank = Head(weight=np.zeros((classes, backbone.width), np.float32), bias=np.zeros(classes, np.float32))
    network = _network(backbone, backbone.tensors, blank).float()
    if naming is not None:
        from edgepet.peft.renamed import renamed

        network = renamed(network, naming)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            given = peft.PeftConfig.from_json_file(str(folder / CONFIG)) | {"task_type": None}
            config = peft.PeftConfig.from_peft_type(**given)
            model = peft.PeftModel.from_pretrained(network, str(folder), config=config)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise InputError(str(folder), f"cannot be loaded by PEFT on {backbone.label}", got=got) from error
    missing = [str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)]
    if missing:
        raise InputError(str(folder), "lacks tensors that its configuration speaks of", got=missing[0][:200])
    return _logits(model, images)


def merged_logits(backbone: Backbone, delta: Delta, images: NpArray) -> NpArray:
    """Logits (n, C) in float64 of timm's network with ``delta`` folded in."""
    double = {name: tensor.astype(np.float64) if tensor.dtype.kind == "f" else tensor
              for name, tensor in backbone.tensors.items()}  # fmt: skip
    return _logits(_network(backbone, fold_all(double, delta.updates), delta.head), images)


def _network(backbone: Backbone, tensors: Tensors, head: Head) -> nn.Module:
    """timm's own network in float64 with these weights."""
    import torch

    network = backbone.with_head(head).double()
    weights = backbone.named_weights(tensors, head)
    network.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in weights.items()})
    return network


def _logits(network: nn.Module, images: NpArray) -> NpArray:
    import torch

    network.eval().double()
    with torch.no_grad():
        parts = [network(batch) for batch in torch.split(torch.from_numpy(images).double(), 32)]
    logits: NpArray = torch.cat(parts).numpy()
    return logits


def _compare(expected: NpArray, got: NpArray, stored: Rounding, where: str) -> tuple[float, float]:
    """The largest difference and its limit."""
    difference = float(np.abs(expected - got).max())
    limit = float(np.abs(expected).max()) * (EXACT if stored == "fp32" else cast(float, STORED[stored].relative))
    if not difference <= limit:
        raise CheckError(
            where,
            f"PEFT's network and the merged pack must agree within {limit:.1e} on logits",
            got=f"{difference:.1e}",
            fix="nothing was kept; is it the backbone, and the image size, that it was tuned on?",
        )
    return difference, limit


def _images(backbone: Backbone, data: FilePath | None) -> tuple[NpArray, Inputs]:
    if data is not None:
        return sample_images(Path(data), backbone.preprocess), "data"
    return synthetic_images(backbone.preprocess), "synthetic"


def _finds_blocks_at_the_root() -> bool:
    """Whether this PEFT finds blocks by their numbers in a list that is the network's own, as timm's ``blocks`` is."""
    peft = require("peft", extra="peft", purpose="export-peft")
    config = peft.LoraConfig(target_modules=["fc1"], layers_to_transform=[0], layers_pattern=["blocks"])
    return bool(peft.tuners.tuners_utils.check_target_module_exists(config, "blocks.0.mlp.fc1"))


def _require(verb: str) -> None:
    require("torch", extra="train", purpose=verb)
    require("peft", extra="peft", purpose=verb)


def _require_width(head: Head, backbone: Backbone, where: str) -> None:
    if head.weight.shape[1] != backbone.width:
        what = f"must be a classifier of the backbone's {backbone.width} features"
        fix = "tune timm's model, or pass the backbone that it was tuned on"
        raise InputError(where, what, got=f"one of {head.weight.shape[1]}", fix=fix)


def _require_timm(backbone: Backbone) -> None:
    if backbone.label.startswith("module:"):
        raise InputError(backbone.label, "is a module of its user's own", fix="PEFT folders need a timm model")


def _report(path: Path, size: int, delta: Delta, worst: tuple[float, float], n: int, inputs: Inputs) -> PeftReport:
    return PeftReport(
        path=path,
        bytes=size,
        task=delta.task,
        method=delta.method,
        classes=len(delta.labels),
        max_abs_diff=worst[0],
        limit=worst[1],
        n=n,
        inputs=inputs,
        peft=version("peft"),
    )


# -------------------------------------------------------------------------------------------------- the command line


def _import_options(parser: Parser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help="what PeftModel.save_pretrained wrote")
    backbone_option(parser, required=True)
    image_size_option(parser, "pixels of the square it was tuned at, or HEIGHTxWIDTH (default: the backbone's)")
    told = "class names, or a file of one a line (default: 0,1,2 ...)"
    add("--labels", metavar="A,B,C", help=told)
    data_option(parser, "seeded noise")
    told = "what the pack stores: fp32 is exact, fp16 rounds (default: %(default)s)"
    add("--codec", default="fp32", choices=["fp16", "fp32"], help=told)
    output_option(parser, "TASK.pet", "the pack to write")


def _import(options: Options, progress: Progress) -> PeftReport:
    with progress.stages() as stage:
        return import_peft(
            Path(options.folder), Path(options.output), backbone=options.backbone, image_size=options.image_size,
            labels=_labels(options.labels), data=path(options.data), codec=options.codec, stage=stage,
        )  # fmt: skip


_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # Windows calls it Unicode; else it is UTF-8


def _labels(text: str | None) -> list[str] | None:
    """Names between commas, or the lines of a file; a byte order mark is no part of a name.

    Raises:
        InputError: the file cannot be read, or is neither UTF-8 nor, by its mark, UTF-16.
    """
    if text is None or not os.path.isfile(text):  # noqa: PTH113  ``Path.is_file`` raises on a long list of names
        return None if text is None else names(text)
    data = read_file(Path(text))
    try:
        told = data.decode(_MARKS.get(data[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(text, "needs one class name a line, in UTF-8", got=error) from error
    return [line.strip() for line in re.split(r"[\r\n]+", told) if line.strip()]


def _export_options(parser: Parser) -> None:
    parser.add_argument("pack", metavar="TASK.pet", help="a task of a method that PEFT has")
    backbone_option(parser)
    data_option(parser)
    output_option(parser, "DIR", "the adapter folder to write")


def _export(options: Options, progress: Progress) -> PeftReport:
    with progress.stages() as stage:
        return export_peft(
            Path(options.pack), Path(options.output), backbone=options.backbone, data=path(options.data), stage=stage
        )


def _screen(report: PeftReport) -> Screen:
    yield lines(
        f"{report.path}  {format_bytes(report.bytes)}",
        f"  {report.method}, {report.classes} classes",
        f"  {report.max_abs_diff:.1e} from PEFT {report.peft} on {report.n} images ({report.inputs}),"
        f" limit {report.limit:.1e}",
    )


IMPORT_PEFT = Verb(options=_import_options, run=_import, screen=_screen)
EXPORT_PEFT = Verb(options=_export_options, run=_export, screen=_screen)
