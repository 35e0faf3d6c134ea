"""Every step of a training, written to where people look: CSV, TensorBoard, MLflow, Weights & Biases.

Nothing is imported unless it is asked for, and nothing leaves the machine unless the environment says so, in the words
of the packages: ``MLFLOW_TRACKING_URI``, ``WANDB_MODE``. In one folder lie ``TASK.csv``, ``tensorboard/TASK``,
``mlflow.db`` and ``wandb/``. A training that goes on where it was stopped goes on in the same log.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgepet.errors import InputError, first_line, option, refusing, require
from edgepet.files import made_folder, read_file, require_place, write_file
from edgepet.reports.progress import Say, Step

EXPERIMENT = "edgepet"  # MLflow's experiment, and the project of Weights & Biases
_COLUMNS = ("step", "epoch", "images", "loss", "lr", "images_per_second", "val_top1", "val_loss")
_RUN = re.compile(rb"[0-9a-z]{8,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one training is logged to, and ``settings``, what was asked of it."""

    folder: Path
    task: str
    settings: Mapping[str, object]


class Log(Protocol):
    """One training's log in one form. Made when its package is there; it writes nothing before ``begin``."""

    def begin(self, first: Step) -> None:
        """Make room for ``first``, the first step that this process takes, and what follows it."""

    def write(self, step: Step) -> None:
        """Add a step."""

    def end(self, *, done: bool) -> None:
        """Close; ``done`` is whether the training came to its end."""


def require_known(names: Sequence[str]) -> None:
    """Refuse a log that is in no row of ``LOGS``.

    Raises:
        InputError: there is one.
    """
    unknown = [name for name in names if name not in LOGS]
    if unknown:
        raise InputError(option("log"), f"knows {', '.join(LOGS)}", got=repr(unknown[0]))


@contextlib.contextmanager
def logged(names: Sequence[str], place: Place) -> Iterator[Say]:
    """Yield what a fit tells its steps to, for the logs ``names``.

    Raises:
        InputError: a name is not known, or a log cannot be written.
        MissingError: a log's package is not installed.
    """
    require_known(names)
    if names and place.folder.exists() and not place.folder.is_dir():
        raise InputError(option("log_dir", place.folder), "needs a folder, or a name that is free", got="a file")
    if names:
        require_place(place.folder / place.task, makes_parents=True)  # before images are read, not after
    logs = [LOGS[name](place) for name in dict.fromkeys(names)]
    begun = list[Log]()

    def say(step: Step) -> None:
        for log in logs if not begun else ():
            made_folder(place.folder, "the logs of trainings are kept there")
            log.begin(step)
            begun.append(log)
        for log in begun:
            log.write(step)

    done = False
    try:
        yield say
        done = True
    finally:
        for log in begun:
            log.end(done=done)


def is_resumed(first: Step) -> bool:
    """Whether ``first`` of a process is not the first of its training."""
    return _moment(first) > (1, False)


def _moment(step: Step) -> tuple[int, bool]:
    return step.step, step.val_top1 is not None  # the end of an epoch comes after its last step, under one number


def _numbers(step: Step) -> dict[str, float]:
    """What is logged of a step; of an epoch's end only what is new."""
    if step.val_top1 is None:
        named = {"loss": step.loss, "lr": step.lr, "images_per_second": step.images_per_second}
    else:
        named = {"val_top1": step.val_top1, "val_loss": step.val_loss}
    return {"epoch": step.epoch} | {name: value for name, value in named.items() if value is not None}


class CsvLog:
    """``TASK.csv``: a line a step, and one at the end of each epoch."""

    def __init__(self, place: Place) -> None:
        self._path = place.folder / f"{place.task}.csv"
        self._file: io.TextIOWrapper | None = None
        self._rows()

    def begin(self, first: Step) -> None:
        """Keep the lines before ``first`` of an earlier process.

        Raises:
            InputError: the file cannot be written, or is somebody's own.
        """
        text = io.StringIO()
        kept = [row for row in self._rows() if _is_before(row, first)]
        csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *kept])
        write_file(self._path, text.getvalue().encode())
        with refusing(self._path, "could not be written"):
            self._file = self._path.open("a", encoding="utf-8", newline="")

    def write(self, step: Step) -> None:
        """Add a line.

        Raises:
            InputError: it could not be written.
        """
        numbers = {"step": step.step, "images": step.images} | _numbers(step)
        if self._file is not None:
            with refusing(self._path, "could not be written"):
                csv.writer(self._file, lineterminator="\n").writerow([numbers.get(name, "") for name in _COLUMNS])
                self._file.flush()

    def end(self, *, done: bool) -> None:
        """Close the file."""
        del done
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _rows(self) -> list[list[str]]:
        """The lines of an earlier process."""
        if not self._path.exists():
            return []
        head, *rows = list(csv.reader(io.StringIO(read_file(self._path).decode(errors="replace")))) or [[]]
        if head != list(_COLUMNS):
            fix = f"name another folder with {option('log_dir')}"
            raise InputError(str(self._path), "is not the log of a training, and stays as it is", fix=fix)
        return rows


