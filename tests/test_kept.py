"""Merged networks in a store's cache: opened again without folding, bounded, and safe to delete or damage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepet import Device
from edgepet.device import kept
from edgepet.device.store import Store
from tests.flow import Tasks, bytes_below
from tests.tiny import random_images

IMAGES = random_images(3, 2)


@pytest.fixture
def device(store: Store, tasks: Tasks) -> Device:
    made = Device(store.root)
    made.install(tasks.shapes)
    made.install(tasks.tints)
    return made


def merged(device: Device, task: str = "shapes", runtime: str = "onnxruntime") -> bytes:
    with device.open(task, mode="merged", threads=1, runtime=runtime) as network:
        return network(IMAGES).tobytes()


def places(device: Device) -> list[Path]:
    folder = Path(device.store) / "cache" / "merged"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def no_fold(*_: object) -> None:
    message = "folded again"
    raise RuntimeError(message)


def test_a_merged_network_is_folded_once_and_has_the_same_bits(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    first = merged(device)
    (place,) = places(device)
    assert sorted(path.name for path in place.iterdir()) == ["kept.json", "model.bin", "model.onnx"]

    monkeypatch.setattr("edgepet.device.pool.changed_tensors", no_fold)
    again = merged(Device(device.store))

    monkeypatch.undo()
    shutil.rmtree(place.parent)
    monkeypatch.setattr("edgepet.device.pool.folder_bytes", lambda _: 10**18)  # beyond any quota: nothing is kept
    Store(Path(device.store)).limit(10**12)
    plain = merged(Device(device.store))
    assert first == again == plain
    assert places(device) == []


def test_openvino_keeps_none(device: Device) -> None:
    pytest.importorskip("openvino")
    merged(device, runtime="openvino")
    assert places(device) == []


def test_each_pack_has_its_own(device: Device) -> None:
    answers = {task: merged(device, task) for task in ("shapes", "tints")}

    assert len(places(device)) == 2
    assert answers == {task: merged(Device(device.store), task) for task in ("shapes", "tints")}
    assert answers["shapes"] != answers["tints"]


@pytest.mark.parametrize("name", ["kept.json", "model.bin", "model.onnx"])
@pytest.mark.parametrize("what", ["flipped", "gone", "cut"])
def test_what_is_damaged_is_made_again(device: Device, name: str, what: str) -> None:
    expected = merged(device)
    (place,) = places(device)
    path = place / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if what == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif what == "cut":
        path.write_bytes(data[:-1])

    assert merged(Device(device.store)) == expected
    assert merged(Device(device.store)) == expected
    assert len(places(device)) == 1


def test_as_many_are_kept_as_fit_and_none_that_is_used_makes_room(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST", 1)
    merged(device, "shapes")
    (first,) = places(device)

    merged(device, "tints")
    assert places(device) == [first]

    os.utime(first / "kept.json", (1, 1))
    merged(device, "tints")
    (second,) = places(device)
    assert second != first


def test_they_go_with_the_cache_and_count_as_onnx_runtimes(device: Device, tasks: Tasks) -> None:
    from edgepet.device.caches import clear_cache, derived_bytes

    merged(device)
    root = Path(device.store)
    assert derived_bytes(root, "onnxruntime") == bytes_below(places(device)[0])
    assert derived_bytes(root, "openvino") == 0
    assert device.check() == ()

    clear_cache(root)

    assert places(device) == []


def test_a_network_that_is_evicted_comes_back_from_the_cache(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Store(Path(device.store)).graph_of(Store(Path(device.store)).pack("shapes"))
    room = int(2.5 * graph.weights_bytes)
    opened = {
        task: device.open(task, mode="merged", threads=1, memory_bytes=room) for task in ("shapes", "tints")
    }  # fmt: skip
    first = {task: network(IMAGES) for task, network in opened.items()}
    monkeypatch.setattr("edgepet.device.pool.changed_tensors", no_fold)

    for task in ("shapes", "tints", "shapes"):
        assert np.array_equal(opened[task](IMAGES), first[task])

    device.close()
