"""Settings of a method: as people type them, as packs and work folders keep them, and back."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, cast

from edgepet.errors import InputError, option
from edgepet.methods.depth import BLOCKS, ON, limited, placed, takes_on
from edgepet.methods.method import Method
from edgepet.methods.table import METHODS


def configure(name: str, settings: Mapping[str, str] = types.MappingProxyType({})) -> Method:
    """The method called ``name`` with settings as people type them: ``rank=4``, ``on=q,k,v``, ``shuffle=true``.

    Every method takes ``blocks=6-11`` beside its own, and ``on=q,fc1``: it is then one that is kept to blocks
    (``depth.limited``), and to layers (``depth.placed``) where it has no ``on`` of its own.

    Raises:
        InputError: no such method or setting, a value of another type, or one that the method refuses.
    """
    plain: Any = METHODS.get(name)
    if plain is None:
        raise InputError(option("method"), f"is one of {', '.join(METHODS)}", got=repr(name))
    on: Any = plain if takes_on(plain) else placed(plain)
    kind: Any = limited(on)
    known = {field.name for field in fields(kind)}
    types_of = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in known:
            has = f"{name} has the settings {', '.join(sorted(known))}"
            raise InputError(f"{option('settings')} {key}", has, got=repr(key))
        try:
            values[key] = _parse(text, types_of[key])
        except ValueError as error:
            raise InputError(
                f"{option('settings')} {key}", f"needs {_spelled(types_of[key])}", got=repr(text)
            ) from error
    chosen: Any = on if ON in values else plain
    method: Method = (limited(chosen) if BLOCKS in values else chosen)(**values)
    return method


def stored(method: Method) -> dict[str, object]:
    """The settings of ``method`` as packs, work folders and checkpoints keep them: JSON values, tuples as lists."""
    settings = asdict(cast(Any, method))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def restored(name: str, settings: Mapping[str, object]) -> Method:
    """The method whose settings ``stored`` put out, read back from JSON.

    Raises:
        InputError: as ``configure``.
    """
    return configure(name, {key: typed(value) for key, value in settings.items()})


def typed(value: object) -> str:
    """A stored setting as people type it: the inverse of what ``configure`` reads."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{typed(entry)}" for key, entry in value.items())
    return ",".join(map(typed, value)) if isinstance(value, list) else str(value)


def _parse(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        return tuple(_parse(part, typing.get_args(kind)[0]) for part in text.split(",") if text)
    if typing.get_origin(kind) is Mapping:
        pairs = [part.rpartition(":") for part in text.split(",") if text]
        if not all(name for name, _, _ in pairs):
            raise ValueError(text)
        return {name: _parse(value, typing.get_args(kind)[1]) for name, _, value in pairs}
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if kind is float and not math.isfinite(float(text)):
        raise ValueError(text)
    return kind(text)


def _spelled(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"{_spelled(typing.get_args(kind)[0]).removeprefix('a ')}s with commas between"
    if typing.get_origin(kind) is Mapping:
        return f"NAME:{_spelled(typing.get_args(kind)[1]).removeprefix('a ')} with commas between"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}[kind]
