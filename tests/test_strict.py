"""Typed getters: what each takes, and the place that each names when it refuses."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from edgepet.errors import InputError, PackError
from edgepet.strict import ObjectReader

VALUE = {
    "text": "a",
    "integer": 3,
    "number": 2,
    "table": {"x": 1},
    "tables": [{"x": 1}, {"x": 2}],
    "texts": ["a", "b"],
    "integers": [1, 2],
    "numbers": [1, 2.5],
    "raw": [None],
}


def test_what_is_right_is_read() -> None:
    table = ObjectReader(VALUE, "p")

    assert table.text("text", choices=["a", "b"]) == "a"
    assert table.integer("integer", least=3) == 3
    assert (table.number("number"), type(table.number("number"))) == (2.0, float)
    assert table.nested("table").integer("x") == 1
    assert [row.integer("x") for row in table.nested_list("tables")] == [1, 2]
    assert table.texts("texts") == ("a", "b")
    assert table.integers("integers", least=1) == (1, 2)
    assert table.numbers("numbers", count=2) == (1.0, 2.5)
    assert table.raw("raw") == [None]
    assert table.has("raw")
    assert not table.has("other")
    table.end()


Read = Callable[[ObjectReader], Any]
LONG = "x" * 100
REFUSED: list[tuple[str, Read, object, str]] = [
    ("a missing key", lambda t: t.text("k"), {}, "p: needs the key 'k'"),
    ("a number for a text", lambda t: t.text("k"), {"k": 1}, "p.k: needs a text, got 1"),
    ("an empty text", lambda t: t.text("k"), {"k": ""}, "p.k: needs a text, got ''"),
    ("a text that is no choice", lambda t: t.text("k", choices=["a", "b"]), {"k": "c"}, "p.k: needs one of a, b, got 'c'"),
    ("a long value", lambda t: t.integer("k"), {"k": LONG}, f"p.k: needs an integer of at least 0, got '{LONG[:76]}..."),
    ("a bool for an integer", lambda t: t.integer("k"), {"k": True}, "p.k: needs an integer of at least 0, got True"),
    ("a float for an integer", lambda t: t.integer("k"), {"k": 1.0}, "p.k: needs an integer of at least 0, got 1.0"),
    ("a small integer", lambda t: t.integer("k", least=2), {"k": 1}, "p.k: needs an integer of at least 2, got 1"),
    ("a bool for a number", lambda t: t.number("k"), {"k": False}, "p.k: needs a finite number, got False"),
    ("a text for a number", lambda t: t.number("k"), {"k": "1"}, "p.k: needs a finite number, got '1'"),
    ("NaN", lambda t: t.number("k"), {"k": float("nan")}, "p.k: needs a finite number, got nan"),
    ("infinity", lambda t: t.number("k"), {"k": float("-inf")}, "p.k: needs a finite number, got -inf"),
    ("an integer beyond floats", lambda t: t.number("k"), {"k": 10**400}, f"p.k: needs a finite number, got 1{'0' * 76}..."),
    ("an array for an object", lambda t: t.nested("k"), {"k": []}, "p.k: needs an object, got []"),
    ("null for an array", lambda t: t.sequence("k"), {"k": None}, "p.k: needs an array, got None"),
    ("a text for an array", lambda t: t.texts("k"), {"k": "ab"}, "p.k: needs an array, got 'ab'"),
    ("a number among objects", lambda t: t.nested_list("k"), {"k": [{}, 1]}, "p.k[1]: needs an object, got 1"),
    ("a number among texts", lambda t: t.texts("k"), {"k": ["a", 1]}, "p.k[1]: needs a text, got 1"),
    ("an empty one among texts", lambda t: t.texts("k"), {"k": [""]}, "p.k[0]: needs a text, got ''"),
    ("a bool among integers", lambda t: t.integers("k"), {"k": [0, True]}, "p.k[1]: needs an integer of at least 0, got True"),
    ("a negative among integers", lambda t: t.integers("k"), {"k": [-1]}, "p.k[0]: needs an integer of at least 0, got -1"),
    ("too few numbers", lambda t: t.numbers("k", count=3), {"k": [1, 2]}, "p.k: needs 3 numbers, got [1, 2]"),
    ("a bool among numbers", lambda t: t.numbers("k", count=1), {"k": [True]}, "p.k[0]: needs a finite number, got True"),
    ("a huge one among numbers", lambda t: t.numbers("k", count=1), {"k": [10**400]}, f"p.k[0]: needs a finite number, got 1{'0' * 76}..."),
    ("a key inside an object", lambda t: t.nested("k").nested("l").text("m"), {"k": {"l": {}}}, "p.k.l: needs the key 'm'"),
    ("a key inside an array", lambda t: t.nested_list("k")[1].text("m"), {"k": [{}, {}]}, "p.k[1]: needs the key 'm'"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "value", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_wrong_is_refused_with_its_place(read: Read, value: object, message: str) -> None:
    with pytest.raises(PackError) as refused:
        read(ObjectReader(value, "p"))

    assert str(refused.value) == message


@pytest.mark.parametrize("value", [[], "{}", None, 3])
def test_what_is_no_object_is_refused_at_once(value: object) -> None:
    with pytest.raises(PackError) as refused:
        ObjectReader(value, "p")

    assert str(refused.value) == f"p: needs an object, got {value!r}"


def test_keys_that_nobody_asked_for_are_refused_in_order() -> None:
    table = ObjectReader({"b": 1, "a": 2, "k": 3}, "p")
    table.integer("k")

    with pytest.raises(PackError) as refused:
        table.end()

    assert str(refused.value) == "p: knows no key 'a', 'b'\n  fix: update edgepet if a newer version wrote this file"


def test_the_error_is_the_one_that_the_reader_chose_at_every_depth() -> None:
    table = ObjectReader(json.loads('{"k": {"rows": [{}]}}'), "p", error=InputError)

    with pytest.raises(InputError) as refused:
        table.nested("k").nested_list("rows")[0].text("x")

    assert type(refused.value) is InputError
