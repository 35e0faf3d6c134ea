"""Any report as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath

import numpy as np

DROPPED = "times_ms"  # every single observation: for statistics, not for JSON
SHOWN = "shown"  # where a class says it, the names that take the place of its fields


def to_json(report: object) -> object:
    """``report`` as dicts, lists, texts, numbers, bools and None; a number that JSON lacks (inf, NaN) is None.

    Raises:
        TypeError: something in it has no plain form.
    """
    if isinstance(report, np.generic):
        return to_json(report.item())
    if isinstance(report, float):
        return report if math.isfinite(report) else None
    if report is None or isinstance(report, (str, int)):
        return report
    if isinstance(report, PurePath):
        return str(report)
    if is_dataclass(report) and not isinstance(report, type):
        names = getattr(report, SHOWN, None) or [field.name for field in fields(report) if field.name != DROPPED]
        return {name: to_json(getattr(report, name)) for name in names}
    if isinstance(report, Mapping):
        return {str(key): to_json(value) for key, value in report.items()}
    if isinstance(report, (list, tuple)):
        return [to_json(value) for value in report]
    message = f"{type(report).__name__} has no JSON form"
    raise TypeError(message)