def _is_before(row: Sequence[str], first: Step) -> bool:
    """Whether a line of a CSV is whole and of a moment before ``first``."""
    if len(row) != len(_COLUMNS) or not row[0].isdecimal():
        return False
    return (int(row[0]), row[_COLUMNS.index("val_top1")] != "") < _moment(first)


class TensorBoardLog:
    """``tensorboard/TASK``, by torch's own writer."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._made = require("torch.utils.tensorboard", extra="tensorboard", purpose="log to TensorBoard").SummaryWriter
        self._writer: Any = None

    def begin(self, first: Step) -> None:
        """Open a file of events, before which TensorBoard forgets what is of ``first`` and later.

        Raises:
            InputError: it cannot be written.
        """
        folder = self._place.folder / "tensorboard" / self._place.task
        with refusing(folder, "could not be written"):
            self._writer = self._made(str(folder), purge_step=sum(_moment(first)))
            if not is_resumed(first):
                lines = "\n".join(f"    {name} {value}" for name, value in self._place.settings.items())
                self._writer.add_text("settings", lines, 0)

    def write(self, step: Step) -> None:
        """Add a step's numbers."""
        for name, value in _numbers(step).items():
            self._writer.add_scalar(name, value, step.step)
        self._writer.flush()  # what a kill leaves reaches as far as the checkpoint

    def end(self, *, done: bool) -> None:
        """Close the file."""
        del done
        self._writer.close()


class MlflowLog:
    """A run called TASK of the experiment ``edgepet``, in ``mlflow.db`` or where ``MLFLOW_TRACKING_URI`` says."""

    def __init__(self, place: Place) -> None:
        self._place, self._uri, self._run = place, os.environ.get("MLFLOW_TRACKING_URI"), ""
        if not self._uri:
            require("sqlalchemy", extra="mlflow", purpose="log to MLflow on this machine")
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            self._uri = f"sqlite:///{(place.folder / 'mlflow.db').absolute()}"
        self._mlflow = require("mlflow", extra="mlflow", purpose="log to MLflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        self._client: Any = None

    def begin(self, first: Step) -> None:
        """Open the run, or the one of an earlier process where ``first`` goes on.

        Raises:
            InputError: MLflow refuses.
        """
        with self._refusals():
            self._client = self._mlflow.MlflowClient(self._uri)
            self._run = _earlier_run(self._place, "mlflow", first) or self._new_run()
            self._client.set_terminated(self._run, "RUNNING")
        _keep_run(self._place, "mlflow", self._run)

    def write(self, step: Step) -> None:
        """Add a step's numbers.

        Raises:
            InputError: MLflow refuses.
        """
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(name, value, now, step.step) for name, value in _numbers(step).items()]
        with self._refusals():
            self._client.log_batch(self._run, metrics=metrics)

    def end(self, *, done: bool) -> None:
        """Close the run: finished, or killed."""
        with self._refusals():
            self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")

    def _new_run(self) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        run = str(self._client.create_run(experiment, run_name=self._place.task).info.run_id)
        for name, value in self._place.settings.items():
            self._client.log_param(run, name, value)
        return run

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except self._mlflow.exceptions.MlflowException as error:
            raise InputError(str(self._uri), "MLflow could not log there", got=first_line(error)) from error


class WandbLog:
    """A run called TASK of the project ``edgepet``: in ``wandb/`` for ``wandb sync``, or as ``WANDB_MODE`` says."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._wandb = require("wandb", extra="wandb", purpose="log to Weights & Biases")
        self._run: Any = None

    def begin(self, first: Step) -> None:
        """Open the run, or the one of an earlier process where ``first`` goes on.

        Raises:
            InputError: wandb refuses.
        """
        run = _earlier_run(self._place, "wandb", first) or secrets.token_hex(4)
        mode = os.environ.get("WANDB_MODE", "offline")
        with self._refusals():
            self._run = self._wandb.init(
                project=EXPERIMENT, name=self._place.task, id=run, dir=str(self._place.folder), mode=mode,
                resume=None if mode == "offline" else "allow", config=dict(self._place.settings),
                settings=self._wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        _keep_run(self._place, "wandb", run)

    def write(self, step: Step) -> None:
        """Add a step's numbers."""
        with self._refusals():
            self._run.log(_numbers(step), step=step.step)

    def end(self, *, done: bool) -> None:
        """Close the run."""
        with self._refusals():
            self._run.finish(exit_code=0 if done else 1)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except self._wandb.Error as error:
            raise InputError(option("log", "wandb"), "wandb could not log", got=first_line(error)) from error


def _earlier_run(place: Place, kind: str, first: Step) -> str | None:
    """The run that the process before this one wrote to, where ``first`` goes on with its training."""
    path = place.folder / f"{place.task}.{kind}"
    if not is_resumed(first) or not path.exists():
        return None
    text = read_file(path).strip()
    return text.decode() if _RUN.fullmatch(text) else None


def _keep_run(place: Place, kind: str, run: str) -> None:
    write_file(place.folder / f"{place.task}.{kind}", f"{run}\n".encode())


LOGS: dict[str, Callable[[Place], Log]] = {
    "csv": CsvLog,
    "tensorboard": TensorBoardLog,
    "mlflow": MlflowLog,
    "wandb": WandbLog,
}
