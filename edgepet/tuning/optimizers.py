"""What moves a training's tensors and how fast: torch's AdamW under half a cosine, or timm's by name.

Needs the ``train`` extra.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from edgepet.errors import InputError, MissingError, option, require
from edgepet.tuning.recipes import OWN_OPTIMIZER, OWN_SCHEDULE, Value, named

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
_IN_EPOCHS = (
    "decay_epochs",
    "decay_milestones",
    "stable_timescale",
    "warmup_epochs",
)  # timm's, which here are in steps
_SETTINGS = (*_IN_EPOCHS, "decay_rate", "k_decay", "min_lr", "warmup_lr")
_STEPS, _MILESTONES = 0.3, (0.3, 0.6, 0.9)  # of all epochs: timm's defaults of 90 and 90, 180, 270 are of its 300
_TORCHS = "torch"  # the state of an optimiser that is not all tensors, as torch writes it
_TRIED = 100  # steps and epochs of a schedule that is only tried out

Groups: TypeAlias = list[dict[str, Any]]
Schedule: TypeAlias = Callable[[int], None]


def require_optimizer(text: str) -> None:
    """Refuse an optimiser that timm does not make, before images are read.

    Raises:
        InputError: no such name or setting, or one that needs what a step here does not give.
        MissingError: it needs a package that is not installed.
    """
    optimizer_of([{"params": [torch.zeros(2, 2, requires_grad=True)], "initial_lr": 1e-3}], text, 1e-3, 0.0)


def require_schedule(text: str) -> None:
    """Refuse a schedule that timm does not make, before images are read.

    Raises:
        InputError: no such name or setting.
    """
    groups: Groups = [{"params": [torch.zeros(2, 2)], "lr": 1e-3, "initial_lr": 1e-3}]
    schedule_of(torch.optim.SGD(groups), text, epochs=_TRIED, updates=1, rising=1)


def optimizer_of(groups: Groups, text: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser ``text`` of ``groups``, each with its ``initial_lr``.

    ``adamw`` without settings is torch's AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); all else is made by timm.

    Raises:
        InputError, MissingError: as ``require_optimizer``.
    """
    groups = [group | {"lr": group["initial_lr"]} for group in groups]
    if text == OWN_OPTIMIZER:
        return torch.optim.AdamW(groups, weight_decay=weight_decay)
    name, settings = named("optimizer", text)
    timm = require("timm.optim", extra="train", purpose="train")
    if name.lower().removeprefix("lookahead_") not in timm.list_optimizers():
        fix = "python -c 'import timm.optim; print(timm.optim.list_optimizers())' lists them"
        raise InputError(option("optimizer"), "is adamw or another of timm's", got=repr(name), fix=fix)
    try:
        with _timms_refusals("optimizer", text):
            made: torch.optim.Optimizer = timm.create_optimizer_v2(
                groups, opt=name, lr=lr, weight_decay=weight_decay, **settings
            )
    except ImportError as error:
        raise MissingError(f"the optimiser {name}", "needs another package", got=error) from error
    if getattr(made, "is_second_order", False):
        raise InputError(option("optimizer"), "must not need second derivatives", got=repr(name))
    return made


def schedule_of(optimizer: torch.optim.Optimizer, text: str, *, epochs: int, updates: int, rising: int) -> Schedule:
    """What sets the learning rates before a step, given its number from 0: a function of that number alone.

    ``cosine`` without settings is a straight rise over ``rising`` steps, then half a cosine down to zero. All else is
    made by timm, with the same rise unless ``text`` says otherwise.

    Args:
        updates: steps of an epoch.

    Raises:
        InputError: as ``require_schedule``.
    """
    total = epochs * updates
    if text == OWN_SCHEDULE:
        return lambda step: _set(optimizer, _half_cosine(step, total, rising))
    name, settings = named("schedule", text)
    if name not in SCHEDULES:
        what = f"knows {', '.join(SCHEDULES)}"
        raise InputError(option("schedule"), what, got=repr(name))
    unknown = [key for key in settings if key not in _SETTINGS]
    if unknown:
        raise InputError(option("schedule"), f"knows the settings {', '.join(_SETTINGS)}", got=repr(unknown[0]))
    usual: dict[str, dict[str, Value]] = {
        "step": {"decay_epochs": _STEPS * epochs},
        "multistep": {"decay_milestones": tuple(part * epochs for part in _MILESTONES)},
    }
    asked = {key: _in_steps(key, value, updates) for key, value in {**usual.get(name, {}), **settings}.items()}
    least = min(group["initial_lr"] for group in optimizer.param_groups)
    timm = require("timm.scheduler", extra="train", purpose="train")
    with _timms_refusals("schedule", text):
        made, _ = timm.create_scheduler_v2(
            optimizer, sched=name, num_epochs=total, step_on_epochs=True,  # its epochs are our steps
            **({"warmup_epochs": rising, "warmup_lr": least / rising} | asked),
        )  # fmt: skip
    return (lambda step: None) if made is None else made.step


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that its next step depends on."""
    whole = optimizer.state_dict()
    if type(optimizer) is torch.optim.AdamW:  # its state is tensors alone
        return {f"{number}/{name}": value for number, own in whole["state"].items() for name, value in own.items()}
    file = io.BytesIO()
    torch.save(whole, file)
    return {_TORCHS: torch.from_numpy(np.frombuffer(file.getvalue(), np.uint8).copy())}


def set_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take up what ``state_of`` gave.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is another optimiser's, or damaged.
    """
    if _TORCHS in tensors:
        try:
            whole = torch.load(io.BytesIO(tensors[_TORCHS].numpy().tobytes()), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(str(error)) from error
    else:
        whole = optimizer.state_dict()
        for key, value in tensors.items():
            number, name = key.split("/")
            whole["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(whole)


def _set(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _half_cosine(step: int, total: int, rising: int) -> float:
    """What a learning rate is multiplied with: a straight rise, then half a cosine down to zero."""
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _in_steps(key: str, value: Value, updates: int) -> Value | list[int]:
    if key not in _IN_EPOCHS or (key == "decay_epochs" and isinstance(value, float) and value < 1):
        return value
    if isinstance(value, tuple):
        return [round(each * updates) for each in value]
    return max(1, round(value * updates)) if key != "warmup_epochs" else round(value * updates)


@contextlib.contextmanager
def _timms_refusals(field: str, text: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(option(field), f"timm takes no {text!r}", got=error) from error
