"""HTA, ARC, VeRA and Uni-LoRA on networks of every kind, and what their packs store of what is drawn or shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepet.deltas.expressions import Gather, Scaled, Seeded, Window
from edgepet.deltas.updates import LowRank, Precompose, Push, factors, generated
from edgepet.errors import InputError
from edgepet.methods import ARC, HTA, Method, UniLoRA, VeRA
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.spec import Preprocess, Site
from tests.architectures import swin
from tests.methods import check_merged, check_pack, check_steps, stored
from tests.tiny import make_delta, ones, seeded, sites_of, tiny_vit

METHODS: dict[str, Method] = {
    "hta": HTA(), "arc": ARC(rank=5), "vera": VeRA(rank=6, seed=3), "uni-lora": UniLoRA(d=100, rank=2),
}  # fmt: skip
NETWORKS = ("test_resnet", "test_convnext", "test_efficientnet", "swin")
SMALL = "vit_small_patch14_dinov2"


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    name: str = request.param
    if name == "swin":
        return Backbone.from_module(seeded(swin(), 7), name=name, preprocess=Preprocess(image_size=(32, 32)))
    return tiny_vit(tmp_path_factory.mktemp(name), seed=7, architecture=name)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_network_of_another_kind_is_merged_and_packed_as_a_vit_is(method: Method, network: Backbone) -> None:
    if method.name == "arc" and network.name in ("test_resnet", "test_efficientnet"):
        assert method.sites(network.layers) == ()  # every norm is behind its convolution
        return
    check_merged(method, network)
    check_pack(method, network)
    check_steps(method, network)


def test_arc_in_front_of_bias_less_convolutions_is_pushed_into_their_batch_norms(tmp_path: Path) -> None:
    backbone = tiny_vit(tmp_path, seed=7, architecture="test_efficientnet", image_size=64)
    method = ARC(rank=2, on=("conv_pw", "conv_pwl"))

    check_merged(method, backbone)
    check_pack(method, backbone)


# ------------------------------------------------------------------------------------------------- what packs store


def lowered(method: Method, layers: tuple[Site, ...]) -> list[object]:
    sites, weights = method.sites(layers), ones(layers)
    start = method.start(sites, weights, np.random.default_rng(0))
    return [targeted.update for targeted in method.lower(weights, sites, start)]


def test_all_layers_of_one_kind_have_one_projection() -> None:
    updates = lowered(ARC(), sites_of(SMALL))
    through = [update for update in updates if isinstance(update, Precompose)]

    assert len(through) == len([update for update in updates if isinstance(update, Push)]) == 24
    assert all(isinstance(update.right, Scaled) and update.right.base is update.left for update in through)
    assert len({id(update.left) for update in through}) == 2
    assert through[0].left is not through[1].left  # attention's, and the MLP's
    assert through[0].left is through[2].left


def test_layers_of_vera_draw_the_first_columns_and_rows_of_one_pair() -> None:
    method = VeRA(rank=4, seed=11, on=("q", "fc1", "fc2"))
    updates = lowered(method, sites_of(SMALL))

    assert all(isinstance(update, LowRank) and factors(update).keys() == {"left.c", "right.c"} for update in updates)
    windows = {tuple(generated(update).items()) for update in updates}  # type: ignore[arg-type]
    behind = 2**22
    assert windows == {
        (("left.base.draws", Window(behind, (rows, 4))), ("right.base.draws", Window(0, (columns, 4))))
        for rows, columns in ((384, 384), (1536, 384), (384, 1536))
    }
    first, long = updates[0].right, updates[2].right  # type: ignore[attr-defined]
    narrow, wide = (right.base.value(np.zeros(0)) / right.base.bound for right in (first, long))
    assert isinstance(first.base, Seeded)
    assert np.abs(narrow - wide[:384]).max() <= 1e-15


def test_factors_of_uni_lora_lie_one_behind_the_other() -> None:
    updates = lowered(UniLoRA(), sites_of(SMALL))
    parts = [part for update in updates for part in (update.right, update.left)]  # type: ignore[attr-defined]

    assert all(isinstance(part, Gather) and part.total == 24 * 4 * (384 + 384) for part in parts)
    assert len({id(part.values) for part in parts}) == 1
    at = 0
    for part in parts:
        assert part.index.start == at
        at += part.index.size
    assert at == parts[0].total


@pytest.mark.parametrize(
    ("method", "most"),
    [(ARC(rank=16), 45_500), (VeRA(), 33_000), (UniLoRA(), 5_700), (UniLoRA(d=500), 2_700)],
    ids=repr,
)
def test_a_pack_of_a_vit_s_has_few_kilobytes(method: Method, most: int) -> None:
    layers = sites_of(SMALL)
    sites, weights = method.sites(layers), ones(layers)
    delta = make_delta(method.lower(weights, sites, method.start(sites, weights, np.random.default_rng(0))))

    data = encode_pack(delta)

    assert len(data) < most  # what starts as zeros takes next to nothing
    assert sum(plane.stored.values for plane in read_pack(data).planes.values()) >= stored(method, layers)
    assert read_pack(data).delta.stored_values == delta.stored_values


def test_another_seed_is_another_task(backbone: Backbone) -> None:
    for method in (VeRA(rank=4), UniLoRA(d=60)):
        other = replace(method, seed=method.seed + 1)
        base = {name: tensor.astype(np.float64) for name, tensor in backbone.tensors.items()}
        left = [
            each.lower(base, each.sites(backbone.layers), each.start(each.sites(backbone.layers), base, rng))
            for each, rng in ((method, np.random.default_rng(0)), (other, np.random.default_rng(0)))
        ]
        one, two = (updates[0].update.right.value(np.zeros(0)) for updates in left)  # type: ignore[union-attr]
        assert np.abs(one - two).max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- limits


def test_what_a_device_would_have_to_draw_at_once_has_a_limit() -> None:
    layers = sites_of(SMALL)
    with pytest.raises(InputError) as refused:
        VeRA(rank=4096, on=("fc2",)).start(VeRA(on=("fc2",)).sites(layers), {}, np.random.default_rng(0))
    assert str(refused.value) == (
        "vera: needs a rank of at most 2730 on blocks.0.mlp.fc2: a pack draws 4194304 values at once, got 4096"
    )

    method = UniLoRA(d=100_000)
    with pytest.raises(InputError) as refused:
        method.start(method.sites(layers), {}, np.random.default_rng(0))
    assert str(refused.value) == (
        "uni-lora: needs factors of 100000 (d) to 4194304 values in all, got 73728\n"
        "  fix: set another d or rank, or other layers with on"
    )
    method = UniLoRA(rank=300)
    with pytest.raises(InputError, match=r"needs factors of 2000 \(d\) to 4194304 values in all, got 5529600"):
        method.start(method.sites(layers), {}, np.random.default_rng(0))
