"""What packs cost: bytes and accuracy in each codec, and milliseconds of reading and folding.

    python benchmarks/packs.py --dir DIR                 # both tables; hours of training on 2 cores
    python benchmarks/packs.py --dir DIR --only codecs   # bytes and points of top-1 in each codec, on four tasks
    python benchmarks/packs.py --only reading            # a minute, on a machine that does nothing else

The trainings are jobs below DIR, the same as those of ``trials.py``; recoding one is a job as well, and what has a row
in the table's file already is not made again. Points are paired: of the same images, by the pack as it was trained and
as it is coded. Milliseconds are of NumPy alone, and beside a plain copy of the same weights in the same run.
Writes ``packs-codecs.json`` and ``packs-reading.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import IMAGE_SIZES, Asked, asked, source, write_result
from judging import logits_on_device, tested_images
from rows import Rows, rows_parser
from trainings import FEW, Trained, Training, finished, images_of, measuring_job, pack_of

from edgepet.reports.tables import Column, Table, format_bytes, format_percent, markdown
from edgepet.spec import NpArray, Tensors

if TYPE_CHECKING:
    from edgepet.deltas.delta import Delta
    from edgepet.networks.backbone import Backbone

VIT = "vit-small"
TASKS = ("landcover", "digits", "cards", "fashion")
METHODS = ("linear-probe", "ssf", "lora", "consolidator", "fact-tt", "fact-tk", "bi-lora", "uni-lora", "full")
TINY: dict[str, dict[str, Any]] = {"fact-tt": {"rank": 4}, "bi-lora": {"rank": 1}}  # for ten kilobytes
CODED = ("int8", "int4", "int2")  # a pack is trained in fp16
# On how many test images codecs are judged, and what points on val auto may lose.
JUDGING: dict[str, Any] = {"codecs": list(CODED), "images": 1000, "images_ssf": 2000, "max_drop": 0.5}
ROUNDS = 31
NETWORKS = ("vit_small_patch16_224", "vit_base_patch16_224")
FOLDED = ("ssf", "lora", "fact-tt", "fact-tk", "consolidator", "rlrr", "hta", "vera", "uni-lora")


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = rows_parser(__doc__, TASKS)
    made.add_argument("--only", choices=("codecs", "reading"), help="one table")
    return made


def main() -> None:
    """Make what is asked for; the table of codecs a row at a time."""
    options = parser().parse_args()
    run = asked(options)
    if options.only in (None, "reading"):
        write_result(run, "packs-reading", reading(1 if run.quick else ROUNDS))
    if options.only in (None, "codecs"):
        codecs(run, options.task, options.most)


# --------------------------------------------------------------------------------------------------------------- codecs


def trainings() -> Iterator[Training]:
    """Every method on every task, and the smallest forms of some."""
    for task in TASKS:
        for method in METHODS:
            each = Training(task=task, backbone=VIT, method=method, image_size=IMAGE_SIZES[VIT], scored=True)
            yield each
            if method in TINY:
                yield replace(each, settings=TINY[method])


def codecs(run: Asked, task: str | None, most: int | None) -> None:
    """A row for each training, of one task or all, with what it is and loses in each codec."""
    every, judging = list(trainings()), dict(JUDGING)
    if run.quick:
        every, judging = [replace(every[1], task="digits", epochs=1, shots=2, few=FEW)], judging | {"max_drop": 99}
    rows = Rows(run, "packs-codecs", every, judging, task=None if run.quick else task)
    rows.fill(partial(coded, run, judging), most)


def coded(run: Asked, judging: Mapping[str, Any], made: Trained) -> dict[str, object]:
    """One training, in each codec."""
    training, report = made.training, made.result.report
    images = judging["images_ssf"] if training.method == "ssf" else judging["images"]
    asked = {"codecs": judging["codecs"], "max_drop": judging["max_drop"], "images": images}
    (found,) = finished(run, [measuring_job("packs:recode", made, method=training.method, **asked)])
    return {
        "task": training.task,
        "method": training.method,
        "settings": dict(training.settings),
        "stored_values": report["stored_values"],
        "test_top1": report["test_top1"],
        "test_n": report["test_n"],
        **found.report,
    }


def recode(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """A pack in each codec: its bytes, and what of the test split it loses; and as a PEFT adapter, if it can be one."""
    from edgepet import pack, read_pack
    from edgepet.calibration.budget import drop_between
    from edgepet.errors import EdgepetError
    from edgepet.networks.loading import load_backbone
    from edgepet.packs.pack import encode_pack
    from edgepet.reports.as_json import to_json

    source_pack, data = pack_of(specification, folder), images_of(specification, folder)
    delta = read_pack(source_pack).delta
    backbone = load_backbone(delta.backbone, image_size=delta.preprocess.image_size)
    images, labels = tested_images(delta, data, specification["images"])
    before = logits_on_device(backbone, delta, images)
    found: dict[str, object] = {"bytes_trained": source_pack.stat().st_size}
    for codec in (*specification["codecs"], "auto"):
        budget = {"data": data, "max_drop": specification["max_drop"]} if codec == "auto" else {}
        output = folder / f"{codec}.pet"
        try:
            report = pack(source_pack, output, codec=codec, backbone=backbone, **budget)
        except EdgepetError as refusal:
            found[codec] = {"refused": str(refusal).partition("\n")[0]}
            continue
        after = logits_on_device(backbone, read_pack(output).delta, images)
        found[codec] = {
            "bytes": report.bytes,
            "planes": {each.name: each.format for each in report.planes},
            "drop": to_json(drop_between(before, after, labels)),
        }
    if specification["method"] == "full":
        signs = encode_pack(signed(delta, backbone.tensors), codec="fp16")
        after = logits_on_device(backbone, read_pack(signs).delta, images)
        found["signs"] = {"bytes": len(signs), "drop": to_json(drop_between(before, after, labels))}
    return found | _as_peft(source_pack, backbone)


def signed(delta: Delta, weights: Tensors) -> Delta:
    """Full fine-tuning as the sign of each change of a matrix times a scale of its row, the mean change there.

    That scale is the nearest in squares (Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279, section 3.1).
    """
    from edgepet.deltas.expressions import Binary, Scaled
    from edgepet.deltas.updates import Add, Replace, Targeted

    def of(each: Targeted) -> Targeted:
        if not isinstance(each.update, Replace) or each.update.value.ndim != 2:
            return each
        change = each.update.value.astype(np.float32) - weights[each.target.tensor]
        signs = Binary(bits=change > 0, levels=np.array([-1, 1], np.float32))
        return Targeted(each.target, Add(Scaled(c=np.abs(change).mean(axis=1), base=signs)))

    return replace(delta, updates=tuple(map(of, delta.updates)))


def _as_peft(source_pack: Path, backbone: Any) -> dict[str, object]:
    """Bytes of the same task as a PEFT folder's safetensors, and of those under zstd at level 19."""
    import zstandard

    from edgepet import export_peft
    from edgepet.errors import EdgepetError

    with tempfile.TemporaryDirectory() as place:
        try:
            export_peft(source_pack, Path(place) / "adapter", backbone=backbone)
        except EdgepetError:
            return {}
        data = (Path(place) / "adapter" / "adapter_model.safetensors").read_bytes()
    return {"peft_bytes": len(data), "peft_zstd19_bytes": len(zstandard.ZstdCompressor(level=19).compress(data))}


