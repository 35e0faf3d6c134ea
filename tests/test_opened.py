"""Tasks of a store that are kept open: pictures in, answers out, shared networks, and what memory allows."""

from __future__ import annotations

import io
import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgepet import Device, read_pack, write_pack
from edgepet.device.pool import Pool
from edgepet.device.runtime import open_task
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.images.preprocess import load_pixels, normalize
from edgepet.packs.pack import Pack
from edgepet.spec import NpArray
from tests.flow import RUNTIMES, Tasks
from tests.flow import edgepet as command

TASKS = ("shapes", "tints", "probe", "probe-too")


@pytest.fixture
def device(store: Store, tasks: Tasks, tmp_path: Path) -> Device:
    """SSF and LoRA on all blocks, and two linear probes of the same labels."""
    made = Device(store.root)
    made.install(tasks.shapes)
    made.install(tasks.tints)
    for name, pack in (("probe", tasks.shapes), ("probe-too", tasks.tints)):
        delta = replace(read_pack(pack).delta, task=name, updates=(), probes={})
        write_pack(tmp_path / f"{name}.pet", delta)
        made.install(tmp_path / f"{name}.pet")
    return made


@pytest.fixture
def paths(tasks: Tasks) -> list[Path]:
    return sorted((tasks.data / "test").glob("*/*.png"))[:4]


def logits_of(device: Device, task: str, path: Path, runtime: str = "onnxruntime") -> NpArray:
    store = Store(Path(device.store))
    delta = store.pack(task).delta
    with open_task(store.graph_of(store.pack(task)), delta, runtime=runtime, threads=1) as network:
        return network(normalize(load_pixels(path, delta.preprocess)[None], delta.preprocess))[0]


# ---------------------------------------------------------------------------------------------------------- pictures


