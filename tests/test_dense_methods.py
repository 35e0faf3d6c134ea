"""Every method of the table, tuned under a head for masks: what it lowers to computes the same maps and logits."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from edgepet.methods import METHODS, Method
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.packs.pack import EVERY, encode_pack, read_pack
from edgepet.spec import Preprocess
from edgepet.tuning.dense import DenseModel, MergedHead, dense_algebra_error, extract_dense
from tests.methods import EXAMPLES
from tests.tiny import random_images, seeded, tiny_vit

# Methods that stay in the graph, and those whose defaults are too wide for tiny networks.
OTHERS: dict[str, dict[str, object]] = {name: {"length": 3} for name in ("vpt-shallow", "vpt-deep", "prefix")}
PLACES = {"consolidator": EXAMPLES["consolidator"], "kadaptation": EXAMPLES["kadaptation"]}


def of(name: str) -> Method:
    known = PLACES.get(name) or EXAMPLES.get(name)
    return known if known is not None else METHODS[name](**OTHERS.get(name, {}))  # type: ignore[arg-type]


# Without a place in a ConvNet; st-adapter works on clips, which have no masks.
ON_TOKENS = {
    "lora", "adapter", "houlsby", "adaptformer", "parallel-adapter", "prefix", "mam", "vpt-shallow", "vpt-deep",
    "convpass",
}  # fmt: skip
PAIRS = [
    (network, name)
    for network, others in (("vit", {"conv-adapter"}), ("convnet", ON_TOKENS))
    for name in METHODS
    if name not in {*others, "st-adapter"}
]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    module = seeded(timm.create_model("test_convnext", pretrained=False, num_classes=0), 5)
    return {
        "vit": tiny_vit(tmp_path_factory.mktemp("vit"), 5),
        "convnet": Backbone.from_module(module, name="convnext", preprocess=Preprocess(image_size=(64, 64))),
    }


@pytest.mark.parametrize(("network", "name"), PAIRS)
def test_a_method_and_a_head_lower_to_what_was_tuned(network: str, name: str, backbones: dict[str, Backbone]) -> None:
    backbone, method = backbones[network], of(name)
    assert method.sites(backbone.layers) or name == "linear-probe"
    model = DenseModel(backbone, method, Form(width=4), 3, seed=1)
    rng = np.random.default_rng(3)
    model.take({key: (x + 0.05 * rng.standard_normal(x.shape)).astype(np.float32) for key, x in model.arrays().items()})
    nn.init.normal_(model.form.last.weight)
    images = random_images(9, 2, backbone.preprocess.image_size)

    apart, largest = dense_algebra_error(model.eval(), backbone, images)

    assert largest > 0
    assert apart <= 1e-9 * largest  # float64: rounding alone
    if name != "linear-probe":
        frozen = DenseModel(backbone, METHODS["linear-probe"](), Form(width=4), 3, seed=1)
        frozen.form.load_state_dict(model.form.state_dict())
        with torch.no_grad():
            tuned, plain = (each.eval()(torch.from_numpy(images)).numpy() for each in (model, frozen))
        assert np.abs(tuned - plain).max() > 1e-4 * largest  # or a method that reaches no map would pass
    delta = extract_dense(model, backbone, task="scene", labels=("a", "b", "c"))
    stored = read_pack(encode_pack(delta, codec="fp32"), answers=EVERY).delta
    got = MergedHead(backbone, stored)(images)
    assert got.shape == (2, 3, *model.form.levels[0].shape[1:])
