"""Fifty tasks in use at once: memory stays within what was allowed."""

from __future__ import annotations

import gc
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepet import Device, read_pack, write_pack
from edgepet.device.store import Store
from tests.flow import RUNTIMES, Tasks
from tests.tiny import random_images

IMAGES = random_images(3, 1)
ALLOCATOR = 8_000_000  # bytes that one may keep
FIFTY = 50


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts what Linux tells")


@pytest.fixture(scope="module")
def fifty(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with fifty SSF tasks, each with a head of its own."""
    from edgepet.exporters.trace import base_graph
    from edgepet.networks.loading import load_backbone

    root = tmp_path_factory.mktemp("fifty")
    delta = read_pack(tasks.shapes).delta
    store = Store(root / "store")
    store.add_graph(base_graph(load_backbone(tasks.spec, image_size=delta.preprocess.image_size)))
    for number in range(FIFTY):
        head = replace(delta.head, bias=delta.head.bias + np.float32(number))
        write_pack(root / "task.pet", replace(delta, task=f"task-{number:02d}", head=head, probes={}))
        store.install(root / "task.pet")
    return store.root


@needs_proc
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_in_slots_fifty_tasks_cost_their_slots(fifty: Path, runtime: str) -> None:
    with Device(fifty) as device:
        names = device.tasks()
        opened = [device.open(names[0], runtime=runtime, mode="slots", threads=1)]
        for _ in range(3):
            opened[0](IMAGES)
        before = resident()

        opened += [device.open(name, runtime=runtime, mode="slots", threads=1) for name in names[1:]]
        answers = [network(IMAGES) for network in opened]

        assert len(opened) == FIFTY
        assert resident() - before <= 64_000_000 / 2  # of what a ViT-S may take; its slots are eight times as large
        steps = np.diff([answer[0, 0] for answer in answers])
        assert steps == pytest.approx(np.ones(FIFTY - 1), abs=0.05)  # each has its own head, in fp16


@needs_proc
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_merged_fifty_tasks_stay_within_the_memory_that_they_may_take(fifty: Path, runtime: str) -> None:
    chosen, store = random.Random(5), Store(fifty)
    graph = store.graph_of(store.pack("task-00"))
    own = graph.weights_bytes + sum(graph.base.tensors[name].nbytes for name in store.pack("task-00").delta.targets)
    room = 3 * own + own // 2
    with Device(fifty) as device:
        opened = {
            name: device.open(name, runtime=runtime, mode="merged", threads=1, memory_bytes=room)
            for name in device.tasks()
        }
        first = {name: network(IMAGES) for name, network in opened.items()}
        before = resident()

        for _ in range(FIFTY):
            name = chosen.choice(list(opened))
            assert np.array_equal(opened[name](IMAGES), first[name])

        events = next(iter(opened.values())).events
        gained = resident() - before
    held, most = 0, 0
    for event in events:
        held += 1 if event.what == "merged" else -1
        most = max(most, held)
    assert most == 3
    assert gained <= ALLOCATOR
    assert {event.task for event in events if event.what == "evicted"} == set(first)
