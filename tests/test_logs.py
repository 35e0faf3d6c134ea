"""Logs of trainings: each step once, also when a training was stopped and went on; no package is imported unasked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edgepet.errors import InputError, MissingError
from edgepet.reports.logs import LOGS, Place, logged
from edgepet.reports.progress import Step
from tests.interpreters import python

STEPS = [
    Step(epoch=1, epochs=2, images=4 * n, total_images=16, loss=1 / n, images_per_second=9.0, step=n, lr=0.1)
    for n in (1, 2)
]
END = Step(
    epoch=1, epochs=2, images=8, total_images=16, loss=0.5, images_per_second=9.0, step=2, lr=0.1, val_top1=0.75,
    val_loss=2.0,
)  # fmt: skip
NEXT = Step(epoch=2, epochs=2, images=12, total_images=16, loss=0.25, images_per_second=9.0, step=3, lr=0.05)
WHOLE = [*STEPS, END, NEXT]
HEAD = "step,epoch,images,loss,lr,images_per_second,val_top1,val_loss\n"
LINES = ["1,1,4,1.0,0.1,9.0,,\n", "2,1,8,0.5,0.1,9.0,,\n", "2,1,8,,,,0.75,2.0\n", "3,2,12,0.25,0.05,9.0,,\n"]


class KilledError(Exception):
    """What ends a training here."""


def place(folder: Path) -> Place:
    return Place(folder=folder / "logs", task="flowers", settings={"lr": 0.1, "method": "ssf"})


def write(names: Sequence[str], folder: Path, steps: Sequence[Step], *, killed: bool = False) -> None:
    with logged(names, place(folder)) as log:
        for step in steps:
            log(step)
        if killed:
            raise KilledError


def test_a_csv_has_a_line_a_step_and_one_at_an_epochs_end(tmp_path: Path) -> None:
    write(["csv"], tmp_path, WHOLE)

    assert (tmp_path / "logs/flowers.csv").read_text() == HEAD + "".join(LINES)


@pytest.mark.parametrize(("written", "again"), [(w, a) for w in range(5) for a in range(min(w, 3) + 1)])
def test_a_csv_of_a_training_that_went_on_is_as_that_of_one_that_was_not_stopped(
    written: int, again: int, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        write(["csv"], tmp_path, WHOLE[:written], killed=True)
    if written:
        with (tmp_path / "logs/flowers.csv").open("a") as file:
            file.write("4,2,")  # half a line, of a kill

    write(["csv"], tmp_path, WHOLE[again:])

    assert (tmp_path / "logs/flowers.csv").read_text() == HEAD + "".join(LINES)


def test_a_new_training_takes_the_place_of_an_earlier_ones_csv(tmp_path: Path) -> None:
    write(["csv"], tmp_path, WHOLE)
    write(["csv"], tmp_path, WHOLE[:1])

    assert (tmp_path / "logs/flowers.csv").read_text() == HEAD + LINES[0]


def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "logs/flowers.csv"
    path.parent.mkdir()
    path.write_text("name,price\nrose,3\n")

    with pytest.raises(InputError) as refusal:
        write(["csv"], tmp_path, [])  # before the first step, and so before all images are read

    assert str(refusal.value) == (
        f"{path}: is not the log of a training, and stays as it is\n  fix: name another folder with `log_dir`"
    )
    assert path.read_text() == "name,price\nrose,3\n"


def test_a_file_in_place_of_the_folder_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("mine")

    with pytest.raises(InputError) as refusal:
        write(["csv"], tmp_path, [])

    assert str(refusal.value) == f"`log_dir={tmp_path / 'logs'}`: needs a folder, or a name that is free, got a file"


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    write(["csv"], tmp_path, [])

    assert list(tmp_path.iterdir()) == []


def test_nothing_is_imported_that_is_not_asked_for() -> None:
    out = python(
        "import sys, edgepet.verbs.train, edgepet.reports.logs as logs, pathlib\n"
        "place = logs.Place(folder=pathlib.Path('x'), task='t', settings={})\n"
        "with logs.logged(['csv'], place): pass\n"
        "print(sorted({'torch', 'tensorboard', 'mlflow', 'wandb', 'sqlalchemy'} & set(sys.modules)))"
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "module", "purpose"),
    [
        ("tensorboard", "torch.utils.tensorboard", "log to TensorBoard"),
        ("mlflow", "sqlalchemy", "log to MLflow on this machine"),
        ("wandb", "wandb", "log to Weights & Biases"),
    ],
)
def test_a_log_whose_package_is_not_there_says_what_brings_it(
    name: str, module: str, purpose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(MissingError) as refusal:
        write([name], tmp_path, WHOLE)

    assert str(refusal.value).startswith(f"{purpose}: needs the package {module!r}, got ")
    assert str(refusal.value).endswith(f"\n  fix: pip install 'edgepet[{name}]'")


def test_a_log_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        write(["paper"], tmp_path, WHOLE)
    assert str(refusal.value) == "`log`: knows csv, tensorboard, mlflow, wandb, got 'paper'"
    assert tuple(LOGS) == ("csv", "tensorboard", "mlflow", "wandb")


# ------------------------------------------------------------------------------- the packages' words, with no package


class FakeError(Exception):
    """An error of a package."""


def fake(name: str, monkeypatch: pytest.MonkeyPatch, **members: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


class FakeClient:
    """MLflow's, as far as it is used: remembers what it was told."""

    told: list[tuple[Any, ...]]

    def __init__(self, uri: str) -> None:
        self.told.append(("open", uri))

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return f"id of {name}"

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        self.told.append(("run", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="0123456789abcdef"))

    def log_param(self, run: str, name: str, value: object) -> None:
        self.told.append(("param", name, value))

    def log_batch(self, run: str, metrics: list[tuple[str, float, int]]) -> None:
        if any(value != value for _, value, _ in metrics):
            raise FakeError("no numbers\nat all")
        self.told += [("metric", run, *each) for each in metrics]

    def set_terminated(self, run: str, status: str) -> None:
        self.told.append((status, run))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a client of MLflow is told."""
    FakeClient.told = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    fake("sqlalchemy", monkeypatch)
    entities = SimpleNamespace(Metric=lambda name, value, now, step: (name, value, step))
    exceptions = SimpleNamespace(MlflowException=FakeError)
    fake("mlflow", monkeypatch, MlflowClient=FakeClient, entities=entities, exceptions=exceptions)
    return FakeClient.told


def test_mlflow_is_told_of_each_step_in_a_database_beside_the_other_logs(
    mlflow: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    run = "0123456789abcdef"
    with pytest.raises(KilledError):
        write(["mlflow"], tmp_path, WHOLE[:2], killed=True)
    assert mlflow[:4] == [
        ("open", f"sqlite:///{tmp_path / 'logs/mlflow.db'}"), ("run", "id of edgepet", "flowers"),
        ("param", "lr", 0.1), ("param", "method", "ssf"),
    ]  # fmt: skip
    assert mlflow[-1] == ("KILLED", run)

    mlflow.clear()
    write(["mlflow"], tmp_path, WHOLE[2:])  # goes on in the run of before

    assert mlflow[1:] == [
        ("RUNNING", run), ("metric", run, "epoch", 1, 2), ("metric", run, "val_top1", 0.75, 2),
        ("metric", run, "val_loss", 2.0, 2), ("metric", run, "epoch", 2, 3), ("metric", run, "loss", 0.25, 3),
        ("metric", run, "lr", 0.05, 3), ("metric", run, "images_per_second", 9.0, 3), ("FINISHED", run),
    ]  # fmt: skip


def test_mlflow_goes_where_the_environment_says(
    mlflow: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)  # a server has its own

    write(["mlflow"], tmp_path, WHOLE)

    assert mlflow[0] == ("open", "http://localhost:5000")


def test_what_mlflow_refuses_is_said_with_its_place(mlflow: list[tuple[Any, ...]], tmp_path: Path) -> None:
    broken = Step(epoch=1, epochs=1, images=4, total_images=4, loss=float("nan"), images_per_second=1.0, step=1)

    with pytest.raises(InputError) as refusal:
        write(["mlflow"], tmp_path, [broken])

    assert str(refusal.value) == f"sqlite:///{tmp_path / 'logs/mlflow.db'}: MLflow could not log there, got no numbers"


@pytest.mark.parametrize(("mode", "resume"), [("offline", None), ("online", "allow")])
def test_wandb_is_told_of_each_step_and_stays_offline_unless_the_environment_says_otherwise(
    mode: str, resume: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[Any]()

    def init(**given: Any) -> SimpleNamespace:
        told.append(given)
        return SimpleNamespace(
            log=lambda numbers, step: told.append((numbers, step)),
            finish=lambda exit_code: told.append(exit_code),
        )

    fake("wandb", monkeypatch, init=init, Settings=lambda **given: given, Error=FakeError)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode != "offline":
        monkeypatch.setenv("WANDB_MODE", mode)

    with pytest.raises(KilledError):
        write(["wandb"], tmp_path, WHOLE[:1], killed=True)
    write(["wandb"], tmp_path, WHOLE[3:])

    opened, again = told[0], told[3]
    assert opened == again == {
        "project": "edgepet", "name": "flowers", "id": opened["id"], "dir": str(tmp_path / "logs"), "mode": mode,
        "resume": resume, "config": {"lr": 0.1, "method": "ssf"}, "settings": {"silent": True, "console": "off"},
    }  # fmt: skip
    assert told[1:3] == [({"epoch": 1, "loss": 1.0, "lr": 0.1, "images_per_second": 9.0}, 1), 1]
    assert told[4:] == [({"epoch": 2, "loss": 0.25, "lr": 0.05, "images_per_second": 9.0}, 3), 0]


# ---------------------------------------------------------------------------------------------- the packages themselves


def needs(*modules: str) -> Callable[[Any], Any]:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs the packages {', '.join(missing)}")


@needs("tensorboard")
def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KilledError):
        write(["tensorboard"], tmp_path, WHOLE, killed=True)
    write(["tensorboard"], tmp_path, WHOLE[1:])

    shown = EventAccumulator(str(tmp_path / "logs/tensorboard/flowers"))
    shown.Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [(e.step, e.value) for e in shown.Scalars("val_top1")] == [(2, 0.75)]


@pytest.mark.slow
@needs("mlflow", "sqlalchemy")
@pytest.mark.filterwarnings("default")  # of the packages it brings
def test_mlflow_holds_each_step_in_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(KilledError):
        write(["mlflow"], tmp_path, WHOLE[:2], killed=True)
    write(["mlflow"], tmp_path, WHOLE[2:])

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'logs/mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("edgepet").experiment_id])
    assert (run.info.run_name, run.info.status) == ("flowers", "FINISHED")
    assert run.data.params == {"lr": "0.1", "method": "ssf"}
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert history == [(1, 1.0), (2, 0.5), (3, 0.25)]


@pytest.mark.slow
@needs("wandb")
@pytest.mark.filterwarnings("default")
def test_wandb_writes_a_run_to_be_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)

    write(["wandb"], tmp_path, WHOLE)

    (file,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0
    assert not [name for name in os.environ if name.startswith("WANDB_API")]
