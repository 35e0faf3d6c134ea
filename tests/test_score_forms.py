"""Heads that read text: what they compute, what they lower to, and what of a training they are judged by."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgepet.deltas.heads import Map
from edgepet.deltas.layers import Ask, Attend
from edgepet.deltas.text import with_classes
from edgepet.errors import InputError
from edgepet.images.boxes import Boxes
from edgepet.networks.box_forms import BoxForm
from edgepet.networks.head_forms import HeadForm
from edgepet.networks.head_settings import Form
from edgepet.networks.heads import HeadNetwork
from edgepet.networks.score_forms import ScoreForm
from edgepet.networks.scores import TEMPERATURE
from edgepet.spec import NpArray
from edgepet.tuning.box_fit import score_loss, score_truth
from edgepet.tuning.recipes import head_form
from tests.words import WIDTH, table

FINE = Map(name="map.0", point="stages.1:out", channels=5, stride=8, height=8, width=12)
COARSE = Map(name="map.1", point="stages.2:out", channels=6, stride=16, height=4, width=6)
STAGES = (FINE, COARSE)
LABELS = ("land", "water", "snow")
K, C = len(LABELS), WIDTH


def made(asked: str, *, seed: int = 0, width: int = WIDTH, labels: tuple[str, ...] = LABELS) -> Any:
    form = replace(head_form(asked), text=table(labels, width))
    kind = ScoreForm if form.name == "score" else HeadForm
    return kind(form, STAGES, len(labels), seed=seed)


def moved(form: Any, seed: int = 3) -> Any:
    """``form`` with every number but the text away from where it starts."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in form.state_dict().items():
            noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)))
            if tensor.is_floating_point() and not name.endswith("table"):
                positive = name.endswith("running_var") or "std" in name
                tensor.copy_(torch.exp(0.3 * noise) if positive else tensor + 0.3 * noise)
        if isinstance(form, ScoreForm):  # a decoder sees maps by the same statistics
            parts = [
                [form.get_buffer(f"{kind}{n}").numpy().copy() for n in range(len(form.levels))]
                for kind in ("mean", "std")
            ]
            form.standardize(*parts)
    return form.eval().double()


def drawn_maps(seed: int = 5, n: int = 3) -> dict[str, NpArray]:
    rng = np.random.default_rng(seed)
    return {each.name: 2 + 3 * rng.standard_normal((n, *each.shape)) for each in STAGES}


