"""Methods that stay in the graph: what they compute, what they cost, and that every runtime runs them.

To add a method: its row in ``EXAMPLES``, and its counts in ``COUNTS`` if the literature gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from edgepet.deltas.branches import named_tensors
from edgepet.deltas.delta import Delta, Score
from edgepet.deltas.merge import merge, task_tensors
from edgepet.device.runtime import open_task
from edgepet.errors import InputError
from edgepet.exporters.onnx import build_model, serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.exporters.trace import base_graph
from edgepet.graphs.base import BaseGraph
from edgepet.methods import (
    MAM,
    METHODS,
    Adapter,
    AdaptFormer,
    Branching,
    ConvAdapter,
    Convpass,
    Houlsby,
    Method,
    MultiScaleAdapter,
    ParallelAdapter,
    Prefix,
    ProTuning,
    SemanticPrompt,
    VPTDeep,
    VPTShallow,
)
from edgepet.methods.method import count
from edgepet.methods.settings import restored
from edgepet.networks.backbone import Backbone
from edgepet.networks.graft import grafted, in_torch
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.spec import Block, NpArray, Preprocess
from edgepet.tuning.fit import LabelledPixels, Plan, fit
from edgepet.tuning.model import TunedModel, algebra_error, extract, logits_of
from tests.architectures import swin
from tests.flow import needs_openvino, needs_tensorrt_rtx
from tests.methods import stored_branches
from tests.tiny import perturb, random_images, random_pixels, same_bits, seeded, sites_of, tiny_vit

# Method and architecture: a plain ViT, one with LayerScale and pooling, one with a register and norms of q and k, ...
EXAMPLES: dict[str, tuple[Method, str]] = {
    "adapter": (Adapter(rank=4, scale=0.5), "test_vit"),
    "adapter behind layer scale": (Adapter(rank=4), "test_vit2"),
    "houlsby": (Houlsby(rank=4), "test_vit"),
    "adaptformer": (AdaptFormer(rank=8, scale=0.3), "test_vit2"),
    "parallel-adapter": (ParallelAdapter(rank=4), "test_vit"),
    "prefix": (Prefix(length=3), "test_vit"),
    "prefix with norms": (Prefix(length=3), "test_vit4"),
    "mam": (MAM(length=3, rank=4), "test_vit2"),
    "vpt-shallow": (VPTShallow(length=5), "test_vit"),
    "vpt-shallow, pooled": (VPTShallow(length=5), "test_vit2"),
    "vpt-deep": (VPTDeep(length=3), "test_vit"),
    "vpt-deep with norms": (VPTDeep(length=3), "test_vit4"),
    "convpass": (Convpass(rank=4, scale=0.5), "test_vit"),
    "convpass, attention only": (Convpass(rank=4, attention_only=True), "test_vit4"),
    "conv-adapter, ConvNeXt": (ConvAdapter(reduction=4), "test_convnext"),
    "conv-adapter, ResNet": (ConvAdapter(reduction=4), "test_resnet"),
    "conv-adapter, EfficientNet": (ConvAdapter(reduction=4), "test_efficientnet"),
    "conv-adapter, sequential": (ConvAdapter(reduction=2, scheme="conv-sequential"), "test_resnet"),
    "conv-adapter, beside residuals": (ConvAdapter(reduction=2, scheme="residual-parallel"), "test_efficientnet"),
    "conv-adapter, behind residuals": (ConvAdapter(reduction=2, scheme="residual-sequential"), "test_convnext"),
    "pro-tuning": (ProTuning(reduction=2), "test_vit"),
    "pro-tuning, ConvNeXt": (ProTuning(reduction=2), "test_convnext"),
    "pro-tuning, ResNet": (ProTuning(reduction=2), "test_resnet"),
    "semantic-prompt": (SemanticPrompt(width=8, slots=3), "test_vit"),
    "semantic-prompt, ConvNeXt": (SemanticPrompt(width=8, slots=3), "test_convnext"),
    "semantic-prompt, ResNet": (SemanticPrompt(width=8, slots=3), "test_resnet"),
    "multi-scale-adapter": (MultiScaleAdapter(width=4), "test_vit"),
    "multi-scale-adapter, ResNet": (MultiScaleAdapter(width=4), "test_resnet"),
}
# Whose graphs have the branches of others at other points, ten seconds each to trace and to build for TensorRT.
SLOW = {
    "adapter behind layer scale", "houlsby", "parallel-adapter", "prefix with norms", "mam", "vpt-shallow, pooled",
    "vpt-deep with norms", "convpass, attention only", "conv-adapter, EfficientNet", "conv-adapter, sequential",
    "conv-adapter, beside residuals", "conv-adapter, behind residuals", "pro-tuning, ConvNeXt", "pro-tuning, ResNet",
    "adaptformer", "prefix", "vpt-shallow", "conv-adapter, ResNet", "semantic-prompt", "semantic-prompt, ResNet",
    "multi-scale-adapter",
}  # fmt: skip
IN_WINDOWS: dict[str, tuple[Method, int]] = {  # and how many places a Swin of two stages and three blocks has
    "adapter": (Adapter(rank=4), 3),
    "houlsby": (Houlsby(rank=4), 6),
    "adaptformer": (AdaptFormer(rank=4), 3),
    "parallel-adapter": (ParallelAdapter(rank=4), 3),
    "pro-tuning": (ProTuning(reduction=2), 2),
    "semantic-prompt": (SemanticPrompt(width=8, slots=3), 1),
    "multi-scale-adapter": (MultiScaleAdapter(width=4), 2),
    "conv-adapter": (ConvAdapter(reduction=4), 3),
}


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    folder, made = tmp_path_factory.mktemp("networks"), dict[str, Backbone]()

    def network(architecture: str) -> Backbone:
        if architecture not in made:
            made[architecture] = tiny_vit(folder, seed=7, architecture=architecture)
        return made[architecture]

    return network


@dataclass(frozen=True, eq=False)
class Tuned:
    """A method on a network with every tensor away from its start, and what it lowers to."""

    method: Method
    backbone: Backbone
    model: TunedModel
    delta: Delta
    images: NpArray


@pytest.fixture(scope="module", params=EXAMPLES.values(), ids=EXAMPLES)
def tuned(request: pytest.FixtureRequest, networks: Callable[[str], Backbone]) -> Tuned:
    method, architecture = request.param
    return tuned_on(networks(architecture), method)


def tuned_on(backbone: Backbone, method: Method) -> Tuned:
    model = perturb(TunedModel(backbone, method, 5, seed=1), seed=3, by=0.1)
    delta = extract(model, backbone, task="flowers", labels=tuple("abcde"), val=Score(top1=1.0, n=3))
    return Tuned(method, backbone, model, delta, random_images(4, 3))


@pytest.fixture(scope="module")
def windows() -> Backbone:
    return Backbone.from_module(seeded(swin(), 7), name="swin", preprocess=Preprocess(image_size=(32, 32)))


@pytest.mark.parametrize(("method", "places"), IN_WINDOWS.values(), ids=IN_WINDOWS)
def test_every_block_of_a_network_on_maps_with_channels_last_has_its_place(
    method: Method, places: int, windows: Backbone
) -> None:
    model, delta = (made := tuned_on(windows, method)).model, made.delta

    error, largest = algebra_error(model, windows, made.images)

    assert len(delta.branches) == places
    assert error <= 1e-9 * largest  # float64: rounding alone
    assert np.abs(logits_of(model, made.images) - frozen(made)).max() > 1e-3 * largest


def test_blocks_that_pool_or_widen_are_no_places_where_both_ends_differ() -> None:
    layers = sites_of("mvitv2_tiny")
    shapes = {block.name: block.points for block in layers if isinstance(block, Block)}

    bypassed = [site.name for site in Convpass().sites(layers)]
    beside = [site.name for site in AdaptFormer().sites(layers)]

    assert "stages.1.blocks.0" not in bypassed  # twice as wide, and a fourth of the tokens
    assert all(shapes[name]["norm1:out"] == shapes[name]["drop_path2:out"] for name in bypassed)
    assert all(shapes[name]["norm2:in"][-1] == shapes[name]["drop_path2:out"][-1] for name in beside)
    assert (len(bypassed), len(beside)) == (7, 7)  # of ten


@pytest.fixture(
    scope="module",
    params=[pytest.param(row, marks=pytest.mark.slow if name in SLOW else ()) for name, row in EXAMPLES.items()],
    ids=EXAMPLES,
)
def traced(
    request: pytest.FixtureRequest, networks: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tuned, BaseGraph]:
    method, architecture = request.param
    tuned = tuned_on(networks(architecture), method)
    return tuned, base_graph(tuned.backbone, tuned.delta.branches, root=tmp_path_factory.mktemp("graph"))


def test_every_method_with_branches_has_an_example() -> None:
    in_clips = {"st-adapter"}  # whose tests are in test_clips.py
    assert {method.name for method, _ in EXAMPLES.values()} | in_clips == {
        name for name, kind in METHODS.items() if issubclass(kind, Branching)
    }


def frozen(tuned: Tuned) -> NpArray:
    with torch.no_grad():
        return tuned.model.classify(tuned.backbone.module(torch.from_numpy(tuned.images))).numpy()


def close(got: NpArray, expected: NpArray) -> bool:
    return bool(np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max())  # the house's limit for fp32


# ------------------------------------------------------------------------------------------------- what all must keep


def test_the_lowered_network_answers_as_the_tuned_one(tuned: Tuned) -> None:
    before = {name: array.copy() for name, array in tuned.backbone.tensors.items()}

    error, largest = algebra_error(tuned.model, tuned.backbone, tuned.images)

    assert error <= 1e-9 * largest  # float64: rounding alone
    assert np.abs(logits_of(tuned.model, tuned.images) - frozen(tuned)).max() > 1e-3 * largest
    assert same_bits(tuned.backbone.tensors, before)


def test_the_start_is_the_identity_exactly_where_the_method_says_so(tuned: Tuned) -> None:
    model = TunedModel(tuned.backbone, tuned.method, 5, seed=1)
    perturb(model, seed=3, by=0.0)  # a head away from zero

    distance = np.abs(logits_of(model, tuned.images) - frozen(tuned)).max()

    assert bool(distance <= 1e-6 * np.abs(frozen(tuned)).max()) is tuned.method.starts_as_identity


def test_three_steps_move_every_tensor_and_leave_every_bit_of_the_backbone(tuned: Tuned) -> None:
    module = tuned.backbone.module
    before = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}
    model = TunedModel(tuned.backbone, tuned.method, 3, seed=1)
    start = model.arrays()
    images = [LabelledPixels(random_pixels(seed, n), np.arange(n) % 3) for seed, n in ((1, 12), (2, 6))]

    plan = Plan(epochs=1, lr=1e-2, head_lr=1e-2, batch_size=4, seed=5)
    fit(model, images[0], images[1], tuned.backbone.preprocess, plan, lambda step: None)

    assert same_bits({name: tensor.numpy() for name, tensor in module.state_dict().items()}, before)
    still = [name for name, array in model.arrays().items() if np.array_equal(array, start[name])]
    assert still == []


def test_what_was_learnt_survives_the_pack(tuned: Tuned) -> None:
    data = encode_pack(tuned.delta, codec="fp32")

    read = read_pack(data).delta

    assert encode_pack(read, codec="fp32") == data
    assert read.structure == tuned.delta.structure != ""
    assert same_bits(dict(named_tensors(read.branches)), dict(named_tensors(tuned.delta.branches)))
    tensors = task_tensors(tuned.backbone.base, read)
    with torch.no_grad(), grafted(tuned.backbone.module, in_torch(read.branches)):
        features = tuned.backbone.module(torch.from_numpy(tuned.images)).numpy()
    assert close(read.head(features), logits_of(tuned.model, tuned.images))
    assert tensors.keys() == tuned.backbone.tensors.keys() | named_tensors(read.branches).keys()


def test_onnx_runtime_answers_as_the_tuned_network(traced: tuple[Tuned, BaseGraph]) -> None:
    tuned, graph = traced
    with open_task(graph, tuned.delta) as network:
        assert close(network(tuned.images), logits_of(tuned.model, tuned.images))


@needs_openvino
def test_openvino_answers_as_the_tuned_network(traced: tuple[Tuned, BaseGraph]) -> None:
    tuned, graph = traced
    with open_task(graph, tuned.delta, runtime="openvino") as network:
        assert close(network(tuned.images), logits_of(tuned.model, tuned.images))


@needs_tensorrt_rtx
def test_tensorrt_rtx_builds_the_network(traced: tuple[Tuned, BaseGraph], tmp_path: Path) -> None:
    tuned, graph = traced
    model = build_model(graph, task_tensors(graph.base, tuned.delta), tuned.delta)

    assert build_engines(serialize(model), tmp_path).engine == "tensorrt-rtx"


def test_the_graph_names_the_branches_and_holds_none_of_their_values(traced: tuple[Tuned, BaseGraph]) -> None:
    tuned, graph = traced
    import onnx

    model = onnx.load(graph.model_path, load_external_data=False)
    wanted = named_tensors(tuned.delta.branches)
    external = {t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL}

    assert wanted.keys() <= external
    assert not any(graph.base.tensors[name].any() for name in wanted)
    assert graph.stem == f"graph-32-{tuned.delta.structure}"


def test_deep_prompts_are_exported_as_constant_rows_of_keys_and_values(networks: Callable[[str], Backbone]) -> None:
    from onnx.numpy_helper import to_array

    tuned = tuned_on(networks("test_vit"), VPTDeep(length=3))
    graph = base_graph(tuned.backbone, tuned.delta.branches)
    model = build_model(graph, task_tensors(graph.base, tuned.delta), tuned.delta)

    rows = {t.name: to_array(t) for t in model.graph.initializer if "/prompts." in t.name}
    heads, width = 2, 64
    assert [array.shape for array in rows.values()] == [(heads, 3, width // heads)] * 2 * 6  # blocks
    readers = [node.op_type for node in model.graph.node if set(node.input) & rows.keys()]
    assert len(readers) == len(rows)
    block = tuned.backbone.module.blocks[0]
    with torch.no_grad():
        prompt = torch.from_numpy(tuned.delta.branches[0].tensors["prompt"])
        fused = block.attn.qkv(block.norm1(prompt)).reshape(3, 3, heads, width // heads).permute(1, 2, 0, 3)
    keys, values = list(rows.values())[:2]
    assert close(keys, fused[1].numpy())
    assert close(values, fused[2].numpy())


def test_another_task_of_one_structure_shares_the_graph(traced: tuple[Tuned, BaseGraph]) -> None:
    tuned, graph = traced
    model = perturb(TunedModel(tuned.backbone, tuned.method, 7, seed=2), seed=9, by=0.1)
    other = extract(model, tuned.backbone, task="birds", labels=tuple("abcdefg"), val=Score(top1=1.0, n=3))

    with open_task(graph, other) as network:
        assert close(network(tuned.images), logits_of(model, tuned.images))


def test_branches_are_not_merged(tuned: Tuned) -> None:
    with pytest.raises(InputError) as refused:
        merge(tuned.backbone.base, tuned.delta)

    count = len(tuned.delta.branches)
    assert str(refused.value) == (
        f"task 'flowers': {tuned.method.name} has {count} branches, which stay in the graph and cannot be folded\n"
        "  fix: export it, or run its pack: both take branches"
    )


def test_settings_come_back_from_a_pack(tuned: Tuned) -> None:
    read = read_pack(encode_pack(tuned.delta)).delta

    assert restored(tuned.method.name, read.settings) == tuned.method


# ------------------------------------------------------------------------------------------------------------ counts

COUNTS: list[tuple[Method, int, int]] = [  # formulas of the papers, head left out
    (Adapter(rank=1), 13_836, 27_660),
    (Adapter(rank=8), 78_432, 156_768),
    (Adapter(rank=64), 595_200, 1_189_632),
    (AdaptFormer(rank=32), 299_904, 599_424),
    (AdaptFormer(rank=64), 595_200, 1_189_632),
    (ParallelAdapter(rank=8), 78_432, 156_768),
    (Houlsby(rank=8), 156_864, 313_536),
    (VPTDeep(length=10), 46_080, 92_160),
    (VPTDeep(length=50), 230_400, 460_800),
    (VPTShallow(length=50), 19_200, 38_400),
    (Prefix(length=10), 92_160, 184_320),
    (MAM(length=10, rank=8), 92_160 + 78_432, 184_320 + 156_768),
    (Convpass(rank=8), 170_880, 327_552),
    (Convpass(rank=8, attention_only=True), 85_440, 163_776),
    (SemanticPrompt(slots=10), 81_054, 155_934),
    (SemanticPrompt(width=64, slots=10), 167_070, 315_678),
]


@pytest.mark.parametrize(("method", "small", "large"), COUNTS, ids=[repr(row[0]) for row in COUNTS])
def test_a_method_trains_and_stores_as_many_values_as_its_paper_says(method: Method, small: int, large: int) -> None:
    for architecture, values in (("vit_small_patch14_dinov2", small), ("vit_base_patch16_224", large)):
        assert count(method, sites_of(architecture), {}) == values
        assert stored_branches(method, sites_of(architecture)) == values


@pytest.mark.parametrize(
    ("architecture", "width", "values"),
    [("resnet50", 32, 122_654), ("resnet50", 64, 249_630), ("tf_efficientnet_lite0", 32, 17_614),
     ("tf_efficientnet_lite0", 64, 41_166)],
)  # fmt: skip
def test_prompts_between_stages_of_a_convnet_take_as_many_values_as_their_formulas(
    architecture: str, width: int, values: int
) -> None:
    method = SemanticPrompt(width=width, slots=10)

    assert count(method, sites_of(architecture), {}) == values
    assert stored_branches(method, sites_of(architecture)) == values


CONV_COUNTS = [  # of the official code, factors and biases counted
    ("resnet50", 2, 672_160), ("resnet50", 4, 356_848), ("resnet50", 8, 199_192), ("resnet50", 16, 120_364),
    ("convnext_tiny", 4, 1_250_496), ("convnext_tiny", 8, 796_848),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "reduction", "values"), CONV_COUNTS)
def test_a_conv_adapter_trains_as_many_values_as_the_official_code(
    architecture: str, reduction: int, values: int
) -> None:
    layers, method = sites_of(architecture), ConvAdapter(reduction=reduction)

    assert count(method, layers, {}) == values
    factors = sum(place.gives for place in method._places(method.sites(layers)).values())
    assert stored_branches(method, layers) == values - factors  # folded into the second convolution
