"""One byte string for one meaning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepet.canonical import backbone_fingerprint, canonical_json, parse_json, sha256_tensors
from edgepet.spec import NpArray
from tests.tiny import SETTINGS


def tensors() -> dict[str, NpArray]:
    rng = np.random.default_rng(1)
    return {"b": rng.standard_normal((3, 4)).astype(np.float16), "a": np.arange(5), "c": np.array(0.5, np.float32)}


def test_keys_are_sorted_and_nothing_is_spaced() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null,true]}'.encode()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20) + 1, 10**20 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON.filter(lambda value: "\\ud" not in ascii(value)))
@SETTINGS
def test_what_was_written_is_read_again_and_written_alike(value: object) -> None:
    text = canonical_json(value)

    assert parse_json(text) == value
    assert canonical_json(parse_json(text)) == text


@pytest.mark.parametrize(("text", "digits"), [(b"100000000000000000000", 21), (b"-100000000000000000000", 21)])
def test_an_integer_of_more_than_twenty_digits_is_not_read(text: bytes, digits: int) -> None:
    with pytest.raises(ValueError, match=f"an integer has {digits} digits"):
        parse_json(text)

    assert parse_json(text[:-1]) == int(text[:-1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, "\ud800"])
def test_what_json_cannot_say_is_not_written(value: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the words are Python's
        canonical_json(value)


UNREADABLE = [
    ('{"a": 1, "a": 1}', "a key appears twice"),
    ('{"x": {"a": 1, "a": 2}}', "a key appears twice"),
    ("[NaN]", "NaN is not a JSON number"),
    ("[Infinity]", "Infinity is not a JSON number"),
    ("[-Infinity]", "-Infinity is not a JSON number"),
    ("[1e999]", "1e999 is not a JSON number"),
    ("[-1e999]", "-1e999 is not a JSON number"),
]


@pytest.mark.parametrize(("text", "message"), UNREADABLE, ids=[row[0] for row in UNREADABLE])
def test_what_has_two_readings_or_no_number_is_not_read(text: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  compared whole below
        parse_json(text)

    assert str(refused.value) == message


@pytest.mark.parametrize("text", ["", "{", "{} {}", b"\xff", "'a'"])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the words are Python's
        parse_json(text)


def test_a_digest_does_not_depend_on_the_order_of_names() -> None:
    assert sha256_tensors(dict(reversed(tensors().items()))) == sha256_tensors(tensors())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_a_digest_does_not_depend_on_the_precision_that_values_are_stored_in(dtype: str | type) -> None:
    stored = {n: t.astype(dtype) if t.dtype.kind == "f" else t for n, t in tensors().items()}

    assert sha256_tensors(stored) == sha256_tensors(tensors())


def test_a_digest_does_not_depend_on_memory_layout() -> None:
    strange = {n: np.repeat(np.asfortranarray(t), 2, axis=-1)[..., ::2] if t.ndim else t for n, t in tensors().items()}
    assert not strange["b"].flags.c_contiguous

    assert sha256_tensors(strange) == sha256_tensors(tensors())


CHANGED: dict[str, dict[str, NpArray]] = {
    "one value": {**tensors(), "a": np.array([0, 1, 2, 3, 5])},
    "the sign of one value": {**tensors(), "c": np.array(-0.5, np.float32)},
    "a shape": {**tensors(), "b": tensors()["b"].reshape(4, 3)},
    "a scalar that became a vector": {**tensors(), "c": tensors()["c"].reshape(1)},
    "a name": {"d" if n == "a" else n: t for n, t in tensors().items()},
    "a tensor less": {n: t for n, t in tensors().items() if n != "c"},
    "integers of another width": {**tensors(), "a": tensors()["a"].astype(np.int32)},
    "integers as floats": {**tensors(), "a": tensors()["a"].astype(np.float32)},
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_a_digest_depends_on(changed: dict[str, NpArray]) -> None:
    assert sha256_tensors(changed) != sha256_tensors(tensors())


def test_a_fingerprint_says_its_hash_and_leaves_out_the_steps_a_batch_norm_counted() -> None:
    counted = {**tensors(), "bn.num_batches_tracked": np.array(7)}

    assert backbone_fingerprint(counted) == "sha256:" + sha256_tensors(tensors())
    assert backbone_fingerprint({**tensors(), "bn.running_mean": np.ones(2)}) != backbone_fingerprint(tensors())


def test_the_digest_of_version_1_never_changes() -> None:
    # Packs in the field are bound to it: another digest for the same tensors orphans them all.
    known = {"w": np.array([[1, 2], [3, 4]], np.float32), "n": np.arange(3, dtype=np.int64)}

    assert sha256_tensors(known) == "c3838fe120b21c3c6f748b4e7cda4feb322b6280c46841371e09bcbb3ed28a4c"
