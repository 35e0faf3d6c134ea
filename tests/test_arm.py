"""The device side on emulated 64-bit ARM: install with its probe, predict, switch; and the numbers of x86."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgepet import Device
from edgepet.device.store import Store
from edgepet.images.preprocess import load_pixels, normalize
from tests.arm import Arm, made
from tests.flow import Tasks

RUNTIMES = ("onnxruntime", "openvino")
CLOSE = 1e-5  # of the largest logit: another processor's order of sums

# What an application on the device does; the last line is all that it prints.
SWITCHED = """
import json, platform, sys
import numpy as np
from edgepet import Device

store, images, *runtimes = sys.argv[1:]
images, found = np.load(images), {}
for runtime in runtimes:
    for mode in ("slots", "merged"):
        with Device(store) as device:
            opened = {task: device.open(task, runtime=runtime, mode=mode, threads=1) for task in ("shapes", "tints")}
            turns = [(task, opened[task](images)) for task in ("shapes", "tints", "shapes", "tints", "shapes")]
            same = all(np.array_equal(turns[number][1], turns[number % 2][1]) for number in range(5))
            answers = {task: logits.tolist() for task, logits in turns[:2]}
            found[f"{runtime} {mode}"] = {"same": same, **answers}
print(json.dumps({"machine": platform.machine(), "torch": "torch" in sys.modules, "found": found}))
"""


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    return made(tmp_path_factory.mktemp("arm"))


@pytest.mark.slow
def test_a_store_is_filled_and_asked_on_arm_as_on_x86(arm: Arm, store: Store, tasks: Tasks, tmp_path: Path) -> None:
    for pack in (tasks.shapes, tasks.tints):
        done = arm.python("-m", "edgepet", "device", "install", "--store", store.root, pack, "--json")
        assert done.returncode == 0, done.stderr
    paths = sorted((tasks.data / "test").glob("*/*.png"))[:2]
    said = arm.python("-m", "edgepet", "device", "run", "shapes,tints", *paths, "--store", store.root, "--json")
    assert said.returncode == 0, said.stderr
    preprocess = store.pack("shapes").delta.preprocess
    images = normalize(np.stack([load_pixels(path, preprocess) for path in paths]), preprocess)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "switched.py").write_text(SWITCHED)

    done = arm.python(tmp_path / "switched.py", store.root, tmp_path / "images.npy", *RUNTIMES)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["machine"], told["torch"]) == ("aarch64", False)
    assert len(told["found"]) == 2 * len(RUNTIMES)
    labels = [(each["task"], each["label"]) for each in json.loads(said.stdout)["results"]]
    with Device(store.root) as here:
        for task in ("shapes", "tints"):
            expected = here.open(task, threads=1)(images)
            for form, found in told["found"].items():
                assert found["same"], form
                apart = np.abs(np.array(found[task]) - expected).max()
                assert apart <= CLOSE * np.abs(expected).max(), (form, task)
            names = [answer.label for answer in here.open(task, threads=1).predict(paths)]
            assert [label for asked, label in labels if asked == task] == names


@pytest.mark.slow
def test_slots_of_another_size_reach_no_runtime_on_arm(arm: Arm, store: Store, tasks: Tasks, tmp_path: Path) -> None:
    program = tmp_path / "sizes.py"
    program.write_text(
        """
import sys
from pathlib import Path
import numpy as np
from edgepet.device.fitting import fit, opened
from edgepet.device.runtimes import RUNTIMES
from edgepet.device.store import Store
from edgepet.errors import InputError

store, task, *runtimes = sys.argv[1:]
store = Store(Path(store))
pack = store.pack(task)
fitted = fit(store.graph_of(pack), pack.delta, "slots")
for runtime in runtimes:
    network = opened(RUNTIMES[runtime], fitted.part, {}, 1)
    for name, value in fitted.slots.items():
        wrong = {**fitted.slots, name: np.zeros((*value.shape[:-1], value.shape[-1] + 1), np.float32)}
        try:
            network.bind(wrong)
        except InputError as error:
            continue
        sys.exit(f"{runtime} took {name}")
print(len(fitted.slots))
"""
    )
    Device(store.root).install(tasks.tints)

    done = arm.python(program, store.root, "tints", *RUNTIMES)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
