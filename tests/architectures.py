"""What every network must keep, whoever wrote it: found, tuned, folded and exported as ViTs are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from edgepet.deltas.delta import Delta, Score
from edgepet.deltas.merge import merge
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.exporters.onnx import build_model, serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.graphs.base import BaseGraph
from edgepet.methods import SSF, Consolidator, Full, LoRA, Method
from edgepet.networks.backbone import Backbone
from edgepet.spec import NpArray
from edgepet.tuning.fit import LabelledPixels, Plan, fit
from edgepet.tuning.model import TunedModel, algebra_error, extract, logits_of
from tests.tiny import perturb, random_pixels, same_bits

METHODS: dict[str, Method] = {
    "ssf": SSF(),
    "lora": LoRA(rank=2),
    "consolidator": Consolidator(groups=(16, 8)),
    "full": Full(),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@dataclass(frozen=True, eq=False)
class Network:
    backbone: Backbone
    graph: BaseGraph
    images: NpArray


def swin() -> nn.Module:
    """Two stages, shifted windows, a patch merging whose linear layer has no bias."""
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4), num_classes=0
    )


def tuned(network: Network, method: Method) -> tuple[TunedModel, Delta]:
    model = perturb(TunedModel(network.backbone, method, 5, seed=1), seed=3, by=0.02)
    labels = tuple("abcde")
    return model, extract(model, network.backbone, task="flowers", labels=labels, val=Score(top1=1.0, n=3))


def close(got: NpArray, expected: NpArray) -> bool:
    return bool(np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max())  # the house's limit for fp32


# ------------------------------------------------------------------------------------------------- what all must keep


def check_merged(method: Method, network: Network) -> None:
    """The merged network answers as the tuned one."""
    model, _ = tuned(network, method)

    error, largest = algebra_error(model, network.backbone, network.images)

    assert error <= 1e-9 * largest  # float64: rounding alone
    with torch.no_grad():
        frozen = model.classify(model.backbone(torch.from_numpy(network.images))).numpy()
    assert np.abs(logits_of(model, network.images) - frozen).max() > 1e-3 * largest


def check_steps(method: Method, network: Network) -> None:
    """Three steps leave every bit of the backbone."""
    module = network.backbone.module
    before = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}
    model = TunedModel(network.backbone, method, 3, seed=1)
    start, (height, width) = model.arrays(), network.images.shape[-2:]
    images = [
        LabelledPixels(random_pixels(seed, n, (height, width)), np.arange(n) % 3) for seed, n in ((1, 12), (2, 6))
    ]

    plan = Plan(epochs=1, lr=1e-2, head_lr=1e-2, batch_size=4, seed=5)
    fit(model, images[0], images[1], network.backbone.preprocess, plan, lambda step: None)

    assert same_bits({name: tensor.numpy() for name, tensor in module.state_dict().items()}, before)
    assert same_bits(network.backbone.tensors, before)
    moved = [name for name, array in model.arrays().items() if not np.array_equal(array, start[name])]
    assert len(moved) > 0.9 * len(start)  # a ReLU that lets nothing through stops what lies before it


def check_onnx_runtime(method: Method, network: Network) -> None:
    """ONNX Runtime answers as the tuned network."""
    model, delta = tuned(network, method)
    merged = merge(network.graph.base, delta)

    with OnnxRuntime.of_graph(network.graph, {name: merged[name] for name in delta.targets}) as runner:
        features = runner(network.images)

    assert close(delta.head(features), logits_of(model, network.images))


def check_openvino(method: Method, network: Network) -> None:
    """OpenVINO answers as the tuned network."""
    from edgepet.device.openvino import OpenVino

    model, delta = tuned(network, method)
    merged = merge(network.graph.base, delta)

    with OpenVino.of_graph(network.graph, {name: merged[name] for name in delta.targets}) as runner:
        features = runner(network.images)

    assert close(delta.head(features), logits_of(model, network.images))


def check_tensorrt_rtx(network: Network, tmp_path: Path) -> None:
    """TensorRT-RTX builds the merged network."""
    _, delta = tuned(network, SSF())
    delta = dataclasses.replace(delta, backbone=network.graph.backbone)

    built = build_engines(serialize(build_model(network.graph, merge(network.graph.base, delta), delta)), tmp_path)

    assert built.engine == "tensorrt-rtx"
    assert (tmp_path / "model.engine").stat().st_size > 1000