def test_files_pil_images_and_arrays_have_the_same_answer(device: Device, paths: list[Path]) -> None:
    with device.open("shapes") as shapes:
        files = shapes.predict(paths)
        pictures = shapes.predict([Image.open(path) for path in paths])
        arrays = shapes.predict([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        alone = shapes.predict(paths[0])

    assert [answer.image for answer in files] == [path.name for path in paths]
    assert [answer.image for answer in pictures] == ["0", "1", "2", "3"]
    assert [answer.score for answer in files] == [answer.score for answer in pictures]
    assert [answer.score for answer in files] == [answer.score for answer in arrays]
    assert alone == files[:1]


def test_a_photograph_that_lies_on_its_side_is_turned(device: Device, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    upright.save(tmp_path / "upright.png")

    with device.open("shapes") as shapes:
        lying, standing = shapes.predict([tmp_path / "lying.png", tmp_path / "upright.png"])
        opened = shapes.predict(Image.open(tmp_path / "lying.png"))

    assert lying.score == standing.score == opened[0].score


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([], "images: needs an image, got none"),
        ([7], "image 0: must be a path, a PIL image or an array, got int"),
        (np.zeros((4, 4, 3), np.float32), "image 0: must be uint8 (H, W, 3), RGB, got float32 (4, 4, 3)"),
        (np.zeros((4, 4), np.uint8), "image 0: must be uint8 (H, W, 3), RGB, got uint8 (4, 4)"),
        (
            Image.new("I;16", (4, 4)),
            "image: must have 8 bits a channel, got 16-bit values, which would be cut off at 255\n"
            "  fix: scale it to 8 bits a channel",
        ),
    ],
)
def test_what_is_no_picture_is_refused(device: Device, images: Any, told: str) -> None:
    with device.open("shapes") as shapes, pytest.raises(InputError) as refused:
        shapes.predict(images)
    assert str(refused.value) == told


def test_the_best_classes_are_told_in_their_order(device: Device, paths: list[Path]) -> None:
    with device.open("shapes") as shapes:
        (answer,) = shapes.predict(paths[0], top=3)

    logits = logits_of(device, "shapes", paths[0]).astype(np.float64)
    best = np.argsort(-logits)[:3]
    scores = np.exp(logits) / np.exp(logits).sum()
    assert [guess.label for guess in answer.top] == [shapes.labels[k] for k in best]
    assert [guess.score for guess in answer.top] == pytest.approx(scores[best].tolist(), abs=1e-4)
    assert (answer.label, answer.score, answer.task) == (answer.top[0].label, answer.top[0].score, "shapes")


# ------------------------------------------------------------------------------------------------------------ sharing


@pytest.mark.parametrize("mode", ["auto", "slots", "merged"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_tasks_on_a_picture_answer_as_each_by_itself(
    device: Device, paths: list[Path], runtime: str, mode: str
) -> None:
    with device.open_all(TASKS, runtime=runtime, mode=mode, threads=1) as opened:
        found = opened.predict(paths, top=3)
        shared = opened.shared

    assert [(each.after, each.tasks) for each in shared] == [
        ("patch_embed.proj", ("tints", "probe", "probe-too")),  # LoRA leaves it as it is
        ("features", ("probe", "probe-too")),
    ]
    for path, answers in zip(paths, found, strict=True):
        assert tuple(answers) == TASKS
        for task, answer in answers.items():
            logits = logits_of(device, task, path, runtime).astype(np.float64)
            scores = np.sort(np.exp(logits) / np.exp(logits).sum())[::-1]
            assert [guess.score for guess in answer.top] == pytest.approx(scores[:3].tolist(), abs=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_from_task_to_task_and_back_the_answers_have_the_same_bits(
    device: Device, paths: list[Path], runtime: str
) -> None:
    preprocess = Store(Path(device.store)).pack("shapes").delta.preprocess
    images = normalize(np.stack([load_pixels(path, preprocess) for path in paths]), preprocess)
    opened = {task: device.open(task, runtime=runtime, mode="slots", threads=1) for task in TASKS}
    first = {task: network(images) for task, network in opened.items()}
    order = random.Random(0).choices(TASKS, k=60)

    again = [(task, opened[task](images)) for task in order]

    assert all(np.array_equal(first[task], got) for task, got in again)
    device.close()


def test_tasks_opened_with_the_same_settings_share_networks(
    device: Device, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pack(tmp_path / "twin.pet", replace(read_pack(tasks.shapes).delta, task="twin"))
    device.install(tmp_path / "twin.pet")
    opened = list[object]()
    real = Pool.open

    def counted(pool: Pool, pack: Pack) -> Any:
        opened.append(pool)
        return real(pool, pack)

    monkeypatch.setattr(Pool, "open", counted)

    with device.open("shapes") as shapes, device.open("twin") as twin, device.open("shapes", mode="merged"):
        assert len(set(map(id, opened))) == 2
        assert shapes.labels == twin.labels


def test_threads_on_shared_networks_do_not_disturb_one_another(device: Device, paths: list[Path]) -> None:
    with device.open_all(TASKS, threads=1) as opened:
        expected = opened.predict(paths)
        wrong = list[object]()

        def ask(seed: int) -> None:
            chosen = random.Random(seed)
            for _ in range(6):
                k = chosen.randrange(len(paths))
                got = opened.predict(paths[k])
                if got[0] != expected[k]:
                    wrong.append(got)

        workers = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    assert wrong == []


def test_a_task_that_is_closed_leaves_the_others_open(device: Device, paths: list[Path]) -> None:
    first, second = device.open("shapes"), device.open("tints")
    before = second.predict(paths)

    first.close()
    first.close()

    assert second.predict(paths) == before
    second.close()


# ------------------------------------------------------------------------------------------------------ what it holds


def size_of_own(device: Device, task: str) -> int:
    store = Store(Path(device.store))
    graph, delta = store.graph_of(store.pack(task)), store.pack(task).delta
    return graph.weights_bytes + sum(graph.base.tensors[name].nbytes for name in delta.targets)


def test_the_network_that_was_used_longest_ago_makes_room(device: Device, paths: list[Path]) -> None:
    room = size_of_own(device, "shapes") + size_of_own(device, "tints") // 2

    opened = {task: device.open(task, mode="merged", memory_bytes=room, threads=1) for task in ("shapes", "tints")}
    answers = [opened[task].predict(paths[0])[0].score for task in ("shapes", "tints", "tints", "shapes")]

    told = [(event.task, event.what) for event in opened["shapes"].events]
    there = [("shapes", "evicted"), ("tints", "merged")]
    back = [("tints", "evicted"), ("shapes", "merged")]
    assert told == [("shapes", "merged"), *there, *back, *there, *back]
    assert (answers[0], answers[1]) == (answers[3], answers[2])
    device.close()


def test_a_network_that_memory_has_no_room_for_is_refused(device: Device) -> None:
    with pytest.raises(InputError) as refused:
        device.open("shapes", mode="merged", memory_bytes=1000)
    assert str(refused.value) == (
        f"task 'shapes': needs {size_of_own(device, 'shapes') / 1e6:.1f} MB for a network of its own,"
        " got `memory_bytes=1.0 kB`\n  fix: allow more, or `mode=slots`"
    )


def test_a_task_in_slots_is_merged_once_that_pays(
    device: Device, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepet.device.pool.SCALES_COST", 1e6)

    with device.open("shapes", memory_bytes=10**9, threads=1) as shapes:
        in_slots = shapes.predict(paths[0])
        merged = shapes.predict(paths[0])
        told = [(event.task, event.what, event.why) for event in shapes.events]

    assert told == [("shapes", "merged", "slots have cost as much as folding")]
    assert merged[0].score == pytest.approx(in_slots[0].score, abs=1e-5)


def test_a_second_task_of_one_form_does_not_merge_at_once(
    device: Device, tasks: Tasks, paths: list[Path], tmp_path: Path
) -> None:
    write_pack(tmp_path / "twin.pet", replace(read_pack(tasks.shapes).delta, task="twin"))
    device.install(tmp_path / "twin.pet")

    with (
        device.open("shapes", memory_bytes=10**9, threads=1),
        device.open("twin", memory_bytes=10**9, threads=1) as twin,
    ):
        twin.predict(paths[:2])
        assert twin.events == ()


def test_without_a_limit_a_task_stays_in_slots(
    device: Device, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepet.device.pool.SCALES_COST", 1e6)

    with device.open("shapes", threads=1) as shapes:
        shapes.predict([paths[0]] * 1 + paths[1:])
        assert shapes.events == ()


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mode": "fast"}, "`mode`: is one of auto, merged, slots, got 'fast'"),
        ({"precision": "fp16"}, "`precision`: is fp32 or int8 for a pack, got 'fp16'"),
        (
            {"precision": "int8", "mode": "merged"},
            "`mode`: is slots in int8: all tasks share the codes, got merged\n"
            "  fix: export the task, whose int8 is then its own",
        ),
        (
            {"runtime": "tensorrt"},
            "`runtime`: is one of onnxruntime, openvino for a pack on a shared backbone, got 'tensorrt'",
        ),
    ],
)
def test_settings_that_are_none_are_refused(device: Device, settings: Any, told: str) -> None:
    with pytest.raises(InputError) as refused:
        device.open("shapes", **settings)
    assert str(refused.value) == told


def test_a_pack_that_fails_among_others_is_replaced_by_the_one_before(
    device: Device, tasks: Tasks, paths: list[Path], tmp_path: Path
) -> None:
    expected = device.run("shapes", paths[:1]).results[0]
    delta = read_pack(tasks.shapes).delta
    write_pack(tmp_path / "wrong.pet", delta, sequence=5)
    device.install(tmp_path / "wrong.pet")
    store = Store(Path(device.store))
    wrong = store.pack_path(store.now().tasks["shapes"].active)
    wrong.chmod(0o644)
    wrong.write_bytes(wrong.read_bytes()[:-1])

    with device.open_all(TASKS, threads=1) as opened:
        found = opened.predict(paths[:1])
        told = opened.fell_back

    assert found[0]["shapes"].label == expected.label
    assert told == {"shapes": "is damaged or missing, got another sha256 than its name"}


def test_a_task_that_is_not_there_is_refused_by_name(device: Device) -> None:
    for ask in (lambda: device.open("nobody"), lambda: device.open_all(("shapes", "nobody"))):
        with pytest.raises(InputError) as refused:
            ask()
        assert str(refused.value).startswith(f"{device.store}: has no task 'nobody'")


# ------------------------------------------------------------------------------------------------- on the command line


def test_device_run_asks_several_tasks_at_once(device: Device, paths: list[Path]) -> None:
    done = command("device", "run", "--store", device.store, "probe,probe-too,tints", *paths[:2], "--top", 2, "--json")

    said = json.loads(done.out)
    assert done.code == 0
    assert [(each["image"], each["task"]) for each in said["results"]] == [
        (path.name, task) for path in paths[:2] for task in ("probe", "probe-too", "tints")
    ]
    assert said["shared"][-1] == {"after": "features", "tasks": ["probe", "probe-too"]}
    assert all(len(each["top"]) == 2 for each in said["results"])
    assert said["switch_ms"] <= said["open_ms"]
    shown = command("device", "run", "--store", device.store, "probe,probe-too,tints", *paths[:2])
    assert "up to features computed once for probe, probe-too" in shown.out
    assert ["image", "probe", "probe-too", "tints"] in [line.split() for line in shown.out.splitlines()]


def test_a_mode_of_one_task_is_taken_by_device_run(device: Device, paths: list[Path]) -> None:
    scores = [
        json.loads(command("device", "run", "--store", device.store, "shapes", paths[0], "--mode", mode, "--json").out)
        for mode in ("auto", "slots", "merged")
    ]
    assert [each["results"][0]["label"] for each in scores] == [scores[0]["results"][0]["label"]] * 3
    assert scores[0]["results"] == scores[1]["results"]


def test_device_bench_times_tasks_alone_and_together(device: Device) -> None:
    done = command(
        "device",
        "bench",
        "--store",
        device.store,
        "probe",
        "probe-too",
        "shapes",
        "--rounds",
        3,
        "--threads",
        1,
        "--json",
    )

    said = json.loads(done.out)
    assert [row["model"] for row in said["rows"]] == ["probe", "probe-too", "shapes", "all together"]
    assert all(row["n"] == 3 and row["threads"] == 1 and row["p50_ms"] > 0 for row in said["rows"])
    assert said["together_over_sum"] == pytest.approx(
        said["rows"][-1]["p50_ms"] / sum(row["p50_ms"] for row in said["rows"][:-1])
    )
    assert said["shared"] == [{"after": "features", "tasks": ["probe", "probe-too"]}]
    assert isinstance(said["switch_ms"], float)
    shown = command("device", "bench", "--store", device.store, "shapes", "--rounds", 2, "--mode", "merged")
    assert "from task to task" not in shown.out
    assert "merged" in shown.out


def test_a_store_without_a_task_has_nothing_to_time(store: Store) -> None:
    done = command("device", "bench", "--store", store.root)
    assert (done.code, done.err.splitlines()[-2:]) == (
        3, [f"{store.root}: has no task to time", "  fix: edgepet device install"],
    )  # fmt: skip


def test_lines_of_stdin_are_answered_as_they_come(
    device: Device, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        str(paths[0]),
        "",
        json.dumps(str(paths[1])),
        json.dumps({"image": str(paths[2]), "frame": 7}),
        str(tmp_path / "missing.png"),
        '{"picture": 1}',
        '{"image":',
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))

    done = command("device", "run", "--store", device.store, "probe,shapes", "-", "--json")

    said = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 3
    assert [each["image"] for each in said] == [*map(str, paths[:3]), str(tmp_path / "missing.png"), *lines[5:]]
    assert [[answer["task"] for answer in each["results"]] for each in said] == [["probe", "shapes"]] * 3 + [[]] * 3
    assert (
        said[3]["error"] == f"{tmp_path / 'missing.png'}: is not a readable image, got No such file or directory\n"
        "  fix: replace the file or remove it"
    )
    assert said[4]["error"] == 'line: needs a text, or an object with "image", got \'{"picture": 1}\''
    assert said[5]["error"].startswith("line: is no JSON, got Expecting value")
    with device.open("shapes") as shapes:
        assert said[0]["results"][1]["score"] == pytest.approx(shapes.predict(paths[0])[0].score, abs=1e-5)


def test_a_stream_that_is_answered_whole_ends_well(
    device: Device, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{paths[0]}\n"))

    done = command("device", "run", "--store", device.store, "shapes", "-")

    assert done.code == 0
    assert done.out.startswith(f"{paths[0]}  shapes ")
