"""What one task adds to a backbone: updates, a head, labels, and where they came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgepet.deltas.branches import Branch, arrays_of, require_distinct, structure_digest, structure_of
from edgepet.deltas.codes import Range
from edgepet.deltas.heads import METRICS, MapHead
from edgepet.deltas.probe import Probe
from edgepet.deltas.updates import Targeted, factors, require_readable
from edgepet.errors import InputError
from edgepet.reports.tables import format_names
from edgepet.spec import NpArray, Preprocess, StoredPrecision

# All three become names of files or folders, so a pack from outside must not be able to steer where they lead.
_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BACKBONE = re.compile(r"(?:demo:|module:)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


def require_task(name: str, where: str, what: str) -> None:
    """Refuse what is no task's name; ``what`` begins the message.

    Raises:
        InputError: it is none.
    """
    if _TASK.fullmatch(name) is None:
        raise InputError(where, f"{what} of letters, digits, '.', '_' and '-', at most 64", got=repr(name[:80]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """The task's classifier: logits = features @ weight.T + bias; ``weight`` (C, d), ``bias`` (C,)."""

    weight: NpArray
    bias: NpArray

    def __call__(self, features: NpArray) -> NpArray:
        """Logits (n, C) of pooled features (n, d)."""
        logits: NpArray = features @ self.weight.T + self.bias
        return logits

    @property
    def in_float32(self) -> Head:
        """The same in float32, as runtimes multiply: a pack may store fp16."""
        return Head(weight=self.weight.astype(np.float32), bias=self.bias.astype(np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Top-1 accuracy as a fraction of 1, on ``n`` images."""

    top1: float
    n: int


NO_CLASSIFIER = Head(weight=np.zeros((0, 0), np.float32), bias=np.zeros(0, np.float32))
MOST_HEADS = 8  # that read maps, of one task


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedHead:
    """A head that reads maps, and the ``value`` that it reached on ``n`` val images, a fraction of 1.

    Of masks that is mean intersection over union, of boxes COCO's average precision: ``METRICS`` says which.
    """

    head: MapHead
    value: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Ranges:
    """What a task's activations need to run on the int8 backbone whose file of codes has the sha256 ``codes``.

    ``ranges`` are of the tensors that have codes, in that backbone's order. With ``trunk`` they are of the last of
    them, behind the task's cut: before it the backbone's own hold, which have that sha256. ``corrections`` are added to
    the biases of all layers that read one of these tensors, one layer behind the other; none where nothing is.
    """

    codes: str
    ranges: tuple[Range, ...]
    trunk: str | None = None
    corrections: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delta:
    """One task, ready for the backbone that it names.

    ``updates`` are folded into it, those of one tensor in order; ``branches`` stay beside it. ``head``, ``labels`` and
    ``val`` are the classifier's, ``heads`` those that read maps: a task that has such heads alone has NO_CLASSIFIER and
    no labels, and its ``val`` is of no image. ``method`` and
    ``training`` are provenance: nothing that applies a delta reads them. ``int8`` is there where the task was
    calibrated on the int8 backbone; ``probes`` are what it answers, in each precision in which it was asked.

    Raises:
        InputError: a name or fingerprint that is not spelled as one, a top-1 outside of 0 to 1, a wrong branch, two of
            one kind that add to one point, a push that reads what a push changes, a head without a bias and a label of
            its own for each class, or heads that are too many, of one name, or of an overlap outside of 0 to 1.
    """

    task: str
    backbone: str
    fingerprint: str
    updates: tuple[Targeted, ...]
    head: Head
    labels: tuple[str, ...]
    preprocess: Preprocess
    method: str
    val: Score
    settings: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    licences: tuple[str, ...] = ()
    branches: tuple[Branch, ...] = ()
    int8: Int8Ranges | None = None
    probes: Mapping[StoredPrecision, Probe] = field(default_factory=dict)
    heads: tuple[JudgedHead, ...] = ()

    def __post_init__(self) -> None:
        require_task(self.task, "task", "needs a name")
        if _BACKBONE.fullmatch(self.backbone) is None:
            raise InputError(self.task, "needs a backbone's name, no path", got=repr(self.backbone[:80]))
        if FINGERPRINT.fullmatch(self.fingerprint) is None:
            raise InputError(self.task, "needs a fingerprint, sha256: and 64 digits", got=repr(self.fingerprint[:80]))
        if not 0 <= self.val.top1 <= 1:
            raise InputError(self.task, "needs a val top1 between 0 and 1", got=self.val.top1)
        for branch in self.branches:
            branch.check(self.task)
        require_distinct(self.branches, self.task)
        require_readable(self.updates, self.task)
        self._check_heads()
        classes, width = self.head.weight.shape
        if (classes == 0 and not self.heads) or self.head.bias.shape != (classes,) or len(self.labels) != classes:
            raise InputError(
                self.task,
                f"a head {(classes, width)} needs {classes} biases and labels",
                got=f"{self.head.bias.shape[0]} and {len(self.labels)}",
            )
        if len(set(self.labels)) != classes:
            raise InputError(self.task, "needs labels that differ", got=format_names(self.labels))
        for label in self.labels:
            if not label.isascii() and any("\ud800" <= c <= "\udfff" for c in label):  # a folder's name in no encoding
                raise InputError(self.task, "needs labels that UTF-8 can spell", got=ascii(label))

    def _check_heads(self) -> None:
        if len(self.heads) > MOST_HEADS:
            raise InputError(self.task, f"needs at most {MOST_HEADS} heads that read maps", got=len(self.heads))
        names = ["class", *(each.head.name for each in self.heads)]
        if len(set(names)) < len(names):
            raise InputError(self.task, "needs a name of its own for every head", got=format_names(names))
        for each in self.heads:
            if not 0 <= each.value <= 1:
                what = f"needs a val {METRICS[each.head.answer]} between 0 and 1"
                raise InputError(f"{self.task}: {each.head.name}", what, got=each.value)

    @property
    def answers(self) -> tuple[str, ...]:
        """What its heads answer, "class" before others."""
        return (*(("class",) if self.labels else ()), *(each.head.answer for each in self.heads))

    @property
    def structure(self) -> str:
        """The digits of what the branches are, all but their values; empty where everything folds."""
        return structure_digest(structure_of(self.branches))

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the backbone tensors that this delta changes, sorted."""
        return tuple(sorted({targeted.target.tensor for targeted in self.updates}))

    def arrays(self) -> Iterator[NpArray]:
        """Every distinct array of updates and branches once, though several updates may share it."""
        seen = {id(array): array for targeted in self.updates for array in factors(targeted.update).values()}
        seen |= {id(array): array for array in arrays_of(self.branches)}
        yield from seen.values()

    @property
    def stored_values(self) -> int:
        """Numbers and bits that updates and branches carry, each shared array once, permutations and head left out."""
        return sum(int(array.size) for array in self.arrays() if np.asarray(array).dtype.kind in "fb")
