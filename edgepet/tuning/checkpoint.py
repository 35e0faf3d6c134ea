"""The state of a training that was not finished: one file beside the pack, whole or not there.

``flowers.checkpoint`` is a safetensors file; its tensor ``facts`` is JSON: what is being trained (``identity``) and how
far it got (``progress``). It is written at the end of every epoch and every ``every_s`` seconds between, and goes when
the pack is there. A pack and a work folder of an earlier training stay what they are until then.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import safetensors.numpy

from edgepet.canonical import canonical_json, parse_json
from edgepet.errors import InputError, option
from edgepet.files import clear_leftovers, write_file
from edgepet.graphs.tensor_files import read_tensors
from edgepet.spec import NpArray, Tensors
from edgepet.strict import ObjectReader
from edgepet.tuning.options import CHECKPOINT_S

FORMAT, VERSION = "edgepet-checkpoint", 1
_FACTS = "facts"
_BEGIN_AGAIN = "delete it to begin again"


def checkpoint_file(pack: Path) -> Path:
    """``flowers.checkpoint`` beside ``flowers.pet``."""
    return pack.with_suffix(".checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """``progress`` holds plain JSON values, ``tensors`` all else as arrays, under names that the writing loop chose."""

    progress: Mapping[str, object]
    tensors: Tensors


@dataclass(slots=True, kw_only=True)
class Keeper:
    """Writes and reads the checkpoints of one training. ``identity`` is all that decides its final weights, as JSON.

    ``writes`` is false in every process but one; ``stop`` turns true when the process was asked to end.
    """

    path: Path
    identity: Mapping[str, object]
    every_s: float = CHECKPOINT_S
    writes: bool = True
    stop: bool = False
    _saved: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        """Whether the last one, or the beginning where there is none yet, is ``every_s`` seconds old."""
        return time.monotonic() - self._saved >= self.every_s

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the file; a full disk leaves the older one whole.

        Raises:
            InputError: the file could not be written.
        """
        self._saved = time.monotonic()
        if not self.writes:
            return
        facts = {"format": FORMAT, "version": VERSION, "identity": self.identity, "progress": checkpoint.progress}
        tensors = {name: np.asarray(tensor, order="C") for name, tensor in checkpoint.tensors.items()}
        try:
            write_file(self.path, safetensors.numpy.save({**tensors, _FACTS: _bytes(canonical_json(facts))}))
        except InputError as error:
            on = f"make room, then go on with {option('resume', True)}"
            fix = on if self.path.exists() else "make room and begin again"
            raise InputError(error.where, error.what, got=error.got, fix=fix) from error

    def load(self) -> Checkpoint | None:
        """What was saved last, or None where nothing was.

        Raises:
            InputError: the file is damaged, or was written by a training that differs.
        """
        if self.writes:
            clear_leftovers(self.path)  # half a checkpoint, of a process that was killed while it wrote
        if not self.path.exists():
            return None
        was, saved = _read(self.path)
        now = parse_json(canonical_json(self.identity))
        differs = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
        if differs:
            told = "; ".join(f"{key} {_short(was.get(key))}, now {_short(now.get(key))}" for key in differs)
            fix = f"resume with the options that it began with, or {_BEGIN_AGAIN}"
            raise InputError(str(self.path), "belongs to a training with other settings", got=told, fix=fix)
        return saved

    def remove(self) -> None:
        """The pack is there: nothing is left to resume."""
        if self.writes:
            self.path.unlink(missing_ok=True)


def no_whole(path: Path, got: object) -> InputError:
    """The error of a checkpoint that lacks what a training needs to go on."""
    return InputError(str(path), "is no whole checkpoint", got=got, fix=_BEGIN_AGAIN)


def identity_of(path: Path) -> Mapping[str, object]:
    """What the training that left ``path`` was: empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    return _read(path)[0] if path.exists() else {}


def _read(path: Path) -> tuple[Mapping[str, object], Checkpoint]:
    try:
        tensors = read_tensors(path)
        table = ObjectReader(parse_json(tensors.pop(_FACTS).tobytes()), str(path), error=InputError)
    except (InputError, KeyError, ValueError, RecursionError) as error:
        got = error.got if isinstance(error, InputError) else error
        raise no_whole(path, got) from error
    table.text("format", choices=[FORMAT])
    if (version := table.integer("version")) != VERSION:
        raise InputError(str(path), f"needs version {VERSION}", got=version, fix=_BEGIN_AGAIN)
    parts = {key: table.nested(key) for key in ("identity", "progress")}
    identity, progress = ({key: part.raw(key) for key in part.names()} for part in parts.values())
    table.end()
    return identity, Checkpoint(progress=progress, tensors=tensors)


@contextlib.contextmanager
def ends_when_asked(keeper: Keeper) -> Iterator[None]:
    """While the block runs the first SIGINT or SIGTERM sets ``keeper.stop``; a second one acts as ever.

    A signal that the process was told to ignore, as ``nohup`` and shells tell what runs behind them, stays ignored.
    Outside of the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python has signals in its main thread only
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        keeper.stop = True
        for each, handler in before.items():  # the second may be the other of the two
            signal.signal(each, handler)

    try:
        for number in before:
            signal.signal(number, ask)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bytes(text: bytes) -> NpArray:
    return np.frombuffer(text, np.uint8)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
