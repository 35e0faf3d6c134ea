"""Tables that take longer than a machine lasts: a row for each training, and what has one is not trained again.

Not even where the rest of the table is made elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from harness import Asked, earlier, parser_of, write_result
from trainings import GPU, Trained, Training, planned, trained

from edgepet.canonical import canonical_json
from edgepet.jobs.job import Job
from edgepet.locks import held_alone

OF_MACHINES = ("threads", "precision")  # parts of a job that are as the machine is, and that no table is about
LOCK_S = 60.0  # how long another run may take to write its row


def rows_parser(description: str | None, tasks: Iterable[str] = ()) -> argparse.ArgumentParser:
    """The arguments of a benchmark whose table grows by ``Rows``, of several ``tasks`` or of one."""
    made = parser_of(description)
    if tasks:
        made.add_argument("--task", choices=tuple(tasks), help="only the rows of one task")
    made.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="trainings at the same time, of a thread each and more: as many as cores where a GPU trains (1)",
    )  # fmt: skip
    made.add_argument("--most", type=int, metavar="N", help="end after so many rows (all that are missing)")
    return made


class Rows:
    """The rows of a table that has one for each of ``trainings``, in ``NAME.json``, as many as there are yet.

    Several runs may add to one file. A row of an earlier run counts where the training is the same, whatever
    ``OF_MACHINES`` were, and ``facts``, which are all else that decides a row, are. With ``task`` only its images are
    drawn and only its rows are missing; those of other tasks stay.
    """

    def __init__(
        self, run: Asked, name: str, trainings: Sequence[Training], facts: Mapping[str, object] | None = None, *,
        task: str | None = None,
    ) -> None:  # fmt: skip
        self._run, self._name, self._facts, self._count = run, name, dict(facts or {}), len(trainings)
        self._tasks = list(dict.fromkeys(each.task for each in trainings))
        own = [each for each in trainings if task in (None, each.task)]
        self._trainings = dict(zip(map(_asked, (job for job, _ in planned(run, own))), own, strict=True))
        self._kept = set(self._tasks) - {each.task for each in own}

    @property
    def missing(self) -> tuple[Training, ...]:
        """The trainings that have no row yet."""
        known = {row["training"] for row in self._known()}
        return tuple(each for key, each in self._trainings.items() if key not in known)

    def fill(
        self, row: Callable[[Trained], Mapping[str, object]], most: int | None = None, backbone: str | None = None
    ) -> None:
        """Train what is missing, at ``most`` so many and of one ``backbone`` if these are asked for, and write of each
        its ``row``, with its "task", in its place.
        """
        wanted = [each for each in self.missing if backbone in (None, each.backbone)]
        wanted, at_once = wanted[:most], self._run.processes
        for start in range(0, len(wanted), at_once):
            for made in trained(self._run, wanted[start : start + at_once]):
                self.add(made, row(made))

    def add(self, made: Trained, row: Mapping[str, object]) -> None:
        """Write the row of a training, with the GPU that made it where one did."""
        gpu = {GPU: made.result.measured[GPU]} if GPU in made.result.measured else {}
        self._write([{"training": _asked(made.result.job), **row, **gpu}])

    def adopt(self, names: Sequence[str]) -> None:
        """Write the rows that are missing here and that tables of these ``names`` have, whose rows are alike."""
        missing = {key for key, each in self._trainings.items() if each in self.missing}
        found = {row["training"]: row for name in names for row in earlier(self._run, name).get("rows", ())}
        if rows := [row for key, row in found.items() if key in missing]:
            self._write(rows)

    def _write(self, new: Sequence[Mapping[str, Any]]) -> None:
        with held_alone(self._run.results / f".{self._name}.lock", "is being written", wait_s=LOCK_S):
            order, keys = list(self._trainings), {row["training"] for row in new}
            rows = [each for each in self._known() if each["training"] in order and each["training"] not in keys]
            rows = sorted([*rows, *map(dict, new)], key=lambda each: order.index(each["training"]))
            rows += [each for each in self._known() if each["task"] in self._kept]
            rows.sort(key=lambda each: self._tasks.index(each["task"]))
            write_result(self._run, self._name, {**self._facts, "trainings": self._count, "rows": rows})

    def _known(self) -> list[dict[str, Any]]:
        before = earlier(self._run, self._name)
        if any(before.get(key) != json.loads(json.dumps(value)) for key, value in self._facts.items()):
            return []
        found: list[dict[str, Any]] = before.get("rows", [])
        return found


def tuned(made: Trained) -> dict[str, object]:
    """What a row says of how a pack with heads was trained, and of what size it is."""
    told = ("epochs", "best_epoch", "precision", "trainable_params", "head_params", "pack_bytes")
    return {key: made.result.report[key] for key in told}


def _asked(job: Job) -> str:
    """What names a training wherever it runs."""
    asked: dict[str, Any] = {key: value for key, value in job.specification.items() if key not in OF_MACHINES}
    asked["options"] = {key: value for key, value in asked["options"].items() if key not in OF_MACHINES}
    return hashlib.sha256(canonical_json(asked)).hexdigest()[:16]
