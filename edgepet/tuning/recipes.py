"""What the texts of a recipe mean: augmentations, an optimiser or a schedule by name with settings, PACE. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from edgepet.deltas.heads import ANSWERS
from edgepet.errors import InputError, option
from edgepet.networks.head_settings import FORMS, MOST_DEPTH, Form

Balance: TypeAlias = Literal["weights", "sampling"]
Value: TypeAlias = bool | int | float | tuple[float, ...]

AUGMENTATIONS = ("flip", "crop", "randaugment", "erasing", "mixup", "cutmix")
BALANCES: tuple[Balance, ...] = ("weights", "sampling")
BETWEEN = "+"  # of several heads
MOST_WIDTH = 1024  # of a head: what its vocabulary is for is small
OWN_OPTIMIZER, OWN_SCHEDULE = "adamw", "cosine"  # without settings; all else is timm's
FULL, CHEAP = "full", "cheap"  # forms of PACE

_RANDAUGMENT = "rand-m9-mstd0.5-inc1"  # with the strengths below, what timm's recipes for transformers have: DeiT's
_ERASING, _MIXUP, _CUTMIX = 0.25, 0.8, 1.0

_PACE = {FULL: {"sigma": 1.2, "weight": 1.0}, CHEAP: dict[str, float]()}  # the authors name none for the cheap form

_FRACTION = r"\d{1,3}(?:\.\d{1,9})?"
_POLICY = re.compile(
    rf"rand(-(m|n|mmax|inc)\d{{1,3}}|-(p|mstd){_FRACTION}|-t(weights|3aw|3a))*"
    rf"|augmix(-(m|w|d|b)\d{{1,3}}|-(a|mstd){_FRACTION})*"
    rf"|(v0r?|originalr?|3a)(-mstd{_FRACTION})?"
)
_STRENGTH = re.compile(rf"(erasing-p|mixup-a|cutmix-a)({_FRACTION})")
_NAMED = re.compile(r"[A-Za-z0-9_]+")
_SETTING = re.compile(r"([a-z][a-z0-9_]*)=(\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentations:
    """What is done to the images of a step, in this order; what is None, False or 0 is not done.

    ``policy`` is timm's text for RandAugment, AugMix or AutoAugment; ``erasing`` is a probability, ``mixup`` and
    ``cutmix`` are the alphas of their beta distributions.
    """

    policy: str | None = None
    flip: bool = False
    crop: bool = False
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


def augmentations(names: Sequence[str]) -> Augmentations:
    """What ``names`` ask for: those of ``AUGMENTATIONS``, with a strength as ``mixup-a0.2``, and timm's policies.

    Raises:
        InputError: a name that is not known, two of one kind, or a strength out of its range.
    """
    found = dict[str, object]()
    for name in names:
        kind, value = _augmentation(name)
        if kind in found:
            raise InputError(option("augment"), "takes one of each kind", got=f"{name!r} as well")
        found[kind] = value
    return Augmentations(**found)  # type: ignore[arg-type]


def _augmentation(name: str) -> tuple[str, object]:
    if name in ("flip", "crop"):
        return name, True
    if name == "randaugment" or _POLICY.fullmatch(name):
        return "policy", _RANDAUGMENT if name == "randaugment" else name
    if name in (usual := {"erasing": _ERASING, "mixup": _MIXUP, "cutmix": _CUTMIX}):
        return name, usual[name]
    if match := _STRENGTH.fullmatch(name):
        kind, strength = match[1][:-2], float(match[2])
        if strength == 0 or (kind == "erasing" and strength > 1):
            what = "a probability above 0 and at most 1" if kind == "erasing" else "an alpha above 0"
            raise InputError(option("augment"), f"{kind} needs {what}", got=repr(name))
        return kind, strength
    raise InputError(option("augment"), f"knows {', '.join(AUGMENTATIONS)} and the like of rand-m9-n2", got=repr(name))


def named(field: str, text: str) -> tuple[str, Mapping[str, Value]]:
    """The name and the settings of ``sgd,momentum=0.95,nesterov=true``; lists are written as ``0.9/0.95``.

    Raises:
        InputError: ``text`` has another form.
    """
    name, *rest = (part.strip() for part in text.split(","))
    if not _NAMED.fullmatch(name):
        raise InputError(option(field), "needs NAME or NAME,KEY=VALUE,...", got=repr(text))
    settings = dict[str, Value]()
    for part in rest:
        match = _SETTING.fullmatch(part)
        value = _value(match[2]) if match else None
        if match is None or value is None:
            raise InputError(option(field), "needs settings as KEY=NUMBER, with / between several", got=repr(part))
        settings[match[1]] = value
    return name, settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Consistency:
    """PACE: what layers are tuned by is disturbed by noise of the deviation ``sigma``, and the squared distance of an
    image's logits from others of its own counts ``weight`` in the loss.

    Those others are, where ``form`` is FULL, of a second pass with noise of its own, and where it is CHEAP, of the
    epoch before. ``str`` of it is the text that ``consistency`` reads.
    """

    form: str
    sigma: float
    weight: float

    def __str__(self) -> str:
        return f"{self.form},sigma={self.sigma!r},weight={self.weight!r}"


def consistency(text: str | None) -> Consistency | None:
    """What ``full,sigma=1.2,weight=1`` asks for; None where nothing does, or sigma is 0: that is plain training.

    Raises:
        InputError: no such form or setting, a number that is none, or one that the form does not know by itself.
    """
    if text is None:
        return None
    where = option("consistency")
    form, given = named("consistency", text)
    if form not in _PACE:
        raise InputError(where, f"knows {FULL} and {CHEAP}", got=repr(form))
    unknown = [key for key in given if key not in _PACE[FULL]]
    if unknown:
        raise InputError(where, f"knows the settings {', '.join(_PACE[FULL])}", got=repr(unknown[0]))
    for key, value in given.items():
        if isinstance(value, bool | tuple) or not 0 <= value < math.inf:
            raise InputError(where, f"needs a {key} of at least 0 and finite", got=value)
    settings = {**_PACE[form], **given}
    if missing := [key for key in _PACE[FULL] if key not in settings]:
        what = f"{form} needs a sigma and a weight of its own"
        fix = f"begin with a larger sigma and a smaller weight than those of {FULL}, 1.2 and 1"
        raise InputError(where, what, got=f"no {missing[0]}", fix=fix)
    asked = Consistency(form=form, **{key: float(value) for key, value in settings.items()})  # type: ignore[arg-type]
    return asked if asked.sigma else None


def task_weights(text: str | None) -> dict[str, float]:
    """What ``boxes=1,mask=0.5`` asks for, by the answer; nothing where nothing is asked.

    Raises:
        InputError: an answer that no head has, or a weight that is none.
    """
    found = dict[str, float]()
    for part in text.split(",") if text else ():
        name, _, number = part.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if name not in ANSWERS or name in found or not 0 < weight < math.inf:
            what = f"needs weights above 0 of {', '.join(ANSWERS)}, as boxes=1,mask=0.5"
            raise InputError(option("task_weights"), what, got=repr(part))
        found[name] = weight
    return found


def head_form(text: str) -> Form:
    """What ``mlp,width=32,maps=0/1/2,depthwise=true`` asks for, or ``fcos,width=32,depth=2``.

    Raises:
        InputError: no such head or setting, or a value that it cannot have.
    """
    where = option("head")
    name, given = named("head", text)
    if name not in FORMS:
        raise InputError(where, f"is {', '.join(FORMS)}", got=repr(name))
    known = {
        "mlp": ("width", "maps", "depthwise", "norm", "separation"),
        "fcos": ("width", "maps", "depth", "norm"),
        "pooled": (),
    }.get(name, ("maps", "norm"))
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError(where, f"{name} knows the settings {', '.join(known) or 'none'}", got=repr(unknown[0]))
    values = dict[str, Any](given)
    for key in ("depthwise", "norm", "separation"):
        if not isinstance(values.get(key, False), bool):
            raise InputError(where, f"needs {key}=true or {key}=false", got=values[key])
    if not _is_natural(width := values.get("width", 1)) or not 1 <= width <= MOST_WIDTH:
        raise InputError(where, f"needs a width from 1 to {MOST_WIDTH}", got=width)
    if not _is_natural(depth := values.get("depth", 1)) or not 1 <= depth <= MOST_DEPTH:
        raise InputError(where, f"needs a depth from 1 to {MOST_DEPTH}", got=depth)
    maps = values.pop("maps", ())
    numbers = maps if isinstance(maps, tuple) else (maps,)
    if not all(map(_is_natural, numbers)) or len(set(numbers)) < len(numbers):
        raise InputError(where, "needs numbers of maps, each once, as maps=0/1/2", got="/".join(map(str, numbers)))
    return Form(name=name, maps=tuple(sorted(numbers)), **values)


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _value(text: str) -> Value | None:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if "/" in text:
            return tuple(_number(part) for part in text.split("/"))
        return _number(text)
    except ValueError:
        return None


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else float(text)
