"""Hostile and unlucky input: one message, an exit code, nothing lost, no hang, no traceback.

Malformed packs have tests of their own, in ``test_pack``, and so have folders with a manifest, in ``test_manifest``.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from edgepet.cli.options import ends_by_sigterm, harmless
from edgepet.deltas.updates import Scale
from edgepet.device.runtime import open_task
from edgepet.device.store import Store
from edgepet.errors import EdgepetError, InputError
from edgepet.files import new_folder
from edgepet.graphs.base import BaseGraph
from edgepet.images.preprocess import load_pixels
from edgepet.packs.pack import read_pack, write_pack
from edgepet.reports.progress import Step
from edgepet.spec import Preprocess
from edgepet.tuning.options import TrainOptions
from edgepet.verbs.train import train
from tests.flow import CLASSES, Artifacts, Tasks, draw_shapes, edgepet, has_openvino, refused, train_arguments

STALLED = 60  # seconds: nothing here takes one


def run(*arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, which may not hang."""
    command = [sys.executable, "-m", "edgepet", *map(str, arguments)]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, timeout=STALLED, check=False, **how)


# ----------------------------------------------------------------------------------------------- what is not a file

KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "a pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "a folder": (Path.mkdir, "a folder"),
}


@pytest.mark.parametrize(("make", "got"), KINDS.values(), ids=KINDS)
def test_a_pack_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object], got: str) -> None:
    pack = tmp_path / "a.pet"
    make(pack)

    assert refused(3, "merge", pack, "-o", tmp_path / "m.safetensors") == (
        f"{pack}: must be a regular file, got {got}\n"
    )


