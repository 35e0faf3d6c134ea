"""What words are worth: heads that read text beside heads that do not, classes without training, LV-Adapter's stages.

    python benchmarks/words.py --dir DIR                  # all tables; hours on 2 cores
    python benchmarks/words.py --dir DIR --only heads     # one of them: heads, unseen, stages
    python benchmarks/words.py --dir DIR --only speed     # milliseconds of the stages, on an idle machine

The text of every class is the vector that GloVe has for its words, as ``edgepet text`` makes it. Heads are of land
cover, behind a frozen backbone; what text adds to the head ``mlp`` is paired, on the same images. For a
class without training all of its pixels are taken out of train and val, a head of score maps is trained on what is
left, and ``pack --text`` gives it all classes again. LV-Adapter's second stage tunes the adapters on boxes, masks and
labels of a scene at once, its third each answer alone. Trainings are jobs below DIR, without augmentation. Writes
``words-*.json``; ``report.py`` makes the tables in docs/guide/text.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Asked, asked, earlier, source, write_result
from masks import CONVNET, SIZE, VIT, uncoded
from rows import Rows, rows_parser, tuned
from trainings import (
    BALANCED,
    FEW,
    Pretraining,
    Trained,
    Training,
    finished,
    images_of,
    in_turns,
    measuring_job,
    named_pack,
    pack_of,
    trained,
)
from unseen import WORDS

from edgepet.reports.tables import Column, Table, format_bytes, format_ms, format_number, format_percent, markdown

LAND, SCENE = "landcover_seg", "stamps_scene"
SCENE_WORDS = {  # masks have a background too
    "boxes": "tests/golden/text/stamps_scene-boxes.safetensors", "mask": "tests/golden/text/stamps_scene.safetensors",
}  # fmt: skip
EPOCHS, TEST_IMAGES, PAIRED = 12, 1000, 500
FROZEN = "linear-probe"
MAPS = {VIT: "", CONVNET: ",maps=1/2/3"}  # what heads read: a ViT's are four of one stride
PLAIN = ("linear", "mlp")
ADDED = ("score,mlp=true", "mlp,language=1")  # words beside what ``mlp`` reads
HEADS = (
    *PLAIN, "score", "score,context=1", *ADDED, "score,mlp=true,aux=false", "score,mlp=true,context=1",
    "score,mlp=true,context=1,aux=false",
)  # fmt: skip
FORMS = {CONVNET: HEADS, VIT: HEADS[:-2]}
DRAWN = "tests/golden/text/drawn.safetensors"  # numbers that a seed drew: what such a head is worth without words
WITHOUT_WORDS = ("score", "score,context=1")
UNSEEN = ("savanna", "cropland", "snow_ice")  # the first has a word that another class has too
ADAPTER, STAGED, STAGE_EPOCHS = "multi-scale-adapter", {"boxes": "fcos", "mask": "mlp", "labels": ""}, 8
READS = {"boxes": "fcos,language=1", "mask": "mlp,language=1"}
ROUNDS, QUICK_SIZE = 100, 64


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = rows_parser(__doc__)
    made.add_argument("--only", choices=("heads", "unseen", "stages", "speed"), help="one table")
    made.add_argument("--backbone", choices=(VIT, CONVNET), help="only the heads of one backbone")
    return made


def main() -> None:
    """Make what is asked for, a row at a time."""
    options = parser().parse_args()
    run = asked(options)
    backbone = None if run.quick else options.backbone
    if options.only in (None, "heads"):
        every = [_smallest(_land(CONVNET, ADDED[0]))] if run.quick else list(heads())
        Rows(run, "words-heads", every).fill(partial(head_row, run), options.most, backbone)
    if options.only in (None, "unseen"):
        unseen(run)
    if options.only in (None, "stages"):
        every = [_smallest(each) for each in list(stages())[-1:]] if run.quick else list(stages())
        Rows(run, "words-stages", every).fill(stage_row, options.most)
    if options.only in (None, "speed"):
        write_result(run, "words-speed", speed(run))


def _smallest(training: Training) -> Training:
    """Boxes and masks of a scene stay all, for one file tells of them."""
    few = None if training.task == SCENE else FEW
    init = None if training.init is None else replace(training.init, epochs=1, image_size=QUICK_SIZE)
    return replace(training, epochs=1, few=few, test_cap=10, init=init, image_size=QUICK_SIZE)


# ---------------------------------------------------------------------------------------------------------------- heads


def heads() -> Iterator[Training]:
    """Heads that read text, and those that they are compared with."""
    for backbone, every in FORMS.items():
        for head in every:
            yield _land(backbone, head)
            if head in WITHOUT_WORDS:
                yield _land(backbone, head, DRAWN)


def _land(backbone: str, head: str, table: str = WORDS) -> Training:
    text = {} if head in PLAIN else {"text": table}
    maps = "" if head == "linear" else MAPS[backbone]  # one product of the last map, as in masks.py
    return Training(
        task=LAND, backbone=backbone, method=FROZEN, image_size=SIZE, epochs=EPOCHS, test_cap=TEST_IMAGES, scored=True,
        options={"task": "mask", "head": f"{head}{maps}", **text},
    )  # fmt: skip


def head_row(run: Asked, made: Trained) -> dict[str, object]:
    """One head, and what words add to ``mlp``."""
    text = made.training.options.get("text")
    found = uncoded(made) | {"text": {None: "", WORDS: "words", DRAWN: "drawn"}[text]}
    head = next(
        (each for each in ADDED if made.training.options["head"] == f"{each}{MAPS[made.training.backbone]}"), ""
    )
    if not head:
        return found
    options = {"task": "mask", "head": f"mlp{MAPS[made.training.backbone]}"}
    (without,) = trained(run, [replace(made.training, options=options)])
    job = measuring_job("words:against", made, other=named_pack(without), images=PAIRED)
    (lost,) = finished(run, [job])
    return {**found, "added": dict(lost.report)}


def against(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """Points of mIoU that a pack has above another one on the same test images, with a paired interval."""
    import torch

    from edgepet.calibration.head_drops import mask_drop
    from edgepet.images.mask_folders import open_masks
    from edgepet.images.masks import read_masks
    from edgepet.images.preprocess import normalize
    from edgepet.images.sets import load_set
    from edgepet.networks.loading import load_backbone
    from edgepet.packs.pack import EVERY, read_pack
    from edgepet.tuning.dense import stored_answers

    torch.set_num_threads(specification["threads"])
    paths = [pack_of({"pack": specification[key]}, folder) for key in ("pack", "other")]
    deltas = [read_pack(path, answers=EVERY).delta for path in paths]
    preprocess = deltas[0].preprocess
    backbone = load_backbone(deltas[0].backbone, image_size=preprocess.image_size)
    test = open_masks(images_of(specification, folder), "test")
    index = np.unique(np.linspace(0, len(test.masks) - 1, specification["images"]).round().astype(int)).tolist()
    pixels, _ = load_set(test.images.at(index), preprocess)
    truths = read_masks([test.masks[each] for each in index], preprocess.image_size)
    answers = [stored_answers(backbone, each, normalize(pixels, preprocess)) for each in deltas]
    drop = mask_drop(answers[0], answers[1], truths)
    return {"points": drop.points, "low": drop.low, "high": drop.high, "n": drop.n}


# --------------------------------------------------------------------------------------------------------------- unseen


def unseen(run: Asked) -> None:
    """A row for each class that training has no pixel of."""
    whole = _land(VIT, "score")
    (made,) = trained(run, [replace(whole, epochs=1, few=FEW, test_cap=10, image_size=112) if run.quick else whole])
    (judged,) = finished(run, [measuring_job("unseen:by_class", made)])
    facts = {"backbone": VIT, "epochs": made.training.epochs, "trained": judged.report}
    before, rows = earlier(run, "words-unseen"), list[dict[str, object]]()
    known = before.get("rows", ()) if all(before.get(key) == value for key, value in facts.items()) else ()
    for left_out in UNSEEN[:1] if run.quick else UNSEEN:
        row = next((each for each in known if each["class"] == left_out), None)
        if row is None:
            (found,) = finished(run, [measuring_job("unseen:without_pixels", made, **{"class": left_out})])
            row = {"class": left_out, **found.report}
        rows.append(row)
        write_result(run, "words-unseen", {**facts, "rows": rows})


# --------------------------------------------------------------------------------------------------------------- stages


def stages() -> Iterator[Training]:
    """Each answer behind the frozen backbone and behind adapters, without and with words, and after adapting on all."""
    adapted = Pretraining(
        tasks=(SCENE,), backbone=CONVNET, method=ADAPTER, image_size=SIZE, epochs=STAGE_EPOCHS,
        options=(("task", ",".join(STAGED)), ("head", "+".join(READS.values())), ("text", SCENE_WORDS["mask"]),
                 *BALANCED.items()),
    )  # fmt: skip
    for answer, head in STAGED.items():
        common = {"task": answer, **(BALANCED if answer == "mask" else {})}
        plain = {**common, **({"head": head} if head else {})}
        worded = {**common, "head": READS[answer], "text": SCENE_WORDS[answer]} if answer in READS else None
        for method in (FROZEN, ADAPTER):
            for options in filter(None, (plain, worded)):
                yield _scene(method, options)
        yield _scene(ADAPTER, worded or plain, adapted)


def _scene(method: str, options: Mapping[str, str], init: Pretraining | None = None) -> Training:
    return Training(
        task=SCENE, backbone=CONVNET, method=method, image_size=SIZE, epochs=STAGE_EPOCHS, test_cap=TEST_IMAGES,
        scored=True, options=options, init=init,
    )  # fmt: skip


def stage_row(made: Trained) -> dict[str, object]:
    """One training."""
    training, report = made.training, made.result.report
    (answer,) = report["test"]
    return {
        "task": training.task,
        "answer": answer,
        "method": training.method,
        "words": "text" in training.options,
        "adapted": training.init is not None,
        **tuned(made),
        "val": report["val"][answer],
        "test": report["test"][answer],
        "seconds": round(made.result.seconds),
    }


def speed(run: Asked) -> dict[str, object]:
    """Milliseconds of each stage's network on ONNX Runtime, of one answer interleaved."""
    rows, rounds = list[dict[str, object]](), 2 if run.quick else ROUNDS
    every = list(stages())
    for answer in list(STAGED)[-1:] if run.quick else STAGED:
        asked_for = [each for each in every if each.options["task"] == answer and each.init is None]
        if run.quick:
            asked_for = [_smallest(each) for each in asked_for[-1:]]
        every_made = trained(run, asked_for)
        for made, p50_ms in zip(every_made, in_turns(every_made, rounds), strict=True):
            kind = {"method": made.training.method, "words": "text" in made.training.options}
            rows.append({"answer": answer, **kind, "p50_ms": p50_ms})
    return {"threads": 1, "rounds": rounds, "rows": rows}


