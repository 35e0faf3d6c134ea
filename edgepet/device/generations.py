"""What a store holds, as a value: a generation. Every change is a function from one to the next, or a refusal.

Nothing here reads or writes: whether a pack may be installed is decided before anything is touched, and the same
decision can be asked again under the store's lock. ``edgepet.device.store`` keeps generations on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgepet.deltas.delta import require_task
from edgepet.device.graph_states import GraphState, graph_json, read_digest, read_graph
from edgepet.errors import CheckError, InputError, option
from edgepet.graphs.base import graph_folder, graph_stem
from edgepet.graphs.int8 import OTHER_RANGES, int8_stem
from edgepet.packs.pack import Pack
from edgepet.packs.signatures import Signer
from edgepet.spec import StoredPrecision
from edgepet.strict import ObjectReader

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """One pack of a task. ``answers``: for "openvino int8" and its like, why it is not served there, or nothing."""

    sha256: str
    size_bytes: int
    sequence: int
    signed_by: str | None
    answers: Mapping[str, str] = field(default_factory=dict)

    @property
    def refused(self) -> Mapping[str, str]:
        """Where it is not served, and why."""
        return {place: why for place, why in self.answers.items() if why}

    @property
    def serves(self) -> bool:
        """Whether there is a place that it was asked at and not refused, or none that it was asked at."""
        return not self.answers or not all(self.answers.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskState:
    """The pack that a task is, the one before it, and what the last change was."""

    active: Installed
    previous: Installed | None = None
    reason: str = "installed"

    @property
    def state(self) -> str:
        """One of "active", "rolled back", "partly", served but not everywhere, and "refused", nowhere."""
        if not self.active.serves:
            return "refused"
        if self.active.refused:
            return "partly"
        return "active" if self.reason == "installed" else "rolled back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A pack that somebody wants installed, as far as a verdict needs it.

    ``dense`` and ``int8`` are names of descriptions, ``<digits>/<stem>.json``, of the graphs that it could run on;
    ``codes`` those that its ranges are for, None where it has none; ``trunk`` the backbone's own in its trunk, None
    where it brings all. ``key`` are digits of the key that signed it,
    empty where nobody's was asked for: names of keys are their owner's, and change.
    """

    task: str
    sha256: str
    size_bytes: int
    sequence: int
    signed_by: str | None
    key: str
    backbone: str
    dense: str
    int8: str
    codes: str | None
    trunk: str | None


