"""A trained detector computes what it lowers to, has as many values as are published, and reads maps that fit."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgepet.deltas.detection import boxes_in, suppressed
from edgepet.deltas.heads import Map
from edgepet.errors import InputError
from edgepet.geometry import overlaps
from edgepet.networks.box_forms import RARE, BoxForm
from edgepet.networks.head_settings import Form
from edgepet.networks.heads import HeadNetwork
from edgepet.spec import NpArray

STAGES = tuple(
    Map(name=f"map.{n}", point=f"stages.{n}:out", channels=4 + n, stride=4 << n, height=16 >> n, width=24 >> n)
    for n in range(4)
)
DEPTHS = tuple(
    Map(name=f"map.{n}", point=f"blocks.{n}:out", channels=6, stride=14, height=4, width=4) for n in range(4)
)
LABELS = ("cat", "dog", "cow")
TOWERS = "depthwise point activation depthwise point activation point depthwise point activation depthwise point activation point"


def drawn_maps(maps: tuple[Map, ...], seed: int = 5, n: int = 2) -> dict[str, NpArray]:
    rng = np.random.default_rng(seed)
    return {each.name: 2 + 3 * rng.standard_normal((n, *each.shape)) for each in maps}


def moved(form: BoxForm, seed: int = 3) -> BoxForm:
    """``form`` with every number away from where it starts."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in form.state_dict().items():
            noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)))
            tensor.copy_(torch.exp(0.3 * noise) if name.startswith("std") else tensor + 0.3 * noise)
    return form.eval().double()


FORMS = [
    (Form(name="fcos", width=4), STAGES, "point point point resize add resize add" + f" {TOWERS}" * 3 + " detect"),
    (Form(name="fcos", width=4, maps=(0, 1), depth=1, norm=True), STAGES, "norm point norm point resize add" + " depthwise point activation point depthwise point activation point" * 2 + " detect"),
    (Form(name="fcos", width=4), DEPTHS, "point point add resize pool" + f" {TOWERS}" * 3 + " detect"),
    (Form(name="fcos", width=4, maps=(3,)), DEPTHS, "point resize pool" + f" {TOWERS}" * 3 + " detect"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "maps", "kinds"), FORMS)
def test_a_trained_detector_lowers_to_layers_that_compute_it(form: Form, maps: tuple[Map, ...], kinds: str) -> None:
    trained, given = moved(BoxForm(form, maps, 3)), drawn_maps(maps)

    head = trained.lower("boxes", LABELS)

    with torch.no_grad():
        expected = trained({name: torch.from_numpy(x) for name, x in given.items()}).numpy()
    assert np.ptp(expected) > 1  # or a head that answers zero would pass
    np.testing.assert_allclose(
        trained.answered(head, given), expected, atol=1e-9 * np.abs(expected).max(), rtol=0
    )  # float64: rounding only
    np.testing.assert_allclose(head(given), trained.found(expected), atol=1e-9 * np.abs(expected).max(), rtol=0)
    assert " ".join(step.layer.kind for step in head.steps) == kinds
    assert head.shapes(maps)["found"] == (min(100, expected.shape[2]), 6)
    with torch.no_grad():
        in_torch = HeadNetwork(head)({name: torch.from_numpy(x) for name, x in given.items()}).numpy()
    np.testing.assert_allclose(in_torch, head(given), atol=1e-9)


def test_the_values_of_a_detector_are_those_that_are_published() -> None:
    """docs say bytes by these: EfficientNet-Lite0's maps at strides 8 to 32, one class."""
    lite0 = tuple(
        Map(name=f"map.{n}", point="", channels=c, stride=4 << n, height=32 >> n, width=32 >> n)
        for n, c in enumerate((24, 40, 112, 320))
    )

    def values(form: Form) -> int:
        return BoxForm(form, lite0, 1).lower("boxes", ("tree",)).stored_values

    assert values(Form(name="fcos")) == 49_993
    assert values(Form(name="fcos", width=32)) == 20_905


