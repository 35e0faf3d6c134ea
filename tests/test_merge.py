"""Merging: all checks first, then new tensors; the base is never touched."""

from __future__ import annotations

import numpy as np
import pytest

from edgepet.deltas.merge import merge
from edgepet.deltas.updates import Add, Kronecker, LowRank, Modulate, Push, Replace, Scale, Targeted
from edgepet.errors import BackboneError, InputError
from edgepet.spec import Base, NpArray, Target
from tests.tiny import FINGERPRINT, make_delta, same_bits

OTHER = "sha256:" + "0123456789ab" * 5 + "0123"


def base_of(dtype: type = np.float32) -> Base:
    rng = np.random.default_rng(3)
    shapes = {"a.weight": (4, 6), "a.bias": (4,), "conv.weight": (4, 3, 2, 2), "norm.weight": (4,)}
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return Base(name="tiny", fingerprint=FINGERPRINT, tensors={**tensors, "steps": np.array(7)})


def copies(base: Base) -> dict[str, NpArray]:
    return {name: tensor.copy() for name, tensor in base.tensors.items()}


def on(target: str, update: object) -> Targeted:
    return Targeted(Target.parse(target, where="test"), update)  # type: ignore[arg-type]


def test_tensors_that_the_delta_leaves_alone_are_those_of_the_base() -> None:
    base = base_of()
    before = copies(base)

    merged = merge(base, make_delta([on("a.bias", Add(np.ones(4, np.float32)))]))

    assert list(merged) == list(base.tensors)
    assert {name for name in merged if merged[name] is not base.tensors[name]} == {"a.bias"}
    assert merged["a.bias"].tobytes() == (before["a.bias"] + np.float32(1)).tobytes()
    assert same_bits(base.tensors, before)


def test_every_merged_tensor_is_new_and_the_base_keeps_its_bits() -> None:
    base = base_of()
    before = copies(base)
    value = np.full(4, 2, np.float32)
    left = np.ones((4, 1), np.float32)

    merged = merge(
        base,
        make_delta(
            [
                on("a.weight[0:2]", LowRank(left[:2], np.ones((1, 6), np.float32))),
                on("conv.weight", Kronecker(np.ones((1, 2, 3), np.float32), np.ones((1, 2, 4), np.float32))),
                on("norm.weight", Replace(value)),
                on("a.bias", Scale(value)),
            ]
        ),
    )

    merged["norm.weight"][:] = 0
    merged["a.weight"][:] = 0
    assert same_bits(base.tensors, before)
    assert value.tolist() == [2, 2, 2, 2]


def test_merging_again_from_the_base_gives_the_same_bits() -> None:
    base, delta = base_of(), make_delta([on("a.weight", Scale(np.linspace(0.5, 2, 4, dtype=np.float32)))])

    assert same_bits(merge(base, delta), merge(base, delta))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_merged_weight_has_the_dtype_of_the_base(dtype: type) -> None:
    delta = make_delta([on("a.weight", LowRank(np.ones((4, 2), np.float32), np.ones((2, 6), np.float16), scale=0.5))])

    assert merge(base_of(dtype), delta)["a.weight"].dtype == dtype


def test_a_float64_base_is_folded_in_float64() -> None:
    base = base_of(np.float64)
    s = np.array([1 / 3, 3, -1, 0.1])

    merged = merge(base, make_delta([on("a.weight", Scale(s))]))

    assert merged["a.weight"].tobytes() == (base.tensors["a.weight"] * s[:, None]).tobytes()


def test_updates_of_one_target_apply_in_their_order() -> None:
    base = base_of(np.float64)
    bias = base.tensors["a.bias"]
    s, d = np.array([2.0, 3.0, -1.0, 0.5]), np.array([1.0, -1.0, 4.0, 2.0])
    scale, shift = on("a.bias", Scale(s)), on("a.bias", Add(d))

    assert merge(base, make_delta([scale, shift]))["a.bias"].tolist() == (s * bias + d).tolist()
    assert merge(base, make_delta([shift, scale]))["a.bias"].tolist() == (s * (bias + d)).tolist()


def test_a_delta_for_another_backbone_is_refused_whatever_that_one_is_called() -> None:
    with pytest.raises(BackboneError) as refused:
        merge(base_of(), make_delta(fingerprint=OTHER))

    assert str(refused.value) == (
        "task 'flowers': was trained on tiny 0123456789ab, got tiny 4f1c4f1c4f1c\n"
        "  fix: pass `backbone=tiny` with the weights that it was trained on"
    )
    assert refused.value.exit_code == 3


def test_a_tensor_that_the_backbone_has_not_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        merge(base_of(), make_delta([on("b.weight[0:2]", Scale(np.ones(2)))]))

    assert str(refused.value) == "flowers: b.weight[0:2]: is no tensor of tiny"