def candidate_of(pack: Pack, signed: Signer | None) -> Candidate:
    """What a verdict needs of a pack; ``signed`` is None where nobody's key was asked for."""
    delta = pack.delta
    digits = graph_folder(delta.fingerprint, Path()).name
    return Candidate(
        task=delta.task,
        sha256=pack.sha256,
        size_bytes=pack.size_bytes,
        sequence=pack.sequence,
        signed_by=None if signed is None else signed.name,
        key="" if signed is None else signed.key,
        backbone=delta.backbone,
        dense=f"{digits}/{graph_stem(delta.preprocess, delta.structure)}.json",
        int8=f"{digits}/{int8_stem(delta.preprocess, delta.structure)}.json",
        codes=None if delta.int8 is None else delta.int8.codes,
        trunk=None if delta.int8 is None else delta.int8.trunk,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """All that a store's folder means.

    ``floors``: for a task and the key that signed it, the number of the newest pack, or of an older one that was asked
    for since. Empty digits stand for whoever signed it while no key was asked for.
    """

    number: int = 0
    tasks: Mapping[str, TaskState] = field(default_factory=dict)
    graphs: Mapping[str, GraphState] = field(default_factory=dict)
    floors: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    requires_signature: bool = False
    quota_bytes: int | None = None

    @property
    def packs(self) -> frozenset[str]:
        """Digests of the packs that it needs: those that are active, and those before them."""
        both = ((state.active, state.previous) for state in self.tasks.values())
        return frozenset(pack.sha256 for pair in both for pack in pair if pack is not None)

    def of(self, task: str, where: str) -> TaskState:
        """What ``task`` is; messages name ``where``.

        Raises:
            InputError: it is not installed.
        """
        if task not in self.tasks:
            fix = f"installed are: {', '.join(sorted(self.tasks)) or 'none'}"
            raise InputError(where, f"has no task {task!r}", fix=fix)
        return self.tasks[task]

    def next(self, **changes: Any) -> Generation:
        """The one after it."""
        return replace(self, number=self.number + 1, **changes)


def precisions_of(now: Generation, pack: Candidate) -> tuple[StoredPrecision, ...]:
    """In which a pack can run: "fp32" where its dense graph is, "int8" where the codes are that its ranges are for.

    Raises:
        InputError: neither is there, or the codes that are there are others, or the backbone's own ranges.
    """
    dense, coded = now.graphs.get(pack.dense), now.graphs.get(pack.int8)
    here = None if coded is None else coded.codes
    if pack.codes is not None and here is not None and pack.codes != here:
        what, fix = f"has ranges for the int8 codes {pack.codes[:12]}", "run edgepet calibrate with -o again"
        raise InputError(f"task {pack.task!r}", what, got=f"{here[:12]} in this store", fix=fix)
    if coded is not None and pack.trunk is not None and pack.trunk != coded.ranges:
        what, got = f"needs the int8 backbone's own ranges {pack.trunk[:12]} for its trunk", coded.ranges or "none"
        raise InputError(f"task {pack.task!r}", what, got=f"{got[:12]} in this store", fix=OTHER_RANGES)
    int8 = pack.codes is not None and here is not None
    if dense is None and not int8:
        as_either = pack.dense if pack.codes is None else f"{pack.dense} or {pack.int8}"
        what = f"needs {pack.backbone} as {as_either}, which is not in this store"
        fix = "edgepet device init --store STORE --for TASK.pet on a host, then bring that folder"
        raise InputError(f"task {pack.task!r}", what, fix=fix)
    return (*(("fp32",) if dense else ()), *(("int8",) if int8 else ()))


def installing(now: Generation, pack: Candidate, answers: Mapping[str, str], *, older: bool = False) -> Generation:
    """The generation with ``pack`` in its task's place, and what was there before behind it.

    A pack that is served nowhere never takes the place of one that is: then that one stays the one before.

    Args:
        answers: what it said where it was asked, as in ``Installed``.
        older: take one with a smaller sequence number than was ever installed here, of the same signer.

    Raises:
        CheckError: signatures are required and nobody trusted has signed it, or it is older.
        InputError: as ``precisions_of``.
    """
    if now.requires_signature and pack.signed_by is None:
        fix = "edgepet pack --sign"
        raise CheckError(
            f"task {pack.task!r}", "must be signed by a key that is trusted here", got="no signature", fix=fix
        )
    floors = dict(now.floors.get(pack.task, {}))
    floor = floors.get(pack.key, floors.get("", 0))
    if pack.sequence < floor and not older:
        what = f"must not be older than what was installed before, which had the sequence number {floor}"
        fix = f"install it with {option('older', True)} if that is meant"
        raise CheckError(f"task {pack.task!r}", what, got=pack.sequence, fix=fix)
    precisions_of(now, pack)
    fresh = Installed(
        sha256=pack.sha256,
        size_bytes=pack.size_bytes,
        sequence=pack.sequence,
        signed_by=pack.signed_by,
        answers=answers,
    )
    before = now.tasks.get(pack.task)
    previous = None
    if before is not None:
        candidates = (before.active, before.previous)
        previous = next((each for each in candidates if each and each.serves and each.sha256 != fresh.sha256), None)
    floors[pack.key] = pack.sequence
    kept = {key: given for key, given in floors.items() if given or key}
    return now.next(
        tasks={**now.tasks, pack.task: TaskState(active=fresh, previous=previous)},
        floors={
            **{name: given for name, given in now.floors.items() if name != pack.task},
            **({pack.task: kept} if kept else {}),
        },
    )


def rolling_back(now: Generation, task: str, where: str) -> Generation:
    """The generation with the pack before in ``task``'s place; the one that was active stays behind it.

    Raises:
        InputError: it is not installed, or there is none before.
        CheckError: the one before was refused everywhere.
    """
    state = now.of(task, where)
    if state.previous is None:
        raise InputError(
            f"task {task!r}", "has no pack before the one that is active", fix="install the one that you want"
        )
    if now.requires_signature and state.previous.signed_by is None:
        fix = "install one that is signed"
        raise CheckError(f"task {task!r}", "must not go back to a pack that nobody trusted has signed", fix=fix)
    if not state.previous.serves:
        why = next(iter(state.previous.refused.values()))
        raise CheckError(
            f"task {task!r}", "must not go back to a pack that was refused", got=why, fix="install another one"
        )
    return now.next(tasks={**now.tasks, task: _swapped(state, state.previous, "by command")})


def withholding(now: Generation, task: str, sha256: str, place: str, why: str) -> Generation:
    """The generation in which that pack of ``task`` is not served at ``place``.

    Where that leaves it served nowhere, and the pack before is, the two change places: the task is rolled back. A pack
    that is neither of the two any more changes nothing.
    """
    state = now.tasks.get(task)
    if state is None or sha256 not in (state.active.sha256, state.previous and state.previous.sha256):
        return now
    active, previous = (
        pack and replace(pack, answers={**pack.answers, place: why}) if pack and pack.sha256 == sha256 else pack
        for pack in (state.active, state.previous)
    )
    state = TaskState(active=active or state.active, previous=previous, reason=state.reason)
    if not state.active.serves and state.previous is not None and state.previous.serves:
        state = _swapped(state, state.previous, f"{place}: {why}")
    return now.next(tasks={**now.tasks, task: state})


def removing(now: Generation, task: str, where: str) -> Generation:
    """The generation without ``task``. Its floor stays: a removed task does not come back older than it was.

    Raises:
        InputError: it is not installed.
    """
    now.of(task, where)
    return now.next(tasks={name: state for name, state in now.tasks.items() if name != task})


def serving(now: Generation, task: str, place: str, where: str) -> Installed:
    """The pack that serves ``task`` at ``place``: the active one, or where that is refused the one before.

    Raises:
        InputError: it is not installed.
        CheckError: none of them is served there.
    """
    state = now.of(task, where)
    for pack in (state.active, state.previous):
        if pack is not None and place not in pack.refused:
            return pack
    why = state.active.refused[place]
    raise CheckError(f"task {task!r} on {place}", "is not served there", got=why, fix="install another pack of it")


def _swapped(state: TaskState, before: Installed, why: str) -> TaskState:
    return TaskState(active=before, previous=state.active, reason=f"rolled back: {why}")


# ----------------------------------------------------------------------------------------------------------- as JSON


def as_json(now: Generation) -> dict[str, object]:
    """A generation as canonical JSON takes it."""
    return {
        "edgepet-store": VERSION,
        "floors": now.floors,
        "graphs": {name: graph_json(graph) for name, graph in now.graphs.items()},
        "number": now.number,
        "quota_bytes": now.quota_bytes,
        "requires_signature": now.requires_signature,
        "tasks": {
            name: {
                "active": _pack_json(state.active),
                "previous": None if state.previous is None else _pack_json(state.previous),
                "reason": state.reason,
            }
            for name, state in now.tasks.items()
        },
    }


def from_json(value: object, where: str) -> Generation:
    """What ``as_json`` made.

    Raises:
        InputError: it is none, or of a later version.
    """
    table = ObjectReader(value, where, error=InputError)
    if table.integer("edgepet-store") != VERSION:
        raise InputError(where, f"this edgepet reads stores of version {VERSION}", fix="update edgepet")
    floors, graphs, tasks = (table.nested(key) for key in ("floors", "graphs", "tasks"))
    made = Generation(
        number=table.integer("number"),
        tasks={name: _task(tasks.nested(name), name) for name in tasks.names()},
        graphs={name: read_graph(graphs.nested(name), name) for name in graphs.names()},
        floors={name: _floor(floors.nested(name)) for name in floors.names()},
        requires_signature=table.boolean("requires_signature"),
        quota_bytes=None if table.absent("quota_bytes") else table.integer("quota_bytes"),
    )
    table.end()
    return made


def _pack_json(pack: Installed) -> dict[str, object]:
    return {
        "answers": pack.answers,
        "bytes": pack.size_bytes,
        "sequence": pack.sequence,
        "sha256": pack.sha256,
        "signed_by": pack.signed_by,
    }


def _task(table: ObjectReader, name: str) -> TaskState:
    require_task(name, table.where, "needs a task's name")
    previous = None if table.absent("previous") else _pack(table.nested("previous"))
    made = TaskState(active=_pack(table.nested("active")), previous=previous, reason=table.text("reason"))
    table.end()
    return made


def _pack(table: ObjectReader) -> Installed:
    answers = table.nested("answers")
    made = Installed(
        sha256=read_digest(table),
        size_bytes=table.integer("bytes"),
        sequence=table.integer("sequence"),
        signed_by=None if table.absent("signed_by") else table.text("signed_by"),
        answers={place: str(answers.raw(place)) for place in answers.names()},
    )
    table.end()
    return made


def _floor(table: ObjectReader) -> Mapping[str, int]:
    return {signer: table.integer(signer) for signer in table.names()}
