"""What the texts of a recipe mean: augmentations, and an optimiser or a schedule by name with settings. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgepet.errors import InputError, option

Balance: TypeAlias = Literal["weights", "sampling"]
Value: TypeAlias = bool | int | float | tuple[float, ...]

AUGMENTATIONS = ("flip", "crop", "randaugment", "erasing", "mixup", "cutmix")
BALANCES: tuple[Balance, ...] = ("weights", "sampling")
OWN_OPTIMIZER, OWN_SCHEDULE = "adamw", "cosine"  # without settings; all else is timm's

_RANDAUGMENT = "rand-m9-mstd0.5-inc1"  # with the strengths below, what timm's recipes for transformers have: DeiT's
_ERASING, _MIXUP, _CUTMIX = 0.25, 0.8, 1.0

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