# ---------------------------------------------------------------------------------------------------------------- pages


def word_tables(results: Mapping[str, Any]) -> str:
    """All three, as far as they are measured."""
    made: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "words-heads": _heads, "words-unseen": _unseen, "words-stages": partial(_stages, results),
    }  # fmt: skip
    parts = [table(results[name]) for name, table in made.items() if name in results]
    return "\n".join(parts) or "Not measured yet.\n"


def _heads(result: Mapping[str, Any]) -> str:
    rows = [
        (
            each["backbone"], each["head"].removesuffix(MAPS[CONVNET]), each["text"],
            format_number(each["head_params"]), format_bytes(each["pack_bytes"]), format_percent(each["test_miou"]),
            f"{format_percent(each['test_low'])} to {format_percent(each['test_high'])}", _added(each.get("added")),
        )
        for each in result["rows"]
    ]  # fmt: skip
    numbers = ("head, values", "pack, fp16", "mIoU", "95 % interval", "above mlp, points")
    columns = (*map(Column, ("backbone", "head", "text")), *(Column(name, right=True) for name in numbers))
    told = (
        f"Test mIoU of {TEST_IMAGES} images of land cover at {SIZE} px, frozen backbone, {EPOCHS} epochs of 800 images"
        f" without augmentation, one seed. Text is GloVe's vectors of words, or as many numbers that a seed drew."
        f" Points above `mlp` are paired on {PAIRED} images."
    )
    return f"{markdown(Table('Heads with words and without', columns, rows))}\n{told} {source(result)}\n"