@pytest.mark.parametrize(("make", "got"), KINDS.values(), ids=KINDS)
def test_an_image_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object], got: str) -> None:
    make(tmp_path / "a.png")
    del got  # the three are one message

    with pytest.raises(InputError) as caught:
        load_pixels(tmp_path / "a.png", Preprocess(image_size=(32, 32)))

    assert "a folder, a pipe or a device" in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (13000, 13000)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 30_000

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        load_pixels(tmp_path / "a.png", Preprocess(image_size=(32, 32)))

    assert str(caught.value) == (
        f"{tmp_path / 'a.png'}: must have at most 100000000 pixels, got 13000 x 13000\n"
        "  fix: make the image smaller or remove it"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB; decoded it takes 169 MB and more


# -------------------------------------------------------------------------------------------------- absurd numbers

NUMBERS = {
    "seed": (["--seed", "99999999999999999999999"], "--seed: must be at least 0 and below 9223372036854775808"),
    "lr": (["--lr", "1e300"], "--lr: must be at most 1e+06, got 1e+300"),
    "image size": (["--img-size", "1000000"], "must be at most 8192"),
    "checkpoints": (["--checkpoint-every", "nan"], "--checkpoint-every: must be at least 0 and finite, got nan"),
}


@pytest.mark.parametrize(("options", "told"), NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_nothing_can_use_is_refused(tasks: Tasks, tmp_path: Path, options: list[str], told: str) -> None:
    said = edgepet(*train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet"), *options, "--quiet")

    assert said.code in (2, 3), said.err
    assert told in said.err
    assert not (tmp_path / "a.pet").exists()


@pytest.mark.parametrize("verb", ["bench", "eval"])
def test_as_many_threads_as_no_machine_has_are_refused(artifacts: Artifacts, tasks: Tasks, verb: str) -> None:
    data = [] if verb == "bench" else [tasks.data]
    told = refused(3, verb, artifacts.of("shapes", "onnx"), *data, "--threads", 10**14)
    assert told.startswith("--threads: must be at most 1024, got 100000000000000")


def test_more_memory_than_there_is_is_one_message(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def eat(*args: object, **how: object) -> None:
        raise MemoryError

    monkeypatch.setattr("edgepet.verbs.bench.measure", eat)
    assert refused(3, "bench", artifacts.of("shapes", "onnx"), "--batch", 10**7).startswith(
        "bench: needs more memory than there is\n  fix: ask for less"
    )


# ----------------------------------------------------------------------------------------------- what is destroyed


def test_a_merge_over_its_input_is_refused(tasks: Tasks, tmp_path: Path) -> None:
    pack, weights = tmp_path / "shapes.pet", tmp_path / "vit.safetensors"
    shutil.copy(tasks.shapes, pack)
    architecture, _, source = tasks.spec.partition("@")
    shutil.copy(source, weights)
    before = pack.read_bytes(), weights.read_bytes()

    told = refused(3, "merge", pack, "--backbone", tasks.spec, "-o", pack)
    assert told == f"{pack}: is {pack}, which is read\n  fix: name another output\n"
    told = refused(3, "merge", pack, "--backbone", f"{architecture}@{weights}", "-o", weights)
    assert told == f"{weights}: is {weights}, which is read\n  fix: name another output\n"
    assert (pack.read_bytes(), weights.read_bytes()) == before


def test_an_export_does_not_replace_somebodys_folder(tasks: Tasks, artifacts: Artifacts, tmp_path: Path) -> None:
    place = tmp_path / "shapes-onnx-fp32"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")

    told = refused(3, "export", tasks.shapes, "--backbone", tasks.spec, "-o", tmp_path)

    assert told == (
        f"{place}: holds files that would be lost, got thesis.tex\n  fix: name another place, or move what is there\n"
    )
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]


def test_a_work_folder_that_is_somebodys_own_is_refused_before_training(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "a.work").mkdir()
    (tmp_path / "a.work" / "notes.txt").touch()

    told = refused(3, *train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet"))

    assert told.startswith(f"{tmp_path / 'a.work'}: holds files that would be lost, got notes.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.work"]


def test_sigterm_ends_what_runs_as_an_interrupt_does_and_clears_it_away(tmp_path: Path) -> None:
    def half() -> None:
        with ends_by_sigterm(), new_folder(tmp_path / "out") as scratch:
            (scratch / "half").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    with pytest.raises(KeyboardInterrupt, match="terminated"):
        half()

    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ------------------------------------------------------------------------------------------ what cannot be written


@pytest.mark.parametrize("verb", ["train", "export"])
def test_a_cache_that_cannot_be_made_is_named_before_the_work(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("EDGEPET_CACHE", "/dev/null/x")
    export = ["export", tasks.shapes, "--backbone", tasks.spec, "-o", tmp_path / "out"]
    train = train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet")

    told = refused(3, *(train if verb == "train" else export))

    assert told.startswith("/dev/null/x")
    assert "got Not a directory" in told
    assert not list(tmp_path.glob("*.pet"))


@pytest.mark.skipif(not has_openvino, reason="needs the package openvino")
def test_a_disk_that_fills_under_openvino_is_an_input_error(tasks: Tasks, artifacts: Artifacts, tmp_path: Path) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    del artifacts  # the graph is in the cache, so that only the export writes
    done = run("export", tasks.shapes, "--backbone", tasks.spec, "--to", "openvino", "-o", tmp_path, "--quiet",
               preexec_fn=small_files)  # fmt: skip

    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_store_on_a_full_disk_takes_nothing(
    graph: BaseGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def full(*args: object, **how: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.link", no_link)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError) as caught:
        Store(tmp_path / "device").add_graph(graph)

    monkeypatch.undo()
    assert "No space left on device" in str(caught.value)
    assert [path for path in (tmp_path / "device").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_who_leaves_is_told_nothing(tasks: Tasks, options: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    done = run("inspect", tasks.shapes, *options, stdout=writer)

    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_that_nobody_reads_stops_nothing(tasks: Tasks, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet")

    done = subprocess.run([sys.executable, "-m", "edgepet", *map(str, command)], stderr=writer, timeout=STALLED)

    os.close(writer)
    assert done.returncode == 0
    assert read_pack(tmp_path / "a.pet").delta.task == "a"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_under_stdout_is_an_error(tasks: Tasks, options: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run("inspect", tasks.shapes, *options, stdout=full)

    assert (done.returncode, done.stderr) == (3, "stdout: could not be written, got No space left on device\n")


def test_a_closed_stdout_is_an_error(tasks: Tasks) -> None:
    done = run("inspect", tasks.shapes, preexec_fn=lambda: os.close(1))

    assert done.returncode == 3
    assert done.stderr == "stdout: is closed\n  fix: write the report to a file or a pipe\n"


# ------------------------------------------------------------------------------------------------- what is damaged


def test_a_checkpoint_without_a_part_of_its_progress_is_refused(tasks: Tasks, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if step.epoch == 2:
            raise KeyboardInterrupt

    command = train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet")
    options = TrainOptions(image_size=32, epochs=3, batch_size=8, precision="fp32")
    with pytest.raises(KeyboardInterrupt):
        train(tasks.data, tasks.spec, "ssf", tmp_path / "a.pet", options=options, say=stop)
    checkpoint = tmp_path / "a.checkpoint"
    tensors = safetensors.numpy.load(checkpoint.read_bytes())
    facts = json.loads(tensors.pop("facts").tobytes())
    del facts["progress"]["best"]
    text = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    checkpoint.write_bytes(safetensors.numpy.save({**tensors, "facts": np.frombuffer(text, np.uint8)}))

    told = refused(3, *command, "--epochs", 3, "--resume")

    assert told.startswith(f"{checkpoint}: is no whole checkpoint, got ")


def test_a_work_folder_with_a_tensor_of_another_shape_is_refused(tasks: Tasks, tmp_path: Path) -> None:
    shutil.copy(tasks.shapes, tmp_path)
    shutil.copytree(tasks.shapes.with_suffix(".work"), tmp_path / "shapes.work")
    file = tmp_path / "shapes.work" / "method.safetensors"
    tensors = safetensors.numpy.load(file.read_bytes())
    name = min(name for name in tensors if "/" in name)
    safetensors.numpy.save_file({**tensors, name: tensors[name][:-1].copy()}, file)

    told = refused(3, "merge", tmp_path / "shapes.pet", "--backbone", tasks.spec, "-o", tmp_path / "m.safetensors")

    assert told.startswith(f"{tmp_path / 'shapes.work'}: ")
    assert not (tmp_path / "m.safetensors").exists()


# ------------------------------------------------------------------------------------------------ what is believed


def spoiled(tasks: Tasks, place: Path) -> Path:
    """A pack of finite values, of which a product is none."""
    delta = read_pack(tasks.shapes).delta
    updates = [
        replace(of, update=Scale(np.full(of.update.s.shape, 3e38, np.float32))) if isinstance(of.update, Scale) else of
        for of in delta.updates
    ]
    write_pack(place, replace(delta, task="spoiled", updates=tuple(updates)), codec="fp32")
    return place


def test_finite_values_that_fold_to_infinity_are_neither_installed_nor_merged(
    tasks: Tasks, store: Store, tmp_path: Path
) -> None:
    pack = spoiled(tasks, tmp_path / "spoiled.pet")
    before = sorted(store.root.rglob("*"))

    with pytest.raises(InputError) as caught:
        store.install(pack)

    assert str(caught.value).startswith("task 'spoiled': ")
    assert str(caught.value).endswith(": must be finite when folded, got NaN or infinity")
    assert [path for path in sorted(store.root.rglob("*")) if path not in before and path.suffix == ".pet"] == []
    told = refused(3, "merge", pack, "--backbone", tasks.spec, "-o", tmp_path / "m.safetensors")
    assert told == f"{caught.value}\n"
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("runtime", ["onnxruntime", *(["openvino"] if has_openvino else [])])
def test_an_answer_that_is_no_number_is_refused(tasks: Tasks, graph: BaseGraph, runtime: str) -> None:
    with open_task(graph, read_pack(tasks.shapes).delta, runtime=runtime) as network:
        images = np.full((1, 3, 32, 32), np.nan, np.float32)
        with pytest.raises(EdgepetError, match="finite"):
            network(images)


# ------------------------------------------------------------------------------------------------ on the terminal

TEXTS = {
    "a colour": ("\x1b[31mred", "�[31mred"),
    "a title": ("\x1b]0;PWNED\x07", "�]0;PWNED�"),
    "a return": ("good\rbad", "good�bad"),
    "a C1 code": ("\x9b31m", "�31m"),
    "text that turns round": ("a\u202eb", "a�b"),
    "a lone surrogate": ("a\udc80", "a�"),
    "letters": ("Käfer, 甲虫", "Käfer, 甲虫"),
}


@pytest.mark.parametrize(("text", "shown"), TEXTS.values(), ids=TEXTS)
def test_codes_are_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_a_pack_cannot_steer_the_terminal_or_forge_a_line(tasks: Tasks, tmp_path: Path) -> None:
    forged = "bee\n  val 99.9 %; signed by: ACME"
    delta = read_pack(tasks.shapes).delta
    labels = ("\x1b]0;PWNED\x07ant", forged, *delta.labels[2:])
    write_pack(tmp_path / "a.pet", replace(delta, labels=labels))

    said = edgepet("inspect", tmp_path / "a.pet")

    assert said.code == 0
    assert "\x1b" not in said.out
    assert "\n  val 99.9" not in said.out
    assert edgepet("inspect", tmp_path / "a.pet", "--json").json["classes"] == list(labels)


def test_a_files_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    draw_shapes(tmp_path)
    (tmp_path / "train" / CLASSES[0] / "\x1b[31m.png").write_bytes(b"x")

    told = refused(3, "train", tmp_path, "--backbone", "test_vit@none.pth", "--method", "bitfit", "-o", "t.pet")

    assert "\x1b" not in told
