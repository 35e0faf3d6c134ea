"""Tasks that are asked again and again: nothing grows, and nothing wanders from one to another."""

from __future__ import annotations

import gc
import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepet import Device, read_pack, write_pack
from edgepet.device.store import Store
from edgepet.methods import IA3, SSF, BitFit, LoRA, Method, RepAdapter
from edgepet.spec import NpArray
from tests.flow import RUNTIMES, Tasks, task_on
from tests.tiny import random_images

METHODS: dict[str, Method] = {
    "ssf": SSF(), "lora": LoRA(rank=2, on=("q", "v")), "bitfit": BitFit(), "ia3": IA3(), "repadapter": RepAdapter(),
}  # fmt: skip
IMAGES = random_images(3, 1)
GROWTH = 8_000_000  # bytes that an allocator may keep


@pytest.fixture(scope="module")
def ten(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with ten tasks of five methods."""
    from edgepet.exporters.trace import base_graph
    from edgepet.networks.loading import load_backbone

    root = tmp_path_factory.mktemp("soak")
    shapes = read_pack(tasks.shapes).delta
    backbone = load_backbone(tasks.spec, image_size=shapes.preprocess.image_size)
    store = Store(root / "store")
    store.add_graph(base_graph(backbone))
    for method, number in ((method, number) for method in METHODS for number in range(2)):
        delta = task_on(backbone, METHODS[method], name=f"{method}-{number}", seed=number, by=0.02)
        write_pack(root / "task.pet", replace(delta, preprocess=shapes.preprocess))
        store.install(root / "task.pet")
    return store.root


def taken() -> tuple[int, int, int]:
    """Resident bytes, threads and open files of this process."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts what Linux tells")


@needs_proc
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_ten_tasks_of_five_methods_are_switched_at_random_in_slots(ten: Path, runtime: str) -> None:
    chosen = random.Random(1)
    with Device(ten) as device:
        opened = {task: device.open(task, runtime=runtime, mode="slots", threads=1) for task in device.tasks()}
        assert len(opened) == 10
        first: dict[str, NpArray] = {task: network(IMAGES) for task, network in opened.items()}
        for _ in range(50):  # runtimes take their memory in the first calls
            opened[chosen.choice(list(opened))](IMAGES)
        before = taken()

        for _ in range(1000):
            task = chosen.choice(list(opened))
            assert np.array_equal(opened[task](IMAGES), first[task])

        after = taken()
    assert after[0] - before[0] <= GROWTH
    assert after[1:] == before[1:]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_merged_tasks_are_switched_at_random_and_answer_as_in_slots(ten: Path, runtime: str) -> None:
    chosen = random.Random(2)
    with Device(ten) as device:
        slots = {task: device.open(task, runtime=runtime, mode="slots", threads=1)(IMAGES) for task in device.tasks()}
        first, before = dict[str, NpArray](), (0, 0, 0)
        for turn in range(100):
            task = chosen.choice(device.tasks())
            with device.open(task, runtime=runtime, mode="merged", threads=1) as network:
                got = network(IMAGES)
            assert np.array_equal(first.setdefault(task, got), got)
            assert np.abs(got - slots[task]).max() <= 1e-5 * np.abs(got).max()
            if turn == 20:
                before = taken()
        after = taken()
    assert after[0] - before[0] <= 4 * GROWTH
    assert after[1:] == before[1:]


@needs_proc
@pytest.mark.slow
def test_a_hundred_thousand_calls_leave_memory_as_it_is(ten: Path) -> None:
    with Device(ten) as device, device.open_all(threads=1) as several:
        tasks = [device.open(task, mode="slots", threads=1) for task in device.tasks()]
        for network in tasks:
            network(IMAGES)
        several.logits(IMAGES)
        before = taken()
        for turn in range(100_000):
            tasks[turn % len(tasks)](IMAGES)
            if turn % 100 == 0:
                several.logits(IMAGES)
        after = taken()
    assert after[0] - before[0] <= GROWTH
    assert after[1:] == before[1:]
