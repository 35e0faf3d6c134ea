"""What slots cost is seen once where a task ran both ways, and kept with the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepet import Device
from edgepet.device.caches import clear_cache
from edgepet.device.costs import LEAST, MOST, keep_cost, kept_cost
from edgepet.device.store import Store
from tests.flow import Tasks
from tests.tiny import random_images

OF = {"backbone": "a", "threads": 1}


def test_a_cost_is_what_slots_take_beyond_merged(tmp_path: Path) -> None:
    assert kept_cost(tmp_path, OF) is None

    assert keep_cost(tmp_path, OF, slots_s=1.0, merged_s=0.75) == 0.25

    assert kept_cost(tmp_path, OF) == 0.25
    assert kept_cost(tmp_path, {**OF, "threads": 2}) is None


@pytest.mark.parametrize(("merged_s", "cost"), [(2.0, LEAST), (0.0, MOST)])
def test_noise_is_no_cost(tmp_path: Path, merged_s: float, cost: float) -> None:
    assert keep_cost(tmp_path, OF, slots_s=1.0, merged_s=merged_s) == cost


@pytest.mark.parametrize("text", ["", "{}", '{"cost":7}', '{"cost":"much"}', '{"cost":0.1,"more":1}'])
def test_what_is_damaged_is_as_if_it_were_not_there(tmp_path: Path, text: str) -> None:
    keep_cost(tmp_path, OF, slots_s=1.0, merged_s=0.75)
    (path,) = (tmp_path / "cache" / "costs").iterdir()
    path.write_text(text)

    assert kept_cost(tmp_path, OF) is None


def test_a_task_that_ran_both_ways_has_shown_it(store: Store, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepet.device.pool.SCALES_COST", 1e-9)
    device, images = Device(store.root), random_images(3, 1)
    device.install(tasks.shapes)
    folder = store.root / "cache" / "costs"
    with device.open("shapes", memory_bytes=10**9, threads=1) as shapes:
        for _ in range(4):
            shapes(images)
        assert not folder.exists()
    monkeypatch.setattr("edgepet.device.pool.SCALES_COST", 1e6)  # merged after the first run
    monkeypatch.setattr("edgepet.device.pool.SEEN", 0)
    with device.open("shapes", memory_bytes=10**9, threads=1) as shapes:
        for _ in range(4):
            shapes(images)

    (path,) = folder.iterdir()
    assert LEAST <= json.loads(path.read_text())["cost"] <= MOST
    clear_cache(store.root)
    assert list(folder.iterdir()) == []