def _added(lost: Mapping[str, float] | None) -> str:
    """Points that are lost from a head to the one without words are what words add."""
    return "" if lost is None else f"{lost['points']:+.1f} ({lost['low']:+.1f} to {lost['high']:+.1f})"


def _unseen(result: Mapping[str, Any]) -> str:
    trained = result["trained"]
    rows = [
        (
            each["class"].replace("_", " "), format_percent(each["share"]), format_percent(each["ious"][each["class"]]),
            format_percent(trained["ious"][each["class"]]), format_percent(each["miou"]),
        )
        for each in result["rows"]
    ]  # fmt: skip
    numbers = ("share of pixels", "its IoU, by words alone", "its IoU, trained", "mIoU of all ten")
    columns = (Column("class"), *(Column(name, right=True) for name in numbers))
    told = (
        "Who always answers a class has its share as IoU. Frozen demo:vit-small, head `score`, one seed; trained on all"
        f" classes its mIoU is {format_percent(trained['miou'])}."
    )
    return f"{markdown(Table('Classes that training had no pixel of', columns, rows))}\n{told} {source(result)}\n"


def _stages(results: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    timed = {
        (each["answer"], each["method"], each["words"]): each["p50_ms"]
        for each in results.get("words-speed", {}).get("rows", ())
    }
    rows = [
        (
            each["answer"], each["method"], "yes" if each["words"] else "", "yes" if each["adapted"] else "",
            format_bytes(each["pack_bytes"]),
            format_ms(ms) if (ms := timed.get((each["answer"], each["method"], each["words"]))) is not None else "",
            format_percent(each["test"]["value"]),
            f"{format_percent(each['test']['low'])} to {format_percent(each['test']['high'])}",
        )
        for each in result["rows"]
    ]  # fmt: skip
    numbers = ("pack, fp16", "p50 ms", "AP, mIoU or mean AP", "95 % interval")
    columns = (
        *map(Column, ("answer", "method", "words", "adapted on all")),
        *(Column(name, right=True) for name in numbers),
    )
    told = (
        f"Test split of {SCENE}, demo:{CONVNET} at {SIZE} px, {STAGE_EPOCHS} epochs of 800 images in each stage without"
        f" augmentation, one seed; milliseconds on ONNX Runtime, fp32, one thread."
    )
    return f"{markdown(Table('LV-Adapter: its stages', columns, rows))}\n{told} {source(result)}\n"


if __name__ == "__main__":
    main()
