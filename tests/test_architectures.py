"""ConvNets, hierarchical transformers and MLPs: found, tuned, folded and exported as ViTs are.

To add a family: its row in ``NETWORKS``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from edgepet.exporters.trace import base_graph
from edgepet.methods import Method
from edgepet.networks.backbone import Backbone
from edgepet.spec import Preprocess
from tests.architectures import (
    Network,
    check_merged,
    check_onnx_runtime,
    check_openvino,
    check_steps,
    check_tensorrt_rtx,
    each_method,
    swin,
)
from tests.flow import needs_openvino, needs_tensorrt_rtx
from tests.tiny import random_images, seeded, tiny_vit


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
# Ten seconds and more each: what they are made of is in others, small ones
SLOW = {
    "convnextv2_atto",
    "ghostnet_050",
    "ghostnetv2_100",
    "mobilenetv3_small_050",
    "swin",
    "test_vit4",
    "tf_efficientnet_lite0",
}


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


@each_method
def test_the_merged_network_answers_as_the_tuned_one(method: Method, network: Network) -> None:
    check_merged(method, network)


@each_method
def test_three_steps_leave_every_bit_of_the_backbone(method: Method, network: Network) -> None:
    check_steps(method, network)


@each_method
def test_onnx_runtime_answers_as_the_tuned_network(method: Method, network: Network) -> None:
    check_onnx_runtime(method, network)


@needs_openvino
@each_method
def test_openvino_answers_as_the_tuned_network(method: Method, network: Network) -> None:
    check_openvino(method, network)


@needs_tensorrt_rtx
def test_tensorrt_rtx_builds_the_merged_network(network: Network, tmp_path: Path) -> None:
    check_tensorrt_rtx(network, tmp_path)


def test_batch_norm_stays_a_node_and_keeps_its_tensors(network: Network) -> None:
    import onnx

    model = onnx.load(network.graph.model_path, load_external_data=False)
    norms = [name for name in network.backbone.tensors if name.endswith("running_mean")]

    assert {node.op_type for node in model.graph.node if "running_mean" in str(node.input)} <= {"BatchNormalization"}
    assert set(norms) <= {tensor.name for tensor in model.graph.initializer}
