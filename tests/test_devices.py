"""``--device``: what this machine has, asked by name; anything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgepet import Device
from edgepet.device.runtimes import DEVICES, RUNTIMES, shared_runtime
from edgepet.device.served import place_of
from edgepet.device.store import Store
from edgepet.errors import InputError
from tests.flow import RUNTIMES as SHARED
from tests.flow import Artifacts, Tasks, needs_openvino, refused
from tests.flow import edgepet as command


@pytest.fixture
def device(store: Store, tasks: Tasks) -> Device:
    made = Device(store.root)
    made.install(tasks.shapes)
    made.install(tasks.tints)
    return made


@pytest.fixture
def image(tasks: Tasks) -> Path:
    return sorted((tasks.data / "test").glob("*/*.png"))[0]


def missing(runtime: str) -> str:
    return next(name for name in DEVICES[::-1] if name not in RUNTIMES[runtime].devices())


@pytest.mark.parametrize("runtime", SHARED)
def test_every_runtime_has_the_cpu(runtime: str) -> None:
    here = RUNTIMES[runtime].devices()

    assert here["cpu"] == RUNTIMES[runtime].where
    assert set(here) <= set(DEVICES)
    assert RUNTIMES[runtime].on("cpu") is RUNTIMES[runtime].on(None) is RUNTIMES[runtime]


@pytest.mark.parametrize("runtime", SHARED)
def test_the_cpu_by_name_answers_as_without(device: Device, image: Path, runtime: str) -> None:
    plain = device.run("shapes", [image], runtime=runtime, threads=1)

    named = device.run("shapes", [image], runtime=runtime, threads=1, device="cpu")

    assert named.results == plain.results


@pytest.mark.parametrize("runtime", SHARED)
@pytest.mark.parametrize("verb", ["predict", "run", "stream", "bench", "device bench"])
def test_a_device_that_is_not_there_is_refused_by_name(
    device: Device, tasks: Tasks, artifacts: Artifacts, image: Path, runtime: str, verb: str
) -> None:
    name = missing(runtime)
    asked = ("--runtime", runtime, "--device", name)
    words = {
        "predict": ("predict", tasks.shapes, image, *asked),
        "run": ("device", "run", "--store", device.store, "shapes,tints", image, *asked),
        "stream": ("device", "run", "--store", device.store, "shapes", "-", *asked),
        "bench": ("bench", tasks.shapes, *asked),
        "device bench": ("device", "bench", "--store", device.store, *asked),
    }[verb]

    assert refused(3, *words) == (
        f"--device: is none that {runtime} has on this machine, got {name!r}\n"
        f"  fix: use one of: {', '.join(RUNTIMES[runtime].devices())}\n"
    )


def test_several_packs_and_an_artefact_are_asked_there_too(tasks: Tasks, artifacts: Artifacts, image: Path) -> None:
    name = missing("onnxruntime")

    for models in ((tasks.shapes, tasks.tints), (artifacts.of("shapes", "onnx"),)):
        assert refused(3, "predict", *models, image, "--device", name).startswith(
            f"--device: is none that onnxruntime has on this machine, got {name!r}"
        )


def test_torch_has_the_cpu_alone(tasks: Tasks, image: Path) -> None:
    assert refused(3, "predict", tasks.shapes, image, "--runtime", "torch", "--device", "cuda") == (
        "--device: is none that --runtime torch runs on here, got 'cuda'\n  fix: use one of: cpu\n"
    )


def test_bench_takes_the_runtimes_that_have_the_device(tasks: Tasks) -> None:
    done = command("bench", tasks.shapes, "--rounds", 2, "--threads", 1, "--device", "cpu", "--json")

    rows = json.loads(done.out)["rows"]
    assert {row["device"] for row in rows} == {"cpu"}
    assert {row["runtime"] for row in rows} >= {"onnxruntime", "torch"}


@needs_openvino
def test_bench_says_what_the_runtimes_have_where_none_has_the_device(tasks: Tasks) -> None:
    if any("npu" in RUNTIMES[name].devices() for name in ("onnxruntime", "openvino")):
        pytest.skip("this machine has an NPU")
    told = refused(3, "bench", tasks.shapes, "--device", "npu")
    assert told.startswith("--device: has nothing to run on it; onnxruntime: cpu")
    assert told.endswith("torch: cpu; tensorrt: gpu, cuda, got 'npu'\n")


def test_a_pack_that_is_refused_on_a_gpu_may_answer_on_the_cpu() -> None:
    row = RUNTIMES["openvino"]
    with_a_gpu = replace(row, devices=lambda: {"cpu": "CPU", "gpu": "GPU.0"})

    there = with_a_gpu.on("gpu")

    assert (there.device, there.where) == ("gpu", "GPU.0")
    assert [place_of(each, "int8") for each in (row, there)] == ["openvino int8", "openvino gpu int8"]
    assert RUNTIMES["tensorrt"].place == "tensorrt"


def test_a_row_stands_for_its_name() -> None:
    row = shared_runtime("onnxruntime", purpose="a test")
    assert shared_runtime(row, purpose="a test") is row
    with pytest.raises(InputError, match=r"^`device`: is none that onnxruntime has on this machine"):
        shared_runtime(row, purpose="a test", device=missing("onnxruntime"))