def test_a_detector_begins_with_rare_objects_of_one_stride() -> None:
    one, same, other = (BoxForm(Form(name="fcos", width=8), STAGES, 3, seed=seed) for seed in (1, 1, 2))
    with torch.no_grad():
        given = one({name: torch.from_numpy(x).float() for name, x in drawn_maps(STAGES).items()}).numpy()

    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.what.weight, other.what.weight)
    np.testing.assert_allclose(1 / (1 + np.exp(-given[:, :3])), RARE, rtol=0.9)
    np.testing.assert_allclose(given[:, 3:7], 1, atol=0.9)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items() if not name.startswith(("mean", "std"))}
    moved(one).float().reset()
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("maps", [STAGES, DEPTHS])
def test_every_number_of_a_detector_learns(maps: tuple[Map, ...]) -> None:
    form = moved(BoxForm(Form(name="fcos", width=4), maps, 3))
    given = {name: torch.from_numpy(x) for name, x in drawn_maps(maps).items()}

    torch.autograd.backward((form(given) * torch.linspace(0.5, 1.5, form(given).shape[2])).square().sum())

    learnt = {
        name for name, parameter in form.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert learnt | {"scales"} == {name for name, _ in form.named_parameters()}  # scales act on boxes alone


ODD = tuple(Map(name=f"map.{n}", point="", channels=6, stride=14, height=37, width=37) for n in range(4))
HOLE = (STAGES[1], STAGES[3])


@pytest.mark.parametrize(
    ("form", "maps", "told"),
    [
        (Form(name="fcos", maps=(7,)), STAGES, "`head`: needs maps that the backbone has, 0 of stride 4, 1 of stride 8, 2 of stride 16, 3 of stride 32, got 7"),
        (Form(name="fcos"), ODD, "`head`: needs maps of an even height and width, got 37 at stride 14\n  fix: choose an `image_size` that is a multiple of 28"),
        (Form(name="fcos"), HOLE, "`head`: needs maps each half as high and wide as the one before, got 8x12 and 2x3"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit_are_refused(form: Form, maps: Any, told: str) -> None:
    with pytest.raises(InputError) as error:
        BoxForm(form, maps, 3)

    assert str(error.value) == told


# ----------------------------------------------------------------------------------------------- of boxes that overlap


def test_of_boxes_of_one_class_that_overlap_the_best_is_kept() -> None:
    found = np.array([
        [0, 0, 10, 10, 0.5, 0],
        [0, 0, 10, 9, 0.9, 0],  # nine tenths of the first
        [0, 0, 10, 10, 0.4, 1],  # of another class
        [0, 0, 10, 4.5, 0.3, 0],  # exactly half of the second is not above 0.5
        [20, 20, 30, 30, 0.2, 0],
        [5, 5, 5, 5, 0.1, 0],  # no area
    ])  # fmt: skip

    np.testing.assert_array_equal(suppressed(found), found[[1, 2, 3, 4, 5]])
    assert suppressed(found[:0]).shape == (0, 6)
    np.testing.assert_allclose(overlaps(found[:2, :4], found[3:4, :4]), [[0.45], [0.5]])


def test_suppression_is_torchvisions() -> None:
    ops = pytest.importorskip("torchvision.ops")
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.uniform(0, 60, (100, 2))
        found = np.column_stack([
            corners, corners + rng.uniform(5, 40, (100, 2)), rng.permutation(100) / 100, rng.integers(0, 3, 100),
        ])  # fmt: skip
        boxes, scores, labels = (torch.from_numpy(found[:, part]) for part in (slice(4), 4, 5))

        kept = ops.batched_nms(boxes, scores, labels, 0.5).numpy()

        np.testing.assert_array_equal(suppressed(found), found[kept])


def test_boxes_of_an_input_are_brought_to_its_picture_and_cut_there() -> None:
    found = np.array([[10, 20, 30, 40, 0.9, 1], [-5, -5, 20, 20, 0.8, 0], [-9, 0, -1, 9, 0.7, 0]])

    np.testing.assert_allclose(
        boxes_in(found, (100, 50), (200, 400)), [[80, 40, 240, 80, 0.9, 1], [0, 0, 160, 40, 0.8, 0]]
    )
