"""ConvNets, hierarchical transformers and MLPs: found, tuned, folded and exported as ViTs are.

To add a family: its row in ``NETWORKS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from edgepet.deltas.delta import Delta, Score
from edgepet.deltas.merge import merge
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.exporters.onnx import build_model, serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.exporters.trace import base_graph
from edgepet.graphs.base import BaseGraph
from edgepet.methods import SSF, Consolidator, Full, LoRA, Method
from edgepet.networks.backbone import Backbone
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.fit import LabelledPixels, Plan, fit
from edgepet.tuning.model import TunedModel, algebra_error, extract, logits_of
from tests.flow import needs_openvino
from tests.tiny import perturb, random_images, random_pixels, same_bits, seeded, tiny_vit

METHODS: dict[str, Method] = {
    "ssf": SSF(),
    "lora": LoRA(rank=2),
    "consolidator": Consolidator(groups=(16, 8)),
    "full": Full(),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
needs_tensorrt_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs the package tensorrt_rtx")


def swin() -> nn.Module:
    """Two stages, shifted windows, a patch merging whose linear layer has no bias."""
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4), num_classes=0
    )


def mixer() -> nn.Module:
    return MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=0)


# Name -> side of its images in pixels, and how a network without a timm name is made.
NETWORKS: dict[str, tuple[int, Callable[[], nn.Module] | None]] = {
    "test_efficientnet": (32, None),  # squeeze-excite, depthwise convolutions, batch norm with its activation inside
    "tf_efficientnet_lite0": (32, None),  # padding before the convolution
    "test_resnet": (32, None),
    "convnextv2_atto": (32, None),  # LayerNorm2d, GRN; its linear layers are 1 x 1 convolutions
    "test_convnext": (32, None),  # layer scale, LayerNorm behind a permutation
    "ghostnet_050": (32, None),
    "mobilenetv3_small_050": (32, None),  # features are widened behind the pooling
    "mobilenetv4_conv_small_035": (32, None),
    "swin": (32, swin),
    "mixer": (32, mixer),
    "ghostnetv2_100": (64, None),
    "test_vit4": (32, None),  # a register token, no class token, normalised queries and keys
}


@dataclass(frozen=True, eq=False)
class Network:
    backbone: Backbone
    graph: BaseGraph
    images: NpArray


SLOW = {"ghostnetv2_100"}  # twenty seconds


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS],
    ids=NETWORKS,
)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    name: str = request.param
    size, build = NETWORKS[name]
    folder = tmp_path_factory.mktemp(name)
    if build is None:
        backbone = tiny_vit(folder, seed=7, architecture=name, image_size=size)
    else:
        backbone = Backbone.from_module(seeded(build(), 7), name=name, preprocess=Preprocess(image_size=(size, size)))
    return Network(backbone, base_graph(backbone, root=folder), random_images(4, 3, size))


def tuned(network: Network, method: Method) -> tuple[TunedModel, Delta]:
    model = perturb(TunedModel(network.backbone, method, 5, seed=1), seed=3, by=0.02)
    labels = tuple("abcde")
    return model, extract(model, network.backbone, task="flowers", labels=labels, val=Score(top1=1.0, n=3))


@each_method
def test_the_merged_network_answers_as_the_tuned_one(method: Method, network: Network) -> None:
    model, _ = tuned(network, method)

    error, largest = algebra_error(model, network.backbone, network.images)

    assert error <= 1e-9 * largest  # float64: rounding alone
    with torch.no_grad():
        frozen = model.classify(model.backbone(torch.from_numpy(network.images))).numpy()
    assert np.abs(logits_of(model, network.images) - frozen).max() > 1e-3 * largest


@each_method
def test_three_steps_leave_every_bit_of_the_backbone(method: Method, network: Network) -> None:
    module = network.backbone.module
    before = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}
    model = TunedModel(network.backbone, method, 3, seed=1)
    start, side = model.arrays(), network.images.shape[-1]
    images = [LabelledPixels(random_pixels(seed, n, side), np.arange(n) % 3) for seed, n in ((1, 12), (2, 6))]

    plan = Plan(epochs=1, lr=1e-2, head_lr=1e-2, batch_size=4, seed=5)
    fit(model, images[0], images[1], network.backbone.preprocess, plan, lambda step: None)

    assert same_bits({name: tensor.numpy() for name, tensor in module.state_dict().items()}, before)
    assert same_bits(network.backbone.tensors, before)
    moved = [name for name, array in model.arrays().items() if not np.array_equal(array, start[name])]
    assert len(moved) > 0.9 * len(start)  # a ReLU that lets nothing through stops what lies before it


def close(got: NpArray, expected: NpArray) -> bool:
    return bool(np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max())  # the house's limit for fp32


@each_method
def test_onnx_runtime_answers_as_the_tuned_network(method: Method, network: Network) -> None:
    model, delta = tuned(network, method)
    merged = merge(network.graph.base, delta)

    with OnnxRuntime.of_graph(network.graph, {name: merged[name] for name in delta.targets}) as runner:
        features = runner(network.images)

    assert close(delta.head(features), logits_of(model, network.images))


@needs_openvino
@each_method
def test_openvino_answers_as_the_tuned_network(method: Method, network: Network) -> None:
    from edgepet.device.openvino import OpenVino

    model, delta = tuned(network, method)
    merged = merge(network.graph.base, delta)

    with OpenVino.of_graph(network.graph, {name: merged[name] for name in delta.targets}) as runner:
        features = runner(network.images)

    assert close(delta.head(features), logits_of(model, network.images))


@needs_tensorrt_rtx
def test_tensorrt_rtx_builds_the_merged_network(network: Network, tmp_path: Path) -> None:
    _, delta = tuned(network, SSF())
    delta = dataclasses.replace(delta, backbone=network.graph.backbone)

    built = build_engines(serialize(build_model(network.graph, merge(network.graph.base, delta), delta)), tmp_path)

    assert built.engine == "tensorrt-rtx"
    assert (tmp_path / "model.engine").stat().st_size > 1000


def test_batch_norm_stays_a_node_and_keeps_its_tensors(network: Network) -> None:
    import onnx

    model = onnx.load(network.graph.model_path, load_external_data=False)
    norms = [name for name in network.backbone.tensors if name.endswith("running_mean")]

    assert {node.op_type for node in model.graph.node if "running_mean" in str(node.input)} <= {"BatchNormalization"}
    assert set(norms) <= {tensor.name for tensor in model.graph.initializer}
