"""Each layer's torch forward is its NumPy definition, and a trained head computes what it lowers to."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from edgepet.deltas.heads import Map, MapHead
from edgepet.deltas.layers import tensors
from edgepet.errors import InputError
from edgepet.networks.head_forms import HeadForm
from edgepet.networks.head_settings import Form
from edgepet.networks.heads import HeadNetwork, forward
from edgepet.spec import NpArray
from tests.layers import EXAMPLES, LayerCase, layer_cases

FINE = Map(name="map.0", point="stages.1:out", channels=5, stride=8, height=8, width=12)
MIDDLE = Map(name="map.1", point="stages.2:out", channels=6, stride=16, height=4, width=6)
COARSE = Map(name="map.2", point="stages.3:out", channels=7, stride=32, height=2, width=3)
STAGES = (FINE, MIDDLE, COARSE)
DEPTHS = tuple(
    Map(name=f"map.{n}", point=f"blocks.{n}:out", channels=6, stride=14, height=4, width=4) for n in range(4)
)
LABELS = ("land", "water", "snow")


@EXAMPLES
@given(layer_cases())
def test_a_layer_in_torch_is_its_definition_in_numpy(case: LayerCase) -> None:
    held = {name: torch.from_numpy(array) for name, array in tensors(case.layer).items()}

    got = forward(case.layer, tuple(torch.from_numpy(x) for x in case.inputs), held)

    np.testing.assert_allclose(got.numpy(), case.layer(*case.inputs), atol=1e-12, rtol=1e-12)  # float64: rounding only


def drawn_maps(maps: tuple[Map, ...], seed: int = 5, n: int = 3) -> dict[str, NpArray]:
    rng = np.random.default_rng(seed)
    return {each.name: 2 + 3 * rng.standard_normal((n, *each.shape)) for each in maps}


def moved(form: HeadForm, seed: int = 3) -> HeadForm:
    """``form`` with every number away from where it starts: statistics, batch norms and the last product too."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in form.state_dict().items():
            noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)))
            if tensor.is_floating_point():
                positive = name.endswith("running_var") or name.startswith("std")
                tensor.copy_(torch.exp(0.3 * noise) if positive else tensor + 0.3 * noise)
    return form.eval().double()