# -------------------------------------------------------------------------------------------------------------- reading


def reading(rounds: int) -> dict[str, object]:
    """Milliseconds of reading a pack, of folding it, and of copying the weights that it is folded into."""
    from edgepet.deltas.merge import fold_all
    from edgepet.packs.pack import read_pack

    rows = list[dict[str, object]]()
    for name in NETWORKS:
        backbone = seeded(name)
        for method in FOLDED:
            data = drawn_pack(backbone, method)
            delta = read_pack(data).delta
            calls: dict[str, Callable[[], object]] = {
                "read": partial(read_pack, data),
                "fold": partial(fold_all, backbone.tensors, delta.updates),
                "copy": partial(copied, backbone.tensors),
            }
            medians = {key: 1e3 * float(np.median(found)) for key, found in in_turns(calls, rounds).items()}
            rows.append(
                {
                    "backbone": name,
                    "method": method,
                    "pack_bytes": len(data),
                    "updates": len(delta.updates),
                    **{f"{key}_ms": value for key, value in medians.items()},
                    "read_over_copy": medians["read"] / medians["copy"],
                    "fold_over_copy": medians["fold"] / medians["copy"],
                }
            )
    return {"rounds": rounds, "rows": rows}


def copied(tensors: Mapping[str, NpArray]) -> dict[str, NpArray]:
    """A plain copy, which folding is compared with."""
    return {name: tensor.copy() for name, tensor in tensors.items()}


