"""One task on a device in each way that there is: edgepet's, PEFT's, NNCF's and ONNX Runtime's, in one run.

    python benchmarks/peers.py --dir DIR                 # an hour, on a machine that does nothing else
    python benchmarks/peers.py --dir DIR --task digits

Everybody has the same images, backbone, epochs, batch size, precision while training and choice of the best epoch by
val. PEFT's LoRA has the rank, the alpha and the layers of edgepet's, and the loop of PEFT's documents: its notebook for
timm (``examples/image_classification``) has cross entropy, and a learning rate of 2e-4 for all that is trained; its
guide to image classification (``task_guides/lora_based_methods``) has 5e-3, which is edgepet's too, and the Trainer of
transformers: AdamW, and gradients clipped to a norm of 1. Both rates are tried, with edgepet's warmup, cosine and
weight decay, and the better by val goes on: merged and through torch.onnx; as adapters of ONNX Runtime, on edgepet's
graph, which has inputs for them; and in int8 by NNCF and ``quantize_static`` as their documents say
(``neighbours.py``).

Every training is a job, and so is what makes the files and judges them. Times are of processes of their own, all ways
of a runtime in turns. Writes ``peers.json``, or ``peers-TASK.json`` of another task than landcover; ``report.py`` makes
the tables in docs/guide/train-export-measure.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from adapters import ON, RANK, peft_lora
from harness import IMAGE_SIZES, Asked, alone, asked, parser_of, source, write_result
from neighbours import SETTINGS
from peer_ways import FP32_FILE, MANY, Network, Way, deploying_job, ways_in
from trainings import FEW, TEST_CAP, Trained, Training, finished, images_of, trained

from edgepet import read_pack
from edgepet.device.runtimes import SHARED_RUNTIMES
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_sets, open_split
from edgepet.jobs.job import MEASURED, Job
from edgepet.measuring.latency import Candidate, measure, ratio, ratio_of_runs, switching_ms
from edgepet.methods import LoRA
from edgepet.networks.loading import load_backbone
from edgepet.reports.tables import Column, Table, format_bytes, format_number, format_percent, format_seconds, markdown
from edgepet.samples.pools import Task
from edgepet.samples.tasks import TASKS
from edgepet.spec import NpArray

BACKBONE, TASK, BATCH, THREADS = "vit-small", "landcover", 32, 1
METHODS: Mapping[str, Mapping[str, str]] = {"linear-probe": {}, "ssf": {}, "lora": {"rank": str(RANK), "on": ON},
                                            "full": {}}  # fmt: skip
RATES = (2e-4, LoRA.recipe.lr)  # of PEFT's notebook; of its guide, and edgepet's
CHOICES = tuple(name for name, task in TASKS.items() if isinstance(task, Task))


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Of training, of images to judge and to calibrate on, of processes and of rounds in each."""

    methods: tuple[str, ...]
    epochs: int
    few: int | None
    test_cap: int
    calib: int
    runs: int
    rounds: int