def test_a_factor_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        merge(base_of(), make_delta([on("a.weight", LowRank(np.ones((4, 2)), np.ones((2, 3))))]))

    assert str(refused.value) == (
        "flowers: a.weight: LowRank needs right (2, 6), got (2, 3)\n"
        f"  fix: use the backbone it was trained on, {FINGERPRINT}"
    )


def test_a_scalar_that_counts_steps_cannot_be_scaled() -> None:
    with pytest.raises(InputError) as refused:
        merge(base_of(), make_delta([on("steps", Scale(np.ones(1)))]))

    assert str(refused.value).startswith("flowers: steps: Scale needs a tensor with axes, got a scalar\n")


def test_every_update_is_checked_before_the_first_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    folded: list[object] = []
    monkeypatch.setattr("edgepet.deltas.merge.fold", lambda targeted, tensor: folded.append(targeted) or tensor)
    good, bad = on("a.bias", Add(np.ones(4))), on("a.bias", Add(np.ones(5)))

    with pytest.raises(InputError, match=r"needs d \(4,\), got \(5,\)"):
        merge(base_of(), make_delta([good, good, bad]))

    assert folded == []


# --------------------------------------------------------------------------------------------------- pushes and order


def pushes(of: str) -> list[Targeted]:
    """A push in front of the updates of the weight that it reads, between two of its own vector."""
    rows, c = np.array([1, 2, 3, 4], np.float32), np.arange(6, dtype=np.float32)
    reads = Target("a.weight")
    return [
        on("a.bias", Scale(rows)),
        on("a.bias", Push(c, reads, of, scale=-2.0)),  # type: ignore[arg-type]
        on("a.weight", Modulate(np.ones((4, 1), np.float32), np.full((1, 6), 0.5, np.float32))),
        on("a.bias", Add(rows)),
        on("a.weight", Scale(rows)),
    ]


@pytest.mark.parametrize("of", ["frozen", "updated"])
def test_a_push_reads_the_backbones_weight_or_what_all_updates_leave_of_it(of: str) -> None:
    base = base_of(np.float64)
    weight, bias = base.tensors["a.weight"], base.tensors["a.bias"]
    rows = np.array([1.0, 2, 3, 4])

    merged = merge(base, make_delta(pushes(of)))

    changed = rows[:, None] * weight * 1.5
    read = weight if of == "frozen" else changed
    expected = rows * bias - 2 * np.array([sum(row[i] * i for i in range(6)) for row in read]) + rows
    # float64, sums of six products of about one
    assert np.abs(merged["a.bias"] - expected).max() <= 1e-13
    assert np.abs(merged["a.weight"] - changed).max() <= 1e-14


def test_where_a_push_stands_in_the_list_decides_nothing() -> None:
    base, updates = base_of(), pushes("updated")
    weights = [targeted for targeted in updates if targeted.target.tensor == "a.weight"]
    vectors = [targeted for targeted in updates if targeted.target.tensor == "a.bias"]

    merged = [merge(base, make_delta(order)) for order in (updates, weights + vectors, vectors + weights)]

    assert same_bits(merged[0], merged[1])
    assert same_bits(merged[0], merged[2])


def test_a_kernels_taps_share_what_is_pushed_into_their_channel() -> None:
    base = base_of(np.float64)
    c = np.array([1.0, -2.0, 0.5])

    merged = merge(base, make_delta([on("norm.weight", Push(c, Target("conv.weight")))]))

    kernel = base.tensors["conv.weight"]
    expected = base.tensors["norm.weight"] + np.einsum("oikl,i->o", kernel, c)
    assert np.abs(merged["norm.weight"] - expected).max() <= 1e-14


def test_a_push_of_a_tensor_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        merge(base_of(), make_delta([on("a.bias", Push(np.ones(6), Target("b.weight")))]))

    assert str(refused.value) == (
        "flowers: a.bias: Push reads b.weight, which is not there\n"
        f"  fix: use the backbone it was trained on, {FINGERPRINT}"
    )


@pytest.mark.parametrize("of", ["frozen", "updated"])
def test_pushes_that_go_round_in_circles_are_refused(of: str) -> None:
    one, two = (Push(np.ones(4), Target(name), of) for name in ("b.bias", "a.bias"))  # type: ignore[arg-type]

    with pytest.raises(InputError) as refused:
        make_delta([on("a.bias", one), on("b.bias", two)])

    assert str(refused.value) == "flowers: a.bias: Push reads b.bias, which a push changes"
    with pytest.raises(InputError, match=r"^flowers: a\.bias: Push reads a\.bias, which a push changes$"):
        make_delta([on("a.bias", two)])
