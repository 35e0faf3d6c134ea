"""``blocks``: any method on some of a network's blocks, and the rest of the network is the backbone itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from edgepet.errors import InputError
from edgepet.methods import METHODS, SSF, Branching, Full, LoRA, Method, VPTShallow, configure
from edgepet.methods.depth import blocks_of, first_block, in_blocks, within
from edgepet.methods.method import count
from edgepet.methods.settings import restored, stored
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import read_pack
from edgepet.spec import Preprocess, Site
from edgepet.tuning.model import TunedModel
from tests.flow import Tasks, edgepet, refused, train_arguments
from tests.methods import check_merged, check_pack, check_steps
from tests.tiny import ones, seeded, sites_of, tiny_vit

OF_CONVNETS_OR_CLIPS = {"conv-adapter", "st-adapter"}
ON_TOKENS = [name for name in METHODS if name not in OF_CONVNETS_OR_CLIPS]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    folder, made = tmp_path_factory.mktemp("networks"), dict[str, Backbone]()

    def of(architecture: str) -> Backbone:
        if architecture not in made:
            made[architecture] = tiny_vit(folder, seed=7, architecture=architecture)
        return made[architecture]

    return of


def names(layers: tuple[Site, ...]) -> list[str]:
    return [site.name for site in layers]


def touched(method: Method, backbone: Backbone) -> set[str]:
    """The tensors that a method changes, and the modules that its branches read and add to."""
    model = TunedModel(backbone, method, 3)
    tuned = {site: {name: t.detach().numpy() for name, t in own.items()} for site, own in model.tuned().items()}
    changed = {each.target.tensor for each in method.lower(backbone.tensors, model.sites, tuned)}
    ends = {point.partition(":")[0] for branch in model.branches(tuned) for point in (branch.tap, branch.into)}
    return changed | ends


# ------------------------------------------------------------------------------------------------- which layers


@pytest.mark.parametrize("name", ON_TOKENS)
def test_every_method_stays_in_its_blocks(name: str, backbone: Backbone) -> None:
    method = configure(name, {"blocks": "2-4"})

    places = touched(method, backbone)

    assert all(re.match(r"blocks\.[234](\.|$)", place) for place in places), sorted(places)
    assert places or name == "linear-probe"
    assert isinstance(method, METHODS[name])
    assert isinstance(method, Branching) is issubclass(METHODS[name], Branching)


@pytest.mark.parametrize("name", ["conv-adapter", "pro-tuning", "ssf", "full"])
def test_blocks_of_a_convnet_count_through_its_stages(name: str, network: Callable[[str], Backbone]) -> None:
    places = touched(configure(name, {"blocks": "2-3"}), network("test_resnet"))  # one block in each of four layers

    assert places
    assert all(place.startswith(("layer3.0", "layer4.0")) for place in places)


def test_an_adapter_of_clips_stays_in_its_blocks(network: Callable[[str], Backbone]) -> None:
    assert names(configure("st-adapter", {"blocks": "1"}).sites(network("test_vit").layers)) == ["blocks.1"]


def test_behind_the_last_block_a_final_norm_is_in_and_before_the_first_nothing_is(backbone: Backbone) -> None:
    inside = [f"blocks.5.{layer}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    layers = [site for site in backbone.layers if site.kind != "tensor"]

    assert names(within(layers, "5")) == [*inside, "norm", "blocks.5"]
    assert names(within(layers, "0"))[:2] == ["blocks.0.norm1", "blocks.0.attn.qkv"]
    assert not {"norm", "patch_embed.proj"} & set(names(within(layers, "0-4")))
    assert "patch_embed.proj" not in names(within(layers, "0-5"))


def test_what_lies_between_two_blocks_is_in_and_bare_parameters_are_where_their_modules_are(
    network: Callable[[str], Backbone],
) -> None:
    found = set(names(within(network("test_convnext").layers, "2-3")))  # stages of 1, 2, 4 and 2 blocks

    assert {"stages.1.blocks.1.conv_dw", "stages.2.blocks.0.mlp.fc2", "stages.2.downsample.1"} <= found
    assert {"stages.2.downsample.1.weight", "stages.2.downsample.1.bias"} <= found
    outside = ("stem", "stages.0", "stages.1.downsample", "stages.1.blocks.0", "stages.2.blocks.1", "stages.3", "head")
    assert not [name for name in found if name.startswith(outside)]


def test_full_tuning_of_the_last_blocks_leaves_positions_and_class_token(backbone: Backbone) -> None:
    places = touched(in_blocks(Full(), "4-5"), backbone)

    assert {"blocks.4.norm1.weight", "norm.weight", "norm.bias"} <= places
    assert not {"pos_embed", "cls_token", "reg_token", "patch_embed.proj.weight"} & places


def test_prompts_go_in_at_the_first_of_the_blocks_and_out_behind_the_last(backbone: Backbone) -> None:
    model = TunedModel(backbone, in_blocks(VPTShallow(length=2), "2-4"), 3)

    (branch,) = model.branches(model.tuned())

    assert (branch.tap, branch.into) == ("blocks.2:in", "blocks.4:out")


@pytest.mark.parametrize(
    ("method", "blocks", "values"),
    [
        (SSF(), "6-11", 6 * 22 * 384 + 2 * 384),  # d, 3 d, d, d, 4 d and d values twice in a block, and the last norm
        (SSF(), "5-10", 6 * 22 * 384),
        (SSF(), "0-11", 12 * 22 * 384 + 2 * 384),
        (LoRA(rank=8), "6-11", 147_456 // 2),
        (LoRA(rank=8), "7", 147_456 // 12),
    ],
    ids=lambda value: str(value)[:12],
)
def test_values_are_those_of_the_blocks(method: Any, blocks: str, values: int) -> None:
    layers = sites_of("vit_small_patch14_dinov2")

    assert count(in_blocks(method, blocks), layers, ones(layers)) == values


# ------------------------------------------------------------------------------------------------------ refusals

BAD = ["", "6-", "-3", "a", "3-2", "2-6", "6", "1,2", "2 - 3", "٣", "0x1", "1-2-3"]


@pytest.mark.parametrize("blocks", BAD)
def test_what_is_no_range_of_the_backbones_blocks_is_refused(blocks: str, backbone: Backbone) -> None:
    with pytest.raises(InputError) as refusal:
        in_blocks(SSF(), blocks).sites(backbone.layers)

    told = "`settings` blocks: needs a range of the backbone's 6 blocks, 0-5, or the number of one of them, got"
    assert str(refusal.value) == f"{told} {blocks!r}"


def test_a_backbone_without_blocks_is_told_so() -> None:
    network = seeded(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 1)
    flat = Backbone.from_module(network, name="flat", preprocess=Preprocess(image_size=(8, 8)))

    with pytest.raises(InputError) as refusal:
        TunedModel(flat, in_blocks(SSF(), "0-3"), 3)

    assert str(refusal.value) == "`settings` blocks: names blocks, and this backbone has 0, got '0-3'"


def test_a_command_with_a_bad_range_is_refused_before_images(tasks: Tasks, tmp_path: Path) -> None:
    words = train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "t.pet")

    told = "--set blocks: needs a range of the backbone's 6 blocks, 0-5, or the number of one of them, got '4-9'\n"
    assert refused(3, *words, "--set", "blocks=4-9") == told
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- one mechanism


def test_blocks_are_a_setting_as_any_other() -> None:
    method = configure("lora", {"rank": "4", "blocks": "6-11"})

    assert stored(method) == {**stored(LoRA(rank=4)), "blocks": "6-11"}
    assert restored("lora", stored(method)) == method == in_blocks(LoRA(rank=4), "6-11")
    assert in_blocks(method, "3") == configure("lora", {"rank": "4", "blocks": "3"})
    assert repr(method).startswith("LoRA(rank=4, ")
    assert (blocks_of(method), blocks_of(LoRA())) == ("6-11", None)
    assert configure("lora", {"rank": "4"}) == LoRA(rank=4)
    with pytest.raises(InputError, match="lora: needs a rank of at least 1, got 0"):
        configure("lora", {"rank": "0", "blocks": "6-11"})


@pytest.mark.parametrize("name", ["ssf", "bitfit", "consolidator", "fact-tt", "full"])
def test_a_method_without_on_is_kept_to_the_layers_that_it_names(name: str, backbone: Backbone) -> None:
    method = configure(name, {"on": "v,mlp.fc2", "blocks": "1-2"})

    layers = {f"blocks.{block}.{layer}" for block in (1, 2) for layer in ("attn.qkv", "mlp.fc2")}
    assert {place.rpartition(".")[0] for place in touched(method, backbone)} == layers
    assert stored(method) == {**stored(configure(name)), "on": ["v", "mlp.fc2"], "blocks": "1-2"}
    assert restored(name, stored(method)) == method
    assert configure(name, {"on": "mlp.fc2"}).sites(backbone.layers)
    assert configure(name, {"on": "nothing"}).sites(backbone.layers) == ()
    check_merged(method, backbone)
    check_pack(method, backbone)


@pytest.mark.parametrize(
    ("method", "first"),
    [(SSF(), None), (in_blocks(SSF(), "0-5"), None), (in_blocks(SSF(), "2-3"), "blocks.2"), (LoRA(), None)],
    ids=["all", "from the first", "from the third", "lora"],
)
def test_the_first_block_is_named_where_another_lies_before_it(
    method: Method, first: str | None, backbone: Backbone
) -> None:
    assert first_block(method, backbone.layers) == first


@pytest.mark.parametrize("name", ["ssf", "lora", "fact-tk", "kadaptation", "consolidator", "full"])
def test_merged_equals_tuned_and_a_pack_brings_it_back(name: str, scaled_backbone: Backbone) -> None:
    method = configure(name, {"blocks": "3-7"})

    check_merged(method, scaled_backbone)
    check_pack(method, scaled_backbone)
    check_steps(method, scaled_backbone)


def test_the_pack_says_which_blocks_and_holds_no_others(tasks: Tasks, tmp_path: Path) -> None:
    pack = tmp_path / "t.pet"
    words = train_arguments(tasks.spec, tasks.data, "lora", pack)

    said = edgepet(*words, "--set", "blocks=4-5", "--json")

    assert said.code == 0, said.err
    delta = read_pack(pack).delta
    assert delta.settings["blocks"] == "4-5"
    assert {re.sub(r"\[.*", "", str(each.target)) for each in delta.updates} == {
        "blocks.4.attn.qkv.weight",
        "blocks.5.attn.qkv.weight",
    }
    assert said.json["trainable_params"] == 2 * 4 * 8 * 64  # blocks, factors, rank, width
    assert edgepet("eval", pack, tasks.data, "--json").code == 0
