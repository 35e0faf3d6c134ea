"""Where stage-wise prompts go, and what they refuse to be."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgepet.deltas.branches import Branch
from edgepet.errors import InputError
from edgepet.methods import SemanticPrompt
from tests.tiny import sites_of

PLACES: dict[str, tuple[dict[str, int], list[tuple[str, int]]]] = {
    "vit_small_patch14_dinov2": ({}, [("blocks.2", 384), ("blocks.5", 384), ("blocks.8", 384)]),
    "tf_efficientnet_lite0": ({}, [("blocks.1.1", 24), ("blocks.2.1", 40), ("blocks.4.2", 112)]),  # as feature_info's
    "resnet18": ({"stages": 3}, [("layer2.1", 128), ("layer3.1", 256)]),
    "swin_tiny_patch4_window7_224": (
        {}, [("layers.0.blocks.1", 96), ("layers.1.blocks.1", 192), ("layers.2.blocks.5", 384)]),
}  # fmt: skip


@pytest.mark.parametrize("architecture", PLACES)
def test_prompts_are_between_the_last_stages(architecture: str) -> None:
    settings, places = PLACES[architecture]

    sites = SemanticPrompt(**settings).sites(sites_of(architecture))

    assert [(site.name, site.out_features) for site in sites] == places


LEAST = "semantic-prompt: needs a width and slots of at least 1, and stages of at least 2"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"width": 0}, f"{LEAST}, got (0, 16, 4)"),
        ({"slots": 0}, f"{LEAST}, got (32, 0, 4)"),
        ({"stages": 1}, f"{LEAST}, got (32, 16, 1)"),
        ({"recurrences": 0}, "semantic-prompt: needs 1 to 8 recurrences, got 0"),
        ({"recurrences": 9}, "semantic-prompt: needs 1 to 8 recurrences, got 9"),
    ],
)  # fmt: skip
def test_settings_that_make_no_prompt_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(told)}$"):
        SemanticPrompt(**settings)


@pytest.mark.parametrize("recurrences", [0, 9])
def test_a_branch_of_a_pack_recurs_no_oftener_than_a_graph_may_hold(recurrences: int) -> None:
    shapes = {"reduce": (4, 8), "slots": (3, 4), "mix": (4, 7), "conv": (4, 1, 3, 3), "out": (8, 4)}
    tensors = {name: np.zeros(shape) for name, shape in shapes.items()}
    tensors["bias"] = np.zeros(sum(shape[0] for shape in shapes.values()))
    grid = {"prefix": 1, "height": 2, "width": 2}
    branch = Branch(kind="semantic-prompt", tap="blocks.2:out", into="blocks.2:out", settings=grid, tensors=tensors)
    replace(branch, settings={**grid, "recurrences": 8}).check("sea")

    with pytest.raises(InputError) as error:
        replace(branch, settings={**grid, "recurrences": recurrences}).check("sea")

    assert str(error.value) == f"sea: blocks.2:out: semantic-prompt recurs 1 to 8 times, got {recurrences}"
