"""What timm puts behind a network's features is left out by rule, and comes back whole in ``merge``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from edgepet.deltas.delta import Score
from edgepet.deltas.merge import merge
from edgepet.errors import InputError
from edgepet.methods import SSF
from edgepet.networks.backbone import Backbone
from edgepet.networks.classifier import Classifier, find_linear
from edgepet.networks.loading import load_backbone
from edgepet.networks.merged import merged_logits
from edgepet.tuning.model import TunedModel, extract, logits_of
from tests.tiny import perturb, random_images, seeded

NAMES = {"efficientvit_m0": True, "shvit_s1": False, "levit_128s": False, "iformer_t": False, "efficientvim_m1": False,
         "volo_d1_224": False}  # fmt: skip
PARAMS = [pytest.param(name, marks=() if fast else pytest.mark.slow, id=name) for name, fast in NAMES.items()]


def with_classes(name: str, folder: Path, classes: int, *more: str) -> str:
    module = seeded(timm.create_model(name, pretrained=False, num_classes=classes), 7)
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    safetensors.torch.save_file(state | {key: torch.zeros(2) for key in more}, folder / "weights.safetensors")
    return f"{name}@{folder / 'weights.safetensors'}"


@pytest.fixture(scope="module", params=PARAMS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """From a checkpoint with its classifier of 11 classes."""
    return load_backbone(with_classes(request.param, tmp_path_factory.mktemp("classes"), 11))


def test_merged_weights_load_strictly_and_answer_as_the_pack(backbone: Backbone) -> None:
    model = perturb(TunedModel(backbone, SSF(), 5, seed=1), seed=3, by=0.02)
    delta = extract(model, backbone, task="flowers", labels=tuple("abcde"), val=Score(top1=1.0, n=3))

    weights = backbone.named_weights(merge(backbone.base, delta), delta.head)

    network = backbone.with_head(delta.head)
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()}, strict=True)
    images = random_images(4, 2, backbone.preprocess.image_size[0])
    expected = merged_logits(backbone, delta, images)
    assert np.abs(logits_of(network, images) - expected).max() <= 1e-4 * np.abs(expected).max()  # fp32's limit


@pytest.mark.slow
def test_a_tensor_that_no_classifier_has_is_still_refused(tmp_path: Path) -> None:
    spec = with_classes("efficientvit_m0", tmp_path, 3, "head.bn.extra")

    with pytest.raises(InputError) as refused:
        load_backbone(spec)

    assert str(refused.value) == (
        f"{spec.partition('@')[2]}: does not hold exactly the tensors of EfficientVitMsra,"
        " got 0 missing (none), 1 unknown (head.bn.extra)"
        "\n  fix: pass the architecture that the file is of"
    )


def found(name: str, width: int) -> Classifier | None:
    with torch.device("meta"):
        bare = timm.create_model(name, pretrained=False, num_classes=0)
    return find_linear(name, bare, {}, width=width, fused=False)


def test_a_network_that_was_distilled_has_two_layers_and_their_norms() -> None:
    classifier = found("levit_128s", 384)

    assert classifier is not None
    assert (classifier.layers, classifier.norms) == (("head.linear", "head_dist.linear"), ("head.bn", "head_dist.bn"))


def test_an_mlp_is_made_a_linear_layer_by_timms_argument() -> None:
    classifier = found("caformer_s18", 512)

    assert classifier is not None
    assert (classifier.layers, dict(classifier.arguments)) == (("head.fc",), {"use_mlp_head": False})


@pytest.mark.parametrize(("name", "width"), [("efficientvim_m1", 960), ("crossvit_tiny_240", 288)])
def test_classifiers_of_several_features_each_are_no_linear_layer_of_all(name: str, width: int) -> None:
    assert found(name, width) is None
