"""What a training of heads that read maps is asked for: a task for each answer, its images and its head.

Needs the ``train`` extra.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from edgepet.deltas.heads import Answer
from edgepet.errors import InputError, option
from edgepet.images.folders import PassedOver, Split
from edgepet.images.sets import ImageSet
from edgepet.networks.head_forms import MapForm
from edgepet.networks.head_settings import FORMS, Form
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.dense_fit import Objective
from edgepet.tuning.fit import Plan
from edgepet.tuning.joint import joint_augmentations
from edgepet.tuning.options import TrainOptions
from edgepet.tuning.recipes import BETWEEN, head_form, task_weights
from edgepet.tuning.training import Training

_REFUSED = ("shots", "frames", "consistency", "backbone_precision")  # of no head that reads maps
_OWN = frozenset(("balance", "dice"))  # of some


class DenseSet(Protocol):
    """Images with their truths, of one answer: ``MaskSet`` and its like."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of what truths hold."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The image files."""

    @property
    def images(self) -> ImageSet:
        """The images alone."""

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        """What lies among them and is not used."""

    def __len__(self) -> int: ...

    def at(self, indices: Iterable[int]) -> DenseSet:
        """Those of its images that ``indices`` name, in their order."""


SetT = TypeVar("SetT", bound=DenseSet)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learnt:
    """What one head learns from and is judged by; ``counts`` are what each class has in the training images."""

    task: DenseTask[Any]
    train: DenseSet
    val: DenseSet
    counts: NpArray


class DenseTask(Protocol[SetT]):
    """What of a training depends on what its head answers: the images' truths, the losses and the judge."""

    answer: ClassVar[Answer]
    usual_head: ClassVar[str]
    options: ClassVar[frozenset[str]]  # that say something of this answer, and of some others nothing
    thing: ClassVar[str]  # what a class has many of
    truths_are: ClassVar[str]  # in words

    def listed(self, training: Training, split: Split) -> SetT:
        """The images of a split.

        Raises:
            InputError: as of what opens such folders.
        """

    def checked(self, training: Training, preprocess: Preprocess, train: SetT, val: SetT) -> tuple[SetT, SetT, NpArray]:
        """Both splits, every truth looked at once, and what each class has in the training images.

        Raises:
            InputError: truths that do not fit their images, or in which there is nothing to learn.
        """

    def truths(self, images: SetT, preprocess: Preprocess) -> Sequence[Any]:
        """The truth of each image, as its objective takes it."""

    def arrays(self, truths: Sequence[Any]) -> Iterator[NpArray]:
        """All that is to be learnt, as arrays: their bytes are part of what a training is known by."""

    def losses(self, options: TrainOptions, counts: NpArray) -> Mapping[str, object]:
        """What is asked of the losses, as JSON."""

    def objective(
        self, form: MapForm, preprocess: Preprocess, plan: Plan, losses: Mapping[str, object]
    ) -> Objective[Any]:
        """What its head is fitted to, with what ``losses`` gave."""


def spelled(forms: Sequence[MapForm]) -> str:
    """Heads as the option asks for them."""
    return BETWEEN.join(str(each.form) for each in forms)


def aligned(learnt: Sequence[Learnt], data: Path) -> list[Learnt]:
    """Every split with its images in one order.

    Raises:
        InputError: heads have other images.
    """
    first, made = learnt[0], list[Learnt]()
    for each in learnt:
        sets = list[DenseSet]()
        for of, mine in ((first.train, each.train), (first.val, each.val)):
            places = {path: place for place, path in enumerate(mine.paths)}
            apart = sorted(places.keys() ^ set(of.paths))
            if apart:
                what = f"needs the same images with {first.task.truths_are} and with {each.task.truths_are}"
                got = f"{apart[0].relative_to(data)} with one alone"
                raise InputError(str(data), what, got=got, fix="give every image both, or train one head a time")
            sets.append(mine.at(places[path] for path in of.paths))
        made.append(replace(each, train=sets[0], val=sets[1]))
    return made


def asked_forms(options: TrainOptions, tasks: Sequence[DenseTask[Any]]) -> list[Form]:
    """The head that is asked for of each task.

    Raises:
        InputError: a head or an option that does not go with what is answered.
    """
    usual, asked = TrainOptions(), option("task", ",".join(task.answer for task in tasks))
    joint_augmentations(options.augment)
    own = frozenset[str]().union(*(task.options for task in tasks))
    for field in (*_REFUSED, *sorted(_OWN - own)):
        value = getattr(options, field)
        if value != getattr(usual, field):
            raise InputError(asked, f"does not go with {option(field)}", got=value, fix=f"leave {option(field)} out")
    if options.balance == "sampling":
        fix = f"weigh classes with {option('balance', 'weights')}, or add {option('dice', 1)}"
        raise InputError(asked, "has no images of a class", got=option("balance", "sampling"), fix=fix)
    unknown = [name for name in task_weights(options.task_weights) if name not in {task.answer for task in tasks}]
    if unknown:
        raise InputError(asked, "has no weight of what it is not asked for", got=option("task_weights", unknown[0]))
    given = [] if options.head is None else [head_form(each) for each in options.head.split(BETWEEN)]
    forms = {form.answer: form for form in given}
    others = [form.name for form in given if form.answer not in {task.answer for task in tasks}]
    if others or len(forms) < len(given):
        known = ", ".join(name for name, answer in FORMS.items() if answer in {task.answer for task in tasks})
        got = option("head", (others or [form.name for form in given])[-1])
        raise InputError(asked, f"needs a head of {known}", got=got)
    return [forms.get(task.answer) or head_form(task.usual_head) for task in tasks]
