"""Networks that timm has not, through ``Backbone.from_module``: found, tuned, folded and exported as timm's are.

To add one: its module in ``foreign.py``, its row in ``NETWORKS`` and what is special about it in ``SPECIAL``.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgepet.deltas.merge import merge
from edgepet.device.runtime import open_task
from edgepet.errors import InputError
from edgepet.exporters.onnx import build_model, serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.exporters.trace import base_graph
from edgepet.methods import SSF, BitFit, Full, Method
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.spec import Preprocess
from edgepet.tuning.model import logits_of
from tests.architectures import (
    METHODS,
    Network,
    check_merged,
    check_onnx_runtime,
    check_openvino,
    check_steps,
    check_tensorrt_rtx,
    close,
    each_method,
    tuned,
)
from tests.flow import needs_openvino, needs_tensorrt_rtx
from tests.foreign import (
    DeformableConv,
    GatedConv,
    HatNet,
    HorNet,
    InternImage,
    RevCol,
    deformed,
    in_grids,
    out_of_grids,
)
from tests.tiny import random_images, seeded

NETWORKS: dict[str, type[nn.Module]] = {
    "hornet": HorNet,
    "internimage": InternImage,
    "revcol": RevCol,
    "hat-net": HatNet,
}
SLOW = {"internimage", "revcol"}  # ten seconds each
# The layers and bare parameters that make a network special, by kind.
SPECIAL: dict[str, dict[str, set[str]]] = {
    "hornet": {
        "conv": {f"stages.1.0.gnconv.{name}" for name in ("proj_in", "dwconv", "pws.0", "pws.1", "proj_out")},
        "tensor": {"stages.1.0.gamma1", "stages.1.0.norm1.weight", "downsample.0.bias"},
    },
    "internimage": {
        "conv": {"levels.1.0.dcn.dw_conv"},
        "norm": {"levels.1.0.dcn.dw_norm"},
        "linear": {f"levels.1.0.dcn.{name}" for name in ("offset", "mask", "input_proj", "output_proj")},
        "tensor": {"levels.1.0.gamma1"},
    },
    "revcol": {
        "conv": {f"subnet1.fusions.1.{way}.0" for way in ("up", "down")},
        "tensor": {f"subnet{column}.alpha{level}" for column in range(2) for level in range(4)},
    },
    "hat-net": {
        "conv": {f"blocks.0.attn.{name}" for name in ("qkv", "q", "kv", "proj")},
        "norm": {f"blocks.0.attn.{name}" for name in ("norm", "grid_norm", "ds_norm")},
    },
}


def backbone_of(name: str, **changes: bool) -> Backbone:
    module = seeded(NETWORKS[name](**changes), 7)
    return Backbone.from_module(module, name=name, preprocess=Preprocess(image_size=(32, 32)))


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS]
)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    backbone = backbone_of(request.param)
    graph = base_graph(backbone, root=tmp_path_factory.mktemp(request.param))
    return Network(backbone, graph, random_images(4, 3))


def test_the_layers_that_make_a_network_special_are_found(network: Network) -> None:
    for kind, names in SPECIAL[network.backbone.name].items():
        assert names <= {site.name for site in network.backbone.layers if site.kind == kind}


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


@pytest.mark.parametrize("method", (METHODS | {"bitfit": BitFit()}).values(), ids=[*METHODS, "bitfit"])
def test_a_pack_answers_as_the_tuned_network(method: Method, network: Network) -> None:
    model, delta = tuned(network, method)

    data = encode_pack(delta, codec="fp32")
    read = read_pack(data).delta

    assert encode_pack(read, codec="fp32") == data
    with open_task(network.graph, read) as task:
        assert close(task(network.images), logits_of(model, network.images))


# ------------------------------------------------------------------------------------------------------------- HorNet


def test_a_gated_convolution_of_order_three_multiplies_four_projections() -> None:
    conv = seeded(GatedConv(16), 7).double()
    for part in conv.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.bias)
    x = torch.from_numpy(random_images(1, 2, 8)).double().repeat(1, 6, 1, 1)[:, :16]

    assert conv.widths == [4, 8, 16]
    torch.testing.assert_close(conv(2 * x), 2**4 * conv(x))  # without biases it is homogeneous, of degree order + 1


def test_a_norm_spelled_out_as_arithmetic_is_its_bare_parameters() -> None:
    layers = backbone_of("hornet").layers
    named = [site.name for site in layers if "norm1" in site.name]

    assert named == [f"stages.{i}.0.norm1.{kind}" for i in range(2) for kind in ("weight", "bias")]
    assert not any("norm1" in site.name for site in SSF().sites(layers))
    assert set(named) <= {site.name for site in Full().sites(layers)}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Network:
    backbone = backbone_of("hornet", global_filter=True)
    return Network(backbone, base_graph(backbone, root=tmp_path_factory.mktemp("filtered")), random_images(4, 3))


def test_onnx_runtime_answers_as_a_tuned_global_filter(filtered: Network) -> None:
    model, delta = tuned(filtered, Full())
    assert "stages.1.0.gnconv.dwconv.complex_weight" in delta.targets

    with open_task(filtered.graph, delta) as task:
        assert close(task(filtered.images), logits_of(model, filtered.images))


@needs_openvino
def test_openvino_refuses_a_global_filter(filtered: Network) -> None:
    with pytest.raises(InputError, match=r"graph-32\.onnx: cannot be opened by OpenVINO"):
        open_task(filtered.graph, tuned(filtered, SSF())[1], runtime="openvino")


@needs_tensorrt_rtx
def test_tensorrt_rtx_refuses_a_global_filter_for_its_fourier_transform(filtered: Network, tmp_path: Path) -> None:
    _, delta = tuned(filtered, SSF())

    with pytest.raises(InputError, match=r"^ONNX node '\w+', operator DFT: tensorrt_rtx [\d.]+ must read it"):
        build_engines(serialize(build_model(filtered.graph, merge(filtered.graph.base, delta), delta)), tmp_path)


# -------------------------------------------------------------------------------------------------------- InternImage


def test_a_deformable_convolution_whose_points_stay_averages_them() -> None:
    value = torch.from_numpy(random_images(1, 2, 5)).double().repeat(1, 2, 1, 1).permute(0, 2, 3, 1)
    still, equal = torch.zeros(2 * 3, 25, 18).double(), torch.full((2 * 3, 25, 9), 1 / 9).double()

    got = deformed(value, still, equal, groups=3).reshape(2, 6, 5, 5)

    torch.testing.assert_close(got, functional.avg_pool2d(value.permute(0, 3, 1, 2), 3, stride=1, padding=1))


def test_an_offset_moves_every_point_of_its_group_by_pixels() -> None:
    value = torch.from_numpy(random_images(1, 2, 5)).double()[:, :2].permute(0, 2, 3, 1)
    offsets, masks = torch.zeros(2, 2, 25, 18).double(), torch.zeros(2 * 2, 25, 9).double()
    offsets[:, 1, :, 8:10] = torch.tensor([1.5, 0.0]).double()  # x of the second group's point in the middle
    masks[..., 4] = 1

    got = deformed(value, offsets.flatten(0, 1), masks, groups=2).reshape(2, 2, 5, 5)

    still, moved = value.permute(0, 3, 1, 2).unbind(1)
    torch.testing.assert_close(got[:, 0], still)
    torch.testing.assert_close(got[:, 1, :, :3], (moved[..., 1:4] + moved[..., 2:5]) / 2)


def test_the_points_of_a_deformable_convolution_depend_on_the_image() -> None:
    conv = seeded(DeformableConv(16, 2), 7)
    seen = list[torch.Tensor]()
    conv.offset.register_forward_hook(lambda module, inputs, output: seen.append(output))

    conv(torch.from_numpy(random_images(1, 2, 16)))

    assert seen[0].shape == (2, 3, 16, 2 * 9 * 2)
    assert seen[0].std(0).mean() > 0.1  # pixels
    assert (conv.offset.out_features, conv.mask.out_features) == (36, 18)


def test_the_deformable_convolution_is_one_sampling_node_for_each_block(network: Network) -> None:
    nodes = [node.op_type for node in onnx.load(network.graph.model_path, load_external_data=False).graph.node]

    assert nodes.count("GridSample") == (2 if network.backbone.name == "internimage" else 0)


# ------------------------------------------------------------------------------------------------------------- RevCol


def test_the_last_level_reads_every_stream_of_the_first_column() -> None:
    backbone = backbone_of("revcol")
    alphas = {name: parameter for name, parameter in backbone.module.named_parameters() if "alpha" in name}

    features = backbone.module(torch.from_numpy(random_images(1, 2)))
    assert not features.requires_grad
    for alpha in alphas.values():
        alpha.requires_grad_(True)
    backbone.module(torch.from_numpy(random_images(1, 2))).sum().backward()

    still = {name for name, alpha in alphas.items() if not alpha.grad.any()}
    assert still == {f"subnet0.alpha{level}" for level in range(4)}  # these scale the zeros before the first column


def test_the_official_revcol_is_refused_because_it_clamps_its_alphas_at_every_run() -> None:
    class Official(RevCol):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.subnet0.alpha0.data.abs_().clamp_(min=1e-3)
            return super().forward(images)

    with pytest.raises(InputError, match=r"must not write into its own tensors, got abs_ on subnet0\.alpha0"):
        Backbone.from_module(Official(), name="revcol", preprocess=Preprocess(image_size=(32, 32)))


# ------------------------------------------------------------------------------------------------------------ HAT-Net


def test_grids_of_five_axes_are_the_official_ones_of_eight() -> None:
    n, heads, head, rows, columns, grid = 2, 3, 4, 2, 5, 3
    maps = torch.arange(n * 3 * heads * head * rows * grid * columns * grid).reshape(n, -1, rows * grid, columns * grid)

    official = maps.reshape(n, 3, heads, head, rows, grid, columns, grid).permute(0, 1, 2, 4, 6, 5, 7, 3)
    got = in_grids(maps, grid, head)

    assert torch.equal(got, official.reshape(n, 3, heads * rows * columns, grid * grid, head))
    third = maps.shape[1] // 3
    assert torch.equal(out_of_grids(got[:, 1], grid, (rows * grid, columns * grid)), maps[:, third : 2 * third])


def test_no_tensor_of_an_exported_graph_has_more_than_five_axes(network: Network) -> None:
    model = onnx.load(network.graph.model_path, load_external_data=False)
    values = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}

    made = {name for node in model.graph.node for name in node.output} - {"features"}
    assert made == ranks.keys()
    assert max(ranks.values()) <= 5


def test_a_norm_that_is_never_called_is_neither_tuned_nor_traced_and_keeps_its_weights() -> None:
    backbone = backbone_of("hat-net")
    unused = {f"blocks.{i}.attn.proj_norm.{kind}" for i in range(2) for kind in ("weight", "bias")}

    assert backbone.unread == unused
    assert not unused & {site.name for site in Full().sites(backbone.layers)}
    assert unused <= backbone.tensors.keys()
