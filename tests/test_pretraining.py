"""PVP: ``pretrain`` keeps a method's tensors, ``train --init`` starts from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepet.packs.pack import read_pack
from edgepet.tuning.work_folder import read_work
from tests.flow import Tasks, edgepet, refused, train_arguments
from tests.tiny import same_bits, tiny_vit


def arguments(tasks: Tasks, data: Path, output: Path, *more: object, method: str = "lora") -> list[object]:
    verb = "pretrain" if output.suffix == ".work" else "train"
    return [verb, *train_arguments(tasks.spec, data, method, output)[1:], *more]


@pytest.fixture(scope="module")
def broad(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA tuned on three classes; the tasks of the tests have two of them."""
    folder = tmp_path_factory.mktemp("broad")
    said = edgepet(*arguments(tasks, tasks.data, folder / "broad.work", "--lr", 0.05, "--json"))
    assert said.code == 0, said.err
    assert (said.json["path"], said.json["classes"]) == (str(folder / "broad.work"), 3)
    assert said.json["max_abs_diff"] <= 1e-9
    assert sorted(path.name for path in folder.iterdir()) == ["broad.work"]
    return folder / "broad.work"


@pytest.fixture
def task(tasks: Tasks, tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("circle", "square"):
            shutil.copytree(tasks.data / split / name, tmp_path / "data" / split / name)
    return tmp_path / "data"


def test_a_training_starts_from_the_tensors_and_with_a_head_of_its_own(
    tasks: Tasks, broad: Path, task: Path, tmp_path: Path
) -> None:
    said = edgepet(*arguments(tasks, task, tmp_path / "t.pet", "--init", broad, "--lr", 1e-30, "--json"))

    assert said.code == 0, said.err
    began, ended = read_work(broad), read_work(tmp_path / "t.work")
    assert same_bits(dict(ended.tensors), dict(began.tensors))
    assert any(name.endswith("up.q") or value.any() for name, value in began.tensors.items())
    assert ended.head.weight.shape[0] == 2
    assert str(read_pack(tmp_path / "t.pet").delta.training["init"]).startswith("sha256:")


def test_it_ends_elsewhere_than_a_training_from_the_methods_start(
    tasks: Tasks, broad: Path, task: Path, tmp_path: Path
) -> None:
    for name, more in (("cold", ()), ("warm", ("--init", broad))):
        assert edgepet(*arguments(tasks, task, tmp_path / f"{name}.pet", *more)).code == 0

    cold, warm = (read_work(tmp_path / f"{name}.work").tensors for name in ("cold", "warm"))
    assert not any(np.array_equal(cold[name], warm[name]) for name in cold)
    assert "init" not in read_pack(tmp_path / "cold.pet").delta.training


def test_a_pack_stands_for_the_work_folder_beside_it(tasks: Tasks, task: Path, tmp_path: Path) -> None:
    for name, init in (("a", tasks.tints), ("b", tasks.folder / "tints.work")):
        assert edgepet(*arguments(tasks, task, tmp_path / name / "t.pet", "--init", init)).code == 3
        (tmp_path / name).mkdir()
        assert edgepet(*arguments(tasks, task, tmp_path / name / "t.pet", "--init", init)).code == 0

    assert (tmp_path / "a" / "t.pet").read_bytes() == (tmp_path / "b" / "t.pet").read_bytes()


def test_what_does_not_fit_is_refused(tasks: Tasks, broad: Path, task: Path, tmp_path: Path) -> None:
    def told(*more: object, method: str = "lora", spec: str = tasks.spec) -> str:
        words = [spec if word == tasks.spec else word for word in arguments(tasks, task, tmp_path / "t.pet")]
        return refused(3, *[method if word == "lora" else word for word in words], *more)

    assert told("--init", tmp_path / "none.work") == (
        f"--init: needs the tensors of an earlier training, got no folder {tmp_path / 'none.work'}\n"
        "  fix: give the folder that `edgepet pretrain` wrote, or the TASK.work beside TASK.pet\n"
    )
    assert told("--init", broad, method="ssf") == f"--init {broad}: needs tensors of ssf, got lora\n"
    assert told("--init", broad, "--set", "rank=4") == (
        f"--init {broad}: was trained with other settings, got rank=8\n  fix: train with --set rank=8\n"
    )
    other = tiny_vit(tmp_path, seed=99).spec
    assert told("--init", broad, spec=other).startswith(f"--init {broad}: was trained on another backbone than ")
    assert not (tmp_path / "t.pet").exists()


def test_tensors_of_another_image_size_are_refused_where_that_matters(tasks: Tasks, task: Path, tmp_path: Path) -> None:
    words = arguments(tasks, task, tmp_path / "full.work", "--img-size", 48, method="full")
    assert edgepet(*words).code == 0

    said = refused(3, *arguments(tasks, task, tmp_path / "t.pet", "--init", tmp_path / "full.work", method="full"))

    assert said == (
        f"--init {tmp_path / 'full.work'}: needs tensors of the same shapes, got pos_embed/value\n"
        "  fix: train at the image size that it was trained at\n"
    )


def test_a_resumed_training_must_have_begun_from_the_same_tensors(
    tasks: Tasks, broad: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(tasks, task, tmp_path / "t.pet", "--init", broad)

    def stopped(*given: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgepet.tuning.training.algebra_error", stopped)
        assert edgepet(*words).code == 130

    said = refused(3, *arguments(tasks, task, tmp_path / "t.pet", "--resume"))

    assert "belongs to a training with other settings" in said
    assert "init sha256:" in said
    assert edgepet(*words, "--resume").code == 0


def test_a_work_folder_is_named_so(tasks: Tasks, tmp_path: Path) -> None:
    words = arguments(tasks, tasks.data, tmp_path / "t.work")

    said = refused(3, *[tmp_path / "broad" if word == tmp_path / "t.work" else word for word in words])

    assert said == "-o: needs a folder name ending in .work, got 'broad'\n"
