"""What training says of itself beside a linear probe, and features that hardly vary."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgepet.deltas.delta import Score
from edgepet.measuring.parity import Accuracy, accuracy
from edgepet.methods import SSF, BitFit, LinearProbe, LoRA, Method
from edgepet.networks.backbone import Backbone
from edgepet.tuning.fit import Fit, LabelledPixels, Plan, fit
from edgepet.tuning.model import LEAST_SCALE, TunedModel
from edgepet.verbs.train import no_better
from tests.fits import StopError, images, keeper, stepping
from tests.flow import Tasks, edgepet, train_arguments
from tests.tiny import same_bits

PLAN = Plan(epochs=3, lr=1e-2, head_lr=1e-2, batch_size=4, augment=("flip",), seed=5)


def fitted(backbone: Backbone, method: Method, plan: Plan = PLAN) -> Fit:
    return stepping(TunedModel(backbone, method, 3, seed=1), backbone, plan, None, after=None)


# Features that hardly vary


def standardized(backbone: Backbone, features: torch.Tensor) -> TunedModel:
    model = TunedModel(backbone, LinearProbe(), 3)
    model.standardize(features)
    return model


def test_features_that_all_vary_are_divided_by_their_deviations(backbone: Backbone) -> None:
    features = torch.randn(20, backbone.width, generator=torch.Generator().manual_seed(1))

    model = standardized(backbone, features)

    assert torch.equal(model.std, features.std(0))  # to the bit: nothing changes for them
    assert torch.equal(model.mean, features.mean(0))


@pytest.mark.parametrize("dead", [0.0, 1e-9, 1e-4, 1e-2])
def test_a_feature_that_hardly_varies_is_divided_by_a_part_of_what_the_others_vary_by(
    backbone: Backbone, dead: float
) -> None:
    features = torch.randn(20, backbone.width, generator=torch.Generator().manual_seed(1))
    features[:, ::3] = 0.3 + dead * features[:, ::3]

    model = standardized(backbone, features)

    mean_square = float(features.std(0).square().mean())
    assert model.std[::3].tolist() == pytest.approx([LEAST_SCALE * mean_square**0.5] * len(model.std[::3]))
    assert torch.equal(model.std[1::3], features.std(0)[1::3])


def test_where_no_feature_varies_none_is_divided(backbone: Backbone) -> None:
    model = standardized(backbone, torch.full((5, backbone.width), 0.3))

    assert torch.equal(model.std, torch.ones(backbone.width))


def test_features_that_wake_up_while_tuning_do_not_drown_the_others(backbone: Backbone) -> None:
    network = copy.deepcopy(backbone.module)
    with torch.no_grad():
        network.get_parameter("norm.weight")[:8] = 0.0  # these features are their bias on every image
        network.get_parameter("norm.bias")[:8] = 0.3
    dead = Backbone.from_module(network, name="dead", preprocess=backbone.preprocess)
    model = TunedModel(dead, SSF(), 3, seed=1)

    fit(model, images(1, 12), images(2, 6), dead.preprocess, PLAN, lambda step: None)

    moved = (model.features(torch.zeros(1, *dead.preprocess.input_shape))[0, :8] - model.mean[:8]).abs()
    assert moved.max() > 1e-3  # or they had stayed dead
    assert (moved / model.std[:8]).max() < 3  # of what is divided by: as others vary


# The linear probe


@pytest.mark.parametrize("method", [BitFit(), LoRA(rank=2)], ids=lambda method: method.name)
def test_a_training_knows_what_a_linear_probe_reaches(backbone: Backbone, method: Method) -> None:
    assert method.starts_as_identity
    alone = fitted(backbone, LinearProbe(), replace(PLAN, augment=()))

    assert fitted(backbone, method).probe == alone.val
    assert alone.probe is None


def test_a_training_that_was_stopped_still_knows_it(backbone: Backbone, tmp_path: Path) -> None:
    whole = fitted(backbone, BitFit())
    with pytest.raises(StopError):
        stepping(TunedModel(backbone, BitFit(), 3, seed=1), backbone, PLAN, keeper(tmp_path), after=4)

    resumed = stepping(TunedModel(backbone, BitFit(), 3, seed=1), backbone, PLAN, keeper(tmp_path), after=None)

    assert resumed.probe == whole.probe


def test_the_probe_changes_nothing_of_the_training(backbone: Backbone) -> None:
    """The head begins at zero and the random numbers are those of the seed, whatever the probe did on other images."""
    trained = []
    for val in (images(2, 6), LabelledPixels(pixels=images(2, 6).pixels, labels=images(2, 6).labels[::-1].copy())):
        model = TunedModel(backbone, SSF(), 3, seed=1)
        fit(model, images(1, 12), val, backbone.preprocess, replace(PLAN, epochs=1), lambda step: None)
        trained.append(model.arrays() | {"head": model.linear.weight.detach().numpy().copy()})

    assert same_bits(*trained)


def of(top1: float) -> Accuracy:
    return replace(accuracy(np.zeros(10, np.int64), np.zeros(10, np.int64), 1), top1=top1)


@pytest.mark.parametrize(
    ("val", "probe", "told"),
    [
        (
            0.5,
            0.75,
            ["  ssf ends below the linear probe's val: try a smaller --lr, more --epochs, or linear-probe itself"],
        ),
        (0.5, 0.5, ["  ssf ends at the linear probe's val: try a smaller --lr, more --epochs, or linear-probe itself"]),
        (0.75, 0.5, []),
        (1.0, 1.0, []),  # nothing could be better
        (0.5, None, []),
    ],
)
def test_tuning_that_did_not_help_is_said(val: float, probe: float | None, told: list[str]) -> None:
    assert no_better("ssf", of(val), None if probe is None else Score(top1=probe, n=10)) == told


def test_people_and_scripts_are_told_of_the_probe(tasks: Tasks, tmp_path: Path) -> None:
    arguments = train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet")

    said = edgepet(*arguments, "--json")

    assert said.json["probe"].keys() == {"top1", "n"}
    assert said.json["probe"]["n"] == said.json["val"]["n"]