LONG = Amount(methods=tuple(METHODS), epochs=8, few=None, test_cap=TEST_CAP, calib=128, runs=3, rounds=60)
SHORT = Amount(methods=("ssf",), epochs=1, few=FEW, test_cap=TEST_CAP, calib=32, runs=2, rounds=2)


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("--task", choices=CHOICES, default=TASK, help="a task of classes (%(default)s)")
    made.add_argument("--only", nargs=2, metavar=("FOLDER", "RUNTIME"), help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Train, deploy and time, or in this process time one runtime."""
    options = parser().parse_args()
    amount = SHORT if options.quick else LONG
    if options.only:
        folder, runtime = options.only
        json.dump(timed(Path(folder), runtime, amount.rounds), sys.stdout)
        return
    run, task = asked(options), str(options.task)
    own = {each.training.method: each for each in trained(run, trainings(task, amount))}
    rates = finished(run, [peft_job(own["ssf"], rate) for rate in RATES], run.ray)
    best = max(rates, key=lambda each: (each.report["val_top1"], -each.report["val_loss"]))
    (made,) = finished(run, [deploying_job(own, best, amount.calib)])
    runs = {runtime: [process(made.folder, runtime, run) for _ in range(amount.runs)] for runtime in SHARED_RUNTIMES}
    seconds = {name: each.result.measured["seconds"] for name, each in own.items()}
    seconds["peft"] = best.measured["seconds"]
    facts = {
        "task": task,
        "backbone": f"demo:{BACKBONE}",
        "image_size": IMAGE_SIZES[BACKBONE],
        "epochs": amount.epochs,
        "batch_size": BATCH,
        "precision": best.report["precision"],
        "calib_images": amount.calib,
        "threads": THREADS,
        "runs": amount.runs,
        "rounds": amount.rounds,
        "peft": {"rank": RANK, "on": ON, "lr": best.job.specification["lr"],
                 "val_top1": {str(each.job.specification["lr"]): each.report["val_top1"] for each in rates}},
        "neighbours": SETTINGS["transformer"],
        "rows": [row(way, made.report, seconds, runs) for way in ways_in(made.folder)],
    }  # fmt: skip
    write_result(run, "peers" if task == TASK else f"peers-{task}", facts)


def row(way: Way, found: Mapping[str, Any], seconds: Mapping[str, float], runs: Mapping[str, Any]) -> dict[str, object]:
    """Everything of one way."""
    times = {
        runtime: {
            **{key: float(np.median([run[way.name][key] for run in runs[runtime]])) for key in ("p50_ms", "switch_ms")},
            "over_file": ratio_of_runs([run[way.name]["over_file"] for run in runs[runtime]]),
        }
        for runtime in way.runtimes
    }
    told = {"model": way.name, "who": way.who, "trained": way.trained, "kept_as": way.kept_as}
    return {**told, "training_seconds": round(seconds[way.trained]), **found[way.name], "times": times}


# ----------------------------------------------------------------------------------------------------------- trainings


def trainings(task: str, amount: Amount) -> list[Training]:
    """edgepet's."""
    return [
        Training(
            task=task, backbone=BACKBONE, method=method, image_size=IMAGE_SIZES[BACKBONE], epochs=amount.epochs,
            few=amount.few, test_cap=amount.test_cap, settings=METHODS[method], options={"batch_size": BATCH},
        )
        for method in amount.methods
    ]  # fmt: skip


def peft_job(like: Trained, rate: float) -> Job:
    """PEFT's LoRA, on the images and the backbone of edgepet's."""
    given: Any = like.result.job.specification
    shared = {key: given[key] for key in ("data", "backbone", "threads")}
    options = {key: given["options"][key] for key in ("epochs", "batch_size", "seed", "precision")}
    return Job(function="peers:train_peft", specification={**shared, **options, "lr": rate})


def train_peft(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """``folder/adapter``, as PEFT saves it, of its best epoch by val."""
    import torch

    torch.set_num_threads(specification["threads"])
    began, data, network = time.perf_counter(), images_of(specification, folder), specification["backbone"]
    backbone = load_backbone(network["name"], image_size=network["image_size"])
    splits = [open_split(data, "train"), open_split(data, "val")]
    torch.manual_seed(specification["seed"])
    model = peft_lora(backbone, len(splits[0].classes))
    train, val = (
        (normalize(pixels, backbone.preprocess), labels) for pixels, labels in load_sets(splits, backbone.preprocess)
    )
    top1, loss, epoch = tune(model, train, val, specification)
    model.save_pretrained(str(folder / "adapter"))
    return {
        "val_top1": top1,
        "val_loss": loss,
        "best_epoch": epoch,
        "precision": specification["precision"],
        MEASURED: {"seconds": time.perf_counter() - began},
    }


def tune(
    model: Any, train: tuple[NpArray, NpArray], val: tuple[NpArray, NpArray], plan: Mapping[str, Any]
) -> tuple[float, float, int]:
    """Train what ``model`` leaves to be trained, and leave it at its best epoch by val: top-1, mean loss, and which.

    Args:
        train: preprocessed images, float32 (n, 3, H, W), and labels (n,); ``val`` likewise.
        plan: "epochs", "batch_size", "lr", "seed", and "precision", fp32 or bf16.
    """
    import torch
    from torch.nn.functional import cross_entropy

    (images, labels), (held, truth) = ([torch.from_numpy(each) for each in pair] for pair in (train, val))
    learnt = {name: each for name, each in model.named_parameters() if each.requires_grad}
    recipe, batch = LoRA.recipe, plan["batch_size"]
    optimizer = torch.optim.AdamW(learnt.values(), lr=plan["lr"], weight_decay=recipe.weight_decay)
    steps = plan["epochs"] * math.ceil(len(images) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(warmup_and_cosine, steps=steps, rising=max(1, round(recipe.warmup * steps)))
    )
    order = torch.Generator().manual_seed(plan["seed"])
    best, kept = (-1.0, 0.0, 0), dict[str, torch.Tensor]()
    fast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=plan["precision"] == "bf16")
    for epoch in range(1, plan["epochs"] + 1):
        model.train()
        for index in torch.split(torch.randperm(len(images), generator=order), batch):
            with fast():
                logits = model(images[index])
            torch.autograd.backward(cross_entropy(logits.float(), labels[index]))
            torch.nn.utils.clip_grad_norm_(learnt.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad(), fast():
            answers = torch.cat([model(part).float() for part in torch.split(held, batch)])
        top1, loss = float((answers.argmax(1) == truth).float().mean()), float(cross_entropy(answers, truth))
        if (top1, -loss) > (best[0], -best[1]):
            best, kept = (top1, loss, epoch), {name: each.detach().clone() for name, each in learnt.items()}
    model.load_state_dict(kept, strict=False)
    return best


def warmup_and_cosine(step: int, *, steps: int, rising: int) -> float:
    """Of the learning rate: a straight rise, then half a cosine."""
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# --------------------------------------------------------------------------------------------------------------- times


def process(folder: Path, runtime: str, run: Asked) -> dict[str, Any]:
    """``timed`` in a process of its own."""
    found: dict[str, Any] = alone(__file__, "--only", folder, runtime, quick=run.quick)
    return found


def timed(folder: Path, runtime: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of each way milliseconds, how often the fp32 file's fit into them, and what another task costs."""
    ways = {way.name: way for way in ways_in(folder) if runtime in way.runtimes}
    shape = read_pack(folder / "ssf.pet").delta.preprocess.input_shape
    image = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    candidates = [
        Candidate(model=name, runtime=runtime, precision="fp32", mode=way.kept_as,
                  open=partial(opened, way, folder, runtime))
        for name, way in ways.items()
    ]  # fmt: skip
    report = measure(candidates, image, threads=THREADS, rounds=rounds)
    rows = {each.model: each for each in report.rows}
    return {
        name: {"p50_ms": rows[name].p50_ms, "over_file": ratio(report, rows[name], rows[FP32_FILE]).median,
               "switch_ms": another_ms(way, folder, runtime, image, rounds)}
        for name, way in ways.items()
    }  # fmt: skip


def opened(way: Way, folder: Path, runtime: str) -> Network:
    """The task's network."""
    return way.open(folder / way.file, runtime, THREADS)[0]


def another_ms(way: Way, folder: Path, runtime: str, image: NpArray, rounds: int) -> float:
    """Of tasks that share a network what a call costs more behind another one's; of files opening one."""
    if way.shares is not None:
        return switching_ms(way.open(folder / way.file, runtime, THREADS), image, 4 * rounds)
    times = []
    for _ in range(max(2, rounds // 10)):
        began = time.perf_counter()
        opened(way, folder, runtime)
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


# --------------------------------------------------------------------------------------------------------------- pages


def peer_tables(results: Mapping[str, Any]) -> str:
    """A table for each task that is measured."""
    found = [result for name, result in results.items() if name.partition("-")[0] == "peers"]
    return "\n".join(map(peer_table, found)) if found else "Not measured yet.\n"


def peer_table(result: Mapping[str, Any]) -> str:
    """A row for each way."""
    rows = [
        (
            each["who"], "lora" if each["trained"] == "peft" else each["trained"], each["kept_as"],
            format_seconds(each["training_seconds"]), format_percent(each["test_top1"]),
            format_number(each["same_answers"]), format_bytes(each["task_bytes"]), format_bytes(each["many_bytes"]),
            *(_ms(each["times"].get(runtime), key, digits) for runtime in SHARED_RUNTIMES
              for key, digits in (("p50_ms", 1), ("switch_ms", 2))),
        )
        for each in result["rows"]
    ]  # fmt: skip
    times = (f"{name}{what}" for name in ("ONNX Runtime", "OpenVINO") for what in (" ms", ", next task ms"))
    numbers = ("training", "top-1", "same answers", "one task", f"{MANY} tasks", *times)
    columns = (*map(Column, ("who", "trained", "kept as")), *(Column(name, right=True) for name in numbers))
    rates = ", ".join(f"{rate} {format_percent(top1)}" for rate, top1 in result["peft"]["val_top1"].items())
    told = (
        f"Test top-1 of {result['rows'][0]['test_n']} images, and how many of them are answered as by the tuned network"
        f" in torch, fp32. Everybody had {result['epochs']} epochs in batches of {result['batch_size']}, in"
        f" {result['precision']}; training ends with what is kept of it. {MANY} tasks are what they share and {MANY}"
        " times the one. The next task is, on a network that tasks share, what a call takes longer behind another"
        f" task's, and of files to open one. PEFT's learning rates by val: {rates}. int8 was calibrated on"
        f" {result['calib_images']} images. Medians of {result['runs']} processes of {result['rounds']} interleaved"
        f" rounds, {result['threads']} thread, batch 1."
    )
    title = f"{result['task']} on {result['backbone']}, {result['image_size']} px"
    return f"{markdown(Table(title, columns, rows))}\n{told} {source(result)}\n"


def _ms(found: Mapping[str, float] | None, key: str, digits: int) -> str:
    return "–" if found is None else f"{max(0.0, found[key]):.{digits}f}"


if __name__ == "__main__":
    main()
