"""Typed getters over untrusted mappings; every error names the place, as pypa/packaging's ``pylock`` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

from edgepet.errors import EdgepetError, PackError


class ObjectReader:
    """One JSON object being read, by typed getters. ``end()`` refuses the keys that nobody asked for.

    Every getter raises ``error``, PackError by default, where the key is not there or its value is something else; so
    does making a reader of what is no object. ``where`` is the place that messages name.
    """

    def __init__(self, value: object, where: str, *, error: type[EdgepetError] = PackError) -> None:
        self.where, self._error, self._read = where, error, set[str]()
        if not isinstance(value, dict):
            self._refuse("", "needs an object", value)
        self._value: dict[str, Any] = value

    def text(self, key: str, *, choices: Sequence[str] | None = None) -> str:
        """A text that is not empty, one of ``choices`` where they are given."""
        value = self._take(key)
        if not isinstance(value, str) or not value:
            self._refuse(key, "needs a text", value)
        if choices is not None and value not in choices:
            self._refuse(key, f"needs one of {', '.join(choices)}", value)
        return value

    def integer(self, key: str, *, least: int = 0) -> int:
        """A whole number of at least ``least``; true and false are none."""
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._refuse(key, f"needs an integer of at least {least}", value)
        return value

    def number(self, key: str) -> float:
        """A finite number, as a float; true and false are none."""
        value = self._take(key)
        if not _finite(value):
            self._refuse(key, "needs a finite number", value)
        return float(value)

    def nested(self, key: str) -> ObjectReader:
        """The object under ``key``."""
        return ObjectReader(self._take(key), self._at(key), error=self._error)

    def nested_list(self, key: str) -> list[ObjectReader]:
        """The array of objects under ``key``."""
        return [
            ObjectReader(item, f"{self._at(key)}[{i}]", error=self._error) for i, item in enumerate(self.sequence(key))
        ]

    def texts(self, key: str) -> tuple[str, ...]:
        """An array of texts that are not empty."""
        values = self.sequence(key)
        for i, value in enumerate(values):
            if not isinstance(value, str) or not value:
                self._refuse(f"{key}[{i}]", "needs a text", value)
        return tuple(values)

    def integers(self, key: str, *, least: int = 0) -> tuple[int, ...]:
        """An array of whole numbers of at least ``least``."""
        values = self.sequence(key)
        for i, value in enumerate(values):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                self._refuse(f"{key}[{i}]", f"needs an integer of at least {least}", value)
        return tuple(values)

    def numbers(self, key: str, *, count: int) -> tuple[float, ...]:
        """An array of ``count`` finite numbers."""
        values = self.sequence(key)
        if len(values) != count:
            self._refuse(key, f"needs {count} numbers", values)
        for i, value in enumerate(values):
            if not _finite(value):
                self._refuse(f"{key}[{i}]", "needs a finite number", value)
        return tuple(float(value) for value in values)

    def sequence(self, key: str) -> list[Any]:
        """An array of anything."""
        value = self._take(key)
        if not isinstance(value, list):
            self._refuse(key, "needs an array", value)
        return value

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._take(key)
        if not isinstance(value, bool):
            self._refuse(key, "needs true or false", value)
        return value

    def absent(self, key: str) -> bool:
        """Whether ``key`` is there and null."""
        return self._take(key) is None

    def raw(self, key: str) -> Any:
        """Any JSON value: for free-form provenance that no code acts on."""
        return self._take(key)

    def names(self) -> list[str]:
        """All keys, sorted: for an object whose keys are names."""
        return sorted(self._value)

    def has(self, key: str) -> bool:
        """Whether ``key`` is there."""
        return key in self._value

    def end(self) -> None:
        """Refuse what was not read: a key this version does not know may change what the rest means."""
        unknown = sorted(set(self._value) - self._read)
        if unknown:
            raise self._error(
                self.where,
                f"knows no key {', '.join(map(repr, unknown))}",
                fix="update edgepet if a newer version wrote this file",
            )

    def refusal(self, key: str, what: str, got: object = None) -> EdgepetError:
        """An error of this reader's kind about ``key``, or about the whole object where it is empty."""
        return self._error(self._at(key), what, got=got)

    def _take(self, key: str) -> Any:
        self._read.add(key)
        if key not in self._value:
            raise self._error(self.where, f"needs the key {key!r}")
        return self._value[key]

    def _at(self, key: str) -> str:
        return f"{self.where}.{key}" if key else self.where

    def _refuse(self, key: str, what: str, value: object) -> NoReturn:
        text = repr(value)
        raise self._error(self._at(key), what, got=text if len(text) <= 80 else f"{text[:77]}...")


def _finite(value: object) -> bool:
    """Whether ``value`` is a number that a float can hold: JSON may spell an integer of any length."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
