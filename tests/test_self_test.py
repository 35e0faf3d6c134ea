"""The probe of a pack: a machine that answers otherwise than the pack says does not get it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepet import Device, pack, read_pack
from edgepet.deltas.delta import Delta, Head
from edgepet.deltas.probe import Probe, probe_images
from edgepet.deltas.updates import Scale, factors, with_arrays
from edgepet.device.store import Store
from edgepet.errors import CheckError, PackError
from edgepet.graphs.base import BaseGraph
from edgepet.packs.pack import encode_pack
from edgepet.spec import NpArray, Preprocess
from tests.flow import RUNTIMES, Tasks, edgepet
from tests.packs import changed, manifest_of
from tests.splitmix import uniform
from tests.tiny import make_delta


def test_the_images_are_what_the_format_says() -> None:
    preprocess = Preprocess(image_size=(32, 48), orientation="exif")

    images = probe_images(7, preprocess, 2)

    for p, c, y, x in ((0, 0, 0, 0), (1, 2, 31, 47), (0, 1, 15, 3), (1, 0, 2, 29)):
        place = ((3 * p + c) * 16 + 16 * y // 32) * 16 + 16 * x // 48
        assert images[p, c, y, x] == np.float32(2 * uniform(7, place))
    assert (images.shape, images.dtype) == ((2, 3, 32, 48), np.float32)
    clips = probe_images(7, replace(preprocess, frames=2), 1)
    assert np.array_equal(clips[0], images)


def test_what_is_trained_carries_its_answers(tasks: Tasks) -> None:
    delta = read_pack(tasks.shapes).delta
    probe = delta.probes["fp32"]

    assert delta.probes.keys() == {"fp32"}
    assert probe.logits.shape == (4, 3)
    assert 0 < probe.tolerance <= 1e-4 * max(float(np.abs(probe.logits).max()), 1e-3)


def test_a_recoded_pack_carries_the_answers_of_what_it_stores(tasks: Tasks, tmp_path: Path, graph: BaseGraph) -> None:
    pack(tasks.shapes, tmp_path / "small.pet", codec="int2")

    before, after = (read_pack(path).delta.probes["fp32"] for path in (tasks.shapes, tmp_path / "small.pet"))

    assert np.abs(before.logits - after.logits).max() > before.tolerance
    Store(tmp_path / "store").add_graph(graph)
    Device(tmp_path / "store").install(tmp_path / "small.pet")


def flipped(delta: Delta) -> Delta:
    """One scale of the first block has the other sign."""
    place = next(i for i, each in enumerate(delta.updates) if isinstance(each.update, Scale))
    target = delta.updates[place]
    s = factors(target.update)["s"].copy()
    s[3] *= -1
    shared = id(factors(target.update)["s"])
    updates = [
        replace(each, update=with_arrays(each.update, {"s": s}))
        if isinstance(each.update, Scale) and id(each.update.s) == shared
        else each
        for each in delta.updates
    ]
    return replace(delta, updates=tuple(updates))


def shifted(delta: Delta) -> Delta:
    """Every scale is its neighbour's."""
    updates = [
        replace(each, update=with_arrays(each.update, {"s": np.roll(each.update.s, 1)}))
        if isinstance(each.update, Scale)
        else each
        for each in delta.updates
    ]
    return replace(delta, updates=tuple(updates))


def turned(delta: Delta) -> Delta:
    """The head's classes are another's."""
    return replace(delta, head=Head(weight=np.roll(delta.head.weight, 1, 0), bias=delta.head.bias))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("spoil", [flipped, shifted, turned])
def test_a_wrong_number_is_found_where_it_would_serve(
    spoil: Callable[[Delta], Delta], runtime: str, tasks: Tasks, graph: BaseGraph, tmp_path: Path
) -> None:
    read = read_pack(tasks.shapes)
    Store(tmp_path / "store").add_graph(graph)
    device = Device(tmp_path / "store")
    device.install(tasks.shapes, runtime=runtime)

    with pytest.raises(CheckError) as refusal:
        device.install(encode_pack(spoil(read.delta)), runtime=runtime)

    said = str(refusal.value)
    assert said.startswith(f"task 'shapes' on {runtime}, fp32: must answer its own probe within ")
    assert said.endswith(
        "fix: do not serve it from here: the pack, the backbone or the runtime is not what it was made with"
    )
    assert Store(tmp_path / "store").pack("shapes").sha256 == read.sha256


