"""A CLIP image tower of timm, on weights that a seed draws: its projection, and the score maps that begin with it."""

# ruff: noqa: E501  a row of a table stays on its line

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

from edgepet.errors import InputError
from edgepet.images.masks import squashed
from edgepet.methods import LinearProbe
from edgepet.networks.head_settings import Form
from edgepet.networks.loading import load_backbone
from edgepet.networks.projection import projection_of
from edgepet.networks.scores import TEMPERATURE
from edgepet.tuning.dense import DenseModel, dense_algebra_error
from edgepet.tuning.words import projected
from tests.tiny import random_images, seeded
from tests.words import table

ARCHITECTURE, NUMBERS, SIZE = "vit_xsmall_patch16_clip_224", 16, 32
LABELS = ("land", "water", "snow")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """timm's tower with its projection, and where its weights lie."""
    module = seeded(timm.create_model(ARCHITECTURE, num_classes=NUMBERS, img_size=SIZE), 5).eval()
    with torch.no_grad():
        module.head.bias.zero_()
    file = tmp_path_factory.mktemp("clip") / "tower.safetensors"
    save_file(module.state_dict(), file)
    return module, f"{ARCHITECTURE}@{file}"


def test_the_projection_is_what_timm_has_for_a_classifier(tower: tuple[Any, str]) -> None:
    module, spec = tower

    np.testing.assert_array_equal(projection_of(spec), module.head.weight.detach().numpy())


@pytest.mark.parametrize("asked", [{}, {"mlp": True, "width": 4}])
def test_score_maps_begin_as_cosines_of_what_the_tower_says_of_patches(tower: tuple[Any, str], asked: dict[str, Any]) -> None:  # fmt: skip
    module, spec = tower
    backbone = load_backbone(spec, image_size=SIZE)
    backbone = replace(backbone, preprocess=squashed(backbone.preprocess))
    words = table(LABELS, NUMBERS)
    form = projected(Form(name="score", clip=True, text=words, **asked), spec, backbone.maps)

    model = DenseModel(backbone, LinearProbe(), form, len(LABELS)).eval()
    rng = np.random.default_rng(1)
    drawn = [[rng.normal(1, 0.3, level.channels) for level in model.form.levels] for _ in range(2)]
    model.form.standardize(drawn[0], [np.abs(each) + 0.5 for each in drawn[1]])
    images = random_images(4, 2, SIZE)
    with torch.no_grad():
        maps = model.maps(torch.from_numpy(images))
        logits, beside = model.form.told(maps)
        tokens = module.head(module.forward_features(torch.from_numpy(images))[:, 1:])
    got = logits if not asked else beside.scores
    cosines = functional.normalize(tokens, dim=-1) @ functional.normalize(torch.from_numpy(words.vectors), dim=-1).T
    expected = cosines.transpose(1, 2).reshape(2, 3, 2, 2) / TEMPERATURE
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    error, largest = dense_algebra_error(model, backbone, images)
    assert error <= 1e-9 * max(1.0, largest)


def test_a_tower_without_a_projection_is_told(tower: tuple[Any, str], tmp_path: Path) -> None:
    module, spec = tower
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("head.")}
    save_file(state, tmp_path / "none.safetensors")
    save_file({**module.state_dict(), "head.bias": torch.ones(NUMBERS)}, tmp_path / "classes.safetensors")

    for name, got in (("none", "no such layer"), ("classes", "a classifier of 16 classes")):
        where = f"{ARCHITECTURE}@{tmp_path / name}.safetensors"
        with pytest.raises(InputError) as error:
            projection_of(where)
        fix = "give a CLIP image tower with its projection, or leave clip out of `head`"
        assert (
            str(error.value)
            == f"{where}: needs a projection, head without a bias, for clip=true, got {got}\n  fix: {fix}"
        )
    backbone = load_backbone(spec, image_size=SIZE)
    with pytest.raises(InputError) as error:
        projected(Form(name="score", clip=True, text=table(LABELS, 8)), spec, backbone.maps)
    assert (
        str(error.value)
        == "`head`: needs a projection (8, 256) of the last map alone, for clip=true, got (16, 256) on map.3"
    )