def in_turns(made: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after another in every round; the first round is not counted where there are more."""
    found: dict[str, list[float]] = {key: [] for key in made}
    for number in range(rounds + (rounds > 1)):
        for key, call in made.items():
            began = time.perf_counter()
            call()
            spent = time.perf_counter() - began
            if number or rounds == 1:
                found[key].append(spent)
    return found


def seeded(name: str) -> Backbone:
    """A timm network with seeded weights: how long folding takes does not depend on them."""
    import timm
    import torch

    from edgepet.networks.backbone import Backbone
    from edgepet.spec import Preprocess

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=0)
    preprocess = Preprocess(image_size=(224, 224), orientation="exif")
    return Backbone.from_module(network, name=name, preprocess=preprocess, licence="CC0-1.0")


def drawn_pack(backbone: Backbone, method: str) -> bytes:
    """A pack of ten classes in int8, the method's numbers drawn from a normal distribution."""
    from edgepet.deltas.delta import Score
    from edgepet.methods import METHODS
    from edgepet.packs.pack import encode_pack
    from edgepet.tuning.model import TunedModel, extract

    model, rng = TunedModel(backbone, METHODS[method](), 10), np.random.default_rng(0)
    drawn = {key: rng.normal(array, 0.02).astype(np.float32) for key, array in model.arrays().items()}
    model.load(drawn, model.head())
    labels = tuple(str(number) for number in range(10))
    return encode_pack(extract(model, backbone, task="drawn", labels=labels, val=Score(top1=0.0, n=0)), codec="int8")


# ---------------------------------------------------------------------------------------------------------------- pages


def pack_tables(results: Mapping[str, Any]) -> str:
    """Both tables, as far as there are results."""
    parts = []
    if "packs-codecs" in results:
        parts.append(codecs_table(results["packs-codecs"]))
    if "packs-reading" in results:
        parts.append(reading_table(results["packs-reading"]))
    return "\n".join(parts)


def codecs_table(result: Mapping[str, Any]) -> str:
    """A row for each method: the mean over tasks of what it is and loses in each codec."""
    rows = []
    names = dict.fromkeys((row["method"], tuple(sorted(row["settings"].items()))) for row in result["rows"])
    for method, settings in names:
        of = [
            row
            for row in result["rows"]
            if (row["method"], tuple(sorted(row["settings"].items()))) == (method, settings)
        ]
        told = f"{method}{''.join(f', {key} {value}' for key, value in settings)}"
        cells = [_cell([row[codec] for row in of if codec in row]) for codec in (*CODED, "auto", "signs")]
        trained = format_bytes(int(np.mean([row["bytes_trained"] for row in of])))
        peft = [row["peft_zstd19_bytes"] for row in of if "peft_zstd19_bytes" in row]
        top1 = format_percent(float(np.mean([row["test_top1"] for row in of])))
        beside = format_bytes(int(np.mean(peft))) if peft else ""
        rows.append((told, str(len(of)), top1, trained, *cells, beside))
    numbers = ("tasks", "top-1", "fp16", *CODED, "auto", "signs", "PEFT, zstd 19")
    columns = (Column("method"), *(Column(name, right=True) for name in numbers))
    told = (
        "Bytes of a pack with its head, and points of test top-1 that it loses, paired on the same images: means over"
        f" tasks. `auto` may lose {result['max_drop']:g} points of val."
    )
    return f"{markdown(Table('Codecs, demo:vit-small at 112 px', columns, rows))}\n{told} {source(result)}\n"


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    known = [each for each in found if "bytes" in each]
    if not found:
        return ""
    if len(known) < len(found):
        return "refused"
    points = float(np.mean([each["drop"]["points"] for each in known]))
    return f"{format_bytes(int(np.mean([each['bytes'] for each in known])))}, {points:+.1f}"


def reading_table(result: Mapping[str, Any]) -> str:
    """A row for each network and method."""
    rows = [
        (
            row["backbone"], row["method"], format_bytes(row["pack_bytes"]), f"{row['read_ms']:.1f}",
            f"{row['fold_ms']:.0f}", f"{row['copy_ms']:.0f}", f"{row['read_over_copy']:.2f}",
            f"{row['fold_over_copy']:.1f}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    numbers = ("pack, int8", "read ms", "fold ms", "copy ms", "read/copy", "fold/copy")
    columns = (Column("backbone"), Column("method"), *(Column(name, right=True) for name in numbers))
    told = f"Medians of {result['rounds']} rounds in turns, NumPy alone; copy is of all weights of the backbone."
    return f"{markdown(Table('Reading and folding packs', columns, rows))}\n{told} {source(result)}\n"


if __name__ == "__main__":
    main()