def test_a_machine_that_computes_something_else_does_not_get_it(
    tasks: Tasks, graph: BaseGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepet.device.runtime import TaskNetwork

    real = TaskNetwork.__call__
    monkeypatch.setattr(TaskNetwork, "__call__", lambda self, images: real(self, images) * 1.001)
    Store(tmp_path / "store").add_graph(graph)

    with pytest.raises(CheckError, match="must answer its own probe"):
        Device(tmp_path / "store").install(tasks.tints)
    assert Store(tmp_path / "store").tasks() == ()


# ------------------------------------------------------------------------------------------------------------- int8


@pytest.fixture(scope="module")
def calibrated(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task of shapes, with ranges and answers for the int8 backbone."""
    from tests.flow import draw_shapes

    folder = tmp_path_factory.mktemp("calibrated")
    draw_shapes(folder / "many", {"train": 12, "val": 4})
    said = edgepet("calibrate", tasks.shapes, "--calib", folder / "many", "-o", folder / "shapes.pet", "--json")
    assert said.code == 0, said.err
    return folder / "shapes.pet"


@pytest.fixture
def int8_store(calibrated: Path, tmp_path: Path) -> Path:
    """A store with the int8 backbone and nothing else."""
    from edgepet.graphs.int8 import open_int8

    delta = read_pack(calibrated).delta
    Store(tmp_path / "int8").add_int8(open_int8(delta.fingerprint, delta.preprocess))
    return tmp_path / "int8"


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("spoil", [flipped, shifted, turned])
def test_a_wrong_number_is_found_on_the_int8_backbone(
    spoil: Callable[[Delta], Delta], runtime: str, calibrated: Path, int8_store: Path
) -> None:
    read, device = read_pack(calibrated), Device(int8_store)
    assert read.delta.probes.keys() == {"fp32", "int8"}

    device.install(calibrated, runtime=runtime)

    with pytest.raises(CheckError, match=f"task 'shapes' on {runtime}, int8: must answer its own probe"):
        device.install(encode_pack(spoil(read.delta)), runtime=runtime)


def test_other_codes_are_found_though_their_digest_is_right(
    calibrated: Path, int8_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepet.device import runtime as device_runtime

    real = device_runtime.task_slots

    def wrong(graph: Any, delta: Delta) -> Any:
        slots = real(graph, delta)
        values: dict[str, NpArray] = {name: value.copy() for name, value in slots.values.items()}
        name = next(name for name in sorted(values) if name.endswith(".steps"))
        values[name] = np.roll(values[name], 1)
        return replace(slots, values=values)

    monkeypatch.setattr(device_runtime, "task_slots", wrong)

    with pytest.raises(CheckError, match="must answer its own probe"):
        Device(int8_store).install(calibrated)


# ------------------------------------------------------------------------------------------------------- the format


def with_probe() -> bytes:
    probe = Probe(9, np.arange(6, dtype=np.float32).reshape(2, 3), 0.25)
    return encode_pack(make_delta(probes={"fp32": probe, "int8": replace(probe, seed=11)}))


def test_probes_come_out_as_they_went_in() -> None:
    data = with_probe()
    read = read_pack(data)

    assert manifest_of(data)["heads"][0]["probe"] == {
        "fp32": {"seed": 9, "tolerance": 0.25}, "int8": {"seed": 11, "tolerance": 0.25},
    }  # fmt: skip
    assert {name: (p.seed, p.tolerance, p.logits.tolist()) for name, p in read.delta.probes.items()} == {
        "fp32": (9, 0.25, [[0, 1, 2], [3, 4, 5]]), "int8": (11, 0.25, [[0, 1, 2], [3, 4, 5]]),
    }  # fmt: skip
    assert encode_pack(read.delta, kept=read.planes) == data


def probe_to(**told: object) -> bytes:
    return changed(with_probe(), lambda m, t: m["heads"][0]["probe"]["fp32"].update(told))


NEWER = "\n  fix: update edgepet if a newer version wrote this file"
SEED = f"pack.heads[0].probe.fp32: needs a seed below {2**53} and a tolerance above 0"


@pytest.mark.parametrize(("data", "said"), [
    (probe_to(seed=2**53), f"{SEED}, got [{2**53}, 0.25]"),
    (probe_to(tolerance=0), f"{SEED}, got [9, 0.0]"),
    (probe_to(tolerance=True), "pack.heads[0].probe.fp32.tolerance: needs a finite number, got True"),
    (probe_to(shape=[2, 3]), "pack.heads[0].probe.fp32: knows no key 'shape'" + NEWER),
    (changed(with_probe(), lambda m, t: m["heads"][0]["probe"].pop("int8")), "pack: knows no plane 'probe.class.int8'"),
    (changed(with_probe(), lambda m, t: t.pop("probe.class")), "pack: needs the plane 'probe.class'"),
    (changed(with_probe(), lambda m, t: m["heads"][0]["probe"].update(bf16={})),
     f"pack.heads[0].probe: knows no key 'bf16'{NEWER}"),
    (changed(with_probe(), lambda m, t: t.update({"probe.class": np.zeros(7, np.float32)})),
     "pack.heads[0].probe.fp32: probe.class: needs logits of 1 to 16 images, got 7 for 3 classes"),
    (changed(with_probe(), lambda m, t: t.update({"probe.class": np.zeros(6, np.float16)})),
     "pack: probe.class: must be fp32, got fp16"),
])  # fmt: skip
def test_a_malformed_probe_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(PackError) as refusal:
        read_pack(data)

    assert str(refusal.value) == said
