"""What the whole suite shares: a cache of its own, two threads, and tiny backbones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edgepet.networks.backbone import Backbone
from tests.flow import adapter as adapter
from tests.flow import artifacts as artifacts
from tests.flow import graph as graph
from tests.flow import networks as networks
from tests.flow import store as store
from tests.flow import tasks as tasks
from tests.tiny import tiny_vit


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or fills the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPET_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """The sum of a product, and with it the last bits, depends on how many threads share it."""
    torch.set_num_threads(2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws, or a fixture that is made for it, is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A ViT of 6 blocks and width 64 at 32 pixels; native are 160, so its position table is resampled."""
    return tiny_vit(tmp_path_factory.mktemp("vit"), seed=7)


@pytest.fixture(scope="session")
def scaled_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A ViT of 8 blocks and width 64 with LayerScale and average pooling."""
    return tiny_vit(tmp_path_factory.mktemp("scaled"), seed=11, architecture="test_vit2")
