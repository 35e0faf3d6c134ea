"""A push wherever updates are understood: on the int8 backbone, while tuning on codes, in PEFT folders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch

from edgepet.calibration.slot_graphs import coded_backbone, int8_graph
from edgepet.deltas.codes import Range, coded
from edgepet.deltas.delta import Delta, Int8Ranges
from edgepet.deltas.updates import Add, Diagonal, LowRank, Modulate, Push, Scale, Targeted
from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.files import sha256_file
from edgepet.graphs.int8 import CODE, Int8Graph, Int8Layer
from edgepet.graphs.slots import Slots, task_slots
from edgepet.methods import RepAdapter
from edgepet.networks.backbone import Backbone
from edgepet.peft.adapter import Adapter
from edgepet.peft.writing import unlower
from edgepet.spec import NpArray, Target
from edgepet.tuning.fake_quant import FakeQuant
from edgepet.tuning.model import TunedModel
from tests.methods import check_merged, check_pack
from tests.tiny import make_delta, perturb, random_images, tiny_vit

Of = Literal["frozen", "updated"]


def drawn(*shape: int) -> NpArray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def at(target: str, update: Any) -> Targeted:
    return Targeted(Target.parse(target, where="test"), update)


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Backbone, Int8Graph]]:
    @functools.cache
    def made(architecture: str) -> tuple[Backbone, Int8Graph]:
        folder = tmp_path_factory.mktemp(architecture)
        backbone = tiny_vit(folder, seed=7, architecture=architecture)
        return backbone, int8_graph(base_graph(backbone, root=folder), root=folder)

    return made


def slots_of(graph: Int8Graph, *updates: Targeted) -> Slots:
    """Of a task whose ranges take no constant off, so that what a layer adds is its folded bias."""
    above = {each.name for each in graph.coded_maps if each.codes == "unsigned"}
    ranges = Int8Ranges(
        codes=graph.codes_sha256,
        ranges=tuple(Range(scale=0.5, shift=64.0 if name in above else 0.0) for name in graph.reads),
    )
    delta: Delta = make_delta(updates, fingerprint=graph.fingerprint, int8=ranges)
    return task_slots(graph, delta)


def layer_of(graph: Int8Graph, weight: str) -> Int8Layer:
    return next(layer for layer in graph.layers if layer.weight == weight)


# --------------------------------------------------------------------------------------------------------- int8 codes

FC1 = "blocks.0.mlp.fc1"
CHANGES: dict[str, tuple[Any, bool]] = {  # of fc1's weight, and whether its codes stay
    "nothing": (None, True),
    "rows": (Scale(1 + drawn(192)), True),
    "elements": (Modulate(drawn(192, 1), drawn(1, 64)), False),
}


@pytest.mark.parametrize("of", ["frozen", "updated"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_pushed_is_of_what_the_codes_stand_for(
    change: str, of: Of, graph_of: Callable[[str], tuple[Backbone, Int8Graph]]
) -> None:
    backbone, graph = graph_of("test_vit")
    before, layer = sha256_file(graph.codes_path), layer_of(graph, f"{FC1}.weight")
    (update, stays), c = CHANGES[change], drawn(64)
    own = [] if update is None else [at(f"{FC1}.weight", update)]

    slots = slots_of(graph, at(f"{FC1}.bias", Push(c, Target(f"{FC1}.weight"), of, scale=2.0)), *own)

    stand = graph.coded(layer)
    weight = stand.dense.astype(np.float64)
    if of == "updated" and change == "rows":
        weight = (1 + drawn(192))[:, None] * weight
    if of == "updated" and change == "elements":
        weight = coded(weight * (1 + np.outer(drawn(192, 1), drawn(1, 64))), stand.divisors).dense
    expected = backbone.tensors[f"{FC1}.bias"] + 2 * weight @ c
    # float32: sums of 64 products, of some units
    assert np.abs(slots.values[f"{layer.name}.shifted"] - expected).max() <= 1e-5 * np.abs(expected).max()
    float_weight = backbone.tensors[f"{FC1}.weight"]
    assert np.abs(2 * (float_weight - stand.dense) @ c).max() > 1e-3  # or codes and weights would not be told apart
    assert set(slots.codes) == (set() if stays else {f"{FC1}.weight{CODE}"})
    assert sha256_file(graph.codes_path) == before == graph.codes_sha256


def test_a_push_behind_a_bias_less_convolution_is_in_its_batch_norms_mean(
    graph_of: Callable[[str], tuple[Backbone, Int8Graph]],
) -> None:
    backbone, graph = graph_of("test_efficientnet")
    weight, norm = "blocks.1.0.conv_exp.weight", "blocks.1.0.bn1"
    layer = layer_of(graph, weight)
    assert layer.batch_norm is not None
    assert layer.batch_norm[2] == f"{norm}.running_mean"
    c = drawn(backbone.tensors[weight].shape[1])

    plain = slots_of(graph).values[f"{layer.name}.shifted"]
    moved = slots_of(graph, at(f"{norm}.running_mean", Push(c, Target(weight), scale=-1.0)))

    through = backbone.tensors[f"{norm}.weight"] / np.sqrt(backbone.tensors[f"{norm}.running_var"] + layer.epsilon)
    dense = graph.coded(layer).dense
    expected = plain + through * np.einsum("oikl,i->o", dense, c)
    assert np.abs(moved.values[f"{layer.name}.shifted"] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert dict(moved.codes) == {}


WRONG: dict[str, tuple[Targeted, str]] = {
    "reads what is not there": (
        at(f"{FC1}.bias", Push(drawn(64), Target("nosuch"))),
        f"flowers: {FC1}.bias: Push reads nosuch, which is not there"),
    "pushes into a weight": (
        at(f"{FC1}.weight", Push(drawn(64), Target("blocks.1.mlp.fc1.weight"))),
        f"flowers: {FC1}.weight: Push needs a vector to push into"),
    "adds a vector to a weight": (
        at(f"{FC1}.weight", Add(drawn(192))),
        f"flowers: {FC1}.weight: Add needs d (192, 64), got (192,)"),
    "has another width": (
        at(f"{FC1}.bias", Push(drawn(65), Target(f"{FC1}.weight"))),
        f"flowers: {FC1}.bias: Push needs c (64,), got (65,)"),
}  # fmt: skip


@pytest.mark.parametrize(("targeted", "message"), WRONG.values(), ids=WRONG)
def test_a_push_that_does_not_fit_the_int8_backbone_is_refused(
    targeted: Targeted, message: str, graph_of: Callable[[str], tuple[Backbone, Int8Graph]]
) -> None:
    _, graph = graph_of("test_vit")

    with pytest.raises(InputError) as refused:
        slots_of(graph, targeted)

    assert str(refused.value) == message


# ------------------------------------------------------------------------------------------------------------- tuning


@pytest.mark.slow
def test_a_network_that_is_tuned_on_codes_pushes_what_they_stand_for(backbone: Backbone) -> None:
    method = RepAdapter(on=("fc1",))
    quant = FakeQuant(base_graph(backbone), "int8")
    model = perturb(TunedModel(backbone, method, 3, seed=1, fake_quant=quant), seed=3)
    codes, own = coded_backbone(base_graph(backbone)), model.tuned()[FC1]
    reads: list[torch.Tensor] = []
    layer = model.backbone.get_submodule(FC1)
    layer.register_forward_hook(lambda module, inputs, output: reads.append(module.bias.detach()))

    with torch.no_grad():
        model.features(torch.from_numpy(random_images(4, 2)))

    c = np.einsum("gir,gr->gi", own["up"].detach().numpy(), own["down.bias"].detach().numpy().reshape(2, -1)).reshape(
        -1
    )
    c = c + own["up.bias"].detach().numpy()
    bias = backbone.tensors[f"{FC1}.bias"]
    on_codes, on_floats = (bias + w @ c for w in (codes[f"{FC1}.weight"].dense, backbone.tensors[f"{FC1}.weight"]))
    got = reads[0].numpy()
    assert np.abs(got - on_codes).max() <= 1e-5 * np.abs(on_codes).max()  # float32
    assert np.abs(got - on_floats).max() > 10 * np.abs(got - on_codes).max()


def test_an_adapter_in_front_of_a_bias_less_convolution_is_pushed_into_its_batch_norm(tmp_path: Any) -> None:
    backbone = tiny_vit(tmp_path, seed=7, architecture="test_efficientnet", image_size=64)
    method = RepAdapter(rank=2, on=("conv_pw", "conv_pwl"))
    targets = {targeted.target.tensor for targeted in lowered(method, backbone)}
    assert any(name.endswith("running_mean") for name in targets)

    check_merged(method, backbone)
    check_pack(method, backbone)


def lowered(method: RepAdapter, backbone: Backbone) -> tuple[Targeted, ...]:
    sites = method.sites(backbone.layers)
    start = method.start(sites, backbone.tensors, np.random.default_rng(0))
    return method.lower(backbone.tensors, sites, start)


# --------------------------------------------------------------------------------------------------------------- PEFT

PROJ, FC2 = "blocks.0.attn.proj", "blocks.0.mlp.fc2"


@pytest.mark.parametrize("of", ["frozen", "updated"])
def test_peft_keeps_a_bias_that_was_pushed_into(of: Of, backbone: Backbone) -> None:
    left, right, c, rows = drawn(64, 2), drawn(2, 64), drawn(64), 1 + drawn(64)
    updates = [
        at(f"{PROJ}.bias", Scale(rows)),
        at(f"{PROJ}.bias", Push(c, Target(f"{PROJ}.weight"), of)),
        at(f"{PROJ}.weight", LowRank(left, right, scale=0.5)),
    ]

    adapter: Adapter = unlower(updates, backbone.tensors, backbone.layers, {}, where="flowers")

    weight = backbone.tensors[f"{PROJ}.weight"].astype(np.float64)
    weight = weight + 0.5 * left @ right if of == "updated" else weight
    expected = rows * backbone.tensors[f"{PROJ}.bias"] + weight @ c
    assert adapter.config["bias"] == "lora_only"
    got = adapter.tensors[f"{PROJ}.base_layer.bias"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()  # float32
    assert f"{PROJ}.lora_A.weight" in adapter.tensors


UNKEPT: dict[str, tuple[list[Targeted], str]] = {
    "a change that PEFT's LoRA is not": (
        [at(f"{PROJ}.weight", Diagonal(drawn(64)))],
        "flowers: needs updates of one of PEFT's methods: LoRA, DoRA, LoKr, IA3, VeRA, HiRA or GLoRA, got diagonal"),
    "a push of what is not there": (
        [at(f"{PROJ}.weight", LowRank(drawn(64, 1), drawn(1, 64))),
         at(f"{PROJ}.bias", Push(drawn(64), Target("nosuch")))],
        f"flowers: {PROJ}.bias: Push reads no tensor of the backbone"),
    "a push of what is not there into the bias of a layer that is scaled": (
        [at(f"{PROJ}.weight", Scale(drawn(64))), at(f"{PROJ}.bias", Push(drawn(64), Target("nosuch")))],
        f"flowers: {PROJ}.bias: Push reads no tensor of the backbone"),
    "a push into the bias of a convolution that is scaled": (
        [at("patch_embed.proj.weight", Scale(drawn(64))),
         at("patch_embed.proj.bias", Push(drawn(3), Target("patch_embed.proj.weight")))],
        "flowers: patch_embed.proj.weight: Scale is of a convolution, and PEFT's GLoRA adapts linear layers alone"),
    "a push into the bias of a convolution alone": (
        [at("patch_embed.proj.bias", Push(drawn(3), Target("patch_embed.proj.weight")))],
        "flowers: patch_embed.proj.bias: Push is of a convolution, and PEFT's GLoRA adapts linear layers alone"),
}  # fmt: skip


@pytest.mark.parametrize(("updates", "message"), UNKEPT.values(), ids=UNKEPT)
def test_what_peft_has_no_adapter_for_is_refused(updates: list[Targeted], message: str, backbone: Backbone) -> None:
    with pytest.raises(InputError) as refused:
        unlower(updates, backbone.tensors, backbone.layers, {}, where="flowers")

    assert str(refused.value) == f"{message}\n  fix: edgepet merge writes dense weights of any pack"