def in_torch(maps: dict[str, NpArray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in maps.items()}


APART = "depthwise point activation multiply add point regions add"
# The finest map's own constant, the mean's kernel, the gate, the last product, regions.
SEPARATED = 4 + 4 * 9 + 4 + 1 + (3 * 4 + 3) + (3 * 4 + 4 * 4)
FORMS = [
    (Form(name="linear"), STAGES, 3 * 7 + 3, "point"),
    (Form(name="linear", norm=True), STAGES, 3 * 7 + 3, "norm point"),
    (Form(name="linear", maps=(0, 2)), STAGES, 3 * (5 + 7) + 3, "point point resize add"),
    (Form(name="linear", maps=(0, 1, 2, 3)), DEPTHS, 3 * 24 + 3, "point point point point add"),
    (Form(width=4), STAGES, 4 * 18 + 4 + 3 * 4 + 3, "point point resize point resize add activation point"),
    (Form(width=4, maps=(2,)), STAGES, 4 * 7 + 4 + 3 * 4 + 3, "point activation point"),
    (Form(width=4, norm=True, maps=(0, 1)), STAGES, 4 * 11 + 4 + 3 * 4 + 3, "norm point norm point resize add activation point"),
    (
        Form(width=4, depthwise=True), DEPTHS, 4 * 24 + 4 + 4 * 9 + 4 + 16 + 4 + 3 * 4 + 3,
        "point point point point add activation depthwise activation point activation point",
    ),
    (
        Form(width=4, separation=True, maps=(0, 2)), STAGES, 4 * 12 + 4 + SEPARATED,
        f"point depthwise point resize add activation {APART}",
    ),
    (
        Form(width=4, separation=True, depthwise=True, norm=True, maps=(0, 3)), DEPTHS,
        4 * 12 + 4 + 4 * 9 + 4 + 16 + 4 + SEPARATED,
        f"norm point depthwise norm point add activation depthwise activation point activation {APART}",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("form", "maps", "values", "kinds"), FORMS)
def test_a_trained_head_lowers_to_the_fewest_layers_that_compute_it(
    form: Form, maps: tuple[Map, ...], values: int, kinds: str
) -> None:
    trained, given = moved(HeadForm(form, maps, 3)), drawn_maps(maps)

    head = trained.lower("what", LABELS)

    with torch.no_grad():
        expected = trained(in_torch(given)).numpy()
    assert np.ptp(expected) > 1  # or a head that answers zero would pass
    np.testing.assert_allclose(head(given), expected, atol=1e-9 * np.abs(expected).max(), rtol=0)
    assert " ".join(step.layer.kind for step in head.steps) == kinds
    assert head.stored_values == values
    assert head.shapes(maps)[head.steps[-1].gives] == expected.shape[1:]


def test_the_values_of_a_head_are_those_that_are_published() -> None:
    """docs say bytes by these: a width of 384, ten classes, as SegFormer's head is once it is folded."""
    depths = tuple(Map(name=f"map.{n}", point="", channels=384, stride=14, height=2, width=2) for n in range(4))
    lite0 = tuple(
        Map(name=f"map.{n}", point="", channels=c, stride=8 << n, height=8 >> n, width=8 >> n)
        for n, c in enumerate((40, 112, 320))
    )
    labels = tuple(map(str, range(10)))

    def values(form: Form, maps: tuple[Map, ...]) -> int:
        return HeadForm(form, maps, 10).lower("what", labels).stored_values

    assert values(Form(name="linear"), depths) == 3_850
    assert values(Form(), depths) == 99_018
    assert values(Form(maps=(3,)), depths) == 25_290
    assert values(Form(depthwise=True), depths) == 99_018 + 4_800
    assert values(Form(maps=(0, 3), separation=True), depths) == 2 * 384 * 64 + 6_155
    assert values(Form(), lite0) == 31_050 - 2 * 64  # published with a bias for each map, which sum to one


@pytest.mark.parametrize("form", [Form(name="linear"), Form(width=4, depthwise=True), Form(width=4, separation=True)])
def test_a_head_begins_at_zero_and_as_its_seed_draws_it(form: Form) -> None:
    one, same, other = (HeadForm(form, STAGES, 3, seed=seed) for seed in (1, 1, 2))
    given = in_torch({name: x.astype(np.float32) for name, x in drawn_maps(STAGES).items()})

    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    if form.name == "mlp":
        assert not torch.equal(one.laterals[0].weight, other.laterals[0].weight)
    assert not one.eval()(given).any()
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    moved(one)
    one.float().reset()
    after = {name: tensor for name, tensor in one.state_dict().items() if not name.startswith(("mean", "std"))}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_maps_are_seen_by_their_statistics_and_a_dead_channel_is_not_blown_up() -> None:
    form, given = HeadForm(Form(name="linear", maps=(1,)), STAGES, 3), drawn_maps(STAGES)["map.1"]
    given[:, 0] = 7.0

    form.standardize([given.mean((0, 2, 3))], [given.std((0, 2, 3))])

    deviations = given.std((0, 2, 3))
    least = 0.3 * np.sqrt((deviations**2).mean())
    np.testing.assert_allclose(form.get_buffer("mean0"), given.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(form.get_buffer("std0"), [least, *deviations[1:]], rtol=1e-6)


def test_a_map_of_constants_has_no_measure() -> None:
    form = HeadForm(Form(name="linear"), STAGES, 3)

    form.standardize([np.ones(7)], [np.zeros(7)])

    assert form.get_buffer("std0").tolist() == [1.0] * 7


def test_every_number_of_a_form_learns() -> None:
    form = HeadForm(Form(width=4, depthwise=True), STAGES, 3)
    nn.init.normal_(form.last.weight)
    given = in_torch({name: x.astype(np.float32) for name, x in drawn_maps(STAGES).items()})

    form(given).square().mean().backward()

    assert [name for name, p in form.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_separation_begins_nearly_closed_and_what_is_judged_beside_it_learns_from_the_start() -> None:
    form = HeadForm(Form(width=4, separation=True), STAGES, 3).eval()
    given = in_torch({name: x.astype(np.float32) for name, x in drawn_maps(STAGES).items()})

    logits, beside = form.told(given)

    separated = beside.separation
    assert separated is not None
    assert (tuple(separated.affinities.shape), tuple(separated.regions.shape)) == ((3, 3, 8, 12), (3, 3, 3))
    assert not logits.any()
    (separated.affinities.square().mean() + separated.regions[:, 0].mean()).backward()
    assert form.separation is not None
    beside = {"gate.weight", "queries", "keys.weight", "teller.weight"}  # the rest when these are away from zero
    learning = {name for name, p in form.separation.named_parameters() if p.grad is not None and p.grad.any()}
    assert beside <= learning


def test_a_separation_takes_a_place_from_its_neighbourhood_and_pools_regions_by_their_queries() -> None:
    """By hand: one map of one spike, a gate half open, and one class whose query finds the spike."""
    form = HeadForm(Form(width=2, separation=True), (FINE, MIDDLE), 2).eval().double()
    module, y = form.separation, torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    y[0, :, 1, 1] = torch.tensor([9.0, 18.0])
    assert module is not None
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.queries[0, 0] = 200.0
        for square in (module.keys, module.values, module.region):
            square.weight.copy_(torch.eye(2))
        separated = module(y)

    around = torch.full((3, 3), -0.5, dtype=torch.float64)
    around[1, 1] = 9 + 0.5 * 8
    torch.testing.assert_close(separated.maps[0], torch.stack([around, 2 * around]))
    (first, second), spike = separated.logits[0], separated.maps[0, :, 1, 1]
    torch.testing.assert_close(first, torch.einsum("c,chw->hw", spike, separated.maps[0]))
    torch.testing.assert_close(second, torch.einsum("c,chw->hw", separated.maps[0].mean((1, 2)), separated.maps[0]))
    torch.testing.assert_close(separated.affinities[0, 0], 200 / 2**0.5 * around)


def test_a_lowered_head_in_torch_answers_as_in_numpy_and_lets_gradients_through() -> None:
    head: MapHead = moved(HeadForm(Form(width=4), STAGES, 3)).lower("what", LABELS)
    network, given = HeadNetwork(head), in_torch(drawn_maps(STAGES))
    for x in given.values():
        x.requires_grad_()

    got = network(given)

    np.testing.assert_allclose(got.detach().numpy(), head(drawn_maps(STAGES)), atol=1e-12)
    got.sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in given.values())
    assert list(network.parameters()) == []


@pytest.mark.parametrize(
    ("form", "maps", "told"),
    [
        (Form(maps=(3,)), STAGES, "`head`: needs maps that the backbone has, 0 of stride 8, 1 of stride 16, 2 of stride 32, got 3"),
        (
            Form(separation=True, maps=(1,)), STAGES,
            "`head`: needs two maps to separate a fine one from deep ones, got 1\n  fix: name two maps, as maps=0/3",
        ),
        (
            Form(), (FINE, Map(name="map.1", point="", channels=6, stride=16, height=3, width=6)),
            "`head`: needs maps that fit on one another, got 8x12 at stride 8 and 3x6 at stride 16\n"
            "  fix: choose an `image_size` that is a multiple of 16",
        ),
        (
            Form(), (FINE, Map(name="map.1", point="", channels=6, stride=16, height=4, width=3)),
            "`head`: needs maps that fit on one another, got 8x12 at stride 8 and 4x3 at stride 16\n"
            "  fix: choose an `image_size` that is a multiple of 16",
        ),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit_are_refused(form: Form, maps: Any, told: str) -> None:
    with pytest.raises(InputError) as error:
        form.of(maps)
    assert str(error.value) == told