def in_torch(maps: dict[str, NpArray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(dtype) for name, array in maps.items()}


MLP = "point point resize"
INNER = 8
# Values of a decoder of one layer, the text and what is asked of it constant: products of the memory, of values and out;
# queries of 4 heads and the rows; the MLP; the last product, and the text itself.
DECODER = (
    INNER * C + INNER + 2 * INNER**2 + 4 * K * INNER + K * INNER + 2 * 4 * INNER**2 + 5 * INNER + C * INNER + K * C
)
ASKED = "mean norm point norm norm point norm point point ask point shift norm point activation point add norm point shift unit unit compare"
FORMS = {
    "score": (C * 6 + C + K * C, "point unit point"),
    "score,maps=0/1": (C * 11 + C + K * C, "point point resize add unit point"),
    "score,residual=true": (C * 6 + C + K * C, "point unit point"),
    "score,context=1,inner=8": (C * 6 + C + DECODER, f"point {ASKED}"),
    "score,mlp=true,width=4": (C * 6 + C + K * C + 4 * 11 + 4 * K + 4 + K * 4 + K, f"point unit point {MLP} point resize add activation point"),
    "score,context=1,inner=8,mlp=true,width=4": (
        C * 6 + C + DECODER + 4 * 11 + 4 * K + 4 + K * 4 + K, f"point {ASKED} {MLP} point resize add activation point",
    ),
    "linear,language=1": (K * 6 + K + K * 6 + K + K * K, "point attend add"),
    "mlp,width=4,language=2": (
        4 * 11 + 4 + 2 * K * 11 + 4 * K + 2 * 2 * K * 4 + K * 4 + K, "point attend add point attend add resize add activation point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("asked", FORMS)
def test_what_is_trained_lowers_to_the_fewest_layers_that_compute_it(asked: str) -> None:
    trained, given = moved(made(asked)), drawn_maps()

    head = trained.lower("what", LABELS)

    with torch.no_grad():
        expected = trained(in_torch(given)).numpy()
    values, kinds = FORMS[asked]
    assert np.ptp(expected) > 1  # or a head that answers one number would pass
    np.testing.assert_allclose(head(given), expected, atol=1e-9 * np.abs(expected).max(), rtol=0)
    assert " ".join(step.layer.kind for step in head.steps) == kinds
    assert head.stored_values == values
    assert head.shapes(STAGES)[head.steps[-1].gives] == expected.shape[1:]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_decoder_as_published_lowers_too(layers: int) -> None:
    trained, given = (
        moved(made(f"score,context={layers},inner=16,residual=true,mlp=true,width=4,depthwise=true")),
        drawn_maps(),
    )

    head = trained.lower("what", LABELS)

    with torch.no_grad():
        expected = trained(in_torch(given)).numpy()
        network = HeadNetwork(head)(in_torch(given)).numpy()
    np.testing.assert_allclose(head(given), expected, atol=1e-9 * np.abs(expected).max(), rtol=0)
    np.testing.assert_allclose(network, expected, atol=1e-9 * np.abs(expected).max(), rtol=0)
    assert [type(step.layer) for step in head.steps].count(Ask) == 1  # only the first query sees no image


def test_a_head_trained_in_float32_has_constants_of_float64() -> None:
    """The constants of a decoder are computed from float32 weights, not in float32."""
    single, double = made("score,context=1,inner=8"), made("score,context=1,inner=8").double()

    one, two = (form.eval().lower("what", LABELS) for form in (single, double))

    for got, expected in zip(one.arrays(), two.arrays(), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_scores_are_cosines_over_a_temperature() -> None:
    form, given = moved(made("score")), drawn_maps()

    with torch.no_grad():
        logits = form(in_torch(given))
        x = form.standardized(0, in_torch(given)["map.1"])
        pixels = torch.einsum("cd,ndhw->nchw", form.scores.projections[0].weight, x) + form.scores.shift[:, None, None]
    text = torch.from_numpy(table(LABELS).unit)
    expected = functional.cosine_similarity(pixels[:, None], text[None, :, :, None, None], dim=2) / TEMPERATURE
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)  # the table is held in float32


def test_text_that_has_seen_an_image_is_its_own_and_begins_as_the_table() -> None:
    """γ is 1e-4 at first; and of two images with one place alike, that place is told by what else there is."""
    plain, form = made("score", seed=4).eval(), made("score,context=1,inner=8", seed=4).eval()
    given = in_torch(drawn_maps(), torch.float32)
    given["map.1"][1, :, 0, 0] = given["map.1"][0, :, 0, 0]

    with torch.no_grad():
        torch.testing.assert_close(form(given), plain(given), atol=0.05, rtol=0)
        nn.init.normal_(form.scores.context.gamma)
        told = form(given)[:, :, 0, 0]
    assert float((told[0] - told[1]).abs().max()) > 0.01


def test_attention_to_text_begins_at_nothing() -> None:
    one, other = made("mlp,language=2", seed=4).eval(), HeadForm(Form(), STAGES, K, seed=4).eval()
    nn.init.normal_(one.last.weight, generator=torch.Generator().manual_seed(1))
    other.last.weight = one.last.weight

    with torch.no_grad():
        torch.testing.assert_close(*(form(in_torch(drawn_maps(), torch.float32)) for form in (one, other)))


@pytest.mark.parametrize("asked", FORMS)
def test_every_number_learns_and_a_seed_draws_it(asked: str) -> None:
    one, same, other = (made(asked, seed=seed) for seed in (1, 1, 2))
    given, told = in_torch(drawn_maps(), torch.float32), one.state_dict()

    assert all(torch.equal(told[name], tensor) for name, tensor in same.state_dict().items())
    assert any(not torch.equal(told[name], tensor) for name, tensor in other.state_dict().items())
    for name, parameter in one.named_parameters():
        if not parameter.any():  # what starts at zero holds others back
            nn.init.normal_(parameter, std=0.1)
        assert parameter.requires_grad, name
    logits, beside = one.told(given)
    loss = logits.square().mean() + (0 if beside.scores is None else beside.scores.square().mean())
    loss.backward()
    still = {name for name, p in one.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()
    one.reset()
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in same.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "judged"),
    [
        ("score", False), ("score,mlp=true", True), ("score,mlp=true,aux=false", False),
        ("mlp,language=1", True), ("mlp,language=1,aux=false", False), ("mlp", False),
    ],
)  # fmt: skip
def test_score_maps_are_judged_where_they_are_not_the_answer(asked: str, judged: bool) -> None:
    form = made(asked).eval()

    with torch.no_grad():
        _, beside = form.told(in_torch(drawn_maps(), torch.float32))

    assert (beside.scores is not None) == judged
    if beside.scores is not None:
        assert beside.scores.shape == (3, K, 4, 6)  # of the coarsest map, over the temperature
        assert 1 < float(beside.scores.abs().max()) <= 1 / TEMPERATURE


def test_what_judges_alone_is_not_shipped() -> None:
    with_it, without = (
        moved(made(f"mlp,width=4,language=1,aux={aux}")).lower("what", LABELS) for aux in ("true", "false")
    )

    assert with_it.stored_values == without.stored_values
    assert sum(isinstance(step.layer, Attend) for step in with_it.steps) == 2


# ------------------------------------------------------------------------------------------------------- other classes


def test_other_classes_are_told_by_their_text_alone() -> None:
    """The head of other classes is the one whose training had their table, and none of it is trained."""
    others = ("sand", "land", "ice", "wood")
    form = moved(made("score"))
    other = moved(made("score", labels=others))
    with torch.no_grad():
        for name, tensor in form.state_dict().items():
            if not name.endswith("table"):
                other.get_parameter(name).copy_(tensor) if "." in name or name == "shift" else other.get_buffer(
                    name
                ).copy_(tensor)

    head = with_classes(form.lower("what", LABELS), table(others))

    assert head.labels == others
    np.testing.assert_allclose(head(drawn_maps()), other.lower("what", others)(drawn_maps()), atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "width", "told"),
    [
        ("score,context=1,inner=8", 8, "what: has text that has seen the images of its training: a context decoder's constants are not made anew\n  fix: train it without context, or again with this `text`"),
        ("score,mlp=true", 8, "what: does not answer how places are like text: its classes have weights that are learnt\n  fix: train one with `head=score`"),
        ("linear,language=1", 8, "what: does not answer how places are like text: its classes have weights that are learnt\n  fix: train one with `head=score`"),
        ("score", 5, "t.safetensors: needs vectors of 8 numbers, as those that it was trained with, got 5"),
    ],
)  # fmt: skip
def test_a_head_that_takes_no_other_classes_says_why(asked: str, width: int, told: str) -> None:
    with pytest.raises(InputError) as error:
        with_classes(moved(made(asked)).lower("what", LABELS), table(("a", "b"), width))
    assert str(error.value) == told


# ------------------------------------------------------------------------------------------------------- what is asked


def test_a_head_reads_as_it_is_written() -> None:
    for text in (
        "score",
        "score,context=3,inner=256,mlp=true,width=64,depthwise=false,aux=true",
        "score,residual=true,maps=1/2",
        "score,clip=true,mlp=true,width=64,depthwise=false,aux=true",
        "score,mlp=true,width=8,depthwise=true,aux=false,maps=0/3",
        "mlp,width=64,depthwise=false,norm=false,language=2,aux=true",
        "linear,maps=2,norm=true,language=1,aux=false",
        "fcos,width=8,depth=1,norm=false,language=1,scores=true,context=1,inner=8,aux=true",
    ):
        assert str(head_form(text)) == text


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("score,norm=true", "`head`: score knows the settings maps, context, inner, residual, clip, mlp, width, depthwise, aux, got 'norm'"),
        ("score,context=4", "`head`: needs context from 0 to 3, got 4"),
        ("score,context=1,inner=6", "`head`: needs inner, a multiple of 4 up to 1024, got 6"),
        ("score,inner=8", "`head`: needs context=1 beside inner, got inner alone"),
        ("score,width=8", "`head`: needs mlp=true beside width, got width alone"),
        ("score,aux=true", "`head`: needs mlp=true beside aux, got aux alone"),
        ("score,mlp=1", "`head`: needs mlp=true or mlp=false, got 1"),
        ("fcos,aux=true", "`head`: needs language=1 beside aux, got aux alone"),
        ("fcos,context=1", "`head`: needs scores=true beside context, got context alone"),
        ("mlp,aux=true", "`head`: needs language=1 beside aux, got aux alone"),
        ("mlp,language=9", "`head`: needs language from 0 to 8, got 9"),
    ],
)  # fmt: skip
def test_a_head_that_is_none_is_told(asked: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        head_form(asked)
    assert str(error.value) == told


def test_a_head_of_text_without_text_is_told() -> None:
    with pytest.raises(InputError) as error:
        ScoreForm(Form(name="score"), STAGES, K)
    fix = "add `text=TABLE.safetensors`, which `edgepet text` or docs/guide/text.md makes"
    assert str(error.value) == f"`head`: needs a vector of text for each class, got score alone\n  fix: {fix}"


def test_the_values_that_the_guide_tells_are_those_of_the_heads() -> None:
    depths = tuple(Map(name=f"map.{n}", point="", channels=384, stride=14, height=2, width=2) for n in range(4))
    last = (Map(name="map.0", point="", channels=320, stride=32, height=2, width=2),)
    names = tuple(map(str, range(10)))

    def values(asked: str, maps: tuple[Map, ...] = depths) -> int:
        form = replace(head_form(asked), text=table(names, 50))
        kind = ScoreForm if form.name == "score" else HeadForm
        return int(kind(form, maps, 10).lower("what", names).stored_values)

    score, mlp = values("score"), values("mlp,width=64,language=1") - values("mlp,width=64")
    told = (Path(__file__).parents[1] / "docs" / "guide" / "text.md").read_text()
    assert (score, values("score", last)) == (19_750, 16_550)
    assert values("score,context=3,inner=256,mlp=true") == 2_916_464
    assert f"| {values('score,context=1') - score:,} |" in told
    assert f"| {values('score,mlp=true') - score:,} |" in told
    assert f"{mlp:,} values" in told
    assert "19,750 values" in told
    assert "16,550 on EfficientNet-Lite0" in told


# ---------------------------------------------------------------------------------------------------------------- boxes

THIRD = Map(name="map.2", point="stages.3:out", channels=7, stride=32, height=2, width=3)
PLAIN = tuple(Map(name=f"map.{n}", point="", channels=6, stride=16, height=4, width=4) for n in range(2))
DETECTORS = ("language=2", "scores=true", "scores=true,context=1,inner=8,norm=true", "language=1,scores=true,norm=true")


@pytest.mark.parametrize("maps", [(*STAGES, THIRD), PLAIN])
@pytest.mark.parametrize("asked", DETECTORS)
def test_a_detector_that_reads_text_lowers_to_what_it_computes(asked: str, maps: tuple[Map, ...]) -> None:
    form = replace(head_form(f"fcos,width=4,depth=1,{asked}"), text=table(LABELS), maps=(0, 1, 2)[: len(maps)])
    trained, plain = (moved(BoxForm(each, maps, K)) for each in (form, replace(form, language=0, scores=False)))
    rng = np.random.default_rng(5)
    given = {each.name: 2 + 3 * rng.standard_normal((3, *each.shape)) for each in maps}

    head = trained.lower("what", LABELS)

    with torch.no_grad():
        expected = trained(in_torch(given)).numpy()
        without = plain(in_torch(given)).numpy()
    assert np.abs(expected - without).max() > 1e-2
    got = trained.answered(head, given)
    np.testing.assert_allclose(got, expected, atol=1e-9 * np.abs(expected).max(), rtol=0)
    assert head.shapes(maps)["found"] == (min(100, expected.shape[2]), 6)


@pytest.mark.parametrize(
    ("asked", "judged"), [("scores=true", True), ("scores=true,aux=false", False), ("language=1", True), ("language=1,aux=false", False)],
)  # fmt: skip
def test_score_maps_of_a_detector_are_judged_unless_it_is_asked_not_to(asked: str, judged: bool) -> None:
    form = BoxForm(replace(head_form(f"fcos,width=4,{asked}"), text=table(LABELS)), (*STAGES, THIRD), K)

    with torch.no_grad():
        _, scores = form.told(in_torch({**drawn_maps(), "map.2": np.ones((3, *THIRD.shape))}, torch.float32))

    assert (scores is not None) == judged
    assert scores is None or scores.shape == (3, K, 2, 3)


def test_score_maps_are_judged_within_boxes_alone() -> None:
    """Of three classes and two images: two boxes that overlap, and a crowd, which is none."""
    corners = np.array([(4.0, 4, 20, 12), (12, 4, 28, 20), (0, 0, 32, 32)])
    boxes = (Boxes(corners, np.array([0, 2, 1]), np.array([False, False, True])), Boxes.of(()))
    scores = torch.from_numpy(np.random.default_rng(1).standard_normal((2, K, 8, 8))).float()

    truth = score_truth(boxes, K, (32, 32))
    got = score_loss(scores, truth)

    expected = 0.0
    for y, x in np.ndindex(8, 8):
        first, second = 1 <= x < 5 and 1 <= y < 3, 3 <= x < 7 and 1 <= y < 5
        assert truth[0, :, y, x].tolist() == [first, 0, second]
        if first or second:
            told = [(first, 0), (False, 1), (second, 2)]
            expected += (
                sum(np.log1p(np.exp(-s if there else s)) for there, k in told for s in [float(scores[0, k, y, x])]) / K
            )
    assert not truth[1].any()
    assert float(got) == pytest.approx(expected, rel=1e-5)
